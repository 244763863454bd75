"""A QEMU driven over its monitor: one end of a migration, its start and its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

from multifd.errors import MultifdError, PeerError
from multifd.qemu.monitor import Monitor
from multifd.qemu.settings import OFF, Settings

#: Seconds between two looks at a migration.
POLL = 0.1
ENDED = ("completed", "failed", "cancelled")
THEN = ("stop", "resume", "quit")


class _Side:
    """One end of a migration, driven; a context that puts the settings back."""

    def __init__(
        self, where: str, capabilities: dict[str, bool], parameters: Mapping[str, object], timeout: float
    ) -> None:
        self.monitor = Monitor(where, timeout)
        self._timeout = timeout
        try:
            # First: it may fail, and nothing is changed yet.
            self._was_running: bool = self.monitor.command("query-status")["running"]
            self._settings = Settings(self.monitor, OFF | capabilities, parameters)
        except BaseException:
            self.monitor.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._settings.restore()
        finally:
            self.monitor.close()

    def status(self) -> dict[str, Any]:
        """`query-migrate`'s answer; `status` is `none` before there was one."""
        answer: dict[str, Any] = self.monitor.command("query-migrate")
        return {"status": "none"} | answer

    def wait(self) -> None:
        """Wait until the migration has ended.  Raises PeerError where it did not end well."""
        found = self._ended(self._timeout)
        if found["status"] != "completed":
            raise PeerError(f"{self.monitor.name}: QEMU's migration is {_words(found)}")

    def _ended(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while (found := self.status())["status"] not in ENDED and time.monotonic() < deadline:
            time.sleep(POLL)
        return found

    def explain(self, error: MultifdError) -> MultifdError:
        """An error of ours, with what QEMU has to say about it."""
        with suppress(MultifdError):
            found = self._ended(1)
            if found.get("error-desc"):
                return type(error)(f"{error}; QEMU's migration is {_words(found)}")
        return error


def _words(found: Mapping[str, Any]) -> str:
    return "; QEMU says: ".join(filter(None, (found["status"], found.get("error-desc"))))


class Source(_Side):
    """A QEMU whose guest is to be sent."""

    def __init__(self, where: str, *, channels: int, method: str | None, timeout: float) -> None:
        """Set it up: `method` is the compression, its own unless given.  Raises PeerError, HostError."""
        parameters: dict[str, object] = {"multifd-channels": channels}
        if method is not None:
            parameters["multifd-compression"] = method
        super().__init__(where, {"multifd": True, "return-path": True}, parameters, timeout)

    def start(self, uri: str) -> None:
        """Begin to send to `uri`.  Raises PeerError."""
        self.monitor.command("migrate", uri=uri)

    def recover(self, failure: type[BaseException] | None, *_: object) -> None:
        """Like `__exit__`, for an ExitStack: after a failure, or Ctrl-C, give the migration up, and let a guest
        that ran go on.  QEMU takes no settings back before.
        """
        if failure is None:
            return
        with suppress(MultifdError):
            if self._ended(1)["status"] not in (*ENDED, "none"):
                self.monitor.command("migrate_cancel")
                self._ended(5)
            if self._was_running and not self.monitor.command("query-status")["running"]:
                self.monitor.command("cont")

    def leave(self, then: str) -> None:
        """What becomes of the guest: `stop` leaves it stopped, `resume` lets it run, `quit` ends QEMU."""
        if then == "resume":
            self.monitor.command("cont")
        elif then == "quit":
            with suppress(PeerError):  # it may be gone before it answers
                self.monitor.command("quit")


class Destination(_Side):
    """A QEMU started with `-incoming defer`."""

    def __init__(self, where: str, *, channels: int, method: str, timeout: float) -> None:
        """Set it up.  Raises PeerError, HostError."""
        super().__init__(
            where, {"multifd": True}, {"multifd-channels": channels, "multifd-compression": method}, timeout
        )

    def listen(self, uri: str) -> None:
        """Wait for a migration at `uri`.  Raises PeerError."""
        self.monitor.command("migrate-incoming", uri=uri)

    @property
    def uuid(self) -> bytes:
        """The guest's uuid, which the channels have to name; zero where it has none."""
        text: str = self.monitor.command("query-uuid")["UUID"]
        return bytes.fromhex(text.replace("-", ""))
