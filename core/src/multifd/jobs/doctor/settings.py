"""Capabilities and parameters of two QEMUs."""

from __future__ import annotations

from collections.abc import Iterator

from multifd.jobs.doctor.side import Side
from multifd.jobs.doctor.trouble import Trouble, monitor_says
from multifd.qemu.settings import OTHER_COMPRESSION, OTHER_WAYS

#: switchover-ack is new: older sources take the destination's word for a mistake.
ACKNOWLEDGED = (8, 1)
#: From this machine type on the devices ask for it, not the source itself; without one that does, nobody waits.
ASKED_BY_DEVICES = (11, 1)


def compare_capabilities(source: Side, destination: Side) -> Iterator[Trouble]:
    """Those with which the migration fails, or never ends."""
    for side, who in ((source, "source"), (destination, "destination")):
        if not side.on("multifd"):
            yield Trouble(f"multifd is off on the {who}", monitor_says(who, "migrate_set_capability multifd on"))
        for name in (*OTHER_WAYS, *OTHER_COMPRESSION):
            if side.on(name):
                yield Trouble(f"{name} is on on the {who}", _off(name, who))
    if source.on("x-ignore-shared") != destination.on("x-ignore-shared"):
        has, lacks = ("source", "destination") if source.on("x-ignore-shared") else ("destination", "source")
        yield Trouble(
            f"x-ignore-shared is on on the {has} only: the destination refuses that",
            f"{_off('x-ignore-shared', has)}, or {monitor_says(lacks, 'migrate_set_capability x-ignore-shared on')}",
        )
    if source.on("block") and "block" not in destination.capabilities:
        yield Trouble(
            "block is on on the source: the destination has no such capability any more, and refuses it",
            _off("block", "source"),
        )
    yield from _postcopy(source, destination)
    yield from _switchover_ack(source, destination)


def _postcopy(source: Side, destination: Side) -> Iterator[Trouble]:
    if source.on("postcopy-preempt"):
        yield Trouble(
            "postcopy-preempt is on on the source: a relay cannot pass the connection that it opens",
            _off("postcopy-preempt", "source"),
        )
    if source.on("postcopy-ram") and not destination.on("postcopy-ram"):
        yield Trouble(
            "postcopy-ram is on on the source only: a destination without it refuses the stream",
            _off("postcopy-ram", "source"),
        )
    if source.on("dirty-bitmaps") and destination.on("postcopy-ram") and not source.on("postcopy-ram"):
        yield Trouble(
            "dirty-bitmaps is on on the source, and postcopy-ram on the destination only: it refuses the stream",
            _off("postcopy-ram", "destination"),
        )


def _switchover_ack(source: Side, destination: Side) -> Iterator[Trouble]:
    name = "switchover-ack"
    if source.on(name) and not destination.on(name) and source.runs and older_machine(source.machine, ASKED_BY_DEVICES):
        on = f", or {monitor_says('destination', f'migrate_set_capability {name} on')}"
        yield Trouble(
            f"{name} is on on the source only: while its guest runs it waits for the destination's word for ever",
            _off(name, "source") + (on if name in destination.capabilities else ""),
        )
    if destination.on(name) and source.version < ACKNOWLEDGED and source.on("return-path"):
        yield Trouble(
            f"{name} is on on the destination: a source before 8.1 does not know its word, and fails",
            _off(name, "destination"),
        )


def _off(capability: str, who: str) -> str:
    return monitor_says(who, f"migrate_set_capability {capability} off")


def compare_parameters(source: Side, destination: Side) -> Iterator[Trouble]:
    """Those that have to be the same, or that the other side does not know."""
    creds = [side.parameters.get("tls-creds") for side in (source, destination)]
    if bool(creds[0]) != bool(creds[1]):
        sides = ("source", "destination", "listen") if creds[0] else ("destination", "source", "connect")
        with_tls, without, leg = sides
        yield Trouble(
            f"TLS is on on the {with_tls} ({creds[0] or creds[1]}), not on the {without}",
            f"set tls-creds on the {without}, or put a relay beside it, with --{leg}-tls-creds",
        )
    if source.on("multifd") and destination.on("multifd"):
        yield from _multifd(source, destination)
    if source.version >= (10, 0) > destination.version and not older_machine(source.machine, (10, 0)):
        yield Trouble(
            "the source may send switchover-start, which a destination before 10.0 refuses",
            "use relay --drop-switchover-start, or start the source with a machine type up to 9.2",
        )
    detection = source.parameters.get("zero-page-detection")
    if detection == "multifd" and destination.version < (9, 0):
        yield Trouble(
            "the source puts zero pages into packets, which a destination before 9.0 does not read",
            "set zero-page-detection to legacy on the source",
        )


def _multifd(source: Side, destination: Side) -> Iterator[Trouble]:
    channels = [side.parameters["multifd-channels"] for side in (source, destination)]
    if channels[0] != channels[1]:
        yield Trouble(
            f"multifd-channels differ: {channels[0]} and {channels[1]}",
            monitor_says("destination", f"migrate_set_parameter multifd-channels {channels[0]}"),
        )
    ours, theirs = (side.parameters["multifd-compression"] for side in (source, destination))
    if ours != theirs:
        can = [
            f"set multifd-compression to {method} on the {who}"
            for method, side, who in ((ours, destination, "destination"), (theirs, source, "source"))
            if method in side.methods
        ]
        remedy = ", or ".join([*can, f"put a relay between them, with --from {ours} --to {theirs}"])
        yield Trouble(f"multifd-compression differs: {ours} and {theirs}", remedy)


def advise_settings(source: Side, destination: Side) -> Iterator[Trouble]:
    """Those that could be better, or that somebody has to know of."""
    if not source.on("return-path"):
        yield Trouble(
            "return-path is off on the source: it takes a migration for complete before the destination has it, "
            "and a relay can confirm none",
            monitor_says("source", "migrate_set_capability return-path on"),
        )
    if source.on("pause-before-switchover"):
        yield Trouble(
            "pause-before-switchover is on on the source: it will wait in pre-switchover, its guest stopped",
            monitor_says("source", "migrate_continue pre-switchover"),
        )
    if source.on("switchover-ack") and not source.runs and not destination.on("switchover-ack"):
        yield Trouble(
            "switchover-ack is on on the source only: if its guest ran, it would wait for the destination for ever",
            _off("switchover-ack", "source"),
        )
    if source.on("x-ignore-shared") and destination.on("x-ignore-shared"):
        yield Trouble(
            "x-ignore-shared is on on both: shared memory is not sent; a relay passes such a migration unread, receive "
            "refuses it",
            "start both with the same files of memory, or turn it off on both",
        )


def older_machine(machine: str, version: tuple[int, int]) -> bool:
    """Whether a machine type of QEMU's own is of an earlier version; a distribution's name tells none."""
    number = machine.rpartition("-")[2].split(".")
    return len(number) == 2 and all(map(str.isdecimal, number)) and (int(number[0]), int(number[1])) < version
