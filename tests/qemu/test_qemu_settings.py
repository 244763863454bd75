"""What --qmp turns off on a real QEMU so that the job works, and puts back: after success, failure and cancel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import multifd
import peers
from commands import fails, run
from multifd import open_snapshot
from multifd.errors import MultifdError
from qemus import RELEASES, Qemu, Start, content
from told import warns

ALL = tuple(dict.fromkeys((*RELEASES, "11.1")))
MACHINE = "pc-q35-7.2"
#: Bytes per second that make a migration of `content` last for longer than a test may take.
SLOW = 10_000

#: Capabilities that each release takes beside each other, by what a test is about; those that it does not have are left
#: out.
BEFORE = {
    "postcopy": [
        *("return-path", "postcopy-ram", "postcopy-preempt", "postcopy-blocktime", "release-ram"),
        *("xbzrle", "block", "x-colo", "dirty-bitmaps", "switchover-ack", "pause-before-switchover"),
        *("late-block-activate", "auto-converge", "rdma-pin-all", "validate-uuid"),
    ],
    "multifd": [
        *("multifd", "return-path", "switchover-ack", "x-ignore-shared", "zero-copy-send", "dirty-bitmaps"),
        *("pause-before-switchover", "late-block-activate", "validate-uuid", "events"),
    ],
    "mapped-ram": ["mapped-ram", "multifd", "pause-before-switchover"],
    "compress": ["compress", "postcopy-ram", "x-colo", "return-path"],
}


def settings(qemu: Qemu) -> tuple[dict[str, bool], dict[str, Any]]:
    """All capabilities and parameters; its monitor is free before and after."""
    qemu.reconnect()
    found = (
        {item["capability"]: item["state"] for item in qemu.monitor.command("query-migrate-capabilities")},
        qemu.monitor.command("query-migrate-parameters"),
    )
    qemu.monitor.close()
    return found


def prepared(qemu: Qemu, before: str) -> Qemu:
    """Those capabilities are on, and it is slow; its monitor is free.

    With a longer downtime-limit QEMU sends what is left at once, however slow it may be.
    """
    has = {item["capability"] for item in qemu.monitor.command("query-migrate-capabilities")}
    on = [{"capability": name, "state": True} for name in BEFORE[before] if name in has]
    qemu.monitor.command("migrate-set-capabilities", capabilities=on)
    qemu.monitor.command("migrate-set-parameters", max_bandwidth=SLOW, multifd_channels=3, downtime_limit=1)
    qemu.monitor.close()
    return qemu


def source(start: Start, release: str, before: str, *, runs: bool = True) -> Qemu:
    """A guest that runs, prepared so."""
    qemu = start(release, "source", machine=MACHINE)
    qemu.fill(content())
    if runs:
        qemu.monitor.command("cont")
    return prepared(qemu, before)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("release", ALL)
def test_what_is_in_the_way_is_turned_off_and_put_back(start: Start, work: Path, release: str, before: str) -> None:
    qemu = source(start, release, before, runs=release != "7.2")  # which loses pages of a running guest by itself
    # In a shorter one no page fits that its BIOS writes at each tick of the clock: rounds without end.
    qemu.reconnect()
    qemu.monitor.command("migrate-set-parameters", downtime_limit=300)
    qemu.monitor.close()
    was = settings(qemu)
    result = multifd.receive(
        f"unix:{work}/here", work / "snap", "zlib", qmp=str(work / "source.qmp"), timeout=peers.TIMEOUT
    )
    assert result.seconds < 10, "as fast as it can, whatever its max-bandwidth"
    assert settings(qemu) == was
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == qemu.ram.read_bytes(), "shared memory is not left out"
    target = prepared(start(release, "target", machine=MACHINE, incoming=True), before)
    was = settings(target)
    multifd.send(
        work / "snap", f"unix:{work}/there", "zstd", qmp=str(work / "target.qmp"), timeout=peers.TIMEOUT, channels=4
    )
    assert settings(target) == was
    assert target.ram.read_bytes() == qemu.ram.read_bytes()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("end", ["failed", "cancelled"])
@pytest.mark.parametrize("before", ["postcopy", "multifd"])
@pytest.mark.parametrize("release", ALL)
def test_they_are_put_back_after_what_does_not_end_well(
    start: Start, work: Path, release: str, before: str, end: str
) -> None:
    qemu = source(start, release, before)
    was = settings(qemu)
    crew = multifd.Crew()

    def on_progress(_: object) -> None:
        if end == "failed":
            raise ValueError("nobody looks on")
        crew.cancel()

    with pytest.raises(ValueError if end == "failed" else MultifdError):
        multifd.receive(
            f"unix:{work}/here",
            work / "snap",
            qmp=str(work / "source.qmp"),
            timeout=peers.TIMEOUT,
            max_bandwidth=SLOW,
            on_progress=on_progress,
            crew=crew,
        )
    assert settings(qemu) == was
    qemu.reconnect()
    assert qemu.monitor.command("query-status")["running"]


@pytest.mark.parametrize("before", ["postcopy", "multifd"])
@pytest.mark.parametrize("release", ALL)
def test_a_destination_gets_them_back_where_nothing_can_be_sent(
    start: Start, work: Path, release: str, before: str
) -> None:
    target = prepared(start(release, "target", machine=MACHINE, incoming=True), before)
    was = settings(target)
    multifd.receive("recording:tests/captures/q72-none-2ch", work / "snap", digests=False)
    snapshot = open_snapshot(work / "snap")
    (work / "snap" / "0-pc.ram.raw").unlink()
    with pytest.raises(MultifdError, match=r"0-pc\.ram\.raw"):
        multifd.send(snapshot, f"unix:{work}/there", qmp=str(work / "target.qmp"), timeout=peers.TIMEOUT)
    assert settings(target) == was


@pytest.mark.parametrize("release", ALL)
def test_a_bandwidth_of_the_users_own(start: Start, work: Path, release: str) -> None:
    """A tenth of a second, where it has no limit."""
    qemu = start(release, "source", machine=MACHINE)
    qemu.fill(content())
    qemu.monitor.command("migrate-set-parameters", downtime_limit=1)
    qemu.monitor.close()
    was = settings(qemu)
    receive = ("receive", f"unix:{work}/here", "--qmp", work / "source.qmp", "--json")
    limited = run(*receive, "-o", work / "limited", "--max-bandwidth", "600K")
    assert limited.returncode == 0, limited.stderr
    assert json.loads(limited.stdout)["seconds"] > 1
    assert settings(qemu) == was
    fails(2, "a bandwidth of 0 bytes per second: from 1 to", *receive, "-o", work / "none", "--max-bandwidth", "0")
    fails(2, "over its monitor: .*--qmp", "receive", f"unix:{work}/here", "-o", work / "none", "--max-bandwidth", "1G")


@pytest.mark.parametrize("release", ["10.0", "11.1"])
def test_a_mode_in_which_no_memory_comes(start: Start, work: Path, release: str) -> None:
    """QEMU 11.1 aborts where it is told to migrate so, and its guest is gone."""
    qemu = start(release, "source", machine=MACHINE)
    qemu.fill(content())
    qemu.monitor.command("migrate-set-parameters", mode="cpr-transfer")
    qemu.monitor.close()
    receive = ("receive", f"unix:{work}/here", "-o", work / "snap", "--qmp", work / "source.qmp")
    fails(1, r"source\.qmp has mode cpr-transfer, .*: on its monitor: migrate_set_parameter mode normal", *receive)
    qemu.reconnect()
    qemu.monitor.command("migrate-set-parameters", mode="cpr-reboot")
    qemu.monitor.close()
    with warns("has mode cpr-reboot: its guest stands still from the beginning"):
        multifd.receive(f"unix:{work}/here", work / "snap", qmp=str(work / "source.qmp"), timeout=peers.TIMEOUT)
    assert settings(qemu)[1]["mode"] == "cpr-reboot"
