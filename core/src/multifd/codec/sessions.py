"""One channel in one direction, as each of its compressors has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from multifd.codec.compressor import Compressor
from multifd.codec.contract import counts_fault
from multifd.codec.settings import Settings
from multifd.hookspecs import Channel
from multifd.log import log


class Sessions:
    """A compressor is set up at its first packet and cleaned up at the end; one thread's.

    Where packets of several methods share a channel, each compressor's stream goes on over the others' packets.
    """

    def __init__(self, direction: str, number: int) -> None:
        """`direction` is `send` or `recv`."""
        self._direction = direction
        self._number = number
        self._channels: dict[Compressor, Channel] = {}

    def get(
        self,
        compressor: Compressor,
        settings: Settings,
        page_size: int,
        *,
        live: bool = False,
        read_into: Callable[[memoryview], None] | None = None,
    ) -> Channel:
        """The compressor's view of this channel, set up.  Raises CompressorError."""
        channel = self._channels.get(compressor)
        if channel is None:
            channel = compressor.channel(self._number, page_size, settings, live=live)
            if read_into is not None:
                channel.bind(read_into)
            self._channels[compressor] = channel  # first: after a set-up that failed, too, it is cleaned up
            compressor.call(f"multifd_{self._direction}_setup", channel=channel)
        return channel

    @property
    def counts(self) -> Counter[str]:
        """What the compressors counted, but for what cannot be a count."""
        total: Counter[str] = Counter()
        for compressor, channel in list(self._channels.items()):
            counts = dict(channel.counts) if isinstance(channel.counts, dict) else channel.counts
            if fault := counts_fault(counts):
                log.warning(f"{compressor}: {fault}")
            else:
                total.update(counts)
        return total

    def close(self) -> None:
        """Clean the compressors up."""
        for compressor, channel in self._channels.items():
            compressor.cleanup(self._direction, channel)
