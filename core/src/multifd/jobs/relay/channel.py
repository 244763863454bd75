"""One multifd channel on its way through the relay: its packets are read, accounted for, and moved on."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable

from multifd.codec.naming import learn
from multifd.engine.decoder import Decoder
from multifd.engine.headers import read_packet
from multifd.errors import PeerError
from multifd.jobs.relay.counters import STAGES, Sample
from multifd.jobs.relay.plan import Plan
from multifd.net.connection import Connection, Ended
from multifd.net.wake import Wake
from multifd.observe.hooks import IN, OUT
from multifd.observe.watch import Clock
from multifd.wire.counts import Counts
from multifd.wire.flags import method_name
from multifd.wire.numbers import ChannelNumbers, Round
from multifd.wire.packet import InitPacket, RamPacket, header_length
from multifd.wire.passes import Passes


class Channel(ABC):
    """Owned by its thread, but for what `changed` guards: `rounds`, `syncs`, `over` and `ended`.

    `rounds` are those that nobody has judged yet; `over` says that nothing more is moved on, `ended` that the source
    has ended it.  Others read what it counts, and `numbers` once it is over.
    """

    def __init__(
        self, init: InitPacket, source: Connection, destination: Connection, page_size: int, plan: Plan
    ) -> None:
        """Begins the channel towards the destination; `init` is what the source began with.

        Raises Lost, Stalled, HostError.
        """
        self.id = init.id
        self.source = source
        self.destination = destination
        self.counts = Counts()
        self.numbers = ChannelNumbers()
        self.passes = Passes()
        self.rounds: deque[Round] = deque()
        self.syncs = 0
        self.over = False
        self.ended = False
        #: The numbers of the methods that it came with.
        self.methods: set[int] = set()
        self._page_size = page_size
        self._plan = plan
        there = plan.onward(init)
        destination.write([there.pack()])  # before anything is made that would have to be closed
        self._clock = Clock(STAGES)
        self._came = plan.observers.watch(IN, init, ("wait", "decode"), self._clock)
        self._went = plan.observers.watch(OUT, there, ("encode", "write"), self._clock)
        self._decoder = Decoder(init.id, self._came.tee(source), plan.readers)

    def run(self, main_complete: Wake, changed: threading.Condition, on_round: Callable[[], None]) -> None:
        """Move packets on until the source ends the channel; `on_round` is called after each SYNC, locked.

        Once `main_complete` is set, and nothing is here, nothing more is moved on: QEMU 7.2 may still send an empty
        packet.  Raises MultifdError, Ended inside a packet.
        """
        head = memoryview(bytearray(header_length(self._page_size)))
        self._came.begin(self._page_size)
        self._went.begin(self._page_size)
        while True:
            began = time.perf_counter()
            if not self.over and not self.source.ready(main_complete):
                with changed:
                    self.over = True
                    changed.notify_all()
            try:
                packet = read_packet(self.source, head, self._page_size)
            except Ended as ended:
                # Whether it may end here its SYNCs tell.
                if ended.got and not self.numbers.may_end_in(head[: ended.got]):
                    raise
                with changed:
                    self.over = self.ended = True
                    changed.notify_all()
                return
            ended_round = self.numbers.add(packet)
            self.passes.add(packet)
            if self.over:
                if ended_round or self.numbers.since_sync:
                    raise PeerError(f"packet {packet.packet_num} came after the last sync point")
                continue
            self._clock.lap("wait")
            if packet.normal or packet.zero:
                self._plan.readers.check(packet.method)
                if packet.method not in self.methods:
                    learn(packet.method)
                    self.methods.add(packet.method)
            self.move(packet, head, began)
            if ended_round:
                with changed:
                    self.rounds.append(ended_round)
                    self.syncs += 1
                    on_round()
                    changed.notify_all()

    @abstractmethod
    def move(self, packet: RamPacket, head: memoryview, began: float) -> None:
        """Move a packet on, whose header has been read into `head` and whose payload has not.

        `began` is when it was first waited for (perf_counter).
        """

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
        return Counter({f"{way}, decoding": count for way, count in self._decoder.statistics.items()})

    def close(self) -> None:
        """Clean up."""
        self._decoder.close()
