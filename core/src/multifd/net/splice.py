"""Payloads passed from one connection to another as they are."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from multifd.net.connection import Connection, Ended, Readable
from multifd.net.socket import SocketConnection
from multifd.wire.flags import MAX_PAYLOAD


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
