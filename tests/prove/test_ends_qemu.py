"""Whoever ends, with a real QEMU at the other end or at both: no guest is left standing, and none is there twice.

The same moments as in `test_ends.py`, of a guest that runs; and `receive` fails where its connections are cut.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import ends
import peers
import prove
from ends import PHASES, PROMPT, SIGNALS, Case, Course
from gates import Gate, Moment, Monitor
from processes import Command
from qemus import FAILING_CHANNELS, RELEASES, Qemu, Start, binary, content, qemus
from standin import Missing

#: Where it may fail.
CHANNELS = {"7.2": 2, "10.0": FAILING_CHANNELS, "11.1": FAILING_CHANNELS}
TIMES = 2
CASES = ends.cases(TIMES)
CASES += [Case(len(CASES) + more, "receive", "cut", phase) for more, phase in enumerate(PHASES[:3] * TIMES)]
#: A sample has one of each combination with our own ends already.
SAMPLE = 4
#: Seconds for a QEMU on a busy machine to find out that its migration has ended.
SOON = 20

pytestmark = [pytest.mark.timeout(150)]


@dataclass
class Measured:
    """A paused guest in a snapshot, and how much passes where, by the method."""

    snapshot: Path
    courses: dict[str, Course]


@pytest.fixture(scope="module", autouse=True)
def _counts(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from ends.counting(request, "with QEMU")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    found = {}
    for release in RELEASES:
        try:
            binary(release)
        except Missing as missing:
            pytest.skip(str(missing))
        work = tmp_path_factory.mktemp("measured")
        channels = CHANNELS[release]
        courses = {}
        for method in ("none", "zlib"):
            with qemus() as running:
                running.append(source := Qemu(release, work, method))
                source.fill(content())
                source.prepare(channels=channels, method=method, return_path=True)
                there = peers.Receiving(work / f"snap-{method}", f"unix:{work}/there", channels=channels)
                gate = Gate(work / f"gate-{method}", there.uri)
                source.monitor.command("migrate", uri=gate.uri)
                there.join()
                source.wait("completed")
                gate.close()
            courses[method] = Course.of(gate, channels)
        found[release] = Measured(work / "snap-none", courses)
    return found


class Scene:
    """What every case has: the QEMUs, a gate, the moment, and the memory of the guest when its destination had it."""

    def __init__(self, work: Path, start: Start, case: Case, measured: dict[str, Measured], stack: ExitStack) -> None:
        self.work, self.case, self.stack, self.mix = work, case, stack, case.mix()
        self.opened_before = case.action == "signal" and self.mix.random() < 0.5
        self.release = self.mix.choice(RELEASES)
        self.channels = CHANNELS[self.release]
        self.measured = measured[self.release]
        self.truth: list[bytes] = []
        self._start = start

    def qemu(self, name: str, **options: object) -> Qemu:
        return self._start(self.release, name, **options)

    def source(self, **options: object) -> Qemu:
        """Its guest runs."""
        source = self.qemu("source", **options)
        source.fill(content())
        source.monitor.command("cont")
        return source

    def target(self, method: str) -> Qemu:
        target = self.qemu("target", incoming=True)
        target.prepare(channels=self.channels, method=method)
        target.listen(f"unix:{self.work}/there")
        return target

    def moment(self, method: str, *, handed: bool) -> Moment:
        return replace(self.measured.courses[method].moment(self.case.phase, self.mix), handed=handed)

    def gate(self, target: str, moment: Moment, source: Qemu | None) -> Gate:
        def shut() -> None:
            if source is not None:
                self.truth.append(source.ram.read_bytes())  # its guest waits for that word, too

        gate = Gate(self.work / "gate", f"unix:{self.work}/{target}", moment, shut)
        self.stack.callback(gate.close)
        return gate

    def command(self, *arguments: object) -> Command:
        command = Command(self.work / "command.log", *arguments)
        self.stack.callback(command.close)
        return command

    def act(self, command: Command, gate: Gate) -> None:
        """When it has come to the moment."""
        case = self.case
        assert gate.reached(), f"the moment never came: {command.log.read_text()}"
        ends.COUNTS[case.victim, case.action, case.phase] += 1
        if case.action == "signal":
            number = self.mix.choice(SIGNALS)
            began = time.monotonic()
            command.send(number)
            if self.opened_before or case.phase == "shut":
                gate.open()
            ends.signalled(case, command, number, began, gate)
        elif case.action == "kill":
            command.told(signal.SIGKILL, PROMPT)
        elif case.action == "cut":
            gate.cut()
        else:
            command.send(signal.SIGSTOP)
            gate.open()
            time.sleep(self.mix.uniform(0.02, 0.3))
            command.send(signal.SIGCONT)
        gate.open()


def runs(qemu: Qemu) -> bool:
    return bool(qemu.monitor.command("query-status")["running"])


def receive(scene: Scene) -> None:
    """`receive --qmp`, whose QEMU calls the gate instead."""
    case, work = scene.case, scene.work
    then = scene.mix.choice(("stop", "resume"))
    source = scene.source(more=["-qmp", f"unix:{work}/free.qmp,server=on,wait=off"])
    gate = scene.gate("here", scene.moment("none", handed=scene.mix.random() < 0.5), source)
    monitor = Monitor(work / "monitor", work / "free.qmp", f"unix:{work}/here", gate.uri)
    scene.stack.callback(monitor.close)
    arguments = ("-o", work / "snap", "--qmp", work / "monitor", "--channels", scene.channels, "--then", then)
    command = scene.command("receive", f"unix:{work}/here", *arguments)
    scene.act(command, gate)
    code = command.ends()
    whole = (work / "snap").exists()
    if not scene.opened_before:
        assert whole == (case.action == "stop" or case.phase == "shut"), command.log.read_text()
    if case.action == "stop":
        assert code == 0, command.log.read_text()
    assert whole or (code and not gate.shut)
    if whole and gate.shut:
        ends.equal_ram(work / "snap", scene.truth[0])
    if case.action != "kill":
        assert not (work / "here").exists()
        assert list(work.glob(".snap*")) == []
    source.wait("completed" if gate.shut else "failed", "cancelled", seconds=SOON)
    assert case.action != "cut" or code == 1
    if case.action in ("signal", "cut") and (not gate.shut or then == "resume"):
        assert peers.eventually(lambda: runs(source), SOON), f"the guest stands: {command.log.read_text()}"


def send(scene: Scene) -> None:
    """Into a QEMU that waits.  Where a SYNC never comes some wait for ever, whoever was the source."""
    case = scene.case
    method = scene.mix.choice(("none", "zlib"))
    target = scene.target(method)
    gate = scene.gate("there", scene.moment(method, handed=False), None)
    snapshot = scene.measured.snapshot
    arguments = ("--compressor", method, "--channels", scene.channels)
    command = scene.command("send", snapshot, gate.uri, *arguments)
    scene.act(command, gate)
    code = command.ends()
    if case.action == "stop":
        assert code == 0, command.log.read_text()
    if code == 0:
        assert gate.shut
    if gate.shut or peers.eventually(lambda: gate.shut, 0.2):  # all that was missing may have been on its way
        target.wait("completed", seconds=SOON)
        assert target.ram.read_bytes() == content()


def relay(scene: Scene) -> None:
    """Between two QEMUs: the guest is at one of them."""
    case, work = scene.case, scene.work
    at_source = case.phase != "shut" and scene.mix.random() < 0.5
    target, source = scene.target("zlib"), scene.source()
    gate = scene.gate(
        "here" if at_source else "there", scene.moment("none" if at_source else "zlib", handed=True), source
    )
    onward = f"unix:{work}/there" if at_source else gate.uri
    command = scene.command("relay", "--listen", f"unix:{work}/here", "--connect", onward, "--to", "zlib")
    command.listens()
    source.prepare(channels=scene.channels, return_path=True)
    source.monitor.command("migrate", uri=gate.uri if at_source else f"unix:{work}/here")
    scene.act(command, gate)
    if case.action == "stop" or case.phase == "shut":
        target.wait("completed", seconds=SOON)
        # One that was killed may not have passed on the last word.
        confirmed = (
            source.wait(*(["failed"] if case.action == "kill" else []), "completed", seconds=SOON) == "completed"
        )
    else:
        confirmed = source.wait("failed", *(["completed"] if scene.opened_before else []), seconds=SOON) == "completed"
    if confirmed:
        assert not runs(source), "the guest is there twice"
        target.wait("completed", seconds=SOON)
        assert target.ram.read_bytes() == scene.truth[0]
    else:
        assert peers.eventually(lambda: runs(source), SOON), "the guest stands"
    if case.action == "stop":
        code, seconds = command.told(signal.SIGTERM, PROMPT)
        assert code == 0
        ends.PROMPTLY.append(seconds)
    if case.action != "kill":
        assert not (work / "here").exists()


JOBS = {"receive": receive, "send": send, "relay": relay}


@pytest.mark.parametrize("case", prove.sample(CASES, SAMPLE), ids=str)
def test_a_moment(start: Start, work: Path, measured: dict[str, Measured], case: Case) -> None:
    with ExitStack() as stack:
        JOBS[case.victim](Scene(work, start, case, measured, stack))
