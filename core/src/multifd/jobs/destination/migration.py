"""One migration on its way into a snapshot: its main channel is read, and how it ends is judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from pathlib import Path

from multifd.codec.readers import Readers
from multifd.crew import Crew, doing
from multifd.engine.receiver import Memory, RecvChannels
from multifd.errors import MultifdError, PeerError, describe
from multifd.jobs.destination.connections import Party
from multifd.jobs.destination.switchover import Switchover
from multifd.jobs.destination.verdict import SUCCESSES, Saw, State, after, seen, told
from multifd.jobs.report import Progress, Result
from multifd.log import log
from multifd.memory.runs import runs
from multifd.net.connection import MAIN_READ, Connection, Ended, Lost
from multifd.net.deadline import Silence
from multifd.net.door import MOST_HEAD
from multifd.net.parting import Parting
from multifd.net.recording import RecordedConnection
from multifd.net.socket import SocketConnection
from multifd.observe.hooks import BACK, IN
from multifd.observe.observers import Observers
from multifd.snapshot.directory import Access
from multifd.snapshot.disks import Disk
from multifd.snapshot.writer import BlockFile, SnapshotWriter
from multifd.wire.counts import Counts
from multifd.wire.events import (
    BlockList,
    CommandReceived,
    Configuration,
    DeviceState,
    EarlyState,
    Event,
    PageData,
    Place,
    RamEnd,
    SyncPoint,
    ZeroPages,
)
from multifd.wire.flags import PACKET_SIZE, Command
from multifd.wire.mainchannel import Parser
from multifd.wire.numbers import Missing
from multifd.wire.returnpath import pong, shut


class Migration:
    """One migration that comes: reads its main channel and makes the snapshot."""

    def __init__(
        self,
        path: Path,
        access: Access,
        page_size: int | None,
        description_required: bool,
        missing_allowed: bool,
        readers: Readers,
        silence: Silence,
        crew: Crew,
        observers: Observers,
    ) -> None:
        self._path = path
        self._access = access
        self._parser = Parser(page_size)
        self._description_required = description_required
        self._missing_allowed = missing_allowed
        self._readers = readers
        self._silence = silence
        self._crew = crew
        self._observers = observers
        #: Whose migration it is, from when they have been met: `let_go` closes their connections.
        self.party: Party | None = None
        self._main: Connection | None = None
        self._channels: RecvChannels | None = None
        self._snapshot: SnapshotWriter | None = None
        self._configuration = Configuration("", None, None, b"")
        #: Of the sections before RAM's first one.
        self._before = bytearray()
        self._return_path = False
        self._started = time.monotonic()
        self._on_main = Counts()
        self._rounds = 0
        self._pages_then = 0
        self._total_pages = 0
        self._state = State.WAITING
        #: Asks for the guest's disks while it stands still, its memory being here; None where nobody knows.
        self.ask_disks: Callable[[], Sequence[Disk] | None] = lambda: None
        self.disks: Sequence[Disk] | None = None
        self.switchover = Switchover()
        #: The manifest digest of the snapshot, once it has one.
        self.digest: str | None = None

    def run(self) -> Result:
        """Take the migration of `party` to its end; says so to the source when it is on the disk."""
        party = self.party
        assert party is not None
        for connection in party.connections:
            if isinstance(connection, SocketConnection):
                connection.keep_to(self._silence)
        self._started = time.monotonic()
        observers = self._observers
        main = self._main = observers.watch_main(party.main, read=IN, written=BACK)
        self._crew.on_end(lambda: party.main.interrupt(reading_only=True))
        observers.main(IN, party.head)
        self._parser.feed(party.head)
        self._take(list(self._parser.events()), main)
        self._read(main)
        assert self._channels is not None  # the parser ends no stream without a block list
        self._channels.finish(source_waits=self._return_path)
        result = self._complete(main, self._channels)
        if self._state is State.CONFIRMED:
            self._channels.let_go()
        return result

    def ended(self, error: BaseException) -> BaseException:
        """It ended with that: tell the source, and how it is to be told to a user."""
        hint = ""
        if isinstance(self._main, RecordedConnection):
            hint = f"or the recording is cut: {error}"
        elif self._state is State.SWITCHED_OVER and self._description_required and not self._return_path:
            hint = "or it runs with suppress-vmdesc=on and sends no VM description: allow that with --no-description"
        elif isinstance(error, Missing) and not self._rounds and self.party is not None:
            count = len(self.party.channels)
            known = f"the sender uses more channels, this side expects {count}: start both with the same --channels"
            error = Missing(f"{error}; or {known}")
        self._saw(seen(error))
        if self._main is not None and self._return_path and self._state not in SUCCESSES:
            with suppress(MultifdError):
                self._main.write([shut(1)])
        return told(self._state, error, hint) if isinstance(error, MultifdError) else error

    def _saw(self, saw: Saw) -> None:
        self._state = after(self._state, saw)

    def let_go(self) -> None:
        """Close all connections, when no thread is left; safe to call twice.

        A source that has failed is let go as `net.parting` says.
        """
        if self.party is None:
            return
        main, *channels = self.party.connections
        if self._state not in SUCCESSES and isinstance(main, SocketConnection):
            main.abort()
            with closing(Parting()) as parting:
                parting.add(channel for channel in channels if isinstance(channel, SocketConnection))
                parting.wait(self._crew.left)
        for connection in (main, *channels):
            connection.close()
        if self._channels is not None:
            self._channels.close()
            self._channels = None

    def close(self) -> None:
        """Leave nothing behind but a complete snapshot."""
        if self._snapshot is not None:
            self._snapshot.discard()

    def add_digests(self, *, plain: bool, on_wait: Callable[[], None]) -> None:
        """To the snapshot, which is complete without them, too; then `digest` is the manifest's."""
        assert self._snapshot is not None
        crew = Crew()
        self._crew.followed_by(crew)
        try:
            self.digest = self._snapshot.add_digests(crew, plain=plain, on_wait=on_wait)
        except Exception as error:  # noqa: BLE001 - nothing makes a complete snapshot a failure
            text = str(error) if isinstance(error, MultifdError) else describe(error)
            log.warning(f"the snapshot is complete, but has no digests: {text}")
        finally:
            self._crew.adopt(crew)

    @property
    def unfinished(self) -> bool:
        """Whether more has to come of it."""
        return self._state in (State.WAITING, State.SET_UP, State.MOVING, State.SWITCHED_OVER)

    def progress(self) -> Progress:
        """How far it is, for a person."""
        pages = self._pages
        size = self._parser.page_size
        channels = self._channels.wire_bytes if self._channels else 0
        wire = channels + (self._main.bytes_read if self._main else 0)
        return Progress(time.monotonic() - self._started, pages, self._total_pages, pages * size, wire)

    @property
    def _pages(self) -> int:
        return (self._channels.counts.pages if self._channels else 0) + self._on_main.pages

    def _read(self, main: Connection) -> None:
        while not self._parser.complete:
            events = self._next_events(main)
            if events is None:
                return
            self._take(events, main)

    def _take(self, events: Sequence[Event], main: Connection) -> None:
        for event in events:
            self._handle(event, main)

    def _next_events(self, main: Connection) -> list[Event] | None:
        """What the next bytes complete; None at an end that is allowed."""
        try:
            data = main.read_some(MAIN_READ, due=self._parser.inside)
        except MultifdError as error:
            raise error.at("main channel") from error
        self._crew.check()  # its end has ended this reading
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
                assert self._snapshot is not None
                self._snapshot.add_device_state(data)
            case EarlyState(place, data):
                if self._snapshot is None:
                    self._before += data
                    if len(self._before) > MOST_HEAD:
                        raise PeerError(
                            f"main channel: more than {MOST_HEAD} bytes of other sections before RAM's first"
                        )
                else:
                    self._snapshot.add_early(place, data)
            case ZeroPages(idstr, offsets):
                assert self._snapshot is not None
                for offset, length in runs(offsets, size):
                    for start in range(offset, offset + length, PACKET_SIZE):
                        self._snapshot.blocks[idstr].clear(start, min(PACKET_SIZE, offset + length - start))
                self._on_main.zero_pages += len(offsets)
            case PageData(idstr, offset, data):
                assert self._snapshot is not None
                self._snapshot.blocks[idstr].store(offset, memoryview(data))
                self._on_main.normal_pages += 1
            case SyncPoint():
                assert self._snapshot is not None
                assert self._channels is not None
                self._channels.sync_point(self._snapshot.next_epoch)
                self._saw(Saw.SYNC)
                pages = self._pages
                self._look_at_rounds(main, self._channels, pages)
                self._rounds += pages > self._pages_then
                self._pages_then = pages
            case Configuration():
                self._configuration = event
            case BlockList(blocks):
                self._snapshot = SnapshotWriter(self._path, size, self._access)
                self._snapshot.create_blocks(blocks)
                if self._before:
                    self._snapshot.add_early(Place.BEFORE_RAM, bytes(self._before))
                self._total_pages = sum(block.used_length for block in blocks) // size
                by_name = {block.idstr: block for block in blocks}
                memory = Memory(size, by_name, self._snapshot.blocks)
                assert self.party is not None
                self._channels = RecvChannels(
                    self.party.channels, memory, self._readers, self._silence, self._crew, self._observers
                )
                self._channels.begin()
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

    def _look_at_rounds(self, main: Connection, channels: RecvChannels, pages: int) -> None:
        assert self.party is not None
        if not isinstance(self.party.main, RecordedConnection):
            machine, answers = self._configuration.machine, self._return_path
            self.switchover.sync_point(
                main, channels, pages, self._parser.page_size, machine=machine, return_path=answers
            )

    def _complete(self, main: Connection, channels: RecvChannels) -> Result:
        snapshot = self._snapshot
        assert snapshot is not None
        party = self.party
        assert party is not None
        uuid = party.uuid
        if self._configuration.uuid not in (None, uuid):
            raise PeerError(f"main channel: VM uuid {self._configuration.uuid!r}, the multifd channels have {uuid!r}")
        for file in snapshot.blocks.values():
            self._check_pages(file)
        self._saw(Saw.ACCOUNTED)
        log.debug(f"the source has a sync point per {self._parser.sync}: the snapshot is sent so, too")
        counts = Counts.total([channels.counts, self._on_main])

        def result() -> Result:
            return Result(
                seconds=round(time.monotonic() - self._started, 6),
                normal_pages=counts.normal_pages,
                zero_pages=counts.zero_pages,
                wire_bytes=main.bytes_read + channels.wire_bytes,
                memory_bytes=counts.pages * self._parser.page_size,
                packets=counts.packets,
                channels=len(party.channels),
                compressor=self._readers.used,
                statistics=channels.statistics,
            )

        transfer = asdict(result()) | {
            "main_zero_pages": self._on_main.zero_pages,
            "sync_points": channels.sync_points,
            "rounds": self._rounds,
            "description": self._parser.complete,
        }
        del transfer["digest"], transfer["standstill"]  # they follow

        def still_here() -> None:
            with suppress(MultifdError):
                main.write([pong(0)])

        with ExitStack() as writing:
            if self._return_path:
                # A slow disk may take minutes; QEMU ignores a PONG, and our sender counts it as life.
                writing.enter_context(self._crew.every(1.0, still_here))
            writing.enter_context(doing(f"writing {self._path} to the disk"))
            self.disks = self.ask_disks()
            snapshot.complete(
                self._configuration.raw,
                uuid=uuid,
                machine=self._configuration.machine,
                sync=self._parser.sync,
                transfer=transfer,
                ram_section=self._parser.ram_section or 1,
                disks=self.disks,
            )
        self._saw(Saw.ON_DISK)
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
