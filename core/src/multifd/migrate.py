"""The two jobs on a migration: `send` memory as its source, `receive` it as its destination.

    from multifd.migrate import receive, send

    result = receive("tcp:127.0.0.1:4444", "snap", channels=2)    # in one process
    result = send("guest.raw", "tcp:127.0.0.1:4444", "zstd", channels=2)    # in another

Both raise MultifdError, and KeyboardInterrupt as it comes; either way no thread, descriptor or
half-written snapshot is left.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from multifd import qmp as qmp_driver
from multifd.effort import Choice
from multifd.errors import CallerError, HostError, MultifdError, PeerError, UsageError, counted
from multifd.flags import PACKET_SIZE, VM_FILE_MAGIC, Command
from multifd.observers import BACK, IN, OUT, Observers, Watch
from multifd.plugins import ADAPTIVE, Spec
from multifd.qmp import THEN
from multifd.ram import Block, packet_buffer, runs, without, zero_indexes
from multifd.recv import Codecs, Memory, RecvChannels, identify
from multifd.send import ZERO_PAGES, Batch, SendChannels, SourceFile, read_batch
from multifd.snapshot import SYNC_MODES, BlockFile, SnapshotWriter, Source, check_free
from multifd.stream import (
    BlockList,
    CommandReceived,
    Configuration,
    DeviceState,
    Event,
    PageData,
    Parser,
    ReturnPathParser,
    SyncPoint,
    Writer,
    ZeroPages,
    pong,
    shut,
)
from multifd.transport import (
    Connection,
    Ended,
    Listener,
    Lost,
    RecordedConnection,
    Silence,
    SocketConnection,
    Stalled,
    Uri,
    Wrap,
    connect,
    open_recording,
)
from multifd.wire import MAGIC, PAGE_SIZES, InitPacket

DEFAULT_CHANNELS = 2
MAX_CHANNELS = 255
#: Seconds; QEMU itself waits for ever.
DEFAULT_TIMEOUT = 30.0
#: Bytes of the main channel read at once.
MAIN_READ = 256 * 1024


@dataclass(frozen=True, slots=True)
class Result:
    """What a migration did.  `wire_bytes` are those from source to destination, all connections.

    `packets` counts every multifd packet, SYNC included; `memory_bytes` is (normal + zero) x page
    size; `seconds` run from the first connection to the confirmation.  `statistics` is what the
    compressor counted: packets by the way they took, empty where there is but one.
    """

    seconds: float
    normal_pages: int
    zero_pages: int
    wire_bytes: int
    memory_bytes: int
    packets: int
    channels: int
    compressor: str
    statistics: dict[str, int]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a migration is; `total_pages` is 0 while it is not known."""

    seconds: float
    pages: int
    total_pages: int
    memory_bytes: int
    wire_bytes: int


OnProgress = Callable[[Progress], None]


def warn_exposed(connection: SocketConnection) -> None:
    """Guest memory on the network for everybody to read: say so."""
    if connection.exposed():
        host = connection.name.removeprefix("the connection from ").removeprefix("tcp:").rpartition(":")[0]
        warnings.warn(
            f"the guest's memory passes unencrypted between this machine and {host}: use TLS, or trust the network",
            RuntimeWarning,
            stacklevel=2,
        )


def _check_channels(channels: int) -> None:
    if not 1 <= channels <= MAX_CHANNELS:
        raise UsageError(f"{channels} channels: QEMU takes 1 to {MAX_CHANNELS}")


def listening_wrap(tls_creds: str | Path | None) -> Wrap:
    """What makes connections of those that come: plain, or with TLS.  Raises CallerError."""
    if tls_creds is None:
        return SocketConnection
    from multifd import tls

    return tls.server(tls_creds)


def connecting_wrap(tls_creds: str | Path | None, hostname: str | None, uri: Uri) -> Wrap:
    """Likewise for those that we make; the other side's name is the URI's unless given."""
    if tls_creds is None:
        if hostname is not None:
            raise UsageError("a TLS host name without TLS: give the directory with its certificates, too")
        return SocketConnection
    from multifd import tls

    return tls.client(tls_creds, hostname or uri.host)


