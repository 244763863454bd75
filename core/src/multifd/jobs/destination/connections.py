"""Who connects to `receive`: accepted, told apart, and served by a thread each."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

from multifd.codec.readers import Readers
from multifd.engine.headers import identify
from multifd.engine.receiver import RecvChannels
from multifd.errors import PeerError, counted
from multifd.net.connection import Connection, Ended
from multifd.net.deadline import Silence
from multifd.net.listener import Listener
from multifd.net.security import warn_exposed
from multifd.net.socket import SocketConnection
from multifd.observe.observers import Observers


class Connections:
    """Accepts connections; each gets a thread, which finds out by its first bytes what it is."""

    def __init__(
        self, listener: Listener | None, count: int, readers: Readers, silence: Silence, observers: Observers
    ) -> None:
        self.silence = silence
        self.readers = readers
        self.observers = observers
        self.channels = RecvChannels(count, readers, silence, self._wake, observers)
        #: Whether it ended well: nobody's bytes are thrown away then.
        self.complete = False
        #: Whether those who connect are there, or their recording.
        self.live = listener is not None
        self._listener = listener
        self._closed = False
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._main: Connection | None = None
        self._over = False
        self._connections: list[Connection] = []
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Accept in a thread of its own, until closed."""
        self._spawn(self._accept)

    def take(self, connection: Connection) -> None:
        """A connection has come."""
        with self._changed:
            if self._over:
                connection.close()
                return
            self._connections.append(connection)
            self._changed.notify_all()
            self._spawn(lambda: self._serve(connection))

    def main(self, first_timeout: float | None) -> Connection:
        """Wait for the main channel.  Raises PeerError where it does not come in time."""
        with self._changed:
            while self._main is None and not self._over:
                if not self._connections:
                    if not self._changed.wait_for(lambda: self._connections or self._over, first_timeout):
                        raise PeerError(f"nobody connected within {first_timeout:g} s (--timeout)")
                elif not self._changed.wait_for(self._main_or_nobody, self.silence.timeout):
                    raise PeerError(
                        f"{counted(len(self._connections), 'connection')} came, none of them a main channel, within "
                        f"{self.silence.timeout:g} s (--timeout)"
                    )
            main = self._main
        self.channels.raise_failure()
        assert main is not None
        return main

    def _main_or_nobody(self) -> bool:
        return self._main is not None or self._over or not self._connections

    def source_is_gone(self) -> bool:
        """Whether the main channel's other side has closed it, though there may be something left to read."""
        return isinstance(self._main, SocketConnection) and self._main.hung_up()

    def stop(self) -> None:
        """Stop accepting; end all threads.  The main channel stays open for the last word."""
        with self._changed:
            self._over = True
            others = [connection for connection in self._connections if connection is not self._main]
        if self._listener is not None:
            self._listener.interrupt()
        self.channels.stop()
        for connection in others:
            connection.interrupt()
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """Stop, and close all connections.  Safe to call twice."""
        self.stop()
        if self._closed:
            return
        self._closed = True
        for connection in self._connections:
            if not self.complete and isinstance(connection, SocketConnection):
                connection.reset()
            connection.close()
        self.channels.close()

    def _wake(self) -> None:
        """A channel failed: whoever waits for the main channel, or reads it, must see it."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
            if self._main is not None:
                self._main.interrupt(reading_only=True)

    def _spawn(self, action: Callable[[], None]) -> None:
        thread = threading.Thread(target=action, name="multifd-recv", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _accept(self) -> None:
        assert self._listener is not None
        while (connection := self._listener.accept(self.silence)) is not None:
            self.take(connection)

    def _serve(self, connection: Connection) -> None:
        try:
            self._identify(connection)
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self.channels.fail(error)

    def _identify(self, connection: Connection) -> None:
        try:
            init = identify(connection, self.silence.timeout)
        except Ended as ended:
            warnings.warn(f"{ended}: ignored", RuntimeWarning, stacklevel=1)
            with self._changed:
                self._connections.remove(connection)
                self._changed.notify_all()
            connection.close()
            return
        if init is not None:
            self.channels.serve(connection, init)
            return
        with self._changed:
            if self._main is not None:
                raise PeerError("a second main channel came: two migrations at once?")
            self._main = connection
            self._changed.notify_all()
        if isinstance(connection, SocketConnection):
            warn_exposed(connection)
