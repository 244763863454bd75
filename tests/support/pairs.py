"""A compressor's hooks called without a migration around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from multifd.codec.compressor import Compressor
from multifd.codec.selection import load
from multifd.hookspecs import Channel
from multifd.testing.harness import Receiver

PAGE = 4096


class Pair:
    """A sending and a receiving channel of one compressor, joined by memory."""

    def __init__(self, name: str, settings: Mapping[str, str] = {}, *, page_size: int = PAGE, number: int = 0) -> None:
        self.compressor = load(name)
        self.sender = self.compressor.channel(number, page_size, self.compressor.settings(settings, sending=True))
        self.receiver = self.compressor.channel(number, page_size, self.compressor.settings(settings, sending=False))
        self.compressor.hook.multifd_send_setup(channel=self.sender)
        self.compressor.hook.multifd_recv_setup(channel=self.receiver)

    def encode(self, runs: Sequence[bytes]) -> bytes:
        pages = [memoryview(run).toreadonly() for run in runs]
        return b"".join(self.compressor.hook.multifd_send_prepare(channel=self.sender, pages=pages))

    def decode(self, payload: bytes, length: int) -> bytes:
        return decode(self.compressor, self.receiver, payload, length)

    def close(self) -> None:
        for _ in range(2):
            self.compressor.cleanup("send", self.sender)
            self.compressor.cleanup("recv", self.receiver)

    @property
    def counts(self) -> Counter[str]:
        """Both directions' packets by their way."""
        return Counter(self.sender.counts) + Counter(self.receiver.counts)


def decode(compressor: Compressor, channel: Channel, payload: bytes, length: int) -> bytes:
    """One payload through `multifd_recv`, which must read all of it."""
    pages = memoryview(bytearray(b"\xaa" * length))
    assert not Receiver(compressor, channel).recv(payload, pages)
    return bytes(pages)
