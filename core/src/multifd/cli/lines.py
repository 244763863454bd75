"""Standard output and standard error, as whole lines: each may be full, closed, or read by nobody."""

from __future__ import annotations

import errno
import os
import select
import threading
from collections.abc import Sequence

from multifd.errors import HostError, os_errors, system_error
from multifd.log import escaped

#: Seconds that a line waits for whoever reads, where something else must not.
PATIENCE = 0.5
#: What takes a terminal back to an empty line.
CLEARED = "\r\x1b[K"


def take_places() -> None:
    """Open what is closed of standard input, output and error: the next connection would get its number.

    A library's message would then be written into the migration.
    """
    for fd, lines in ((0, None), (1, stdout), (2, stderr)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            if lines is not None:
                lines.closed = True


class Lines:
    """One of the two."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.closed = False
        self.name = name
        self._lock = threading.Lock()
        self._waits = True
        self._dropped = 0
        self._unfinished = False

    def write(self, lines: Sequence[str]) -> None:
        """Each wholly, whatever time that takes.  Raises HostError where it cannot be written."""
        data = "".join(f"{escaped(line)}\n" for line in lines).encode(errors="backslashreplace")
        with os_errors(self.name):
            if self.closed:
                raise HostError(f"{self.name} is closed")
            while data:
                data = data[os.write(self.fd, data) :]

    def offer(self, data: bytes, *, unfinished: bool = False) -> None:
        """A line in one piece, shorter than PIPE_BUF; dropped where nobody reads for PATIENCE seconds.

        One that is `unfinished`, on a terminal, gives way to the next.

        Raises OSError where it is dropped, or cannot be written.
        """
        with self._lock:
            poll = select.poll()
            poll.register(self.fd, select.POLLOUT)
            if self.closed or not poll.poll(PATIENCE * 1000 if self._waits else 0):
                self._waits = False
                self._dropped += 1
                raise system_error(errno.EAGAIN)
            if self._dropped and not self._waits:
                data = f"multifd: {self._dropped} lines were dropped, nobody read them\n".encode() + data
            if self._unfinished and not unfinished:
                data = CLEARED.encode() + data
            self._waits, self._dropped, self._unfinished = True, 0, unfinished
            os.write(self.fd, data)


stdout = Lines(1, "standard output")
stderr = Lines(2, "standard error")
