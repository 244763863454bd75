"""Whether rounds come to an end, the moment to stop a guest, and whose switchover may be acknowledged; no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from multifd.errors import UsageError
from multifd.jobs.convergence import EARLY, ROUNDS, Convergence
from multifd.jobs.destination.stopping import StopAfter, Stopping
from multifd.wire.machine import takes_unasked_ack
from multifd.wire.packet import RamPacket
from multifd.wire.passes import Passes

PAGE = 4096
MEMORY = 100_000
#: Pages per second.
LINK = 10_000.0


class Source:
    """Sends rounds over a link, with a sync point per round or, as QEMU 7.2, per section of 50 ms."""

    def __init__(self, *, sections: bool = False, may_wait: bool = False, twice: bool = False) -> None:
        """Where `twice`, each round is followed by one of no page, as QEMU 10.0's are where downtime-limit is small."""
        self._sections = sections
        self._may_wait = may_wait
        self._twice = twice
        self._convergence = Convergence()
        self.now = 1000.0
        self._passes = -1
        self._pages = 0
        self.rounds = 0
        self.said: list[tuple[int, str]] = []
        self._sync_point()  # the one of the set-up

    def _sync_point(self) -> None:
        passes = max(0, self._passes)
        text = self._convergence.sync_point(passes, self._pages, PAGE, self.now, may_wait=self._may_wait)
        if text:
            self.said.append((self.rounds, text))

    def round(self, pages: float, least: float = 0.0) -> None:
        """One of so many pages, which takes so long at least."""
        left = int(pages)
        self._passes += left > 0
        step = int(LINK * 0.05) if self._sections else max(left, 1)
        self.now += max(0.0, least - left / LINK)
        while True:
            sent = min(left, step)
            self._pages += sent
            self.now += sent / LINK
            left -= sent
            self._sync_point()
            if not left:
                break
        if self._twice and pages:
            self.now += 0.001
            self._sync_point()
        self.rounds += 1


def all_of(source: Source, rounds: Iterable[float], least: float = 0.0) -> list[str]:
    source.round(MEMORY)
    for pages in rounds:
        source.round(pages, least)
    return [text for _, text in source.said]


