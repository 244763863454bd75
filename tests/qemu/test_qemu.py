"""Real QEMUs, 7.2, 10.0 and 11.1, on the other side."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import multifd
import peers
from multifd import open_snapshot
from multifd.errors import MultifdError, PeerError
from multifd.qemu.driver import Source
from qemus import FAILING_CHANNELS, RELEASES, Qemu, Start, content
from told import warns

METHODS = ("none", "zlib", "zstd")


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
    multifd.send(open_snapshot(work / "snap"), f"unix:{work}/incoming", compressor, channels=4)
    target.wait("completed")
    assert target.ram.read_bytes() == content()


@pytest.mark.may_warn(".*ignored")
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


@pytest.mark.parametrize("release", ["7.2", "11.1"])
def test_postcopy_is_named(start: Start, work: Path, release: str) -> None:
    """They take it together with multifd, 10.0 does not.  A relay passes it on."""
    source = start(release, "source")
    source.prepare(channels=FAILING_CHANNELS, postcopy_ram=True)
    there = peers.Receiving(work / "snap", channels=FAILING_CHANNELS)
    source.monitor.command("migrate", uri=there.uri)
    with pytest.raises(PeerError, match="belongs to postcopy: turn postcopy-ram off on the source"):
        there.join()
    source.wait("failed")


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
    off = {"7.2": "xbzrle"}.get(release, "mapped-ram")  # it does not go with ours
    source.monitor.command("migrate-set-capabilities", capabilities=[{"capability": off, "state": True}])
    before = settings(source)
    source.monitor.close()
    result = multifd.receive(
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


@pytest.mark.parametrize("then", ["stop", "resume"])
def test_a_source_that_cannot_be_told_what_to_do_then(
    start: Start, work: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """The snapshot is complete, and the source knows; the guest is another matter."""
    source = start("10.0", "source")
    source.fill(content())
    source.monitor.close()

    def leave(self: Source, then: str) -> None:
        raise PeerError("the monitor is gone")

    monkeypatch.setattr(Source, "leave", leave)
    job = partial(multifd.receive, f"unix:{work}/here", work / "snap", qmp=str(work / "source.qmp"), then=then)
    if then == "stop":
        with warns("the snapshot is complete, but not all is well at the source"):
            job()
    else:
        with pytest.raises(PeerError, match="the snapshot is complete, but .* the monitor is gone; its guest did not"):
            job()
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content()
    assert "sha256" in (work / "snap" / "snapshot.json").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_receive_that_is_interrupted_leaves_the_source_as_it_was(start: Start, work: Path, number: int) -> None:
    source = start("10.0", "source")
    source.fill(content())
    source.monitor.command("cont")
    before = settings(source)
    source.monitor.close()
    command = ["receive", f"unix:{work}/here", "-o", str(work / "snap"), "--qmp", str(work / "source.qmp")]
    command += ["--max-bandwidth", "1000000"]
    with subprocess.Popen([sys.executable, "-m", "multifd", *command], stderr=subprocess.PIPE, text=True) as receiving:
        assert peers.eventually(lambda: bool(list(work.glob(".snap.*.partial"))))
        receiving.send_signal(number)
        assert receiving.wait(peers.TIMEOUT) in (130, 128 + signal.SIGTERM)
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
    multifd.receive("tcp:127.0.0.1:0", work / "snap", qmp=str(work / "source.qmp"))
    target = start(release, "target", incoming=True)
    target.monitor.close()
    sent = multifd.send(
        open_snapshot(work / "snap"), f"unix:{work}/incoming", "zstd", channels=3, qmp=str(work / "target.qmp")
    )
    assert (sent.compressor, sent.channels) == ("zstd", 3)
    assert target.ram.read_bytes() == content()


@pytest.mark.may_warn(".*closed without a byte")
def test_what_qemu_says_is_told(start: Start, work: Path) -> None:
    source = start("10.0", "source")
    source.monitor.close()
    where = str(work / "source.qmp")
    with pytest.raises(PeerError, match="migrate-set-parameters: QEMU says: .*qatzip"):
        multifd.receive(f"unix:{work}/here", work / "snap", "qatzip-sw", qmp=where)
    source.reconnect()
    source.monitor.command("migrate-set-parameters", **{"tls-creds": "none-such"})
    source.monitor.close()
    with pytest.raises(PeerError, match="QEMU"):
        multifd.receive(f"unix:{work}/here", work / "snap", timeout=5, qmp=where)
    with pytest.raises(MultifdError, match="cannot connect to unix:.*nobody"):
        multifd.receive(f"unix:{work}/here", work / "snap", qmp=str(work / "nobody"))
    assert not (work / "snap").exists()
