"""Who connects, until they have shown who they are: one thread meets them all.

A multifd channel shows its init packet; a main channel is provisional until its list of RAM blocks has come.  Those
wait in `channels` and `mains` for the job, which takes or dismisses them; everybody else is a stranger, told once by
kind and then counted, and neither ends nor holds a migration.
"""

from __future__ import annotations

import math
import selectors
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable

from multifd.crew import Crew
from multifd.errors import MultifdError, PeerError
from multifd.net import parting
from multifd.net.caller import NO_CHANNEL, Caller, cancelled, silent
from multifd.net.connection import Ended, Stalled
from multifd.net.deadline import Silence
from multifd.net.listener import Listener
from multifd.net.parting import Parting
from multifd.net.socket import SocketConnection
from multifd.net.strangers import Strangers, foreign
from multifd.net.wake import Wake
from multifd.wire.cursor import Unsupported
from multifd.wire.events import BlockList, Configuration, Opaque
from multifd.wire.flags import MULTIFD_MAGIC, VM_FILE_MAGIC
from multifd.wire.mainchannel import Parser
from multifd.wire.packet import INIT, MAGIC, InitPacket

#: So many may wait without having shown who they are.
MOST = 64
#: And so many multifd channels of one migration (QEMU's multifd-channels).
MOST_CHANNELS = 255
#: Seconds after which one that has said nothing goes, where somebody else wants the place.
SILENT = 2.0
#: Bytes that a main channel may take until its RAM blocks are listed (QEMU's lists are some KiB).
MOST_HEAD = 256 * 1024
READ = 16 * 1024
#: Seconds until somebody who could not be met is tried again.
AGAIN = 0.1
#: Seconds after the end of a main channel in which its multifd channels end as well, where they do.
TOGETHER = 1.0


