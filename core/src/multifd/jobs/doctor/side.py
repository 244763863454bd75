"""What one QEMU says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from multifd.errors import PeerError
from multifd.jobs.doctor.board import BOARD, count
from multifd.jobs.doctor.devices import (
    OTHERWISE,
    PCI,
    PciDevice,
    Place,
    controller,
    pci_devices,
    read_disks,
    read_names,
    read_root,
    read_types,
)
from multifd.jobs.doctor.memory import MemoryDevice, RamBlock, read_blocks, read_memory_devices
from multifd.jobs.doctor.processors import Positions, read_positions
from multifd.jobs.doctor.seats import LISTED, SEATS, Seat
from multifd.net.connection import Ended, Stalled
from multifd.qemu.monitor import Monitor, of, shown
from multifd.qemu.settings import read_capabilities, read_parameters
from multifd.qemu.states import Guest, Migration

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Side:
    """What one QEMU says of itself; `methods` is empty where it does not tell."""

    name: str
    version: tuple[int, int, int]
    machine: str
    memory_bytes: int
    uuid: str
    status: str
    migration: Migration
    methods: tuple[str, ...]
    capabilities: dict[str, bool]
    parameters: dict[str, Any]
    memory_slots: int = 0
    ram_blocks: tuple[RamBlock, ...] = ()
    memory_devices: tuple[MemoryDevice, ...] = ()
    #: Where there is what: `00:03.0/00.0` is behind the bridge at `00:03.0`.
    pci_devices: dict[str, PciDevice] = field(default_factory=dict)
    #: How many of each type, of those that are on no PCI bus.
    devices: dict[str, int] = field(default_factory=dict)
    #: The same of what the machine has of itself.
    board: dict[str, int] = field(default_factory=dict)
    seats: tuple[Seat, ...] = ()
    disks: dict[str, int] = field(default_factory=dict)
    cpus: int = 0
    cpu: str = ""
    #: What `cpu` is another name of, or empty.
    cpu_model: str = ""
    cpu_positions: Positions = ()
    #: The fields of which it has told nothing.
    untold: tuple[str, ...] = ()

    def on(self, capability: str) -> bool:
        """Whether it has this capability, and it is on."""
        return self.capabilities.get(capability, False)

    @property
    def runs(self) -> bool:
        """Whether its guest does."""
        return self.status == "running"


def examine(monitor: Monitor) -> Side:
    """Ask a QEMU.  Raises PeerError, HostError."""
    machine = monitor.ask("qom-get", _text, path="/machine", property="type")
    untold: list[str] = []

    def told(what: str, command: str, read: Callable[[Any], T], **arguments: object) -> T | None:
        """An answer for that field, which not every QEMU gives: a build may leave a command out."""
        try:
            return monitor.ask(command, read, **arguments)
        except (Ended, Stalled):
            raise
        except PeerError:
            untold.append(what)
            return None

    cpus = told("cpus", "query-cpus-fast", _cpu_paths) or []
    types: dict[str, str] = {}
    for folder in ("/machine/peripheral", "/machine/peripheral-anon"):
        names = told("devices", "qom-list", read_types, path=folder) or {}
        types |= {f"{folder}/{name}": kind for name, kind in names.items()}
    kinds = {
        kind: told("devices", "qom-list-types", read_names, implements=kind) or set()
        for kind in (PCI, *OTHERWISE, *SEATS, "device")
    }
    board = told("devices", "qom-list", read_types, path=BOARD) or {}
    board = {f"{BOARD}/{name}": kind for name, kind in board.items() if kind in kinds["device"]}
    on_pci = [path for path, kind in types.items() if kind in kinds[PCI]]
    slots = {path: told("pci_devices", "qom-get", partial(of, int), path=path, property="addr") or 0 for path in on_pci}
    buses = {path: told("pci_devices", "qom-get", _text, path=path, property="parent_bus") or "" for path in on_pci}
    places = {path: Place(slots[path], buses[path]) for path in on_pci}
    elsewhere = set().union(*(kinds[kind] for kind in (PCI, *OTHERWISE)))
    seats = []
    for path, kind in (types | board).items():
        for family, properties in SEATS.items():
            if kind in kinds[family]:
                at = [f"{name}={told('devices', 'qom-get', shown, path=path, property=name)}" for name in properties]
                bus = told("devices", "qom-get", _text, path=path, property="parent_bus") or ""
                seats.append(Seat(kind, controller(bus, places), ",".join(at), family == LISTED))
    cpu = told("cpu", "qom-get", _text, path=cpus[0], property="type") or "" if cpus else ""
    models = told("cpu", "query-cpu-definitions", _models) or {} if cpu else {}
    return Side(
        name=monitor.name,
        version=monitor.ask("query-version", _version),
        machine=machine.removesuffix("-machine"),
        memory_bytes=monitor.ask("query-memory-size-summary", lambda answer: of(int, answer["base-memory"])),
        uuid=monitor.ask("query-uuid", lambda answer: _text(answer["UUID"])),
        status=shown(monitor.ask("query-status", Guest.read).status),
        migration=monitor.ask("query-migrate", Migration.read),
        methods=monitor.ask("query-qmp-schema", _methods),
        capabilities=monitor.ask("query-migrate-capabilities", read_capabilities),
        parameters=monitor.ask("query-migrate-parameters", _parameters),
        memory_slots=told("memory_slots", "qom-get", _slots, path="/machine", property="memory") or 0,
        ram_blocks=told("ram_blocks", "x-query-ramblock", read_blocks) or (),
        memory_devices=told("memory_devices", "query-memory-devices", read_memory_devices) or (),
        pci_devices=pci_devices(told("pci_devices", "query-pci", read_root) or {}, types, places),
        devices=count(kind for kind in types.values() if kind not in elsewhere),
        board=count(kind for kind in board.values() if kind not in elsewhere),
        seats=tuple(seats),
        disks=told("disks", "query-block", read_disks) or {},
        cpus=len(cpus),
        cpu=cpu,
        cpu_model=models.get(cpu, ""),
        cpu_positions=(told("cpus", "query-cpus-fast", read_positions) or ()) if cpus else (),
        untold=tuple(dict.fromkeys(untold)),
    )


def _cpu_paths(answer: Any) -> list[str]:
    return [of(str, item["qom-path"]) for item in of(list, answer)]


def _models(answer: Any) -> dict[str, str]:
    """Types of processors that are another's alias, and the type of that one."""
    items = [(of(str, item["typename"]), of(str, item["name"]), item.get("alias-of")) for item in of(list, answer)]
    return {shown(kind): shown(of(str, alias) + kind.removeprefix(name)) for kind, name, alias in items if alias}


