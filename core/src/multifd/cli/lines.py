"""Standard output and standard error, as whole lines: each may be full, closed, or read by nobody."""

from __future__ import annotations

import errno
import math
import os
import select
import threading
import time
from collections.abc import Sequence

from multifd.errors import HostError, os_errors, system_error
from multifd.log import escaped

#: Seconds that a line waits for whoever reads, where something else must not.
PATIENCE = 0.5
#: Seconds until a pipe that has room for less is tried again.
AGAIN = 0.01
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
        self._cut = False
        self._unfinished = False

    def write(self, lines: Sequence[str]) -> None:
        """Each wholly, whatever time that takes.  Raises HostError where it cannot be written."""
        if self.closed:
            raise HostError(f"{self.name} is closed")
        with os_errors(self.name):
            self._put("".join(f"{escaped(line)}\n" for line in lines), math.inf)

    def offer(self, text: str, *, unfinished: bool = False) -> None:
        """A line, given up where nobody reads for PATIENCE seconds, and for the next one at once.

        It is written in one piece where it has at most PIPE_BUF bytes.  One that is `unfinished`, on a terminal, gives
        way to the next.  Raises OSError.
        """
        with self._lock:
            if self.closed:
                raise system_error(errno.EBADF)
            cleared = CLEARED if self._unfinished else ""
            text = f"{CLEARED}{text}" if unfinished else f"{cleared}{text}\n" if text else cleared
            began = time.monotonic()
            try:
                self._put("\n" * self._cut + text, began + PATIENCE * self._waits)
            except BlockingIOError:
                self._waits = False
                raise
            self._waits, self._unfinished = True, unfinished

    def _put(self, text: str, until: float) -> None:
        """Raises OSError, BlockingIOError where it takes longer; then the line may be cut, which the next one ends."""
        data = text.encode(errors="backslashreplace")
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        begun = False
        try:
            while data:
                if not poll.poll(None if until == math.inf else max(0.0, until - time.monotonic()) * 1000):
                    raise system_error(errno.EAGAIN)
                try:
                    count = os.write(self.fd, data[: select.PIPE_BUF])
                except BlockingIOError:  # there is room for less
                    if time.monotonic() >= until:
                        raise
                    time.sleep(AGAIN)
                    continue
                data, begun = data[count:], True
        finally:
            self._cut = bool(data) and (begun or self._cut)


stdout = Lines(1, "standard output")
stderr = Lines(2, "standard error")
