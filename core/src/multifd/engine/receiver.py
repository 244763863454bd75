"""The receiving channels: one thread each, which checks packets and puts pages in their place.

A channel stops at its k-th SYNC until the main channel has come to its k-th marker and every
other channel to its k-th SYNC (`sync_point`); only then does anything of the next epoch touch
the memory.  Everything of a packet is checked before a byte of memory is.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from multifd.codec.readers import Readers
from multifd.crew import Crew
from multifd.engine.decoder import Decoder
from multifd.engine.headers import read_packet
from multifd.errors import Cancelled, MultifdError
from multifd.log import log
from multifd.memory.buffer import packet_buffer
from multifd.memory.runs import runs
from multifd.net.connection import Connection, Ended
from multifd.net.deadline import LETTING_GO, Silence
from multifd.net.wake import Wake
from multifd.observe.hooks import IN
from multifd.observe.observers import Observers
from multifd.observe.watch import Watch
from multifd.wire.block import Block, check_packet
from multifd.wire.counts import Counts
from multifd.wire.numbers import ChannelNumbers, Numbers, Round
from multifd.wire.packet import InitPacket, RamPacket, header_length
from multifd.wire.passes import Passes

#: Bytes read at once of what comes afterwards.
AFTERWARDS = 4096


class PageStore(Protocol):
    """Where one block's pages go; offsets and lengths were checked."""

    def store(self, offset: int, pages: memoryview) -> None:
        """Take a run of pages."""

    def clear(self, offset: int, length: int) -> None:
        """Make a run of pages zero."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The destination's memory: known once the main channel has listed the RAM blocks."""

    page_size: int
    blocks: Mapping[str, Block]
    stores: Mapping[str, PageStore]


@dataclass(slots=True)
class _RecvChannel:
    """Owned by its thread, but for what the lock guards: `rounds` and what follows it.

    `rounds` are those that sync points have not taken yet, `over` says that nothing more is taken from it, `ended` why
    where its source has ended it.  `finish` looks at `numbers` once it is over.
    """

    id: int
    connection: Connection
    decoder: Decoder
    watch: Watch
    counts: Counts = field(default_factory=Counts)
    numbers: ChannelNumbers = field(default_factory=ChannelNumbers)
    passes: Passes = field(default_factory=Passes)
    rounds: deque[Round] = field(default_factory=deque)
    syncs: int = 0
    over: bool = False
    ended: str = ""


