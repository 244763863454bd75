"""Connections: URIs, gathering and filling, deadlines, recordings.

The only module that knows sockets.  One connection is read by one thread at a time and
written by one thread at a time; `interrupt` may come from any thread.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import select
import socket
import stat
import struct
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

from multifd.errors import CallerError, HostError, PeerError, UsageError
from multifd.flags import MAX_PAYLOAD
from multifd.wire import Buffer

#: sendmsg takes at most this many buffers (Linux's UIO_MAXIOV).
IOV_MAX = 1024
MAIN_FILE = "main.bin"
#: Seconds until a connection that could not be taken is tried again.
ACCEPT_AGAIN = 0.1


class Ended(PeerError):
    """The other side closed the connection; `got` bytes of what was asked for had come."""

    def __init__(self, message: str, got: int = 0) -> None:
        super().__init__(message)
        self.got = got


class Stalled(PeerError):
    """Nothing moved for too long."""


class Lost(HostError):
    """The other side closed the connection while we wrote to it."""


@dataclass(frozen=True, slots=True)
class Uri:
    """`tcp:HOST:PORT`, `unix:PATH` or `recording:DIR`."""

    scheme: str
    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Uri:
        """Raises UsageError with the forms there are."""
        scheme, _, rest = text.partition(":")
        if scheme in ("unix", "recording") and rest:
            return cls(scheme, path=rest)
        if scheme == "tcp":
            host, colon, port = rest.rpartition(":")
            if colon and port.isdecimal() and int(port) < 65536:
                return cls("tcp", host=host.removeprefix("[").removesuffix("]"), port=int(port))
        raise UsageError(f"{text!r} is no URI: use tcp:HOST:PORT, unix:PATH or recording:DIR")

    def __str__(self) -> str:
        if self.scheme == "tcp":
            return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"
        return f"{self.scheme}:{self.path}"


class Silence:
    """How long all connections of one migration may be silent.

    `timeout` counts only while the peer is due to do something (`awaited`: a SYNC that others
    have reached, room in its buffers, its confirmation); `idle_timeout` counts always, None is
    for ever.  Both are seconds without one byte on any connection.
    """

    def __init__(self, timeout: float, idle_timeout: float | None = None) -> None:
        self.timeout = timeout
        self.idle_timeout = idle_timeout
        self.awaited = False
        self.last = time.monotonic()

    @property
    def interval(self) -> float:
        """How often a blocked thread has to look at `check`."""
        return min(self.timeout, self.idle_timeout or self.timeout)

    def check(self, doing: str, awaited: bool) -> None:
        """Raises Stalled where the silence has lasted too long."""
        silent = time.monotonic() - self.last
        # The kernel's timer may fire a little early.
        if awaited and silent >= self.timeout * 0.99:
            raise Stalled(f"{doing}: nothing moved for {self.timeout:g} s (--timeout)")
        if self.idle_timeout is not None and silent >= self.idle_timeout * 0.99:
            raise Stalled(f"{doing}: nothing came for {self.idle_timeout:g} s (--idle-timeout)")


class Readable(Protocol):
    """Where bytes come from."""

    def read_into(self, view: memoryview, *, at_least: int | None = None, due: bool = False) -> int:
        """Fill `view`, or at least so many bytes of it; returns how many.

        `due` where the peer has begun something and has to go on.  Raises Ended where the stream
        ends first.
        """


class Connection(Readable, Protocol):
    """A stream of bytes with one peer: a socket, or a recorded file that is only read."""

    name: str
    bytes_read: int
    bytes_written: int

    def read_first(self, view: memoryview, deadline: float) -> int:
        """Fill `view` before `deadline` (monotonic); how many bytes came before the end."""

    def read_some(self, limit: int, *, due: bool = False) -> bytes:
        """At least one byte, at most `limit`; empty at the end of the stream."""

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Write all of the buffers, gathered.  Raises Lost where the other side closed."""

    def interrupt(self, *, reading_only: bool = False) -> None:
        """Wake whoever is blocked here, for good: reads then end, writes fail."""

    def close(self) -> None:
        """Safe to call twice."""


