"""Zero pages: found, and parted from the normal ones."""

from __future__ import annotations

from collections.abc import Sequence

from multifd.wire.flags import PACKET_SIZE

ZEROS = bytes(PACKET_SIZE)
_ZERO_PACKET = bytearray(PACKET_SIZE)


def zero_indexes(pages: memoryview, page_size: int) -> Sequence[int]:
    """Which of these pages are all zero, in rising order.

    The first word of each page sorts out most of the others.  A bytearray on the left compares
    with a view in one step; a view on the left would go item by item, a slice would be copied.
    """
    words = pages.cast("Q")[:: page_size // 8].tolist()
    if all(words):
        return ()
    if not any(words) and _ZERO_PACKET[: len(pages)] == pages:
        return range(len(words))
    zero = _ZERO_PACKET[:page_size]
    starts = [index * page_size for index, word in enumerate(words) if not word]
    return [start // page_size for start in starts if zero == pages[start : start + page_size]]


def part(
    pages: memoryview, page_size: int, offsets: Sequence[int]
) -> tuple[list[memoryview], tuple[int, ...], tuple[int, ...]]:
    """Part a packet's pages, which are those at `offsets` of their block.

    Returns the runs of normal pages, as views of `pages`, their offsets, and the zero pages' offsets.
    """
    zeros = zero_indexes(pages, page_size)
    if not zeros:
        return [pages], tuple(offsets), ()
    runs = _without(zeros, len(offsets))
    return (
        [pages[first * page_size : end * page_size] for first, end in runs],
        tuple(offset for first, end in runs for offset in offsets[first:end]),
        tuple(offsets[index] for index in zeros),
    )


def _without(indexes: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Runs (first, end) of what is left of range(count) without some indexes in rising order."""
    left = []
    start = 0
    for index in indexes:
        if index != start:
            left.append((start, index))
        start = index + 1
    if start != count:
        left.append((start, count))
    return left
