"""The observer `trace`: one line per packet.

`--observe trace[=FILE]`: added to FILE, or on standard error.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from multifd.codec.naming import learn
from multifd.hookspecs import hookimpl
from multifd.observe.hooks import ObservedChannel, Times
from multifd.wire.flags import method_name
from multifd.wire.packet import RamPacket


class Trace:
    """Each line is one write, so that channels do not mix theirs."""

    def __init__(self, path: str) -> None:
        """Raises OSError where FILE cannot be written."""
        self._path = path
        if path:
            open(path, "ab").close()

    @hookimpl
    def multifd_observe_start(self) -> None:
        self._started = time.monotonic()
        self._file = open(self._path, "ab", 0) if self._path else open(2, "wb", 0, closefd=False)  # noqa: SIM115

    @hookimpl
    def multifd_observe_packet(
        self, channel: ObservedChannel, packet: RamPacket, payload: Sequence[memoryview], times: Times
    ) -> None:
        offsets = packet.normal + packet.zero
        words = [
            f"{time.monotonic() - self._started:.6f}",
            f"{channel.direction} channel={channel.id} packet={packet.packet_num}",
        ]
        if offsets:
            learn(packet.method)
            words.append(
                f"{method_name(packet.method).replace(' ', '-')} {packet.ramblock}+{min(offsets):#x} "
                f"normal={len(packet.normal)} zero={len(packet.zero)} payload={sum(map(len, payload))}"
            )
        if packet.sync:
            words.append("SYNC")
        words += [f"{stage}={1e6 * spent:.0f}us" for stage, spent in times._asdict().items() if spent]
        self._file.write(f"{' '.join(words)}\n".encode())

    @hookimpl
    def multifd_observe_finish(self) -> None:
        self._file.close()
