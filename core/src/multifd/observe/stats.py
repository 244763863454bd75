"""The observer `stats`: what went through, and where its time went, per channel and method.

`--observe stats[=FILE]`: one line of JSON per migration, added to FILE, or on standard error.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from multifd.codec.naming import learn
from multifd.hookspecs import hookimpl
from multifd.observe.hooks import ObservedChannel, Times
from multifd.wire.counts import Counts
from multifd.wire.flags import method_name
from multifd.wire.packet import RamPacket


@dataclass(slots=True)
class _Row:
    """Packets of one method on one channel in one direction."""

    counts: Counts = field(default_factory=Counts)
    memory_bytes: int = 0
    wire_bytes: int = 0
    codec: float = 0.0
    wire: float = 0.0
    wait: float = 0.0


class Stats:
    """Counts; the rows of a channel belong to its thread."""

    def __init__(self, path: str) -> None:
        """Raises OSError where FILE cannot be written."""
        self._path = path
        if path:
            open(path, "a").close()

    @hookimpl
    def multifd_observe_start(self) -> None:
        self._started = time.monotonic()
        self._main: Counter[str] = Counter()
        self._rows: dict[tuple[str, int, str | None], _Row] = {}

    @hookimpl
    def multifd_observe_main(self, direction: str, data: memoryview) -> None:
        self._main[direction] += len(data)

    @hookimpl
    def multifd_observe_packet(
        self,
        channel: ObservedChannel,
        packet: RamPacket,
        header: memoryview,
        payload: Sequence[memoryview],
        times: Times,
    ) -> None:
        pages = len(packet.normal) + len(packet.zero)
        learn(packet.method)
        # A packet without pages, SYNC, names no method.
        row = self._rows.setdefault(
            (channel.direction, channel.id, method_name(packet.method) if pages else None), _Row()
        )
        row.counts.add(packet)
        row.memory_bytes += pages * channel.page_size
        row.wire_bytes += len(header) + sum(map(len, payload))
        row.codec += times.encode + times.decode
        row.wire += times.read + times.write
        row.wait += times.wait

    @hookimpl
    def multifd_observe_finish(self, complete: bool) -> None:
        found = {
            "complete": complete,
            "seconds": round(time.monotonic() - self._started, 6),
            "main_bytes": dict(self._main),
            "channels": [_shown(*key, row) for key, row in sorted(self._rows.items(), key=str)],
        }
        line = json.dumps(found) + "\n"
        if not self._path:
            sys.stderr.write(line)
            return
        with open(self._path, "a") as file:
            file.write(line)


def _shown(direction: str, channel: int, method: str | None, row: _Row) -> dict[str, Any]:
    return {
        "direction": direction,
        "channel": channel,
        "method": method,
        **asdict(row.counts),
        "memory_bytes": row.memory_bytes,
        "wire_bytes": row.wire_bytes,
        "ratio": round(row.memory_bytes / row.wire_bytes, 3),
        "seconds": {name: round(getattr(row, name), 6) for name in ("codec", "wire", "wait")},
    }
