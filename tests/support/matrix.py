"""Every release with every other, each machine, each method: what comes of it."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from boards import BOARDS, METHODS, Board, Trial
from multifd.errors import MultifdError
from qemus import RELEASES, Qemu, qemus

WORKS = ""
#: Characters of what a failure says.
SHOWN = 200


@dataclass(frozen=True, slots=True)
class Group:
    """All that goes from one release, as one type of a machine."""

    board: Board
    kind: str
    source: str

    def __str__(self) -> str:
        return f"{self.board.system}-{self.kind}-{self.source}"

    @property
    def targets(self) -> Sequence[str]:
        """The releases that have this type."""
        return [release for release in RELEASES if self.kind in self.board.types(release)]


@dataclass(slots=True)
class Pair:
    """What came of one group's migrations to one release: `receive`, `send` and `relay`, each with what it said."""

    said: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    #: How many migrations, beside what was received.
    tried: int = 0
    #: What the same two QEMUs say with nothing between; asked where a relay or a snapshot failed.
    alone: str | None = None

    def worked(self, way: str) -> bool:
        """Whether each method did."""
        return self.said.get(way) == {WORKS}

    @property
    def works(self) -> bool:
        return all(map(self.worked, ("receive", "send", "relay")))

    @property
    def ours(self) -> bool:
        """Whether it fails, and not without us."""
        return not self.works and self.alone == WORKS


def groups(boards: Sequence[Board] = BOARDS) -> Iterator[Group]:
    """Of these machines."""
    for board in boards:
        for kind in board.types():
            for release in Group(board, kind, "").targets:
                yield Group(board, kind, release)


def try_group(group: Group) -> dict[str, Pair]:
    """What comes of it, for each release that it goes to."""
    work = Path(tempfile.mkdtemp(prefix="multifd-matrix-", dir="/dev/shm"))
    try:
        return _Tried(group, work).pairs
    finally:
        shutil.rmtree(work)


class _Tried:
    """A group, being tried."""

    def __init__(self, group: Group, work: Path) -> None:
        self._group = group
        self._trial = Trial(group.board, group.kind, work)
        self.pairs = {target: Pair() for target in group.targets}
        snapshots: list[Path] = []
        for method in METHODS:
            snapshot = work / method
            said = self._attempt(lambda running, m=method, s=snapshot: self._receive(running, m, s))  # type: ignore[misc]
            for pair in self.pairs.values():
                pair.said["receive"].add(said)
            if said == WORKS:
                snapshots.append(snapshot)
        for target, pair in self.pairs.items():
            self._try_pair(target, pair, snapshots)

    def _try_pair(self, target: str, pair: Pair, snapshots: Sequence[Path]) -> None:
        for number, method in enumerate(METHODS):
            if snapshots:
                snapshot = snapshots[(number + 1) % len(snapshots)]
                said = self._attempt(lambda running, m=method, s=snapshot: self._send(running, target, m, s))  # type: ignore[misc]
                pair.said["send"].add(said)
                pair.tried += 1
        turn = RELEASES.index(target)
        for number, method in enumerate(METHODS):
            # What a machine is has nothing to do with the method: one of the three, for most.
            if self._group.board.name == "q35" or number == turn % len(METHODS):
                to = METHODS[(number + 1) % len(METHODS)]
                said = self._attempt(lambda running, m=method, t=to: self._relay(running, target, m, t))  # type: ignore[misc]
                pair.said["relay"].add(said)
                pair.tried += 1
        if not pair.works:
            pair.alone = self._attempt(lambda running: self._alone(running, target))

    def _attempt(self, what: Callable[[list[Qemu]], None]) -> str:
        """What is said of it: nothing where it works."""
        with qemus() as running:
            try:
                what(running)
            except (MultifdError, AssertionError) as error:
                if crash := crashed(running):
                    return crash
                said = told(running)
                if isinstance(error, AssertionError):
                    return shorten(said or str(error))
                return shorten(f"{error}; {said}" if said else str(error))
            finally:
                for qemu in running:
                    qemu.ram.unlink()  # a gigabyte, of some
        return WORKS

    def _receive(self, running: list[Qemu], method: str, snapshot: Path) -> None:
        self._trial.receive(self._trial.qemu(running, self._group.source), method, snapshot)

    def _send(self, running: list[Qemu], target: str, method: str, snapshot: Path) -> None:
        # A type without a version says nothing of how its destination synchronizes.
        sync = None if self._group.board.versioned else "section" if target == "7.2" else "round"
        self._trial.send(snapshot, self._trial.qemu(running, target, incoming=True), method, sync)

    def _relay(self, running: list[Qemu], target: str, method: str, to: str) -> None:
        source = self._trial.qemu(running, self._group.source)
        self._trial.relay(source, self._trial.qemu(running, target, incoming=True), method, to)

    def _alone(self, running: list[Qemu], target: str) -> None:
        source = self._trial.qemu(running, self._group.source)
        self._trial.alone(source, self._trial.qemu(running, target, incoming=True))


def explained(pair: Pair) -> str:
    """Why one does not work."""
    if pair.alone:
        return f"QEMU alone: {pair.alone}"
    said = (f"{way}: {words}" for way, all_words in pair.said.items() for words in sorted(all_words - {WORKS}))
    return f"{'; '.join(said)}; QEMU alone does it"


def crashed(running: Sequence[Qemu]) -> str:
    """Whether a QEMU did; it may be about to end."""
    for qemu in running:
        with suppress(subprocess.TimeoutExpired):
            code = qemu.process.wait(0.3)
            if code < 0:
                return f"it crashes ({signal.Signals(-code).name})"
    return ""


def told(running: Sequence[Qemu]) -> str:
    """The first complaint of these QEMUs that is an error."""
    for qemu in reversed(running):
        for line in qemu.log.read_text(errors="replace").splitlines():
            if line.strip() and "warning: " not in line and "deprecated" not in line:
                return line.partition(": ")[2] or line
    return ""


def shorten(text: str) -> str:
    """On one line, without what differs from run to run."""
    text = re.sub(r"unix:/\S+?(?=[:,; ]|$)|/dev/shm/\S+?(?=[:,; ]|$)", "...", " ".join(text.split()))
    text = re.sub(r"tcp:127\.0\.0\.1:\d+", "...", text)
    text = re.sub(r"(QEMU's migration is \w+): \{.*", r"\1 for ever", text)
    return text[:SHOWN] + ("..." if len(text) > SHOWN else "")
