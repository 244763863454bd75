"""What the tests of ends share: their cases, their moments, and what has to be true afterwards."""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import multifd
import peers
import prove
import streams
from gates import DEVICES, Gate, Moment, blocks_end
from multifd.snapshot.reader import Snapshot
from processes import Command

VICTIMS = ("send", "receive", "relay")
ACTIONS = ("kill", "stop", "signal")
PHASES = ("set-up", "rounds", "switchover", "shut")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Seconds in which a signal ends a command: 1 is promised, and the machine may have other work.
PROMISED, PROMPT = 1.0, 3.0

#: Moments by victim, action and phase; seconds from signals to ends; what commands said that were done already.
COUNTS: Counter[tuple[str, str, str]] = Counter()
PROMPTLY: list[float] = []
DONE: Counter[tuple[str, int]] = Counter()


@dataclass(frozen=True)
class Case:
    """What happens to whom in which phase; the number makes the rest of it, with the run's seed."""

    number: int
    victim: str
    action: str
    phase: str

    def __str__(self) -> str:
        return f"{self.number:03}-{self.victim}-{self.action}-{self.phase}"

    def mix(self) -> random.Random:
        return random.Random(f"{prove.SEED} {self}")


def cases(times: int) -> list[Case]:
    """Each combination so many times."""
    kinds = list(itertools.product(VICTIMS, ACTIONS, PHASES))
    return [Case(number, *kind) for number, kind in enumerate(kinds * times)]


def chosen(times: int) -> list[Case]:
    """All of them; where a sample is asked for, one of each combination."""
    every = cases(times)
    if prove.SIZE == "full":
        return every
    mix = random.Random(prove.SEED)
    kinds = len(every) // times
    return [every[kind + kinds * mix.randrange(times)] for kind in range(kinds)]


@dataclass(frozen=True)
class Course:
    """How many bytes pass where in a whole migration."""

    blocks: int
    devices: int
    channels: int
    #: What all channels together begin with: who they are, and a SYNC.
    begin: int

    @classmethod
    def of(cls, gate: Gate, channels: int) -> Course:
        """That has passed there."""
        devices = len(gate.main) - gate.main.index(DEVICES) - len(DEVICES)
        begin = channels * (64 + streams.header_length(4096))
        return cls(blocks_end(gate.main), devices, gate.passed, begin)

    def moment(self, phase: str, mix: random.Random) -> Moment:
        """One in this phase: for the same `mix` at the same share of it, however well it was compressed today."""
        share = mix.random()
        if phase == "set-up":
            return Moment("main", int(share * self.blocks))
        if phase == "rounds":
            # Not the last tenth: a running guest does not send the same twice.
            after = self.begin + 1 + int(share * (self.channels * 9 // 10 - self.begin))
            return Moment("channels", after, first=self.blocks)
        if phase == "switchover":
            return Moment("main", int(share * self.devices), DEVICES)
        return Moment("shut")


def equal(snapshot: Path, memory: Snapshot) -> None:
    """Opened, it is that memory in all blocks."""
    found = multifd.open_snapshot(snapshot)
    assert [item.block for item in found.blocks] == [item.block for item in memory.blocks]
    for item, right in zip(found.blocks, memory.blocks, strict=True):
        assert item.path.read_bytes() == right.path.read_bytes(), f"{item.block.idstr} is not the guest's"
    assert found.device_state is not None
    assert memory.device_state is not None
    assert found.device_state.read_bytes() == memory.device_state.read_bytes()


def equal_ram(snapshot: Path, memory: bytes) -> None:
    """Opened, its RAM block is that."""
    (found,) = [item for item in multifd.open_snapshot(snapshot).blocks if item.block.idstr == "pc.ram"]
    assert found.path.read_bytes() == memory


def signalled(case: Case, victim: Command, number: int, began: float, gate: Gate) -> None:
    """It has got this signal: it ends soon, with the code for it, or with 0 where it was done; a relay always is."""
    code = victim.ends(PROMPT)
    PROMPTLY.append(time.monotonic() - began)
    has_all = peers.eventually(lambda: gate.shut, 0.5) if code == 0 else gate.shut
    if has_all:
        DONE[case.victim, code] += 1
    right = {0} if case.victim == "relay" else {128 + number} | ({0} if has_all else set())
    assert code in right, f"{code}: {victim.log.read_text()}"


def nothing_left(work: Path, *, killed: bool) -> None:
    """Of a `receive` of `snap` at `there`; one that was killed may leave what says that it is partial."""
    if not killed:
        assert not (work / "there").exists()
        assert list(work.glob(".snap*")) == []
    assert all(path.name.endswith(".partial") for path in work.glob(".snap*"))


def counting(request: pytest.FixtureRequest, whose: str) -> Iterator[None]:
    """Print at the end how many moments of each kind there were."""
    for counts in (COUNTS, PROMPTLY, DONE):
        counts.clear()
    began = time.monotonic()
    yield
    lines = [f"{whose}: {COUNTS.total()} moments in {time.monotonic() - began:.0f} s"]
    lines.append(f"{'':16}" + "".join(f"{phase:>12}" for phase in PHASES))
    for victim, action in dict.fromkeys((victim, action) for victim, action, _ in COUNTS):
        found = "".join(f"{COUNTS[victim, action, phase]:12}" for phase in PHASES)
        lines.append(f"{victim + ' ' + action:16}{found}")
    late = sum(seconds > PROMISED for seconds in PROMPTLY)
    most = max(PROMPTLY, default=0)
    lines.append(f"{len(PROMPTLY)} signals, {late} took more than {PROMISED:g} s, the slowest {most:.2f} s")
    lines += [f"signalled after SHUT 0: {victim} {code}: {times}" for (victim, code), times in sorted(DONE.items())]
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + "\n".join(lines))