@pytest.mark.parametrize(("sections", "twice"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("wobble", [0, 0.1])
def test_a_guest_that_writes_as_fast_as_it_is_carried(sections: bool, twice: bool, wobble: float) -> None:
    source = Source(sections=sections, twice=twice, may_wait=twice)
    said = all_of(source, (7000 * (1 + wobble * (number % 3 - 1)) for number in range(100)))
    assert len(said) == 1, "once"
    assert "as fast as it is carried: each of the last 12 rounds was of some 2" in said[0]
    assert "--stop-after" in said[0]
    assert "max-bandwidth" in said[0]
    assert ROUNDS <= source.said[0][0] < ROUNDS + 8, "soon"


def shrinking(first: float, by: float, until: float) -> Iterator[float]:
    while first > until:
        yield first
        first *= by


@pytest.mark.parametrize("sections", [False, True])
@pytest.mark.parametrize("by", [0.5, 0.8, 0.9, 0.95, 0.97])
def test_a_guest_that_converges_slowly(sections: bool, by: float) -> None:
    """QEMU's last round is one that takes 0.3 s."""
    assert not all_of(Source(sections=sections), shrinking(MEMORY * 0.9, by, 0.3 * LINK))


@pytest.mark.parametrize("sections", [False, True])
def test_a_guest_that_is_busy_for_a_while(sections: bool) -> None:
    assert not all_of(Source(sections=sections), [7000] * 10 + [4000] * 3 + [2000])


@pytest.mark.parametrize("may_wait", [False, True])
def test_rounds_of_no_page_for_ever(may_wait: bool) -> None:
    """Some thousand a second, as QEMU 10.0 sends them while it waits for switchover-ack."""
    source = Source(may_wait=may_wait)
    said = all_of(source, [200, 0, 30, *[0, 0, 50] * 2000], least=0.001)
    assert source.now - 1000 - MEMORY / LINK > EARLY
    assert [text.partition(": ")[2][:31] for text in said] == ["it may wait for switchover-ack:"] * may_wait


def test_rounds_of_no_page_at_all() -> None:
    """A guest without a program writes nothing."""
    assert "switchover-ack" in all_of(Source(may_wait=True), [0] * 7000, least=0.001)[0]


def test_short_rounds_for_a_moment() -> None:
    assert not all_of(Source(may_wait=True), [0] * 4000, least=0.001)


def test_a_guest_that_is_busy_while_its_source_waits() -> None:
    """Each of its rounds takes less than 0.25 s: it is not the link that is waited for."""
    assert "switchover-ack" in all_of(Source(may_wait=True), [2000] * 40)[0]


@pytest.mark.parametrize("may_wait", [False, True])
def test_a_long_first_round_says_nothing(may_wait: bool) -> None:
    assert not all_of(Source(sections=True, may_wait=may_wait), [])


def test_passes_are_told_by_offsets() -> None:
    passes = Passes()

    def ended(ramblock: str, *offsets: int, zero: bool = False) -> int:
        passes.add(RamPacket(ramblock=ramblock, normal=() if zero else offsets, zero=offsets if zero else ()))
        return passes.ended

    assert [ended("ram", 0, 1), ended("ram", 2, 3), ended("vga", 0), ended("rom", 0)] == [0, 0, 0, 0]
    assert ended("ram", 2) == 1, "the second"
    assert ended("rom", 0, zero=True) == 1
    assert ended("ram", 0) == 2
    passes.add(RamPacket(sync=True))
    assert ended("ram", 0) == 3, "the same page again"


@pytest.mark.parametrize(
    ("machine", "known"),
    [
        ("pc-q35-10.0", True),
        ("pc-i440fx-7.2", True),
        ("virt-9.2", True),
        ("pseries-11.0", True),
        ("s390-ccw-virtio-10.0", True),
        ("pc-q35-11.1", False),
        ("virt-12.0", False),
        ("microvm", False),
        ("isapc", False),
        ("virt", False),
        ("pc-q35-rhel9.6.0", False),
        ("pc-i440fx-noble", False),
        ("pc-q35-8.2-hpb", False),
        ("xenfv-4.2", False),
        ("", False),
    ],
)
def test_whose_switchover_may_be_acknowledged(machine: str, known: bool) -> None:
    assert takes_unasked_ack(machine) is known


@pytest.mark.parametrize(
    ("text", "seconds", "rounds"), [("30s", 30, 0), ("0.5s", 0.5, 0), ("5rounds", 0, 5), ("1round", 0, 1)]
)
def test_when_a_guest_is_stopped(text: str, seconds: float, rounds: int) -> None:
    assert StopAfter.parse(text) == StopAfter(seconds, rounds)


@pytest.mark.parametrize(
    "text", ["", "30", "s", "0s", "0rounds", "-1s", "1.5rounds", "5 rounds", "5m", "nans", "1e3s", "9999999s", "٣s"]
)
def test_words_that_are_no_time_to_stop(text: str) -> None:
    with pytest.raises(UsageError, match="write 30s or 5rounds"):
        StopAfter.parse(text)


def test_a_guest_is_stopped_at_the_end_of_a_round() -> None:
    stopping = Stopping(StopAfter(seconds=10))
    looks = [(1, 0), (9, 1), (10, 1), (11, 1), (12, 2)]
    assert [stopping.now(*look) for look in looks] == [False, False, False, False, True]
    assert stopping.now(12.1, 3), "nobody has seen to it yet"


def test_a_guest_is_stopped_after_so_many_rounds() -> None:
    stopping = Stopping(StopAfter(rounds=2))
    assert [stopping.now(1, ended) for ended in (-1, 0, 0, 1, 1, 3)] == [False] * 5 + [True]
