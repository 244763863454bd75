"""Packets on their way out, of `send` and `relay`: parted into normal and zero pages, encoded, packed, written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from multifd.engine.encoder import Encoder
from multifd.memory.zeropages import part
from multifd.net.connection import Connection
from multifd.observe.watch import Watch
from multifd.wire.counts import Counts
from multifd.wire.packet import Buffer, RamPacket


class PacketWriter:
    """One channel's packets, written; one thread's."""

    def __init__(
        self, connection: Connection, encoder: Encoder, watch: Watch, numbers: Iterator[int] | None = None
    ) -> None:
        """`numbers` are the packets', in the order of all channels' writing; without, each keeps its own."""
        self.counts = Counts()
        self.encoder = encoder
        self.watch = watch
        self._connection = connection
        self._numbers = numbers
        self._size = encoder.page_size

    def part(self, packet: RamPacket, pages: memoryview) -> tuple[RamPacket, list[memoryview]]:
        """The packet with the zero pages found that are among `pages`, its normal ones; and runs of the others."""
        runs, normal, zero = part(pages, self._size, packet.normal)
        return (replace(packet, normal=normal, zero=packet.zero + zero) if zero else packet), runs

    def write(self, packet: RamPacket, runs: Sequence[memoryview] = ()) -> None:
        """Write a packet whose normal pages are in `runs`, in this order; its method and payload size are set here.

        Raises CompressorError, Lost, Stalled, HostError.
        """
        watch = self.watch
        payload: Sequence[Buffer] = ()
        if runs:
            payload = self.encoder.encode(runs)
            watch.clock.lap("encode")
        packet = RamPacket(
            self.encoder.flag if packet.normal or packet.zero else 0,
            packet.sync,
            packet.packet_num if self._numbers is None else next(self._numbers),
            packet.ramblock,
            packet.normal,
            packet.zero,
            sum(map(len, payload)),
            packet.room,
        )
        header = packet.pack(self._size)
        self._connection.write([header, *payload])
        watch.clock.lap("write")
        watch.packet(packet, header, payload)
        self.counts.add(packet)

    def close(self) -> None:
        """Clean the compressors up."""
        self.encoder.close()
