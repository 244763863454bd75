"""All multifd channels of one migration through the relay, and whether all of it has passed on them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from multifd.errors import PeerError
from multifd.jobs.convergence import Convergence
from multifd.jobs.relay.channel import Channel
from multifd.jobs.relay.mainchannel import MainChannel
from multifd.jobs.verdict import LAST_WORD
from multifd.log import log
from multifd.net.connection import Ended
from multifd.net.deadline import Silence
from multifd.net.socket import SocketConnection
from multifd.wire.numbers import Missing, Numbers
from multifd.wire.packet import InitPacket

#: Seconds after the main channel's first sync point in which a channel may come: the source connected it before.
SETTLING = 10.0
#: And at the end of a short migration.
LATE_CHANNEL = 1.0


class Channels:
    """Guarded by the migration's lock, `changed`, which whoever calls a method holds."""

    def __init__(self, changed: threading.Condition, most: int | None, silence: Silence) -> None:
        """`most` is how many the source may use, where that is known."""
        self.uuid: bytes | None = None
        #: Of those that have come; each is in `running` once it is connected to the destination.
        self.ids: set[int] = set()
        self.running: dict[int, Channel] = {}
        self._changed = changed
        self._most = most
        self._silence = silence
        self._numbers: Numbers | None = None
        self._settled: float | None = None
        self._convergence = Convergence()

    @property
    def methods(self) -> set[int]:
        """The numbers of the methods that they came with."""
        return set().union(*(channel.methods for channel in self.running.values()))

    def register(self, init: InitPacket) -> bool:
        """One has come; False where it is of no migration here.  Raises PeerError where there are too many."""
        late = self._settled is not None and time.monotonic() > self._settled
        if late or self.uuid not in (None, init.uuid) or init.id in self.ids:
            return False
        if self._most is not None and init.id >= self._most:
            raise PeerError(
                f"channel {init.id}: the source uses at least {init.id + 1} channels, --channels says {self._most}"
            )
        self.uuid = init.uuid
        self.ids.add(init.id)
        return True

    def sync_point(self, points: int) -> None:
        """The main channel is at so many sync points, or a channel has ended.

        Raises Ended where one did before its SYNC: that would hang the destination, which waits for it for ever.
        """
        if points and self._settled is None:
            self._settled = time.monotonic() + SETTLING
        for channel in self.running.values():
            if channel.ended and channel.syncs < points:
                raise Ended(f"channel {channel.id}: it ended before SYNC {channel.syncs + 1}")

    def await_sync(self, points: int, over: Callable[[], bool]) -> None:
        """The main channel is at so many sync points: wait until all channels have passed their SYNC.

        A QEMU (7.2 and 10.0) that has read the sync point waits for the SYNCs with its main loop: if one does not come
        any more, its monitor is silent for ever.  Raises Ended, Stalled.
        """
        if points == 1:  # the source had connected them before, but the relay may have met none yet
            self._changed.wait_for(lambda: self.ids or over(), LATE_CHANNEL)
        self._await(lambda channel: channel.syncs >= points or channel.ended, over)
        self.sync_point(points)

    def pass_sync(self, main: MainChannel, over: Callable[[], bool]) -> None:
        """The main channel is at a sync point: `await_sync`, and say whether the source comes to an end."""
        self.await_sync(main.sync_points, over)
        channels = self.running.values()
        passes = max((channel.passes.ended for channel in channels), default=0)
        pages = sum(channel.counts.pages for channel in channels) + main.zero_pages
        # Older ones know no switchover-ack.
        waits = main.return_path and self._numbers is not None and self._numbers.recent
        if found := self._convergence.sync_point(passes, pages, main.page_size, time.monotonic(), may_wait=waits):
            log.warning(found)

    def judge_rounds(self, page_size: int) -> None:
        """Those that all channels have ended, once no other can come.  Raises PeerError as `Numbers` does.

        Before, they are kept: 16 bytes for each MiB.
        """
        if self._settled is None or time.monotonic() < self._settled or len(self.running) < len(self.ids):
            return
        if self._numbers is None:
            self._numbers = Numbers(page_size)
        self._judge(self._numbers)
        ended = min(len(channel.rounds) for channel in self.running.values())
        for channel in self.running.values():
            for _ in range(ended):
                channel.rounds.popleft()

    def _judge(self, numbers: Numbers) -> None:
        for rounds in zip(*(channel.rounds for channel in self.running.values()), strict=False):
            if odd := numbers.sync_point(rounds):
                log.warning(odd)

    def account(self, points: int, page_size: int, main_complete: Callable[[], None], over: Callable[[], bool]) -> None:
        """The main channel is complete, with so many sync points: wait until all else has passed, too.

        `main_complete` is called when every channel has come to its last SYNC, `over` says that waiting is in vain.
        Raises PeerError where a channel holds more or less, or a packet is missing, Ended, Stalled.
        """
        while True:
            self.await_sync(points, over)
            known = len(self.running)
            try:
                if not known:
                    raise Missing("no multifd channel came: turn multifd on at the source")
                self._judge(replace(self._numbers) if self._numbers else Numbers(page_size))
                break
            except Missing:
                if not self._one_more_than(known):
                    raise
        main_complete()  # not before all have come: one that has not begun would be over
        self._await(lambda channel: channel.over, over)
        for channel in self.running.values():
            channel.numbers.check_end(channel.id, channel.syncs, points)

    def all_taken(self, main: MainChannel, onward: Sequence[SocketConnection]) -> bool:
        """Whether all that the source sent has passed, and the destination has taken all bytes of it that mean
        something, as far as its kernel says.  Not locked.

        Where the main channel was read, all channels were accounted for before its last byte passed; else the source
        has to have ended each of them.
        """

        def passed() -> bool:
            whole = len(self.running) == len(self.ids) > 0 and all(channel.ended for channel in self.running.values())
            return main.passed and (whole or not main.opaque)

        with self._changed:
            if not self._changed.wait_for(passed, LAST_WORD):
                return False
        spared = [channel.destination for channel in self.running.values() if channel.numbers.merged]
        deadline = time.monotonic() + LAST_WORD
        while any(connection.untaken() for connection in onward if connection not in spared):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def _one_more_than(self, known: int) -> bool:
        return self._changed.wait_for(lambda: len(self.ids) > known, LATE_CHANNEL)

    def _await(self, condition: Callable[[Channel], bool], over: Callable[[], bool]) -> None:
        """Until it holds for all channels that have come."""
        while not (len(self.running) == len(self.ids) and all(map(condition, self.running.values()))):
            if not self._changed.wait(self._silence.interval):
                self._silence.check("a channel is waited for", awaited=True)
            if over():
                raise PeerError("it ended meanwhile")