@contextmanager
def _every(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` from a thread of its own, every so often, while the body runs."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(seconds):
            action()

    thread = threading.Thread(target=run, name="multifd-every", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# --- source ---


def send(
    source: Source,
    uri: str,
    compressor: str = "none",
    *,
    channels: int = DEFAULT_CHANNELS,
    zero_pages: str | None = None,
    sync: str | None = None,
    uuid: bytes | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    tls_creds: str | Path | None = None,
    tls_hostname: str | None = None,
    qmp: str | None = None,
    observe: Sequence[str] = (),
    on_progress: OnProgress | None = None,
) -> Result:
    """Send a snapshot or a raw image (`snapshot.open_source`) to the destination at `uri`.

    `compressor` is `NAME[,key=value...]`, or `auto[,accepts=METHOD+METHOD...]` for the best one
    here of the methods that the destination accepts, all of them unless given.  `zero_pages` says
    where zero pages go: `multifd`, in the packets, for destinations of 9.0 and newer with fresh
    memory (the default for raw images); `legacy`, on the main channel, right for every
    destination (for snapshots); `none`, as normal pages.  `sync` is `round` or `section`, what the
    destination's machine type wants; the source's own unless given, and so is `uuid`, 16 bytes.
    `tls_creds` is a directory of certificates as `multifd.tls` wants them, `tls_hostname`
    what the destination's has to name where that is not `uri`'s host; plain without.  `qmp` is the monitor of the
    destination's QEMU, started with `-incoming defer`: its settings are made to fit, it is told to
    listen at `uri`, and its version and uuid are asked.
    `observe` are those that look on, each `NAME[=ARG]` (`multifd.observers`).  Returns when the destination has
    confirmed.  Raises UsageError, CallerError, HostError, PeerError, CompressorError.
    """
    _check_channels(channels)
    target = Uri.parse(uri)
    if target.scheme == "recording":
        raise UsageError(f"{uri}: a recording can only be received")
    if target.scheme == "unix":
        target = Uri("unix", path=os.path.abspath(target.path))
    zero_pages = zero_pages or ("legacy" if source.configuration is not None else "multifd")
    sync = sync or source.sync
    if zero_pages not in ZERO_PAGES or sync not in SYNC_MODES:
        raise UsageError(f"zero_pages {zero_pages!r} or sync {sync!r} is none of {ZERO_PAGES}, {SYNC_MODES}")
    wrap = connecting_wrap(tls_creds, tls_hostname, target)
    choice = Choice.parse(compressor, partial(_sample, source), source.page_size)
    if qmp is not None and len(choice.flags) > 1:
        raise UsageError(
            f"QEMU takes packets of one method: {ADAPTIVE} is between multifd's own ends; name a compressor"
        )
    observers = Observers(observe)
    with ExitStack() as cleanup:
        cleanup.enter_context(observers.migration(OUT))
        driver = None
        if qmp is not None:
            driver = qmp_driver.Destination(qmp, channels=channels, method=choice.method, timeout=timeout)
            cleanup.enter_context(driver)
            uuid = uuid or driver.uuid
        files = [open_block(item.block, item.path, cleanup) for item in source.blocks]
        silence = Silence(timeout)
        if driver is not None:
            driver.listen(str(target))
        started = time.monotonic()
        connection = connect(target, silence, wrap=wrap)
        cleanup.callback(connection.close)
        warn_exposed(connection)
        main = observers.watch_main(connection, read=BACK, written=OUT)
        connections: list[tuple[SocketConnection, Watch]] = []
        total = sum(file.block.used_length for file in files) // source.page_size

        def wire_bytes() -> int:
            return main.bytes_written + sum(connection.bytes_written for connection, _ in connections)

        def report(show: OnProgress) -> None:
            _, normal, zero = engine.counts
            pages = normal + zero
            show(Progress(time.monotonic() - started, pages, total, pages * source.page_size, wire_bytes()))

        try:
            writer = Writer(source.page_size, sync)
            # Main first, and its first bytes at once: a destination before 8.0 goes by order alone,
            # and one that peeks is blocked until they come.
            main.write([writer.head(source.configuration), writer.open_return_path()])
            for number in range(channels):
                connection = _connect_channel(target, silence, number, wrap)
                cleanup.callback(connection.close)
                init = InitPacket(uuid or source.uuid, number)
                connections.append((connection, observers.watch(OUT, init, ("wait", "encode", "write"))))
                connection.write([init.pack()])
            engine = SendChannels(connections, choice, source.page_size, zero_pages)
            cleanup.callback(engine.stop)
            if on_progress is not None:
                cleanup.enter_context(_every(0.5, partial(report, on_progress)))
            _send_all(source, files, main, writer, engine, zero_pages)
            _wait_for_confirmation(main, silence)
            if driver is not None:
                driver.wait()
        except (Lost, Stalled, _Refused) as error:
            told: MultifdError = PeerError(
                f"{error}: the destination's own message says why.  Here: compressor {choice.name}, "
                f"{counted(channels, 'channel')}, page size {source.page_size}; all three must fit over there"
            )
            raise (driver.explain(told) if driver is not None else told) from error
        packets, normal, zero = engine.counts
        pages = normal + zero
        seconds = round(time.monotonic() - started, 6)
        return Result(
            seconds,
            normal,
            zero,
            wire_bytes(),
            pages * source.page_size,
            packets,
            channels,
            choice.name,
            engine.statistics,
        )


def _connect_channel(target: Uri, silence: Silence, number: int, wrap: Wrap) -> SocketConnection:
    try:
        return connect(target, silence, wrap=wrap)
    except HostError as error:
        # It took the main channel, so it is there, and has gone away since.
        raise Lost(f"channel {number}: {error}") from error


def open_block(block: Block, path: Path, cleanup: ExitStack) -> SourceFile:
    """A block's file, which `cleanup` closes.  Raises CallerError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CallerError(f"{path}: {error.strerror}") from error
    cleanup.callback(os.close, fd)
    with suppress(OSError):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return SourceFile(block, str(path), fd)


def _sample(source: Source) -> bytes:
    """Normal pages from all over the memory, for `auto` to compress: of about eight packets."""
    total = sum(item.block.used_length for item in source.blocks)
    step = max(1, total // PACKET_SIZE // 8) * PACKET_SIZE
    buffer = memoryview(packet_buffer())
    found = []
    for item in source.blocks:
        with ExitStack() as cleanup:
            file = open_block(item.block, item.path, cleanup)
            for offset in range(0, item.block.used_length, step):
                length = min(PACKET_SIZE, item.block.used_length - offset)
                read_batch(Batch(file, offset, length), buffer)
                zeros = zero_indexes(buffer[:length], source.page_size)
                for first, end in without(zeros, length // source.page_size):
                    found.append(bytes(buffer[first * source.page_size : end * source.page_size]))
    return b"".join(found)


def _batches(files: list[SourceFile], *, read_holes: bool) -> Iterator[Batch]:
    """All blocks in packets; what lies wholly in a hole of its file need not be read."""
    for file in files:
        length = file.block.used_length
        data = -1
        for offset in range(0, length, PACKET_SIZE):
            if data <= offset:
                data = next_data(file.fd, offset, length)
            size = min(PACKET_SIZE, length - offset)
            yield Batch(file, offset, size, hole=data >= offset + size and not read_holes)


def next_data(fd: int, offset: int, length: int) -> int:
    """Where the first byte at or after `offset` is that is not in a hole; `length`, the file's, where none is."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError:
        # Past the last data, or a file system that knows no holes: then look at everything.
        try:
            end = os.lseek(fd, 0, os.SEEK_END)
            os.lseek(fd, offset, os.SEEK_HOLE)
        except OSError:
            return offset
        return length if end >= length else offset


def _send_all(
    source: Source, files: list[SourceFile], main: Connection, writer: Writer, engine: SendChannels, zero_pages: str
) -> None:
    def write_zeros(idstr: str, offsets: Sequence[int]) -> None:
        main.write([writer.zero_pages(idstr, offsets)])

    main.write([writer.ram_start(file.block for file in files)])
    engine.epoch((), write_zeros)
    main.write([writer.ram_end()])
    engine.epoch(_batches(files, read_holes=zero_pages == "none"), write_zeros)
    main.write([writer.ram_close()])
    if source.device_state is None:
        main.write([writer.end()])
        return
    try:
        with open(source.device_state, "rb") as state:
            while data := state.read(MAIN_READ):
                main.write([data])
    except OSError as error:
        raise CallerError(f"{source.device_state}: {error.strerror}") from error


class _Refused(PeerError):
    """The destination did not confirm."""


def _wait_for_confirmation(main: Connection, silence: Silence) -> None:
    silence.awaited = True
    answers = ReturnPathParser()
    while answers.shut is None:
        data = main.read_some(4096)
        if not data:
            raise _Refused("the destination closed the connection without confirming that it has everything")
        answers.feed(data)
    if answers.shut:
        raise _Refused(f"the destination reports that it failed (code {answers.shut})")


# --- destination ---


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

    Without `compressor`, or with `auto`, each packet's own flag decides.  `channels` is DEFAULT_CHANNELS unless
    given; a recording says it itself.  `page_size` is assumed where the stream names none.
    `description_required` refuses a stream without VM description, `missing_allowed` takes one
    in which pages never came (memory that the guest gave back to its host).  `timeout` bounds
    first bytes and a SYNC that others wait for, `first_timeout` the first connection,
    `idle_timeout` any silence; all in seconds, the last two None for ever.
    `tls_creds` is a directory of certificates as `multifd.tls` wants them; plain without.
    `qmp` is the monitor of the source's QEMU: its settings are made to fit and put back at the
    end, the migration is started, and after it the guest is left as `then` says: `stop`,
    `resume` or `quit`; where it fails, a guest that ran goes on.  `observe` are those that look on,
    each `NAME[=ARG]` (`multifd.observers`).
    Raises UsageError, CallerError, HostError, PeerError, CompressorError.
    """
    if page_size not in (None, *PAGE_SIZES):
        raise UsageError(f"page size {page_size} is none of {', '.join(map(str, PAGE_SIZES))}")
    if then not in THEN:
        raise UsageError(f"then {then!r} is none of {', '.join(THEN)}")
    source = Uri.parse(uri)
    if source.scheme == "unix":
        source = Uri("unix", path=os.path.abspath(source.path))  # QEMU may be elsewhere
    elif source.scheme == "recording" and qmp is not None:
        raise UsageError(f"{uri}: no QEMU sends a recording")
    wrap = listening_wrap(tls_creds)
    path = Path(os.path.abspath(output))
    check_free(path)
    codecs = Codecs(Spec.parse(compressor) if compressor else None)
    silence = Silence(timeout, idle_timeout)
    observers = Observers(observe)
    with ExitStack() as cleanup:
        cleanup.enter_context(observers.migration(IN))
        recorded: list[Connection] = []
        listener = None
        driver: qmp_driver.Source | None = None
        if source.scheme == "recording":
            main, others = open_recording(source.path)
            recorded = [main, *others]
            for connection in recorded:
                cleanup.callback(connection.close)
            if channels not in (None, len(others)):
                raise UsageError(f"{uri} has {len(others)} channels, not {channels}: leave --channels out")
            channels = len(others)
        else:
            channels = DEFAULT_CHANNELS if channels is None else channels
            _check_channels(channels)
            if qmp is not None:
                driver = qmp_driver.Source(qmp, channels=channels, method=codecs.method, timeout=timeout)
                cleanup.enter_context(driver)
                first_timeout = timeout
            listener = Listener(source, wrap)
            cleanup.callback(listener.close)
        arrivals = _Arrivals(listener, channels, codecs, silence, observers)
        job = _Receiver(arrivals, path, page_size, description_required, missing_allowed)
        cleanup.callback(job.close)  # after the threads that write to its files
        cleanup.callback(arrivals.close)
        if listener is not None:
            if on_listening is not None:
                on_listening(str(listener.uri))
            arrivals.start()
            if driver is not None:
                cleanup.push(driver.recover)  # while there is still somebody at its other end
                driver.start(str(listener.uri))
        for connection in recorded:
            arrivals.take(connection)
        if on_progress is not None:
            cleanup.enter_context(_every(0.5, lambda: on_progress(job.progress())))
        try:
            result = job.run(first_timeout)
            if driver is not None:
                driver.wait()
                driver.leave(then)
        except MultifdError as error:
            if driver is None:
                raise
            raise driver.explain(error) from error
    if digests and job.snapshot is not None:
        job.snapshot.add_digests()
    return result


class _Arrivals:
    """Accepts connections; each gets a thread, which finds out by its first bytes what it is."""

    def __init__(
        self, listener: Listener | None, count: int, codecs: Codecs, silence: Silence, observers: Observers
    ) -> None:
        self.silence = silence
        self.codecs = codecs
        self.observers = observers
        self.channels = RecvChannels(count, codecs, silence, self._wake, observers)
        self.complete = False
        self._listener = listener
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._main: Connection | None = None
        self._over = False
        self._connections: list[Connection] = []
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Accept in a thread of its own, until closed."""
        self._spawn(self._accept)

    def take(self, connection: Connection) -> None:
        """A connection has come."""
        with self._changed:
            if self._over:
                connection.close()
                return
            self._connections.append(connection)
            self._changed.notify_all()
            self._spawn(lambda: self._serve(connection))

    def main(self, first_timeout: float | None) -> Connection:
        """Wait for the main channel.  Raises PeerError where it does not come in time."""
        with self._changed:
            while self._main is None and not self._over:
                if not self._connections:
                    if not self._changed.wait_for(lambda: self._connections or self._over, first_timeout):
                        raise PeerError(f"nobody connected within {first_timeout:g} s (--timeout)")
                elif not self._changed.wait_for(self._main_or_nobody, self.silence.timeout):
                    raise PeerError(
                        f"{counted(len(self._connections), 'connection')} came, none of them a main channel, within "
                        f"{self.silence.timeout:g} s (--timeout)"
                    )
            main = self._main
        self.channels.raise_failure()
        assert main is not None
        return main

    def _main_or_nobody(self) -> bool:
        return self._main is not None or self._over or not self._connections

    def stop(self) -> None:
        """Stop accepting; end all threads.  The main channel stays open for the last word."""
        with self._changed:
            self._over = True
            others = [connection for connection in self._connections if connection is not self._main]
        if self._listener is not None:
            self._listener.interrupt()
        self.channels.stop()
        for connection in others:
            connection.interrupt()
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """Stop, and close all connections."""
        self.stop()
        for connection in self._connections:
            if not self.complete and isinstance(connection, SocketConnection):
                connection.reset()
            connection.close()

    def _wake(self) -> None:
        """A channel failed: whoever waits for the main channel, or reads it, must see it."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
            if self._main is not None:
                self._main.interrupt(reading_only=True)

    def _spawn(self, action: Callable[[], None]) -> None:
        thread = threading.Thread(target=action, name="multifd-recv", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _accept(self) -> None:
        assert self._listener is not None
        while (connection := self._listener.accept(self.silence)) is not None:
            self.take(connection)

    def _serve(self, connection: Connection) -> None:
        try:
            self._identify(connection)
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self.channels.fail(error)

    def _identify(self, connection: Connection) -> None:
        try:
            init = identify(connection, self.silence.timeout)
        except Ended as ended:
            warnings.warn(f"{ended}: ignored", RuntimeWarning, stacklevel=1)
            with self._changed:
                self._connections.remove(connection)
                self._changed.notify_all()
            connection.close()
            return
        if init is not None:
            self.channels.serve(connection, init)
            return
        with self._changed:
            if self._main is not None:
                raise PeerError("a second main channel came: two migrations at once?")
            self._main = connection
            self._changed.notify_all()
        if isinstance(connection, SocketConnection):
            warn_exposed(connection)


class _Receiver:
    """Reads the main channel and makes the snapshot."""

    def __init__(
        self,
        arrivals: _Arrivals,
        path: Path,
        page_size: int | None,
        description_required: bool,
        missing_allowed: bool,
    ) -> None:
        self.snapshot: SnapshotWriter | None = None
        self._arrivals = arrivals
        self._channels = arrivals.channels
        self._path = path
        self._parser = Parser(page_size)
        self._description_required = description_required
        self._missing_allowed = missing_allowed
        self._configuration = Configuration("", None, None, b"")
        self._main: Connection | None = None
        self._return_path = False
        self._started = time.monotonic()
        self._main_zero = 0
        self._main_normal = 0
        self._rounds = 0
        self._pages_then = 0
        self._total_pages = 0

    def run(self, first_timeout: float | None) -> Result:
        """Take the migration to its end; says so to the source when it is on the disk."""
        connection = self._arrivals.main(first_timeout)
        observers = self._arrivals.observers
        main = self._main = observers.watch_main(connection, read=IN, written=BACK)
        self._started = time.monotonic()
        magic = MAGIC.pack(VM_FILE_MAGIC)  # which told that it is the main channel
        observers.main(IN, magic)
        self._parser.feed(magic)
        try:
            self._read(main)
            self._channels.finish(recorded=isinstance(connection, RecordedConnection))
            self._arrivals.stop()  # nobody writes any more
            result = self._complete(main)
            self._arrivals.complete = True
            return result
        except BaseException:
            if self._return_path:
                with suppress(MultifdError):
                    main.write([shut(1)])
            raise

    def close(self) -> None:
        """Leave nothing behind but a complete snapshot."""
        if self.snapshot is not None:
            self.snapshot.discard()

    def progress(self) -> Progress:
        """How far it is, for a person."""
        pages = self._pages()
        size = self._parser.page_size
        wire = self._channels.wire_bytes + (self._main.bytes_read if self._main else 0)
        return Progress(time.monotonic() - self._started, pages, self._total_pages, pages * size, wire)

    def _pages(self) -> int:
        _, normal, zero = self._channels.counts
        return normal + zero + self._main_zero + self._main_normal

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
            if not data:
                self._parser.end(description_required=self._description_required)
                return None
            self._parser.feed(data)
            return list(self._parser.events())
        except MultifdError as error:
            raise error.at("main channel") from error

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
                self._main_zero += len(offsets)
            case PageData(idstr, offset, data):
                assert self.snapshot is not None
                self.snapshot.blocks[idstr].store(offset, memoryview(data))
                self._main_normal += 1
            case SyncPoint():
                assert self.snapshot is not None
                self._channels.sync_point(self.snapshot.next_epoch)
                pages = self._pages()
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
            case CommandReceived(Command.OPEN_RETURN_PATH, _):
                self._return_path = True
            case CommandReceived(Command.PING, data):
                if not self._return_path:
                    raise PeerError("main channel: a ping without a return path")
                main.write([pong(int.from_bytes(data))])

    def _complete(self, main: Connection) -> Result:
        snapshot = self.snapshot
        assert snapshot is not None  # the parser ends no stream without a block list
        uuid = self._channels.uuid or bytes(16)
        if self._configuration.uuid not in (None, uuid):
            raise PeerError(f"main channel: VM uuid {self._configuration.uuid!r}, the multifd channels have {uuid!r}")
        for file in snapshot.blocks.values():
            self._check_pages(file)
        packets, normal, zero = self._channels.counts
        pages = self._pages()
        size = self._parser.page_size

        def result() -> Result:
            return Result(
                round(time.monotonic() - self._started, 6),
                normal + self._main_normal,
                zero + self._main_zero,
                main.bytes_read + self._channels.wire_bytes,
                pages * size,
                packets,
                self._channels.count,
                self._arrivals.codecs.used,
                self._channels.statistics,
            )

        transfer = asdict(result()) | {
            "main_zero_pages": self._main_zero,
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
                writing.enter_context(_every(1.0, still_here))
            snapshot.complete(
                self._configuration.raw,
                uuid=uuid,
                machine=self._configuration.machine,
                sync=self._parser.sync,
                transfer=transfer,
            )
        if self._return_path:
            with suppress(MultifdError):  # the snapshot is whole, whether the source hears it or not
                main.write([shut(0)])
        return result()

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
