"""The connections of the one migration that `receive` takes: which of those who came they are."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from uuid import UUID

from multifd.crew import Crew
from multifd.engine.headers import identify
from multifd.errors import PeerError, counted
from multifd.net.caller import EARLY, MAIN, Caller, by_vm
from multifd.net.connection import Connection, Ended, Stalled
from multifd.net.deadline import LETTING_GO, Silence
from multifd.net.door import Door
from multifd.net.recording import RecordedConnection
from multifd.net.security import warn_exposed
from multifd.net.socket import SocketConnection
from multifd.wire.packet import InitPacket


@dataclass(frozen=True, slots=True)
class Party:
    """The connections of one migration; `head` is what has been read of its main channel."""

    main: Connection
    head: bytes
    channels: Sequence[tuple[InitPacket, Connection]]

    @property
    def uuid(self) -> bytes:
        """The VM's, as its channels have it; 16 bytes."""
        return self.channels[0][0].uuid

    @property
    def connections(self) -> list[Connection]:
        """All of them."""
        return [self.main, *(connection for _, connection in self.channels)]


def recorded(main: RecordedConnection, others: Sequence[RecordedConnection]) -> Party:
    """Those of a recording.  Raises PeerError where they are no main channel and its multifd channels."""
    if identify(main) is not None:
        raise PeerError(f"{main.name} is a multifd channel, no main channel")
    channels: dict[int, tuple[InitPacket, Connection]] = {}
    for connection in others:
        init = identify(connection)
        if init is None:
            raise PeerError("a second main channel came: two migrations at once?")
        if init.id in channels:
            raise PeerError(f"channel {init.id}: came twice")
        channels[init.id] = init, connection
    _check([init for init, _ in channels.values()], len(others))
    return Party(main, MAIN, list(channels.values()))


def _check(inits: Sequence[InitPacket], count: int) -> None:
    """That channels are those of one migration with so many."""
    for init in inits:
        if init.uuid != inits[0].uuid:
            raise PeerError(
                f"channel {init.id}: VM uuid {init.uuid.hex()}, the other channels have {inits[0].uuid.hex()}: "
                "two migrations at once?"
            )
        if init.id >= count:
            raise PeerError(
                f"channel {init.id}: the sender uses at least {init.id + 1} channels, this side expects {count}: start "
                "both with the same --channels"
            )


def meet(
    door: Door, crew: Crew, count: int, uuid: bytes | None, silence: Silence, first_timeout: float | None
) -> Party:
    """Wait for a main channel and its `count` multifd channels; those of the VM `uuid` where it is given.

    Raises PeerError where no main channel comes within `first_timeout` seconds or its channels within
    `silence.timeout`, Ended or another PeerError where a main channel comes that goes no further, Cancelled.
    """
    until = None if first_timeout is None else time.monotonic() + first_timeout
    with crew.changed:
        while (party := _party(door, count, uuid)) is None:
            now = time.monotonic()
            if not door.mains:
                if until is not None and now >= until and not door.begun:
                    came = f"{counted(door.came, 'connection')} came, none of them a main channel," if door.came else ""
                    raise PeerError(f"{came or 'nobody connected'} within {first_timeout:g} s (--timeout)")
            else:
                since = max(main.came for main in door.mains)
                late = f"{_came(door, count)}: start both sides with the same number of channels (and multifd on)"
                if now - since > LETTING_GO and all(main.connection.hung_up() for main in door.mains):
                    if uuid is None:
                        raise Ended(f"{late}, and its main channel has ended")
                    door.dismiss(door.mains[0], f"is a main channel without channels of VM {UUID(bytes=uuid)}")
                if now - since >= silence.timeout:
                    raise Stalled(f"{late}: nothing moved for {silence.timeout:g} s (--timeout)")
            crew.changed.wait(silence.interval)
            crew.check()
    if isinstance(party.main, SocketConnection):
        warn_exposed(party.main)
    return party


def _party(door: Door, count: int, uuid: bytes | None) -> Party | None:
    """The first one that is complete.  Raises what is wrong with it, or with a main channel that is alone."""
    if uuid is not None:
        _dismiss_others(door, uuid)
    for main in door.mains:
        if main.failure is not None:
            raise type(main.failure)(f"main channel: {main.failure}") from main.failure
    # What an attempt before this one left behind has been closed.
    groups = by_vm(sorted(door.channels, key=lambda channel: channel.connection.hung_up()))
    for vm, group in groups.items():
        whose = _main(door.mains, vm, group.values())
        if whose is not None and all(number in group for number in range(count)):
            channels = [(channel.init, channel.connection) for channel in group.values()]
            _check([init for init, _ in channels], count)
            door.take([whose, *group.values()])
            return Party(whose.connection, bytes(whose.data), channels)
    return None


def _dismiss_others(door: Door, uuid: bytes) -> None:
    """Those that show that they are of another VM."""
    for channel in [channel for channel in door.channels if channel.init.uuid != uuid]:
        door.dismiss(channel, f"is a channel of VM {UUID(bytes=channel.init.uuid)}, not of {UUID(bytes=uuid)}")
    for main in list(door.mains):
        said = main.configuration.uuid if main.configuration is not None else None
        if said is not None and said != uuid:
            door.dismiss(main, f"is a main channel of VM {UUID(bytes=said)}, not of {UUID(bytes=uuid)}")


def _main(mains: Sequence[Caller], uuid: bytes, channels: Collection[Caller]) -> Caller | None:
    """The main channel of a VM's channels: a source connects it just before them."""
    fitting = [main for main in mains if main.configuration is not None and main.configuration.uuid in (None, uuid)]
    first = min(channel.number for channel in channels)
    before = [main for main in fitting if main.number < first]
    now = time.monotonic()
    late = [main for main in fitting if now - main.came > EARLY]  # nobody else's have come
    return max(before or late, key=lambda main: main.number, default=None)


def _came(door: Door, count: int) -> str:
    came = {channel.init.id for channel in door.channels}
    return f"{len(came)} of {count} multifd channels came"
