"""The receiving channels: one thread each, which checks packets and puts pages in their place.

A channel stops at its k-th SYNC until the main channel has come to its k-th marker and every
other channel to its k-th SYNC (`sync_point`); only then does anything of the next epoch touch
the memory.  Everything of a packet is checked before a byte of memory is.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from multifd.errors import MultifdError, PeerError
from multifd.flags import MAX_PAYLOAD, MULTIFD_MAGIC, VM_FILE_MAGIC, method_name
from multifd.hookspecs import Channel
from multifd.observers import IN, UNWATCHED, Observers, Watch
from multifd.plugins import HOOK_ERRORS, RESERVED, Compressor, Settings, Spec, names, select, select_for_flag
from multifd.ram import Block, check_packet, packet_buffer, runs
from multifd.transport import Connection, Ended, Readable, RecordedConnection, Silence
from multifd.wire import INIT, MAGIC, PREFIX, InitPacket, RamPacket, header_length, is_device_state


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


class Codecs:
    """Finds the compressor for a packet: the one named, or the best for the packet's own flag."""

    def __init__(self, spec: Spec | None) -> None:
        """Loads the compressor named, so that a wrong name is known before anybody connects."""
        self._lock = threading.Lock()
        self._loaded: dict[int, tuple[Compressor, Settings]] = {}
        self._expected = None
        if spec is None or spec.name in RESERVED:
            names()  # read what is installed now, while nobody waits
        else:
            compressor, settings = select(spec, sending=False)
            self._expected = compressor
            self._loaded[compressor.facts.flag] = compressor, settings

    @property
    def method(self) -> str | None:
        """The method of the compressor named; None where each packet says its own."""
        return None if self._expected is None else self._expected.facts.method

    def check(self, flag: int) -> None:
        """Raises PeerError where the peer uses another method than the one named here."""
        if self._expected is not None and flag != self._expected.facts.flag:
            mine, theirs = self._expected.facts.method, method_name(flag)
            raise PeerError(
                f"the sender uses {theirs}, this side expects {mine}: start both with the same --compressor"
            )

    def get(self, flag: int) -> tuple[Compressor, Settings]:
        """The compressor for a method number, loaded at its first packet."""
        with self._lock:
            if flag not in self._loaded:
                self._loaded[flag] = select_for_flag(flag)
            return self._loaded[flag]

    @property
    def used(self) -> str:
        """The compressors' names, for people: the packets' methods, in the order of coming."""
        return "+".join(compressor.name for compressor, _ in self._loaded.values()) or "none"


class Decoder:
    """One channel's payloads: each method's compressor is set up at its first packet."""

    def __init__(self, number: int, connection: Readable, codecs: Codecs) -> None:
        self._id = number
        self._connection = connection
        self._codecs = codecs
        self._views: dict[int, tuple[Compressor, Channel]] = {}
        self._unread = 0

    def decode(self, packet: RamPacket, pages: memoryview, page_size: int) -> None:
        """Read the packet's payload and fill `pages`, its normal pages.

        Raises PeerError, CompressorError, HostError.
        """
        if not 0 < packet.next_packet_size <= MAX_PAYLOAD:
            raise PeerError(
                f"packet {packet.packet_num}: a payload of {packet.next_packet_size} bytes for "
                f"{len(packet.normal)} pages; 1 to {MAX_PAYLOAD} are allowed"
            )
        compressor, view = self._view(packet.method, page_size)
        view.next_packet_size = self._unread = packet.next_packet_size
        try:
            compressor.hook.multifd_recv(channel=view, pages=pages)
        except HOOK_ERRORS as error:
            raise compressor.failed(f"packet {packet.packet_num}", error) from error
        if self._unread:
            raise PeerError(
                f"packet {packet.packet_num}: {self._unread} of {packet.next_packet_size} payload bytes are left over"
            )

    def _view(self, flag: int, page_size: int) -> tuple[Compressor, Channel]:
        if flag not in self._views:
            compressor, settings = self._codecs.get(flag)
            view = compressor.channel(self._id, page_size, settings)
            view.bind(self._read_into)
            self._views[flag] = compressor, view
            try:
                compressor.hook.multifd_recv_setup(channel=view)
            except HOOK_ERRORS as error:
                raise compressor.failed("multifd_recv_setup", error) from error
        return self._views[flag]

    def _read_into(self, wanted: memoryview) -> None:
        if len(wanted) > self._unread:
            raise ValueError(f"read_into of {len(wanted)} bytes, {self._unread} are left of this payload")
        self._unread -= len(wanted)
        try:
            self._connection.read_into(wanted, due=True)
        except Ended as ended:
            raise PeerError(f"inside a payload, {ended}") from None

    @property
    def statistics(self) -> Counter[str]:
        """What the compressors counted."""
        total: Counter[str] = Counter()
        for _, view in self._views.values():
            total.update(view.counts)
        return total

    def close(self) -> None:
        """Clean the compressors up."""
        for compressor, view in self._views.values():
            compressor.cleanup("recv", view)


