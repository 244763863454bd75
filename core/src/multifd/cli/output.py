"""What is printed."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from multifd.cli import lines
from multifd.errors import counted, reason
from multifd.jobs.report import EVERY
from multifd.log import escaped, log

if TYPE_CHECKING:
    from multifd.jobs.report import OnProgress, Progress, Result


def say(text: str) -> None:
    """One line on standard error."""
    log.info(text)


def emit(*text: str) -> None:
    """Lines of what a command is for, on standard output.  Raises HostError where they cannot be written."""
    lines.stdout.write(text)


def emit_json(found: object) -> None:
    """Likewise, for machines."""
    emit(*json.dumps(found, indent=2).split("\n"))


def tell(text: str) -> None:
    """How something ended that has ended so whether anybody is told or not: one line on standard output."""
    try:
        lines.stdout.offer(escaped(text))
    except OSError as error:
        why = "nobody reads it" if isinstance(error, BlockingIOError) else reason(error)
        why = "it is closed" if lines.stdout.closed else why
        log.warning(f"standard output takes no more: {why}: {text}")


def report(arguments: argparse.Namespace, verb: str, result: Result, more: dict[str, Any]) -> None:
    if arguments.json:
        tell(json.dumps(asdict(result) | more))
        return
    rate = result.memory_bytes / max(result.seconds, 1e-9)
    pages = result.normal_pages + result.zero_pages
    channels = counted(result.channels, "channel")
    target = f" into {more['snapshot']}" if more else ""
    tell(
        f"{verb} {size_text(result.memory_bytes)} in {result.seconds:.2f} s ({size_text(rate)}/s){target}: {pages} "
        f"pages, {result.zero_pages} of them zero; {size_text(result.wire_bytes)} on the wire (ratio "
        f"{result.memory_bytes / max(result.wire_bytes, 1):.2f}), {channels}, {result.compressor}"
        f"{ways(result.statistics)}{stood_still(result)}"
    )


def stood_still(result: Result) -> str:
    """For how long the guest did, where that is known."""
    return "" if result.standstill is None else f"; the guest stood still for {result.standstill:.2f} s"


def ways(statistics: dict[str, int]) -> str:
    """What the compressors counted, in brackets; empty where there is but one way."""
    ways = ", ".join(f"{count} {way}" for way, count in sorted(statistics.items()))
    return f" (packets: {ways})" if ways else ""


def print_table(table: Sequence[Sequence[str]], *, numbers: bool = False) -> None:
    """Columns two spaces apart; `numbers` are to the right, but for the first column."""
    shown = [[escaped(cell) for cell in line] for line in table]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for first, *line in shown:
        cells = [
            cell.rjust(width) if numbers else cell.ljust(width) for cell, width in zip(line, widths[1:], strict=True)
        ]
        emit("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def rewrite(text: str) -> None:
    """One line on the terminal instead of what stood there, until there is a record."""
    with suppress(OSError):  # who does not look on has gone
        lines.stderr.offer(escaped(text), unfinished=bool(text))


def size_text(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


class ProgressLine:
    """How far a migration is: one line on the terminal, rewritten, or a record every so often where that is asked for.

    `show` is None where neither is.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._terminal = os.isatty(lines.stderr.fd) and arguments.log == "text"
        self.show: OnProgress | None = self._show if self._terminal or arguments.progress else None
        self._every: float = arguments.progress or EVERY
        self._last: Progress | None = None
        self._shown = time.monotonic()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def clear(self) -> None:
        """The migration has ended."""
        if self._last is not None and self._terminal:
            rewrite("")
        self._last = None

    def _show(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._shown < self._every - EVERY / 2:
            return
        self._shown = now
        told = measured(progress, self._last)
        self._last = progress
        left, percent = told["seconds_left"], told["percent"]
        text = f"{size_text(told['bytes_per_second'])}/s, ratio {told['ratio']:.2f}"
        text = text if percent is None else f"{percent:.0f} %, {text}"
        text = text if left is None else f"{text}, {left:.0f} s left"
        if self._terminal:
            rewrite(text)
        else:
            log.info(f"progress: {text}", extra={"progress": told})


def measured(progress: Progress, last: Progress | None) -> dict[str, Any]:
    """What a machine reads of it: `percent` and `seconds_left` are None while they cannot be known.

    A running guest writes pages that have gone already, and they go again: then there is more than once all of it, and
    nobody knows how much more.
    """
    seconds = progress.seconds - (last.seconds if last else 0)
    memory = progress.memory_bytes - (last.memory_bytes if last else 0)
    rate = max(memory, 0) / max(seconds, 1e-9)
    left = progress.total_pages - progress.pages
    page_size = progress.memory_bytes / progress.pages if progress.pages else 0
    known = progress.total_pages > 0 and left >= 0
    return {
        "percent": round(100 * progress.pages / progress.total_pages, 1) if known else None,
        "seconds_left": round(left * page_size / rate, 1) if known and rate else None,
        "bytes_per_second": round(rate),
        "ratio": round(progress.memory_bytes / max(progress.wire_bytes, 1), 2),
        "pages": progress.pages,
        "total_pages": progress.total_pages,
    }
