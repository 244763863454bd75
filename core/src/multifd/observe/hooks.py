"""Who may look on: they see every packet and the main channel, and can neither change nor break them.

An observer is named by an entry point of group `multifd.observers`, and asked for by
`--observe NAME[=ARG]`.  The entry point is a callable: given ARG (empty without), it returns an
object whose methods, marked with `multifd.hookspecs.hookimpl`, are the hooks below, as many as it
wants, with as many of their arguments as it wants.  It raises OSError or CallerError where ARG
will not do; that is before anything is connected.

A direction is IN, from the source, or OUT, to the destination; a relay has both, what came and
what went.  BACK are the destination's answers on the main channel.

Hooks are called in the thread that moves the bytes, which waits for them: those of one channel and
direction one by one, those of different channels at the same time.  One that raises is the last
call of this observer but for `multifd_observe_finish`; the migration goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from multifd.hookspecs import hookspec
from multifd.wire.packet import RamPacket

IN, OUT, BACK = "in", "out", "back"


@dataclass(frozen=True, slots=True)
class ObservedChannel:
    """One multifd channel in one direction; `id` counts from 0, `init` are the 64 bytes that it began with."""

    direction: str
    id: int
    init: bytes
    page_size: int = 0


class Times(NamedTuple):
    """Seconds that one packet took, by stage; 0 for stages of the other direction.

    `wait`: until it began to come, or until there were pages to send and they were read.  `read`:
    its payload came.  `decode`, `encode`: in the compressor.  `write`: until the connection took it.
    """

    wait: float = 0.0
    read: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    write: float = 0.0


@hookspec
def multifd_observe_start(directions: Sequence[str]) -> None:
    """A migration begins; a relay serves one after another.  `directions`: IN, OUT or both."""


@hookspec
def multifd_observe_main(direction: str, data: memoryview) -> None:
    """Bytes of the main channel passed, in order.  `data` is read-only and valid during the call."""


@hookspec
def multifd_observe_packet(
    channel: ObservedChannel,
    packet: RamPacket,
    header: memoryview,
    payload: Sequence[memoryview],
    times: Times,
) -> None:
    """A packet passed: it was read and decoded, or written.  Every one, SYNC and zero pages only, too.

    `packet` is what `header` says, the bytes as they are on the wire; `payload` follows them.
    All views are read-only and valid during the call only: copy what is to be kept.
    """


@hookspec
def multifd_observe_finish(complete: bool) -> None:
    """The migration is over, and no other hook runs: write out, release.

    `complete` says that it succeeded and that this observer saw all of it.
    """