class Door:
    """Meets those who connect to a listener, which is its own from now on."""

    def __init__(
        self, listener: Listener, timeout: float, crew: Crew, page_size: int | None = None, *, passes: bool = False
    ) -> None:
        """Who has not shown who they are `timeout` seconds after they came goes, whatever trickles.

        `page_size` and `passes` are as for `Parser`.
        """
        self._listener = listener
        self._timeout = timeout
        self._silence = Silence(timeout)  # of whom nobody waits for yet
        self._crew = crew
        self._page_size = page_size
        self._passes = passes
        self._selector = selectors.DefaultSelector()
        self._wake = Wake()
        self._parting = Parting()
        #: How many have connected.
        self.came = 0
        self._strangers = Strangers()
        self._thread: threading.Thread | None = None
        self._accept_from = 0.0
        self._unknown: list[Caller] = []
        #: Whoever ended and may have been the main channel of a source that is cancelled in its set-up.
        self._ended: list[Caller] = []
        # Guarded by the crew's lock:
        self.mains: list[Caller] = []
        self.channels: list[Caller] = []
        #: Whether a migration is under way that they do not belong to.
        self.busy = False
        self._closed = False

    @property
    def begun(self) -> bool:
        """Whether somebody has begun a main channel."""
        return bool(self.mains) or any(caller.parser is not None for caller in list(self._unknown))

    def take(self, callers: Collection[Caller]) -> None:
        """These are of the job's migration: their connections are its own."""
        with self._crew.changed:
            for waiting in (self.mains, self.channels):
                waiting[:] = [caller for caller in waiting if caller not in callers]

    def dismiss(self, caller: Caller, why: str) -> None:
        """This one, who waits in `mains` or `channels`, is of no migration here."""
        with self._crew.changed:
            if caller in self.mains or caller in self.channels:
                self.take([caller])
                self._turn_away(caller, why)

    def next_main(self, after: int) -> float:
        """The number of the first who came after another one and is, or may become, a main channel; else infinity."""
        with self._crew.changed:
            unknown = [caller for caller in self._unknown if caller.may_be_main]
            numbers = [caller.number for caller in (*self.mains, *self._ended, *unknown)]
        return min((number for number in numbers if number > after), default=math.inf)

    def see_off(self, connections: Iterable[SocketConnection]) -> None:
        """Multifd channels of a migration that failed, whose main channel has been reset."""
        with self._crew.changed:
            if self._closed:
                for connection in connections:
                    connection.close()
                return
            self._parting.add(connections)
            self._wake.set()

    @property
    def parting(self) -> bool:
        """Whether some of them have not been closed by their source."""
        return bool(self._parting)

    def close(self) -> None:
        """Nobody else is met, and who waits is let go; from any thread, and twice."""
        with self._crew.changed:
            if not self._closed:
                self._closed = True
                self._wake.set()

    def begin(self) -> None:
        """Meet them, in a thread of the crew's, until `close`.  Raises Cancelled, HostError; it is closed then."""
        try:
            self._thread = self._crew.spawn("door", self._run)
        except BaseException:
            self._leave()
            raise

    def join(self, seconds: float) -> None:
        """Once it is closed: wait until all are let go, so long at most."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._selector.register(self._parting, selectors.EVENT_READ)
        listening = False
        try:
            while not self._closed:
                now = time.monotonic()
                if listening != self._has_room(now):
                    listening = not listening
                    if listening:
                        self._selector.register(self._listener, selectors.EVENT_READ)
                    else:
                        self._selector.unregister(self._listener)
                for key, _ in self._selector.select(self._next_look(now)):
                    if isinstance(key.data, Caller):
                        self._hear(key.data)
                    elif key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj is self._wake:
                        self._wake.clear()
                self._end_waits(time.monotonic())
                self._match(time.monotonic())
                self._part()
                self._strangers.tell()
        finally:
            self._leave()

    def _part(self) -> None:
        if self._parting:
            self._parting.step()
            if not self._parting:
                with self._crew.changed:
                    self._crew.changed.notify_all()

    def _leave(self) -> None:
        self._listener.close()
        self._selector.close()
        with self._crew.changed:
            self._closed = True
            self._wake.close()
            mains = [*self.mains, *(caller for caller in self._unknown if caller.parser is not None)]
            channels = list(self.channels)
            self.mains.clear()
            self.channels.clear()
        for caller in mains:
            caller.connection.abort()
        held = bool(mains or self._parting)  # or these are a stranger's
        self._parting.add(caller.connection for caller in channels)
        if held:
            self._parting.wait(self._crew.left / 2 if self._crew.over else parting.MOST)
        self._parting.close()
        for caller in (*self._unknown, *self._ended):
            caller.connection.close()
        self._strangers.tell_all()

    def _next_look(self, now: float) -> float | None:
        """Seconds until there is something to do though nobody has said anything; None for ever."""
        with self._crew.changed:
            waiting = [*self._unknown, *(() if self.mains else self.channels)]
        ends = [self._end_of(caller) for caller in waiting]
        if self._accept_from > now:
            ends.append(self._accept_from)
        if len(waiting) > len(self._unknown):
            ends.append(now + SILENT)  # whether a channel has gone nothing tells
        if self._parting:
            ends.append(now + parting.MOST / 4)
        if self._ended:
            ends.append(now + TOGETHER / 20)
        if len(self._unknown) >= MOST and (oldest := self._oldest()) is not None and oldest.came + SILENT > now:
            ends.append(oldest.came + SILENT)  # until then it does not listen
        return max(0.0, min(ends) - now) if ends else None

    def _end_of(self, caller: Caller) -> float:
        """Until when they may wait (monotonic)."""
        gone = caller.init is not NO_CHANNEL and caller.connection.hung_up()
        return caller.came + (min(SILENT, self._timeout) if gone else self._timeout)

    def _has_room(self, now: float) -> bool:
        """Whether another one may be met now."""
        return now >= self._accept_from and (len(self._unknown) < MOST or self._idle(now) is not None)

    def _oldest(self) -> Caller | None:
        """Who goes first: the oldest of the host that has most who are silent."""
        with self._crew.changed:
            idle = silent(self._unknown, self.channels)
        hosts = Counter(caller.host for caller in idle)
        return max(idle, key=lambda caller: hosts[caller.host], default=None)

    def _idle(self, now: float) -> Caller | None:
        """Whose place another one may have."""
        oldest = self._oldest()
        return oldest if oldest is not None and now - oldest.came >= SILENT else None

    def _accept(self) -> None:
        if len(self._unknown) >= MOST and (idle := self._idle(time.monotonic())) is not None:
            self._forget(idle)
            self._turn_away(idle, f"said nothing for {SILENT:g} s: is it a migration?")
        connection = self._listener.accept(self._silence)
        if connection is None:
            self._accept_from = time.monotonic() + AGAIN
            return
        self.came += 1
        caller = Caller(connection, self.came)
        self._unknown.append(caller)
        self._selector.register(connection, selectors.EVENT_READ, caller)
        self._hear(caller)

    def _end_waits(self, now: float) -> None:
        """Of those who have had their time."""
        for caller in [caller for caller in self._unknown if now - caller.came >= self._timeout]:
            text = f"sent {len(caller.data)} bytes and then nothing for {self._timeout:g} s (--timeout)"
            if caller.parser is not None:
                self._fail(caller, Stalled(text))
            else:
                self._forget(caller)
                self._turn_away(caller, f"{text}: is it a migration?")
        with self._crew.changed:
            if not self.mains:  # where one is here, it is the job that waits
                for caller in [caller for caller in self.channels if now >= self._end_of(caller)]:
                    self.dismiss(caller, "is a channel of a migration whose main channel is not here")

    def _hear(self, caller: Caller) -> None:
        """What they have said meanwhile."""
        try:
            while caller in self._unknown:
                # No byte behind a channel's init packet.
                limit = READ if caller.parser is not None else INIT.size - len(caller.data)
                data = caller.connection.take(limit)
                if data is None:
                    return
                caller.data += data
                if not data:
                    self._end(caller)
                elif caller.parser is not None:
                    self._follow(caller, data)
                else:
                    self._identify(caller)
        except MultifdError as error:
            if caller.parser is not None and isinstance(error, PeerError):
                self._fail(caller, error)
            else:
                self._forget(caller)
                self._turn_away(caller, str(error).removeprefix(caller.connection.name))

    def _identify(self, caller: Caller) -> None:
        """Raises PeerError for what is no beginning of a connection."""
        if len(caller.data) < MAGIC.size:
            return
        (magic,) = MAGIC.unpack_from(caller.data)
        if magic == VM_FILE_MAGIC:
            caller.parser = Parser(self._page_size, passes=self._passes)
            self._follow(caller, bytes(caller.data))
        elif magic != MULTIFD_MAGIC:
            raise PeerError(foreign(caller.data))
        elif len(caller.data) == INIT.size:
            try:
                caller.init = InitPacket.unpack(caller.data)
            except PeerError as error:
                raise PeerError(f"begins a multifd channel that this side does not know: {error}") from error
            self._known(caller, self.channels)

    def _follow(self, caller: Caller, data: bytes) -> None:
        """A main channel to its list of RAM blocks.  Raises PeerError for what is no migration."""
        assert caller.parser is not None
        caller.parser.feed(data)
        for event in caller.parser.events():
            if isinstance(event, Configuration):
                caller.configuration = event
            elif isinstance(event, BlockList | Opaque):
                self._known(caller, self.mains)
                return
        if len(caller.data) > MOST_HEAD:
            self._forget(caller)
            self._turn_away(caller, f"began a main channel without a list of RAM blocks in {MOST_HEAD} bytes")

    def _end(self, caller: Caller) -> None:
        """They have closed."""
        count = len(caller.data)
        if caller.parser is not None:
            self._fail(caller, Ended(f"the stream ended at byte {count}, before its RAM blocks were listed"))
        elif count:
            self._forget(caller)
            self._turn_away(caller, f"ended after {count} bytes: is it a migration?")
        else:
            self._fail(caller, Ended("the source ended it before its first byte"))

    def _fail(self, caller: Caller, failure: PeerError) -> None:
        """A main channel that does not list its blocks: a migration that failed, unless it may be a stranger's."""
        others = [other for other in self._unknown if other is not caller and (not other.data or other.parser)]
        with self._crew.changed:
            alone = not self.mains and not self.busy
        known = isinstance(failure, Unsupported) or (caller.configuration is not None and not others)
        caller.failure = failure
        if alone and known:
            self._known(caller, self.mains)
            return
        with self._crew.changed:
            self._forget(caller)
            if isinstance(failure, Ended) and len(self._ended) < MOST:
                caller.ended = time.monotonic()
                self._ended.append(caller)
            else:
                self._turn_away(caller, caller.how_failed)

    def _match(self, now: float) -> None:
        """Who comes and goes alone is a stranger.  Of a source that was cancelled its destination has to hear."""
        if not self._ended:
            return
        with self._crew.changed:
            gone = {channel for channel in self.channels if channel.connection.hung_up()}
            for caller in list(self._ended):
                if not (self.mains or self.busy) and cancelled(caller, self.channels, gone):
                    self._ended.remove(caller)
                    self.mains.append(caller)
                    self._crew.changed.notify_all()
                elif now - caller.ended > TOGETHER:
                    self._ended.remove(caller)
                    self._turn_away(caller, caller.how_failed)

    def _known(self, caller: Caller, where: list[Caller]) -> None:
        """It waits for the job now."""
        with self._crew.changed:  # at no time is it in neither
            self._forget(caller)
            where.append(caller)
            if len(self.channels) > MOST:
                self._thin_out()
            self._crew.changed.notify_all()

    def _thin_out(self) -> None:
        """Too many channels wait: the oldest one goes of the VM with fewest, unless all are of one."""
        sizes = Counter(channel.init.uuid for channel in self.channels)
        least = min(self.channels, key=lambda channel: sizes[channel.init.uuid])
        if len(sizes) > 1 or len(self.channels) > MOST_CHANNELS:
            self.take([least])
            least.connection.close()
            self._note(least, "is a channel of a migration whose main channel is not here")

    def _forget(self, caller: Caller) -> None:
        self._unknown.remove(caller)
        self._selector.unregister(caller.connection)

    def _turn_away(self, caller: Caller, why: str) -> None:
        if caller.init is not NO_CHANNEL:
            self.see_off([caller.connection])
        elif caller.parser is not None:
            caller.connection.abort()
        else:
            caller.connection.close()
        self._note(caller, why)

    def _note(self, caller: Caller, why: str) -> None:
        with self._crew.changed:
            if self._strangers.note(caller.connection.name, why) and not self._closed:
                self._wake.set()
