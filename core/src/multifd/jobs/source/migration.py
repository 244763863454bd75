"""One migration that goes: a snapshot's memory and device state are sent, and how it ends is judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

from multifd.crew import Crew
from multifd.effort.choice import Choice
from multifd.engine.sender import Batch, SendChannels
from multifd.errors import HostError, MultifdError, PeerError, counted
from multifd.jobs.report import Progress, Result
from multifd.jobs.source.verdict import AT_THE_DESTINATION, SUCCESSES, Saw, State, after, answered, seen, told
from multifd.jobs.verdict import LAST_WORD
from multifd.net.connection import Connection, Ended, Lost
from multifd.net.deadline import Silence
from multifd.net.security import warn_exposed
from multifd.net.socket import SocketConnection
from multifd.observe.hooks import BACK, OUT
from multifd.observe.observers import Observers
from multifd.observe.watch import Watch
from multifd.snapshot.digests import PIECE
from multifd.snapshot.reader import BlockReader, Snapshot
from multifd.wire.block import listed
from multifd.wire.events import Place
from multifd.wire.packet import InitPacket
from multifd.wire.returnpath import RETURN_MESSAGE, ReturnPathParser
from multifd.wire.writer import RAM_SECTION, Writer


class Migration:
    """One migration that goes, and how it ends."""

    def __init__(
        self,
        source: Snapshot,
        blocks: Sequence[BlockReader],
        early: Callable[[Place], Iterator[bytes]],
        device_state: Callable[[], Iterator[bytes]],
        link: Callable[[], SocketConnection],
        choice: Choice,
        channels: int,
        zero_pages: str,
        sync: str,
        uuid: bytes | None,
        silence: Silence,
        crew: Crew,
        observers: Observers,
    ) -> None:
        self._source = source
        self._blocks = blocks
        self._early = early
        self._device_state = device_state
        self._link = link
        self._choice = choice
        self._count = channels
        self._zero_pages = zero_pages
        self._sync = sync
        self._uuid = uuid
        self._silence = silence
        self._crew = crew
        self._observers = observers
        self._started = time.monotonic()
        self._main: Connection | None = None
        self._connections: list[SocketConnection] = []
        self._engine: SendChannels | None = None
        self._state = State.WAITING

    def run(self) -> Result:
        """Send all of it; returns when the destination has confirmed."""
        source, crew = self._source, self._crew
        connection = self._connect()
        warn_exposed(connection)
        main = self._main = self._observers.watch_main(connection, read=BACK, written=OUT)
        ram_section = source.early.ram_section if source.early is not None else RAM_SECTION
        writer = Writer(source.page_size, self._sync, ram_section)
        # Main first, and its first bytes at once: a destination before 8.0 goes by order alone,
        # and one that peeks is blocked until they come.
        main.write([writer.head(source.configuration), writer.open_return_path()])
        channels: list[tuple[SocketConnection, Watch]] = []
        for number in range(self._count):
            try:
                connection = self._connect()
            except HostError as error:
                # It took the main channel, so it is there, and has gone away since.
                raise Lost(f"channel {number}: {error}") from error
            crew.on_end(connection.interrupt)
            init = InitPacket(self._uuid or source.uuid, number)
            channels.append((connection, self._observers.watch(OUT, init, ("wait", "encode", "write"))))
            connection.write([init.pack()])
        self._engine = SendChannels(channels, self._choice, source.page_size, self._zero_pages, crew)
        self._saw(Saw.CONNECTED)
        self._send_all(main, writer, self._engine)
        self._silence.awaited = True
        self._answered(_answer(main.read_some))
        return self._result(self._engine)

    def _connect(self) -> SocketConnection:
        connection = self._link()
        self._connections.append(connection)
        return connection

    def _send_all(self, main: Connection, writer: Writer, engine: SendChannels) -> None:
        def write_zeros(idstr: str, offsets: Sequence[int]) -> None:
            main.write([writer.zero_pages(idstr, offsets)])

        self._send_early(main, Place.BEFORE_RAM)
        main.write([writer.ram_start(block.block for block in self._blocks)])
        engine.epoch((), write_zeros)
        self._saw(Saw.SYNC)
        self._send_early(main, Place.IN_RAM)
        main.write([writer.ram_end()])
        engine.epoch(_batches(self._blocks, read_holes=self._zero_pages == "none"), write_zeros)
        main.write([writer.ram_close()])
        if self._source.device_state is None:
            main.write([writer.end()])
        else:
            for data in self._device_state():
                main.write([data])
        self._saw(Saw.WRITTEN)

    def _send_early(self, main: Connection, place: Place) -> None:
        for data in self._early(place):
            main.write([data])

    def _saw(self, saw: Saw) -> None:
        self._state = after(self._state, saw)

    def _answered(self, code: int) -> None:
        """The destination has said its last word.  Raises PeerError where that is no success."""
        self._saw(answered(code))
        if self._state not in SUCCESSES:
            raise PeerError(
                f"the destination reports that it failed (code {code})"
                if code
                else "the destination says that it has everything, before it was sent"
            )

    def ended(self, error: BaseException, reason: Callable[[], str]) -> BaseException:
        """It ended with that: how a user is told.  A connection lost has its cause in what the main channel says.

        `reason` asks the destination for its own, where it is the one to know.
        """
        if isinstance(error, Lost) and self._connections:
            with suppress(MultifdError):  # it may have said nothing, or nonsense
                code = _answer(partial(self._connections[0].read_by, time.monotonic() + LAST_WORD))
                try:
                    self._answered(code)
                except PeerError as cause:
                    error = cause
        self._saw(seen(error))
        if not isinstance(error, MultifdError):
            return error
        machine = f"machine {self._source.machine}, " if self._source.machine else ""
        here = (
            f"{machine}compressor {self._choice.name}, {counted(self._count, 'channel')}, page size "
            f"{self._source.page_size}, RAM blocks {listed([block.block for block in self._blocks])}"
        )
        return told(self._state, error, here, reason() if self._state in AT_THE_DESTINATION else "")

    def close(self) -> None:
        """When no thread is left."""
        for connection in self._connections:
            connection.close()

    def progress(self) -> Progress:
        """How far it is, for a person."""
        size = self._source.page_size
        pages = self._engine.counts.pages if self._engine is not None else 0
        total = self._source.memory_bytes // size
        return Progress(time.monotonic() - self._started, pages, total, pages * size, self._wire_bytes)

    @property
    def _wire_bytes(self) -> int:
        return sum(connection.bytes_written for connection in list(self._connections))

    def _result(self, engine: SendChannels) -> Result:
        counts = engine.counts
        return Result(
            seconds=round(time.monotonic() - self._started, 6),
            normal_pages=counts.normal_pages,
            zero_pages=counts.zero_pages,
            wire_bytes=self._wire_bytes,
            memory_bytes=counts.pages * self._source.page_size,
            packets=counts.packets,
            channels=self._count,
            compressor=self._choice.name,
            statistics=engine.statistics,
        )


def _batches(blocks: Sequence[BlockReader], *, read_holes: bool) -> Iterator[Batch]:
    """All blocks in pieces; what lies wholly in a hole of its file need not be read."""
    for block in blocks:
        length = block.block.used_length
        data = -1
        for offset in range(0, length, PIECE):
            if data <= offset:
                data = block.next_data(offset)
            size = min(PIECE, length - offset)
            yield Batch(block, offset, size, hole=data >= offset + size and not read_holes)


def _answer(read: Callable[[int], bytes]) -> int:
    """The destination's last word, 0 for good; `read` gives what it says, so many bytes at most.

    Raises Ended where it closes without one, and what `read` raises.
    """
    answers = ReturnPathParser()
    while answers.shut is None:
        if not (data := read(RETURN_MESSAGE.size)):
            raise Ended("the destination closed the connection without confirming that it has everything")
        answers.feed(data)
    return answers.shut
