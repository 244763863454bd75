"""Sources that cannot be served, let go so that they can migrate again.

A QEMU (7.2 and 10.0 were seen to) waits for ever, or aborts, where a multifd channel fails while it is at a SYNC, as
during its set-up: another channel's thread then ends without telling that the SYNC is done.  Where only its main
channel fails, and its multifd channels are read until it closes them itself, its migration is `failed` within 0.1 s.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterable

from multifd.errors import os_errors
from multifd.net.socket import SocketConnection

#: Seconds that a source is given at most to close its channels once its main channel is reset; QEMU takes 0.12 at most,
#: on busy processors too.
MOST = 1.0
#: So many channels are held at most.
MOST_CHANNELS = 255


class Parting:
    """Multifd channels that nobody takes: what comes is thrown away, until their source closes them."""

    def __init__(self) -> None:
        """Raises HostError where there is no descriptor left for it."""
        with os_errors("letting connections go"):
            self._poll = select.epoll()
        self._left: dict[int, tuple[SocketConnection, float]] = {}

    def fileno(self) -> int:
        """What can be polled: readable where there is something to do."""
        return self._poll.fileno()

    def __bool__(self) -> bool:
        return bool(self._left)

    def add(self, connections: Iterable[SocketConnection]) -> None:
        """These are read here from now on, and closed; their main channel has been reset."""
        until = time.monotonic() + MOST
        for connection in connections:
            number = connection.fileno()
            if number < 0 or len(self._left) >= MOST_CHANNELS:
                connection.close()
            else:
                self._left[number] = connection, until
                self._poll.register(number, select.EPOLLIN)

    def step(self, seconds: float = 0.0) -> None:
        """Read what is here, and wait so long for that."""
        heard = {number for number, _ in self._poll.poll(seconds)}
        now = time.monotonic()
        for number, (connection, until) in list(self._left.items()):
            if (number in heard and not connection.discard()) or now >= until:
                self._poll.unregister(number)
                del self._left[number]
                connection.close()

    def wait(self, seconds: float) -> None:
        """Until all are closed by their source; so long at most, or MOST."""
        deadline = time.monotonic() + min(seconds, MOST)
        while self._left and (left := deadline - time.monotonic()) > 0:
            self.step(left)

    def close(self) -> None:
        """Close those that are left."""
        self._poll.close()
        for connection, _ in self._left.values():
            connection.close()
        self._left.clear()
