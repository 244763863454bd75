"""`receive`: one migration into a snapshot."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

from multifd.codec.readers import Readers
from multifd.engine.receiver import Memory
from multifd.errors import MultifdError, PeerError, UsageError
from multifd.jobs.destination.connections import Connections
from multifd.jobs.destination.verdict import SUCCESSES, Saw, State, after, seen, told
from multifd.jobs.report import DEFAULT_CHANNELS, OnProgress, Progress, Result, check_channels, every
from multifd.memory.runs import runs
from multifd.net.connection import MAIN_READ, Connection, Ended, Lost
from multifd.net.deadline import DEFAULT_TIMEOUT, FOREVER, Silence
from multifd.net.listener import Listener
from multifd.net.recording import open_recording
from multifd.net.security import listening_wrap
from multifd.net.uri import Uri
from multifd.observe.hooks import BACK, IN
from multifd.observe.observers import Observers
from multifd.qemu.driver import THEN, Source
from multifd.snapshot.writer import BlockFile, SnapshotWriter, check_free
from multifd.wire.counts import Counts
from multifd.wire.events import (
    BlockList,
    CommandReceived,
    Configuration,
    DeviceState,
    Event,
    PageData,
    RamEnd,
    SyncPoint,
    ZeroPages,
)
from multifd.wire.flags import PACKET_SIZE, VM_FILE_MAGIC, Command
from multifd.wire.mainchannel import Parser
from multifd.wire.packet import MAGIC, PAGE_SIZES
from multifd.wire.returnpath import pong, shut


def receive(
    uri: str,
    output: str | Path,
    compressor: str | None = None,
    *,
    channels: int | None = None,
    page_size: int | None = None,
    description_required: bool = True,
    missing_allowed: bool = False,
    digests: bool = True,
    timeout: float = DEFAULT_TIMEOUT,
    first_timeout: float | None = None,
    idle_timeout: float | None = None,
    tls_creds: str | Path | None = None,
    qmp: str | None = None,
    then: str = "stop",
    observe: Sequence[str] = (),
    on_listening: Callable[[str], None] | None = None,
    on_progress: OnProgress | None = None,
) -> Result:
    """Take one migration from `uri` (`tcp:`, `unix:` or `recording:`) into a snapshot.

        result = multifd.receive("recording:tests/captures/q72-none-2ch", "snap")
        print(result.zero_pages, "zero pages of", result.normal_pages + result.zero_pages)

    Without `compressor`, or with `auto`, each packet's own flag decides.  `channels` is DEFAULT_CHANNELS unless
    given; a recording says it itself.  `page_size` is assumed where the stream names none.
    `description_required` refuses a stream without VM description, `missing_allowed` takes one
    in which pages never came (memory that the guest gave back to its host).  `timeout` bounds
    first bytes and a SYNC that others wait for, `first_timeout` the first connection,
    `idle_timeout` any silence; all in seconds, the last two None for ever.
    `tls_creds` is a directory of certificates as `multifd.net.tls` wants them; plain without.
    `qmp` is the monitor of the source's QEMU: its settings are made to fit and put back at the
    end, the migration is started, and after it the guest is left as `then` says: `stop`,
    `resume` or `quit`; where it fails, a guest that ran goes on.  `observe` are those that look on,
    each `NAME[=ARG]` (`multifd.observe.hooks`).
    Raises UsageError, CallerError, HostError, PeerError, CompressorError.
    """
    if page_size not in (None, *PAGE_SIZES):
        raise UsageError(f"page size {page_size} is none of {', '.join(map(str, PAGE_SIZES))}")
    if then not in THEN:
        raise UsageError(f"then {then!r} is none of {', '.join(THEN)}")
    where = Uri.parse(uri)
    if where.scheme == "unix":
        where = Uri("unix", path=os.path.abspath(where.path))  # QEMU may be elsewhere
    elif where.scheme == "recording" and qmp is not None:
        raise UsageError(f"{uri}: no QEMU sends a recording")
    wrap = listening_wrap(tls_creds)
    path = Path(os.path.abspath(output))
    check_free(path)
    readers = Readers.parse(compressor)
    # A recording waits for nobody, and nobody for it.
    silence = Silence(timeout, idle_timeout) if where.scheme != "recording" else Silence(FOREVER)
    observers = Observers(observe)
    with ExitStack() as last, ExitStack() as cleanup:
        cleanup.enter_context(observers.migration(IN))
        recorded: list[Connection] = []
        listener = None
        driver: Source | None = None
        if where.scheme == "recording":
            main, others = open_recording(where.path)
            recorded = [main, *others]
            for connection in recorded:
                cleanup.callback(connection.close)
            if channels not in (None, len(others)):
                raise UsageError(f"{uri} has {len(others)} channels, not {channels}: leave --channels out")
            channels = len(others)
        else:
            channels = DEFAULT_CHANNELS if channels is None else channels
            check_channels(channels)
            if qmp is not None:
                driver = Source(qmp, channels=channels, method=readers.method, timeout=timeout)
                cleanup.enter_context(driver)
                first_timeout = timeout
            listener = Listener(where, wrap)
            cleanup.callback(listener.close)
        connections = Connections(listener, channels, readers, silence, observers)
        job = _Receiver(connections, path, page_size, description_required, missing_allowed)
        cleanup.callback(job.close)  # after the threads that write to its files
        cleanup.callback(connections.close)
        if listener is not None:
            if on_listening is not None:
                on_listening(str(listener.uri))
            connections.start()
            if driver is not None:
                cleanup.push(driver.recover)  # while there is still somebody at its other end
                driver.start(str(listener.uri))
        for connection in recorded:
            connections.take(connection)
        if on_progress is not None:
            cleanup.enter_context(every(0.5, lambda: on_progress(job.progress())))
        try:
            result = job.run(first_timeout)
        except BaseException as error:
            if driver is not None:
                driver.give_up(error, connections.close)
            raise
        if digests:
            last.callback(job.add_digests)  # the guest has waited long enough
        if driver is not None:
            _leave(driver, then)
    return result


def _leave(driver: Source, then: str) -> None:
    """The snapshot is whole: what becomes of the guest.  Raises PeerError where that cannot be."""
    try:
        driver.wait()
        driver.leave(then)
    except MultifdError as error:
        text = f"the snapshot is complete, but not all is well at the source: {error}"
        if then != "stop":
            raise PeerError(f"{text}; its guest did not {then}") from error
        warnings.warn(text, RuntimeWarning, stacklevel=2)


class _Receiver:
    """Reads the main channel and makes the snapshot."""

    def __init__(
        self,
        connections: Connections,
        path: Path,
        page_size: int | None,
        description_required: bool,
        missing_allowed: bool,
    ) -> None:
        self.snapshot: SnapshotWriter | None = None
        self._connections = connections
        self._channels = connections.channels
        self._path = path
        self._parser = Parser(page_size)
        self._description_required = description_required
        self._missing_allowed = missing_allowed
        self._configuration = Configuration("", None, None, b"")
        self._main: Connection | None = None
        self._return_path = False
        self._started = time.monotonic()
        self._on_main = Counts()
        self._rounds = 0
        self._pages_then = 0
        self._total_pages = 0
        self._state = State.WAITING

    def run(self, first_timeout: float | None) -> Result:
        """Take the migration to its end; says so to the source when it is on the disk.

        Raises how it ended otherwise, as the verdict has it.
        """
        try:
            return self._run(first_timeout)
        except BaseException as error:
            hint = self._hint(error)
            self._saw(seen(error))
            if self._main is not None and self._return_path and self._state not in SUCCESSES:
                with suppress(MultifdError):
                    self._main.write([shut(1)])
            if not isinstance(error, MultifdError):
                raise
            raise told(self._state, error, hint) from error

    def _saw(self, saw: Saw) -> None:
        self._state = after(self._state, saw)

    def _hint(self, error: BaseException) -> str:
        """What an early end may have been, too."""
        if not self._connections.live:
            return f"or the recording is cut: {error}"
        if self._state is State.SWITCHED_OVER and self._description_required and not self._return_path:
            return "or it runs with suppress-vmdesc=on and sends no VM description: allow that with --no-description"
        return ""

    def _run(self, first_timeout: float | None) -> Result:
        connection = self._connections.main(first_timeout)
        observers = self._connections.observers
        main = self._main = observers.watch_main(connection, read=IN, written=BACK)
        self._started = time.monotonic()
        magic = MAGIC.pack(VM_FILE_MAGIC)  # which told that it is the main channel
        observers.main(IN, magic)
        self._parser.feed(magic)
        self._read(main)
        self._channels.finish(source_waits=self._return_path)
        result = self._complete(main)
        if self._state is State.CONFIRMED:
            self._channels.let_go()
        return result

    def close(self) -> None:
        """Leave nothing behind but a complete snapshot."""
        if self.snapshot is not None:
            self.snapshot.discard()

    def add_digests(self) -> None:
        """To the snapshot, which is complete without them, too."""
        assert self.snapshot is not None
        try:
            self.snapshot.add_digests()
        except MultifdError as error:
            warnings.warn(f"the snapshot is complete, but has no digests: {error}", RuntimeWarning, stacklevel=2)

    def progress(self) -> Progress:
        """How far it is, for a person."""
        pages = self._pages
        size = self._parser.page_size
        wire = self._channels.wire_bytes + (self._main.bytes_read if self._main else 0)
        return Progress(time.monotonic() - self._started, pages, self._total_pages, pages * size, wire)

    @property
    def _pages(self) -> int:
        return self._channels.counts.pages + self._on_main.pages

    def _read(self, main: Connection) -> None:
        while not self._parser.complete:
            events = self._next_events(main)
            if events is None:
                return
            for event in events:
                self._handle(event, main)

    def _next_events(self, main: Connection) -> list[Event] | None:
        """What the next bytes complete; None at an end that is allowed."""
        try:
            data = main.read_some(MAIN_READ, due=self._parser.inside)
        except MultifdError as error:
            raise error.at("main channel") from error
        # A channel that failed has ended this reading; its error is the one to tell.
        self._channels.raise_failure()
        try:
            if data:
                self._parser.feed(data)
                return list(self._parser.events())
        except MultifdError as error:
            raise error.at("main channel") from error
        try:
            self._parser.end(description_required=self._description_required)
        except PeerError as error:
            raise Ended(f"main channel: {error}") from error
        return None

    def _handle(self, event: Event, main: Connection) -> None:
        size = self._parser.page_size
        match event:
            case DeviceState(data):
                assert self.snapshot is not None
                self.snapshot.add_device_state(data)
            case ZeroPages(idstr, offsets):
                assert self.snapshot is not None
                for offset, length in runs(offsets, size):
                    for start in range(offset, offset + length, PACKET_SIZE):
                        self.snapshot.blocks[idstr].clear(start, min(PACKET_SIZE, offset + length - start))
                self._on_main.zero_pages += len(offsets)
            case PageData(idstr, offset, data):
                assert self.snapshot is not None
                self.snapshot.blocks[idstr].store(offset, memoryview(data))
                self._on_main.normal_pages += 1
            case SyncPoint():
                assert self.snapshot is not None
                self._channels.sync_point(self.snapshot.next_epoch, self._connections.source_is_gone)
                self._saw(Saw.SYNC)
                pages = self._pages
                self._rounds += pages > self._pages_then
                self._pages_then = pages
            case Configuration():
                self._configuration = event
            case BlockList(blocks):
                self.snapshot = SnapshotWriter(self._path, size)
                self.snapshot.create_blocks(blocks)
                self._total_pages = sum(block.used_length for block in blocks) // size
                by_name = {block.idstr: block for block in blocks}
                self._channels.start(Memory(size, by_name, self.snapshot.blocks))
                self._saw(Saw.BLOCKS)
            case RamEnd():
                self._saw(Saw.RAM_END)
            case CommandReceived(Command.OPEN_RETURN_PATH, _):
                self._return_path = True
            case CommandReceived(Command.PING, data):
                if not self._return_path:
                    raise PeerError("main channel: a ping without a return path")
                with suppress(Lost):  # a source that has gone: what is missing then tells
                    main.write([pong(int.from_bytes(data))])

    def _complete(self, main: Connection) -> Result:
        snapshot = self.snapshot
        assert snapshot is not None  # the parser ends no stream without a block list
        uuid = self._channels.uuid or bytes(16)
        if self._configuration.uuid not in (None, uuid):
            raise PeerError(f"main channel: VM uuid {self._configuration.uuid!r}, the multifd channels have {uuid!r}")
        for file in snapshot.blocks.values():
            self._check_pages(file)
        self._saw(Saw.ACCOUNTED)
        counts = Counts.total([self._channels.counts, self._on_main])

        def result() -> Result:
            return Result(
                seconds=round(time.monotonic() - self._started, 6),
                normal_pages=counts.normal_pages,
                zero_pages=counts.zero_pages,
                wire_bytes=main.bytes_read + self._channels.wire_bytes,
                memory_bytes=counts.pages * self._parser.page_size,
                packets=counts.packets,
                channels=self._channels.count,
                compressor=self._connections.readers.used,
                statistics=self._channels.statistics,
            )

        transfer = asdict(result()) | {
            "main_zero_pages": self._on_main.zero_pages,
            "sync_points": self._channels.sync_points,
            "rounds": self._rounds,
            "description": self._parser.complete,
        }

        def still_here() -> None:
            with suppress(MultifdError):
                main.write([pong(0)])

        with ExitStack() as writing:
            if self._return_path:
                # A slow disk may take minutes; QEMU ignores a PONG, and our sender counts it as life.
                writing.enter_context(every(1.0, still_here))
            snapshot.complete(
                self._configuration.raw,
                uuid=uuid,
                machine=self._configuration.machine,
                sync=self._parser.sync,
                transfer=transfer,
            )
        self._saw(Saw.ON_DISK)
        self._connections.complete = True
        said = result()
        with suppress(MultifdError):
            if self._return_path:
                main.write([shut(0)])
                self._saw(Saw.TOLD)
        self._saw(Saw.UNTOLD)
        return said

    def _check_pages(self, file: BlockFile) -> None:
        unsettled = file.unsettled()
        if unsettled:
            raise PeerError(
                f"{len(unsettled)} pages of {file.block.idstr} came twice between two SYNCs with different content, "
                f"the first at {unsettled[0]:#x}: which one is right cannot be known"
            )
        missing, first = file.missing()
        if missing and not self._missing_allowed:
            raise PeerError(
                f"{missing} pages of {file.block.idstr} never came, the first at {first:#x}: they were lost, or the "
                "guest gave them back to its host (balloon, virtio-mem); in that case allow it with --missing-pages"
            )
