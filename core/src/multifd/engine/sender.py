"""The sending channels: one thread each, which takes batches of pages and writes packets.

The way of a page: the thread of whichever channel is idle takes the next batch (offsets only),
reads its pages into a buffer of its own, where they are checked, and sends it as two packets: parts
zero pages from normal ones, lets the compressor make the payload of the runs, and writes header and
payload with one call.  `epoch` returns when every channel has written all of its packets and a SYNC.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from multifd.crew import Crew
from multifd.effort.choice import Choice
from multifd.effort.controller import Effort
from multifd.engine.encoder import Encoder
from multifd.engine.packets import PacketWriter
from multifd.errors import MultifdError
from multifd.memory.buffer import private_memory
from multifd.net.connection import Connection
from multifd.observe.watch import Watch
from multifd.snapshot.digests import PIECE
from multifd.snapshot.reader import BlockReader
from multifd.wire.counts import Counts
from multifd.wire.flags import PACKET_SIZE
from multifd.wire.packet import RamPacket

ZERO_PAGES = ("multifd", "legacy", "none")


@dataclass(frozen=True, slots=True)
class Batch:
    """Up to one piece of one block; a `hole` is known to be zero and is not read."""

    block: BlockReader
    offset: int
    length: int
    hole: bool = False


@dataclass(slots=True)
class _SendChannel:
    """Owned by its thread, but for `synced`, which the lock guards."""

    id: int
    connection: Connection
    writer: PacketWriter
    buffer: memoryview = field(default_factory=lambda: memoryview(private_memory(PIECE)))
    pages: memoryview = field(init=False)
    synced: int = 0
    #: Zero pages that went to the main channel.
    aside: int = 0

    def __post_init__(self) -> None:
        self.pages = self.buffer.toreadonly()


class SendChannels:
    """All sending channels of one migration.

    `zero_pages` says where zero pages go: `multifd` in the packets, `legacy` to the main
    channel, `none` as normal pages.
    """

    def __init__(
        self,
        connections: Sequence[tuple[Connection, Watch]],
        choice: Choice,
        page_size: int,
        zero_pages: str,
        crew: Crew,
    ) -> None:
        """Raises Cancelled, HostError where there is no thread for one."""
        self._effort = effort = Effort(choice)
        self._page_size = page_size
        self._zero_pages = zero_pages
        self._crew = crew
        numbers = itertools.count()
        self._channels = [
            _SendChannel(
                number, connection, PacketWriter(connection, Encoder(number, page_size, effort), watch, numbers)
            )
            for number, (connection, watch) in enumerate(connections)
        ]
        self._next_batch = threading.Lock()
        self._batches: Iterator[Batch] = iter(())  # guarded by _next_batch
        # Guarded by the crew's lock:
        self._zeros: list[tuple[str, Sequence[int]]] = []
        self._epoch = 0
        for channel in self._channels:
            crew.spawn(f"channel {channel.id}", partial(self._run, channel))

    @property
    def counts(self) -> Counts:
        """Of all channels so far, with the zero pages that went to the main channel."""
        total = Counts.total(channel.writer.counts for channel in self._channels)
        total.zero_pages += sum(channel.aside for channel in self._channels)
        return total

    @property
    def statistics(self) -> dict[str, int]:
        """What the compressors counted on all channels, and what was chosen for how many packets."""
        total = Counter(self._effort.used)
        for channel in self._channels:
            total.update(channel.writer.encoder.statistics)
        return dict(total)

    def epoch(self, batches: Iterable[Batch], on_zeros: Callable[[str, Sequence[int]], None]) -> None:
        """Send all batches and one SYNC per channel; returns when all of it is written.

        `on_zeros` is called in this thread, for the main channel, with (idstr, offsets) of zero
        pages that go there.  Raises Cancelled where the crew is over, and what `on_zeros` raises.
        """
        with self._next_batch:
            self._batches = iter(batches)
        with self._crew.changed:
            self._epoch += 1
            self._crew.changed.notify_all()
        done = False
        while not done:
            with self._crew.changed:
                self._crew.wait_for(lambda: self._zeros or self._all_synced())
                done = self._all_synced()
                zeros, self._zeros = self._zeros, []
            for idstr, offsets in zeros:
                on_zeros(idstr, offsets)

    def _all_synced(self) -> bool:
        return all(channel.synced == self._epoch for channel in self._channels)

    def _run(self, channel: _SendChannel) -> None:
        writer = channel.writer
        try:
            writer.encoder.set_up()
            writer.watch.begin(self._page_size)
            while self._wait_for_epoch(channel):
                while (batch := self._take()) is not None:
                    self._send(channel, batch)
                self._send_sync(channel)
        except MultifdError as error:
            raise error.at(f"channel {channel.id}") from error
        finally:
            writer.close()

    def _wait_for_epoch(self, channel: _SendChannel) -> bool:
        """Wait until there is something to send; False at the end."""
        crew = self._crew
        with crew.changed:
            crew.changed.wait_for(lambda: channel.synced < self._epoch or crew.over)
            return not crew.over

    def _take(self) -> Batch | None:
        with self._next_batch:
            self._crew.check()
            return next(self._batches, None)

    def _send_sync(self, channel: _SendChannel) -> None:
        channel.writer.watch.clock.lap("wait")
        channel.writer.write(RamPacket(sync=True))
        with self._crew.changed:
            channel.synced += 1
            self._crew.changed.notify_all()

    def _send(self, channel: _SendChannel, batch: Batch) -> None:
        """Read a batch, and send what is to be sent of it."""
        started = time.perf_counter()
        if batch.hole:
            batch.block.check_hole(batch.offset, batch.length)
        else:
            batch.block.read_piece(batch.offset, channel.buffer[: batch.length])
        for start in range(0, batch.length, PACKET_SIZE):
            length = min(PACKET_SIZE, batch.length - start)
            pages = None if batch.hole else channel.pages[start : start + length]
            if not self._send_packet(channel, batch.block.block.idstr, batch.offset + start, length, pages):
                channel.writer.encoder.idle(time.perf_counter() - started)
            started = time.perf_counter()

    def _send_packet(
        self, channel: _SendChannel, idstr: str, offset: int, length: int, pages: memoryview | None
    ) -> bool:
        """Send a packet's pages, zero where there are none; says whether there was a payload."""
        writer = channel.writer
        offsets = tuple(range(offset, offset + length, self._page_size))
        runs: list[memoryview] = []
        if pages is None:
            packet = RamPacket(ramblock=idstr, zero=offsets)
        else:
            packet, runs = RamPacket(ramblock=idstr, normal=offsets), [pages]
            if self._zero_pages != "none":
                packet, runs = writer.part(packet, pages)
        if packet.zero and self._zero_pages == "legacy":
            channel.aside += len(packet.zero)
            with self._crew.changed:
                self._zeros.append((idstr, packet.zero))
                self._crew.changed.notify_all()
            packet = replace(packet, zero=())
        if packet.normal or packet.zero:
            writer.watch.clock.lap("wait")
            writer.write(packet, runs)
        return bool(runs)
