"""One channel's payloads, made."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from multifd.codec.sessions import Sessions
from multifd.effort.controller import Effort, Rung
from multifd.hookspecs import Channel
from multifd.wire.packet import Buffer


class Encoder:
    """One channel's payloads, each made by the compressor and level that the effort says."""

    def __init__(self, number: int, page_size: int, effort: Effort) -> None:
        effort.join()
        self.page_size = page_size
        self._effort = effort
        self._sessions = Sessions("send", number)
        self._ended = 0.0
        #: The method's number of the last payload, or of the first.
        self.flag = effort.now.compressor.facts.flag

    def set_up(self) -> None:
        """In the thread that encodes.  Raises CompressorError."""
        self._channel(self._effort.now)
        self._ended = time.thread_time()

    def _channel(self, rung: Rung) -> Channel:
        return self._sessions.get(rung.compressor, rung.settings, self.page_size, live=self._effort.ladder)

    def encode(self, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        """A packet's payload, valid until the next call.  Raises CompressorError."""
        effort = self._effort
        if not effort.ladder:
            return effort.now.compressor.encode(self._channel(effort.now), pages)
        rung = effort.choose(pages, self.page_size)
        channel = self._channel(rung)
        channel.level = rung.settings.level
        length = sum(map(len, pages))
        started = time.thread_time()
        payload = rung.compressor.encode(channel, pages)
        ended = time.thread_time()
        self.flag = rung.compressor.facts.flag
        size = sum(map(len, payload))
        effort.note(rung.compressor, channel.level, length, size, ended - started, started - self._ended)
        self._ended = ended
        return payload

    def idle(self, seconds: float) -> None:
        """A packet without payload took so long."""
        if self._effort.ladder:
            self._effort.idle(seconds)
            self._ended = time.thread_time()

    @property
    def statistics(self) -> Counter[str]:
        """What the compressors counted."""
        return self._sessions.counts

    def close(self) -> None:
        """Clean the compressors up."""
        self._sessions.close()
