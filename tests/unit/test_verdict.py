"""How migrations end, for the source, the destination and the relay: every order of up to six events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from types import ModuleType

import pytest

from multifd.errors import CompressorError, HostError, MultifdError, PeerError
from multifd.jobs.destination import verdict as destination
from multifd.jobs.relay import verdict as relay
from multifd.jobs.source import verdict as source
from multifd.net.connection import Ended, Lost, Stalled
from multifd.wire.block import Block

LENGTH = 6
#: What has to be seen for a success, in this order, and nothing that ends it before; and which success it is.
PROOFS = {
    source: {"CONNECTED SYNC WRITTEN SAID_DONE": "CONFIRMED"},
    destination: {
        # One more than six: it begins where the list of blocks has come.
        "SYNC RAM_END ACCOUNTED ON_DISK TOLD": "CONFIRMED",
        "SYNC RAM_END ACCOUNTED ON_DISK UNTOLD": "UNCONFIRMED",
    },
    relay: {
        "SYNC RAM_END ACCOUNTED SAID_DONE": "CONFIRMED",
        "SYNC RAM_END ACCOUNTED DESTINATION_DONE": "UNCONFIRMED",
        # From where its main channel is not read any more, the destination is believed.
        "OPAQUE SAID_DONE": "CONFIRMED",
        "OPAQUE ACCOUNTED DESTINATION_DONE": "UNCONFIRMED",
    },
}
#: What ends it at once wherever it is, and how.
ENDS = {
    source: {
        "SAID_FAILED": "REFUSED",
        "DESTINATION_CLOSED": "REFUSED",
        "SAID_DONE": "REFUSED",
        "SILENCE": "LOST",
        "TROUBLE": "FAILED",
    },
    destination: {"SOURCE_ENDED": "ENDED_EARLY", "VIOLATION": "REFUSED", "SILENCE": "LOST", "TROUBLE": "FAILED"},
    relay: {
        "SAID_FAILED": "REFUSED",
        "SAID_DONE": "REFUSED",
        "DESTINATION_CLOSED": "REFUSED",
        "DESTINATION_DONE": "REFUSED",
        "SOURCE_ENDED": "ENDED_EARLY",
        "VIOLATION": "BROKEN",
        "SILENCE": "LOST",
        "TROUBLE": "FAILED",
    },
}
sides = pytest.mark.parametrize("side", [source, destination, relay], ids=["source", "destination", "relay"])


def orders(side: ModuleType, start: Enum) -> Iterator[tuple[tuple[str, ...], Enum]]:
    """Every order of up to six events, and where it leads; past an end only one more, since that changes nothing."""

    def go(seen: tuple[str, ...], state: Enum) -> Iterator[tuple[tuple[str, ...], Enum]]:
        yield seen, state
        if len(seen) == LENGTH:
            return
        for event in side.Saw:
            then = side.after(state, event)
            if state in side.FINAL:
                assert then is state, f"{seen} had ended, then came {event}"
            else:
                yield from go((*seen, event.name), then)

    return go((), start)


def first_steps(seen: tuple[str, ...], proofs: tuple[str, ...]) -> int:
    """How many of the proofs have come, in their order."""
    count = 0
    for event in seen:
        count += count < len(proofs) and event == proofs[count]
    return count


@sides
def test_every_order(side: ModuleType) -> None:
    """It is a success with all proofs in their order, and the first of what ends it decides otherwise."""
    start = side.State.WAITING if side is source else side.after(side.State.WAITING, side.Saw.BLOCKS)
    count = 0
    for seen, state in orders(side, start):
        count += 1
        *before, last = seen or ("",)
        for proofs, success in PROOFS[side].items():
            if first_steps(seen, tuple(proofs.split())) == len(proofs.split()) and state.name == success:
                break
        else:
            assert state not in side.SUCCESSES or state.name == "SAVED", seen
            if last in ENDS[side] and state.name != "SAVED":
                assert state.name == ENDS[side][last], seen
            elif last in ENDS[side]:
                assert first_steps(tuple(before), ("SYNC", "RAM_END", "ACCOUNTED", "ON_DISK")) == 4, seen
            else:
                assert state not in side.FINAL, seen
    assert count > 2_000


@sides
def test_every_state_can_be_reached(side: ModuleType) -> None:
    start = side.State.WAITING if side is source else side.after(side.State.WAITING, side.Saw.BLOCKS)
    found = {state for _, state in orders(side, start)} | {side.State.WAITING, start}
    assert found == set(side.State)


ERRORS: list[tuple[MultifdError, str, str]] = [
    (Ended("the connection ended"), "SOURCE_ENDED", "DESTINATION_CLOSED"),
    (Stalled("nothing moved"), "SILENCE", "SILENCE"),
    (PeerError("magic"), "VIOLATION", "TROUBLE"),
    (CompressorError("zlib"), "TROUBLE", "TROUBLE"),
    (HostError("no space"), "TROUBLE", "TROUBLE"),
]


@pytest.mark.parametrize(("error", "here", "there"), ERRORS, ids=[type(error).__name__ for error, _, _ in ERRORS])
def test_what_an_error_means(error: MultifdError, here: str, there: str) -> None:
    assert destination.seen(error).name == here
    assert relay.seen(error).name == here
    assert source.seen(error).name == there


def test_a_lost_connection_means_the_destination() -> None:
    assert relay.seen(Lost("gone")).name == source.seen(Lost("gone")).name == "DESTINATION_CLOSED"


@pytest.mark.parametrize("told", [destination.told, relay.told], ids=["destination", "relay"])
def test_an_early_end_reads_the_same_wherever_it_is(told: Callable[..., MultifdError]) -> None:
    state = destination.State.ENDED_EARLY if told is destination.told else relay.State.ENDED_EARLY
    said = {str(told(state, Ended(f"channel {number}: it ended"))) for number in range(3)}
    assert said == {"the source ended early: cancelled, or gone"}


@pytest.mark.parametrize("error", [Lost("it closed"), PeerError("it failed (code 1)")])
def test_a_destination_that_refuses_is_told_what_it_was_shown(error: MultifdError) -> None:
    shown = relay.fitting("pc-q35-9.2", bytes(16), [2], 4, [Block("pc.ram", 24 << 20)])
    said = str(relay.told(relay.State.REFUSED, error, shown))
    assert said == (
        f"{error}: its own message says why; it has to have machine pc-q35-9.2, VM uuid "
        "00000000-0000-0000-0000-000000000000, method zstd, multifd with 4 channels, RAM blocks pc.ram 24 MiB (multifd "
        "doctor compares)"
    )


def test_a_destinations_reason_is_told_where_only_it_knows() -> None:
    error = Lost("it closed")
    for state in source.State:
        said = str(source.told(state, error, "channels", "QEMU says: no"))
        expected = "it closed: QEMU says: no.  Here: channels; all of it must fit over there"
        assert said == (expected if state.name in ("REFUSED", "LOST") else "it closed")
    assert "it closed: the destination's own message says why.  Here" in str(
        source.told(source.State.LOST, error, "channels")
    )
