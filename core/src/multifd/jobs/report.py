"""What a migration did, how far it is, and what `send` and `receive` have in common about that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from multifd.errors import UsageError
from multifd.wire.packet import PAGE_SIZES


@dataclass(frozen=True, slots=True)
class Result:
    """What a migration did.  `wire_bytes` are those from source to destination, all connections.

    `packets` counts every multifd packet, SYNC included; `memory_bytes` is (normal + zero) x page
    size; `seconds` run from the first connection to the confirmation.  `statistics` is what the
    compressor counted: packets by the way they took, empty where there is but one.  `digest` is the manifest digest of
    the snapshot that was received, or that all that was sent was checked against.  `standstill` are the seconds that a
    guest which ran stood still, where its monitor was there to tell: from when its QEMU stopped it until it went on,
    or, where it did not, until the migration had ended.
    """

    seconds: float
    normal_pages: int
    zero_pages: int
    wire_bytes: int
    memory_bytes: int
    packets: int
    channels: int
    compressor: str
    statistics: dict[str, int]
    digest: str | None = None
    standstill: float | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a migration is; `total_pages` is 0 while it is not known."""

    seconds: float
    pages: int
    total_pages: int
    memory_bytes: int
    wire_bytes: int


OnProgress = Callable[[Progress], None]
#: Seconds from one call of it to the next.
EVERY = 0.5

DEFAULT_CHANNELS = 2
MAX_CHANNELS = 255


def check_page_size(page_size: int | None) -> None:
    """Raises UsageError for one that no machine has."""
    if page_size not in (None, *PAGE_SIZES):
        raise UsageError(f"page size {page_size} is none of {', '.join(map(str, PAGE_SIZES))}")


def check_channels(channels: int) -> None:
    """Raises UsageError for a number that QEMU does not take."""
    if not 1 <= channels <= MAX_CHANNELS:
        raise UsageError(f"{channels} channels: QEMU takes 1 to {MAX_CHANNELS}")
