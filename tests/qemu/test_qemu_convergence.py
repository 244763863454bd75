"""Guests that run: those that rewrite memory for ever are stopped, or named, and who waits for an answer gets it."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import guest
import multifd
import peers
from commands import MULTIFD
from multifd.crew import Crew
from multifd.errors import Cancelled, HostError, MultifdError
from multifd.snapshot.writer import SnapshotWriter
from qemus import Qemu, Start
from relaying import Relaying, closing
from standin import Missing
from told import warns

#: A guest that rewrites memory is faster, and QEMU's own downtime-limit is for those that are not: so few milliseconds
#: are for a busy machine.
BANDWIDTH = 12_000_000
SLOW: dict[str, Any] = {"max_bandwidth": BANDWIDTH, "downtime_limit": 1}


def linux(
    start: Start, work: Path, release: str, program: str, name: str = "source", machine: str = "q35", **options: Any
) -> Qemu:
    """A QEMU with this guest, which runs unless it is `incoming`."""
    try:
        more = [
            *guest.options(work, work / f"{name}.serial", program),
            *("-qmp", f"unix:{work}/{name}.second,server=on,wait=off"),
        ]
    except Missing as missing:
        pytest.skip(str(missing))
    qemu = start(release, name, mib=128, machine=machine, more=more, **options)
    if not options.get("incoming"):
        qemu.monitor.command("cont")
        beats_on(work / f"{name}.serial")
    return qemu


def beats_on(serial: Path, more: int = 2) -> None:
    before = len(guest.beats(serial))
    assert peers.eventually(lambda: len(guest.beats(serial)) >= before + more, 90), serial.read_text()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("release", "stop_after", "then"),
    [("10.0", "3rounds", "resume"), ("11.1", "4s", "stop"), ("7.2", "2rounds", "resume")],
)
def test_a_guest_that_rewrites_memory_is_stopped(
    start: Start, work: Path, release: str, stop_after: str, then: str
) -> None:
    qemu = linux(start, work, release, guest.REWRITES)
    qemu.monitor.command("migrate-set-parameters", **SLOW)
    command = ["receive", f"unix:{work}/here", "-o", work / "snap", "--qmp", work / "source.second"]
    command += ["--max-bandwidth", str(BANDWIDTH), "--stop-after", stop_after, "--then", then, "--json"]
    told = subprocess.run([*MULTIFD, *map(str, command)], capture_output=True, text=True, timeout=120, check=True)
    result = json.loads(told.stdout)
    assert 0 < result["standstill"] <= 1
    assert "warning" not in told.stderr
    assert qemu.monitor.command("query-migrate-parameters")["downtime-limit"] == 1, "put back"
    assert multifd.inspect(work / "snap")["ended"] == "complete"
    if then == "resume":
        beats_on(work / "source.serial")
    assert qemu.monitor.command("query-status")["running"] is (then == "resume")


@pytest.mark.timeout(240)
def test_a_guest_that_was_stopped_goes_on_from_its_snapshot(start: Start, work: Path) -> None:
    """As one that ran: its state does not say that it was paused."""
    qemu = linux(start, work, "10.0", guest.REWRITES)
    qemu.monitor.command("migrate-set-parameters", **SLOW)
    result = multifd.receive(
        f"unix:{work}/here",
        work / "snap",
        qmp=str(work / "source.second"),
        stop_after="1round",
        max_bandwidth=BANDWIDTH,
        timeout=60,
    )
    assert result.standstill is not None
    target = linux(start, work, "10.0", guest.REWRITES, "target", incoming=True)
    multifd.send(work / "snap", f"unix:{work}/there", qmp=str(work / "target.second"), timeout=60)
    assert target.status() == "completed"
    assert b"running" in (work / "snap" / "device_state.bin").read_bytes()
    target.monitor.command("cont")
    beats_on(work / "target.serial")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("release", ["7.2", "10.0"])
@pytest.mark.parametrize("how", ["cancel", "failure"])
def test_a_guest_that_was_stopped_for_nothing_runs_on(
    start: Start, work: Path, release: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still, all of it is here, and then there is no snapshot."""
    qemu = linux(start, work, release, guest.REWRITES)
    qemu.monitor.command("migrate-set-parameters", **SLOW)
    crew = Crew()
    ran: list[bool] = []

    def fail(*_: object, **__: object) -> None:
        ran.append(qemu.monitor.command("query-status")["running"])
        if how == "cancel":
            crew.cancel()
        raise HostError("the disk is full")

    monkeypatch.setattr(SnapshotWriter, "complete", fail)
    with pytest.raises(Cancelled if how == "cancel" else HostError):
        multifd.receive(
            f"unix:{work}/here",
            work / "snap",
            qmp=str(work / "source.second"),
            stop_after="1round",
            max_bandwidth=BANDWIDTH,
            timeout=30,
            crew=crew,
        )
    assert ran == [False], "it stood still"
    assert qemu.monitor.command("query-status")["running"]
    assert qemu.monitor.command("query-migrate-parameters")["downtime-limit"] == 1
    beats_on(work / "source.serial")


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("release", "way"), [("10.0", "receive"), ("7.2", "receive"), ("10.0", "relay")])
def test_a_guest_that_rewrites_memory_is_named(start: Start, work: Path, release: str, way: str) -> None:
    qemu = linux(start, work, release, guest.REWRITES)
    qemu.prepare(return_path=True, **SLOW)
    with warns("writes its memory as fast as it is carried: .* --stop-after") as said, ExitStack() as stack:
        if way == "receive":
            there = peers.Receiving(work / "snap", timeout=60)
        else:
            target = linux(start, work, release, guest.REWRITES, "target", incoming=True)
            target.prepare()
            relaying = stack.enter_context(closing(Relaying(target.listen(f"unix:{work}/there"))))
        qemu.monitor.command("migrate", uri=there.uri if way == "receive" else relaying.uri)
        assert peers.eventually(lambda: bool(said), 120)
        assert qemu.status() == "active"
        qemu.monitor.command("migrate_cancel")
        qemu.wait("cancelled")
        if way == "receive":
            with pytest.raises(MultifdError):
                there.join()
    assert len([text for text in said if "as fast as" in text]) == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("release", "machine", "ack"),
    [
        ("10.0", "pc-q35-10.0", True),
        ("10.0", "pc-q35-7.2", True),
        ("10.0", "pc-i440fx-10.0", False),
        ("11.1", "pc-q35-10.0", True),
        ("11.1", "pc-q35-10.0", False),
        ("11.1", "pc-q35-11.1", True),
        ("11.1", "pc-q35-11.1", False),
        ("7.2", "pc-q35-7.2", False),
    ],
)
def test_a_source_is_answered_where_it_may_wait(
    start: Start, work: Path, release: str, machine: str, ack: bool
) -> None:
    """7.2, and 11.1 with its own machine type, fail where they are and did not wait."""
    qemu = linux(start, work, release, guest.IDLES, machine=machine)
    capabilities: dict[str, Any] = {"switchover_ack": True} if ack else {}
    qemu.prepare(return_path=True, **capabilities)
    there = peers.Receiving(work / "snap", timeout=60)
    qemu.monitor.command("migrate", uri=there.uri)
    there.join()
    qemu.wait("completed")


