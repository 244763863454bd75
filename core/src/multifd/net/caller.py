"""Those who have connected, before a job has taken them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from multifd.errors import PeerError
from multifd.net.socket import SocketConnection
from multifd.wire.events import Configuration
from multifd.wire.mainchannel import Parser
from multifd.wire.packet import InitPacket

NO_CHANNEL = InitPacket(bytes(16), -1)
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

    @property
    def host(self) -> str:
        """Whence they came; all alike at a Unix socket."""
        return self.connection.name.rpartition(":")[0]


def by_vm(channels: Iterable[Caller]) -> dict[bytes, dict[int, Caller]]:
    """Multifd channels by their VM's uuid and their id; of two alike the first one."""
    groups: dict[bytes, dict[int, Caller]] = {}
    for channel in channels:
        groups.setdefault(channel.init.uuid, {}).setdefault(channel.init.id, channel)
    return groups
