"""Whoever ends, wherever a migration is: killed, stopped for a while or signalled, and nobody is left with a lie.

Each moment is exact: a gate beside the one that it happens to lets so many bytes pass, stands still, and goes on when
it has happened.  Our own ends are here, real QEMUs at the other end in `test_ends_qemu.py`.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import ends
import multifd
import peers
import streams
from captures import OWN_CAPTURES, check, load_captures
from ends import PROMPT, SIGNALS, Case, Course
from gates import Gate
from processes import Command

#: Seconds that a side waits for one that has stopped: enough for a busy machine to get there.
PATIENCE = 2.0
TIMES = 7

pytestmark = [pytest.mark.timeout(90), pytest.mark.may_warn(".* ignored")]


@pytest.fixture(scope="module", autouse=True)
def _counts(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from ends.counting(request, "our own ends")


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of 16 MiB, with a real QEMU's device state."""
    path = tmp_path_factory.mktemp("guest") / "snap"
    capture = load_captures(OWN_CAPTURES)["q100-m72-zlib-2ch"]
    multifd.receive(f"recording:{capture.directory}", path)
    check(path, capture)
    return path


@pytest.fixture(scope="module")
def courses(guest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Course]:
    """How much passes where, by the method."""
    found = {}
    for method in ("none", "zlib", "zstd"):
        work = tmp_path_factory.mktemp("course")
        there = peers.Receiving(work / "snap", f"unix:{work}/there")
        gate = Gate(work / "gate", there.uri)
        multifd.send(guest, gate.uri, method)
        there.join()
        gate.close()
        found[method] = Course.of(gate, channels=2)
    return found


