"""The relay between real QEMUs, 7.2, 10.0 and 11.1."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import peers
from multifd.effort.controller import Effort, Rung
from qemus import FAILING_CHANNELS, RELEASES, Start, common, content
from qemus import UUID as GUEST_UUID
from relaying import Relaying, closing

METHODS = ("none", "zlib", "zstd")


def combinations() -> Iterator[tuple[str, str, str, str]]:
    """Two releases and two methods: all nine within a release, three from one release to another, where each method is
    read and written once.
    """
    for source, target in itertools.product(RELEASES, RELEASES):
        for method, to in itertools.product(METHODS, METHODS):
            if source == target or (METHODS.index(to) - METHODS.index(method)) % 3 == RELEASES.index(source) % 3:
                yield source, target, method, to


@pytest.mark.parametrize(("source_release", "target_release", "method", "to"), list(combinations()))
def test_relay(start: Start, work: Path, source_release: str, target_release: str, method: str, to: str) -> None:
    same = source_release == target_release
    machine = common(source_release, target_release)
    source = start(source_release, "source", machine=machine)
    target = start(target_release, "target", machine=machine, incoming=True)
    source.fill(content())
    channels = {"none": 16, "zlib": 3, "zstd": 1}[to]  # one channel carries several frames of zstd
    source.prepare(channels=channels, method=method, return_path=True)
    target.prepare(channels=channels, method=to)
    there = target.listen("tcp:127.0.0.1:0" if method == to else f"unix:{work}/there")
    here = "tcp:127.0.0.1:0" if same else f"unix:{work}/here"
    with closing(Relaying(there, listen=here, source=method, to=to)) as relaying:
        source.monitor.command("migrate", uri=relaying.uri)
        source.wait("completed")
        target.wait("completed")
        result = relaying.result()
    assert target.ram.read_bytes() == content()
    assert (result.confirmed, result.channels, result.source, result.destination) == (True, channels, method, to)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_qemu_takes_levels_that_change(
    start: Start, work: Path, monkeypatch: pytest.MonkeyPatch, release: str, method: str
) -> None:
    """Another one for each packet, which no link would choose."""
    turns = itertools.count()
    choose = Effort.choose

    def another(self: Effort, pages: Sequence[memoryview], page_size: int) -> Rung:
        choose(self, pages, page_size)
        return self.rungs[next(turns) % len(self.rungs)]

    monkeypatch.setattr(Effort, "choose", another)
    source, target = start(release, "source"), start(release, "target", incoming=True)
    source.fill(content())
    source.prepare(channels=2, return_path=True)
    target.prepare(channels=2, method=method)
    with closing(Relaying(target.listen(f"unix:{work}/there"), to=f"{method},level=adaptive")) as relaying:
        source.monitor.command("migrate", uri=relaying.uri)
        source.wait("completed")
        target.wait("completed")
        result = relaying.result()
    assert target.ram.read_bytes() == content()
    assert len(result.statistics) > 2, "several levels"


OTHER_UUID = "00000000-1111-2222-3333-444444444444"


@pytest.mark.parametrize(
    ("release", "there", "more"),
    [
        ("7.2", {"method": "zlib"}, {}),
        ("10.0", {"method": "zlib"}, {}),
        ("11.1", {"method": "zlib"}, {}),
        ("7.2", {"multifd": False}, {}),
        ("10.0", {"multifd": False}, {}),
        ("11.1", {"multifd": False}, {}),
        ("7.2", {"machine": "pc-q35-7.1"}, {}),
        ("10.0", {"machine": "pc-q35-9.2"}, {}),
        ("11.1", {"machine": "pc-q35-10.0"}, {}),
        ("10.0", {"more": ["-uuid", OTHER_UUID]}, {}),
        ("10.0", {"more": ["-uuid", OTHER_UUID]}, {"uuid": UUID(OTHER_UUID).bytes}),
        ("7.2", {"more": ["-uuid", OTHER_UUID]}, {"uuid": UUID(OTHER_UUID).bytes}),
        ("11.1", {"more": ["-uuid", OTHER_UUID]}, {"uuid": UUID(OTHER_UUID).bytes}),
    ],
)
def test_a_destination_that_does_not_fit(
    start: Start, work: Path, release: str, there: dict[str, Any], more: dict[str, Any]
) -> None:
    """The relay says what it was shown; another uuid can be helped."""
    source = start(release, "source")
    source.fill(content())
    source.prepare(channels=FAILING_CHANNELS, return_path=True)
    there = dict(there)
    settings = {"method": there.pop("method", "zstd"), "multifd": there.pop("multifd", True)}
    target = start(release, "target", incoming=True, **there)
    target.prepare(channels=FAILING_CHANNELS, **settings)
    with closing(Relaying(target.listen(f"unix:{work}/there"), to="zstd", **more)) as relaying:
        source.monitor.command("migrate", uri=relaying.uri)
        if more:
            target.wait("completed")
            assert relaying.result().confirmed
            assert target.ram.read_bytes() == content()
        else:
            source.wait("failed")
            assert re.search(
                r"the destination closed the connection: its own message says why; it has to have machine pc-q35-\S+, "
                rf"VM uuid {GUEST_UUID}, method zstd, multifd with 1 channel, RAM blocks pc.ram 24 MiB, "
                r"[^(]*\(multifd doctor compares\)",
                relaying.error(),
            )


@pytest.mark.parametrize("there", [True, False])
def test_postcopy_that_is_on_and_not_used(start: Start, work: Path, there: bool) -> None:
    """QEMU 7.2 takes it together with multifd, 10.0 does not; on at its source, it has to be on at the destination."""
    source = start("7.2", "source")
    target = start("7.2", "target", incoming=True)
    source.fill(content())
    source.prepare(channels=FAILING_CHANNELS, postcopy_ram=True)
    target.prepare(channels=FAILING_CHANNELS, postcopy_ram=there)
    with closing(Relaying(target.listen(f"unix:{work}/incoming"))) as relaying:
        source.monitor.command("migrate", uri=relaying.uri)
        if there:
            source.wait("completed")
            result = relaying.result()
            assert (result.confirmed, result.rounds_checked) == (True, True)
            assert target.ram.read_bytes() == content()
        else:
            source.wait("failed")
            assert "multifd with 1 channel, postcopy-ram, RAM blocks " in relaying.error()


@pytest.mark.parametrize("detection", ["none", "legacy", "multifd"])
def test_zero_page_detection(start: Start, work: Path, detection: str) -> None:
    """Zero pages as normal ones, on the main channel, in the packets: through a relay into a snapshot."""
    source = start("10.0", "source")
    source.fill(content())
    source.prepare(zero_page_detection=detection, return_path=True)
    there = peers.Receiving(work / "snap")
    with closing(Relaying(there.uri, to="zlib")) as relaying:
        source.monitor.command("migrate", uri=relaying.uri)
        there.join()
        result = relaying.result()
        source.wait("completed")
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content()
    assert (result.zero_pages > 1000) == (detection == "multifd")


@pytest.mark.parametrize("drop", [False, True])
def test_relay_takes_out_what_an_older_destination_refuses(start: Start, work: Path, drop: bool) -> None:
    machine = "pc-q35-7.2"
    source = start("10.0", "source", machine=machine, more=["-global", "migration.send-switchover-start=on"])
    target = start("7.2", "target", machine=machine, incoming=True)
    source.fill(content())
    source.prepare(channels=FAILING_CHANNELS, return_path=True)
    target.prepare(channels=FAILING_CHANNELS)
    target.monitor.command("migrate-incoming", uri=f"unix:{work}/incoming")
    with closing(Relaying(f"unix:{work}/incoming", drop_switchover_start=drop)) as relaying:
        source.monitor.command("migrate", uri=relaying.uri)
        if drop:
            source.wait("completed")
            assert relaying.result().confirmed
            assert target.ram.read_bytes() == content()
        else:
            source.wait("failed")
            assert "destination" in relaying.error()


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("who", ["cancel", "source", "destination"])
def test_relay_when_somebody_goes_away(start: Start, work: Path, release: str, who: str) -> None:
    """The relay says who, ends the other side, and serves the next migration."""
    source = start(release, "source")
    target = start(release, "target", incoming=True)
    source.fill(content())
    source.prepare(channels=FAILING_CHANNELS, return_path=True, max_bandwidth=2_000_000)
    target.prepare(channels=FAILING_CHANNELS, method="zlib")
    target.monitor.command("migrate-incoming", uri=f"unix:{work}/incoming")
    with closing(Relaying(f"unix:{work}/incoming", migrations=2, to="zlib")) as relaying:
        source.monitor.command("migrate", uri=relaying.uri)
        source.wait("active", "device")
        assert peers.eventually(lambda: source.monitor.command("query-migrate").get("ram", {}).get("normal", 0) > 300)
        if who == "cancel":
            source.monitor.command("migrate_cancel")
            source.wait("cancelled")
        elif who == "source":
            source.process.kill()
        else:
            target.process.kill()
            source.wait("failed")
        assert peers.eventually(lambda: len(relaying.outcomes) == 1)
        if who != "destination":
            assert target.process.wait(20) == 1, "a destination that lost its source ends"
        first = str(relaying.outcomes[0])
        assert ("the destination closed" if who == "destination" else "the source") in first
        other, again = start(release, "other"), start(release, "again", incoming=True)
        other.fill(content())
        other.prepare(return_path=True)
        again.prepare(method="zlib")
        again.monitor.command("migrate-incoming", uri=f"unix:{work}/incoming")
        other.monitor.command("migrate", uri=relaying.uri)
        again.wait("completed")
        assert len(relaying.join()) == 2
    assert again.ram.read_bytes() == content()


def test_a_slow_link_fills_no_memory(start: Start, work: Path) -> None:
    """The relay waits with its source; what it holds is a packet per channel."""
    source, target = start("10.0", "source"), start("10.0", "target", incoming=True)
    source.fill(content())
    source.prepare(channels=8, return_path=True, max_bandwidth=1 << 30)
    target.prepare(channels=8, method="zlib")
    link = peers.SlowLink(target.listen(f"unix:{work}/incoming"), 3 << 20)
    command = ["relay", "--listen", f"unix:{work}/here", "--connect", link.uri, "--to", "zlib", "--migrations", "1"]
    relay = subprocess.Popen([sys.executable, "-m", "multifd", *command], stdout=subprocess.PIPE, text=True)
    try:
        assert peers.eventually((work / "here").exists)
        source.monitor.command("migrate", uri=f"unix:{work}/here")
        peak = 0
        while relay.poll() is None:
            with suppress(OSError):  # it may have ended since
                rollup = Path(f"/proc/{relay.pid}/smaps_rollup").read_text()
                peak = max(peak, *(int(found) for found in re.findall(r"Anonymous: +(\d+) kB", rollup)), 0)
            time.sleep(0.05)
        assert relay.stdout is not None
        assert "8 channels" in relay.stdout.read()
        relay.stdout.close()
        target.wait("completed")
    finally:
        relay.kill()
        relay.wait()
        link.close()
    assert target.ram.read_bytes() == content()
    assert 0 < peak < 64 << 10


@pytest.mark.parametrize("release", RELEASES)
def test_relay_of_a_source_without_multifd(start: Start, work: Path, release: str) -> None:
    source, target = start(release, "source"), start(release, "target", incoming=True)
    source.fill(content())
    target.prepare(method="zlib")
    target.monitor.command("migrate-incoming", uri=f"unix:{work}/incoming")
    with closing(Relaying(f"unix:{work}/incoming", to="zlib")) as relaying:
        source.monitor.command("migrate", uri=relaying.uri)
        source.wait("failed")
        assert relaying.error() == "main channel: the source sends its pages here: turn multifd on over there"
