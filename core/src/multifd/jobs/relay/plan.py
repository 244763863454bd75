"""What a relay does to each migration."""

from __future__ import annotations

from dataclasses import dataclass

from multifd.codec.readers import Readers
from multifd.effort.choice import Choice
from multifd.net.socket import Wrap
from multifd.net.uri import Uri
from multifd.observe.observers import Observers
from multifd.wire.packet import InitPacket


@dataclass(frozen=True, slots=True)
class Plan:
    """How connections are made and packets change; `to` is None where payloads pass as they are.

    `uuid` replaces the guest's, 16 bytes; `channels` is the most that a source may use;
    `page_size`, in bytes, is assumed where the stream tells none; `timeout` is in seconds.
    """

    target: Uri
    wrap: Wrap
    readers: Readers
    to: Choice | None
    uuid: bytes | None
    channels: int | None
    drop_switchover_start: bool
    page_size: int | None
    find_zero_pages: bool
    observers: Observers
    timeout: float

    def onward(self, init: InitPacket) -> InitPacket:
        """With what a channel begins towards the destination that began with `init`."""
        return InitPacket(self.uuid or init.uuid, init.id)
