"""A stream of bytes with one peer, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from multifd.errors import HostError, PeerError
from multifd.net.wake import Wake
from multifd.wire.packet import Buffer


class Ended(PeerError):
    """The other side closed the connection; `got` bytes of what was asked for had come."""

    def __init__(self, message: str, got: int = 0) -> None:
        super().__init__(message)
        self.got = got


class Stalled(PeerError):
    """Nothing moved for too long."""


class Lost(HostError):
    """The other side closed the connection while we wrote to it."""


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

    def ready(self, wake: Wake) -> bool:
        """Wait until a byte or the end can be read; False where neither is here and `wake` is set."""

    def read_some(self, limit: int, *, due: bool = False) -> bytes:
        """At least one byte, at most `limit`; empty at the end of the stream."""

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Write all of the buffers, gathered.  Raises Lost where the other side closed."""

    def interrupt(self, *, reading_only: bool = False) -> None:
        """Wake whoever is blocked here, for good: reads then end, writes fail."""

    def close(self) -> None:
        """Safe to call twice."""


#: Bytes of the main channel read at once.
MAIN_READ = 256 * 1024
