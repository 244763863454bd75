"""Linux guests that run, and go on elsewhere without missing a beat."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

import multifd
import peers
from guest import Guest
from multifd import open_snapshot
from qemus import Start
from relaying import Relaying, closing

PAIRS = [("10.0", "10.0"), ("10.0", "11.1"), ("11.1", "10.0"), ("11.1", "11.1")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("source_release", "target_release"), PAIRS)
def test_a_running_guest_is_captured_and_restored(
    start: Start, work: Path, source_release: str, target_release: str
) -> None:
    linux = Guest(start, work, source_release, target_release)
    linux.qemu.monitor.close()
    result = multifd.receive(f"unix:{work}/here", work / "snap", "zstd", qmp=str(work / "first.qmp"), timeout=60)
    assert result.normal_pages > 5000
    target = linux.new("second")
    target.monitor.close()
    multifd.send(
        open_snapshot(work / "snap"), f"unix:{work}/there", "zlib", channels=4, qmp=str(work / "second.qmp"), timeout=60
    )
    target.reconnect()
    target.monitor.command("cont")
    linux.beats(3)


@pytest.mark.timeout(300)
def test_a_running_guest_whose_source_waits_for_a_destination(start: Start, work: Path) -> None:
    """switchover-ack: QEMU 10.0 sends round after round until somebody says that he is ready."""
    linux = Guest(start, work)
    linux.qemu.prepare(return_path=True, switchover_ack=True)
    linux.qemu.monitor.close()
    multifd.receive(f"unix:{work}/here", work / "snap", "zstd", qmp=str(work / "first.qmp"), timeout=60)
    linux.qemu.reconnect()
    assert {"capability": "switchover-ack", "state": True} in linux.qemu.monitor.command("query-migrate-capabilities")
    linux.qemu.monitor.command("cont")
    linux.beats(3)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("relays", "source_release", "target_release"), [(1, *PAIRS[1]), (1, *PAIRS[3]), (2, *PAIRS[0])]
)
def test_a_running_guest_moves_through_relays(
    start: Start, work: Path, relays: int, source_release: str, target_release: str
) -> None:
    """With one: none to zlib.  With two: none to zstd to none, for QEMUs that have no compression."""
    linux = Guest(start, work, source_release, target_release)
    source, target = linux.qemu, linux.new("second")
    source.prepare(return_path=True, max_bandwidth=1 << 30)
    target.prepare(method="zlib" if relays == 1 else "none")
    target.monitor.command("migrate-incoming", uri=f"unix:{work}/incoming")
    with ExitStack() as stack:
        uri = f"unix:{work}/incoming"
        relaying = []
        for to in ["zlib"] if relays == 1 else ["none", "zstd"]:
            relaying.append(stack.enter_context(closing(Relaying(uri, to=to))))
            uri = relaying[-1].uri
        source.monitor.command("migrate", uri=uri)
        source.wait("completed")
        target.wait("completed")
        for one in relaying:
            assert one.result().confirmed
    target.monitor.command("cont")
    linux.beats(3)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("way", "release"), [("snapshot", "10.0"), ("relay", "11.1")])
def test_a_guest_that_dirties_memory_faster_than_the_link(start: Start, work: Path, way: str, release: str) -> None:
    """Round after round pages come again, and the last one counts."""
    linux = Guest(start, work, release, release)
    source, target = linux.qemu, linux.new("second")
    source.prepare(method="zlib", return_path=True, max_bandwidth=10_000_000, downtime_limit=1)
    with ExitStack() as stack:
        if way == "snapshot":
            there = peers.Receiving(work / "snap")
        else:
            target.prepare(method="zstd")
            relaying = stack.enter_context(closing(Relaying(target.listen(f"unix:{work}/incoming"), to="zstd")))
        source.monitor.command("migrate", uri=there.uri if way == "snapshot" else relaying.uri)
        assert peers.eventually(
            lambda: source.monitor.command("query-migrate").get("ram", {}).get("dirty-sync-count", 0) > 4, 90
        )
        source.monitor.command("migrate-set-parameters", max_bandwidth=1 << 30, downtime_limit=2000)
        if way == "snapshot":
            there.join()
            assert multifd.inspect(work / "snap")["rounds"] > 3
        source.wait("completed")
        if way == "relay":
            target.wait("completed")
            assert relaying.result().confirmed
    if way == "snapshot":
        target.monitor.close()
        multifd.send(
            open_snapshot(work / "snap"), f"unix:{work}/there", "zstd", qmp=str(work / "second.qmp"), timeout=60
        )
        target.reconnect()
    target.monitor.command("cont")
    linux.beats(3)
