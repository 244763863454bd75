"""Memory to send: as a guest has it, or made of every kind of page."""

from __future__ import annotations

import random
import sys
from functools import cache
from pathlib import Path

import streams


@cache
def memory() -> bytes:
    """8 MiB like a guest's memory: programs, text, templates, zeros, and noise."""
    mix = random.Random(1)
    text = "".join(f"{number:06} {number * number % 997} entry\n" for number in range(40000)).encode()
    program = Path(sys.executable).resolve().read_bytes()
    parts = [text, program[: 3 << 20], bytes(1 << 20), mix.randbytes(64) * 8192, mix.randbytes(2 << 20)]
    return (b"".join(parts) * 3)[: 8 << 20]


def write_memory(work: Path) -> bytes:
    """6 MiB of `memory`, as `image.raw`."""
    content = memory()[: 6 << 20]
    (work / "image.raw").write_bytes(content)
    return content


def write_pages(path: Path, pages: int, page_size: int, seed: int = 1) -> bytes:
    """An image of text, noise, zero pages, and pages that are zero but for their last byte."""
    mix = random.Random(seed)
    kinds = [bytes(page_size), bytes(page_size), mix.randbytes(page_size), bytes(page_size - 1) + b"\1"]
    content = b"".join(
        streams.pattern(number, page_size) if mix.random() < 0.5 else mix.choice(kinds) for number in range(pages)
    )
    path.write_bytes(content)
    return content
