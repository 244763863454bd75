"""The main channel on its way through the relay: untouched in both directions, and read along."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from multifd.errors import MultifdError, PeerError
from multifd.jobs.relay.plan import Plan
from multifd.net.connection import MAIN_READ, Connection, Ended
from multifd.net.security import warn_exposed
from multifd.net.socket import SocketConnection
from multifd.observe.hooks import BACK, IN, OUT
from multifd.wire.block import Block
from multifd.wire.events import (
    BlockList,
    CommandReceived,
    Configuration,
    DeviceState,
    Event,
    Opaque,
    SyncPoint,
    ZeroPages,
)
from multifd.wire.flags import Command
from multifd.wire.layout import COMMAND_HEAD
from multifd.wire.mainchannel import Parser
from multifd.wire.returnpath import ReturnPathParser

#: A command without data: section type, number, length.
COMMAND_SIZE = 1 + COMMAND_HEAD.size


class MainChannel:
    """What passed on it so far, read along as far as it can be; all of it is guarded by `changed`.

    One thread passes on, another passes back.
    `return_path` says that the destination is to answer; `sync_points` are those that the source has sent, `zero_pages`
    the pages that it named here; `blocks` are its RAM blocks, once they are known; `ended` says that it has ended its
    stream without VM description, where it may; `opaque` is why what passes is read no more, empty while it is;
    `advised` that the source has postcopy-ram on, `postcopy` that the guest's state goes, while some of its memory
    stays behind, and `followed` are the bytes that have passed since; `passed` that the source's stream has come to its
    end, and the destination has been sent all of it.
    """

    def __init__(self, changed: threading.Condition, plan: Plan) -> None:
        self.machine = ""
        self.return_path = False
        self.begun = False
        self.sync_points = 0
        self.blocks: Sequence[Block] = ()
        self.zero_pages = 0
        self.ended = False
        self.passed = False
        self.opaque = ""
        self.advised = False
        self.postcopy = False
        self.followed = 0
        self._changed = changed
        self._observers = plan.observers
        self._drop_switchover_start = plan.drop_switchover_start
        self._parser = Parser(plan.page_size, passes=True)
        self._answers = ReturnPathParser()
        # What has not passed yet, and from where in the stream on.
        self._held = bytearray()
        self._held_from = 0

    @property
    def memory_bytes(self) -> int:
        """All RAM blocks' lengths together."""
        return sum(block.used_length for block in self.blocks)

    @property
    def page_size(self) -> int:
        """Right once it is `begun`."""
        return self._parser.page_size

    @property
    def complete(self) -> bool:
        """Whether the source's stream has come to its end."""
        return self._parser.complete

    def pass_on(
        self,
        head: bytes,
        source: SocketConnection,
        destination: SocketConnection,
        on_event: Callable[[Event], None],
        on_complete: Callable[[], None],
    ) -> None:
        """From the source to the destination, until the source ends; `head` is what has been read of it.

        `on_event` sees each event before it has passed, so that a sync point can be held; `on_complete` is called
        before the last byte passes, without which the destination cannot go on, or, where nothing tells that byte,
        before its end does.

        Raises PeerError for what is no migration, Ended where it is not complete, Lost where the destination has gone,
        and what the callbacks raise.
        """
        warn_exposed(source)
        warn_exposed(destination)
        data = head
        complete = False
        while data:
            with self._changed:
                self.passed = False
            self._observers.main(IN, data)
            for passed in self._read_along(data, on_event):
                if passed:
                    self._observers.main(OUT, passed)
                    destination.write([passed])
                if self.complete and not complete:
                    complete = True
                    on_complete()
            with self._changed:
                self.passed = self.complete
                self._changed.notify_all()
            data = source.read_some(MAIN_READ)
        if not self.complete:  # though it looked so in between
            self._end()
            with self._changed:  # before it is complete: the destination may close at once
                self.ended = True
                self._changed.notify_all()
            on_complete()

    def _end(self) -> None:
        """The source has ended without VM description.  Raises Ended unless it may.

        One that waits for an answer has not ended well; another's device state may have none (suppress-vmdesc=on).
        """
        try:
            self._parser.end(description_required=self.return_path)
        except PeerError as error:
            raise Ended(f"main channel: {error}") from error

    def pass_back(
        self,
        destination: Connection,
        source: Connection,
        on_run: Callable[[], None],
        on_shut: Callable[[int], None],
    ) -> None:
        """The destination's answers, until it closes.

        Before each passes, `on_run` is told of a guest that goes on there without all of its memory (postcopy), and
        `on_shut` of the last word: 0 is good.

        Raises Lost where the source has gone.
        """
        runs = told = False
        while data := destination.read_some(4096):
            self._answers.feed(data)
            if self._answers.runs and not runs:
                runs = True
                on_run()
            if self._answers.shut is not None and not told:
                told = True
                on_shut(self._answers.shut)
            source.write([data])
            self._observers.main(BACK, data)

    def _read_along(self, data: bytes, on_event: Callable[[Event], None]) -> Iterator[bytes]:
        """What passes, piece by piece: the last byte of a sync point, and of the stream, is a piece's first.

        So a piece may be empty.
        """
        self._parser.feed(data)
        self._held += data
        try:
            for event in self._parser.events():
                position = self._parser.position
                drop = isinstance(event, CommandReceived) and event.number == Command.SWITCHOVER_START
                if isinstance(event, SyncPoint) or self.complete:
                    yield self._held_until(position - 1)
                elif drop and self._drop_switchover_start:
                    yield self._held_until(position - COMMAND_SIZE)
                    del self._held[:COMMAND_SIZE]
                    self._held_from = position
                self._note(event)
                on_event(event)
        except MultifdError as error:
            raise error.at("main channel") from error
        # A command that has not wholly come waits, so that it is never half-way out.
        end = self._held_from + len(self._held)
        yield self._held_until(self._parser.settled if self._drop_switchover_start else end)

    def _held_until(self, position: int) -> bytes:
        count = max(0, position - self._held_from)
        passed = bytes(self._held[:count])
        del self._held[:count]
        self._held_from += count
        return passed

    def _note(self, event: Event) -> None:
        with self._changed:
            match event:
                case Configuration(machine=machine):
                    self.machine = machine
                case CommandReceived(number=Command.OPEN_RETURN_PATH):
                    self.return_path = True
                case CommandReceived(number=Command.POSTCOPY_ADVISE, data=data):
                    self.advised = bool(data)
                case SyncPoint():
                    self.sync_points += 1
                case ZeroPages(offsets=offsets):
                    self.zero_pages += len(offsets)
                case BlockList(blocks=blocks):
                    self.blocks = blocks
                    # A source sends no page before; now the page size is known.
                    self.begun = True
                    self._changed.notify_all()
                case DeviceState(data=data) if self.postcopy:
                    self.followed += len(data)
                case Opaque(why=why, postcopy=postcopy):
                    self.opaque = why
                    self.postcopy = postcopy
                    self.begun = True
                    self._changed.notify_all()