@dataclass(slots=True)
class _RecvChannel:
    """Owned by its thread, but for `syncs` and `ended`, which the lock guards.

    `finish` looks at `fresh_pages`, too: of a channel that has stopped they are what came after its last SYNC.
    """

    id: int
    connection: Connection
    decoder: Decoder
    watch: Watch = UNWATCHED
    syncs: int = 0
    fresh_pages: int = 0
    ended: str = ""
    packets: int = 0
    normal_pages: int = 0
    zero_pages: int = 0


class RecvChannels:
    """All receiving channels of one migration."""

    def __init__(
        self, count: int, codecs: Codecs, silence: Silence, on_failure: Callable[[], None], observers: Observers
    ) -> None:
        """`on_failure` is called once, from any thread, to wake the main channel's reader."""
        self._observers = observers
        self.count = count
        self.uuid: bytes | None = None
        self._codecs = codecs
        self._silence = silence
        self._on_failure = on_failure
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._channels: dict[int, _RecvChannel] = {}
        self._memory: Memory | None = None
        self._passed = 0
        self._over = False
        self._failure: BaseException | None = None

    @property
    def counts(self) -> tuple[int, int, int]:
        """Packets (SYNC included), normal pages and zero pages so far."""
        channels = list(self._channels.values())
        return (
            sum(channel.packets for channel in channels),
            sum(channel.normal_pages for channel in channels),
            sum(channel.zero_pages for channel in channels),
        )

    @property
    def statistics(self) -> dict[str, int]:
        """What the compressors counted on all channels."""
        total: Counter[str] = Counter()
        for channel in list(self._channels.values()):
            total.update(channel.decoder.statistics)
        return dict(total)

    @property
    def wire_bytes(self) -> int:
        """Bytes read from all channels so far."""
        return sum(channel.connection.bytes_read for channel in list(self._channels.values()))

    @property
    def sync_points(self) -> int:
        """Sync points that all have passed."""
        return self._passed

    def serve(self, connection: Connection, init: InitPacket) -> None:
        """Read one channel to its end, in the caller's thread; errors go to `fail`."""
        channel = self._register(connection, init)
        try:
            self._run(channel)
        except MultifdError as error:
            self.fail(error.at(f"channel {channel.id}"))
        finally:
            channel.decoder.close()

    def start(self, memory: Memory) -> None:
        """The RAM blocks are known: let the channels read."""
        with self._changed:
            self._memory = memory
            self._changed.notify_all()

    def sync_point(self, between: Callable[[], None]) -> None:
        """The main channel is at its next marker: wait for every channel's SYNC, then go on.

        `between` is called while all of them stand still.  Raises PeerError where a channel
        ended before, is missing, or nothing moves for the timeout; or the first failure.
        """
        with self._changed:
            number = self._passed + 1
            self._silence.awaited = True
            while late := self._late(number):
                self._raise_failure()
                if not self._changed.wait(self._silence.interval):
                    self._silence.check(late, awaited=True)
            self._raise_failure()
            between()
            self._passed = number
            self._silence.awaited = False
            self._changed.notify_all()

    def finish(self, *, recorded: bool) -> None:
        """The main channel is complete.  Raises PeerError where a channel is not.

        A recorded channel is read to its end first.  A live one may stay open: there the source
        waits for our answer.
        """
        with self._changed:
            if recorded:
                self._changed.wait_for(
                    lambda: (
                        self._over
                        or all(channel.ended or channel.syncs > self._passed for channel in self._channels.values())
                    )
                )
            self._raise_failure()
            for channel in self._channels.values():
                if channel.syncs != self._passed or channel.fresh_pages:
                    raise PeerError(
                        f"channel {channel.id}: {channel.syncs} SYNCs and {channel.fresh_pages} pages after the last, "
                        f"but the main channel ended after {self._passed} sync points"
                    )
        self.stop()

    def stop(self) -> None:
        """Wake all threads and let them end."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
            channels = list(self._channels.values())
        for channel in channels:
            channel.connection.interrupt()

    def fail(self, error: BaseException) -> None:
        """Stop everything; the first error is the one that is raised."""
        with self._changed:
            if self._over:
                return
            self._failure = error
        self.stop()
        self._on_failure()

    def raise_failure(self) -> None:
        """Raise the first error of any channel."""
        with self._changed:
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _late(self, number: int) -> str:
        """Who keeps sync point `number` waiting, in words; empty if nobody.  Locked."""
        if self._failure is not None:
            return "failed"
        for channel in self._channels.values():
            if channel.syncs < number and channel.ended:
                raise PeerError(f"channel {channel.id}: {channel.ended} before SYNC {number}: did the source fail?")
        if len(self._channels) < self.count:
            return (
                f"{len(self._channels)} of {self.count} multifd channels came: start both sides with the same "
                "number of channels (and multifd on)"
            )
        waiting = [channel.id for channel in self._channels.values() if channel.syncs < number]
        return f"channel {waiting[0]}: waiting for its SYNC {number}" if waiting else ""

    def _register(self, connection: Connection, init: InitPacket) -> _RecvChannel:
        with self._changed:
            if self.uuid is None:
                self.uuid = init.uuid
            if init.uuid != self.uuid:
                raise PeerError(
                    f"channel {init.id}: VM uuid {init.uuid.hex()}, the other channels have {self.uuid.hex()}: "
                    "two migrations at once?"
                )
            if init.id >= self.count:
                raise PeerError(
                    f"channel {init.id}: the sender uses at least {init.id + 1} channels, this side expects "
                    f"{self.count}: start both with the same --channels"
                )
            if init.id in self._channels:
                raise PeerError(f"channel {init.id}: came twice")
            watch = self._observers.watch(IN, init, ("wait", "decode"))
            channel = self._channels[init.id] = _RecvChannel(
                init.id, connection, Decoder(init.id, watch.tee(connection), self._codecs), watch
            )
            self._changed.notify_all()
            return channel

    def _run(self, channel: _RecvChannel) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._memory is not None or self._over)
            memory = self._memory
        if memory is None or self._over:
            return
        size = memory.page_size
        header = bytearray(header_length(size))
        head = memoryview(header)
        pages = memoryview(packet_buffer())
        channel.watch.begin(size)
        while not self._over:
            try:
                packet = read_packet(channel.connection, head, size)
            except Ended as ended:
                # Whether it may end here is known at the next sync point, or at the end: QEMU 7.2
                # can be cut inside an empty packet after the last SYNC.
                with self._changed:
                    channel.ended = str(ended)
                    self._changed.notify_all()
                return
            channel.packets += 1
            channel.watch.lap("wait")
            if packet.normal or packet.zero:
                self._take(channel, memory, packet, pages)
            channel.watch.packet(packet, head)
            if packet.sync and not self._wait_at_sync(channel):
                return

    def _take(self, channel: _RecvChannel, memory: Memory, packet: RamPacket, buffer: memoryview) -> None:
        size = memory.page_size
        self._codecs.check(packet.method)
        block = check_packet(memory.blocks, packet, size)
        store = memory.stores[block.idstr]
        channel.fresh_pages += len(packet.normal) + len(packet.zero)
        for offset, length in runs(packet.zero, size):
            store.clear(offset, length)
        if packet.normal:
            pages = buffer[: len(packet.normal) * size]
            channel.decoder.decode(packet, pages, size)
            channel.watch.lap("decode")
            done = 0
            for offset, length in runs(packet.normal, size):
                store.store(offset, pages[done : done + length])
                done += length
        channel.normal_pages += len(packet.normal)
        channel.zero_pages += len(packet.zero)

    def _wait_at_sync(self, channel: _RecvChannel) -> bool:
        """Stop until the sync point is passed; False where the migration is over instead."""
        with self._changed:
            channel.syncs += 1
            channel.fresh_pages = 0
            self._silence.awaited = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._passed >= channel.syncs or self._over)
            return not self._over


def identify(connection: Connection, timeout: float) -> InitPacket | None:
    """What a new connection is, by its first bytes: a multifd channel, or None for a main channel.

    Raises Ended where it closed without a byte, PeerError where it is neither, or says nothing
    for `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    first = bytearray(INIT.size)
    view = memoryview(first)
    got = connection.read_first(view[: MAGIC.size], deadline)
    if got < MAGIC.size:
        if not got and not isinstance(connection, RecordedConnection):
            raise Ended(f"{connection.name} closed without a byte")
        raise PeerError(f"{connection.name} ended after {got} bytes: is it a migration?")
    (magic,) = MAGIC.unpack(view[: MAGIC.size])
    if magic == VM_FILE_MAGIC:
        return None
    if magic != MULTIFD_MAGIC:
        tls = ": it speaks TLS, this side does not" if first[:2] == b"\x16\x03" else ""
        raise PeerError(
            f"{connection.name} begins with {magic:#010x}, neither a migration ({VM_FILE_MAGIC:#010x}) nor a "
            f"multifd channel ({MULTIFD_MAGIC:#010x}){tls}"
        )
    got += connection.read_first(view[MAGIC.size :], deadline)
    if got < INIT.size:
        raise PeerError(f"{connection.name} ended after {got} of the {INIT.size} bytes of its init packet")
    return InitPacket.unpack(first)


def read_packet(connection: Connection, head: memoryview, page_size: int) -> RamPacket:
    """Read one packet's header into `head`.

    Raises Ended at the end of the stream, PeerError for what is no packet of RAM.
    """
    got = connection.read_into(head, at_least=PREFIX.size)
    if is_device_state(head[: PREFIX.size]):
        raise PeerError("a device-state packet: state of VFIO devices cannot be taken, detach them")
    if got < len(head):
        connection.read_into(head[got:], due=True)
    return RamPacket.unpack(head, page_size)
