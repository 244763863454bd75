"""What packets hold, added up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from multifd.wire.packet import RamPacket


@dataclass(slots=True)
class Counts:
    """Packets, SYNC included, and the pages in them; one thread's, read by others."""

    packets: int = 0
    normal_pages: int = 0
    zero_pages: int = 0

    def add(self, packet: RamPacket) -> None:
        """One more packet."""
        self.packets += 1
        self.normal_pages += len(packet.normal)
        self.zero_pages += len(packet.zero)

    @property
    def pages(self) -> int:
        """Normal and zero pages."""
        return self.normal_pages + self.zero_pages

    @classmethod
    def total(cls, counts: Iterable[Counts]) -> Counts:
        """Those of several channels together."""
        total = cls()
        for each in counts:
            total.packets += each.packets
            total.normal_pages += each.normal_pages
            total.zero_pages += each.zero_pages
        return total
