"""A channel whose payloads pass unread."""

from __future__ import annotations

from multifd.errors import PeerError
from multifd.jobs.relay.channel import Channel
from multifd.jobs.relay.plan import Plan
from multifd.net.connection import Connection
from multifd.net.splice import Passage
from multifd.wire.flags import MAX_PAYLOAD
from multifd.wire.packet import InitPacket, RamPacket


class Passing(Channel):
    """Its packets leave as they came, byte for byte."""

    def __init__(
        self, init: InitPacket, source: Connection, destination: Connection, page_size: int, plan: Plan
    ) -> None:
        super().__init__(init, source, destination, page_size, plan)
        self._passage = Passage(self._came.tee(source), destination)

    def move(self, packet: RamPacket, head: memoryview, began: float) -> None:  # noqa: ARG002
        if packet.next_packet_size > MAX_PAYLOAD:
            raise PeerError(f"packet {packet.packet_num}: a payload of {packet.next_packet_size} bytes is too long")
        self.destination.write([head])
        waited = self._passage.pass_on(packet.next_packet_size)
        self._clock.count("wait", waited)
        self._clock.lap("write")
        payload = self._came.payload()
        self._came.packet(packet, head)
        self._went.packet(packet, head, payload)
        self.counts.add(packet)

    def close(self) -> None:
        super().close()
        self._passage.close()
