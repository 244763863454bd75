"""One migration on its way through the relay: who belongs to it, the threads that serve it, and how it ends."""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from uuid import UUID

from multifd.effort.controller import Effort
from multifd.engine.headers import identify
from multifd.errors import HostError, MultifdError, PeerError, counted, describe
from multifd.jobs.relay.channel import Channel
from multifd.jobs.relay.counters import Sample
from multifd.jobs.relay.mainchannel import MainChannel
from multifd.jobs.relay.plan import Plan
from multifd.net.connect import connect
from multifd.net.connection import Lost
from multifd.net.deadline import Silence
from multifd.net.socket import SocketConnection
from multifd.observe.hooks import IN, OUT
from multifd.wire.counts import Counts
from multifd.wire.events import Event, PageData, SyncPoint
from multifd.wire.flags import method_name
from multifd.wire.packet import InitPacket

#: Seconds that a multifd channel waits for its main channel, which QEMU connects first.
MAIN_WAIT = 10.0
#: What the machine may be short of (descriptors, memory, threads): it ends a migration, and the relay goes on.
SHORTAGES = (OSError, MemoryError, RuntimeError)
INCOMPLETE = "the source ended before its migration was complete: was it cancelled?"


@dataclass(frozen=True, slots=True)
class Relayed:
    """What one migration through the relay came to.

    Bytes are those of all connections, from source to destination; `confirmed` says that the
    destination answered that it has everything, None where the source asked for no answer.
    """

    seconds: float
    bytes_in: int
    bytes_out: int
    packets: int
    normal_pages: int
    zero_pages: int
    channels: int
    source: str
    destination: str
    confirmed: bool | None
    statistics: dict[str, int]


class _Foreign(PeerError):
    """A connection that is not of the migration at hand."""


