"""Who may look on: they see every packet and the main channel, and can neither change nor break them.

An observer is named by an entry point of group `multifd.observers`, and asked for by
`--observe NAME[=ARG]`.  The entry point is a callable: given ARG (empty without), it returns an
object whose methods, marked with `multifd.hookspecs.hookimpl`, are the hooks below, as many as it
wants, with as many of their arguments as it wants.  It raises OSError or CallerError where ARG
will not do; that is before anything is connected.

A direction is IN, from the source, or OUT, to the destination; a relay has both, what came and
what went.  BACK are the destination's answers on the main channel.

Hooks are called in the thread that moves the bytes, which waits for them: those of one channel and
direction one by one, those of different channels at the same time.  One that raises is the last
call of this observer but for `multifd_observe_finish`; the migration goes on.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import pluggy

from multifd import hookspecs
from multifd.errors import CallerError, HostError, MultifdError, UsageError
from multifd.hookspecs import OBSERVER_GROUP, hookspec
from multifd.plugins import HOOK_ERRORS, describe, load_plugin, provider_of, providers
from multifd.transport import Connection, Readable
from multifd.wire import Buffer, InitPacket, RamPacket

IN, OUT, BACK = "in", "out", "back"


@dataclass(frozen=True, slots=True)
class ObservedChannel:
    """One multifd channel in one direction; `id` counts from 0, `init` are the 64 bytes that it began with."""

    direction: str
    id: int
    init: bytes
    page_size: int = 0


class Times(NamedTuple):
    """Seconds that one packet took, by stage; 0 for stages of the other direction.

    `wait`: until it began to come, or until there were pages to send and they were read.  `read`:
    its payload came.  `decode`, `encode`: in the compressor.  `write`: until the connection took it.
    """

    wait: float = 0.0
    read: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    write: float = 0.0


@hookspec
def multifd_observe_start(directions: Sequence[str]) -> None:
    """A migration begins; a relay serves one after another.  `directions`: IN, OUT or both."""


@hookspec
def multifd_observe_main(direction: str, data: memoryview) -> None:
    """Bytes of the main channel passed, in order.  `data` is read-only and valid during the call."""


@hookspec
def multifd_observe_packet(
    channel: ObservedChannel,
    packet: RamPacket,
    header: memoryview,
    payload: Sequence[memoryview],
    times: Times,
) -> None:
    """A packet passed: it was read and decoded, or written.  Every one, SYNC and zero pages only, too.

    `packet` is what `header` says, the bytes as they are on the wire; `payload` follows them.
    All views are read-only and valid during the call only: copy what is to be kept.
    """


@hookspec
def multifd_observe_finish(complete: bool) -> None:
    """The migration is over, and no other hook runs: write out, release.

    `complete` says that it succeeded and that this observer saw all of it.
    """


class Watch:
    """One channel in one direction, as the engines tell of it; this one for when nobody looks on."""

    def begin(self, page_size: int) -> None:
        """The first packet is waited for."""

    def tee(self, connection: Readable) -> Readable:
        """Where payloads are to be read from, so that they are seen."""
        return connection

    def payload(self) -> Sequence[Buffer]:
        """What was read through `tee` since the last packet."""
        return ()

    def lap(self, stage: str) -> None:
        """Count the time since the last call to a stage."""

    def packet(self, packet: RamPacket, header: Buffer, payload: Sequence[Buffer] | None = None) -> float:  # noqa: ARG002
        """A packet has passed, its payload is what `tee` saw unless given.

        Returns what `time.perf_counter` says after the observers had it; 0 without any.
        """
        return 0.0


UNWATCHED = Watch()


class _Watching(Watch):
    """For observers; owned by its channel's thread."""

    def __init__(
        self, observers: Observers, channel: ObservedChannel, stages: Sequence[str], seconds: dict[str, float] | None
    ) -> None:
        self._observers = observers
        self._channel = channel
        self._stages = stages
        self._seconds = dict.fromkeys(stages, 0.0) if seconds is None else seconds
        self._before = dict.fromkeys(stages, 0.0)
        self._since = 0.0
        self._read = 0.0
        self._pieces: list[bytes] = []

    def begin(self, page_size: int) -> None:
        self._channel = replace(self._channel, page_size=page_size)
        self._since = time.perf_counter()

    def tee(self, connection: Readable) -> Readable:
        return _Tee(connection, self)

    def payload(self) -> Sequence[Buffer]:
        return self._pieces

    def read(self, seconds: float, piece: bytes) -> None:
        """A piece of a payload has come."""
        self._read += seconds
        self._pieces.append(piece)

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._seconds[stage] += now - self._since
        self._since = now

    def packet(self, packet: RamPacket, header: Buffer, payload: Sequence[Buffer] | None = None) -> float:
        spent = {stage: self._seconds[stage] - self._before[stage] for stage in self._stages}
        self._before = {stage: self._seconds[stage] for stage in self._stages}
        if self._read:
            # It was read inside of these; where payloads pass as they are, nothing decodes.
            spent["decode" if spent["decode"] else "wait"] -= self._read
            spent["read"] = self._read
        views = tuple(memoryview(piece).toreadonly() for piece in (self._pieces if payload is None else payload))
        head = memoryview(header).toreadonly()
        self._observers.packet(self._channel, packet, head, views, Times(**spent))
        self._read = 0.0
        self._pieces = []
        self._since = time.perf_counter()
        return self._since


