"""Packet numbers: whether every packet of a round came, once, and in its round; no I/O.

A source numbers its packets over all channels, from 0, SYNCs included (seen with QEMU 7.2, 10.0 and 11.1):

* Each channel's numbers rise.  The packets between two sync points, the second one's SYNCs included, have the numbers
  that follow those of the round before, none of them twice.
* In 10.0 and 11.1 none is left out.  In 7.2 a packet of pages that became a SYNC as well has taken the SYNC's number,
  and its own is missing; for each such packet an empty one comes later on the channel, which repeats the number of
  the SYNC before it.

A stream names no version, but its SYNCs do: with room for no page in 10.0 and 11.1, for a packet full in 7.2.  Of a
stream in which they are otherwise the numbers are not known to mean anything: what is odd about them is told, not
refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from multifd.errors import PeerError, counted
from multifd.wire.packet import Buffer, RamPacket, may_be_empty, pages_per_packet


@dataclass(slots=True)
class Round:
    """One channel's packets up to its next SYNC, that included.

    `merged` are those that are SYNC and pages at once; `rooms` are how many pages the other SYNCs have room for; `odd`
    is what was wrong within the channel, in words.
    """

    numbers: array[int] = field(default_factory=lambda: array("Q"))
    merged: int = 0
    rooms: set[int] = field(default_factory=set)
    odd: str = ""


class ChannelNumbers:
    """The numbers of one channel's packets as they come; one thread's."""

    def __init__(self) -> None:
        self._round = Round()
        self._last = -1
        self._owed = 0
        self._merged = False

    @property
    def since_sync(self) -> int:
        """Packets since the last SYNC, but for empty ones that belong there."""
        return len(self._round.numbers)

    @property
    def merged(self) -> bool:
        """Whether empty packets belong to the channel: they may be left unread."""
        return self._merged

    def may_end_in(self, cut: Buffer) -> bool:
        """Whether the channel may end with `cut`, of the header of a packet: of an empty one that belongs there."""
        return self._owed > 0 and may_be_empty(cut)

    def check_end(self, channel: int, syncs: int, points: int) -> None:
        """The main channel has ended after so many sync points, the channel after so many SYNCs.

        Raises PeerError where it has another number of them, or packets behind the last.
        """
        if syncs != points or self.since_sync:
            raise PeerError(
                f"channel {channel}: {syncs} SYNCs and {counted(self.since_sync, 'packet')} after the last, but the "
                f"main channel ended after {points} sync points"
            )

    def add(self, packet: RamPacket) -> Round | None:
        """One more packet; the round that it ended, where it is a SYNC."""
        this, number = self._round, packet.packet_num
        pages = bool(packet.normal or packet.zero)
        if not pages and not packet.sync and self._owed and number == self._last:
            self._owed -= 1
            return None
        if number <= self._last and not this.odd:
            this.odd = f"packet {number} came after packet {self._last}: one came twice, or too late"
        self._last = number
        this.numbers.append(number)
        if not packet.sync:
            return None
        if pages:
            this.merged += 1
            self._owed += 1
            self._merged = True
        else:
            this.rooms.add(packet.room)
        self._round = Round()
        return this


class Missing(PeerError):
    """A packet never came, unless another channel had it."""


@dataclass(slots=True)
class Numbers:
    """The numbers of a whole migration, judged at its sync points."""

    page_size: int
    _next: int = 0
    _sync_points: int = 0
    _rooms: frozenset[int] = frozenset()
    _merged: int = 0
    _told: bool = False

    @property
    def recent(self) -> bool:
        """Whether all SYNCs so far, and there were some, are like those of QEMU 10.0 and later."""
        return self._rooms == {0} and not self._merged

    def sync_point(self, rounds: Sequence[Round]) -> str:
        """All channels have come to their next SYNC.  Raises PeerError where a packet is not of this round, Missing.

        Returns what is odd where the numbers are of no kind that is known, the first time; else nothing.
        """
        error = self._error(rounds)
        rooms = self._rooms.union(*(each.rooms for each in rounds))
        merged = self._merged + sum(each.merged for each in rounds)
        if error and (rooms <= {pages_per_packet(self.page_size)} or (rooms == {0} and not merged)):
            raise error.at(f"sync point {self._sync_points + 1}")
        self._next = max(number for each in rounds for number in each.numbers) + 1
        self._sync_points += 1
        self._rooms, self._merged = rooms, merged
        if not error or self._told:
            return ""
        self._told = True
        known = " and ".join(map(str, sorted(rooms)))
        return (
            f"sync point {self._sync_points}: {error}; its SYNCs are like no known QEMU's ({merged} with pages, others "
            f"with room for {known}), so its packets are not accounted for"
        )

    def _error(self, rounds: Sequence[Round]) -> PeerError | None:
        for each in rounds:
            if each.odd:
                return PeerError(each.odd)
        first = expected = self._next
        # Each channel's rise already: sorting merges them.
        numbers = sorted(number for each in rounds for number in each.numbers)
        missing, gap = 0, 0
        for number in numbers:
            if number < expected:
                return PeerError(f"packet {number} came twice, or after its round: {expected} was next")
            if number > expected:
                gap = gap if missing else expected
                missing += number - expected
            expected = number + 1
        wrong = missing - sum(each.merged for each in rounds)
        if not wrong:
            return None
        span = f"of {first} to {numbers[-1]}"
        if wrong < 0:
            return PeerError(f"{counted(-wrong, 'packet')} too many {span}")
        return Missing(f"{counted(wrong, 'packet')} {span} never came, from {gap} on")
