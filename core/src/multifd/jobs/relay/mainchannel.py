"""The main channel on its way through the relay: untouched in both directions, and read along."""

from __future__ import annotations

import threading
from collections.abc import Callable

from multifd.errors import MultifdError, PeerError
from multifd.net.connection import MAIN_READ, Connection, Ended
from multifd.net.security import warn_exposed
from multifd.net.socket import SocketConnection
from multifd.observe.hooks import BACK, IN, OUT
from multifd.observe.observers import Observers
from multifd.wire.events import BlockList, CommandReceived, Configuration, Event, SyncPoint
from multifd.wire.flags import Command
from multifd.wire.layout import COMMAND_HEAD
from multifd.wire.mainchannel import Parser
from multifd.wire.packet import Buffer
from multifd.wire.returnpath import ReturnPathParser

#: A command without data: section type, number, length.
COMMAND_SIZE = 1 + COMMAND_HEAD.size


class MainChannel:
    """What passed on it so far; one thread passes on, another passes back, and all of it is guarded by `changed`.

    `return_path` says that the destination is to answer; `sync_points` are those that the source has sent; `ended` that
    it has ended its stream without VM description, where it may.
    """

    def __init__(self, changed: threading.Condition, observers: Observers, *, drop_switchover_start: bool) -> None:
        self.machine = ""
        self.return_path = False
        self.blocks_known = False
        self.sync_points = 0
        self.ended = False
        self._changed = changed
        self._observers = observers
        self._drop_switchover_start = drop_switchover_start
        self._parser = Parser()
        self._answers = ReturnPathParser()
        # Where a command is to be dropped: what has not passed yet, and from where in the stream on.
        self._held = bytearray()
        self._held_from = 0

    @property
    def page_size(self) -> int:
        """Right once the blocks are known."""
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

        `on_event` sees each event before it passes, `on_complete` is called before the last byte does, without which
        the destination cannot go on; where nothing tells that byte, before its end does.

        Raises PeerError for what is no migration, Ended where it is not complete, Lost where the destination has gone,
        and what the callbacks raise.
        """
        warn_exposed(source)
        warn_exposed(destination)
        data = head
        complete = False
        while data:
            self._observers.main(IN, data)
            passed = self._read_along(data, on_event)
            self._observers.main(OUT, passed)
            if self.complete and not complete:
                complete = True
                destination.write([passed[:-1]])
                on_complete()
                passed = passed[-1:]
            destination.write([passed])
            data = source.read_some(MAIN_READ)
        if not complete:
            self._end()
            on_complete()
            with self._changed:
                self.ended = True
                self._changed.notify_all()

    def _end(self) -> None:
        """The source has ended without VM description.  Raises Ended unless it may.

        One that waits for an answer has not ended well; another's device state may have none (suppress-vmdesc=on).
        """
        try:
            self._parser.end(description_required=self.return_path)
        except PeerError as error:
            raise Ended(f"main channel: {error}") from error

    def pass_back(self, destination: Connection, source: Connection, on_shut: Callable[[int], None]) -> None:
        """The destination's answers, until it closes; `on_shut` is told its last word before that passes: 0 is good.

        Raises Lost where the source has gone.
        """
        told = False
        while data := destination.read_some(4096):
            self._answers.feed(data)
            if self._answers.shut is not None and not told:
                told = True
                on_shut(self._answers.shut)
            source.write([data])
            self._observers.main(BACK, data)

    def _read_along(self, data: bytes, on_event: Callable[[Event], None]) -> Buffer:
        """What passes now."""
        self._parser.feed(data)
        cuts: list[int] = []
        try:
            for event in self._parser.events():
                self._note(event)
                on_event(event)
                if isinstance(event, CommandReceived) and event.number == Command.SWITCHOVER_START:
                    cuts.append(self._parser.position)
        except MultifdError as error:
            raise error.at("main channel") from error
        if not self._drop_switchover_start:
            return data
        # A command that has not wholly come waits, so that it is never half-way out.
        self._held += data
        start = self._held_from
        for end in cuts:
            del self._held[end - COMMAND_SIZE - start : end - start]
            start += COMMAND_SIZE
        self._held_from = self._parser.settled
        count = self._held_from - start
        passed = bytes(self._held[:count])
        del self._held[:count]
        return passed

    def _note(self, event: Event) -> None:
        with self._changed:
            match event:
                case Configuration(machine=machine):
                    self.machine = machine
                case CommandReceived(number=Command.OPEN_RETURN_PATH):
                    self.return_path = True
                case SyncPoint():
                    self.sync_points += 1
                case BlockList():
                    # A source sends no page before; now the page size is known.
                    self.blocks_known = True
                    self._changed.notify_all()
