"""Devices of two QEMUs: QEMU finds a device's state by where the device is.

Nothing of x-query-virtio-* is asked: QEMU 11.1 crashes when it is asked for the status of a virtio-rng, and to be asked
for a queue of a vhost-user device stops that queue.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from multifd.jobs.doctor.board import SILENT
from multifd.jobs.doctor.trouble import Trouble
from multifd.qemu.monitor import of, shown

VIRTIO_VENDOR = 0x1AF4
VIRTIO_DEVICES = range(0x1000, 0x1080)
VIRTIO_TYPES = ("virtio-", "vhost-")
#: What those devices implement that have an address on a PCI bus, and those that are compared in another way.
PCI = "pci-device"
OTHERWISE = ("memory-device", "cpu")
#: The machines' own bus, q35's and i440fx's.
ROOT_BUSES = ("pcie.0", "pci.0")
#: Bridges behind each other that are followed.
DEEPEST = 64


@dataclass(frozen=True, slots=True)
class PciDevice:
    """`kind` is its type, or what it is called where QEMU tells no type; behind a bridge its numbers are 0."""

    kind: str
    vendor: int
    device: int

    @property
    def is_virtio(self) -> bool:
        """Whether its state has virtqueues."""
        numbered = self.vendor == VIRTIO_VENDOR and self.device in VIRTIO_DEVICES
        return numbered or self.kind.startswith(VIRTIO_TYPES)

    def fits(self, other: PciDevice) -> bool:
        """Whether both are the same kind of device."""
        if self.vendor and other.vendor:
            return (self.vendor, self.device) == (other.vendor, other.device)
        return self.kind == other.kind

    def told(self, beside: PciDevice) -> str:
        """With its numbers where the name is the other's too: a virtio device has others with disable-legacy."""
        return f"{self} ({self.vendor:04x}:{self.device:04x})" if self.kind == beside.kind else str(self)

    def __str__(self) -> str:
        return self.kind or f"{self.vendor:04x}:{self.device:04x}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device is: `slot` and function as a number, and the path of its bus."""

    slot: int
    bus: str


def read_root(answer: Any) -> dict[str, PciDevice]:
    """`query-pci`'s answer, for `Monitor.ask`: what is on the root bus.

    It tells what is behind a bridge only once the guest's firmware has numbered that bus.
    """
    found = {}
    for bus in of(list, answer):
        for item in of(list, bus["devices"]) if bus["bus"] == 0 else []:
            address = f"00:{of(int, item['slot']):02x}.{of(int, item['function']):x}"
            name = shown(of(str, item["class_info"].get("desc", "")))
            found[address] = PciDevice(name, of(int, item["id"]["vendor"]), of(int, item["id"]["device"]))
    return found


def pci_devices(
    root: Mapping[str, PciDevice], types: Mapping[str, str], places: Mapping[str, Place]
) -> dict[str, PciDevice]:
    """`00:03.0` -> what is there, `00:03.0/00.0` -> what is behind that bridge; of devices by their paths."""

    found = dict(root)
    for path in places:
        there = root.get(where := _address(path, places))
        found[where] = PciDevice(types[path], there.vendor if there else 0, there.device if there else 0)
    return dict(sorted(found.items()))


def _address(path: str, places: Mapping[str, Place], depth: int = 0) -> str:
    place = places[path]
    below, _, name = place.bus.rpartition("/")
    bus = "00:" if name in ROOT_BUSES else f"{name}:"
    if below in places and depth < DEEPEST:
        bus = f"{_address(below, places, depth + 1)}/"
    return f"{bus}{place.slot >> 3:02x}.{place.slot & 7}"


def controller(bus: str, places: Mapping[str, Place]) -> str:
    """The PCI address of the device that has this bus (a path), or the bus's name: where QEMU has made it itself."""
    owner, _, name = bus.rpartition("/")
    while owner and owner not in places:
        owner = owner.rpartition("/")[0]
    return _address(owner, places) if owner else name


def read_types(answer: Any) -> dict[str, str]:
    """`qom-list`'s answer, for `Monitor.ask`: the names of the objects that are there, and their types."""
    items = [(of(str, item["name"]), of(str, item["type"])) for item in of(list, answer)]
    return {name: shown(kind[len("child<") : -1]) for name, kind in items if kind.startswith("child<")}


def read_names(answer: Any) -> set[str]:
    """`qom-list-types`'s answer, for `Monitor.ask`."""
    return {of(str, item["name"]) for item in of(list, answer)}


def read_disks(answer: Any) -> dict[str, int]:
    """`query-block`'s answer, for `Monitor.ask`: the ids of devices, and how many bytes the guest sees there."""
    found = {}
    for item in of(list, answer):
        # Those without an id are numbered, as they came on the command line.
        _, named, rest = of(str, item.get("qdev", "")).partition("/machine/peripheral/")
        if named and "inserted" in item:
            name = rest.partition("/")[0]
            found[shown(name)] = of(int, item["inserted"]["image"]["virtual-size"])
    return dict(sorted(found.items()))


_SAME = "start the destination with the source's -device options, addr= included"


def compare_pci(source: Mapping[str, PciDevice], destination: Mapping[str, PciDevice]) -> Iterator[Trouble]:
    """Each of the source's has to be on the destination, which may have more."""
    for address, device in source.items():
        twin = destination.get(address)
        if twin is None:
            if device.kind in SILENT:
                continue
            yield Trouble(f"the destination has no PCI device at {address}, where the source has {device}", _SAME)
        elif not device.fits(twin):
            yield Trouble(f"the PCI devices at {address} differ: {device.told(twin)} and {twin.told(device)}", _SAME)


def compare_types(source: Mapping[str, int], destination: Mapping[str, int]) -> Iterator[Trouble]:
    """How many of each the source has, on the destination too, which may have more."""
    for name, count in source.items():
        if count > (other := destination.get(name, 0)) and name not in SILENT:
            yield Trouble(
                f"the source has {count} of device {name}, the destination {other}",
                "start the destination with the source's -device options",
            )


def compare_disks(source: Mapping[str, int], destination: Mapping[str, int]) -> Iterator[Trouble]:
    """None may be smaller on the destination."""
    for name, size in source.items():
        if size > (other := destination.get(name, size)):
            yield Trouble(
                f"disk {name} has {size} bytes on the source, {other} on the destination",
                "give the destination the same disk, or one of that size",
            )
