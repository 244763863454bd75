"""A network between two sides that stands still at one exact moment, until the test lets it go on."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import streams
from peers import TIMEOUT, eventually

#: Where the list of the RAM blocks begins on the main channel, and the device state.
RAM = b"\x03ram" + struct.pack(">II", 0, 4)
DEVICES = b"\x05timer" + struct.pack(">II", 0, 2)


@dataclass(frozen=True)
class Moment:
    """Behind the first `after` bytes of a `stream`, where the bytes behind it are held.

    `main` counts from the end of `mark` on; `channels` are all multifd channels together, none of which moves before
    `first` bytes of the main channel have passed.  `shut` is where the destination has said that it has everything:
    that word is held, or where `handed` it has been read by who is next.
    """

    stream: str
    after: int = 0
    mark: bytes = b""
    first: int = 0
    handed: bool = False


class Passing:
    """Listens at a Unix socket and passes what comes to `target`, another; each direction of each has a thread."""

    def __init__(self, path: Path, target: str) -> None:
        self.uri = f"unix:{path}"
        self._target = target
        self._socks: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(64)
        self._start(self._accept)

    def _start(self, action: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=action, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._server.accept()
                self._socks.append(here)
                try:
                    there = self._call()  # in the order in which they came: QEMU 7.2 goes by it
                except OSError:
                    here.shutdown(socket.SHUT_RDWR)
                    continue
                self._socks.append(there)
                self._start(self._forth, here, there)
                self._start(self._back, there, here)

    def _call(self) -> socket.socket:
        there = socket.socket(socket.AF_UNIX)
        try:
            there.connect(self._target.removeprefix("unix:"))
        except OSError:
            there.close()
            raise
        return there

    def _forth(self, here: socket.socket, there: socket.socket) -> None:
        raise NotImplementedError

    def _back(self, there: socket.socket, here: socket.socket) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Nobody else is taken, and those that were are hung up on."""
        _hang_up(self._server)
        self._threads[0].join(TIMEOUT)
        _hang_up(*self._socks)
        for thread in self._threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
        for sock in (self._server, *self._socks):
            sock.close()


class Monitor(Passing):
    """On the way to QEMU's monitor: commands name `instead` where they named `uri`."""

    def __init__(self, path: Path, target: Path, uri: str, instead: str) -> None:
        self._replaced = (uri.encode(), instead.encode())
        super().__init__(path, f"unix:{target}")

    def _forth(self, here: socket.socket, there: socket.socket) -> None:
        _carry(here, there, lambda data: data.replace(*self._replaced))

    def _back(self, there: socket.socket, here: socket.socket) -> None:
        _carry(there, here, lambda data: data)


class Gate(Passing):
    """On the way to a destination; stands still at `moment`, if any.

    `main` is what has passed of the main channel, `passed` how many bytes of the others; `shut` whether the
    destination has said SHUT 0, which `on_shut` is called for before it goes on.
    """

    def __init__(
        self, path: Path, target: str, moment: Moment | None = None, on_shut: Callable[[], object] = bool
    ) -> None:
        self.main = b""
        self.passed = 0
        self.shut = False
        self._moment = moment
        self._on_shut = on_shut
        self._changed = threading.Condition()
        self._stands = False
        self._open = moment is None
        super().__init__(path, target)

    def reached(self, seconds: float = TIMEOUT) -> bool:
        """Whether the moment has come."""
        with self._changed:
            return self._changed.wait_for(lambda: self._stands, seconds)

    def open(self) -> None:
        """All passes from now on."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def cut(self) -> None:
        """The network is gone: both sides see it."""
        _hang_up(*self._socks)
        self.open()

    def close(self) -> None:
        self.open()
        super().close()

    def _forth(self, here: socket.socket, there: socket.socket) -> None:
        data = b""
        with suppress(OSError):
            while len(data) < 4 and (more := here.recv(4)):
                data += more
            is_main = data == b"QEVM"
            while data:
                while data:
                    piece = self._take(is_main, data)
                    there.sendall(piece)
                    data = data[len(piece) :]
                    self._look(is_main)
                data = here.recv(64 << 10)
            self._wait()
            there.shutdown(socket.SHUT_WR)
            return
        _hang_up(here, there)

    def _take(self, is_main: bool, data: bytes) -> bytes:
        """As many of them as may pass now; waits where none may."""
        moment = self._moment
        with self._changed:
            if moment is not None and moment.first and not is_main:
                self._changed.wait_for(lambda: self._open or len(self.main) >= moment.first)
            self._changed.wait_for(lambda: self._open or not self._stands)
            piece = data[: self._room(is_main, data)]
            if is_main:
                self.main += piece
            else:
                self.passed += len(piece)
            self._changed.notify_all()
        return piece

    def _room(self, is_main: bool, data: bytes) -> int:
        """How many bytes of that stream may pass yet, the next of which are `data`."""
        moment = self._moment
        if self._open or moment is None or moment.stream != ("main" if is_main else "channels"):
            return len(data)
        if not is_main:
            return moment.after - self.passed
        at = (self.main + data).find(moment.mark)
        return len(data) if at < 0 else max(0, at + len(moment.mark) + moment.after - len(self.main))

    def _look(self, is_main: bool) -> None:
        """Whether the moment has come, now that what was taken has passed."""
        with self._changed:
            if not self._open and not self._room(is_main, b"\0"):
                self._stand()

    def _stand(self) -> None:
        with self._changed:
            self._stands = True
            self._changed.notify_all()

    def _wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._open or not self._stands)

    def _back(self, there: socket.socket, here: socket.socket) -> None:
        """A destination that has gone is seen even where the gate stands: only its last word may be held."""
        said = b""
        last = self._moment is not None and self._moment.stream == "shut"
        with suppress(OSError):
            while data := there.recv(4096):
                said += data
                if streams.SHUT_DONE in said and not self.shut:
                    self.shut = True
                    self._on_shut()
                    if last:
                        self._hand(here, data)
                        continue
                here.sendall(data)
        if last:
            self._wait()
        _hang_up(here, there)

    def _hand(self, here: socket.socket, data: bytes) -> None:
        """The last word, with the gate standing before or behind it."""
        assert self._moment is not None
        if self._moment.handed:
            here.sendall(data)
            eventually(lambda: not _unread(here))
        self._stand()
        self._wait()
        if not self._moment.handed:
            here.sendall(data)


def _carry(source: socket.socket, target: socket.socket, change: Callable[[bytes], bytes]) -> None:
    with suppress(OSError):
        while data := source.recv(64 << 10):
            target.sendall(change(data))
    _hang_up(source, target)


def _hang_up(*socks: socket.socket) -> None:
    for sock in socks:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _unread(sock: socket.socket) -> bool:
    """Whether the other side of a Unix socket has not read all that was written (SIOCOUTQ)."""
    return any(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))


def blocks_end(main: bytes) -> int:
    """Where the list of RAM blocks has ended, in a source's main channel."""
    at = main.index(RAM) + len(RAM)
    (left,) = struct.unpack_from(">Q", main, at)
    left &= ~0xFFF
    at += 8
    while left:
        (length,) = struct.unpack_from(">Q", main, at + 1 + main[at])
        at += 9 + main[at]
        left -= length
    return at
