"""What every compressor costs and gains on one's own memory, and which one to migrate with.

Packets spread evenly over an image go through each setting's two ends, in one thread and in
memory, and what is decoded is compared with what was encoded.  A migration is modelled as

    seconds = max(encode CPU / cores, decode CPU / cores, wire bytes / link)

and nothing else: source, link and destination work at the same time, so the slowest decides; the
guest writes nothing meanwhile; pages come from memory and go to memory.  Both ends are multifd's.
CPU time is the thread's, as machines are shared; a device's work is none, so the wall clock tells
its time.  MB and GB are 10^6 and 10^9 bytes of normal pages, bandwidths bits per second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from multifd.wire.flags import PACKET_SIZE
from multifd.wire.packet import header_length

MODEL = "seconds = max(encode CPU / cores, decode CPU / cores, wire bytes / link)"
#: Bits per second of the links that a recommendation is made for where none is named.
LINKS = (1e8, 1e9, 1e10, 2.5e10, 1e11)
#: Times that differ by less are the same, and the one with less CPU time is better.
TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class Row:
    """One setting, measured; or a compressor that could not be, with the `reason` and nothing else.

    A speed is that of one core, or of one channel of a device, in MB of normal pages per second.
    CPU seconds are for a GB of them.  `sampled_bytes` of them were encoded and decoded.
    """

    compressor: str
    level: int | None = None
    sampled_bytes: int = 0
    encode_mb_per_s: float = 0.0
    decode_mb_per_s: float = 0.0
    ratio: float = 0.0
    encode_cpu_s_per_gb: float = 0.0
    decode_cpu_s_per_gb: float = 0.0
    reason: str = ""

    @property
    def text(self) -> str:
        """As `--compressor` takes it."""
        return self.compressor if self.level is None else f"{self.compressor},level={self.level}"


@dataclass(frozen=True, slots=True)
class Bench:
    """All settings on one image, of which `looked_bytes` were looked at, `zero_bytes` of them zero pages."""

    path: Path
    page_size: int
    cores: int
    memory_bytes: int
    looked_bytes: int
    zero_bytes: int
    sampled_bytes: int
    sampled_packets: int
    rows: tuple[Row, ...]

    @property
    def normal_bytes(self) -> float:
        """Normal pages of the whole image; estimated where not all of it was looked at."""
        return self.memory_bytes * self.sampled_bytes / self.looked_bytes

    @property
    def measured(self) -> list[Row]:
        """The rows that are more than a reason."""
        return [row for row in self.rows if row.sampled_bytes]

    @property
    def none(self) -> Row:
        """The row that all others are compared with."""
        return next(row for row in self.rows if row.compressor == "none")

    def wire_bytes(self, row: Row) -> float:
        """Payloads and packet headers of the whole image."""
        headers = self.memory_bytes / PACKET_SIZE * header_length(self.page_size)
        return self.normal_bytes / row.ratio + headers

    def busy_seconds(self, row: Row) -> float:
        """What the slower of the two sides takes to encode or decode it all with its cores."""
        return self.normal_bytes / 1e6 / min(row.encode_mb_per_s, row.decode_mb_per_s) / self.cores

    def seconds(self, row: Row, link: float) -> float:
        """The time of a migration with this setting over a link of so many bits per second: the model."""
        return max(self.busy_seconds(row), self.wire_bytes(row) * 8 / link)

    def pays_below(self, row: Row) -> float:
        """Bits per second of the link below which this takes less time than none; 0 where it never does."""
        if self.wire_bytes(row) >= self.wire_bytes(self.none):
            return 0.0
        return self.wire_bytes(self.none) * 8 / max(self.busy_seconds(row), self.busy_seconds(self.none))

    def recommend(self, link: float) -> Row:
        """The setting with the least time; of those as good as the best, the one with the least CPU time."""
        best = min(self.seconds(row, link) for row in self.measured)
        good = [row for row in self.measured if self.seconds(row, link) <= best * (1 + TOLERANCE)]
        return min(good, key=lambda row: row.encode_cpu_s_per_gb + row.decode_cpu_s_per_gb)

    def report(self, links: Sequence[float]) -> dict[str, Any]:
        """All of it as a JSON-ready object."""
        return {
            "image": str(self.path),
            "page_size": self.page_size,
            "memory_bytes": self.memory_bytes,
            "looked_bytes": self.looked_bytes,
            "zero_bytes": self.zero_bytes,
            "sampled_bytes": self.sampled_bytes,
            "sampled_packets": self.sampled_packets,
            "cores": self.cores,
            "model": MODEL,
            "settings": [self._row(row) for row in self.rows],
            "links": [
                {
                    "link_bit_per_s": link,
                    "recommended": (best := self.recommend(link)).text,
                    "seconds": self.seconds(best, link),
                    "none_seconds": self.seconds(self.none, link),
                }
                for link in links
            ],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        if not row.sampled_bytes:
            return {"setting": row.text, "compressor": row.compressor, "level": row.level, "reason": row.reason}
        return {"setting": row.text, **asdict(row), "pays_below_bit_per_s": self.pays_below(row)}


def bandwidth(bits: float) -> str:
    """Bits per second for people: three digits and a unit."""
    for unit in ("bit/s", "kbit/s", "Mbit/s", "Gbit/s"):
        if bits < 999.5:
            return f"{bits:.3g} {unit}"
        bits /= 1000
    return f"{bits:.4g} Tbit/s"
