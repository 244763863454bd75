"""Real QEMUs, 7.2 and 10.0, on the other side."""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import guest
import peers
import qatdriver
from multifd import migrate
from multifd.effort import Effort, Rung
from multifd.errors import MultifdError, PeerError
from multifd.inspect import inspect
from multifd.snapshot import open_source
from qemus import RELEASES, Qemu, binary, qemus
from qemus import UUID as GUEST_UUID
from standin import Missing
from test_relay import Relaying, closing

METHODS = ("none", "zlib", "zstd")
MIB = 24
#: A QEMU 10.0 whose migration fails in a SYNC can hang for good, its monitor too: the thread of a channel that
#: sees another one fail leaves without waking who waits for it.  With one channel it cannot happen.
FAILING_CHANNELS = 1

Start = Callable[..., Qemu]


@pytest.fixture
def start(work: Path) -> Iterator[Start]:
    """Start a QEMU; skips where it cannot be had."""
    with qemus() as running:

        def begin(release: str, name: str, **options: object) -> Qemu:
            try:
                binary(release)
            except Missing as missing:
                pytest.skip(str(missing))
            running.append(Qemu(release, work, name, **{"mib": MIB} | options))  # type: ignore[arg-type]
            return running[-1]

        yield begin


def content() -> bytes:
    """24 MiB of guest memory: text, programs, templates, noise, zeros."""
    memory = qatdriver.image()
    return memory + bytes(4 << 20) + memory[::-1][: 4 << 20] + memory[: 8 << 20]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("channels", "return_path"), [(1, True), (2, False), (16, True)])
def test_receive(start: Start, work: Path, release: str, method: str, channels: int, return_path: bool) -> None:
    source = start(release, "source")
    source.fill(content())
    source.prepare(channels=channels, method=method, return_path=return_path)
    job = peers.Receiving(work / "snap", channels=channels)
    source.monitor.command("migrate", uri=job.uri)
    result = job.join()
    source.wait("completed")
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == source.ram.read_bytes() == content()
    assert result.compressor == method


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("compressor", [*METHODS, "zstd,level=-1", "zstd,level=2", "zstd,level=3"])
def test_send(start: Start, work: Path, release: str, compressor: str) -> None:
    """Captured from one, restored into another with other settings."""
    source = start(release, "source")
    source.fill(content())
    source.prepare(return_path=True)
    job = peers.Receiving(work / "snap")
    source.monitor.command("migrate", uri=job.uri)
    job.join()
    target = start(release, "target", incoming=True)
    target.prepare(channels=4, method=compressor.partition(",")[0])
    target.monitor.command("migrate-incoming", uri=f"unix:{work}/incoming")
    migrate.send(open_source(work / "snap"), f"unix:{work}/incoming", compressor, channels=4)
    target.wait("completed")
    assert target.ram.read_bytes() == content()


@pytest.mark.parametrize(("source_release", "target_release"), list(itertools.product(RELEASES, RELEASES)))
@pytest.mark.parametrize(("method", "to"), list(itertools.product(METHODS, METHODS)))
def test_relay(start: Start, work: Path, source_release: str, target_release: str, method: str, to: str) -> None:
    same = source_release == target_release
    source = start(source_release, "source", machine="q35" if same else "pc-q35-7.2")
    target = start(target_release, "target", machine="q35" if same else "pc-q35-7.2", incoming=True)
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
        ("7.2", {"multifd": False}, {}),
        ("10.0", {"multifd": False}, {}),
        ("7.2", {"machine": "pc-q35-7.1"}, {}),
        ("10.0", {"machine": "pc-q35-9.2"}, {}),
        ("10.0", {"more": ["-uuid", OTHER_UUID]}, {}),
        ("10.0", {"more": ["-uuid", OTHER_UUID]}, {"uuid": UUID(OTHER_UUID).bytes}),
        ("7.2", {"more": ["-uuid", OTHER_UUID]}, {"uuid": UUID(OTHER_UUID).bytes}),
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
                rf"VM uuid {GUEST_UUID}, method zstd, multifd with 1 channel \(multifd doctor compares\)",
                relaying.error(),
            )


