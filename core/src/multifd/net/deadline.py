"""How long a wait may be."""

from __future__ import annotations

import time
from collections.abc import Callable

from multifd.errors import Cancelled
from multifd.net.connection import Stalled


class Silence:
    """How long all connections of one migration may be silent.

    `timeout` counts only while the peer is due to do something (`awaited`: a SYNC that others
    have reached, room in its buffers, its confirmation); `idle_timeout` counts always, None is
    for ever.  Both are seconds without one byte on any connection: read, written, or taken by the peer of what was
    written before.
    """

    def __init__(self, timeout: float, idle_timeout: float | None = None) -> None:
        self.timeout = timeout
        self.idle_timeout = idle_timeout
        self.awaited = False
        self.last = time.monotonic()
        self._cancelled = False
        self._queues: list[Callable[[], int]] = []
        self._queued = 0

    @property
    def interval(self) -> float:
        """How often a blocked thread has to look at `check`.

        Often within the timeout: bytes that trickle into a call that waits for all of them are seen when it looks.
        """
        return min(self.timeout / 8, (self.idle_timeout or self.timeout) / 8, MOST_BLIND)

    def include(self, queue: Callable[[], int]) -> None:
        """One more connection: `queue` tells the bytes that its peer has not taken yet."""
        self._queues.append(queue)

    def cancel(self) -> None:
        """Whoever waits gives up at its next look; from any thread."""
        self._cancelled = True

    def lasted(self, seconds: float) -> bool:
        """Whether nothing has moved for so long."""
        return time.monotonic() - self.last >= seconds

    def check(self, doing: str, awaited: bool) -> None:
        """Raises Stalled where the silence has lasted too long, Cancelled where it was cancelled."""
        if self._cancelled:
            raise Cancelled(f"{doing}: given up")
        queued = sum(queue() for queue in self._queues)
        if queued != self._queued:
            self._queued = queued
            self.last = time.monotonic()
        silent = time.monotonic() - self.last
        # The kernel's timer may fire a little early.
        if awaited and silent >= self.timeout * 0.99:
            raise Stalled(f"{doing}: nothing moved for {self.timeout:g} s (--timeout)")
        if self.idle_timeout is not None and silent >= self.idle_timeout * 0.99:
            raise Stalled(f"{doing}: nothing came for {self.idle_timeout:g} s (--idle-timeout)")


#: Seconds; QEMU itself waits for ever.
DEFAULT_TIMEOUT = 30.0
FOREVER = 1e9
#: How late a thread that blocks notices that it is to give up, seconds.
MOST_BLIND = 0.2
#: Seconds that a source may take to close its connections once it has its answer or has ended, and that those of one
#: which has gone may still be on their way.
LETTING_GO = 1.0
