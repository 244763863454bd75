"""A channel whose packets are compressed anew."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

from multifd.effort.controller import Effort
from multifd.engine.encoder import Encoder
from multifd.engine.packets import PacketWriter
from multifd.jobs.relay.channel import Channel
from multifd.jobs.relay.plan import Plan
from multifd.memory.buffer import packet_buffer
from multifd.memory.zeropages import ZEROS
from multifd.net.connection import Connection
from multifd.wire.flags import METHODS
from multifd.wire.packet import InitPacket, RamPacket


class Recoding(Channel):
    """Each of its packets is decoded, and leaves as another one with the same number."""

    def __init__(
        self,
        init: InitPacket,
        source: Connection,
        destination: Connection,
        page_size: int,
        plan: Plan,
        effort: Effort,
    ) -> None:
        super().__init__(init, source, destination, page_size, plan)
        self._writer = PacketWriter(destination, Encoder(init.id, page_size, effort), self._went)
        self._buffer = memoryview(packet_buffer())
        self.counts = self._writer.counts
        self._set_up = False

    def move(self, packet: RamPacket, head: memoryview, began: float) -> None:
        writer = self._writer
        size = self._page_size
        if not self._set_up:
            writer.encoder.set_up()  # in the thread that encodes
            self._set_up = True
        if packet.normal:
            self._decoder.decode(packet, self._buffer[: len(packet.normal) * size], size)
            self._clock.lap("decode")
        self._came.packet(packet, head)
        # QEMU's uadk (10.0) does not note which pages came, and takes each zero page for one that never
        # did.  That is right in the first round, after the SYNC of the set-up; later they go as pages.
        zero_as_normal = writer.encoder.flag == METHODS["uadk"] and self.syncs > 1
        if packet.zero and zero_as_normal:
            start = len(packet.normal) * size
            length = len(packet.zero) * size
            self._buffer[start : start + length] = ZEROS[:length]
            packet = replace(packet, normal=packet.normal + packet.zero, zero=())
        runs: list[memoryview] = []
        if packet.normal:
            pages = self._buffer[: len(packet.normal) * size].toreadonly()
            runs = [pages]
            if self._plan.find_zero_pages and not zero_as_normal:
                packet, runs = writer.part(packet, pages)
                if not runs:
                    self._clock.lap("encode")
        writer.write(packet, runs)
        if not runs:
            writer.encoder.idle(time.perf_counter() - began)

    @property
    def statistics(self) -> Counter[str]:
        """Of both compressors."""
        encoding = {f"{way}, encoding": count for way, count in self._writer.encoder.statistics.items()}
        return super().statistics + Counter(encoding)

    def close(self) -> None:
        super().close()
        self._writer.close()
