"""Pages that are neighbours, joined into runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import sub


def runs(offsets: Sequence[int], page_size: int) -> list[tuple[int, int]]:
    """Neighbours joined: (offset, length in bytes) of each run, in the order given."""
    if not offsets:
        return []
    first, last = offsets[0], offsets[-1]
    length = len(offsets) * page_size
    # Most packets are one run; comparing with a range costs a third of the walk.
    if last - first + page_size == length and tuple(offsets) == tuple(range(first, last + 1, page_size)):
        return [(first, length)]
    # Where the distance to the page before is not a page, a run begins.
    steps = map(sub, offsets[1:], offsets)
    starts = [0, *(index for index, step in enumerate(steps, 1) if step != page_size), len(offsets)]
    return [(offsets[start], (end - start) * page_size) for start, end in pairwise(starts)]
