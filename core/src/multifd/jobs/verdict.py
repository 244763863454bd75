"""What the verdicts of source, destination and relay have in common; each has its own states, events and tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from typing import TypeVar

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)

#: The wire cannot tell more of an early end, wherever it is cut.
ENDED_EARLY = "the source ended early: cancelled, or gone"
#: Seconds for a destination that closed a connection to say why, and for its kernel to take what it was sent.
LAST_WORD = 1.0


def following(state: S, saw: E, progress: Mapping[tuple[S, E], S], ends: Mapping[E, S], final: Collection[S]) -> S:
    """Where a migration is next: an end is final, progress goes before ends, and what is in neither changes nothing."""
    if state in final:
        return state
    return progress.get((state, saw)) or ends.get(saw, state)