class RecvChannels:
    """All receiving channels of one migration."""

    def __init__(
        self,
        came: Sequence[tuple[InitPacket, Connection]],
        memory: Memory,
        readers: Readers,
        silence: Silence,
        crew: Crew,
        observers: Observers,
    ) -> None:
        """They read once it is begun.  Raises HostError where there is no descriptor left."""
        self._memory = memory
        self._readers = readers
        self._silence = silence
        self._crew = crew
        #: The main channel is complete: what is not here by now does not come.
        self._main_complete = Wake()
        try:
            self._ended = Wake()
        except BaseException:
            self._main_complete.close()
            raise
        self._channels = []
        for init, connection in came:
            watch = observers.watch(IN, init, ("wait", "decode"))
            decoder = Decoder(init.id, watch.tee(connection), readers)
            self._channels.append(_RecvChannel(init.id, connection, decoder, watch))
        # Guarded by the crew's lock:
        self._numbers = Numbers(memory.page_size)
        self._passed = 0
        self._over = False

    def begin(self) -> None:
        """Let them read.  Raises Cancelled, HostError where there is no thread for one."""
        self._crew.on_end(self._end)
        for channel in self._channels:
            self._crew.spawn(f"channel {channel.id}", partial(self._serve, channel))

    @property
    def counts(self) -> Counts:
        """Of all channels so far."""
        return Counts.total(channel.counts for channel in self._channels)

    @property
    def statistics(self) -> dict[str, int]:
        """What the compressors counted on all channels."""
        total: Counter[str] = Counter()
        for channel in self._channels:
            total.update(channel.decoder.statistics)
        return dict(total)

    @property
    def wire_bytes(self) -> int:
        """Bytes read from all channels so far."""
        return sum(channel.connection.bytes_read for channel in self._channels)

    @property
    def sync_points(self) -> int:
        """Sync points that all have passed."""
        return self._passed

    @property
    def passes(self) -> int:
        """How often the source has gone through its memory."""
        return max(channel.passes.ended for channel in self._channels)

    @property
    def recent_source(self) -> bool:
        """Whether its SYNCs are those of QEMU 10.0 or later; known from the first sync point on."""
        return self._numbers.recent

    def sync_point(self, between: Callable[[], None]) -> None:
        """The main channel is at its next marker: wait for every channel's SYNC, then go on.

        `between` is called while all of them stand still.  Raises PeerError where a packet of the round is missing or
        came twice, where a channel ended before (Ended), or nothing moves for the timeout (Stalled); Cancelled.
        """
        with self._crew.changed:
            number = self._passed + 1
            self._silence.awaited = True
            while late := self._late(number):
                if not self._crew.changed.wait(self._silence.interval):
                    self._silence.check(late, awaited=True)
                self._crew.check()
            if odd := self._numbers.sync_point([channel.rounds.popleft() for channel in self._channels]):
                log.warning(odd)
            between()
            self._passed = number
            self._silence.awaited = False
            self._crew.changed.notify_all()

    def finish(self, *, source_waits: bool) -> None:
        """The main channel is complete.  Raises PeerError where a channel is not, Cancelled.

        Each is read to its end first: to where its recording or its source ends it, or, where the source waits for
        our answer, to the end of what has come: nothing belongs there any more, and what a source sends before it ends
        its main channel is in our socket by then, or as good as.
        """
        with self._crew.changed:
            if not source_waits:
                self._wait_for_ends()
            self._main_complete.set()
            self._crew.wait_for(lambda: all(channel.over or channel.syncs > self._passed for channel in self._channels))
            for channel in self._channels:
                channel.numbers.check_end(channel.id, channel.syncs, self._passed)
            self._over = True
            self._crew.changed.notify_all()

    def let_go(self) -> None:
        """The source has its answer: wait for its end of each channel, for LETTING_GO seconds at most.

        QEMU 7.2 may still write an empty packet, and takes a connection that is closed then for a failure.
        """
        with self._crew.changed, suppress(Cancelled):
            self._wait_for_ends()

    def _wait_for_ends(self) -> None:
        """Of all channels, but for one that stands at a SYNC too many.  Locked."""
        self._crew.wait_for(
            lambda: all(channel.ended or channel.syncs > self._passed for channel in self._channels), LETTING_GO
        )

    def _end(self) -> None:
        """Wake whoever waits.  Nobody is closed for that: see `net.parting`."""
        self._main_complete.set()
        self._ended.set()

    def close(self) -> None:
        """When no thread is left."""
        self._main_complete.close()
        self._ended.close()

    def _late(self, number: int) -> str:
        """Who keeps sync point `number` waiting, in words; empty if nobody.  Raises Ended.  Locked."""
        for channel in self._channels:
            if channel.syncs < number:
                if channel.ended:
                    raise Ended(f"channel {channel.id}: {channel.ended}, before SYNC {number}")
                return f"channel {channel.id}: waiting for its SYNC {number}"
        return ""

    def _serve(self, channel: _RecvChannel) -> None:
        """Read one channel to its end."""
        channel.watch.begin(self._memory.page_size)
        try:
            ended = self._take_packets(channel, self._memory)
            self._is_over(channel, ended)
            if not ended:
                with suppress(MultifdError):  # what comes now, nobody waits for
                    while channel.connection.ready(self._ended) and channel.connection.read_some(AFTERWARDS):
                        pass
                self._is_over(channel, "the connection ended")
        except MultifdError as error:
            if not self._over:
                raise error.at(f"channel {channel.id}") from error
        finally:
            channel.decoder.close()

    def _is_over(self, channel: _RecvChannel, ended: str = "") -> None:
        with self._crew.changed:
            channel.over = True
            channel.ended = ended
            self._crew.changed.notify_all()

    def _take_packets(self, channel: _RecvChannel, memory: Memory) -> str:
        """Until the source ends the channel, and how; or, with nothing to say, until the main channel is complete and
        nothing is here.  Raises what packets can be wrong in, Ended inside of one.
        """
        header = memoryview(bytearray(header_length(memory.page_size)))
        pages = memoryview(packet_buffer())
        while not (self._over or self._crew.over) and channel.connection.ready(self._main_complete):
            try:
                packet = read_packet(channel.connection, header, memory.page_size)
            except Ended as ended:
                # Whether it may end here is known at the next sync point, or at the end.
                if ended.got and not channel.numbers.may_end_in(header[: ended.got]):
                    raise
                return str(ended)
            channel.watch.clock.lap("wait")
            ended_round = channel.numbers.add(packet)
            channel.passes.add(packet)
            if packet.normal or packet.zero:
                self._take(channel, memory, packet, pages)
            channel.counts.add(packet)
            channel.watch.packet(packet, header)
            if ended_round is not None:
                self._wait_at_sync(channel, ended_round)
        return ""

    def _take(self, channel: _RecvChannel, memory: Memory, packet: RamPacket, buffer: memoryview) -> None:
        size = memory.page_size
        self._readers.check(packet.method)
        block = check_packet(memory.blocks, packet, size)
        store = memory.stores[block.idstr]
        for offset, length in runs(packet.zero, size):
            store.clear(offset, length)
        if packet.normal:
            pages = buffer[: len(packet.normal) * size]
            channel.decoder.decode(packet, pages, size)
            channel.watch.clock.lap("decode")
            done = 0
            for offset, length in runs(packet.normal, size):
                store.store(offset, pages[done : done + length])
                done += length

    def _wait_at_sync(self, channel: _RecvChannel, ended: Round) -> None:
        """Stop until the sync point is passed, or the migration is over instead."""
        with self._crew.changed:
            channel.rounds.append(ended)
            channel.syncs += 1
            self._silence.awaited = True
            self._crew.changed.notify_all()
            self._crew.wait_for(lambda: self._passed >= channel.syncs or self._over)