def _slots(answer: Any) -> int:
    return of(int, answer.get("slots", 0))


def _text(answer: Any) -> str:
    """As it can be shown to a person."""
    return shown(of(str, answer))


def _parameters(answer: Any) -> dict[str, Any]:
    found = {"multifd-channels": 2, "multifd-compression": "none"} | read_parameters(answer)
    of(int, found["multifd-channels"])
    return found | {name: _text(found[name]) for name in ("multifd-compression", "tls-creds") if name in found}


def _version(answer: Any) -> tuple[int, int, int]:
    major, minor, micro = (of(int, answer["qemu"][part]) for part in ("major", "minor", "micro"))
    return major, minor, micro


def _methods(schema: Any) -> tuple[str, ...]:
    """The compression methods it was built with.  The schema has numbers for the names of types."""
    types = {entry["name"]: entry for entry in schema}
    arguments = types[types["migrate-set-parameters"]["arg-type"]]
    for member in arguments["members"]:
        if member["name"] == "multifd-compression":
            # As in every release so far, beside 6.2's `members`.
            return tuple(_text(value) for value in types[member["type"]]["values"])
    return ()


def dotted(version: tuple[int, ...]) -> str:
    """A version as it is written."""
    return ".".join(map(str, version))


def describe(side: Side) -> str:
    """One QEMU in a line."""
    multifd = "multifd off"
    if side.on("multifd"):
        multifd = f"multifd {side.parameters['multifd-compression']}, {side.parameters['multifd-channels']} channels"
    return (
        f"QEMU {dotted(side.version)}, {side.machine}, {side.memory_bytes >> 20} MiB, {side.status}, {multifd} "
        f"(built with: {' '.join(side.methods)})"
    )
