"""Bytes that come in any pieces, taken one after another; no I/O.

What takes is a coroutine: it yields None where more bytes are needed, and goes on when they have been fed.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from typing import Any

from multifd.errors import PeerError

Waits = Generator[None, None, None]


class Unsupported(PeerError):
    """A migration, but of a kind that cannot be taken: the source's settings or devices have to change."""


class Cursor:
    """A place in a main channel; `inside` says that the bytes so far end inside something, so that more is due.

    `buffer` holds what has been fed and not been let go, `position` is the place in it.
    """

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.position = 0
        self.inside = True
        self._before = 0
        self._kept: bytearray | None = None

    @property
    def offset(self) -> int:
        """Bytes of the stream before this place."""
        return self._before + self.position

    @property
    def fed(self) -> int:
        """Bytes of the stream so far."""
        return self._before + len(self.buffer)

    def feed(self, data: bytes) -> None:
        """Add bytes."""
        if self.position:
            del self.buffer[: self.position]
            self._before += self.position
            self.position = 0
        self.buffer += data

    def rest(self) -> bytes:
        """All that is here, taken."""
        data = bytes(self.buffer[self.position :])
        self.position = len(self.buffer)
        return data

    def take(self, count: int) -> Generator[None, None, bytes]:
        """The next `count` bytes."""
        while len(self.buffer) - self.position < count:
            yield None
        start = self.position
        self.position += count
        data = bytes(self.buffer[start : self.position])
        if self._kept is not None:
            self._kept += data
        return data

    def unpack(self, layout: struct.Struct) -> Generator[None, None, tuple[Any, ...]]:
        """What lies here in this layout."""
        data = yield from self.take(layout.size)
        return layout.unpack(data)

    def number(self, layout: struct.Struct) -> Generator[None, None, int]:
        """One number."""
        (number,) = yield from self.unpack(layout)
        return int(number)

    def byte(self) -> Generator[None, None, int]:
        """One byte."""
        data = yield from self.take(1)
        return data[0]

    def kind(self) -> Generator[None, None, int]:
        """The byte that opens the next part: a source may be silent before it."""
        self.inside = False
        kind = yield from self.byte()
        self.inside = True
        return kind

    def name(self) -> Generator[None, None, str]:
        """A name behind its length."""
        length = yield from self.byte()
        data = yield from self.take(length)
        return data.decode("ascii", "backslashreplace")

    def keep(self, first: bytes) -> None:
        """Keep what is taken from here on, behind these bytes, for `kept`."""
        self._kept = bytearray(first)

    def kept(self) -> bytes:
        """What was taken since `keep`, or since the last call."""
        kept = bytes(self._kept or b"")
        if self._kept is not None:
            self._kept.clear()
        return kept

    def keep_no_more(self) -> None:
        """Only what is taken."""
        self._kept = None

    def wrong(self, text: str, kind: type[PeerError] = PeerError) -> PeerError:
        """What is wrong here, to be raised."""
        return kind(f"at byte {self.offset}: {text}")
