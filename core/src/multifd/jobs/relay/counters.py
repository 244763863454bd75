"""What a relay counts, and the text in which Prometheus reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Sample(NamedTuple):
    """What a counter counts: its name, and its labels with their values."""

    name: str
    labels: tuple[tuple[str, str], ...]


#: Where a channel's time goes: waiting for a packet and its header, its payload read and decoded, encoded, written.
STAGES = ("wait", "decode", "encode", "write")


def added(total: dict[Sample, float], more: dict[Sample, float]) -> dict[Sample, float]:
    """Both together."""
    return total | {sample: total.get(sample, 0.0) + count for sample, count in more.items()}


PREFIX = "multifd_relay"
#: Per name: its type, its name there, and what it says.
NAMES = {
    "active": ("gauge", "active", "1 while a migration is under way"),
    "migrations": ("counter", "migrations_total", "Migrations that have ended"),
    "bytes": ("counter", "bytes_total", "Bytes of the connections, in from the source and out to the destination"),
    "memory_bytes": ("counter", "memory_bytes_total", "Bytes of the guest's pages, zero pages with them"),
    "packets": ("counter", "packets_total", "Packets"),
    "pages": ("counter", "pages_total", "Pages in the packets that left"),
    "stage_seconds": ("counter", "stage_seconds_total", "Seconds per stage: wait, decode, encode, write"),
    "ratio": ("gauge", "ratio", "Bytes of pages per byte to the destination"),
}


def text(counters: Mapping[Sample, float]) -> str:
    """The counters of `Relay.counters`, with the ratio of each channel."""
    samples = dict(counters)
    for (name, labels), memory in counters.items():
        if name == "memory_bytes":
            out = counters.get(Sample("bytes", (("direction", "out"), *labels)))
            if out:
                samples[Sample("ratio", labels)] = memory / out
    lines = []
    for name, (kind, full, meaning) in NAMES.items():
        lines += [f"# HELP {PREFIX}_{full} {meaning}", f"# TYPE {PREFIX}_{full} {kind}"]
        for (own, labels), value in sorted(samples.items()):
            if own == name:
                inside = ",".join(f'{label}="{said}"' for label, said in labels)
                lines.append(f"{PREFIX}_{full}{f'{{{inside}}}' if inside else ''} {value:.15g}")
    return "\n".join(lines) + "\n"
