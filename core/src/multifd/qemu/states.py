"""What a QEMU is at, as its monitor tells: its guest, its migration, whom it waits for, and what hinders a new one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from multifd.qemu.monitor import REASON, of, shown

ENDED = ("completed", "failed", "cancelled")
#: Nothing of a migration is under way.
RESTING = ("none", *ENDED)

#: Statuses in which a migration waits for somebody, and what to do about each.
WAITS = {
    "setup": "for its connections: is the other side there, and does it answer?",
    "wait-unplug": "until the guest has given its failover network card back: does it run, with that card's driver?",
    "pre-switchover": "until it is told to go on: turn capability pause-before-switchover off, or say migrate-continue "
    "on its monitor",
    "device": "until the other side has the last of its state: does that still read?",
    "colo": "for COLO's checkpoints, without end: turn capability x-colo off",
    "postcopy-active": "until the destination has fetched all pages: it cannot be turned back",
    "postcopy-paused": "for a new connection: say migrate-recover on the destination's monitor, then migrate with "
    "resume=true",
    "postcopy-recover": "until the destination has fetched all pages: it cannot be turned back",
}


@dataclass(frozen=True, slots=True)
class Guest:
    """`query-status`'s answer; `status` is empty where it does not tell."""

    status: str
    running: bool

    @classmethod
    def read(cls, answer: Any) -> Self:
        """For `Monitor.ask`."""
        return cls(of(str, answer.get("status", "")), of(bool, answer["running"]))


@dataclass(frozen=True, slots=True)
class Migration:
    """`query-migrate`'s answer; `status` is `none` before there was one."""

    status: str
    error: str
    #: Whether a destination has an address that it listens at; 7.2 has no status before somebody connects.
    listening: bool
    #: Rounds of RAM that have begun; a source's.
    rounds: int = 0
    #: Why QEMU does not migrate its guest at all: devices that cannot be.
    blocked: tuple[str, ...] = ()

    @classmethod
    def read(cls, answer: Any) -> Self:
        """For `Monitor.ask`."""
        return cls(
            of(str, answer.get("status", "none")),
            of(str, answer.get("error-desc", "")),
            "socket-address" in answer,
            of(int, answer.get("ram", {}).get("dirty-sync-count", 0)),
            tuple(of(str, reason) for reason in of(list, answer.get("blocked-reasons", []))),
        )

    def __str__(self) -> str:
        return self._explained(shown(self.status))

    def _explained(self, text: str) -> str:
        return f"{text}; QEMU says: {shown(self.error, REASON)}" if self.error else text

    @property
    def waits(self) -> str:
        """Whom or what it waits for, and what to do; empty where it goes on by itself, or is over."""
        return f"QEMU's migration waits in {self.status} {WAITS[self.status]}" if self.status in WAITS else ""

    @property
    def told(self) -> str:
        """Of one that has not completed."""
        return self._explained(self.waits or f"QEMU's migration is {shown(self.status)}")


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What was found of a QEMU (`is running, it does not wait`), and what to do about it."""

    what: str
    remedy: str


#: Capabilities that a job needs.
OURS = ("multifd", "return-path", "events")
#: Parameter `mode` of a migration whose memory comes as in any other.
STOPPING = "cpr-reboot"
NORMAL_MODE = "on its monitor: migrate_set_parameter mode normal"
AGAIN = "start it again, with -incoming defer"


def source_obstacle(guest: Guest, migration: Migration) -> Obstacle | None:
    """Why this QEMU's guest cannot be migrated."""
    status = shown(migration.status)
    if guest.status == "inmigrate":
        return Obstacle(
            "waits for a migration itself (-incoming), it has no guest to send", "is it the source's monitor?"
        )
    if status.startswith("postcopy"):
        return Obstacle(f"is migrating already ({status})", "let that end: its guest is the destination's")
    if status not in RESTING:
        return Obstacle(f"is migrating already ({status})", "migrate_cancel on its monitor gives that up")
    if guest.status in ("postmigrate", "finish-migrate"):
        return Obstacle(
            f"has its guest stopped by a migration that is {status} ({guest.status})",
            "cont on its monitor lets the guest go on here, unless it runs elsewhere by now",
        )
    return None


def destination_obstacle(guest: Guest, migration: Migration) -> Obstacle | None:
    """Why no migration can come into this QEMU; one that listens already waits for somebody else's."""
    if guest.status not in ("", "inmigrate"):
        return Obstacle(f"is {shown(guest.status)}, it does not wait", "start it with -incoming defer")
    if migration.status in ENDED:
        return Obstacle(f"has had its migration, which is {migration}", AGAIN)
    if migration.status not in ("none", "setup"):
        return Obstacle(f"has a migration coming in already ({shown(migration.status)})", AGAIN)
    return None


def mode_obstacle(parameters: Mapping[str, Any]) -> Obstacle | None:
    """Why no stream with the guest's memory comes of a migration, by its parameter `mode`; 8.1 and older have none."""
    mode = parameters.get("mode", "normal")
    if mode in ("normal", STOPPING):
        return None
    return Obstacle(
        f"has mode {shown(mode)}, which hands the guest's memory to another QEMU of its host, over no connection",
        NORMAL_MODE,
    )


def blocked(migration: Migration) -> Obstacle | None:
    """Why QEMU migrates this guest nowhere; in another mode than the normal one that is the mode's doing."""
    if not migration.blocked:
        return None
    first, *more = migration.blocked
    others = f" (and {len(more)} more)" if more else ""
    remedy = "detach what it names, or start it without"
    return Obstacle(f"does not migrate its guest: QEMU says: {shown(first)}{others}", remedy)


def mode_effect(parameters: Mapping[str, Any]) -> Obstacle | None:
    """What parameter `mode` changes in a migration that works."""
    if parameters.get("mode") != STOPPING:
        return None
    return Obstacle(f"has mode {STOPPING}: its guest stands still from the beginning", NORMAL_MODE)


def leftover(migration: Migration, capabilities: Mapping[str, bool]) -> Obstacle | None:
    """What a multifd that was killed may have left, though it hinders nothing."""
    left = [name for name in OURS if capabilities.get(name)]
    if migration.status not in ENDED or not {"multifd", "events"} <= set(left):
        return None
    return Obstacle(
        f"has had a migration, which is {migration}, and {', '.join(left)} are on: a multifd that is killed leaves its "
        "settings so",
        "migrate_set_capability NAME off puts each back, migrate_set_parameter its multifd-channels, "
        "multifd-compression and max-bandwidth; others may have been turned off",
    )
