"""How the processors of two QEMUs are arranged: QEMU finds an x86 processor's state by its APIC id."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from multifd.jobs.doctor.trouble import Trouble
from multifd.qemu.monitor import of

#: From the outermost; a level that a machine does not have is not told.
LEVELS = ("socket", "die", "module", "core", "thread")
#: How the types of processors end that have APIC ids.
X86 = ("-x86_64-cpu", "-i386-cpu")

Positions = tuple[tuple[int, ...], ...]


def read_positions(answer: Any) -> Positions:
    """`query-cpus-fast`'s answer, for `Monitor.ask`: where each processor is, a number a level."""
    told = [item.get("props", {}) for item in of(list, answer)]
    return tuple(sorted(tuple(of(int, props.get(f"{level}-id", 0)) for level in LEVELS) for props in told))


def widths(positions: Positions) -> tuple[int, ...]:
    """How many there are at each level."""
    return tuple(max(numbers) + 1 for numbers in zip(*positions, strict=True))


def apic_ids(positions: Positions) -> set[int]:
    """Each level has as many bits as it needs."""
    bits = [(width - 1).bit_length() for width in widths(positions)]
    found = set()
    for position in positions:
        number = 0
        for level, count in zip(position, bits, strict=True):
            number = number << count | level
        found.add(number)
    return found


def arranged(positions: Positions) -> str:
    """As -smp writes it."""
    pairs = zip(LEVELS, widths(positions), strict=False)
    return ",".join(f"{level}s={width}" for level, width in pairs if width > 1) or "cores=1"


def fit(source: Positions, destination: Positions) -> bool:
    """Whether the destination has a processor for each of the source's."""
    return apic_ids(source) <= apic_ids(destination)


def compare_positions(source: Positions, destination: Positions) -> Iterator[Trouble]:
    """Each of the source's has to be on the destination, which may have more."""
    if fit(source, destination):
        return
    if widths(source) == widths(destination):
        yield Trouble("processors are plugged in at other places", "plug in the same ones on the destination")
    yield from advise_positions(source, destination)


def advise_positions(source: Positions, destination: Positions) -> Iterator[Trouble]:
    """That they are arranged in different ways, where they are: the guest has seen the source's."""
    if widths(source) != widths(destination):
        yield Trouble(
            f"processors are arranged differently: {arranged(source)} and {arranged(destination)}",
            f"start the destination with -smp {len(source)},{arranged(source)}",
        )
