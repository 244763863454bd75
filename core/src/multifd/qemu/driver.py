"""A QEMU driven over its monitor: one end of a migration, its start and its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Self
from uuid import UUID

from multifd.crew import Crew
from multifd.errors import Cancelled, MultifdError, PeerError
from multifd.log import log
from multifd.net.connection import Ended, Lost, Stalled
from multifd.qemu.disks import read_disks
from multifd.qemu.monitor import BRIEF, REASON, Monitor, of, shown
from multifd.qemu.settings import OFF, UNLIMITED, Settings, read_capabilities, read_parameters
from multifd.qemu.states import (
    AGAIN,
    RESTING,
    Guest,
    Migration,
    Obstacle,
    blocked,
    destination_obstacle,
    leftover,
    mode_effect,
    mode_obstacle,
    source_obstacle,
)
from multifd.snapshot.disks import Disk

#: Seconds after which a migration is looked at though no event came.
LOOK = 1.0
#: Seconds for an answer that its guest, stopped, waits for.
ANSWER = 5.0
#: Seconds that a QEMU which answers may take to end a cancelled migration and to have its settings put back.
PATIENCE = 7.0
#: A destination in one of these is of no use any more.
FAILED = ("failed", "failing")
THEN = ("stop", "resume", "quit")
#: Milliseconds: the longest downtime-limit that QEMU (7.2 to 11.1) takes.
ANY_DOWNTIME = 2_000_000
#: A cancel comes to its end once the connections are closed, which the other side may have to do.
GIVEN_UP = ("failed", "failing", "cancelled", "cancelling")


class _Side:
    """One end of a migration, driven; a context that puts the settings back."""

    def __init__(
        self,
        where: str,
        capabilities: dict[str, bool],
        parameters: Mapping[str, object],
        timeout: float,
        crew: Crew | None,
    ) -> None:
        self.monitor = Monitor(where, timeout, crew)
        if crew is not None:
            crew.patience = PATIENCE
        self._timeout = timeout
        self._named: set[str] = set()
        try:
            # First: it may fail, and nothing is changed yet.
            guest = self.monitor.ask("query-status", Guest.read)
            self._was_running = guest.running
            before = self.status()
            if obstacle := self._obstacle(guest, before):
                raise PeerError(f"{self.monitor.name} {obstacle.what}: {obstacle.remedy}")
            if left := leftover(before, self.monitor.ask("query-migrate-capabilities", read_capabilities)):
                self._warn(f"{self.monitor.name} {left.what}: {left.remedy}")
            self._settings = Settings(self.monitor, OFF | {"events": True} | capabilities, parameters)
        except BaseException:
            self.monitor.close()
            raise

    def _obstacle(self, guest: Guest, migration: Migration) -> Obstacle | None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._settings.restore()
        finally:
            self.monitor.close()

    def status(self, within: float | None = None) -> Migration:
        """What its migration is at; `within` as for `Monitor.command`."""
        return self.monitor.ask("query-migrate", Migration.read, within)

    def wait(self) -> None:
        """Wait until the migration has ended.  Raises PeerError where it did not end well, or not in time."""
        found = self._ended(self._timeout, named=True)
        if found.status != "completed":
            raise PeerError(f"{self.monitor.name}: {found.told}")

    def waits(self) -> str:
        """Whom QEMU's migration waits for, and what to do, in one line; from any thread, within a second.

        For when nothing has come for a while.  Empty where it waits for nobody, or does not say so at once.
        """
        with suppress(MultifdError):
            if text := self.status(BRIEF).waits:
                return f"{self.monitor.name}: {text}"
        return ""

    def name_wait(self) -> None:
        """Warn of that, once."""
        if text := self.waits():
            self._warn(text)

    def given_up(self) -> bool:
        """Whether its migration has failed or was cancelled, as QEMU says at once, or else has told before.

        QEMU 11.1 may tell that it cancels and then answer nothing until its connections are closed.
        """
        with suppress(MultifdError):
            return self.status(BRIEF).status in GIVEN_UP
        return self.monitor.told in GIVEN_UP

    def _ended(self, seconds: float, *, named: bool = False) -> Migration:
        """What the migration is at when it has ended, or after so many seconds.

        Where `named`, there is a warning of whom it waits for meanwhile, once.
        Raises Stalled where QEMU does not answer by then.
        """
        deadline = time.monotonic() + seconds
        lasts = False
        while True:
            found = self.status(max(BRIEF, deadline - time.monotonic()))
            left = deadline - time.monotonic()
            if found.status in RESTING or left <= 0:
                return found
            if named and lasts and found.waits:
                self._warn(f"{self.monitor.name}: {found.waits}")
            lasts = not self.monitor.await_change(min(LOOK, left))

    def _warn(self, text: str) -> None:
        if text not in self._named:
            self._named.add(text)
            log.warning(text)

    def reason(self) -> str:
        """What QEMU has to say about a migration that has not ended well; empty where it says nothing."""
        try:
            found = self._ended(LOOK)
        except (Ended, Lost):
            return "its QEMU has ended: the last lines of its standard error, or its log, say why"
        except MultifdError:
            return ""
        return self._told(found) if found.error or found.waits else ""

    def _told(self, found: Migration) -> str:
        return found.told

    def explain(self, error: MultifdError) -> MultifdError:
        """An error of ours, with what QEMU has to say about it."""
        reason = self.reason()
        return type(error)(f"{error}; {reason}") if reason else error


class Source(_Side):
    """A QEMU whose guest is to be sent."""

    def __init__(
        self,
        where: str,
        *,
        channels: int,
        method: str | None,
        timeout: float,
        max_bandwidth: int = UNLIMITED,
        crew: Crew | None = None,
    ) -> None:
        """Set it up: `method` is the compression, its own unless given; `max_bandwidth`, in bytes per second, is the
        most that it sends.

        Raises HostError, and PeerError: where its guest cannot be migrated now, nothing is changed.
        """
        parameters: dict[str, object] = {"multifd-channels": channels, "max-bandwidth": max_bandwidth}
        if method is not None:
            parameters["multifd-compression"] = method
        super().__init__(where, {"multifd": True, "return-path": True}, parameters, timeout, crew)

    def _obstacle(self, guest: Guest, migration: Migration) -> Obstacle | None:
        if obstacle := source_obstacle(guest, migration):
            return obstacle
        parameters = self.monitor.ask("query-migrate-parameters", read_parameters)
        if effect := mode_effect(parameters):
            self._warn(f"{self.monitor.name} {effect.what}: {effect.remedy}")
        # QEMU 11.1 aborts where it is told to migrate to a URI in mode cpr-transfer.
        return mode_obstacle(parameters) or blocked(migration)

    def start(self, uri: str) -> None:
        """Begin to send to `uri`.  Raises PeerError."""
        self.monitor.command("migrate", uri=uri)

    def cancel(self) -> None:
        """Ask QEMU to give the migration up, before its connections are reset: then it is cancelled, not failed.

        Half a second at most: one that is blocked writing to us answers when they are reset.
        """
        with suppress(MultifdError):
            self.monitor.command("migrate_cancel", BRIEF)

    def recover(self, failure: type[BaseException] | None, *_: object) -> None:
        """Like `__exit__`, for an ExitStack: after a failure, or Ctrl-C, give the migration up, and let a guest
        that ran go on.  QEMU takes no settings back before.

        Best when its connections are reset already: it may be blocked writing to them until then.
        """
        if failure is None:
            return
        with suppress(MultifdError):
            over = False
            with suppress(Stalled):
                over = self._ended(1).status in RESTING
            if not over:
                self.monitor.command("migrate_cancel")
                self._ended(5)
            if self._was_running and not self.monitor.ask("query-status", Guest.read).running:
                self.monitor.command("cont")

    def disks(self) -> tuple[Disk, ...] | None:
        """Its guest's; None, and a warning, where it does not say."""
        try:
            return self.monitor.ask("query-block", read_disks, ANSWER)
        except Cancelled:
            raise
        except MultifdError as error:
            log.warning(f"which disks the guest has is not known, and not in the snapshot: {error}")
            return None

    def switch_over(self) -> None:
        """Let QEMU stop its guest and send what is left, however long that takes.  Raises PeerError.

        Not by `stop`: QEMU would send what is left at max-bandwidth, and then once more what was written meanwhile; and
        the state would say that the guest was paused.  So QEMU does what it does at the end of any migration, and lets
        the guest go on where that fails.
        """
        self._settings.change("downtime-limit", ANY_DOWNTIME)

    @property
    def standstill(self) -> float | None:
        """Seconds that the guest stood still, by QEMU's clock: from when the migration stopped it until `leave` let
        it go on, or else until the migration had ended.  None where it did not run.
        """
        times = self.monitor.times
        end = times.get("RESUME", times.get("MIGRATION"))
        return max(0.0, round(end - times["STOP"], 6)) if end is not None and "STOP" in times else None

    def leave(self, then: str) -> None:
        """What becomes of the guest: `stop` leaves it stopped, `resume` lets it run, `quit` ends QEMU."""
        if then == "resume":
            self.monitor.command("cont")
        elif then == "quit":
            with suppress(Ended):  # it may be gone before it answers
                self.monitor.command("quit")


