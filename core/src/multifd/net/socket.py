"""A connected socket: gathered writes, filled reads, silence that is noticed.

One connection is read by one thread at a time and written by one thread at a time; `interrupt` may come from any
thread.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from multifd.errors import os_errors
from multifd.net.connection import MAIN_READ, Ended, Lost, Stalled
from multifd.net.deadline import Silence
from multifd.net.rate import Pace
from multifd.net.wake import Wake
from multifd.wire.packet import Buffer

#: sendmsg takes at most this many buffers (Linux's UIO_MAXIOV).
IOV_MAX = 1024


class SocketConnection:
    """A connected socket.  Blocks in the kernel, which wakes it to look at the silence."""

    def __init__(self, sock: socket.socket, name: str, silence: Silence) -> None:
        self.name = name
        #: The other side's, of one that was accepted: a URI; a Unix socket's is where it connected to.
        self.address = ""
        self.bytes_read = 0
        self.bytes_written = 0
        #: How fast is written; None is as fast as the other side takes it.
        self.pace: Pace | None = None
        self._socket = sock
        self._waiting: dict[Wake, select.poll] = {}
        self._reset = False
        self._tcp = sock.family != socket.AF_UNIX
        sock.settimeout(None)
        self._set(silence)

    def _set(self, silence: Silence) -> None:
        self._silence = silence
        if self._tcp:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            # A host that vanished.  Not TCP_USER_TIMEOUT: it also ends a peer that is merely slow.
            probe = min(max(1, int(silence.timeout / 4)), 32767)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        # Not settimeout(): that polls before each call and forgoes MSG_WAITALL.
        seconds, fraction = divmod(silence.interval, 1)
        interval = struct.pack("@ll", int(seconds), max(1000, int(fraction * 1e6)))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)

    def ready(self, wake: Wake) -> bool:
        waiting = self._waiting.get(wake)
        if waiting is None:
            waiting = self._waiting[wake] = select.poll()
            waiting.register(self._socket, select.POLLIN)
            waiting.register(wake, select.POLLIN)
        with os_errors(self.name):
            while not (found := waiting.poll(self._silence.interval * 1000)):
                self._silence.check("waiting for data", awaited=self._silence.awaited)
        return len(found) > 1 or found[0][0] != wake.fileno()

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
        return self._read(due, self._socket.recv_into, view, len(view), flags)

    def splice_in(self, pipe: int, limit: int) -> int:
        """Read up to `limit` bytes into a pipe, at least one; 0 at the end of the stream."""
        return self._read(True, os.splice, self._socket.fileno(), pipe, limit)

    def splice_out(self, pipe: int, count: int) -> None:
        """Write so many bytes, which are in a pipe."""
        while count:
            step = count if self.pace is None else self.pace.next_step(count, self._silence)
            count -= step
            while step:
                step -= self._write(os.splice, pipe, self._socket.fileno(), step)

    def _read(self, due: bool, action: Callable[..., int], *arguments: object) -> int:
        """Bytes that came by an action of the kernel's, 0 at the end.  Raises Stalled, HostError."""
        with os_errors(self.name):
            while True:
                try:
                    count = action(*arguments)
                except BlockingIOError:
                    self._silence.check("waiting for data", awaited=due or self._silence.awaited)
                    continue
                except ConnectionError:
                    count = 0  # a reset ends the stream as a close does; what is missing then tells
                    self._reset = True
                self.bytes_read += count
                self._silence.last = time.monotonic()
                return count

    def _write(self, action: Callable[..., int], *arguments: object) -> int:
        """Bytes that went by an action of the kernel's.  Raises Lost, Stalled, HostError."""
        with os_errors(self.name):
            while True:
                try:
                    count = action(*arguments)
                except BlockingIOError:
                    self._silence.check("the other side does not read", awaited=True)
                    continue
                except ConnectionError as error:
                    raise Lost("the other side closed the connection") from error
                self.bytes_written += count
                self._silence.last = time.monotonic()
                return count

    def write(self, buffers: Sequence[Buffer]) -> None:
        for piece in (buffers,) if self.pace is None else self.pace.steps(buffers, self._silence):
            self._write_all(piece)

    def _write_all(self, buffers: Sequence[Buffer]) -> None:
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
        return self._write(self._socket.sendmsg, buffers, (), socket.MSG_NOSIGNAL)

    def keep_to(self, silence: Silence) -> None:
        """From now on; before, nobody else reads or writes."""
        self._set(silence)
        silence.include(self.unsent)

    def outlast(self) -> None:
        """From now on it is not asked whether the other host is still there: a network that is cut may come back."""
        if self._tcp:
            with suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)

    def take(self, limit: int) -> bytes | None:
        """What is here, at most `limit` bytes, without waiting; None where nothing is, empty at the end.

        Raises PeerError for what can be no beginning of a connection, HostError.
        """
        with os_errors(self.name):
            try:
                data = self._socket.recv(limit, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except ConnectionError:
                self._reset = True
                data = b""
        self.bytes_read += len(data)
        return data

    def begin(self, deadline: float) -> None:
        """Whatever goes before the first byte, done before `deadline`; plain bytes need nothing.

        Raises PeerError, HostError.
        """

    def read_by(self, deadline: float, limit: int) -> bytes:
        """Like `read_some`, but raises Stalled where nothing comes by then (monotonic)."""
        buffer = memoryview(bytearray(limit))
        return bytes(buffer[: self._receive_by(buffer, deadline)])

    def _receive_by(self, view: memoryview, deadline: float) -> int:
        """At least a byte before `deadline`, or 0 at the end.  Raises Stalled."""

        def receive() -> int:
            try:
                return self._socket.recv_into(view)
            except TimeoutError:
                raise Stalled("nothing came in time") from None

        try:
            with os_errors(self.name):
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            return self._read(False, receive)
        finally:
            with suppress(OSError):
                self._socket.settimeout(None)

    def interrupt(self, *, reading_only: bool = False) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD if reading_only else socket.SHUT_RDWR)
        if self.pace is not None and not reading_only:  # then: who writes on has to notice
            self.pace.interrupt()

    def exposed(self) -> bool:
        """Whether others may see what passes: it is not encrypted, and the other side is another host."""
        if self._socket.family == socket.AF_UNIX:
            return False
        try:
            ours, theirs = self._socket.getsockname()[0], self._socket.getpeername()[0]
        except OSError:
            return False
        return ours != theirs and not theirs.removeprefix("::ffff:").startswith("127.")

    def untaken(self) -> bool:
        """Whether the other side has not taken all that was written, or closed with some of it unread.

        As far as the kernels say: it is acknowledged, or no longer in a Unix socket; who leaves something resets.
        """
        with os_errors(self.name):
            self._reset = self._reset or self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
        return self._reset or self.unsent() > 0

    def unsent(self) -> int:
        """Bytes that the other side's kernel has not acknowledged, or its process not read from a Unix socket."""
        try:
            found: int = struct.unpack("@i", fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(4)))[0]
        except (OSError, ValueError):  # it is closed
            return 0
        return found

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

    def abort(self) -> None:
        """Close at once, so that the other side hears of it at once; who blocks here finds it closed."""
        self.reset()
        self.interrupt()
        self.close()

    def discard(self) -> bool:
        """Throw away what is here, without waiting; False where the other side has closed."""
        try:
            return bool(self._socket.recv(MAIN_READ, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def fileno(self) -> int:
        """Of the socket; -1 once it is closed."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()


def await_closing(connections: Iterable[SocketConnection], seconds: float) -> None:
    """Wait until the other side has closed all of them, so long at most; unread bytes do not matter."""
    poll = select.poll()
    left = {connection.fileno() for connection in connections}
    for number in left:
        poll.register(number, select.POLLRDHUP)
    deadline = time.monotonic() + seconds
    while left and (remaining := deadline - time.monotonic()) > 0:
        for number, _ in poll.poll(remaining * 1000):
            poll.unregister(number)
            left.discard(number)


#: Makes a connection of a connected socket, its name, and the silence that it keeps to.
Wrap = Callable[[socket.socket, str, Silence], SocketConnection]
