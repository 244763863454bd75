"""Those who have connected, before a job has taken them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from multifd.errors import PeerError
from multifd.net.socket import SocketConnection
from multifd.wire.events import Configuration
from multifd.wire.flags import VM_FILE_MAGIC
from multifd.wire.mainchannel import Parser
from multifd.wire.packet import MAGIC, InitPacket

#: With what a main channel begins.
MAIN = MAGIC.pack(VM_FILE_MAGIC)
NO_CHANNEL = InitPacket(bytes(16), -1)
#: So many of the silent ones that came just before a multifd channel do not go: QEMU connects its main channel first,
#: and may say nothing on it until the others have connected.
SHIELDED = 4
#: Seconds that a main channel has to wait for multifd channels which came after it, before others are its own.
EARLY = 1.0


@dataclass(slots=True, eq=False)
class Caller:
    """Somebody who has connected; `data` is all that they have said."""

    connection: SocketConnection
    number: int
    came: float = field(default_factory=time.monotonic)
    data: bytearray = field(default_factory=bytearray)
    #: A multifd channel's, once it is shown.
    init: InitPacket = NO_CHANNEL
    #: A main channel's, which reads along.
    parser: Parser | None = None
    configuration: Configuration | None = None
    #: Why a main channel has not come to its list of RAM blocks.
    failure: PeerError | None = None
    #: When it ended so (monotonic).
    ended: float = math.inf

    @property
    def host(self) -> str:
        """Whence they came; all alike at a Unix socket."""
        return self.connection.name.rpartition(":")[0]

    @property
    def may_be_main(self) -> bool:
        """Whether what they have said so far begins a main channel, if it is anything."""
        return MAIN.startswith(self.data[: len(MAIN)])

    @property
    def how_failed(self) -> str:
        """Of one that ended, or was no migration: what it did."""
        return f"began a main channel and did not go on: {self.failure}" if self.data else "closed without a byte"


def silent(unknown: Iterable[Caller], channels: Iterable[Caller]) -> list[Caller]:
    """Who has said nothing and may be let go for that, in the order in which they came."""
    found = [caller for caller in unknown if not caller.data]
    for channel in channels:
        before = [caller for caller in found if caller.number < channel.number]
        found = [caller for caller in found if caller not in before[-SHIELDED:]]
    return found


def cancelled(main: Caller, channels: Iterable[Caller], gone: set[Caller]) -> bool:
    """Whether a main channel that ended is of a source that was cancelled while it set up.

    The multifd channels of some VM that came behind it are `gone` as well: all that are here, and two at least, since
    one alone may be anybody.
    """
    groups = by_vm(channel for channel in channels if main.number < channel.number).values()
    return any(len(group) > 1 and gone.issuperset(group.values()) and max(group) < len(group) for group in groups)


def by_vm(channels: Iterable[Caller]) -> dict[bytes, dict[int, Caller]]:
    """Multifd channels by their VM's uuid and their id; of two alike the first one."""
    groups: dict[bytes, dict[int, Caller]] = {}
    for channel in channels:
        groups.setdefault(channel.init.uuid, {}).setdefault(channel.init.id, channel)
    return groups


def likeliest_vm(main: Caller, channels: Sequence[Caller], waited: float) -> list[Caller]:
    """Those that may be of this main channel, whose VM is not known: QEMU connects them after its main channel.

    They are of the VM with most channels that came so, or, where none has come in EARLY seconds, of any; it has
    `waited` so long.
    """
    later = [channel for channel in channels if channel.number > main.number]
    if not later and waited > EARLY:
        later = list(channels)
    return list(max(by_vm(later).values(), key=len, default={}).values())


def likeliest(main: Caller, channels: Iterable[Caller]) -> list[Caller]:
    """A VM's channels that may be of this main channel, the likeliest first.

    One that came before it and has gone is what an earlier attempt has left.
    """
    found = [(channel.connection.hung_up(), channel.number < main.number, channel) for channel in channels]
    return [channel for gone, before, channel in sorted(found, key=lambda item: item[:2]) if not (gone and before)]
