"""Compare the two QEMUs of a migration before anything moves.

    from multifd.jobs.doctor import compare, examine
    from multifd.qemu.monitor import Monitor

    with Monitor("here.qmp") as here, Monitor("there.qmp") as there:
        for trouble in compare(examine(here), examine(there)):
            print(trouble.what, trouble.remedy)

Only questions are asked: nothing is set on either side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from multifd.qemu.monitor import Monitor, of, shown
from multifd.qemu.settings import OTHER_COMPRESSION, OTHER_WAYS, read_capabilities, read_parameters
from multifd.qemu.states import Guest, Migration, destination_obstacle, leftover, source_obstacle

#: The first release that we speak with: 7.2 is the oldest that was tried.
OLDEST = (7, 2)


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

    def on(self, capability: str) -> bool:
        """Whether it has this capability, and it is on."""
        return self.capabilities.get(capability, False)


@dataclass(frozen=True, slots=True)
class Trouble:
    """What would fail, or could be better, and what to do about it."""

    what: str
    remedy: str


def examine(monitor: Monitor) -> Side:
    """Ask a QEMU.  Raises PeerError, HostError."""
    machine = monitor.ask("qom-get", _text, path="/machine", property="type")
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
    )


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


def compare(source: Side, destination: Side) -> list[Trouble]:
    """What would fail; empty where nothing is seen."""
    found = [trouble for side, who in ((source, "source"), (destination, "destination")) for trouble in _own(side, who)]
    for side, who, obstacle_of in (
        (source, "source", source_obstacle),
        (destination, "destination", destination_obstacle),
    ):
        if obstacle := obstacle_of(Guest(side.status, side.status == "running"), side.migration):
            found.append(Trouble(f"the {who} {obstacle.what}", obstacle.remedy))
    for what, option, ours, theirs in (
        ("machine types", "-machine", source.machine, destination.machine),
        ("memory sizes", "-m", f"{source.memory_bytes >> 20}M", f"{destination.memory_bytes >> 20}M"),
        ("uuids", "-uuid", source.uuid, destination.uuid),
    ):
        if ours != theirs:
            found.append(Trouble(f"{what} differ: {ours} and {theirs}", f"start the destination with {option} {ours}"))
    creds = [side.parameters.get("tls-creds") for side in (source, destination)]
    if bool(creds[0]) != bool(creds[1]):
        sides = ("source", "destination", "listen") if creds[0] else ("destination", "source", "connect")
        with_tls, without, leg = sides
        found.append(
            Trouble(
                f"TLS is on on the {with_tls} ({creds[0] or creds[1]}), not on the {without}",
                f"set tls-creds on the {without}, or put a relay beside it, with --{leg}-tls-creds",
            )
        )
    if source.on("multifd") and destination.on("multifd"):
        found += _multifd(source, destination)
    if source.version >= (10, 0) > destination.version and not _older(source.machine, (10, 0)):
        found.append(
            Trouble(
                "the source may send switchover-start, which a destination before 10.0 refuses",
                "use relay --drop-switchover-start, or start the source with a machine type up to 9.2",
            )
        )
    detection = source.parameters.get("zero-page-detection")
    if detection == "multifd" and destination.version < (9, 0):
        found.append(
            Trouble(
                "the source puts zero pages into packets, which a destination before 9.0 does not read",
                "set zero-page-detection to legacy on the source",
            )
        )
    return found


def advise(source: Side, destination: Side) -> list[Trouble]:
    """What could be better, or be somebody's leaving, though nothing fails."""
    found = []
    if not source.on("return-path"):
        found.append(
            Trouble(
                "return-path is off on the source: it takes a migration for complete before the destination has it, "
                "and a relay can confirm none",
                "on the source's monitor: migrate_set_capability return-path on",
            )
        )
    if left := leftover(source.migration, source.capabilities):
        found.append(Trouble(f"the source {left.what}", left.remedy))
    if destination.migration.listening:
        found.append(
            Trouble(
                "the destination listens already",
                "migrate to that address; for send --qmp start it again, with -incoming defer",
            )
        )
    return found


def _own(side: Side, who: str) -> list[Trouble]:
    found = []
    if side.version < OLDEST:
        found.append(
            Trouble(f"the {who} is QEMU {_dotted(side.version)}: older than 7.2, the oldest tried", "upgrade it")
        )
    if not side.on("multifd"):
        found.append(
            Trouble(f"multifd is off on the {who}", f"on the {who}'s monitor: migrate_set_capability multifd on")
        )
    found += [
        Trouble(f"{capability} is on on the {who}", f"on the {who}'s monitor: migrate_set_capability {capability} off")
        for capability in (*OTHER_WAYS, *OTHER_COMPRESSION)
        if side.on(capability)
    ]
    return found


def _multifd(source: Side, destination: Side) -> list[Trouble]:
    found = []
    channels = [side.parameters["multifd-channels"] for side in (source, destination)]
    if channels[0] != channels[1]:
        found.append(
            Trouble(
                f"multifd-channels differ: {channels[0]} and {channels[1]}",
                f"on the destination's monitor: migrate_set_parameter multifd-channels {channels[0]}",
            )
        )
    ours, theirs = (side.parameters["multifd-compression"] for side in (source, destination))
    if ours != theirs:
        can = [
            f"set multifd-compression to {method} on the {who}"
            for method, side, who in ((ours, destination, "destination"), (theirs, source, "source"))
            if method in side.methods
        ]
        remedy = ", or ".join([*can, f"put a relay between them, with --from {ours} --to {theirs}"])
        found.append(Trouble(f"multifd-compression differs: {ours} and {theirs}", remedy))
    return found


def _older(machine: str, version: tuple[int, int]) -> bool:
    """Whether a machine type of QEMU's own is of an earlier version; a distribution's name tells none."""
    number = machine.rpartition("-")[2].split(".")
    return len(number) == 2 and all(map(str.isdecimal, number)) and (int(number[0]), int(number[1])) < version


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def describe(side: Side) -> str:
    """One QEMU in a line."""
    multifd = "multifd off"
    if side.on("multifd"):
        multifd = f"multifd {side.parameters['multifd-compression']}, {side.parameters['multifd-channels']} channels"
    return (
        f"QEMU {_dotted(side.version)}, {side.machine}, {side.memory_bytes >> 20} MiB, {side.status}, {multifd} "
        f"(built with: {' '.join(side.methods)})"
    )
