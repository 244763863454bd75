"""How many bytes a second go to a destination, over all connections of a migration together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from multifd.errors import UsageError
from multifd.net.deadline import Silence
from multifd.wire.packet import Buffer

#: Seconds that may be caught up on: of a thread that was woken late, or of a moment in which nobody wrote.
CATCH_UP = 0.25
#: What is written at once is of so many seconds at most, so that the other side hears something now and then, but of so
#: many bytes at least.
STEP = 0.1
LEAST = 512


class Rate:
    """Says when the next bytes may go; any thread may ask.  Nobody holds its lock while waiting."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`limit` is in bytes per second.  Raises UsageError for none."""
        if limit < 1:
            raise UsageError(f"a rate of {limit} bytes per second: nothing would ever go")
        self._limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        # Guarded by the lock: when all that was asked for has gone.
        self._gone = clock()
        #: How many bytes may be asked for at once.
        self.step = max(LEAST, int(limit * STEP))

    def wait(self, count: int) -> float:
        """Seconds after which `count` bytes may go.  Whoever asks first goes first."""
        with self._lock:
            now = self._clock()
            begins = max(self._gone, now - CATCH_UP)
            self._gone = begins + count / self._limit
            return max(0.0, begins - now)


class Pace:
    """One connection's share of a rate; its writing thread's, but for `interrupt`."""

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._interrupted = threading.Event()

    def next_step(self, count: int, silence: Silence) -> int:
        """Wait until some of `count` bytes may be written; returns how many.

        That is no silence: the other side has nothing to answer for.  Raises Cancelled.
        """
        step = min(count, self._rate.step)
        until = time.monotonic() + self._rate.wait(step)
        while (left := until - time.monotonic()) > 0:
            silence.last = time.monotonic()
            if self._interrupted.wait(min(left, silence.interval)):
                break
            silence.check("waiting for what --rate allows", awaited=False)
        silence.last = time.monotonic()
        return step

    def steps(self, buffers: Sequence[Buffer], silence: Silence) -> Iterator[Sequence[Buffer]]:
        """The buffers in pieces, each when it may be written.  Raises Cancelled."""
        left = sum(map(len, buffers))
        pending = [memoryview(buffer) for buffer in buffers]
        while left:
            step = self.next_step(left, silence)
            left -= step
            piece: list[Buffer] = []
            while step:
                piece.append(pending[0][:step])
                pending[0] = pending[0][step:]
                step -= len(piece[-1])
                if not pending[0]:
                    del pending[0]
            yield piece

    def interrupt(self) -> None:
        """From any thread: nobody waits any more."""
        self._interrupted.set()