class _Tee:
    """Reads a payload for its compressor, and keeps a copy."""

    def __init__(self, connection: Readable, watch: _Watching) -> None:
        self._connection = connection
        self._watch = watch

    def read_into(self, view: memoryview, *, at_least: int | None = None, due: bool = False) -> int:
        since = time.perf_counter()
        count = self._connection.read_into(view, at_least=at_least, due=due)
        self._watch.read(time.perf_counter() - since, bytes(view[:count]))
        return count


class _WatchedMain:
    """A main channel whose bytes are seen; everything else is the connection's own."""

    def __init__(self, connection: Connection, observers: Observers, read: str, written: str) -> None:
        self._connection = connection
        self._observers = observers
        self._directions = read, written

    def read_some(self, limit: int, *, due: bool = False) -> bytes:
        data = self._connection.read_some(limit, due=due)
        if data:
            self._observers.main(self._directions[0], data)
        return data

    def write(self, buffers: Sequence[Buffer]) -> None:
        self._connection.write(buffers)
        for buffer in buffers:
            self._observers.main(self._directions[1], buffer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


class _Observer:
    """One of them, with a PluginManager of its own."""

    def __init__(self, text: str) -> None:
        name, _, argument = text.partition("=")
        found = provider_of(OBSERVER_GROUP, "observer", name)
        if found is None:
            installed = ", ".join(sorted(providers(OBSERVER_GROUP))) or "none"
            raise UsageError(f"no observer is named {name!r}; installed: {installed}")
        self.title = f"observer {name} ({found})"
        self.dropped = False
        factory = load_plugin(found)
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(sys.modules[__name__])
        try:
            manager.register(factory(argument))
            manager.check_pending()
        except MultifdError:
            raise
        except OSError as error:
            raise CallerError(f"--observe {text}: {error.strerror or error}") from error
        except HOOK_ERRORS as error:
            raise HostError(f"{self.title}: {describe(error)}") from error
        self.hook = manager.hook


class Observers:
    """All that look on at the migrations of one job; there may be none."""

    def __init__(self, given: Sequence[str] = ()) -> None:
        """Each is `NAME[=ARG]`.

        Raises UsageError for a name nobody has, CallerError where ARG will not do, CompressorError
        or HostError where the plugin is broken.
        """
        self._lock = threading.Lock()
        self._observers = [_Observer(text) for text in given]

    @contextmanager
    def migration(self, *directions: str) -> Iterator[None]:
        """One migration, from before it is connected until all its threads have ended."""
        self._call("multifd_observe_start", directions=directions)
        complete = False
        try:
            yield
            complete = True
        finally:
            for observer in self._observers:
                self._call_one(observer, "multifd_observe_finish", {"complete": complete and not observer.dropped})
            self._observers = [observer for observer in self._observers if not observer.dropped]

    def watch(
        self, direction: str, init: InitPacket, stages: Sequence[str], seconds: dict[str, float] | None = None
    ) -> Watch:
        """For one channel; `seconds` is where its stages' times are counted already, if they are."""
        if not self._observers:
            return UNWATCHED
        return _Watching(self, ObservedChannel(direction, init.id, init.pack()), stages, seconds)

    def watch_main(self, connection: Connection, *, read: str, written: str) -> Connection:
        """The main channel, watched; `read` and `written` are the directions."""
        return cast(Connection, _WatchedMain(connection, self, read, written)) if self._observers else connection

    def main(self, direction: str, data: Buffer) -> None:
        """Bytes of the main channel have passed."""
        if self._observers:
            self._call("multifd_observe_main", direction=direction, data=memoryview(data).toreadonly())

    def packet(
        self,
        channel: ObservedChannel,
        packet: RamPacket,
        header: memoryview,
        payload: Sequence[memoryview],
        times: Times,
    ) -> None:
        """A packet has passed."""
        self._call(
            "multifd_observe_packet", channel=channel, packet=packet, header=header, payload=payload, times=times
        )

    def _call(self, hook: str, **arguments: object) -> None:
        for observer in self._observers:
            if not observer.dropped:
                self._call_one(observer, hook, arguments)

    def _call_one(self, observer: _Observer, hook: str, arguments: dict[str, object]) -> None:
        try:
            getattr(observer.hook, hook)(**arguments)
        except HOOK_ERRORS as error:
            with self._lock:
                first = not observer.dropped
                observer.dropped = True
            if first:
                warnings.warn(
                    f"{observer.title} is dropped: {hook} raised {describe(error)}", RuntimeWarning, stacklevel=2
                )
