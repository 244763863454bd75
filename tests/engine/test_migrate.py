"""Two real sides over real sockets: every pair of settings, and every way a peer goes wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

import images
import multifd
import peers
import streams
from disks import small_disk
from multifd import open_snapshot
from multifd.errors import CallerError, HostError, MultifdError, PeerError
from multifd.jobs.report import Progress
from multifd.net import parting
from multifd.snapshot.writer import SnapshotWriter
from told import warns


def memory(snapshot: Path) -> list[bytes]:
    index = json.loads((snapshot / "snapshot.json").read_text())
    return [(snapshot / block["file"]).read_bytes() for block in index["blocks"]]


def tcp6() -> str:
    """IPv6 where the machine has it."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return "tcp:localhost:0"
    return "tcp:[::1]:0"


@pytest.mark.parametrize("compressor", ["none", "zlib", "zstd", "qatzip-sw", "qpl-sw", "uadk-sw"])
@pytest.mark.parametrize("zero_pages", ["multifd", "legacy", "none"])
@pytest.mark.parametrize(("uri", "channels"), [("unix", 1), ("tcp:127.0.0.1:0", 2), ("tcp6", 16)])
def test_what_arrives_is_what_was_sent(work: Path, compressor: str, zero_pages: str, uri: str, channels: int) -> None:
    content = images.write_pages(work / "image.raw", 3000, 4096)
    uri = {"unix": f"unix:{work}/socket", "tcp6": tcp6()}.get(uri, uri)
    job = peers.Receiving(work / "snap", uri, channels=channels, compressor=compressor)
    sent = multifd.send(
        open_snapshot(work / "image.raw"), job.uri, compressor, channels=channels, zero_pages=zero_pages
    )
    received = job.join()
    assert memory(work / "snap") == [content]
    assert sent.compressor == received.compressor == compressor
    for name in ("normal_pages", "zero_pages", "wire_bytes", "memory_bytes", "packets", "channels"):
        assert getattr(sent, name) == getattr(received, name), name
    assert not (work / "socket").exists()


def test_a_snapshot_goes_round(work: Path) -> None:
    """From a recording to a snapshot, over a socket to another, with other settings: nothing changes."""
    streams.small("zlib", page_size=16384).write(work / "recording")
    multifd.receive(f"recording:{work / 'recording'}", work / "first")
    job = peers.Receiving(work / "second", channels=5)
    multifd.send(open_snapshot(work / "first"), job.uri, "zstd,level=7", channels=5)
    job.join()
    first, second = (json.loads((work / name / "snapshot.json").read_text()) for name in ("first", "second"))
    for index in (first, second):
        del index["transfer"]
    assert first == second
    assert memory(work / "first") == memory(work / "second")
    for file in ("device_state.bin", "configuration.bin"):
        assert (work / "first" / file).read_bytes() == (work / "second" / file).read_bytes()


def both(work: Path, theirs: dict[str, object], mine: dict[str, object], compressor: str = "none") -> tuple[str, str]:
    """The errors of both sides; the receiver's patience ends first."""
    images.write_pages(work / "image.raw", 3000, 4096)
    job = peers.Receiving(work / "snap", timeout=3, **mine)  # type: ignore[arg-type]
    with pytest.raises(MultifdError) as sending:
        multifd.send(open_snapshot(work / "image.raw"), job.uri, compressor, timeout=peers.TIMEOUT, **theirs)  # type: ignore[arg-type]
    with pytest.raises(MultifdError) as receiving:
        job.join()
    assert sorted(path.name for path in work.iterdir()) == ["image.raw"], "no snapshot is left"
    for message in (str(sending.value), str(receiving.value)):
        assert "\n" not in message
    return str(sending.value), str(receiving.value)


def test_methods_that_differ(work: Path) -> None:
    sender, receiver = both(work, {}, {"compressor": "zlib"}, "zstd")
    assert receiver.startswith("channel ")
    assert receiver.endswith("the sender uses zstd, this side expects zlib: start both with the same --compressor")
    assert "Here: compressor zstd, 2 channels, page size 4096" in sender


