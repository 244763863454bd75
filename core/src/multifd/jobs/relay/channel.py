"""One multifd channel on its way through the relay: its packets pass as they are, or are compressed anew."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

from multifd.effort.controller import Effort
from multifd.engine.decoder import Decoder
from multifd.engine.encoder import Encoder
from multifd.engine.headers import read_packet
from multifd.engine.packets import PacketWriter
from multifd.errors import PeerError
from multifd.jobs.relay.counters import STAGES, Sample
from multifd.jobs.relay.plan import Plan
from multifd.memory.buffer import packet_buffer
from multifd.memory.zeropages import ZEROS
from multifd.net.connection import Connection, Ended
from multifd.net.splice import Passage
from multifd.observe.hooks import IN, OUT
from multifd.observe.watch import Clock
from multifd.wire.counts import Counts
from multifd.wire.flags import MAX_PAYLOAD, METHODS, method_name
from multifd.wire.packet import InitPacket, RamPacket, header_length


class Channel:
    """Owned by its thread; others read what it counts, and `syncs` and `ended` under the migration's lock."""

    def __init__(
        self,
        init: InitPacket,
        source: Connection,
        destination: Connection,
        page_size: int,
        plan: Plan,
        effort: Effort | None,
    ) -> None:
        """Begins the channel towards the destination.  Raises Lost, Stalled, HostError.

        `init` is what the source began with; without `effort` payloads pass unread.
        """
        self.id = init.id
        self.source = source
        self.destination = destination
        #: The numbers of the methods that it came with.
        self.methods: set[int] = set()
        self.syncs = 0
        self.ended = False
        self._page_size = page_size
        self._plan = plan
        there = InitPacket(plan.uuid or init.uuid, init.id)
        destination.write([there.pack()])  # before anything is made that would have to be closed
        self._clock = Clock(STAGES)
        self._came = plan.observers.watch(IN, init, ("wait", "decode"), self._clock)
        self._went = plan.observers.watch(OUT, there, ("encode", "write"), self._clock)
        self._decoder = Decoder(init.id, self._came.tee(source), plan.readers)
        self._writer: PacketWriter | None = None
        if effort is None:
            self._passage = Passage(self._came.tee(source), destination)
            self.counts = Counts()
        else:
            self._writer = PacketWriter(destination, Encoder(init.id, page_size, effort), self._went)
            self._buffer = memoryview(packet_buffer())
            self.counts = self._writer.counts

    def run(self) -> None:
        """Pass packets on until the source's stream ends.

        Whether it may end here the SYNCs tell: QEMU 7.2 can be cut inside its last packet.  Raises MultifdError.
        """
        if self._writer is not None:
            self._writer.encoder.set_up()
        head = memoryview(bytearray(header_length(self._page_size)))
        self._came.begin(self._page_size)
        self._went.begin(self._page_size)
        while True:
            began = time.perf_counter()
            try:
                packet = read_packet(self.source, head, self._page_size)
            except Ended:
                return
            self._clock.lap("wait")
            if packet.normal or packet.zero:
                self._plan.readers.check(packet.method)
                self.methods.add(packet.method)
            self.syncs += packet.sync
            if self._writer is None:
                self._pass_on(packet, head)
                continue
            self._recode(packet, head, self._writer)
            if not packet.normal:
                self._writer.encoder.idle(time.perf_counter() - began)

    def _pass_on(self, packet: RamPacket, head: memoryview) -> None:
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

    def _recode(self, packet: RamPacket, head: memoryview, writer: PacketWriter) -> None:
        size = self._page_size
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

    def counters(self, to: str | None) -> dict[Sample, float]:
        """What went through, as samples; `to` is the method that it left with, None where it passed.

        Empty before its first page, which tells the method that it came with.
        """
        if not self.methods:
            return {}
        came = method_name(max(self.methods))
        where = {"channel": str(self.id), "from": came, "to": to or came}
        counts = self.counts
        return {
            Sample("bytes", (("direction", "in"), *where.items())): self.source.bytes_read,
            Sample("bytes", (("direction", "out"), *where.items())): self.destination.bytes_written,
            Sample("memory_bytes", tuple(where.items())): counts.pages * self._page_size,
            Sample("packets", tuple(where.items())): counts.packets,
            Sample("pages", (("kind", "normal"), *where.items())): counts.normal_pages,
            Sample("pages", (("kind", "zero"), *where.items())): counts.zero_pages,
            **{
                Sample("stage_seconds", (("stage", stage), *where.items())): spent
                for stage, spent in self._clock.seconds.items()
            },
        }

    @property
    def statistics(self) -> Counter[str]:
        """What the compressors counted, each side's by its name."""
        found = Counter({f"{way}, decoding": count for way, count in self._decoder.statistics.items()})
        if self._writer is not None:
            found.update({f"{way}, encoding": count for way, count in self._writer.encoder.statistics.items()})
        return found

    def close(self) -> None:
        """Clean the compressors up."""
        self._decoder.close()
        if self._writer is not None:
            self._writer.close()
        else:
            self._passage.close()