class Migration:
    """The connections of one migration, and the threads that serve them."""

    def __init__(self, plan: Plan, silence: Silence) -> None:
        self.error: BaseException | None = None
        self._plan = plan
        self._effort = Effort(plan.to) if plan.to is not None else None
        self._silence = silence
        self._started = time.monotonic()
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._main = MainChannel(self._changed, plan.observers, drop_switchover_start=plan.drop_switchover_start)
        self._connections: list[SocketConnection] = []
        self._threads: list[threading.Thread] = []
        self._source: SocketConnection | None = None
        self._destination: SocketConnection | None = None
        self._ids: set[int] = set()
        self._channels: dict[int, Channel] = {}
        self._uuid: bytes | None = None
        self._over = False
        self._observed = ExitStack()
        self._observed.enter_context(plan.observers.migration(IN, OUT))

    def take(self, connection: SocketConnection) -> bool:
        """A connection from the source; False where this migration is over."""
        with self._changed:
            if self._over:
                return False
            self._connections.append(connection)
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self._spawn(lambda: self._serve(connection))
            return True

    def join(self) -> Relayed:
        """Wait for the end.  Raises the first error of any thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._over)
            for connection in self._connections:
                connection.interrupt()
        for thread in self._threads:  # the last ones may still start another
            thread.join()
        try:
            with self._observed:
                if self.error is not None:
                    raise self.error
                return self._result()
        except BaseException:
            for connection in self._connections:
                connection.reset()
            raise
        finally:
            for connection in self._connections:
                connection.close()

    def stop(self) -> None:
        """End it, wherever it is."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _spawn(self, action: Callable[[], None]) -> None:
        def run() -> None:
            try:
                action()
            except BaseException as error:  # noqa: BLE001 - join() raises it
                self._fail(error)

        thread = threading.Thread(target=run, name="multifd-relay", daemon=True)
        with self._changed:  # take() drops those that are not alive, join() waits for the others
            try:
                thread.start()
            except RuntimeError as error:  # there may be no more threads
                self._fail(error)
            else:
                self._threads.append(thread)

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, SHORTAGES):
            short = HostError(describe(error))
            short.__cause__ = error
            error = short
        with self._changed:
            if not self._over and self.error is None:
                self.error = error
            self._over = True
            self._changed.notify_all()

    # --- who is who ---

    def _serve(self, connection: SocketConnection) -> None:
        """In a thread of its own, from the first byte to the last."""
        try:
            init = identify(connection, self._silence.timeout)
        except PeerError as error:  # whoever that is, a migration under way has nothing to do with it
            self._ignore(connection, error)
            return
        try:
            if init is None:
                self._begin(connection)
            else:
                self._register(connection, init)
                self._await_blocks(connection, init)
        except _Foreign as error:
            self._ignore(connection, error)
            return
        if init is None:
            self._relay_main(connection)
        else:
            self._relay_channel(connection, init)

    def _ignore(self, connection: SocketConnection, why: PeerError) -> None:
        warnings.warn(f"{why}: ignored", RuntimeWarning, stacklevel=2)
        with self._changed:
            if not self._over:  # join() closes them from then on
                self._connections.remove(connection)
                connection.close()

    def _begin(self, connection: SocketConnection) -> None:
        with self._changed:
            if self._source is not None:
                raise _Foreign(f"{connection.name} is a second main channel, the relay serves one migration at a time")
            self._source = connection
            self._started = time.monotonic()

    def _register(self, connection: SocketConnection, init: InitPacket) -> None:
        with self._changed:
            if self._uuid not in (None, init.uuid) or init.id in self._ids:
                raise _Foreign(
                    f"{connection.name} is channel {init.id} of VM {init.uuid.hex()}, which is not the migration that "
                    "the relay serves"
                )
            if self._plan.channels is not None and init.id >= self._plan.channels:
                raise PeerError(
                    f"channel {init.id}: the source uses at least {init.id + 1} channels, --channels says "
                    f"{self._plan.channels}"
                )
            self._uuid = init.uuid
            self._ids.add(init.id)

    def _await_blocks(self, connection: SocketConnection, init: InitPacket) -> None:
        """Wait for the page size.  Raises _Foreign for what an earlier migration left behind."""
        deadline = time.monotonic() + MAIN_WAIT
        with self._changed:
            while not self._changed.wait_for(lambda: self._main.blocks_known or self._over, 0.2):
                if self._source is None and (connection.hung_up() or time.monotonic() > deadline):
                    self._ids.remove(init.id)
                    if not self._ids:
                        self._uuid = None
                    raise _Foreign(
                        f"{connection.name} is channel {init.id} of a migration whose main channel is not here"
                    )

    def _connect(self) -> SocketConnection:
        connection = connect(self._plan.target, self._silence, wrap=self._plan.wrap)
        with self._changed:
            self._connections.append(connection)
            over = self._over
        if over:
            connection.interrupt()
        return connection

    # --- what passes ---

    def _relay_main(self, source: SocketConnection) -> None:
        destination = self._destination = self._connect()
        self._spawn(lambda: self._pass_back(destination, source))
        try:
            self._main.pass_on(source, destination, self._note)
        except Lost as lost:
            raise self._gone() from lost

    def _note(self, event: Event) -> None:
        match event:
            case PageData() if not self._ids:
                raise PeerError("the source sends its pages here: turn multifd on over there")
            case SyncPoint():
                with self._changed:
                    self._check_syncs()

    def _pass_back(self, destination: SocketConnection, source: SocketConnection) -> None:
        try:
            self._main.pass_back(destination, source)
        except Lost as lost:
            raise PeerError(INCOMPLETE) from lost
        if self._main.source_is_well and not self._main.complete:
            raise self._gone()
        self.stop()

    def _relay_channel(self, connection: SocketConnection, init: InitPacket) -> None:
        with self._changed:
            if self._over:
                return
        try:
            channel = Channel(init, connection, self._connect(), self._main.page_size, self._plan, self._effort)
        except HostError as error:  # it took the main channel, so it has gone since
            raise self._gone(f"channel {init.id}: ") from error
        with self._changed:
            self._channels[init.id] = channel
        try:
            channel.run()
            with self._changed:
                channel.ended = True
                self._check_syncs()
        except Lost as lost:
            raise self._gone(f"channel {init.id}: ") if self._main.source_is_well else PeerError(INCOMPLETE) from lost
        except MultifdError as error:
            raise error.at(f"channel {init.id}") from error
        finally:
            channel.close()

    def _check_syncs(self) -> None:
        """A channel that ended early would hang the destination: it waits for its SYNC for ever.  Locked."""
        for channel in self._channels.values():
            if channel.ended and channel.syncs < self._main.sync_points:
                raise PeerError(
                    f"channel {channel.id}: the source closed it before SYNC {channel.syncs + 1}: did it fail?"
                )

    # --- how it ends ---

    def _gone(self, where: str = "") -> PeerError:
        """The destination has closed: QEMU does not say why on the wire, so here is what it was shown."""
        shown = [f"machine {self._main.machine}"] if self._main.machine else []
        with self._changed:
            uuid = self._plan.uuid or self._uuid
            methods = set().union(*(channel.methods for channel in self._channels.values()))
            channels = len(self._ids)
        if self._plan.to is not None:
            methods = self._plan.to.flags
        if uuid is not None:
            shown.append(f"VM uuid {UUID(bytes=uuid)}")
        if methods:
            shown.append(f"method {'+'.join(map(method_name, sorted(methods)))}")
        if channels:
            shown.append(f"multifd with {counted(channels, 'channel')}")
        fit = f"; it has to have {', '.join(shown)} (multifd doctor compares)" if shown else ""
        return PeerError(f"{where}the destination closed the connection: its own message says why{fit}")

    def counters(self) -> dict[Sample, float]:
        """What went through so far; the main channel has no method."""
        found: dict[Sample, float] = {}
        with self._changed:
            channels = list(self._channels.values())
            source, destination = self._source, self._destination
        to = self._plan.to.method if self._plan.to is not None else None
        for channel in channels:
            found |= channel.counters(to)
        if source is not None:
            found[Sample("bytes", (("direction", "in"), ("channel", "main")))] = source.bytes_read
        if destination is not None:
            found[Sample("bytes", (("direction", "out"), ("channel", "main")))] = destination.bytes_written
        return found

    def _result(self) -> Relayed:
        main = self._main
        if not main.complete:
            raise PeerError(INCOMPLETE)
        if main.shut:
            raise PeerError(f"the destination reports that it failed (code {main.shut})")
        if main.return_path and main.shut is None:
            raise self._gone()
        channels = list(self._channels.values())
        for channel in channels:
            if channel.syncs < main.sync_points:
                raise self._gone(f"channel {channel.id}: {channel.syncs} of {main.sync_points} SYNCs came, then ")
        assert self._source is not None
        assert self._destination is not None
        counts = Counts.total(channel.counts for channel in channels)
        statistics = Counter(self._effort.used if self._effort is not None else {})
        for channel in channels:
            statistics.update(channel.statistics)
        came = "+".join(map(method_name, sorted(set().union(*(channel.methods for channel in channels))))) or "none"
        return Relayed(
            seconds=round(time.monotonic() - self._started, 6),
            bytes_in=self._source.bytes_read + sum(channel.source.bytes_read for channel in channels),
            bytes_out=self._destination.bytes_written + sum(channel.destination.bytes_written for channel in channels),
            packets=counts.packets,
            normal_pages=counts.normal_pages,
            zero_pages=counts.zero_pages,
            channels=len(channels),
            source=came,
            destination=self._plan.to.name if self._plan.to is not None else came,
            confirmed=main.shut == 0 if main.return_path else None,
            statistics=dict(statistics),
        )
