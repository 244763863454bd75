"""When a running guest is stopped, so that its migration comes to an end; no I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from multifd.errors import UsageError


@dataclass(frozen=True, slots=True)
class StopAfter:
    """So many seconds since the migration began, or so many rounds of RAM; one of them is 0."""

    seconds: float = 0.0
    rounds: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """`30s`, `0.5s`, `5rounds`, `1round`.  Raises UsageError for anything else."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)s|(\d+)rounds?", text, re.ASCII)
        seconds, rounds = (float(found[1] or 0), int(found[2] or 0)) if found else (0.0, 0)
        if not (0 < seconds < 1e6 or 0 < rounds < 1e6):
            raise UsageError(f"stop after {text!r}: write 30s or 5rounds")
        return cls(seconds, rounds)


class Stopping:
    """Finds the moment: the end of a round, when there is least left to send.

    In the middle of one the rest of it would be sent while the guest stands still, and what it has written meanwhile.
    """

    def __init__(self, after: StopAfter) -> None:
        self._after = after
        self._seen = 0
        #: Set by whoever has seen to it: there is no second moment.
        self.done = False

    def now(self, seconds: float, ended: int) -> bool:
        """Whether this is it: the migration has lasted so long, and so many rounds of RAM have ended."""
        just_ended = ended > self._seen
        self._seen = max(self._seen, ended)
        return just_ended and seconds >= self._after.seconds and ended >= self._after.rounds