def test_postcopy_is_named(start: Start, work: Path) -> None:
    """QEMU 7.2 takes it together with multifd, 10.0 does not."""
    source = start("7.2", "source")
    source.prepare(channels=FAILING_CHANNELS, postcopy_ram=True)
    there = peers.Receiving(work / "snap", channels=FAILING_CHANNELS)
    with closing(Relaying(there.uri)) as relaying:
        source.monitor.command("migrate", uri=relaying.uri)
        source.wait("failed")
        assert "belongs to postcopy: turn postcopy-ram off on the source" in relaying.error()
    with pytest.raises(PeerError):
        there.join()


@pytest.mark.filterwarnings("ignore:.*ignored")
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({"method": "zstd"}, {"compressor": "zlib"}, "the sender uses zstd, this side expects zlib"),
        ({"channels": 4}, {"channels": 2}, "the sender uses at least [34] channels, this side expects 2"),
        ({"channels": 2}, {"channels": 4}, "2 of 4 multifd channels came: start both sides with the same number"),
        ({"multifd": False}, {}, "0 of 2 multifd channels came: .*and multifd on"),
    ],
)
def test_settings_that_differ_are_named(
    start: Start, work: Path, release: str, theirs: dict[str, Any], ours: dict[str, Any], message: str
) -> None:
    source = start(release, "source")
    source.fill(content())
    source.prepare(**theirs)
    there = peers.Receiving(work / "snap", timeout=3, **ours)
    source.monitor.command("migrate", uri=there.uri)
    with pytest.raises(PeerError, match=message):
        there.join()
    assert not (work / "snap").exists()


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


def settings(qemu: Qemu) -> tuple[object, object]:
    return (
        qemu.monitor.command("query-migrate-capabilities"),
        qemu.monitor.command("query-migrate-parameters"),
    )


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("then", ["stop", "resume", "quit"])
def test_receive_drives_the_source(start: Start, work: Path, release: str, then: str) -> None:
    source = start(release, "source")
    source.fill(content())
    off = {"7.2": "xbzrle", "10.0": "mapped-ram"}[release]  # it does not go with ours
    source.monitor.command("migrate-set-capabilities", capabilities=[{"capability": off, "state": True}])
    before = settings(source)
    source.monitor.close()
    result = migrate.receive(
        f"unix:{work}/here", work / "snap", "zlib", channels=5, qmp=str(work / "source.qmp"), then=then
    )
    assert (result.compressor, result.channels) == ("zlib", 5)
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content()
    if then == "quit":
        assert source.process.wait(20) == 0
        return
    source.reconnect()
    assert settings(source) == before, "put back"
    assert source.monitor.command("query-status")["running"] == (then == "resume")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_receive_that_is_interrupted_leaves_the_source_as_it_was(start: Start, work: Path, number: int) -> None:
    source = start("10.0", "source")
    source.fill(content())
    source.monitor.command("migrate-set-parameters", max_bandwidth=1_000_000)
    source.monitor.command("cont")
    before = settings(source)
    source.monitor.close()
    command = ["receive", f"unix:{work}/here", "-o", str(work / "snap"), "--qmp", str(work / "source.qmp")]
    with subprocess.Popen([sys.executable, "-m", "multifd", *command], stderr=subprocess.PIPE, text=True) as receiving:
        assert peers.eventually(lambda: bool(list(work.glob(".snap.*.partial"))))
        receiving.send_signal(number)
        assert receiving.wait(20) in (130, 128 + signal.SIGTERM)
        assert receiving.stderr is not None
        assert "warning" not in receiving.stderr.read()
    source.reconnect()
    assert source.status() == "cancelled"
    assert settings(source) == before
    assert source.monitor.command("query-status")["running"]


@pytest.mark.parametrize("release", RELEASES)
def test_send_drives_the_destination(start: Start, work: Path, release: str) -> None:
    source = start(release, "source")
    source.fill(content())
    source.monitor.close()
    migrate.receive("tcp:127.0.0.1:0", work / "snap", qmp=str(work / "source.qmp"))
    target = start(release, "target", incoming=True)
    target.monitor.close()
    sent = migrate.send(
        open_source(work / "snap"), f"unix:{work}/incoming", "zstd", channels=3, qmp=str(work / "target.qmp")
    )
    assert (sent.compressor, sent.channels) == ("zstd", 3)
    assert target.ram.read_bytes() == content()


