"""What is printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from multifd.errors import counted

if TYPE_CHECKING:
    from multifd.jobs.report import OnProgress, Progress, Result


def say(text: str) -> None:
    """One line."""
    print(f"multifd: {text}".replace("\n", " "), file=sys.stderr, flush=True)


_warned: set[str] = set()


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Each text once: many channels have the same to say."""
    if str(message) not in _warned:
        _warned.add(str(message))
        say(f"warning: {message}")


def report(arguments: argparse.Namespace, verb: str, result: Result, more: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps(asdict(result) | more))
        return
    rate = result.memory_bytes / max(result.seconds, 1e-9)
    pages = result.normal_pages + result.zero_pages
    channels = counted(result.channels, "channel")
    target = f" into {more['snapshot']}" if more else ""
    print(
        f"{verb} {size_text(result.memory_bytes)} in {result.seconds:.2f} s ({size_text(rate)}/s){target}: {pages} "
        f"pages, {result.zero_pages} of them zero; {size_text(result.wire_bytes)} on the wire (ratio "
        f"{result.memory_bytes / max(result.wire_bytes, 1):.2f}), {channels}, {result.compressor}"
        f"{ways(result.statistics)}"
    )


def ways(statistics: dict[str, int]) -> str:
    """What the compressors counted, in brackets; empty where there is but one way."""
    ways = ", ".join(f"{count} {way}" for way, count in sorted(statistics.items()))
    return f" (packets: {ways})" if ways else ""


def print_table(table: Sequence[Sequence[str]], *, numbers: bool = False) -> None:
    """Columns two spaces apart; `numbers` are to the right, but for the first column."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *line in table:
        cells = [
            cell.rjust(width) if numbers else cell.ljust(width) for cell, width in zip(line, widths[1:], strict=True)
        ]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def rewrite(text: str) -> None:
    """One line on the terminal instead of what stood there."""
    with suppress(OSError):  # who does not look on has gone
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def size_text(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


class ProgressLine:
    """One line on the terminal, rewritten; `show` is None where there is no terminal."""

    def __init__(self) -> None:
        self.show: OnProgress | None = self._show if sys.stderr.isatty() else None
        self._last: Progress | None = None

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._last is not None:
            rewrite("")

    def _show(self, progress: Progress) -> None:
        last = self._last
        seconds = progress.seconds - last.seconds if last else progress.seconds
        memory = progress.memory_bytes - last.memory_bytes if last else progress.memory_bytes
        self._last = progress
        ratio = progress.memory_bytes / max(progress.wire_bytes, 1)
        left = max(progress.total_pages - progress.pages, 0)
        rewrite(f"{size_text(max(memory, 0) / max(seconds, 1e-9))}/s, ratio {ratio:.2f}, {left} pages left")
