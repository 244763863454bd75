"""Pieces of memory that stand for the rest of it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from multifd.wire.flags import PACKET_SIZE

#: Bytes of pages that every rung is measured on, half of them to get going.
SAMPLE = 256 * 1024
#: A look at a packet takes so many of its bytes.  Of 256 random ones 162 differ, 6 more or less; of text about 50, of
#: machine code about 110.
LOOK = 256
RANDOM = 145


def looks_random(pages: Sequence[memoryview]) -> bool:
    """Whether a packet is of compressed or encrypted data, by a few bytes from all over its longest run."""
    run = max(pages, key=len)
    if len(run) < 8 * LOOK:
        return False
    step = len(run) // LOOK | 1  # odd: not the same place of every page
    return len(set(run[::step])) > RANDOM


def sample(pages: Sequence[memoryview], page_size: int) -> bytes:
    """Up to SAMPLE bytes of a packet, in groups of four neighbours."""
    found = [run[at : at + 4 * page_size] for run in pages for at in range(0, len(run), 4 * page_size)]
    step = max(1, len(found) * 4 * page_size // SAMPLE)
    return b"".join(found[::step])


def own_sample() -> bytes:
    """Machine code, tables and text of this process, as they are in a guest's memory: up to four packets."""
    with open("/proc/self/maps") as maps:
        mapped = {line.split(maxsplit=5)[5].strip() for line in maps if " r-xp " in line and "/" in line}
    data = b""
    for path in [os.__file__, *sorted(filter(os.path.isfile, mapped))]:
        with open(path, "rb") as file:
            data += file.read(PACKET_SIZE)
    return data[: min(len(data) // 65536, 32) * 65536]  # pages of any size
