"""How a live source comes to its last round: it is told that it may, and watched whether it does."""

from __future__ import annotations

import time
from contextlib import suppress

from multifd.engine.receiver import RecvChannels
from multifd.jobs.convergence import Convergence
from multifd.log import log
from multifd.net.connection import Connection, Lost
from multifd.wire.machine import takes_unasked_ack
from multifd.wire.returnpath import switchover_ack


class Switchover:
    """Of one migration that comes; its main thread's."""

    def __init__(self) -> None:
        #: Somebody else sees to it that it ends.
        self.seen_to = False
        self._convergence = Convergence()
        self._acked = False

    def sync_point(
        self, main: Connection, channels: RecvChannels, pages: int, page_size: int, *, machine: str, return_path: bool
    ) -> None:
        """All channels have come to one; `pages` came so far.  `return_path` says that the source takes answers."""
        waits = return_path and not self._acked and channels.recent_source
        if waits and takes_unasked_ack(machine):
            self._acked, waits = True, False
            with suppress(Lost):  # a source that has gone: what is missing then tells
                main.write([switchover_ack()])
        found = self._convergence.sync_point(channels.passes, pages, page_size, time.monotonic(), may_wait=waits)
        if found and not self.seen_to:
            log.warning(found)
