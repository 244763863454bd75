"""How a migration through the relay ends, and whose fault that is; no I/O.

What was seen is told one by one, in the order in which it was seen and before it is acted upon: the relay's own acts
make echoes at both ends, which come later.  `after` says where it leads; an end is final.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from uuid import UUID

from multifd.errors import MultifdError, PeerError, counted
from multifd.jobs.verdict import ENDED_EARLY, following
from multifd.net.connection import Ended, Lost, Stalled
from multifd.wire.block import Block, listed
from multifd.wire.flags import method_name


class State(Enum):
    """Where a migration is; from CONFIRMED on it has ended."""

    WAITING = "waiting for its main channel and block list"
    SET_UP = "its RAM blocks are known"
    MOVING = "its channels move pages"
    SWITCHED_OVER = "its RAM is complete by the main channel's word, device state passes"
    OPAQUE = "its main channel passes unread"
    PASSED_ON = "all of it has passed, every packet accounted for where its main channel was read"
    CONFIRMED = "the destination says that it has everything"
    UNCONFIRMED = "the destination took everything; nobody asked it to say so"
    ENDED_EARLY = "the source ended it: cancelled, or gone"
    REFUSED = "the destination ended it"
    BROKEN = "what the source sent is no whole migration"
    LOST = "nothing moved any more"
    FAILED = "the relay could not go on"


class Saw(Enum):
    """What happens."""

    BLOCKS = "the list of RAM blocks came"
    SYNC = "the main channel is at a sync point"
    RAM_END = "the RAM sections ended"
    OPAQUE = "what the main channel says is read no more"
    ACCOUNTED = "the main channel is complete, and so is every other"
    SAID_DONE = "the destination says that it has everything"
    SAID_FAILED = "the destination says that it failed"
    DESTINATION_DONE = "the destination closed: nobody had asked it for an answer, and it had taken all bytes"
    DESTINATION_CLOSED = "the destination closed, or left bytes that it had been sent"
    SOURCE_ENDED = "the source ended a connection where it may not"
    VIOLATION = "the source broke the protocol, or its settings differ"
    SILENCE = "somebody had to do something, and nothing moved"
    TROUBLE = "a compressor, the machine, nobody at the destination's address"


PROGRESS = {
    (State.WAITING, Saw.BLOCKS): State.SET_UP,
    (State.SET_UP, Saw.SYNC): State.MOVING,
    (State.MOVING, Saw.RAM_END): State.SWITCHED_OVER,
    (State.SWITCHED_OVER, Saw.ACCOUNTED): State.PASSED_ON,
    **dict.fromkeys(((state, Saw.OPAQUE) for state in (State.WAITING, State.SET_UP, State.MOVING)), State.OPAQUE),
    (State.OPAQUE, Saw.ACCOUNTED): State.PASSED_ON,
    # After postcopy its stream has no description that ends it.
    (State.OPAQUE, Saw.SAID_DONE): State.CONFIRMED,
    (State.PASSED_ON, Saw.SAID_DONE): State.CONFIRMED,
    (State.PASSED_ON, Saw.DESTINATION_DONE): State.UNCONFIRMED,
}
ENDS = {
    # Where these two are no success, the destination has ended what was not complete.
    Saw.SAID_DONE: State.REFUSED,
    Saw.DESTINATION_DONE: State.REFUSED,
    Saw.SAID_FAILED: State.REFUSED,
    Saw.DESTINATION_CLOSED: State.REFUSED,
    Saw.SOURCE_ENDED: State.ENDED_EARLY,
    Saw.VIOLATION: State.BROKEN,
    Saw.SILENCE: State.LOST,
    Saw.TROUBLE: State.FAILED,
}
SUCCESSES = {State.CONFIRMED, State.UNCONFIRMED}
FINAL = SUCCESSES | set(ENDS.values())


def after(state: State, saw: Saw) -> State:
    """Where a migration is next."""
    return following(state, saw, PROGRESS, ENDS, FINAL)


def seen(error: BaseException) -> Saw:
    """What an error means that came while something passed from the source to the destination."""
    if isinstance(error, Ended):
        return Saw.SOURCE_ENDED
    if isinstance(error, Lost):
        return Saw.DESTINATION_CLOSED
    if isinstance(error, Stalled):
        return Saw.SILENCE
    return Saw.VIOLATION if isinstance(error, PeerError) else Saw.TROUBLE


def told(state: State, error: MultifdError, shown: str = "", *, passed_on: bool = False) -> MultifdError:
    """The error as a user hears it, of a migration that ended with it.

    Where all that came has been `passed_on`, an early end may have been none.  QEMU does not say on the wire why it
    refuses: `shown` is what it has been shown.
    """
    if state is State.ENDED_EARLY:
        hint = "; or it runs with suppress-vmdesc=on: with return-path off only the destination can tell"
        return PeerError(ENDED_EARLY + (hint if passed_on else ""))
    if state is State.REFUSED:
        fit = f"; it has to have {shown} (multifd doctor compares)" if shown else ""
        return PeerError(f"{error}: its own message says why{fit}")
    return error


def in_postcopy(state: State, error: MultifdError, *, runs_there: bool) -> MultifdError:
    """The error of `told`, once the guest's state has gone to the destination, and some of its memory has not."""
    hint = ""
    if runs_there:
        hint = (
            "; the guest's memory is in two places (postcopy): say migrate-recover on the destination's monitor, then "
            "migrate with resume=true on the source's, with the destination's own address"
        )
    elif state is State.LOST:
        hint = (
            "; the guest does not run there yet (postcopy): if the destination waits for one more connection, turn "
            "postcopy-preempt off on both sides"
        )
    return type(error)(f"{error}{hint}")


def fitting(
    machine: str,
    uuid: bytes | None,
    methods: Iterable[int],
    channels: int,
    blocks: Sequence[Block] = (),
    *,
    postcopy: bool = False,
) -> str:
    """What a destination has to be for what it was shown, as far as that is known; `methods` by their numbers."""
    shown = [f"machine {machine}"] if machine else []
    if uuid is not None:
        shown.append(f"VM uuid {UUID(bytes=uuid)}")
    if names := [method_name(method) for method in sorted(methods)]:
        shown.append(f"method {'+'.join(names)}")
    if channels:
        shown.append(f"multifd with {counted(channels, 'channel')}")
    if postcopy:
        shown.append("postcopy-ram")
    if blocks:
        shown.append(f"RAM blocks {listed(blocks)}")
    return ", ".join(shown)
