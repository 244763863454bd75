"""How a migration that comes here ends, and whose fault that is; no I/O.

What was seen is told one by one, in the order in which it was seen; `after` says where that leads.  An end is final:
whatever is seen later is its echo.
"""

from __future__ import annotations

from enum import Enum

from multifd.errors import MultifdError, PeerError
from multifd.jobs.verdict import ENDED_EARLY, following
from multifd.net.connection import Ended, Stalled


class State(Enum):
    """Where a migration is; from CONFIRMED on it has ended."""

    WAITING = "waiting for its main channel and block list"
    SET_UP = "its RAM blocks are known"
    MOVING = "its channels move pages"
    SWITCHED_OVER = "its RAM is complete by the main channel's word, device state comes"
    WHOLE = "all of it is here, every packet accounted for"
    SAVED = "all of it is on the disk"
    CONFIRMED = "the source has been told"
    UNCONFIRMED = "all of it is on the disk, and no source wants to hear of it, or can"
    ENDED_EARLY = "the source ended it: cancelled, or gone"
    REFUSED = "what came is no whole migration"
    LOST = "nothing moved any more"
    FAILED = "this side could not go on"


class Saw(Enum):
    """What happens."""

    BLOCKS = "the list of RAM blocks came"
    SYNC = "the main channel and all others passed a sync point"
    RAM_END = "the RAM sections ended"
    ACCOUNTED = "the main channel is complete, and so is every other"
    ON_DISK = "the snapshot is written"
    TOLD = "the source has been told that it is"
    UNTOLD = "the source asked for no answer, or was not there to hear it"
    SOURCE_ENDED = "the source ended a connection where it may not"
    VIOLATION = "the source broke the protocol, or its settings differ"
    SILENCE = "the source had to do something, and did nothing"
    TROUBLE = "a compressor, a disk, an interrupt"


PROGRESS = {
    (State.WAITING, Saw.BLOCKS): State.SET_UP,
    (State.SET_UP, Saw.SYNC): State.MOVING,
    (State.MOVING, Saw.RAM_END): State.SWITCHED_OVER,
    (State.SWITCHED_OVER, Saw.ACCOUNTED): State.WHOLE,
    (State.WHOLE, Saw.ON_DISK): State.SAVED,
    (State.SAVED, Saw.TOLD): State.CONFIRMED,
    (State.SAVED, Saw.UNTOLD): State.UNCONFIRMED,
}
ENDS = {
    Saw.SOURCE_ENDED: State.ENDED_EARLY,
    Saw.VIOLATION: State.REFUSED,
    Saw.SILENCE: State.LOST,
    Saw.TROUBLE: State.FAILED,
}
# The snapshot is there, and the source may have gone on: nothing makes that a failure.
PROGRESS |= {(State.SAVED, saw): State.SAVED for saw in ENDS}
FINAL = {State.CONFIRMED, State.UNCONFIRMED, *ENDS.values()}
#: From the first of these on it succeeds whatever happens.
SUCCESSES = {State.SAVED, State.CONFIRMED, State.UNCONFIRMED}


def after(state: State, saw: Saw) -> State:
    """Where a migration is next."""
    return following(state, saw, PROGRESS, ENDS, FINAL)


def seen(error: BaseException) -> Saw:
    """What an error means."""
    if isinstance(error, Ended):
        return Saw.SOURCE_ENDED
    if isinstance(error, Stalled):
        return Saw.SILENCE
    return Saw.VIOLATION if isinstance(error, PeerError) else Saw.TROUBLE


def told(state: State, error: MultifdError, hint: str = "") -> MultifdError:
    """The error as a user hears it, of a migration that ended with it.

    `hint` is what else an early end may have been.
    """
    if state is not State.ENDED_EARLY:
        return error
    return PeerError(ENDED_EARLY + (f"; {hint}" if hint else ""))
