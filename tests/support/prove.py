"""What CI takes of the tests that take long: a sample, by a seed that can be given again."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

SIZE = os.environ.get("MULTIFD_PROVE", "full")
SEED = int(os.environ.get("MULTIFD_SEED") or time.time_ns() % 1_000_000)


def sample(cases: Sequence[T], count: int) -> Sequence[T]:
    """All of them; where a sample is asked for, so many of them."""
    if SIZE == "full":
        return cases
    assert SIZE == "sample", f"MULTIFD_PROVE={SIZE} is neither full nor sample"
    return random.Random(SEED).sample(cases, min(count, len(cases)))
