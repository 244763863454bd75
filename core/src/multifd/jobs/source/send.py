"""`send`: memory to a destination."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from multifd.codec.settings import ADAPTIVE
from multifd.effort.choice import Choice
from multifd.engine.sender import ZERO_PAGES, Batch, SendChannels
from multifd.errors import CallerError, HostError, MultifdError, PeerError, UsageError, counted, os_errors
from multifd.jobs.report import DEFAULT_CHANNELS, OnProgress, Progress, Result, check_channels, every
from multifd.jobs.source.verdict import SUCCESSES, Saw, State, after, answered, seen, told
from multifd.jobs.verdict import LAST_WORD
from multifd.memory.buffer import packet_buffer
from multifd.memory.zeropages import part
from multifd.net.connect import connect
from multifd.net.connection import MAIN_READ, Connection, Ended, Lost
from multifd.net.deadline import DEFAULT_TIMEOUT, Silence
from multifd.net.security import connecting_wrap, warn_exposed
from multifd.net.socket import SocketConnection, Wrap
from multifd.net.uri import Uri
from multifd.observe.hooks import BACK, OUT
from multifd.observe.observers import Observers
from multifd.observe.watch import Watch
from multifd.snapshot.format import SYNC_MODES
from multifd.snapshot.reader import BlockReader, Snapshot, open_snapshot
from multifd.wire.flags import PACKET_SIZE
from multifd.wire.packet import InitPacket
from multifd.wire.returnpath import RETURN_MESSAGE, ReturnPathParser
from multifd.wire.writer import Writer


def send(
    source: Snapshot | str | Path,
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
    """Send a snapshot or a raw image to the destination at `uri`.

        result = multifd.send("guest.raw", "unix:there.sock", "zlib,level=6", channels=2)
        print(result.normal_pages, result.zero_pages, result.wire_bytes)

    `source` is its path, or what `multifd.open_snapshot` has opened.

    `compressor` is `NAME[,key=value...]`, or `auto[,accepts=METHOD+METHOD...]` for the best one
    here of the methods that the destination accepts, all of them unless given.  `zero_pages` says
    where zero pages go: `multifd`, in the packets, for destinations of 9.0 and newer with fresh
    memory (the default for raw images); `legacy`, on the main channel, right for every
    destination (for snapshots); `none`, as normal pages.  `sync` is `round` or `section`, what the
    destination's machine type wants; the source's own unless given, and so is `uuid`, 16 bytes.
    `tls_creds` is a directory of certificates as `multifd.net.tls` wants them, `tls_hostname`
    what the destination's has to name where that is not `uri`'s host; plain without.  `qmp` is the monitor of the
    destination's QEMU, started with `-incoming defer`: its settings are made to fit, it is told to
    listen at `uri`, and its version and uuid are asked.
    `observe` are those that look on, each `NAME[=ARG]` (`multifd.observe.hooks`).  Returns when the destination has
    confirmed.  Raises UsageError, CallerError, HostError, PeerError, CompressorError.
    """
    check_channels(channels)
    target = Uri.parse(uri)
    if target.scheme == "recording":
        raise UsageError(f"{uri}: a recording can only be received")
    if target.scheme == "unix":
        target = Uri("unix", path=os.path.abspath(target.path))  # QEMU may be elsewhere
    if not isinstance(source, Snapshot):
        source = open_snapshot(source)
    page_size = source.page_size
    zero_pages = zero_pages or ("legacy" if source.configuration is not None else "multifd")
    sync = sync or source.sync
    if zero_pages not in ZERO_PAGES or sync not in SYNC_MODES:
        raise UsageError(f"zero_pages {zero_pages!r} or sync {sync!r} is none of {ZERO_PAGES}, {SYNC_MODES}")
    wrap = connecting_wrap(tls_creds, tls_hostname, target)
    choice = Choice.parse(compressor, partial(_sample, source), page_size)
    if qmp is not None and len(choice.flags) > 1:
        raise UsageError(
            f"QEMU takes packets of one method: {ADAPTIVE} is between multifd's own ends; name a compressor"
        )
    observers = Observers(observe)
    with ExitStack() as cleanup:
        cleanup.enter_context(observers.migration(OUT))
        driver = None
        if qmp is not None:
            from multifd.qemu.driver import Destination

            driver = Destination(qmp, channels=channels, method=choice.method, timeout=timeout)
            cleanup.enter_context(driver)
            uuid = uuid or driver.uuid
        blocks = [cleanup.enter_context(item.open()) for item in source.blocks]
        silence = Silence(timeout)
        if driver is not None:
            driver.listen(str(target))
        started = time.monotonic()
        connection = connect(target, silence, wrap=wrap)
        cleanup.callback(connection.close)
        warn_exposed(connection)
        main = observers.watch_main(connection, read=BACK, written=OUT)
        course = _Course()
        connections: list[tuple[SocketConnection, Watch]] = []
        total = source.memory_bytes // page_size

        def wire_bytes() -> int:
            return main.bytes_written + sum(connection.bytes_written for connection, _ in connections)

        def report(show: OnProgress) -> None:
            pages = engine.counts.pages
            show(Progress(time.monotonic() - started, pages, total, pages * page_size, wire_bytes()))

        try:
            writer = Writer(page_size, sync)
            # Main first, and its first bytes at once: a destination before 8.0 goes by order alone,
            # and one that peeks is blocked until they come.
            main.write([writer.head(source.configuration), writer.open_return_path()])
            for number in range(channels):
                connection = _connect_channel(target, silence, number, wrap)
                cleanup.callback(connection.close)
                init = InitPacket(uuid or source.uuid, number)
                connections.append((connection, observers.watch(OUT, init, ("wait", "encode", "write"))))
                connection.write([init.pack()])
            engine = SendChannels(connections, choice, page_size, zero_pages)
            cleanup.callback(engine.stop)
            if on_progress is not None:
                cleanup.enter_context(every(0.5, partial(report, on_progress)))
            course.saw(Saw.CONNECTED)
            _send_all(source, blocks, main, writer, engine, zero_pages, course)
            silence.awaited = True
            course.answered(_answer(main))
            if driver is not None:
                driver.wait()
        except MultifdError as error:
            here = f"compressor {choice.name}, {counted(channels, 'channel')}, page size {page_size}"
            ended = course.ended(error, main, here)
            raise (driver.explain(ended) if driver is not None else ended) from error
        counts = engine.counts
        return Result(
            seconds=round(time.monotonic() - started, 6),
            normal_pages=counts.normal_pages,
            zero_pages=counts.zero_pages,
            wire_bytes=wire_bytes(),
            memory_bytes=counts.pages * page_size,
            packets=counts.packets,
            channels=channels,
            compressor=choice.name,
            statistics=engine.statistics,
        )


def _connect_channel(target: Uri, silence: Silence, number: int, wrap: Wrap) -> SocketConnection:
    try:
        return connect(target, silence, wrap=wrap)
    except HostError as error:
        # It took the main channel, so it is there, and has gone away since.
        raise Lost(f"channel {number}: {error}") from error


def _sample(source: Snapshot) -> bytes:
    """Normal pages from all over the memory, for `auto` to compress: of about eight packets."""
    step = max(1, source.memory_bytes // PACKET_SIZE // 8) * PACKET_SIZE
    buffer = memoryview(packet_buffer())
    found: list[bytes] = []
    for item in source.blocks:
        with item.open() as block:
            for offset in range(0, item.block.used_length, step):
                pages = buffer[: min(PACKET_SIZE, item.block.used_length - offset)]
                block.read_into(offset, pages)
                runs, _, _ = part(pages, source.page_size, range(0, len(pages), source.page_size))
                found += map(bytes, runs)
    return b"".join(found)


def _batches(blocks: Sequence[BlockReader], *, read_holes: bool) -> Iterator[Batch]:
    """All blocks in packets; what lies wholly in a hole of its file need not be read."""
    for block in blocks:
        length = block.block.used_length
        data = -1
        for offset in range(0, length, PACKET_SIZE):
            if data <= offset:
                data = block.next_data(offset)
            size = min(PACKET_SIZE, length - offset)
            yield Batch(block, offset, size, hole=data >= offset + size and not read_holes)


def _send_all(
    source: Snapshot,
    blocks: Sequence[BlockReader],
    main: Connection,
    writer: Writer,
    engine: SendChannels,
    zero_pages: str,
    course: _Course,
) -> None:
    def write_zeros(idstr: str, offsets: Sequence[int]) -> None:
        main.write([writer.zero_pages(idstr, offsets)])

    main.write([writer.ram_start(block.block for block in blocks)])
    engine.epoch((), write_zeros)
    course.saw(Saw.SYNC)
    main.write([writer.ram_end()])
    engine.epoch(_batches(blocks, read_holes=zero_pages == "none"), write_zeros)
    main.write([writer.ram_close()])
    if source.device_state is None:
        main.write([writer.end()])
    else:
        with os_errors(source.device_state, CallerError), open(source.device_state, "rb") as state:
            while data := state.read(MAIN_READ):
                main.write([data])
    course.saw(Saw.WRITTEN)


class _Course:
    """Where this migration is, as the verdict has it."""

    def __init__(self) -> None:
        self._state = State.WAITING

    def saw(self, saw: Saw) -> None:
        self._state = after(self._state, saw)

    def answered(self, code: int) -> None:
        """The destination has said its last word.  Raises PeerError where that is no success."""
        self.saw(answered(code))
        if self._state not in SUCCESSES:
            raise PeerError(
                f"the destination reports that it failed (code {code})"
                if code
                else "the destination says that it has everything, before it was sent"
            )

    def ended(self, error: MultifdError, main: Connection, here: str) -> MultifdError:
        """How it ended, where it did with an error.  A connection lost has its cause in what the main channel says."""
        if isinstance(error, Lost):
            with suppress(MultifdError):  # it may have said nothing, or nonsense
                code = _answer(main, time.monotonic() + LAST_WORD)
                try:
                    self.answered(code)
                except PeerError as cause:
                    error = cause
        self.saw(seen(error))
        return told(self._state, error, here)


def _answer(main: Connection, deadline: float | None = None) -> int:
    """The destination's last word, 0 for good.

    Raises Ended where it closes without one, PeerError where it has said none by the deadline (monotonic).
    """
    answers = ReturnPathParser()
    message = memoryview(bytearray(RETURN_MESSAGE.size))

    def read() -> bytes:
        if deadline is None:
            return main.read_some(len(message))
        return bytes(message[: main.read_first(message, deadline)])

    while answers.shut is None:
        if not (data := read()):
            raise Ended("the destination closed the connection without confirming that it has everything")
        answers.feed(data)
    return answers.shut
