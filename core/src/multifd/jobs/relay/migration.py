"""One migration on its way through the relay: who belongs to it, the threads that serve it, and how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from uuid import UUID

from multifd.crew import Crew
from multifd.effort.controller import Effort
from multifd.errors import Cancelled, HostError, MultifdError, PeerError, shortage
from multifd.jobs.relay.channel import Channel
from multifd.jobs.relay.channels import Channels
from multifd.jobs.relay.counters import Sample
from multifd.jobs.relay.mainchannel import MainChannel
from multifd.jobs.relay.outcome import Relayed, counters, progress
from multifd.jobs.relay.passing import Passing
from multifd.jobs.relay.plan import Plan
from multifd.jobs.relay.recoding import Recoding
from multifd.jobs.relay.verdict import FINAL, SUCCESSES, Saw, State, after, fitting, in_postcopy, seen, told
from multifd.jobs.report import EVERY, OnProgress
from multifd.jobs.verdict import LAST_WORD
from multifd.log import log
from multifd.net.caller import Caller, likeliest, likeliest_vm
from multifd.net.connect import connect
from multifd.net.connection import Ended, Lost
from multifd.net.deadline import FOREVER, LETTING_GO, Silence
from multifd.net.socket import SocketConnection, await_closing
from multifd.net.wake import Wake
from multifd.observe.hooks import IN, OUT
from multifd.wire.events import BlockList, Event, Opaque, PageData, RamEnd, SyncPoint
from multifd.wire.packet import InitPacket

GONE = "the destination closed the connection"


class Migration:
    """The connections of one migration, and the threads that serve them."""

    def __init__(self, plan: Plan, main: Caller, changed: threading.Condition) -> None:
        """`main` has come to its list of RAM blocks, or failed before; `changed` is told of each change."""
        self._plan = plan
        self._effort = Effort(plan.to) if plan.to is not None else None
        self._silence = Silence(plan.timeout)
        self._caller = main
        self._source = main.connection
        self._started = time.monotonic()
        self._main_complete = Wake()
        self._changed = changed
        self.crew = Crew(changed)
        self.crew.about = self.about
        self.crew.on_end(self._silence.cancel)
        # Guarded by the condition:
        self._state = State.WAITING
        self._error: BaseException | None = None
        self._stopped = False
        self._answered = False
        self._runs_there = False
        self._main = MainChannel(changed, plan)
        self._connections: list[SocketConnection] = []
        self._onward: list[SocketConnection] = []
        self._destination: SocketConnection | None = None
        self._channels = Channels(changed, plan.channels, self._silence)
        self._serving = 0
        if main.configuration is not None:
            self._channels.uuid = main.configuration.uuid
        self._observed = ExitStack()
        self._observed.enter_context(plan.observers.migration(IN, OUT))
        self._welcome(self._source)

    @property
    def over(self) -> bool:
        """Whether it has ended, or was told to."""
        return self._stopped or self._state in FINAL

    def about(self) -> dict[str, str]:
        """Which one it is, for `multifd.log`."""
        uuid = "" if self._channels.uuid is None else str(UUID(bytes=self._channels.uuid))
        return {"uuid": uuid, "source": self._source.address, "destination": str(self._plan.target)}

    @property
    def ended_early(self) -> bool:
        """Whether its source has ended it.  Its channels go on: a QEMU (10.0) waits for the last of them."""
        return self._state is State.ENDED_EARLY

    @property
    def source_left(self) -> bool:
        """Whether its source has closed its main channel: whoever comes now is the next migration's."""
        return self._source.fileno() < 0 or self._source.hung_up()

    @property
    def incomplete(self) -> bool:
        """Whether its source has ended it, and some of its channels may not have been met: they come before a SYNC."""
        return self.ended_early and self._main.sync_points < 2

    @property
    def uuid(self) -> bytes | None:
        """The VM's, where it is known; 16 bytes."""
        return self._channels.uuid

    @property
    def number(self) -> int:
        """Its main channel's, among those who came."""
        return self._caller.number

    def group(self, channels: Sequence[Caller]) -> list[Caller]:
        """Which of those who wait may be its own, the likeliest first; all, where its VM is known."""
        if self._channels.uuid is None:
            return likeliest_vm(self._caller, channels, time.monotonic() - self._started)
        return likeliest(self._caller, channels)

    def begin(self, on_progress: OnProgress | None) -> None:
        """Serve its main channel; `on_progress` is told from time to time how far it is."""
        if on_progress is not None:
            self._spawn("progress", lambda: self._tell(on_progress))
        self._spawn("main channel", self._relay_main)

    def _tell(self, on_progress: OnProgress) -> None:
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self.over or self.crew.over, EVERY):
                    return
            channels = list(self._channels.running.values())
            on_progress(progress(time.monotonic() - self._started, self._main, self._destination, channels))

    def take(self, channel: Caller) -> bool:
        """One of its channels; False where it is none of them."""
        connection, init = channel.connection, channel.init
        with self._changed:
            try:
                if not self._channels.register(init):
                    return False
            except PeerError as error:
                self._fail(error)
            self._welcome(connection)
            self._serving += 1
            self._spawn(f"channel {init.id}", lambda: self._serve_channel(connection, init))
            return True

    def join(self) -> Relayed:
        """Wait for the end.  Raises how it came where it is no success, Cancelled where it was stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self.over)
            if self._state is State.PASSED_ON:
                # It was stopped, and the destination has all of it: if it says so, the source has to hear that, or
                # there are two guests.
                self._changed.wait_for(lambda: self._state in FINAL, LAST_WORD)
            stopped = self._state not in FINAL
        self._let_go()
        if stopped:
            self.crew.cancel()
        elif self._error is not None:
            self.crew.fail(self._error)
        self.crew.join()
        try:
            with self._observed:
                if stopped:
                    raise Cancelled("the relay was stopped")
                if self._state not in SUCCESSES:
                    raise self._told()
                return self._result()
        except BaseException:
            for connection in self._onward if not self.ended_early else ():
                connection.reset()
            raise
        finally:
            for connection in (*self._onward, *(self._connections if self._state in SUCCESSES else ())):
                connection.close()
            self._main_complete.close()

    @property
    def left(self) -> list[SocketConnection]:
        """After `join`: its source's channels, to be let go where it failed."""
        return self._connections[1:]

    def stop(self) -> bool:
        """End it, unless its guest's memory is in two places (postcopy): False, and it ends by itself."""
        with self._changed:
            self._stopped = self._state in FINAL or not self._main.postcopy
            self._changed.notify_all()
            return self._stopped

    def _let_go(self) -> None:
        """A source that has its answer, or ended, closes first: taken from it, it would fail."""
        if self._state in SUCCESSES:
            await_closing(self._connections, LETTING_GO)
            return
        if self.ended_early:
            self._drain()
        self._source.abort()  # it first, and nothing else of the source's: see `net.parting`

    def _drain(self) -> None:
        """What a source sent before it ended goes on, and so do its channels, as they would without a relay."""
        deadline = time.monotonic() + LETTING_GO
        if self._destination is not None:
            self._destination.finish()
        with self._changed:
            self._changed.wait_for(lambda: not self._serving, LETTING_GO)
        await_closing(self._connections, max(0.0, deadline - time.monotonic()))

    def _spawn(self, name: str, action: Callable[[], None]) -> None:
        def run() -> None:
            try:
                action()
            except BaseException as error:  # noqa: BLE001 - join() raises it
                self._fail(error)

        try:
            self.crew.spawn(name, run)
        except MultifdError as error:  # there may be no more threads
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, Lost):
            with self._changed:  # what it says on its main channel is the cause
                self._changed.wait_for(lambda: self._answered or self.over, LAST_WORD)
        self._saw(seen(error), shortage(error))

    def _saw(self, saw: Saw, error: BaseException | None = None) -> None:
        """Where it ends with that, `error` is why."""
        with self._changed:
            if self._state not in FINAL:
                self._state = after(self._state, saw)
                self._error = error
                if self._state in FINAL - SUCCESSES - {State.ENDED_EARLY} and saw is not Saw.SAID_FAILED:
                    # At once: a small guest, paused, needs 20 ms to be through, and cannot be migrated then.
                    self._source.abort()
                self._changed.notify_all()

    def _welcome(self, connection: SocketConnection) -> None:
        connection.keep_to(self._silence)
        self._connections.append(connection)

    def _connect(self) -> SocketConnection:
        connection = connect(self._plan.target, self._silence, wrap=self._plan.wrap)
        with self._changed:
            self._onward.append(connection)
        self.crew.on_end(connection.interrupt)
        return connection

    def _relay_main(self) -> None:
        source = self._source
        failure = self._caller.failure
        if failure is not None and not isinstance(failure, Ended):
            raise failure.at("main channel")
        destination = self._destination = self._connect()
        self._spawn("return path", lambda: self._pass_back(destination, source))
        try:
            self._main.pass_on(bytes(self._caller.data), source, destination, self._note, self._account)
        except Lost as lost:
            raise Lost(GONE) from lost
        with self._changed:
            for connection in self._onward:
                # Nothing more comes; the destination closes in its turn, when done.  But QEMU 10.0 takes the end of a
                # multifd channel without TLS's goodbye for a failure, and may leave a goodbye unread.
                if connection is destination or (type(connection) is SocketConnection and not self._main.opaque):
                    connection.finish()
            self._silence.awaited = self._main.return_path  # its answer is late

    def _note(self, event: Event) -> None:
        match event:
            case BlockList():
                self._saw(Saw.BLOCKS)
            case PageData() if not self._channels.ids:
                raise PeerError("the source sends its pages here: turn multifd on over there")
            case SyncPoint():
                with self._changed:
                    self._channels.pass_sync(self._main, lambda: self.over)
                self._saw(Saw.SYNC)
            case RamEnd():
                self._saw(Saw.RAM_END)
            case Opaque(why=why):
                with self._changed:
                    if self._stopped:  # from here on `stop` would wait for its end
                        raise Cancelled("the relay was stopped")
                log.warning(f"main channel: {why}; what follows passes unread, and rounds are not checked")
                self._saw(Saw.OPAQUE)

    def _serve_channel(self, connection: SocketConnection, init: InitPacket) -> None:
        try:
            self._relay_channel(connection, init)
        finally:
            with self._changed:
                self._serving -= 1
                self._changed.notify_all()

    def _relay_channel(self, connection: SocketConnection, init: InitPacket) -> None:
        with self._changed:
            self.crew.wait_for(lambda: self._main.begun or self.over)  # now the page size is known
            if self.over and not self.ended_early:
                return
        channel: Channel
        size = self._main.page_size
        try:
            there = self._connect()
            if not self._main.begun:
                there.write([self._plan.onward(init).pack()])
                there.finish()
                return
            if self._effort is None:
                channel = Passing(init, connection, there, size, self._plan)
            else:
                channel = Recoding(init, connection, there, size, self._plan, self._effort)
        except HostError as error:  # it took the main channel, so it has gone since
            raise Lost(f"channel {init.id}: {GONE}") from error
        with self._changed:
            self._channels.running[init.id] = channel
        try:
            channel.run(self._main_complete, self._changed, partial(self._channels.judge_rounds, size))
            with self._changed:
                self._channels.sync_point(self._main.sync_points)
            if self._main.opaque and type(there) is SocketConnection:
                there.finish()  # else when the main channel is complete, and all of them accounted for
        except Lost as lost:
            raise Lost(f"channel {init.id}: {GONE}") from lost
        except MultifdError as error:
            raise error.at(f"channel {init.id}") from error
        finally:
            channel.close()

    def _account(self) -> None:
        """The main channel is complete: all else has to have passed, too.  Raises PeerError where it has not."""
        main, wake = self._main, self._main_complete
        if not main.opaque:
            with self._changed:
                self._channels.account(main.sync_points, main.page_size, wake.set, lambda: self.over)
        self._saw(Saw.ACCOUNTED)

    def _pass_back(self, destination: SocketConnection, source: SocketConnection) -> None:
        """Also finds out what the destination's end means."""
        try:
            self._main.pass_back(destination, source, self._run_there, self._shut)
        except Lost as lost:
            raise Ended("the source has gone") from lost
        finally:
            with self._changed:
                self._answered = True
                self._changed.notify_all()
        left = ""
        if self._state is State.SWITCHED_OVER and not self._main.return_path:
            with self._changed:  # without VM description it may be done before the source's end is seen
                self._changed.wait_for(lambda: self._main.ended or self.over, LAST_WORD)
        if self._main.ended:
            self._saw(Saw.SOURCE_ENDED, Ended("main channel: it ended without VM description"))
        elif self._state is State.PASSED_ON and not self._main.return_path:
            if self._channels.all_taken(self._main, self._onward):
                self._saw(Saw.DESTINATION_DONE)
            left = " before it had taken all that it was sent"
        self._saw(Saw.DESTINATION_CLOSED, Lost(f"{GONE}{left}"))

    def _run_there(self) -> None:
        """The guest goes on at the destination, and waits for its memory as long as it takes."""
        with self._changed:
            self._runs_there = True
            self._silence.timeout = FOREVER
            for connection in (*self._connections, *self._onward):
                connection.outlast()

    def _shut(self, code: int) -> None:
        """The destination has said its last word; here before it reaches the source, which then closes."""
        if code:
            self._saw(Saw.SAID_FAILED, PeerError(f"the destination reports that it failed (code {code})"))
            return
        if self._state is State.SWITCHED_OVER:  # its stream has no description, which would have ended it
            self._account()
        self._saw(Saw.SAID_DONE, PeerError("the destination says that it has everything, before it was sent"))

    def _told(self) -> BaseException:
        assert self._error is not None
        if isinstance(self._error, MultifdError):
            uuid = self._plan.uuid or self._channels.uuid
            methods = self._channels.methods if self._plan.to is None else self._plan.to.flags
            main, channels = self._main, len(self._channels.ids)
            shown = fitting(main.machine, uuid, methods, channels, main.blocks, postcopy=main.advised)
            error = told(self._state, self._error, shown, passed_on=self._main.ended)
            return in_postcopy(self._state, error, runs_there=self._runs_there) if self._main.postcopy else error
        return self._error

    def counters(self) -> dict[Sample, float]:
        """What went through so far."""
        with self._changed:
            channels = list(self._channels.running.values())
        to = self._plan.to.method if self._plan.to is not None else None
        return counters((self._source, self._destination), channels, to)

    def _result(self) -> Relayed:
        assert self._destination is not None
        return Relayed.of(
            time.monotonic() - self._started,
            (self._source, self._destination),
            list(self._channels.running.values()),
            self.about(),
            to=self._plan.to.name if self._plan.to is not None else None,
            used=self._effort.used if self._effort is not None else {},
            confirmed=self._state is State.CONFIRMED,
            rounds_checked=not self._main.opaque,
        )