@pytest.mark.filterwarnings("ignore:.*closed without a byte")
def test_what_qemu_says_is_told(start: Start, work: Path) -> None:
    source = start("10.0", "source")
    source.monitor.close()
    where = str(work / "source.qmp")
    with pytest.raises(PeerError, match="migrate-set-parameters: QEMU says: .*qatzip"):
        migrate.receive(f"unix:{work}/here", work / "snap", "qatzip-sw", qmp=where)
    source.reconnect()
    source.monitor.command("migrate-set-parameters", **{"tls-creds": "none-such"})
    source.monitor.close()
    with pytest.raises(PeerError, match="QEMU"):
        migrate.receive(f"unix:{work}/here", work / "snap", timeout=5, qmp=where)
    with pytest.raises(MultifdError, match="cannot connect to unix:.*nobody"):
        migrate.receive(f"unix:{work}/here", work / "snap", qmp=str(work / "nobody"))
    assert not (work / "snap").exists()


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


class Guest:
    """A Linux guest that runs in a QEMU 10.0, and moves to others."""

    def __init__(self, start: Start, work: Path) -> None:
        self._start = start
        self._work = work
        self.serials: list[Path] = []
        self.qemu = self.new("first", incoming=False)
        self.qemu.monitor.command("cont")
        self.beats(3)

    def new(self, name: str, *, incoming: bool = True) -> Qemu:
        serial = self._work / f"{name}.serial"
        try:
            more = guest.options(self._work, serial)
        except Missing as missing:
            pytest.skip(str(missing))
        self.serials.append(serial)
        return self._start("10.0", name, incoming=incoming, mib=128, more=more)

    def beats(self, count: int) -> None:
        """So many more beats, none missing since the first."""
        before = len(guest.beats(*self.serials))
        assert peers.eventually(lambda: len(guest.beats(*self.serials)) >= before + count, 60), self.serials[
            -1
        ].read_text()
        found = guest.beats(*self.serials)
        assert found == list(range(1, len(found) + 1)), "a beat is missing"


@pytest.mark.timeout(300)
def test_a_running_guest_is_captured_and_restored(start: Start, work: Path) -> None:
    linux = Guest(start, work)
    linux.qemu.monitor.close()
    result = migrate.receive(f"unix:{work}/here", work / "snap", "zstd", qmp=str(work / "first.qmp"), timeout=60)
    assert result.normal_pages > 5000
    target = linux.new("second")
    target.monitor.close()
    migrate.send(
        open_source(work / "snap"), f"unix:{work}/there", "zlib", channels=4, qmp=str(work / "second.qmp"), timeout=60
    )
    target.reconnect()
    target.monitor.command("cont")
    linux.beats(3)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("relays", [1, 2])
def test_a_running_guest_moves_through_relays(start: Start, work: Path, relays: int) -> None:
    """With one: none to zlib.  With two: none to zstd to none, for QEMUs that have no compression."""
    linux = Guest(start, work)
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
@pytest.mark.parametrize("way", ["snapshot", "relay"])
def test_a_guest_that_dirties_memory_faster_than_the_link(start: Start, work: Path, way: str) -> None:
    """Round after round pages come again, and the last one counts."""
    linux = Guest(start, work)
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
        assert source.status() == "active"
        source.monitor.command("migrate-set-parameters", max_bandwidth=1 << 30, downtime_limit=2000)
        if way == "snapshot":
            there.join()
            assert inspect(work / "snap")["rounds"] > 3
        source.wait("completed")
        if way == "relay":
            target.wait("completed")
            assert relaying.result().confirmed
    if way == "snapshot":
        target.monitor.close()
        migrate.send(open_source(work / "snap"), f"unix:{work}/there", "zstd", qmp=str(work / "second.qmp"), timeout=60)
        target.reconnect()
    target.monitor.command("cont")
    linux.beats(3)


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