@pytest.mark.timeout(120)
def test_a_source_that_is_not_answered_is_explained(start: Start, work: Path) -> None:
    """The name of its machine type does not tell its version; its firmware finds nothing to do."""
    qemu = start("10.0", "source", machine="isapc")
    qemu.monitor.command("cont")
    qemu.prepare(return_path=True, switchover_ack=True)
    with warns("it may wait for switchover-ack: turn that capability off at the source") as said:
        there = peers.Receiving(work / "snap", timeout=60)
        qemu.monitor.command("migrate", uri=there.uri)
        assert peers.eventually(lambda: bool(said), 60)
        assert qemu.status() == "active"
        qemu.monitor.command("migrate_cancel")
        with pytest.raises(MultifdError):
            there.join()
    assert len(said) == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("to", [None, "zlib"])
def test_a_relay_passes_the_answer(start: Start, work: Path, to: str | None) -> None:
    qemu = linux(start, work, "10.0", guest.IDLES)
    target = linux(start, work, "10.0", guest.IDLES, "target", incoming=True)
    qemu.prepare(return_path=True, switchover_ack=True)
    target.prepare(method=to or "none", return_path=True, switchover_ack=True)
    with closing(Relaying(target.listen(f"unix:{work}/there"), to=to)) as relaying:
        qemu.monitor.command("migrate", uri=relaying.uri)
        qemu.wait("completed")
        target.wait("completed")
        assert relaying.result().confirmed
    target.monitor.command("cont")
    beats_on(work / "target.serial")
