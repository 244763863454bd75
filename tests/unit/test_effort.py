"""The rung that is chosen: over a simulated link by a simulated clock."""

from __future__ import annotations

import heapq
import os
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import multifd
from multifd import open_snapshot
from multifd.codec.compressor import Compressor
from multifd.codec.probing import probe_all
from multifd.codec.settings import Settings
from multifd.effort.choice import Choice
from multifd.effort.controller import Effort
from multifd.effort.sampling import looks_random
from multifd.errors import CompressorError, HostError, UsageError
from multifd.hookspecs import Facts, Probe, hookimpl
from pairs import PAGE

PACKET = 512 * 1024
BUFFER = 1 << 20
#: Seconds per byte in one thread, payload per byte: as zstd's levels on two slow cores.
COSTS = {0: (1 / 4e9, 1.0), 1: (1 / 240e6, 0.28), 3: (1 / 150e6, 0.26), 6: (1 / 60e6, 0.24), 9: (1 / 38e6, 0.235)}


class Simulated:
    """A compressor of known costs."""

    name = "simulated"


def known_costs(_: object, settings: Settings, *__: object) -> tuple[float, float]:
    assert settings.level is not None
    return COSTS[settings.level]


@dataclass
class World:
    """Channels that compress at the same time and share a link; a peer that takes pages at its own rate."""

    link: float
    channels: int = 2
    peer: float = 1e12
    now: float = 0.0
    log: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        compressor = Simulated()
        ways: Any = [(compressor, Settings(level, {})) for level in COSTS]
        self.effort = Effort(Choice("simulated", ways), clock=lambda: self.now, measure=known_costs)
        self._free = 0.0
        self._due = [(0.0, channel) for channel in range(self.channels)]
        for _ in self._due:
            self.effort.join()

    def run(self, until: float, data: bytes = bytes(PACKET)) -> float:
        """Send packets until then; bytes of pages per second."""
        page = [memoryview(data)]
        start, sent = self.now, 0
        while self._due[0][0] < until:
            self.now, channel = heapq.heappop(self._due)
            rung = self.effort.choose(page, PAGE)
            level = rung.settings.level
            assert level is not None
            seconds, ratio = COSTS[level]
            self.log.append((self.now, level))
            began, self.now = self.now, self.now + seconds * PACKET
            self.effort.note(rung.compressor, level, PACKET, int(ratio * PACKET), self.now - began, 0.0)
            self._free = max(self._free, self.now) + max(ratio * PACKET / self.link, PACKET / self.peer)
            room = self._free - BUFFER / self.link  # what the sockets hold is on its way
            heapq.heappush(self._due, (max(self.now, room), channel))
            sent += PACKET
        return sent / (self.now - start)

    def levels(self, since: float) -> set[int]:
        return {level for at, level in self.log if at >= since}


def best(link: float, channels: int = 2) -> float:
    return max(min(channels / seconds, link / ratio) for seconds, ratio in COSTS.values())


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


@pytest.mark.parametrize("link", [3e6, 12.5e6, 60e6, 125e6, 400e6, 1.25e9, 1e11])
def test_a_constant_link_gives_a_constant_level(link: float) -> None:
    """After a second it stays; what passes is within a tenth of the best level's."""
    world = World(link)
    world.run(1)
    rate = world.run(9)
    assert len(world.levels(1)) == 1, world.levels(1)
    assert rate > 0.85 * best(link)


def test_it_follows_a_link_that_changes() -> None:
    world = World(12.5e6)
    world.run(3)
    assert min(world.levels(2)) >= 3
    world.link = 1e11
    world.run(20)
    assert world.levels(19) == {0}
    world.link = 12.5e6
    world.run(24)
    assert min(world.levels(23)) >= 3


def test_a_stretch_of_zero_pages_is_no_slow_link() -> None:
    """Next to nothing is on the wire then, and the memory behind it is stored as before."""
    world = World(1e9)
    world.run(2)
    assert world.levels(1) == {0}
    for _ in range(5):
        end = world.now + 0.3
        while world.now < end:
            world.now += 0.002
            world.effort.idle(0.002 * world.channels)
        world._due = [(world.now, channel) for channel in range(world.channels)]
        world.run(world.now + 0.02)
    world.run(world.now + 1)
    assert world.levels(2) == {0}