def test_more_channels_than_expected(work: Path) -> None:
    sender, receiver = both(work, {"channels": 4}, {"channels": 2})
    assert "the sender uses " in receiver  # at least so many, or more: as many as had come when two were there
    assert "this side expects 2: start both with the same --channels" in receiver
    assert "4 channels" in sender


def test_fewer_channels_than_expected(work: Path) -> None:
    sender, receiver = both(work, {"channels": 2}, {"channels": 3})
    assert "2 of 3 multifd channels came: start both sides with the same number of channels" in receiver
    assert "2 channels" in sender


def refused(work: Path, job: peers.Receiving, says: str, error: type[MultifdError] = PeerError) -> None:
    with pytest.raises(error, match=says) as caught:
        job.join()
    assert "\n" not in str(caught.value)
    assert not list(work.iterdir()), "no snapshot is left"


def test_a_channel_that_never_comes(work: Path) -> None:
    job = peers.Receiving(work / "snap", held=True, timeout=0.5)
    with peers.dial(job.uri) as main:
        main.sendall(streams.small().main)
        job.go()
        refused(work, job, "0 of 2 multifd channels came.*multifd on.*0.5 s")


def test_a_main_channel_that_never_comes(work: Path) -> None:
    job = peers.Receiving(work / "snap", first_timeout=0.5)
    with peers.dial(job.uri) as channel:
        channel.sendall(streams.init(0))
        refused(work, job, "1 connection came, none of them a main channel, within 0.5 s")


def test_a_source_that_goes_before_its_channels_have_come(work: Path) -> None:
    """At once, and not for want of channels: a cancel in the set-up looks so through a relay."""
    stream = streams.small(channels=2)
    job = peers.Receiving(work / "snap", channels=2)
    with peers.dial(job.uri) as main:
        main.sendall(stream.main)
        began = time.monotonic()
    refused(work, job, "^the source ended early: cancelled, or gone$")
    assert time.monotonic() - began < peers.TIMEOUT / 2


def test_nobody_comes(work: Path) -> None:
    refused(work, peers.Receiving(work / "snap", first_timeout=0.3), r"nobody connected within 0.3 s")


def test_a_connection_that_says_nothing(work: Path) -> None:
    job = peers.Receiving(work / "snap", first_timeout=0.5)
    with peers.dial(job.uri):
        refused(work, job, "1 connection came, none of them a main channel, within 0.5 s")


def test_a_stray_connection_is_ignored(work: Path) -> None:
    """Port scans and health checks connect and leave."""
    job = peers.Receiving(work / "snap", channels=1)
    with warns("closed without a byte: ignored") as warned:
        peers.dial(job.uri).close()
        assert peers.eventually(lambda: len(warned) > 0)
    peers.play(job.uri, [streams.small().main, *streams.small().channels], 1000)
    job.join()


@pytest.mark.may_warn(": ignored$")
@pytest.mark.parametrize("where", ["init", "header", "payload", "before SYNC", "main"])
def test_a_peer_that_stalls(work: Path, where: str) -> None:
    """In the middle of something, or where others wait for it."""
    stream = streams.small(page_size=4096, channels=2)
    head = streams.header_length(4096)
    cuts = {"init": 30, "header": 64 + head + 100, "payload": 64 + 2 * head + 5000, "before SYNC": 64 + head}
    cut = cuts.get(where)
    job = peers.Receiving(work / "snap", held=True, timeout=0.5)
    socks = [peers.dial(job.uri) for _ in range(3)]
    main = stream.main[: stream.main.index(b"pc.ram")] if where == "main" else stream.main
    socks[0].sendall(main)
    socks[1].sendall(stream.channels[0][:cut])
    socks[2].sendall(stream.channels[1])
    job.go()
    refused(work, job, r"nothing moved for 0.5 s \(--timeout\)|and then nothing")
    for sock in socks:
        sock.close()


