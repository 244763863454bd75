"""Stand between a source and a destination, and re-compress each packet on its way.

    from multifd.relay import Relay

    with Relay("tcp:0.0.0.0:4444", "tcp:there:4444", to="zstd") as relay:
        relay.serve(print)

The main channel passes through untouched in both directions, so it is the destination that
confirms.  Each multifd channel has a thread, which keeps the order of its packets; what is in
the relay at any time is one packet per channel.  The main channel is connected first: a QEMU
before 8.0 takes the first connection for it.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Self
from uuid import UUID

from multifd.effort import Choice, Effort
from multifd.errors import HostError, MultifdError, PeerError, UsageError, counted
from multifd.flags import MAX_PAYLOAD, METHODS, VM_FILE_MAGIC, Command, method_name
from multifd.migrate import DEFAULT_TIMEOUT, MAIN_READ, connecting_wrap, listening_wrap, warn_exposed
from multifd.observers import BACK, IN, OUT, Observers, Watch
from multifd.plugins import RESERVED, Spec, describe
from multifd.ram import ZEROS, packet_buffer, part, zero_indexes
from multifd.recv import Codecs, Decoder, identify, read_packet
from multifd.send import Encoder
from multifd.stream import (
    COMMAND_HEAD,
    BlockList,
    CommandReceived,
    Configuration,
    Event,
    PageData,
    Parser,
    ReturnPathParser,
    SyncPoint,
)
from multifd.transport import (
    Connection,
    Ended,
    Listener,
    Lost,
    Passage,
    Silence,
    SocketConnection,
    Uri,
    Wrap,
    connect,
)
from multifd.wire import MAGIC, Buffer, InitPacket, RamPacket, header_length


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


class Sample(NamedTuple):
    """What a counter counts: its name, and its labels with their values."""

    name: str
    labels: tuple[tuple[str, str], ...]


#: Where a channel's time goes: waiting for a packet and its header, its payload read and decoded, encoded, written.
STAGES = ("wait", "decode", "encode", "write")


@dataclass(frozen=True, slots=True)
class _Plan:
    """How packets change; `to` is None where they pass as they are."""

    target: Uri
    wrap: Wrap
    codecs: Codecs
    to: Choice | None
    uuid: bytes | None
    channels: int | None
    drop_switchover_start: bool
    find_zero_pages: bool
    observers: Observers


@dataclass(slots=True)
class _Leg:
    """One multifd channel, from the source to the destination; owned by its thread."""

    id: int
    source: Connection
    destination: Connection
    page_size: int
    decoder: Decoder
    #: Who makes the payloads that leave: somebody who encodes, or nobody.
    out: Encoder | Passage
    came: Watch
    went: Watch
    seconds: dict[str, float]
    packets: int = 0
    normal_pages: int = 0
    zero_pages: int = 0
    syncs: int = 0
    ended: bool = False
    methods: set[int] = field(default_factory=set)

    def lap(self, stage: str, since: float) -> float:
        """Count the time since then to a stage; returns now."""
        now = time.perf_counter()
        self.seconds[stage] += now - since
        return now

    def counters(self, to: str | None) -> dict[Sample, float]:
        """What went through, as samples; `to` is the method that it left with, None where it passed.

        Empty before its first page, which tells the method that it came with.
        """
        if not self.methods:
            return {}
        came = method_name(max(self.methods))
        where = {"channel": str(self.id), "from": came, "to": to or came}
        return {
            Sample("bytes", (("direction", "in"), *where.items())): self.source.bytes_read,
            Sample("bytes", (("direction", "out"), *where.items())): self.destination.bytes_written,
            Sample("memory_bytes", tuple(where.items())): (self.normal_pages + self.zero_pages) * self.page_size,
            Sample("packets", tuple(where.items())): self.packets,
            Sample("pages", (("kind", "normal"), *where.items())): self.normal_pages,
            Sample("pages", (("kind", "zero"), *where.items())): self.zero_pages,
            **{
                Sample("stage_seconds", (("stage", stage), *where.items())): spent
                for stage, spent in self.seconds.items()
            },
        }


#: A command without data: section type, number, length.
COMMAND_SIZE = 1 + COMMAND_HEAD.size
#: Seconds that a multifd channel waits for its main channel, which QEMU connects first.
MAIN_WAIT = 10.0
#: What the machine may be short of (descriptors, memory, threads): it ends a migration, and the relay goes on.
SHORTAGES = (OSError, MemoryError, RuntimeError)
INCOMPLETE = "the source ended before its migration was complete: was it cancelled?"


class _Foreign(PeerError):
    """A connection that is not of the migration at hand."""


class _Migration:
    """The connections of one migration, and the threads that serve them."""

    def __init__(self, plan: _Plan, silence: Silence) -> None:
        self.error: BaseException | None = None
        self._plan = plan
        self._effort = Effort(plan.to) if plan.to is not None else None
        self._silence = silence
        self._started = time.monotonic()
        self._machine = ""
        self._parser = Parser()
        self._answers = ReturnPathParser()
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._connections: list[SocketConnection] = []
        self._threads: list[threading.Thread] = []
        self._source: SocketConnection | None = None
        self._destination: SocketConnection | None = None
        self._ids: set[int] = set()
        self._blocks_known = False
        self._return_path = False
        self._held = bytearray()
        self._held_from = 0
        self._legs: dict[int, _Leg] = {}
        self._uuid: bytes | None = None
        self._sync_points = 0
        self._source_ended = False
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
            self._pass_main(connection)
            return
        try:
            leg = self._open_leg(connection, init)
        except HostError as error:  # it took the main channel, so it has gone since
            raise self._gone(f"channel {init.id}: ") from error
        if leg is None:
            return
        try:
            if isinstance(leg.out, Encoder):
                leg.out.set_up()
            self._relay_packets(leg)
        except Lost as lost:
            raise self._gone(f"channel {leg.id}: ") if self._source_is_well() else PeerError(INCOMPLETE) from lost
        except MultifdError as error:
            raise error.at(f"channel {leg.id}") from error
        finally:
            leg.decoder.close()
            leg.out.close()

    def _ignore(self, connection: SocketConnection, why: PeerError) -> None:
        warnings.warn(f"{why}: ignored", RuntimeWarning, stacklevel=2)
        with self._changed:
            if not self._over:  # join() closes them from then on
                self._connections.remove(connection)
                connection.close()

    def _connect(self) -> SocketConnection:
        connection = connect(self._plan.target, self._silence, wrap=self._plan.wrap)
        with self._changed:
            self._connections.append(connection)
            over = self._over
        if over:
            connection.interrupt()
        return connection

    def _await_blocks(self, connection: SocketConnection, init: InitPacket) -> None:
        """Wait for the page size.  Raises _Foreign for what an earlier migration left behind."""
        deadline = time.monotonic() + MAIN_WAIT
        with self._changed:
            while not self._changed.wait_for(lambda: self._blocks_known or self._over, 0.2):
                if self._source is None and (connection.hung_up() or time.monotonic() > deadline):
                    self._ids.remove(init.id)
                    if not self._ids:
                        self._uuid = None
                    raise _Foreign(
                        f"{connection.name} is channel {init.id} of a migration whose main channel is not here"
                    )

    def _open_leg(self, connection: SocketConnection, init: InitPacket) -> _Leg | None:
        with self._changed:
            if self._over:
                return None
            page_size = self._parser.page_size
        destination = self._connect()
        there = InitPacket(self._plan.uuid or init.uuid, init.id)
        destination.write([there.pack()])
        seconds = dict.fromkeys(STAGES, 0.0)
        came = self._plan.observers.watch(IN, init, ("wait", "decode"), seconds)
        went = self._plan.observers.watch(OUT, there, ("encode", "write"), seconds)
        out: Encoder | Passage
        if self._effort is None:
            out = Passage(came.tee(connection), destination)
        else:
            out = Encoder(init.id, page_size, self._effort)
        decoder = Decoder(init.id, came.tee(connection), self._plan.codecs)
        leg = _Leg(init.id, connection, destination, page_size, decoder, out, came, went, seconds)
        with self._changed:
            self._legs[init.id] = leg
        return leg

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

    # --- the main channel ---

    def _pass_main(self, source: SocketConnection) -> None:
        destination = self._destination = self._connect()
        warn_exposed(source)
        warn_exposed(destination)
        self._spawn(lambda: self._pass_answers(source, destination))
        data = MAGIC.pack(VM_FILE_MAGIC)
        while data:
            self._plan.observers.main(IN, data)
            passed = self._watch(data)
            try:
                destination.write([passed])
            except Lost as lost:
                raise self._gone() from lost
            self._plan.observers.main(OUT, passed)
            data = source.read_some(MAIN_READ)
        self._source_ended = True
        destination.finish()  # it closes in its turn, when it is done

    def _watch(self, data: bytes) -> Buffer:
        """Read along; returns what passes now."""
        self._parser.feed(data)
        cuts: list[int] = []
        try:
            for event in self._parser.events():
                self._note(event)
                if isinstance(event, CommandReceived) and event.number == Command.SWITCHOVER_START:
                    cuts.append(self._parser.position)
        except MultifdError as error:
            raise error.at("main channel") from error
        if not self._plan.drop_switchover_start:
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
        """The machine, the page size, the sync points, and whether the destination is to answer."""
        match event:
            case Configuration(machine=machine):
                self._machine = machine
            case CommandReceived(number=Command.OPEN_RETURN_PATH):
                self._return_path = True
            case PageData() if not self._ids:
                raise PeerError("the source sends its pages here: turn multifd on over there")
            case SyncPoint():
                with self._changed:
                    self._sync_points += 1
                    self._check_syncs()
            case BlockList():
                # A source sends no page before; now the page size is known.
                with self._changed:
                    self._blocks_known = True
                    self._changed.notify_all()

    def _check_syncs(self) -> None:
        """A channel that ended early would hang the destination: it waits for its SYNC for ever."""
        for leg in self._legs.values():
            if leg.ended and leg.syncs < self._sync_points:
                raise PeerError(f"channel {leg.id}: the source closed it before SYNC {leg.syncs + 1}: did it fail?")

    def _pass_answers(self, source: SocketConnection, destination: SocketConnection) -> None:
        while data := destination.read_some(4096):
            self._answers.feed(data)
            try:
                source.write([data])
            except Lost as lost:
                raise PeerError(INCOMPLETE) from lost
            self._plan.observers.main(BACK, data)
        if self._source_is_well() and not self._parser.complete:
            raise self._gone()
        self.stop()

    def _gone(self, where: str = "") -> PeerError:
        """The destination has closed: QEMU does not say why on the wire, so here is what it was shown."""
        shown = [f"machine {self._machine}"] if self._machine else []
        with self._changed:
            uuid = self._plan.uuid or self._uuid
            methods = set().union(*(leg.methods for leg in self._legs.values()))
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

    def _source_is_well(self) -> bool:
        """Whether it has ended its stream as it should, or not at all: a destination that goes then is to blame."""
        return self._parser.complete or not self._source_ended

    # --- packets ---

    def _relay_packets(self, leg: _Leg) -> None:
        header = bytearray(header_length(leg.page_size))
        head = memoryview(header)
        room = memoryview(b"" if isinstance(leg.out, Passage) else packet_buffer())
        leg.came.begin(leg.page_size)
        leg.went.begin(leg.page_size)
        since = time.perf_counter()
        while True:
            try:
                packet = read_packet(leg.source, head, leg.page_size)
            except Ended:
                # Whether it may end here the SYNCs tell: QEMU 7.2 can be cut inside its last packet.
                with self._changed:
                    leg.ended = True
                    self._check_syncs()
                return
            began, since = since, leg.lap("wait", since)
            leg.packets += 1
            leg.normal_pages += len(packet.normal)
            leg.zero_pages += len(packet.zero)
            if packet.normal or packet.zero:
                self._plan.codecs.check(packet.method)
                leg.methods.add(packet.method)
            leg.syncs += packet.sync
            if isinstance(leg.out, Encoder):
                since = self._recode(leg, leg.out, packet, head, room, since)
                if not packet.normal:
                    leg.out.idle(since - began)
                continue
            if packet.next_packet_size > MAX_PAYLOAD:
                raise PeerError(f"packet {packet.packet_num}: a payload of {packet.next_packet_size} bytes is too long")
            leg.destination.write([head])
            waited = leg.out.pass_on(packet.next_packet_size)
            leg.seconds["wait"] += waited
            since = leg.lap("write", since + waited)
            payload = leg.came.payload()
            since = leg.came.packet(packet, head) or since
            since = leg.went.packet(packet, head, payload) or since

    def _recode(
        self, leg: _Leg, encoder: Encoder, packet: RamPacket, head: memoryview, buffer: memoryview, since: float
    ) -> float:
        payload: Sequence[Buffer] = ()
        size = leg.page_size
        # QEMU's uadk (10.0) does not note which pages came, and takes each zero page for one that never
        # did.  That is right in the first round, after the SYNC of the set-up; later they go as pages.
        no_zeros = encoder.flag == METHODS["uadk"] and leg.syncs > 1
        if packet.normal:
            leg.decoder.decode(packet, buffer[: len(packet.normal) * size], size)
            since = leg.lap("decode", since)
        since = leg.came.packet(packet, head) or since
        if packet.zero and no_zeros:
            count = len(packet.zero)
            start = len(packet.normal) * size
            buffer[start : start + count * size] = ZEROS[: count * size]
            packet = replace(packet, normal=packet.normal + packet.zero, zero=())
            leg.normal_pages += count
            leg.zero_pages -= count
        if packet.normal:
            pages = buffer[: len(packet.normal) * size].toreadonly()
            runs: Sequence[tuple[int, int]] = [(0, len(packet.normal))]
            if self._plan.find_zero_pages and not no_zeros and (found := zero_indexes(pages, size)):
                runs, normal, zero = part(packet.normal, found)
                packet = replace(packet, normal=normal, zero=packet.zero + zero)
                leg.normal_pages -= len(zero)
                leg.zero_pages += len(zero)
            if runs:
                payload = encoder.encode([pages[first * size : end * size] for first, end in runs])
            since = leg.lap("encode", since)
        method = encoder.flag if packet.normal or packet.zero else 0
        packet = replace(packet, method=method, next_packet_size=sum(map(len, payload)))
        header = packet.pack(leg.page_size)
        leg.destination.write([header, *payload])
        since = leg.lap("write", since)
        return leg.went.packet(packet, header, payload) or since

    def counters(self) -> dict[Sample, float]:
        """What went through so far; the main channel has no method."""
        found: dict[Sample, float] = {}
        with self._changed:
            legs = list(self._legs.values())
            source, destination = self._source, self._destination
        to = self._plan.to.method if self._plan.to is not None else None
        for leg in legs:
            found |= leg.counters(to)
        if source is not None:
            found[Sample("bytes", (("direction", "in"), ("channel", "main")))] = source.bytes_read
        if destination is not None:
            found[Sample("bytes", (("direction", "out"), ("channel", "main")))] = destination.bytes_written
        return found

    def _result(self) -> Relayed:
        if not self._parser.complete:
            raise PeerError(INCOMPLETE)
        if self._answers.shut:
            raise PeerError(f"the destination reports that it failed (code {self._answers.shut})")
        if self._return_path and self._answers.shut is None:
            raise self._gone()
        legs = list(self._legs.values())
        for leg in legs:
            if leg.syncs < self._sync_points:
                raise self._gone(f"channel {leg.id}: {leg.syncs} of {self._sync_points} SYNCs came, then ")
        assert self._source is not None
        assert self._destination is not None
        statistics = Counter(self._effort.used if self._effort is not None else {})
        for leg in legs:
            statistics.update({f"{way}, decoding": count for way, count in leg.decoder.statistics.items()})
            if isinstance(leg.out, Encoder):
                statistics.update({f"{way}, encoding": count for way, count in leg.out.statistics.items()})
        came = "+".join(map(method_name, sorted(set().union(*(leg.methods for leg in legs))))) or "none"
        return Relayed(
            seconds=round(time.monotonic() - self._started, 6),
            bytes_in=sum(connection.bytes_read for connection in [self._source, *(leg.source for leg in legs)]),
            bytes_out=sum(
                connection.bytes_written for connection in [self._destination, *(leg.destination for leg in legs)]
            ),
            packets=sum(leg.packets for leg in legs),
            normal_pages=sum(leg.normal_pages for leg in legs),
            zero_pages=sum(leg.zero_pages for leg in legs),
            channels=len(legs),
            source=came,
            destination=self._plan.to.name if self._plan.to is not None else came,
            confirmed=self._answers.shut == 0 if self._return_path else None,
            statistics=dict(statistics),
        )


def _sum(total: dict[Sample, float], more: dict[Sample, float]) -> dict[Sample, float]:
    return total | {sample: total.get(sample, 0.0) + count for sample, count in more.items()}


class Relay:
    """Listens for sources, and serves one migration after another."""

    def __init__(
        self,
        listen: str,
        to_uri: str,
        *,
        source: str | None = None,
        to: str | None = None,
        uuid: bytes | None = None,
        channels: int | None = None,
        drop_switchover_start: bool = False,
        find_zero_pages: bool = False,
        listen_tls_creds: str | Path | None = None,
        connect_tls_creds: str | Path | None = None,
        connect_tls_hostname: str | None = None,
        observe: Sequence[str] = (),
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        """`listen` and `to_uri` are `tcp:HOST:PORT` or `unix:PATH`.

        `source` names the compressor that reads the packets (each says its own method unless
        given), `to` the one that writes them, `NAME[,key=value...]`, or
        `auto[,accepts=METHOD+METHOD...]` for the best one here of the methods that the destination
        accepts: where there is none, or both are the same, payloads pass unread.
        `uuid` replaces the guest's, 16 bytes; `channels` is the most that a source may use.
        `drop_switchover_start` takes out a command that destinations before 10.0 refuse;
        `find_zero_pages` looks for zero pages that the source sent as normal ones, for destinations of 9.0
        and newer with fresh memory; towards uadk in the first round only, since QEMU's clears no page
        that came before.  `listen_tls_creds` and `connect_tls_creds` are directories of
        certificates as `multifd.tls` wants them, for either leg, plain without; `connect_tls_hostname` is
        what the destination's has to name where that is not `to_uri`'s host.  `timeout`, in seconds, is how
        long nothing may move while somebody waits.  `observe` are those that look on, each `NAME[=ARG]`
        (`multifd.observers`): at what came from the source and at what went to the destination.
        Raises UsageError, CallerError, CompressorError, HostError.
        """
        target = Uri.parse(to_uri)
        where = Uri.parse(listen)
        for uri in (where, target):
            if uri.scheme == "recording":
                raise UsageError(f"{uri}: a relay stands between sockets")
        if find_zero_pages and to is None:
            raise UsageError(
                "zero pages can only be looked for where payloads are read: name a compressor to write with (--to)"
            )
        choice = None
        if to is not None and (to != source or to in RESERVED or find_zero_pages):
            choice = Choice.parse(to, bytes)
        wrap = connecting_wrap(connect_tls_creds, connect_tls_hostname, target)
        codecs = Codecs(Spec.parse(source) if source else None)
        observers = Observers(observe)
        self._plan = _Plan(
            target, wrap, codecs, choice, uuid, channels, drop_switchover_start, find_zero_pages, observers
        )
        self._timeout = timeout
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._current: _Migration | None = None
        self._totals: dict[Sample, float] = {}
        self._stopped = False
        self._listener = Listener(where, listening_wrap(listen_tls_creds))
        self.uri = str(self._listener.uri)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; end what is under way."""
        self.stop()
        self._listener.close()

    def stop(self) -> None:
        """Let `serve` return; safe from any thread, and twice."""
        with self._changed:
            self._stopped = True
            if self._current is not None:
                self._current.stop()
            self._changed.notify_all()
        self._listener.interrupt()

    def counters(self) -> dict[Sample, float]:
        """What went through since the start, and `active`: 1 while a migration is under way."""
        with self._changed:
            current, now = self._current, self._totals
            if current is not None:
                now = _sum(now, current.counters())
        return {Sample("active", ()): float(current is not None), **now}

    def serve(self, on_end: Callable[[Relayed | MultifdError], None], *, migrations: int | None = None) -> None:
        """Serve until `stop`, or so many migrations; `on_end` is told how each came out."""
        accepting = threading.Thread(target=self._accept, name="multifd-relay-accept", daemon=True)
        accepting.start()
        try:
            served = 0
            while served != migrations and (migration := self._next()) is not None:
                try:
                    outcome: Relayed | MultifdError = migration.join()
                except MultifdError as error:
                    outcome = error
                with self._changed:
                    self._current = None
                    how = "failed" if isinstance(outcome, MultifdError) else "completed"
                    ended = {Sample("migrations", (("outcome", how),)): 1.0}
                    self._totals = _sum(self._totals, migration.counters() | ended)
                    self._changed.notify_all()
                    stopped = self._stopped
                if not stopped:
                    on_end(outcome)
                served += 1
        finally:
            self.stop()
            accepting.join()
            if self._current is not None:
                with suppress(Exception):  # if it has any, it is on its way already
                    self._current.join()

    def _next(self) -> _Migration | None:
        """The next migration, once its first connection has come; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._current is not None or self._stopped)
            return None if self._stopped else self._current

    def _accept(self) -> None:
        # One for all migrations, as each is served alone: a channel may be quiet while others move.
        silence = Silence(self._timeout)
        while True:
            connection = self._listener.accept(silence)
            if connection is None:
                return
            with self._changed:
                while not self._stopped:
                    if self._current is None:
                        self._current = _Migration(self._plan, silence)
                        self._changed.notify_all()
                    if self._current.take(connection):
                        break
                    self._changed.wait()  # one that is over is cleared away first
                else:
                    connection.close()
