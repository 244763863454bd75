"""One channel's payloads, read."""

from __future__ import annotations

from collections import Counter

from multifd.codec.compressor import Compressor
from multifd.codec.readers import Readers
from multifd.codec.sessions import Sessions
from multifd.errors import PeerError
from multifd.hookspecs import Channel
from multifd.net.connection import Ended, Readable
from multifd.wire.flags import MAX_PAYLOAD
from multifd.wire.packet import RamPacket


class Decoder:
    """One channel's payloads, each read by the compressor that its packet's flag says."""

    def __init__(self, number: int, connection: Readable, readers: Readers) -> None:
        self._connection = connection
        self._readers = readers
        self._sessions = Sessions("recv", number)
        self._by_flag: dict[int, tuple[Compressor, Channel]] = {}
        self._unread = 0

    def decode(self, packet: RamPacket, pages: memoryview, page_size: int) -> None:
        """Read the packet's payload and fill `pages`, its normal pages.

        Raises PeerError, CompressorError, HostError.
        """
        if not 0 < packet.next_packet_size <= MAX_PAYLOAD:
            raise PeerError(
                f"packet {packet.packet_num}: a payload of {packet.next_packet_size} bytes for "
                f"{len(packet.normal)} pages; 1 to {MAX_PAYLOAD} are allowed"
            )
        compressor, channel = self._by_flag.get(packet.method) or self.begin(packet.method, page_size)
        channel.next_packet_size = self._unread = packet.next_packet_size
        compressor.decode(channel, pages, f"packet {packet.packet_num}")
        if self._unread:
            raise PeerError(
                f"packet {packet.packet_num}: {self._unread} of {packet.next_packet_size} payload bytes are left over"
            )

    def begin(self, flag: int, page_size: int) -> tuple[Compressor, Channel]:
        """Load and set up the compressor of a method, as its first packet does.  Raises HostError, CompressorError."""
        compressor, settings = self._readers.get(flag)
        channel = self._sessions.get(compressor, settings, page_size, read_into=self._read_into)
        self._by_flag[flag] = compressor, channel
        return compressor, channel

    def _read_into(self, wanted: memoryview) -> None:
        if len(wanted) > self._unread:
            raise ValueError(f"read_into of {len(wanted)} bytes, {self._unread} are left of this payload")
        self._unread -= len(wanted)
        try:
            self._connection.read_into(wanted, due=True)
        except Ended as ended:
            raise Ended(f"inside a payload, {ended}") from None

    @property
    def statistics(self) -> Counter[str]:
        """What the compressors counted."""
        return self._sessions.counts

    def close(self) -> None:
        """Clean the compressors up."""
        self._sessions.close()