def test_a_silent_source_is_waited_for_unless_told(work: Path) -> None:
    """Between two rounds a source may rightly be silent: longer than the timeout."""
    stream = streams.small()
    start = len(streams.FILE_HEADER + streams.configuration(page_bits=16) + streams.ram_start([("pc.ram", 4 * 65536)]))
    for idle_timeout in (None, 0.3):
        timeout = 2 if idle_timeout is None else 0.2
        job = peers.Receiving(work / "snap", held=True, timeout=timeout, channels=1, idle_timeout=idle_timeout)
        main, channel = peers.dial(job.uri), peers.dial(job.uri)
        main.sendall(stream.main[:start])
        channel.sendall(stream.channels[0][: 64 + streams.header_length(65536)])
        job.go()
        if idle_timeout:
            refused(work, job, r"nothing came for 0.3 s \(--idle-timeout\)")
        else:
            time.sleep(1.25 * timeout)  # the silence
            main.sendall(stream.main[start:])
            channel.sendall(stream.channels[0][64 + streams.header_length(65536) :])
            job.join()
            subprocess.run(["rm", "-r", str(work / "snap")], check=True)
        main.close()
        channel.close()


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.999])
def test_a_source_that_dies(work: Path, cut: float) -> None:
    stream = streams.small(channels=2)
    job = peers.Receiving(work / "snap")
    files = [stream.main, *stream.channels]
    peers.play(job.uri, [data[: max(4, int(len(data) * cut))] for data in files], 1000, dies=True)
    with pytest.raises(MultifdError):
        job.join()
    assert not list(work.iterdir())


def test_a_second_migration_meanwhile(work: Path) -> None:
    stream = streams.small(channels=2)
    job = peers.Receiving(work / "snap")
    with peers.dial(job.uri) as other:
        other.sendall(stream.main[:30])
        peers.play(job.uri, [stream.main, *stream.channels], 1000, dies=True)
        job.join()


def test_the_return_path_says_how_it_ended(work: Path) -> None:
    stream = streams.small(return_path=True)
    job = peers.Receiving(work / "snap", channels=1)
    answer = peers.play(job.uri, [stream.main, *stream.channels], 1000)
    job.join()
    assert answer == bytes.fromhex("0002000400000001 00070000 0001000400000000"), (
        "PONG, the switchover acknowledged, and SHUT 0 when it is on disk"
    )
    assert (work / "snap" / "snapshot.json").exists()
    job = peers.Receiving(work / "snap2", channels=1)
    broken = stream.channels[0][:-400] + bytes(400)
    answer = peers.play(job.uri, [stream.main, broken], 1000)
    with pytest.raises(MultifdError):
        job.join()
    assert answer == bytes.fromhex("0002000400000001 00070000 0001000400000001"), "SHUT 1"


def test_after_the_source_was_told_nothing_makes_it_a_failure(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: SnapshotWriter, *_: object, **__: object) -> None:
        raise HostError("no descriptors are left")

    monkeypatch.setattr(SnapshotWriter, "add_digests", fail)
    stream = streams.small(return_path=True)
    stream.write(work / "recording")
    with warns("the snapshot is complete, but has no digests: no descriptors are left"):
        multifd.receive(f"recording:{work / 'recording'}", work / "snap")
    assert open_snapshot(work / "snap").memory_bytes == 4 * 65536


def test_an_output_that_exists_is_refused_before_listening(work: Path) -> None:
    (work / "snap").write_text("mine")
    with pytest.raises(CallerError, match="exists already"):
        multifd.receive("tcp:127.0.0.1:0", work / "snap")


