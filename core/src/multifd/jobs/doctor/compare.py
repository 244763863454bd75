"""Compare the two QEMUs of a migration before anything moves.

    from multifd.jobs.doctor.compare import compare
    from multifd.jobs.doctor.side import examine
    from multifd.qemu.monitor import Monitor

    with Monitor("here.qmp") as here, Monitor("there.qmp") as there:
        for trouble in compare(examine(here), examine(there)):
            print(trouble.what, trouble.remedy)

Only questions are asked: nothing is set on either side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from multifd.jobs.doctor.board import SILENT, compare_boards, listed
from multifd.jobs.doctor.devices import compare_disks, compare_pci, compare_types
from multifd.jobs.doctor.memory import compare_blocks, compare_memory_devices
from multifd.jobs.doctor.processors import X86, advise_positions, compare_positions, fit
from multifd.jobs.doctor.seats import compare_seats
from multifd.jobs.doctor.settings import advise_settings, compare_capabilities, compare_parameters
from multifd.jobs.doctor.side import Side, dotted
from multifd.jobs.doctor.trouble import Trouble
from multifd.qemu.states import (
    Guest,
    blocked,
    destination_obstacle,
    leftover,
    mode_effect,
    mode_obstacle,
    source_obstacle,
)

#: The first release that we speak with: 7.2 is the oldest that was tried.
OLDEST = (7, 2)
#: Releases whose virtqueues are 1024 long until the guest's driver has set them up, and the first that refuses them.
#: 10.0.13 is the only one that was tried; 10.2 does it no more.
LONG_QUEUES = ((10, 0, 13), (10, 1, 0))
REFUSES_LONG_QUEUES = (11, 1, 0)


def compare(source: Side, destination: Side) -> list[Trouble]:
    """What would fail; empty where nothing is seen."""
    troubles = [
        *_releases(source, destination),
        *compare_capabilities(source, destination),
        *_obstacles(source, destination),
        *_machines(source, destination),
        *compare_parameters(source, destination),
    ]
    if source.machine == destination.machine:  # else they differ in more than can be told
        troubles += [*_memory(source, destination), *_devices(source, destination), *_processors(source, destination)]
        if _long_queues(source, destination) and source.status == "prelaunch":
            troubles.append(Trouble(f"{_QUEUES} has not set up: it has not run yet", f"let it boot first, or {_OLDER}"))
    return troubles


def advise(source: Side, destination: Side) -> list[Trouble]:
    """What could be better, or be somebody's leaving, though nothing fails."""
    found = [*advise_settings(source, destination), *_leavings(source, destination)]
    if source.machine == destination.machine:
        found += [*_surplus(source, destination), *_silent(source, destination)]
        same_count = source.cpus == destination.cpus and _told(source, destination, "cpus")
        if same_count and fit(source.cpu_positions, destination.cpu_positions):
            found += advise_positions(source.cpu_positions, destination.cpu_positions)
        if _long_queues(source, destination) and source.status != "prelaunch":
            found.append(
                Trouble(f"{_QUEUES} has not set up", f"see that it has a driver for every virtio device, or {_OLDER}")
            )
    for side, who in ((source, "source"), (destination, "destination")):
        if side.untold:
            names = ", ".join(name.replace("_", " ") for name in side.untold)
            found.append(Trouble(f"the {who} does not tell of its {names}", "compare them yourself"))
    return found


_QUEUES = "a destination of 11.1 refuses what QEMU 10.0 sends of a virtio queue that its guest"
_OLDER = "take QEMU 10.0 or 10.2 there"


def _long_queues(source: Side, destination: Side) -> bool:
    first, after = LONG_QUEUES
    return (
        first <= source.version < after
        and destination.version >= REFUSES_LONG_QUEUES
        and any(device.is_virtio for device in source.pci_devices.values())
    )


def _releases(source: Side, destination: Side) -> Iterator[Trouble]:
    for side, who in ((source, "source"), (destination, "destination")):
        if side.version < OLDEST:
            yield Trouble(f"the {who} is QEMU {dotted(side.version)}: older than 7.2, the oldest tried", "upgrade it")


def _obstacles(source: Side, destination: Side) -> Iterator[Trouble]:
    for side, who, obstacle_of in (
        (source, "source", source_obstacle),
        (destination, "destination", destination_obstacle),
    ):
        if obstacle := obstacle_of(Guest(side.status, side.runs), side.migration):
            yield Trouble(f"the {who} {obstacle.what}", obstacle.remedy)
    if obstacle := mode_obstacle(source.parameters) or blocked(source.migration):
        yield Trouble(f"the source {obstacle.what}", obstacle.remedy)


def _machines(source: Side, destination: Side) -> Iterator[Trouble]:
    for what, option, ours, theirs in (
        ("machine types", "-machine", source.machine, destination.machine),
        ("memory sizes", "-m", f"{source.memory_bytes >> 20}M", f"{destination.memory_bytes >> 20}M"),
        ("uuids", "-uuid", source.uuid, destination.uuid),
    ):
        if ours != theirs:
            yield Trouble(f"{what} differ: {ours} and {theirs}", f"start the destination with {option} {ours}")