class SocketConnection:
    """A connected socket.  Blocks in the kernel, which wakes it to look at the silence."""

    def __init__(self, sock: socket.socket, name: str, silence: Silence) -> None:
        self.name = name
        self.bytes_read = 0
        self.bytes_written = 0
        self._socket = sock
        self._silence = silence
        self._tcp = sock.family != socket.AF_UNIX
        sock.settimeout(None)
        if self._tcp:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            # A host that vanished.  Not TCP_USER_TIMEOUT: it also ends a peer that is merely slow.
            probe = max(1, int(silence.timeout / 4))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        # Not settimeout(): that polls before each call and forgoes MSG_WAITALL.
        seconds, fraction = divmod(silence.interval, 1)
        interval = struct.pack("@ll", int(seconds), max(1000, int(fraction * 1e6)))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)

    def read_into(self, view: memoryview, *, at_least: int | None = None, due: bool = False) -> int:
        wanted = len(view) if at_least is None else at_least
        flags = socket.MSG_WAITALL if at_least is None else 0
        got = 0
        while got < wanted:
            count = self._receive(view[got:] if got else view, flags, due or got > 0)
            if count == 0:
                raise Ended(f"the connection ended after {got} of {wanted} bytes", got)
            got += count
        return got

    def read_some(self, limit: int, *, due: bool = False) -> bytes:
        buffer = bytearray(limit)
        data = bytes(memoryview(buffer)[: self._receive(memoryview(buffer), 0, due)])
        if self._tcp:
            # QEMU (10.0) sends the next small piece of its main channel when this one is acknowledged, and the kernel
            # would wait 40 ms with that: at the switchover too, when the guest stands still.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data

    def _receive(self, view: memoryview, flags: int, due: bool) -> int:
        while True:
            try:
                count = self._socket.recv_into(view, len(view), flags)
            except BlockingIOError:
                self._silence.check("waiting for data", due or self._silence.awaited)
                continue
            except ConnectionError:
                count = 0  # a reset ends the stream as a close does; what is missing then tells
            except OSError as error:
                raise HostError(f"{self.name}: {error.strerror}") from error
            self.bytes_read += count
            self._silence.last = time.monotonic()
            return count

    def splice_in(self, pipe: int, limit: int) -> int:
        """Read up to `limit` bytes into a pipe, at least one; 0 at the end of the stream."""
        while True:
            try:
                count = os.splice(self._socket.fileno(), pipe, limit)
            except BlockingIOError:
                self._silence.check("waiting for data", awaited=True)
                continue
            except ConnectionError:
                count = 0
            except OSError as error:
                raise HostError(f"{self.name}: {error.strerror}") from error
            self.bytes_read += count
            self._silence.last = time.monotonic()
            return count

    def splice_out(self, pipe: int, count: int) -> None:
        """Write so many bytes, which are in a pipe."""
        while count:
            try:
                done = os.splice(pipe, self._socket.fileno(), count)
            except BlockingIOError:
                self._silence.check("the other side does not read", awaited=True)
                continue
            except OSError as error:
                raise self._write_error(error) from error
            self.bytes_written += done
            self._silence.last = time.monotonic()
            count -= done

    def write(self, buffers: Sequence[Buffer]) -> None:
        count = self._send(buffers[:IOV_MAX])
        if count == sum(map(len, buffers)):
            return
        pending = [memoryview(buffer) for buffer in buffers]
        while pending:
            while pending and count >= len(pending[0]):
                count -= len(pending.pop(0))
            if count:
                pending[0] = pending[0][count:]
            if pending:
                count = self._send(pending[:IOV_MAX])

    def _send(self, buffers: Sequence[Buffer]) -> int:
        while True:
            try:
                count = self._socket.sendmsg(buffers, (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._silence.check("the other side does not read", awaited=True)
                continue
            except OSError as error:
                raise self._write_error(error) from error
            self.bytes_written += count
            self._silence.last = time.monotonic()
            return count

    def _write_error(self, error: OSError) -> HostError:
        if isinstance(error, ConnectionError):
            return Lost("the other side closed the connection")
        return HostError(f"{self.name}: {error.strerror}")

    def begin(self, deadline: float) -> None:
        """Whatever goes before the first byte, done before `deadline`; plain bytes need nothing.

        Raises PeerError, HostError.
        """

    def read_first(self, view: memoryview, deadline: float) -> int:
        self.begin(deadline)
        got = 0
        try:
            while got < len(view) and (count := self._receive_by(view[got:], deadline)):
                got += count
        except TimeoutError:
            raise PeerError(f"{self.name} sent {got} bytes and then nothing: is it a migration?") from None
        return got

    def _receive_by(self, view: memoryview, deadline: float) -> int:
        """At least a byte before `deadline`, or 0 at the end.  Raises TimeoutError."""
        try:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            count = self._socket.recv_into(view)
        except TimeoutError:
            raise
        except ConnectionError:
            return 0
        except OSError as error:
            raise HostError(f"{self.name}: {error.strerror}") from error
        finally:
            with suppress(OSError):
                self._socket.settimeout(None)
        self.bytes_read += count
        self._silence.last = time.monotonic()
        return count

    def interrupt(self, *, reading_only: bool = False) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD if reading_only else socket.SHUT_RDWR)

    def exposed(self) -> bool:
        """Whether others may see what passes: it is not encrypted, and the other side is another host."""
        if self._socket.family == socket.AF_UNIX:
            return False
        try:
            ours, theirs = self._socket.getsockname()[0], self._socket.getpeername()[0]
        except OSError:
            return False
        return ours != theirs and not theirs.removeprefix("::ffff:").startswith("127.")

    def hung_up(self) -> bool:
        """Whether the other side has closed, though there may be something left to read."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def finish(self) -> None:
        """Say that nothing more will be written; reading goes on."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Let `close` throw away what is under way, so that the other side hears of it at once.

        After `interrupt` the kernel tells a writer no more that there is room: one that had filled our
        buffers would wait for a minute.  QEMU 7.2 was seen to, its migration active with nobody there.
        """
        with suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))

    def close(self) -> None:
        self._socket.close()


class Passage:
    """Passes payloads from one connection to another as they are; one thread's.

    Between two plain sockets they stay in the kernel: a relay that changes nothing then costs a
    quarter less CPU time.  What is encrypted on either side goes through a buffer.
    """

    def __init__(self, source: Readable, destination: Connection) -> None:
        self._pipe: tuple[int, ...] = ()
        if type(source) is SocketConnection and type(destination) is SocketConnection:
            self._pipe = way_out, way_in = os.pipe()
            with suppress(OSError):  # a user may have so much of them: then it goes in smaller steps
                fcntl.fcntl(way_in, fcntl.F_SETPIPE_SZ, MAX_PAYLOAD)
            self._take: Callable[[int], int] = partial(source.splice_in, way_in)
            self._give: Callable[[int], None] = partial(destination.splice_out, way_out)
        else:
            buffer = memoryview(bytearray(MAX_PAYLOAD))
            self._take = lambda limit: source.read_into(buffer[:limit], due=True)
            self._give = lambda count: destination.write([buffer[:count]])

    def pass_on(self, count: int) -> float:
        """The next `count` bytes, at most MAX_PAYLOAD; returns the seconds spent waiting for them.

        Raises Ended, Lost, Stalled, HostError.
        """
        waited = 0.0
        left = count
        while left:
            started = time.perf_counter()
            got = self._take(left)
            waited += time.perf_counter() - started
            if not got:
                raise Ended(f"the connection ended after {count - left} of {count} bytes", count - left)
            self._give(got)
            left -= got
        return waited

    def close(self) -> None:
        """Safe to call twice."""
        for end in self._pipe:
            os.close(end)
        self._pipe = ()


#: Makes a connection of a connected socket, its name, and the silence that it keeps to.
Wrap = Callable[[socket.socket, str, Silence], SocketConnection]


class Listener:
    """A listening socket; `wrap` makes its connections.  Raises CallerError where the address cannot be taken."""

    def __init__(self, uri: Uri, wrap: Wrap = SocketConnection) -> None:
        self._wrap = wrap
        self._path = ""
        self._over = False
        self._warned = False
        try:
            if uri.scheme == "unix":
                _remove_dead_socket(uri.path)
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.bind(uri.path)
                self._path = uri.path
                self.uri = uri
            else:
                found = socket.getaddrinfo(uri.host or None, uri.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
                family, _, _, _, address = found[0]
                self._socket = socket.socket(family)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self._socket.bind(address)
                host, port = self._socket.getsockname()[:2]
                self.uri = Uri("tcp", host=host, port=port)
            self._socket.listen(256)
        except OSError as error:
            self.close()
            raise CallerError(f"cannot listen on {uri}: {error.strerror or error}") from error

    def accept(self, silence: Silence) -> SocketConnection | None:
        """The next connection; None once the listener is interrupted or closed."""
        while True:
            try:
                sock, address = self._socket.accept()
            except OSError as error:
                # Not by errno: without a free descriptor the kernel says that first, and always.
                if self._over:
                    return None
                self._wait_out(error)
                continue
            peer = f"the connection from {address[0]}:{address[1]}" if isinstance(address, tuple) else "a connection"
            return self._wrap(sock, peer, silence)

    def _wait_out(self, error: OSError) -> None:
        """A connection that went before it was taken, or something that this machine is short of for now."""
        if isinstance(error, ConnectionAbortedError):
            return
        if not self._warned:
            self._warned = True
            hint = ": raise `ulimit -n` (systemd: LimitNOFILE)" if error.errno == errno.EMFILE else ""
            warnings.warn(
                f"{self.uri} cannot take a connection and goes on trying: {error.strerror}{hint}",
                RuntimeWarning,
                stacklevel=3,
            )
        time.sleep(ACCEPT_AGAIN)

    def interrupt(self) -> None:
        """Wake a blocked `accept`, for good."""
        self._over = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Safe to call twice; removes a Unix socket's file."""
        self._over = True
        if hasattr(self, "_socket"):
            self._socket.close()
        if self._path:
            with suppress(OSError):
                os.unlink(self._path)
            self._path = ""


def _remove_dead_socket(path: str) -> None:
    """A socket file that nobody listens on is left over from a process that died."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        return


def connect(
    uri: Uri, silence: Silence, who: str = "the destination", wrap: Wrap = SocketConnection
) -> SocketConnection:
    """Connect to somebody within `silence.timeout` seconds.  Raises HostError, PeerError."""
    error: OSError | None = None
    try:
        if uri.scheme == "unix":
            found = [(socket.AF_UNIX, uri.path)]
        else:
            infos = socket.getaddrinfo(uri.host or "localhost", uri.port, type=socket.SOCK_STREAM)
            found = [(info[0], info[4]) for info in infos]  # type: ignore[misc]
        deadline = time.monotonic() + silence.timeout
        for family, address in found:
            sock = socket.socket(family)
            try:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                sock.connect(address)
            except OSError as failed:
                error = failed
                sock.close()
                continue
            connection = wrap(sock, str(uri), silence)
            try:
                connection.begin(deadline)
            except BaseException:
                connection.close()
                raise
            return connection
    except OSError as failed:
        error = failed
    if isinstance(error, TimeoutError):
        raise HostError(f"{uri} does not answer within {silence.timeout:g} s (--timeout)") from error
    refused = isinstance(error, (ConnectionRefusedError, FileNotFoundError))
    hint = f": is {who} listening there?" if refused else ""
    raise HostError(f"cannot connect to {uri}: {(error.strerror or error) if error else 'no address'}{hint}") from error


class RecordedConnection:
    """One connection's bytes from a file, plain or compressed with zstd; writes go nowhere."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.bytes_read = 0
        self.bytes_written = 0
        self._file: BinaryIO
        try:
            self._raw = self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise CallerError(f"{path}: {error.strerror}") from error
        if path.suffix == ".zst":
            reader = _zstd_reader(self._raw)
            if reader is None:
                self._raw.close()
                raise HostError(f"{path} is compressed with zstd: pip install zstandard, or unpack it with `zstd -d`")
            self._file = reader

    def read_first(self, view: memoryview, deadline: float) -> int:  # noqa: ARG002 - a file never waits
        try:
            self.read_into(view)
        except Ended as ended:
            return ended.got
        return len(view)

    def read_into(self, view: memoryview, *, at_least: int | None = None, due: bool = False) -> int:  # noqa: ARG002
        got = 0
        while got < len(view):
            data = self._read(len(view) - got)
            if not data:
                if at_least is not None and got >= at_least:
                    break
                raise Ended(f"the recording ends after {got} of {len(view)} bytes", got)
            view[got : got + len(data)] = data
            got += len(data)
        return got

    def read_some(self, limit: int, *, due: bool = False) -> bytes:  # noqa: ARG002
        return self._read(limit)

    def _read(self, limit: int) -> bytes:
        try:
            data = self._file.read(limit)
        except Exception as error:  # zstandard and compression.zstd each have their own
            raise HostError(f"{self.name} cannot be read: {error}") from error
        self.bytes_read += len(data)
        return data

    def write(self, buffers: Sequence[Buffer]) -> None:
        self.bytes_written += sum(map(len, buffers))

    def interrupt(self, *, reading_only: bool = False) -> None:
        """Nobody blocks here."""

    def close(self) -> None:
        self._file.close()
        self._raw.close()


def _zstd_reader(file: BinaryIO) -> BinaryIO | None:
    """With whatever zstd there is: Python 3.14 brings one."""
    for module, attribute in (("compression.zstd", "ZstdFile"), ("zstandard", "open")):
        try:
            opened: BinaryIO = getattr(importlib.import_module(module), attribute)(file, "rb")
        except ImportError:
            continue
        return opened
    return None


def open_recording(directory: str) -> tuple[RecordedConnection, list[RecordedConnection]]:
    """The main channel and the multifd channels of a recording, `main.bin` and `chK.bin`.

    Each may be plain or `.zst`.  Raises CallerError where main or a channel is missing.
    """
    folder = Path(directory)
    main = _recorded_path(folder, MAIN_FILE)
    if main is None:
        raise CallerError(f"{folder} holds no {MAIN_FILE} or {MAIN_FILE}.zst: it is not a recording")
    paths: list[Path] = []
    while (path := _recorded_path(folder, f"ch{len(paths)}.bin")) is not None:
        paths.append(path)
    if not paths:
        raise CallerError(f"{folder} holds no ch0.bin or ch0.bin.zst: it is not a recording of a multifd migration")
    return RecordedConnection(main), [RecordedConnection(path) for path in paths]


def _recorded_path(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / (name + ".zst")):
        if path.exists():
            return path
    return None
