"""One channel in one direction: its time by stages, and what passes shown to those who look on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from multifd.net.connection import Connection, Readable
from multifd.observe.hooks import ObservedChannel, Times
from multifd.wire.packet import Buffer, RamPacket


class Clock:
    """Where one channel's time goes: each lap is counted to a stage; one thread's."""

    __slots__ = ("_since", "seconds")

    def __init__(self, stages: Iterable[str]) -> None:
        self.seconds = dict.fromkeys(stages, 0.0)
        self._since = 0.0

    def restart(self) -> None:
        """What passed since the last lap counts to no stage."""
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap to a stage."""
        now = time.perf_counter()
        self.seconds[stage] += now - self._since
        self._since = now

    def count(self, stage: str, seconds: float) -> None:
        """Count so much of the time since the last lap to a stage."""
        self.seconds[stage] += seconds
        self._since += seconds


class _NoClock(Clock):
    """For whom nobody asks."""

    __slots__ = ()

    def restart(self) -> None:
        pass

    def lap(self, stage: str) -> None:
        pass

    def count(self, stage: str, seconds: float) -> None:
        pass


class Watch:
    """As the engines tell of a channel; this one for when nobody looks on."""

    def __init__(self, clock: Clock | None = None) -> None:
        """`clock` counts for somebody else, too."""
        self.clock = _NoClock(()) if clock is None else clock

    def begin(self, page_size: int) -> None:  # noqa: ARG002
        """The first packet is waited for."""
        self.clock.restart()

    def tee(self, connection: Readable) -> Readable:
        """Where payloads are to be read from, so that they are seen."""
        return connection

    def payload(self) -> Sequence[Buffer]:
        """What was read through `tee` since the last packet."""
        return ()

    def packet(self, packet: RamPacket, header: Buffer, payload: Sequence[Buffer] | None = None) -> None:
        """A packet has passed, its payload is what `tee` saw unless given.  What observers take is nobody's stage."""


#: Shows a packet to those who look on: as `hooks.multifd_observe_packet`.
Show = Callable[[ObservedChannel, RamPacket, memoryview, Sequence[memoryview], Times], None]


class Watching(Watch):
    """A channel that is shown; owned by its thread."""

    def __init__(self, show: Show, channel: ObservedChannel, stages: Sequence[str], clock: Clock) -> None:
        """`stages` are those of `clock` that are this direction's."""
        super().__init__(clock)
        self._show = show
        self._channel = channel
        self._before = dict.fromkeys(stages, 0.0)
        self._read = 0.0
        self._pieces: list[bytes] = []

    def begin(self, page_size: int) -> None:
        super().begin(page_size)
        self._channel = replace(self._channel, page_size=page_size)

    def tee(self, connection: Readable) -> Readable:
        return _Tee(connection, self)

    def payload(self) -> Sequence[Buffer]:
        return self._pieces

    def read(self, seconds: float, piece: bytes) -> None:
        """A piece of a payload has come."""
        self._read += seconds
        self._pieces.append(piece)

    def packet(self, packet: RamPacket, header: Buffer, payload: Sequence[Buffer] | None = None) -> None:
        now = {stage: self.clock.seconds[stage] for stage in self._before}
        spent = {stage: now[stage] - before for stage, before in self._before.items()}
        self._before = now
        if self._read:
            # It was read inside of these; where payloads pass as they are, nothing decodes.
            spent["decode" if spent["decode"] else "wait"] -= self._read
            spent["read"] = self._read
        views = tuple(memoryview(piece).toreadonly() for piece in (self._pieces if payload is None else payload))
        head = memoryview(header).toreadonly()
        self._show(self._channel, packet, head, views, Times(**spent))
        self._read = 0.0
        self._pieces = []
        self.clock.restart()


class _Tee:
    """Reads a payload for its compressor, and keeps a copy."""

    def __init__(self, connection: Readable, watch: Watching) -> None:
        self._connection = connection
        self._watch = watch

    def read_into(self, view: memoryview, *, at_least: int | None = None, due: bool = False) -> int:
        since = time.perf_counter()
        count = self._connection.read_into(view, at_least=at_least, due=due)
        self._watch.read(time.perf_counter() - since, bytes(view[:count]))
        return count


class WatchedMain:
    """A main channel whose bytes are shown; everything else is the connection's own."""

    def __init__(self, connection: Connection, show: Callable[[str, Buffer], None], read: str, written: str) -> None:
        """`show` is given a direction and its bytes."""
        self._connection = connection
        self._show = show
        self._directions = read, written

    def read_some(self, limit: int, *, due: bool = False) -> bytes:
        data = self._connection.read_some(limit, due=due)
        if data:
            self._show(self._directions[0], data)
        return data

    def write(self, buffers: Sequence[Buffer]) -> None:
        self._connection.write(buffers)
        for buffer in buffers:
            self._show(self._directions[1], buffer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)
