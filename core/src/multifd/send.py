"""The sending channels: one thread each, which takes batches of pages and writes packets.

The way of a page: the thread of whichever channel is idle takes the next batch (offsets only),
reads its pages into a buffer of its own, parts zero pages from normal ones, lets the compressor
make the payload of the runs, and writes header and payload with one call.  `epoch` returns when
every channel has written all of its packets and a SYNC.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from multifd.effort import Choice, Effort, Rung
from multifd.errors import CompressorError, HostError, MultifdError
from multifd.flags import MAX_PAYLOAD
from multifd.hookspecs import Channel
from multifd.observers import Watch
from multifd.plugins import HOOK_ERRORS, Compressor
from multifd.ram import Block, packet_buffer, part, zero_indexes
from multifd.transport import Connection
from multifd.wire import Buffer, RamPacket

ZERO_PAGES = ("multifd", "legacy", "none")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A RAM block open for reading."""

    block: Block
    path: str
    fd: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Up to one packet of one block; a `hole` is known to be zero and is not read."""

    source: SourceFile
    offset: int
    length: int
    hole: bool = False


class Encoder:
    """One channel's payloads, each made by the compressor and level that the effort says."""

    def __init__(self, number: int, page_size: int, effort: Effort) -> None:
        effort.join()
        self._number = number
        self._page_size = page_size
        self._effort = effort
        self._views: dict[Compressor, Channel] = {}
        self._ended = 0.0
        #: The method's number of the last payload, or of the first.
        self.flag = effort.now.compressor.facts.flag

    def set_up(self) -> None:
        """In the thread that encodes.  Raises CompressorError."""
        self._view(self._effort.now)
        self._ended = time.thread_time()

    def _view(self, rung: Rung) -> Channel:
        compressor = rung.compressor
        if compressor not in self._views:
            view = compressor.channel(self._number, self._page_size, rung.settings, live=self._effort.ladder)
            self._views[compressor] = view
            try:
                compressor.hook.multifd_send_setup(channel=view)
            except HOOK_ERRORS as error:
                raise compressor.failed("multifd_send_setup", error) from error
        return self._views[compressor]

    def encode(self, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        """A packet's payload, valid until the next call.  Raises CompressorError."""
        effort = self._effort
        if not effort.ladder:
            return self._encode(effort.now.compressor, self._view(effort.now), pages)
        rung = effort.choose(pages, self._page_size)
        view = self._view(rung)
        view.level = rung.settings.level
        started = time.thread_time()
        payload = self._encode(rung.compressor, view, pages)
        ended = time.thread_time()
        self.flag = rung.compressor.facts.flag
        sizes = sum(map(len, pages)), sum(map(len, payload))
        effort.note(rung.compressor, view.level, *sizes, ended - started, started - self._ended)
        self._ended = ended
        return payload

    def idle(self, seconds: float) -> None:
        """A packet without payload took so long."""
        if self._effort.ladder:
            self._effort.idle(seconds)
            self._ended = time.thread_time()

    def _encode(self, compressor: Compressor, view: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        try:
            payload: Sequence[Buffer] = compressor.hook.multifd_send_prepare(channel=view, pages=pages)
            length = sum(map(len, payload))
        except HOOK_ERRORS as error:
            raise compressor.failed("multifd_send_prepare", error) from error
        if not 0 < length <= MAX_PAYLOAD:
            raise CompressorError(
                f"{compressor.name} made {length} bytes of {sum(map(len, pages))} bytes of pages; "
                f"a payload has 1 to {MAX_PAYLOAD}"
            )
        return payload

    @property
    def statistics(self) -> Counter[str]:
        """What the compressors counted."""
        total: Counter[str] = Counter()
        for view in self._views.values():
            total.update(view.counts)
        return total

    def close(self) -> None:
        """Clean the compressors up."""
        for compressor, view in self._views.items():
            compressor.cleanup("send", view)


@dataclass(slots=True)
class _SendChannel:
    """Owned by its thread, but for `synced`, which the lock guards."""

    id: int
    connection: Connection
    encoder: Encoder
    watch: Watch
    buffer: memoryview = field(default_factory=lambda: memoryview(packet_buffer()))
    pages: memoryview = field(init=False)
    synced: int = 0
    packets: int = 0
    normal_pages: int = 0
    zero_pages: int = 0

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
    ) -> None:
        self._effort = effort = Effort(choice)
        self._page_size = page_size
        self._zero_pages = zero_pages
        self._channels = [
            _SendChannel(number, connection, Encoder(number, page_size, effort), watch)
            for number, (connection, watch) in enumerate(connections)
        ]
        self._packet_num = itertools.count()
        self._next_batch = threading.Lock()
        self._batches: Iterator[Batch] = iter(())  # guarded by _next_batch
        self._changed = threading.Condition()
        # Guarded by _changed:
        self._zeros: list[tuple[str, Sequence[int]]] = []
        self._epoch = 0
        self._over = False
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []
        try:
            for channel in self._channels:
                name = f"multifd-send-{channel.id}"
                thread = threading.Thread(target=self._run, args=(channel,), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:  # nobody else has those that were started
            self.stop()
            raise

    @property
    def counts(self) -> tuple[int, int, int]:
        """Packets (SYNC included), normal pages and zero pages so far."""
        channels = self._channels
        return (
            sum(channel.packets for channel in channels),
            sum(channel.normal_pages for channel in channels),
            sum(channel.zero_pages for channel in channels),
        )

    @property
    def statistics(self) -> dict[str, int]:
        """What the compressors counted on all channels, and what was chosen for how many packets."""
        total = Counter(self._effort.used)
        for channel in self._channels:
            total.update(channel.encoder.statistics)
        return dict(total)

    def epoch(self, batches: Iterable[Batch], on_zeros: Callable[[str, Sequence[int]], None]) -> None:
        """Send all batches and one SYNC per channel; returns when all of it is written.

        `on_zeros` is called in this thread, for the main channel, with (idstr, offsets) of zero
        pages that go there.  Raises the first error of any channel.
        """
        with self._next_batch:
            self._batches = iter(batches)
        with self._changed:
            self._epoch += 1
            self._changed.notify_all()
        done = False
        while not done:
            with self._changed:
                self._changed.wait_for(lambda: self._zeros or self._over or self._all_synced())
                if self._failure is not None:
                    raise self._failure
                done = self._all_synced()
                zeros, self._zeros = self._zeros, []
            for idstr, offsets in zeros:
                on_zeros(idstr, offsets)

    def stop(self) -> None:
        """Wake the threads wherever they are, wait for them to end; the channels are then dead."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        for channel in self._channels:
            channel.connection.interrupt()
        for thread in self._threads:
            thread.join()

    def _fail(self, error: BaseException) -> None:
        """The first error is the one that `epoch` raises."""
        with self._changed:
            if not self._over:
                self._failure = error
                self._over = True
                self._changed.notify_all()
        for channel in self._channels:
            channel.connection.interrupt()

    def _all_synced(self) -> bool:
        return all(channel.synced == self._epoch for channel in self._channels)

    def _run(self, channel: _SendChannel) -> None:
        try:
            channel.encoder.set_up()
            channel.watch.begin(self._page_size)
            while self._wait_for_epoch(channel):
                while (batch := self._take()) is not None:
                    started = time.perf_counter()
                    if not self._send(channel, batch):
                        channel.encoder.idle(time.perf_counter() - started)
                self._send_sync(channel)
        except MultifdError as error:
            self._fail(error.at(f"channel {channel.id}"))
        except BaseException as error:  # noqa: BLE001 - epoch() raises it in its thread
            self._fail(error)
        finally:
            channel.encoder.close()

    def _wait_for_epoch(self, channel: _SendChannel) -> bool:
        """Wait until there is something to send; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: channel.synced < self._epoch or self._over)
            return not self._over

    def _take(self) -> Batch | None:
        with self._next_batch:
            return None if self._over else next(self._batches, None)

    def _send_sync(self, channel: _SendChannel) -> None:
        packet = RamPacket(sync=True, packet_num=next(self._packet_num))
        header = packet.pack(self._page_size)
        channel.watch.lap("wait")
        channel.connection.write([header])
        channel.watch.lap("write")
        channel.watch.packet(packet, header, ())
        channel.packets += 1
        with self._changed:
            channel.synced += 1
            self._changed.notify_all()

    def _send(self, channel: _SendChannel, batch: Batch) -> bool:
        """Send what is to be sent of a batch; says whether there was a payload."""
        size = self._page_size
        offsets = range(batch.offset, batch.offset + batch.length, size)
        count = len(offsets)
        indexes: Sequence[int] = ()
        if batch.hole:
            indexes = range(count)
        else:
            read_batch(batch, channel.buffer)
            if self._zero_pages != "none":
                indexes = zero_indexes(channel.pages[: batch.length], size)
        channel.normal_pages += count - len(indexes)
        channel.zero_pages += len(indexes)
        runs, normal, zero = part(offsets, indexes)
        if zero and self._zero_pages == "legacy":
            with self._changed:
                self._zeros.append((batch.source.block.idstr, zero))
                self._changed.notify_all()
            zero = ()
        if not runs and not zero:
            return False
        channel.watch.lap("wait")
        payload = channel.encoder.encode([channel.pages[a * size : b * size] for a, b in runs]) if runs else ()
        channel.watch.lap("encode")
        packet = RamPacket(
            method=channel.encoder.flag,
            packet_num=next(self._packet_num),
            ramblock=batch.source.block.idstr,
            normal=normal,
            zero=zero,
            next_packet_size=sum(map(len, payload)),
        )
        header = packet.pack(size)
        channel.connection.write([header, *payload])
        channel.watch.lap("write")
        channel.watch.packet(packet, header, payload)
        channel.packets += 1
        return bool(runs)


def read_batch(batch: Batch, buffer: memoryview) -> None:
    """Fill the first `batch.length` bytes of `buffer`.  Raises HostError.

    Read, not mapped: a mapped file that shrinks or fails kills the process with SIGBUS.
    """
    view = buffer[: batch.length]
    source = batch.source
    done = 0
    while done < batch.length:
        try:
            count = os.preadv(source.fd, [view[done:]], batch.offset + done)
        except OSError as error:
            raise HostError(f"{source.path} cannot be read at byte {batch.offset + done}: {error.strerror}") from error
        if not count:
            raise HostError(
                f"{source.path} shrank to {batch.offset + done} bytes while it was read; "
                f"it had {source.block.used_length}: nothing was confirmed, start again"
            )
        done += count
