"""How often a source has gone through its memory, told from the packets alone; no I/O."""

from __future__ import annotations

from multifd.wire.packet import RamPacket


class Passes:
    """One channel's packets; one thread's, read by others.

    A source goes through each RAM block upwards, in every round: where an offset is below one before it, another pass
    has begun.  Sync points do not tell that: QEMU 7.2 has one for each section, which is some 50 ms of a round.  A
    channel that has but a packet or two of a pass may miss its end.
    """

    def __init__(self) -> None:
        #: Passes that have ended.
        self.ended = 0
        self._at: dict[str, int] = {}

    def add(self, packet: RamPacket) -> None:
        """One more packet."""
        offsets = packet.normal or packet.zero
        if offsets:
            if offsets[0] <= self._at.get(packet.ramblock, -1):
                self.ended += 1
                self._at.clear()
            self._at[packet.ramblock] = offsets[0]
