"""RAM blocks and memory devices of two QEMUs: QEMU finds memory by its block's name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from multifd.jobs.doctor.trouble import Trouble
from multifd.qemu.monitor import of, shown

#: A row of `x-query-ramblock`, which is a table for people: name, page size, offset, used and total length; newer
#: releases have more columns.
ROW = re.compile(r" *(.*?) +\d+ [KMGTP]?i?B +0x[0-9a-f]+ +0x([0-9a-f]+) +0x([0-9a-f]+)(?: .*)?", re.ASCII)
#: Names that one finding tells.
MOST = 8


@dataclass(frozen=True, slots=True)
class RamBlock:
    """Lengths in bytes; one whose `used` is less than its `total` takes on the source's length."""

    name: str
    used: int
    total: int


@dataclass(frozen=True, slots=True, order=True)
class MemoryDevice:
    """A DIMM, or a device like one: where it is in the guest's memory, and its bytes at most."""

    address: int
    kind: str
    size: int

    @classmethod
    def read(cls, item: dict[str, Any]) -> Self:
        """From an element of `query-memory-devices`'s answer."""
        data = item["data"]
        address = data["addr"] if "addr" in data else data["memaddr"]
        size = data["max-size"] if "max-size" in data else data["size"]
        return cls(of(int, address), shown(of(str, item["type"])), of(int, size))


def read_blocks(answer: Any) -> tuple[RamBlock, ...]:
    """`x-query-ramblock`'s answer, for `Monitor.ask`.  A block without a name is not migrated."""
    rows = map(ROW.fullmatch, of(str, answer["human-readable-text"]).splitlines())
    return tuple(RamBlock(shown(row[1]), int(row[2], 16), int(row[3], 16)) for row in rows if row and row[1])


def read_memory_devices(answer: Any) -> tuple[MemoryDevice, ...]:
    """`query-memory-devices`'s answer, for `Monitor.ask`."""
    return tuple(sorted(map(MemoryDevice.read, of(list, answer))))


def compare_blocks(source: Sequence[RamBlock], destination: Sequence[RamBlock]) -> Iterator[Trouble]:
    """Each of the source's has to be on the destination, which may have more."""
    there = {block.name: block for block in destination}
    extra = there.keys() - {block.name for block in source}
    for block in source:
        twin = there.get(block.name)
        if twin is None:
            like = sorted(name for name in extra if there[name].total == block.total)
            instead = f" (it has {', '.join(like[:MOST])} of that size)" if like else ""
            yield Trouble(
                f"RAM block {block.name} ({_size(block.used)}) is not on the destination{instead}",
                "start the destination with the same memory and devices; the id of a -object memory-backend-... is its "
                "block's name",
            )
        elif block.used != twin.used and not _resizes(block, twin):
            yield Trouble(
                f"RAM block {block.name} differs: {_size(block.used)} and {_size(twin.used)}",
                "start the destination with the same sizes of memory, and with the same firmware",
            )


def _resizes(block: RamBlock, twin: RamBlock) -> bool:
    return block.used <= twin.total and (block.used < block.total or twin.used < twin.total)


def compare_memory_devices(source: Sequence[MemoryDevice], destination: Sequence[MemoryDevice]) -> Iterator[Trouble]:
    """The guest finds each at its address: nothing fails where it has moved, but for the guest."""
    for device in source:
        if device not in destination:
            yield Trouble(
                f"the destination has no {device.kind} of {_size(device.size)} at {device.address:#x}",
                "start the destination with the same -device, slot= and addr= included",
            )


def _size(count: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count and count % (1 << shift) == 0:
            return f"{count >> shift} {unit}"
    return f"{count} bytes"