@dataclass
class Chain:
    """send, receive, and where there is one a relay between them; a gate beside the victim."""

    work: Path
    case: Case
    mix: random.Random
    guest: Path
    courses: dict[str, Course]
    stack: ExitStack

    def __post_init__(self) -> None:
        case, mix, work = self.case, self.mix, self.work
        self.long = case.action == "stop" and mix.random() < 0.5
        self.opened_before = mix.random() < 0.5
        relayed = case.victim == "relay" or mix.random() < 0.5
        # Beside a relay on either side; where its destination's word is read, or it may not yet have called it: there.
        self.at_source = case.victim == "send" or (
            case.victim == "relay" and case.phase != "shut" and not self.long and mix.random() < 0.5
        )
        method, to = mix.choice(("none", "zlib", "zstd")), mix.choice(("zlib", "zstd"))
        course = self.courses[method if self.at_source or not relayed else to]
        moment = course.moment(case.phase, mix)
        if case.phase == "shut":
            moment = replace(moment, handed=case.victim == "relay" or (case.victim == "receive" and mix.random() < 0.5))
        if self.long and moment.stream == "main":
            # Its RAM blocks have come: it is no stranger, and clocks run for it.
            moment = replace(moment, after=max(course.blocks, moment.after))
        there, here, gate = (f"unix:{work}/{name}" for name in ("there", "here", "gate"))
        onward = there if self.at_source else gate
        self.relay_arguments = ("relay", "--listen", here, "--connect", onward, "--to", to)
        idle = ("--idle-timeout", PATIENCE) if self.long else ()
        self.receive = self._start("receive", "receive", there, "-o", work / "snap", *idle)
        self.relay = self._start("relay", *self.relay_arguments) if relayed else None
        self.receive.listens()
        if self.relay is not None:
            self.relay.listens()
        self.gate = Gate(work / "gate", here if self.at_source and relayed else there, moment)
        self.stack.callback(self.gate.close)
        entry = here if relayed and not self.at_source else gate
        patience = ("--timeout", PATIENCE) if self.long else ()
        self.send = self._start("send", "send", self.guest, entry, "--compressor", method, *patience)

    def _start(self, name: str, *arguments: object) -> Command:
        command = Command(self.work / f"{name}.log", *arguments)
        self.stack.callback(command.close)
        return command

    @property
    def victim(self) -> Command:
        found = {"send": self.send, "receive": self.receive, "relay": self.relay}[self.case.victim]
        assert found is not None
        return found

    def others_end(self) -> None:
        for command in (self.send, self.receive):
            if command is not self.victim:
                self._received() if command is self.receive else command.ends()

    def act(self) -> None:
        """What happens to the victim; then the gate is open."""
        case, victim = self.case, self.victim
        if case.action == "signal":
            number = self.mix.choice(SIGNALS)
            began = time.monotonic()
            victim.send(number)
            if self.opened_before:
                self.gate.open()
            ends.signalled(case, victim, number, began, self.gate)
        elif case.action == "kill":
            victim.told(signal.SIGKILL, PROMPT)
        else:
            victim.send(signal.SIGSTOP)
            self.gate.open()
            if self.long:
                self.others_end()
            else:
                time.sleep(self.mix.uniform(0.02, 0.3))
            victim.send(signal.SIGCONT)
        self.gate.open()

    def judge(self) -> None:
        """All have ended but the relay: what is left agrees with what was said."""
        case, gate = self.case, self.gate
        sent, received = self.send.ends(), self._received()
        whole = (self.work / "snap").exists()
        if whole:
            ends.equal(self.work / "snap", multifd.open_snapshot(self.guest))
        said = f"send {sent}, receive {received}, whole {whole}, SHUT 0 {gate.shut}"
        assert whole or (sent and received and not gate.shut), said
        if case.victim != "receive":
            assert (received == 0) == whole, said
        if case.victim != "send":
            assert sent in (0, 1), said
        if case.phase == "shut" and (case.victim == "receive" or (case.victim, case.action) == ("relay", "signal")):
            assert sent == 0, said  # else the guest would be at both
        if case.action == "stop":
            assert {sent, received} <= ({0, 1} if self.long else {0}), said
        # Nothing comes to it any more; behind another one, what is on its way may be all that was missing.
        cut_off = case.victim == "receive" or (case.victim == "relay" and self.at_source)
        if cut_off and case.action != "stop" and case.phase != "shut" and not self.opened_before:
            assert not whole, said
        ends.nothing_left(self.work, killed=(case.victim, case.action) == ("receive", "kill"))

    def _received(self) -> int:
        """The exit code of `receive`.  It waits without limit for a source that its relay has not called it for."""
        uncalled = self.at_source and self.relay is not None and self.case.phase == "set-up"
        waits = 2 * PATIENCE if self.long else 0.5
        if uncalled and not peers.eventually(lambda: self.receive.process.poll() is not None, waits):
            code, seconds = self.receive.told(signal.SIGTERM, PROMPT)
            assert code in (1, 128 + signal.SIGTERM)
            ends.PROMPTLY.append(seconds)
        code = self.receive.ends()
        return 1 if uncalled and code == 128 + signal.SIGTERM else code

    def next_one(self) -> None:
        """Whoever serves, serves again, and who starts again takes the address over."""
        case, work = self.case, self.work
        self.gate.close()
        (work / "gate").unlink()
        if case.victim == "relay" and case.action != "stop":
            assert (work / "here").exists() == (case.action == "kill")
            self.relay = self._start("relay again", *self.relay_arguments)
            self.relay.listens()
        elif self.relay is not None:
            # It serves one at a time: the next is refused until it has seen how this one ended, and told it.
            log = self.relay.log
            peers.eventually(lambda: log.read_bytes().count(b"\n") > 1, PATIENCE)
        stream = streams.small(return_path=True)
        there = peers.Receiving(work / "again", f"unix:{work}/there", channels=1, first_timeout=PROMPT)
        with ExitStack() as stack:
            if not self.at_source:
                stack.callback(Gate(work / "gate", there.uri).close)
            uri = there.uri if self.relay is None else f"unix:{work}/here"
            assert peers.play(uri, [stream.main, *stream.channels], 65536).endswith(streams.SHUT_DONE)
            there.join()
        if self.relay is not None:
            code, seconds = self.relay.told(signal.SIGTERM, PROMPT)
            assert code == 0, self.relay.log.read_text()
            ends.PROMPTLY.append(seconds)
            assert not (work / "here").exists()


@pytest.mark.parametrize("case", ends.chosen(TIMES), ids=str)
def test_a_moment(work: Path, guest: Path, courses: dict[str, Course], case: Case) -> None:
    with ExitStack() as stack:
        chain = Chain(work, case, case.mix(), guest, courses, stack)
        assert chain.gate.reached(), f"the moment never came: {chain.send.log.read_text()}"
        ends.COUNTS[case.victim, case.action, case.phase] += 1
        chain.act()
        chain.judge()
        chain.next_one()
