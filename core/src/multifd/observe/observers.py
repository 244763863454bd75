"""All that look on at the migrations of one job: called one by one, and guarded."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from multifd.codec.discovery import load_plugin, provider_of, providers
from multifd.codec.hooks import HOOK_ERRORS, Hooks
from multifd.errors import CallerError, HostError, MultifdError, UsageError, describe, os_errors
from multifd.hookspecs import OBSERVER_GROUP
from multifd.log import log
from multifd.net.connection import Connection
from multifd.observe import hooks
from multifd.observe.hooks import ObservedChannel, Times
from multifd.observe.watch import Clock, Watch, WatchedMain, Watching
from multifd.wire.packet import Buffer, InitPacket, RamPacket


class _Observer(Hooks):
    """One of them."""

    def __init__(self, text: str) -> None:
        name, _, argument = text.partition("=")
        found = provider_of(OBSERVER_GROUP, "observer", name)
        if found is None:
            installed = ", ".join(sorted(providers(OBSERVER_GROUP))) or "none"
            raise UsageError(f"no observer is named {name!r}; installed: {installed}")
        self.title = f"observer {name} ({found})"
        self.dropped = False
        factory = load_plugin(found)
        try:
            with os_errors(f"--observe {text}", CallerError):
                super().__init__(hooks, factory(argument))
        except MultifdError:
            raise
        except HOOK_ERRORS as error:
            raise HostError(f"{self.title}: {describe(error)}") from error

    def __str__(self) -> str:
        return self.title

    def failed(self, doing: str, error: BaseException) -> MultifdError:
        return HostError(f"{doing} raised {describe(error)}")


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

    def watch(self, direction: str, init: InitPacket, stages: Sequence[str], clock: Clock | None = None) -> Watch:
        """For one channel; `stages` are its direction's, `clock` is where its time is counted already, if it is."""
        if not self._observers:
            return Watch(clock)
        return Watching(self.packet, ObservedChannel(direction, init.id, init.pack()), stages, clock or Clock(stages))

    def watch_main(self, connection: Connection, *, read: str, written: str) -> Connection:
        """The main channel, watched; `read` and `written` are the directions."""
        return cast(Connection, WatchedMain(connection, self.main, read, written)) if self._observers else connection

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
            observer.call(hook, doing=hook, **arguments)
        except MultifdError as error:
            with self._lock:
                first = not observer.dropped
                observer.dropped = True
            if first:
                log.warning(f"{observer.title} is dropped: {error}")
