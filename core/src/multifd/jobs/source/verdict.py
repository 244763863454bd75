"""How a migration that goes from here ends, and whose fault that is; no I/O.

What was seen is told one by one, in the order in which it was seen; `after` says where that leads.  An end is final:
whatever is seen later is its echo.
"""

from __future__ import annotations

from enum import Enum

from multifd.errors import MultifdError, PeerError
from multifd.jobs.verdict import following
from multifd.net.connection import Ended, Lost, Stalled


class State(Enum):
    """Where a migration is; from CONFIRMED on it has ended."""

    WAITING = "waiting for the destination to take its connections"
    SET_UP = "all connections are there"
    MOVING = "its channels move pages"
    SWITCHED_OVER = "all of it is written, the device state too; the destination is to confirm"
    CONFIRMED = "the destination says that it has everything"
    REFUSED = "the destination ended it"
    LOST = "nothing moved any more"
    FAILED = "this side could not go on"


class Saw(Enum):
    """What happens."""

    CONNECTED = "the destination took all connections"
    SYNC = "a sync point is written"
    WRITTEN = "all is written"
    SAID_DONE = "the destination says that it has everything"
    SAID_FAILED = "the destination says that it failed"
    DESTINATION_CLOSED = "the destination closed a connection"
    SILENCE = "the destination had to do something, and did nothing"
    TROUBLE = "a compressor, the source's files, an interrupt"


PROGRESS = {
    (State.WAITING, Saw.CONNECTED): State.SET_UP,
    (State.SET_UP, Saw.SYNC): State.MOVING,
    (State.MOVING, Saw.WRITTEN): State.SWITCHED_OVER,
    (State.SWITCHED_OVER, Saw.SAID_DONE): State.CONFIRMED,
}
ENDS = {
    # Where that is no success: it cannot have everything.
    Saw.SAID_DONE: State.REFUSED,
    Saw.SAID_FAILED: State.REFUSED,
    Saw.DESTINATION_CLOSED: State.REFUSED,
    Saw.SILENCE: State.LOST,
    Saw.TROUBLE: State.FAILED,
}
SUCCESSES = {State.CONFIRMED}
FINAL = SUCCESSES | set(ENDS.values())
#: Where only the destination knows why.
AT_THE_DESTINATION = {State.REFUSED, State.LOST}


def after(state: State, saw: Saw) -> State:
    """Where a migration is next."""
    return following(state, saw, PROGRESS, ENDS, FINAL)


def seen(error: BaseException) -> Saw:
    """What an error means."""
    if isinstance(error, (Ended, Lost)):
        return Saw.DESTINATION_CLOSED
    return Saw.SILENCE if isinstance(error, Stalled) else Saw.TROUBLE


def answered(code: int) -> Saw:
    """What the destination's last word means."""
    return Saw.SAID_FAILED if code else Saw.SAID_DONE


def told(state: State, error: MultifdError, here: str, reason: str = "") -> MultifdError:
    """The error as a user hears it, of a migration that ended with it; `here` is what has to fit at the destination.

    QEMU does not say on the wire why it refuses: `reason` is what its monitor says.
    """
    if state not in AT_THE_DESTINATION:
        return error
    reason = reason or "the destination's own message says why"
    return PeerError(f"{error}: {reason}.  Here: {here}; all of it must fit over there")
