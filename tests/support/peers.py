"""Real sockets on the other side: a source that plays bytes, a destination that keeps them."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import multifd
import streams
from multifd.errors import MultifdError
from multifd.jobs.report import Result

TIMEOUT = 30


def dial(uri: str) -> socket.socket:
    scheme, _, rest = uri.partition(":")
    if scheme == "unix":
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(rest)
        except OSError:
            sock.close()
            raise
    else:
        host, _, port = rest.rpartition(":")
        sock = socket.create_connection((host.strip("[]"), int(port)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(TIMEOUT)
    return sock


def play(
    uri: str, sent: Sequence[bytes], piece: int, order: Sequence[int] | None = None, *, dies: bool = False
) -> bytes:
    """Be a source: one connection per stream, in this order, in pieces; what main was answered.

    One that `dies` ends its side of all connections, where another waits for the answer.
    """
    order = range(len(sent)) if order is None else order
    socks = {}
    for number in order:
        socks[number] = dial(uri)
        socks[number].sendall(sent[number][: min(piece, 4)])

    def write(number: int) -> None:
        data = memoryview(sent[number])
        with suppress(ConnectionError):
            for at in range(min(piece, 4), len(data), piece):
                socks[number].sendall(data[at : at + piece])

    threads = [threading.Thread(target=write, args=(number,)) for number in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answer = b""
    if dies:
        for sock in socks.values():
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
    with suppress(ConnectionError):
        # As QEMU's, it closes when it has its answer.
        while answer[-8:-4] != streams.SHUT_DONE[:4] and (data := socks[0].recv(4096)):
            answer += data
    for sock in socks.values():
        sock.close()
    return answer


class Receiving:
    """`multifd.receive` in a thread, on a socket of its own; `uri` is where it listens.

    Where `held`, it takes no connection before `go`: what was sent by then is there when its clocks start.
    """

    def __init__(self, output: Path, uri: str = "tcp:127.0.0.1:0", *, held: bool = False, **options: Any) -> None:
        self.result: Result | None = None
        self.error: MultifdError | None = None
        self._listening = threading.Event()
        self._going = threading.Event()
        if not held:
            self.go()
        self.uri = ""
        options.setdefault("timeout", TIMEOUT)
        self._thread = threading.Thread(target=self._run, args=(uri, output), kwargs=options)
        self._thread.start()
        assert self._listening.wait(TIMEOUT)

    def _run(self, uri: str, output: Path, **options: Any) -> None:
        def listening(where: str) -> None:
            self.uri = where
            self._listening.set()
            assert self._going.wait(TIMEOUT), "nobody let it go"

        try:
            self.result = multifd.receive(uri, output, on_listening=listening, **options)
        except MultifdError as error:
            self.error = error
        finally:
            self._listening.set()

    def go(self) -> None:
        """Take connections."""
        self._going.set()

    def join(self) -> Result:
        """Its result; raises its error."""
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive(), "receive hangs"
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


class Keeping:
    """A destination that keeps every byte per connection and confirms when told to.

    It ends with the source or, as QEMU does, when it has everything: so many bytes of all
    connections.
    """

    def __init__(
        self,
        channels: int,
        answer: bytes = b"\x00\x01\x00\x04\x00\x00\x00\x00",
        *,
        everything: int | None = None,
        described: bool = True,
    ) -> None:
        """Where it is not `described`, the main channel ends behind its device state."""
        self._is_described = described
        self.answer = answer
        self.missing = everything
        self._changed = threading.Condition()
        self.main = b""
        self.channels: dict[int, bytes] = {}
        self._server = socket.create_server(("127.0.0.1", 0))
        host, port = self._server.getsockname()
        self.uri = f"tcp:{host}:{port}"
        self._count = channels + 1
        self._stopped = False
        self.order: list[str] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        threads = []
        self._server.settimeout(TIMEOUT)
        for _ in range(self._count):
            try:
                sock, _ = self._server.accept()
            except OSError:
                assert self._stopped
                break
            sock.settimeout(TIMEOUT)
            thread = threading.Thread(target=self._keep, args=(sock,))
            thread.start()
            threads.append(thread)
        for thread in threads:
            thread.join(TIMEOUT)
        self._server.close()

    def _keep(self, sock: socket.socket) -> None:
        data = bytearray()
        with sock, suppress(ConnectionError):
            while piece := sock.recv(1 << 20):
                data += piece
                end = _described(data) if self._is_described else data.endswith(streams.DEVICE_STATE + b"\0")
                whole = data[:4] == b"QEVM" and end
                if self.missing is not None:
                    with self._changed:
                        self.missing -= len(piece)
                        self._changed.notify_all()
                        if whole:
                            assert self._changed.wait_for(lambda: not self.missing, TIMEOUT)
                if whole:
                    sock.sendall(self.answer)
                    if self.missing is not None:
                        break
        if data[:4] == b"QEVM":
            self.main = bytes(data)
        elif data:
            self.channels[data[24]] = bytes(data)

    def stop(self) -> None:
        """No other connection comes."""
        self._stopped = True
        self._server.shutdown(socket.SHUT_RDWR)
        self.join()

    def join(self) -> None:
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()


class SlowLink:
    """A network on the way to `target` that takes so many bytes per second, all connections together."""

    def __init__(self, target: str, rate: int) -> None:
        self._target = target
        self._rate = rate
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0))
        # Of the connections that it accepts: what the kernel takes at once has not passed the link.
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        self.uri = f"tcp:127.0.0.1:{self._server.getsockname()[1]}"
        self._socks: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, action: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=action, args=arguments))
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._server.accept()
                there = dial(self._target)
                self._socks += [here, there]
                self._start(self._pass, here, there, self._rate)
                self._start(self._pass, there, here, 0)

    def _pass(self, source: socket.socket, target: socket.socket, rate: int) -> None:
        with suppress(OSError):
            while data := source.recv(16 << 10):
                if rate:
                    with self._lock:
                        time.sleep(len(data) / rate)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for sock in (self._server, *self._socks):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(TIMEOUT)
        for sock in (self._server, *self._socks):
            sock.close()


def _described(data: bytearray) -> bool:
    """Whether the description of the device state, a stream's last part, is there to its end."""
    try:
        return isinstance(json.loads(data[data.rindex(b'{"page_size"') :]), dict)
    except ValueError:
        return False


def eventually(condition: Callable[[], bool], seconds: float = TIMEOUT) -> bool:
    """Whether it comes true, looked at again and again; so many seconds are for a machine that is busy."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False