def _told(source: Side, destination: Side, *fields: str) -> bool:
    """Whether both have told of these, so that they can be compared."""
    return not {*source.untold, *destination.untold} & {*fields}


def _same_release(source: Side, destination: Side) -> bool:
    return source.version[:2] == destination.version[:2]


def _all(side: Side) -> Counter[str]:
    """Its devices on no PCI bus: what is -serial on one side may be -device isa-serial on the other."""
    return Counter(side.devices) + Counter(side.board)


def _memory(source: Side, destination: Side) -> Iterator[Trouble]:
    ours, theirs = source.memory_slots, destination.memory_slots
    if ours != theirs and _told(source, destination, "memory_slots"):
        as_here = f"-m ...,slots={ours},maxmem=..." if ours else "-m without slots="
        yield Trouble(f"memory slots differ: {ours} and {theirs}", f"start the destination with {as_here}")
    if _told(source, destination, "ram_blocks"):
        blocks = source.ram_blocks
        if source.memory_bytes != destination.memory_bytes:  # told already
            blocks = tuple(block for block in blocks if block.used != source.memory_bytes)
        yield from compare_blocks(blocks, destination.ram_blocks)
    if _told(source, destination, "memory_devices"):
        yield from compare_memory_devices(source.memory_devices, destination.memory_devices)


def _devices(source: Side, destination: Side) -> Iterator[Trouble]:
    if _told(source, destination, "pci_devices", "devices"):
        yield from compare_pci(source.pci_devices, destination.pci_devices)
    if _told(source, destination, "devices"):
        there = _all(destination)
        yield from compare_types(source.devices, there)
        if _same_release(source, destination):
            told_already = Counter(source.devices) - there
            yield from compare_boards(_all(source) - told_already, there)
        yield from compare_seats(source.seats, destination.seats)
    if _told(source, destination, "disks"):
        yield from compare_disks(source.disks, destination.disks)


def _processors(source: Side, destination: Side) -> Iterator[Trouble]:
    if source.cpus > destination.cpus and _told(source, destination, "cpus"):
        yield Trouble(
            f"the source has {source.cpus} processors, the destination {destination.cpus}",
            "start the destination with the source's -smp",
        )
    elif source.cpu.endswith(X86) and _told(source, destination, "cpus", "cpu"):
        yield from compare_positions(source.cpu_positions, destination.cpu_positions)
    ours, theirs = source.cpu_model or source.cpu, destination.cpu_model or destination.cpu
    if ours != theirs and _told(source, destination, "cpus", "cpu"):
        yield Trouble(
            f"processors differ: {source.cpu} and {destination.cpu}: the guest may miss there what it has seen here",
            "start the destination with the source's -cpu",
        )


def _leavings(source: Side, destination: Side) -> Iterator[Trouble]:
    if left := leftover(source.migration, source.capabilities):
        yield Trouble(f"the source {left.what}", left.remedy)
    if effect := mode_effect(source.parameters):
        yield Trouble(f"the source {effect.what}", effect.remedy)
    if destination.migration.listening:
        yield Trouble(
            "the destination listens already",
            "migrate to that address; for send --qmp start it again, with -incoming defer",
        )


def _surplus(source: Side, destination: Side) -> Iterator[Trouble]:
    """What only the destination has: QEMU takes the migration, but the guest has never seen it."""
    found: list[str] = []
    if _told(source, destination, "pci_devices", "devices"):
        extra = destination.pci_devices.keys() - source.pci_devices.keys()
        found += [f"{destination.pci_devices[address]} at {address}" for address in sorted(extra)]
    if _told(source, destination, "devices"):
        there = _all(destination) if _same_release(source, destination) else Counter(destination.devices)
        more = there - _all(source) - Counter(seat.kind for seat in destination.seats if seat.listed)
        found += [listed(more)] if more else []
    if _told(source, destination, "memory_devices"):
        dimms = [device for device in destination.memory_devices if device not in source.memory_devices]
        found += [f"{device.kind} at {device.address:#x}" for device in dimms]
    if destination.cpus > source.cpus and _told(source, destination, "cpus"):
        found.append(f"{destination.cpus} processors for {source.cpus}")
    if found:
        yield Trouble(
            f"the destination has more than the source: {', '.join(found)}: its guest does not know of it",
            "start the destination without, and add it afterwards",
        )


def _silent(source: Side, destination: Side) -> Iterator[Trouble]:
    """What only the source has, and sends nothing of: QEMU takes the migration, but the guest has seen it."""
    if not _told(source, destination, "pci_devices", "devices"):
        return
    gone = source.pci_devices.keys() - destination.pci_devices.keys()
    found = [f"{source.pci_devices[at]} at {at}" for at in sorted(gone) if source.pci_devices[at].kind in SILENT]
    ours = _all(source) if _same_release(source, destination) else Counter(source.devices)
    lost = {kind: n for kind, n in (ours - _all(destination)).items() if kind in SILENT}
    found += [listed(lost)] if lost else []
    if found:
        yield Trouble(
            f"the destination lacks what the source sends nothing of: {', '.join(found)}: its guest misses it",
            "start the destination with the source's options",
        )
