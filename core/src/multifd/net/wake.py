"""Many threads, each waiting for a connection of its own, woken by one."""

from __future__ import annotations

import os
from contextlib import suppress

from multifd.errors import os_errors


class Wake:
    """Once it is set, whoever waits in `Connection.ready`, or polls it, goes on."""

    def __init__(self) -> None:
        """Raises HostError where there is no descriptor left for it."""
        with os_errors("waiting for several connections"):
            self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        """What can be polled: readable from `set` on."""
        return self._event

    def set(self) -> None:
        """From any thread, and twice, but not after `close`."""
        os.eventfd_write(self._event, 1)

    def clear(self) -> None:
        """Whoever waits from now on waits for the next `set`."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)

    def close(self) -> None:
        """When nobody waits any more."""
        os.close(self._event)