def test_a_destination_that_stands_still_for_a_moment_is_no_slow_link() -> None:
    world = World(1e9)
    world.run(2)
    for _ in range(5):
        world.peer = 200e6
        world.run(world.now + 0.1)
        world.peer = 1e12
        world.run(world.now + 1)
    assert world.levels(1) == {0}


def test_memory_that_begins_with_noise() -> None:
    """It says nothing about the rest."""
    world = World(12.5e6)
    world.run(3, random.Random(6).randbytes(PACKET))
    assert world.levels(0) == {0}
    world.run(6)
    assert min(world.levels(5)) >= 3


def test_a_peer_that_is_slow_with_the_pages_gets_no_harder_work() -> None:
    """Bytes saved bring nothing where the destination's own work is what all wait for."""
    world = World(1e11, peer=150e6)
    world.run(2)
    assert world.run(9) > 0.85 * 150e6
    assert max(world.levels(2)) <= 1


def test_a_packet_that_will_not_shrink_is_seen() -> None:
    mix = random.Random(3)
    noise = mix.randbytes(PACKET)
    program = Path(sys.executable).read_bytes()[:PACKET]
    text = (Path(random.__file__).read_bytes() * 20)[:PACKET]
    assert looks_random([memoryview(noise)])
    assert not looks_random([memoryview(program)])
    assert not looks_random([memoryview(text)])
    assert not looks_random([memoryview(noise)[:PAGE], memoryview(text)]), "most of it shrinks"


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("none,level=adaptive", UsageError, "none has no level: leave level=adaptive out"),
        ("zlib,level=best", UsageError, "zlib: level 'best' is not a number, adaptive or auto"),
        ("adaptive,level=3", UsageError, "adaptive has no option 'level'; it has: accepts="),
        ("adaptive,accepts=lzma", UsageError, "there is no method 'lzma'; installed: "),
    ],
)
def test_what_cannot_be_chosen(work: Path, how: str, error: type[Exception], message: str) -> None:
    (work / "image.raw").write_bytes(bytes(PAGE))
    with pytest.raises(error, match=message):
        multifd.send(open_snapshot(work / "image.raw"), f"unix:{work}/nobody", how)


def test_adaptive_needs_one_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multifd.effort.choice.probe_all", lambda _: [])
    with pytest.raises(HostError, match="adaptive: no compressor that the peer accepts works here"):
        Choice.parse("adaptive,accepts=uadk", bytes)


def test_one_compressor_for_each_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver has one decoder for a flag: two that take turns would each go on with the other's stream."""
    row = probe_all(["zlib"])[0]
    rows = [row, row | {"name": "qatzip-sw", "hardware": True}, row | {"name": "zstd", "flag": 31, "method": "a"}]
    rows.append(row | {"name": "qpl-sw", "flag": 31, "method": "b"})
    monkeypatch.setattr("multifd.effort.choice.probe_all", lambda _: rows)
    assert {compressor.name for compressor, _ in Choice.parse("adaptive", bytes).ways} == {"qatzip-sw"}


def test_one_that_fails_while_it_is_measured_is_told() -> None:
    class Broken:
        @hookimpl
        def multifd_compressor(self) -> Facts:
            return Facts("broken", "broken", 31, "fails", levels=range(3), default_level=1, ladder=(0, 1))

        @hookimpl
        def multifd_probe(self) -> Probe:
            return Probe(True, "none")

        @hookimpl
        def multifd_send_prepare(self) -> None:
            raise CompressorError("no device really")

        @hookimpl
        def multifd_recv(self) -> None:
            raise CompressorError("no device really")

    compressor = Compressor("broken", Broken(), "test 1")
    chosen = Effort(Choice.of(compressor, compressor.settings({"level": "adaptive"}, sending=True)))
    with pytest.raises(CompressorError, match="multifd_send_prepare: broken: no device really"):
        chosen.choose([memoryview(bytes(PACKET))], PAGE)
