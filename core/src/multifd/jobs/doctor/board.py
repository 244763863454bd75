"""What a machine has of itself, by its -machine, -serial and like options; each release names these in its own way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from multifd.jobs.doctor.trouble import Trouble

#: Where QEMU keeps them.
BOARD = "/machine/unattached"
#: The same device, as KVM does it: what it sends is the same.
TWINS = {"kvm-i8259": "isa-i8259", "kvm-pit": "isa-pit"}
#: Devices that send nothing: QEMU takes the migration where the destination has none.
SILENT = frozenset({"edu", "isa-debug-exit", "isa-debugcon", "pc-testdev", "pci-testdev", "pvpanic", "vmport"})


def count(kinds: Iterable[str]) -> dict[str, int]:
    """How many there are of each."""
    return dict(Counter(sorted(TWINS.get(kind, kind) for kind in kinds)))


def listed(counted: Mapping[str, int]) -> str:
    """For a person."""
    return ", ".join(kind if number == 1 else f"{number} {kind}" for kind, number in sorted(counted.items()))


def compare_boards(source: Mapping[str, int], destination: Mapping[str, int]) -> Iterator[Trouble]:
    """Each of the source's has to be on the destination, which may have more."""
    missing = {kind: n for kind, n in (Counter(source) - Counter(destination)).items() if kind not in SILENT}
    if missing:
        yield Trouble(
            f"the destination's machine lacks what the source's has: {listed(missing)}",
            "start the destination with the source's -machine, -serial, -parallel, -drive and -usb options",
        )