def test_addresses_that_cannot_be_taken(work: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(CallerError, match=rf"cannot listen on tcp:127.0.0.1:{port}: Address already in use"):
            multifd.receive(f"tcp:127.0.0.1:{port}", work / "snap")
    with pytest.raises(CallerError, match="cannot listen on unix:/nowhere/x: No such file"):
        multifd.receive("unix:/nowhere/x", work / "snap")
    (work / "file").write_text("mine")
    with pytest.raises(CallerError, match="Address already in use"):
        multifd.receive(f"unix:{work}/file", work / "snap")
    assert (work / "file").read_text() == "mine"


def test_a_dead_processs_socket_is_taken_over(work: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{work}/socket")
    job = peers.Receiving(work / "snap", f"unix:{work}/socket", channels=1)
    stream = streams.small()
    peers.play(job.uri, [stream.main, *stream.channels], 1000)
    job.join()
    assert not os.path.exists(work / "socket")


def test_a_disk_that_fills_while_receiving(tmp_path: Path, work: Path) -> None:
    with small_disk(tmp_path, 2048):
        images.write_pages(work / "image.raw", 3000, 4096)
        job = peers.Receiving(tmp_path / "snap")
        with pytest.raises(PeerError, match="its own message|own message says why"):
            multifd.send(open_snapshot(work / "image.raw"), job.uri)
        with pytest.raises(MultifdError, match="the disk is full: free some space or choose another directory"):
            job.join()
        assert not list(tmp_path.iterdir())


def test_progress_is_told(work: Path) -> None:
    images.write_pages(work / "image.raw", 60_000, 4096)
    seen: list[Progress] = []
    job = peers.Receiving(work / "snap", on_progress=seen.append)
    multifd.send(open_snapshot(work / "image.raw"), job.uri, "zlib,level=9")
    job.join()
    assert seen
    assert all(progress.pages <= progress.total_pages == 60_000 for progress in seen if progress.total_pages)
    assert seen[-1].memory_bytes == seen[-1].pages * 4096


def end_live(work: Path, number: int, uri: str, stream: streams.Stream, *, closes: bool = False) -> str:
    """What `receive` says of a migration whose channels are all written before its main channel is; empty for nothing.

    Unless it `closes` them they stay open, as those of a source that waits for an answer.
    """
    job = peers.Receiving(work / f"snap{number}", uri, channels=len(stream.channels))
    socks = [peers.dial(job.uri) for _ in (stream.main, *stream.channels)]
    try:
        with suppress(ConnectionError):  # it may know already
            for sock, data in zip([*socks[1:], socks[0]], [*stream.channels, stream.main], strict=True):
                sock.sendall(data)
                if closes:
                    sock.shutdown(socket.SHUT_WR)
        job.join()
        return ""
    except PeerError as error:
        return str(error)
    finally:
        for sock in socks:
            sock.close()


@pytest.mark.parametrize("where", ["tcp", "unix"])
def test_a_live_end_is_judged_as_a_recorded_one(work: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in a channel behind its last SYNC is looked at, every time, before it is called complete."""
    monkeypatch.setattr(parting, "MOST", 0.01)  # this source does not close anything
    uri = "tcp:127.0.0.1:0" if where == "tcp" else f"unix:{work}/here"
    good = streams.small(page_size=4096, return_path=True, channels=2)  # little: all of it fits a socket
    page = streams.packet([0], [], payload=bytes(4096), number=5)
    flush = streams.FLUSH + streams.EOS + streams.FOOTER
    head, last, rest = good.main.rpartition(flush)
    assert last
    wrong = {
        "a SYNC too many": (good.main, [good.channels[0], good.channels[1] + streams.sync(number=5)]),
        "a page behind the last SYNC": (good.main, [good.channels[0] + page, good.channels[1]]),
        "a marker too few": (head + streams.EOS + streams.FOOTER + rest, good.channels),
    }
    for number in range(20):
        for what, (main, channels) in wrong.items():
            said = end_live(work, number, uri, streams.Stream(main, channels))
            assert "but the main channel ended after" in said, (what, number, said)
            assert not (work / f"snap{number}").exists()
    merged, empty = streams.merged(streams.small(return_path=True))
    for number, more in enumerate((b"", empty, empty[:100])):
        stream = streams.Stream(merged.main, [merged.channels[0] + more])
        assert end_live(work, number, uri, stream, closes=True) == "", "7.2 sends an empty packet there"
