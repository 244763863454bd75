"""Whether a running guest's migration comes to an end, told from its stream alone; no I/O.

A source sends what the guest has written while the round before was sent, and stops the guest for the last round when
that takes less than its downtime-limit, 300 ms unless set.  So rounds become shorter, or they go on for ever:

* A guest that writes memory as fast as it is carried makes each round as long as the one before.
* A source with capability switchover-ack waits for a message of the destination's, in rounds as short as they get: of
  no page, some thousand a second, where the guest does little.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

#: Rounds behind the first that are compared: the shortest of the later half with the shortest of the earlier, which has
#: to be so much longer.  A guest whose rounds become shorter by a fiftieth each is still on its way.
ROUNDS = 12
SHRINKING = 0.9
#: Seconds from the end of the first round on in which nobody says anything.
EARLY = 5.0
#: Seconds of a round that any source's downtime-limit allows, unless it was set lower; and how long rounds are so short
#: until something else has to be what it waits for.
SHORT = 0.25
HELD = 5.0


@dataclass(frozen=True, slots=True)
class _Round:
    pages: int
    seconds: float


class Convergence:
    """The rounds of one live migration, as they end."""

    def __init__(self) -> None:
        self._told = False
        self._passes = 0
        self._came = 0
        self._pages = 0
        self._began = 0.0
        self._first_ended = math.inf
        self._short_since = math.inf
        self._rounds: deque[_Round] = deque(maxlen=ROUNDS)

    def sync_point(self, passes: int, pages: int, page_size: int, now: float, *, may_wait: bool = True) -> str:
        """All channels have come to one; what is to be said, in one line, once; else nothing.

        `passes` through the memory have ended so far (`wire.passes`), and so many pages came; `now` is in seconds.
        `may_wait` where the source may wait for a switchover-ack that it has not been sent.
        """
        came, self._came = pages > self._came, pages
        if passes == self._passes and (came or not pages):
            return ""  # in the middle of a round: QEMU 7.2 has a sync point for each section
        this = _Round(pages - self._pages, now - self._began)
        self._passes, self._pages, self._began = passes, pages, now
        if self._first_ended == math.inf:
            self._first_ended = now
            return ""
        if this.pages:  # behind a round QEMU 10.0 may have one of none, where downtime-limit is small
            self._rounds.append(this)
        if this.seconds >= SHORT:
            self._short_since = math.inf
        elif self._short_since == math.inf:
            self._short_since = now
        if self._told or now - self._first_ended < EARLY:
            return ""
        text = self._verdict(page_size, now, may_wait=may_wait)
        self._told = bool(text)
        return text

    def _verdict(self, page_size: int, now: float, *, may_wait: bool) -> str:
        if may_wait and now - self._short_since >= HELD:
            return (
                f"the source sends rounds of less than {SHORT:g} s for {now - self._short_since:.0f} s, and does not "
                "stop its guest: it may wait for switchover-ack: turn that capability off at the source, or on at its "
                "destination too; or its downtime-limit is less than a round takes: raise it; for a snapshot, receive "
                "with --qmp"
            )
        if len(self._rounds) < ROUNDS:
            return ""
        sizes = [each.pages for each in self._rounds]
        half = ROUNDS // 2
        seconds = sum(each.seconds for each in self._rounds) / ROUNDS
        if seconds < SHORT or min(sizes[half:]) < SHRINKING * min(sizes[:half]):
            return ""
        return (
            f"the guest writes its memory as fast as it is carried: each of the last {ROUNDS} rounds was of some "
            f"{sum(sizes) * page_size // ROUNDS >> 20} MiB and {seconds:.1f} s, and they do not become shorter. It may "
            "go on so for ever: for a snapshot, receive with --qmp and --stop-after; else stop the guest, or raise "
            "max-bandwidth (128 MiB/s unless set) or downtime-limit at the source, or turn auto-converge on there, or "
            "take a faster compressor, or more channels"
        )