class Destination(_Side):
    """A QEMU started with `-incoming defer`."""

    def __init__(self, where: str, *, channels: int, method: str, timeout: float, crew: Crew | None = None) -> None:
        """Set it up.  Raises HostError, and PeerError: where it does not wait to be told, nothing is changed."""
        super().__init__(
            where, {"multifd": True}, {"multifd-channels": channels, "multifd-compression": method}, timeout, crew
        )

    def _obstacle(self, guest: Guest, migration: Migration) -> Obstacle | None:
        if obstacle := destination_obstacle(guest, migration):
            return obstacle
        return Obstacle("listens already", AGAIN) if migration.listening or migration.status == "setup" else None

    def listen(self, uri: str) -> None:
        """Wait for a migration at `uri`; where that fails, QEMU stays to say why.  Raises PeerError."""
        try:
            self.monitor.command("migrate-incoming", uri=uri, exit_on_error=False)
        except PeerError as refusal:
            if "exit-on-error" not in str(refusal):
                raise
            self.monitor.command("migrate-incoming", uri=uri)  # before 9.1 it exits, and its log alone says why

    @property
    def tls_creds(self) -> str:
        """The id of what it expects TLS with; empty where it does not."""
        return shown(self.monitor.ask("query-migrate-parameters", read_parameters).get("tls-creds") or "")

    def _told(self, found: Migration) -> str:
        """One that has failed takes no other migration; 10.0 writes most of the reason to its log."""
        if found.status not in FAILED:
            return found.told
        return f"QEMU says: {shown(found.error, REASON)} (its log may say more); {AGAIN}"

    @property
    def uuid(self) -> bytes:
        """The guest's uuid, which the channels have to name; zero where it has none."""
        return self.monitor.ask("query-uuid", lambda answer: UUID(of(str, answer["UUID"])).bytes)
