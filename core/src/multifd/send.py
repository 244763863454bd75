"""The sending channels: one thread each, which takes batches of pages and writes packets.

The way of a page: `submit` hands a batch (offsets only) to whichever channel is idle; that
channel's thread reads the pages into its own buffer, parts zero pages from normal ones, lets the
compressor make the payload of the runs, and writes header and payload with one call.
`sync` returns when every channel has written all of its packets and a SYNC.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from multifd.errors import CompressorError, HostError, MultifdError
from multifd.flags import MAX_PAYLOAD, PACKET_SIZE
from multifd.hookspecs import Channel
from multifd.plugins import Compressor, Settings
from multifd.ram import Block, runs, zero_indexes
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
    """Up to PACKET_SIZE bytes of one block; a `hole` is known to be zero and is not read."""

    source: SourceFile
    offset: int
    length: int
    hole: bool = False


@dataclass(slots=True)
class _SendChannel:
    """Owned by its thread, but for `synced`, which the lock guards."""

    id: int
    connection: Connection
    view: Channel
    buffer: bytearray = field(default_factory=lambda: bytearray(PACKET_SIZE))
    synced: int = 0
    packets: int = 0
    normal_pages: int = 0
    zero_pages: int = 0


class SendChannels:
    """All sending channels of one migration.

    `zero_pages` says where zero pages go: `multifd` in the packets, `legacy` to `take_zeros`
    for the main channel, `none` as normal pages.
    """

    def __init__(
        self,
        connections: Sequence[Connection],
        compressor: Compressor,
        settings: Settings,
        page_size: int,
        zero_pages: str,
    ) -> None:
        self._compressor = compressor
        self._page_size = page_size
        self._zero_pages = zero_pages
        self._channels = [
            _SendChannel(number, connection, compressor.channel(number, page_size, settings))
            for number, connection in enumerate(connections)
        ]
        self._packet_num = itertools.count()
        self._zeros: deque[tuple[str, Sequence[int]]] = deque()
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._work: deque[Batch] = deque()
        self._syncs = 0
        self._over = False
        self._failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, args=(channel,), name=f"multifd-send-{channel.id}", daemon=True)
            for channel in self._channels
        ]
        for thread in self._threads:
            thread.start()

    @property
    def counts(self) -> tuple[int, int, int]:
        """Packets (SYNC included), normal pages and zero pages so far."""
        channels = self._channels
        return (
            sum(channel.packets for channel in channels),
            sum(channel.normal_pages for channel in channels),
            sum(channel.zero_pages for channel in channels),
        )

    def submit(self, batch: Batch) -> None:
        """Hand a batch to the next idle channel; waits while all are busy.  Raises its error."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._work) < len(self._channels) or self._over)
            self._raise_failure()
            self._work.append(batch)
            self._changed.notify_all()

    def sync(self) -> None:
        """Wait until all batches and one SYNC per channel are written.  Raises their error."""
        with self._changed:
            self._syncs += 1
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._over or all(channel.synced == self._syncs for channel in self._channels)
            )
            self._raise_failure()

    def take_zeros(self) -> list[tuple[str, Sequence[int]]]:
        """Zero pages found since the last call, for the main channel: (idstr, offsets)."""
        found = []
        while self._zeros:
            found.append(self._zeros.popleft())
        return found

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
        """The first error is the one that `submit` and `sync` raise."""
        with self._changed:
            if not self._over:
                self._failure = error
                self._over = True
                self._changed.notify_all()
        for channel in self._channels:
            channel.connection.interrupt()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self, channel: _SendChannel) -> None:
        try:
            with self._compressor.guard("multifd_send_setup"):
                self._compressor.hook.multifd_send_setup(channel=channel.view)
            while (batch := self._next(channel)) is not None:
                if isinstance(batch, Batch):
                    self._send(channel, batch)
                else:
                    self._send_sync(channel)
        except MultifdError as error:
            self._fail(error.at(f"channel {channel.id}"))
        except BaseException as error:
            self._fail(error)
        finally:
            self._compressor.cleanup("send", channel.view)

    def _next(self, channel: _SendChannel) -> Batch | int | None:
        """A batch; the number of a SYNC that is due; None at the end."""
        with self._changed:
            while not self._over:
                if self._work:
                    batch = self._work.popleft()
                    self._changed.notify_all()
                    return batch
                if channel.synced < self._syncs:
                    return self._syncs
                self._changed.wait()
            return None

    def _send_sync(self, channel: _SendChannel) -> None:
        header = RamPacket(sync=True, packet_num=next(self._packet_num)).pack(self._page_size)
        channel.connection.write([header])
        channel.packets += 1
        with self._changed:
            channel.synced += 1
            self._changed.notify_all()

    def _send(self, channel: _SendChannel, batch: Batch) -> None:
        size = self._page_size
        first = batch.offset
        offsets = range(first, first + batch.length, size)
        normal: Sequence[int] = offsets
        zero: Sequence[int] = ()
        if batch.hole:
            normal, zero = (), offsets
        else:
            _read(batch, channel.buffer)
            if self._zero_pages != "none":
                indexes = zero_indexes(channel.buffer, len(offsets), size)
                if indexes:
                    zero = [offsets[index] for index in indexes]
                    empty = set(zero)
                    normal = [offset for offset in offsets if offset not in empty]
        channel.normal_pages += len(normal)
        channel.zero_pages += len(zero)
        if zero and self._zero_pages == "legacy":
            self._zeros.append((batch.source.block.idstr, zero))
            zero = ()
        if not normal and not zero:
            return
        payload = self._payload(channel, normal, first) if normal else ()
        header = RamPacket(
            method=self._compressor.facts.flag,
            packet_num=next(self._packet_num),
            ramblock=batch.source.block.idstr,
            normal=tuple(normal),
            zero=tuple(zero),
            next_packet_size=sum(map(len, payload)),
        ).pack(size)
        channel.connection.write([header, *payload])
        channel.packets += 1

    def _payload(self, channel: _SendChannel, normal: Sequence[int], first: int) -> Sequence[Buffer]:
        whole = memoryview(channel.buffer).toreadonly()
        pages = [whole[start - first : start - first + length] for start, length in runs(normal, self._page_size)]
        with self._compressor.guard("multifd_send_prepare"):
            payload: Sequence[Buffer] = self._compressor.hook.multifd_send_prepare(channel=channel.view, pages=pages)
            length = sum(map(len, payload))
        if not 0 < length <= MAX_PAYLOAD:
            raise CompressorError(
                f"{self._compressor.name} made {length} bytes of {sum(map(len, pages))} bytes of pages; "
                f"a payload has 1 to {MAX_PAYLOAD}"
            )
        return payload


def _read(batch: Batch, buffer: bytearray) -> None:
    """Read, not map: a mapped file that shrinks or fails kills the process with SIGBUS."""
    view = memoryview(buffer)[: batch.length]
    source = batch.source
    done = 0
    while done < batch.length:
        try:
            count = os.preadv(source.fd, [view[done:]], batch.offset + done)
        except OSError as error:
            raise HostError(f"{source.path} cannot be read at byte {batch.offset + done}: {error.strerror}") from error
        if not count:
            raise HostError(
                f"{source.path} shrank to {batch.offset + done} bytes while it was sent; "
                f"it had {source.block.used_length}: nothing was confirmed, send it again"
            )
        done += count
