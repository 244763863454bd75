"""A real QEMU's monitor: its events, what its migration waits for, and what a multifd that was killed has left."""

from __future__ import annotations

import shutil
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest

import multifd
import peers
from commands import MULTIFD, fails, run
from disks import small_disk
from gates import Gate, Moment
from gates import Monitor as Redirecting
from multifd.errors import PeerError
from multifd.qemu import driver as driver_module
from multifd.qemu.driver import Destination, Source
from processes import Command
from qemus import RELEASES, Qemu, Start, content
from told import warns


def capabilities(qemu: Qemu) -> dict[str, bool]:
    found = qemu.monitor.command("query-migrate-capabilities")
    return {item["capability"]: item["state"] for item in found}


def switch(qemu: Qemu, capability: str, state: bool) -> None:
    items = [{"capability": capability, "state": state}]
    qemu.monitor.command("migrate-set-capabilities", capabilities=items)


def source(start: Start, work: Path, release: str) -> tuple[Qemu, str]:
    """A guest that runs, and its monitor, which is free."""
    qemu = start(release, "source")
    qemu.fill(content())
    qemu.monitor.command("cont")
    qemu.monitor.close()
    return qemu, str(work / "source.qmp")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("release", RELEASES)
def test_a_migration_ends_by_its_events(
    start: Start, work: Path, release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked but once when the wait begins, and after each event."""
    monkeypatch.setattr(driver_module, "LOOK", 1000)
    qemu, where = source(start, work, release)
    with Source(where, channels=2, method=None, timeout=1000) as driver:
        on = driver.monitor.command("query-migrate-capabilities")
        assert {"capability": "events", "state": True} in on
        there = peers.Receiving(work / "snap", timeout=peers.TIMEOUT)
        driver.start(there.uri)
        driver.wait()
        there.join()
    qemu.reconnect()
    assert not capabilities(qemu)["events"], "put back"


@pytest.mark.parametrize("release", RELEASES)
def test_events_that_were_on_stay_on(start: Start, work: Path, release: str) -> None:
    qemu = start(release, "source")
    switch(qemu, "events", True)
    qemu.monitor.close()
    multifd.receive(f"unix:{work}/here", work / "snap", qmp=str(work / "source.qmp"), timeout=peers.TIMEOUT)
    qemu.reconnect()
    assert capabilities(qemu)["events"]
    qemu.monitor.close()
    target = start(release, "target", incoming=True)
    target.monitor.close()
    multifd.send(work / "snap", f"unix:{work}/there", qmp=str(work / "target.qmp"), timeout=peers.TIMEOUT)
    target.reconnect()
    assert not capabilities(target)["events"]


@pytest.mark.parametrize("release", RELEASES)
def test_a_pause_before_the_switchover_is_named(start: Start, work: Path, release: str) -> None:
    """It is turned off before; somebody else may turn it on."""
    _, where = source(start, work, release)
    with Source(where, channels=2, method=None, timeout=3) as driver:
        items = [{"capability": "pause-before-switchover", "state": True}]
        driver.monitor.command("migrate-set-capabilities", capabilities=items)
        assert driver.waits() == ""
        there = peers.Receiving(work / "snap", timeout=peers.TIMEOUT)
        driver.start(there.uri)
        assert peers.eventually(lambda: "pre-switchover" in driver.waits(), peers.TIMEOUT)
        says = "waits in pre-switchover .*: turn capability pause-before-switchover off, or say migrate-continue"
        with warns(says) as said, pytest.raises(PeerError, match=says):
            driver.wait()
        assert len(said) == 1
        driver.monitor.command("migrate-continue", state="pre-switchover")
        driver.wait()
        there.join()
        assert driver.waits() == ""


@pytest.mark.parametrize("release", RELEASES)
def test_what_a_killed_receive_left_is_named(start: Start, work: Path, release: str) -> None:
    """In the middle, where QEMU waits with its guest stopped, and once the guest was sent.

    That it does not wait there is what receive says to its monitor; on the way that is turned round.
    """
    qemu = start(release, "source", more=("-qmp", f"unix:{work}/second.qmp,server=on,wait=off"))
    qemu.fill(content())
    qemu.monitor.command("cont")
    switch(qemu, "pause-before-switchover", True)
    where = f"{work}/second.qmp"  # the first is ours, to look on
    target = start(release, "target", incoming=True)
    target.monitor.close()
    receive = ("receive", f"unix:{work}/here", "-o", work / "snap", "--qmp", where)
    waiting = (*receive[:-1], work / "monitor")
    pause = '"pause-before-switchover", "state": '
    doctor = ("doctor", "--source-qmp", where, "--destination-qmp", work / "target.qmp")
    with (
        closing(Redirecting(work / "monitor", work / "second.qmp", f"{pause}false", f"{pause}true")),
        subprocess.Popen([*MULTIFD, *map(str, waiting)], stderr=subprocess.DEVNULL) as receiving,
    ):
        qemu.wait("pre-switchover", seconds=peers.TIMEOUT)
        time.sleep(0.5)  # a channel that is still writing would see it go: the migration fails then
        receiving.kill()
    left = capabilities(qemu)
    fails(1, r"is migrating already \(pre-switchover\): migrate_cancel on its monitor gives that up", *receive)
    told = run(*doctor)
    assert told.returncode == 1
    assert "- the source is migrating already (pre-switchover): migrate_cancel" in told.stdout
    assert capabilities(qemu) == left, "nothing is changed"
    qemu.monitor.command("migrate_cancel")
    qemu.wait("cancelled")
    assert peers.eventually(lambda: qemu.monitor.command("query-status")["running"])
    switch(qemu, "pause-before-switchover", False)
    says = "multifd, return-path, events are on: a multifd that is killed leaves its settings so"
    assert says in run(*doctor).stdout
    again = run(*receive)
    assert again.returncode == 0
    assert says in again.stderr
    shutil.rmtree(work / "snap")
    fails(1, r"guest stopped by a migration that is completed \(postmigrate\): cont on its monitor", *receive)
    assert "- the source has its guest stopped by a migration that is completed" in run(*doctor).stdout


@pytest.mark.parametrize("release", RELEASES)
def test_a_migration_that_is_given_up_before_it_comes(start: Start, work: Path, release: str) -> None:
    """Its connections tell nothing: QEMU does."""
    qemu = start(release, "source", more=("-qmp", f"unix:{work}/free.qmp,server=on,wait=off"))
    here = f"unix:{work}/here"
    with (
        closing(Gate(work / "gate", here, Moment("main", 4))) as gate,
        closing(Redirecting(work / "monitor", work / "free.qmp", here, gate.uri)),
        closing(Command(work / "log", "receive", here, "-o", work / "snap", "--qmp", work / "monitor")) as receive,
    ):
        assert gate.reached()
        qemu.monitor.command("migrate_cancel")
        assert receive.ends(10) == 1
    assert "the source ended early: cancelled, or gone" in receive.log.read_text()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kib", [100, 900])
@pytest.mark.parametrize("scheme", ["unix", "tcp"])
@pytest.mark.parametrize("release", RELEASES)
def test_a_disk_that_fills(start: Start, work: Path, tmp_path: Path, release: str, scheme: str, kib: int) -> None:
    """With pages, or later, with the state of 128 processors, more than the sockets hold: the guest runs on."""
    qemu = start(release, "source", more=("-smp", "128"))
    qemu.monitor.command("cont")
    before = capabilities(qemu), qemu.monitor.command("query-migrate-parameters")
    qemu.monitor.close()
    uri = f"unix:{work}/here" if scheme == "unix" else "tcp:127.0.0.1:0"
    with small_disk(tmp_path, kib):
        result = run("receive", uri, "-o", tmp_path / "snap", "--qmp", work / "source.qmp")
        assert list(tmp_path.iterdir()) == []
    assert result.returncode == 1
    listens, error = result.stderr.splitlines()
    assert listens.startswith("multifd: listening on ")
    assert "the disk is full: free some space or choose another directory" in error
    qemu.reconnect()
    assert qemu.monitor.command("query-status")["status"] == "running"
    assert (capabilities(qemu), qemu.monitor.command("query-migrate-parameters")) == before


@pytest.mark.parametrize("release", RELEASES)
def test_a_destination_that_listens_already_is_left_alone(start: Start, work: Path, release: str) -> None:
    target = start(release, "target", incoming=True)
    before = capabilities(target)
    target.listen(f"unix:{work}/there")
    target.monitor.close()
    where = str(work / "target.qmp")
    with pytest.raises(PeerError, match=r"target.qmp listens already: start it again, with -incoming defer"):
        Destination(where, channels=2, method="none", timeout=peers.TIMEOUT)
    with pytest.raises(PeerError, match=r"waits for a migration itself .*: is it the source's monitor\?"):
        Source(where, channels=2, method="none", timeout=peers.TIMEOUT)
    told = run("doctor", "--source-qmp", where, "--destination-qmp", where)
    assert "- the source waits for a migration itself" in told.stdout
    assert "  the destination listens already: " in told.stdout
    target.reconnect()
    assert capabilities(target) == before
