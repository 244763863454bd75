"""What our sources write, read by another implementation under the receiver's rules."""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

import images
import multifd
import peers
import streams
from multifd import open_snapshot
from multifd.effort import choice
from multifd.errors import CallerError, CompressorError, HostError, MultifdError, PeerError, UsageError
from multifd.jobs.report import Result


def send(work: Path, source: Path, compressor: str = "none", **options: object) -> tuple[streams.Decoded, Result]:
    channels = int(options.get("channels", 2))  # type: ignore[call-overload]
    there = peers.Keeping(channels)
    page_size = options.pop("page_size", None)
    result = multifd.send(open_snapshot(source, page_size=page_size), there.uri, compressor, **options)  # type: ignore[arg-type]
    there.join()
    found = streams.read_source(
        there.main, [there.channels[n] for n in range(channels)], compressor.split(",", maxsplit=1)[0]
    )
    assert found.commands == [1, 2]
    assert found.syncs == [2] * channels
    assert found.markers == 2
    assert result.normal_pages == found.normal
    assert result.zero_pages == found.main_zero + found.packet_zero
    assert result.wire_bytes == len(there.main) + sum(map(len, there.channels.values()))
    return found, result


@pytest.mark.parametrize(
    "compressor", ["none", "zlib", "zlib,level=0", "zlib,level=6", "zstd", "zstd,level=19", "zstd,level=-3"]
)
@pytest.mark.parametrize("zero_pages", ["multifd", "legacy", "none"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_raw_image(work: Path, compressor: str, zero_pages: str, channels: int) -> None:
    content = images.write_pages(work / "image.raw", 1000, 4096)
    zero = sum(content[at : at + 4096] == bytes(4096) for at in range(0, len(content), 4096))
    found, result = send(work, work / "image.raw", compressor, zero_pages=zero_pages, channels=channels)
    assert bytes(found.blocks["pc.ram"]) == content
    assert found.uuids == {bytes(16)}
    assert found.flushes == 2
    assert found.methods == {streams.METHODS[compressor.split(",", maxsplit=1)[0]]}
    assert (found.main_zero, found.packet_zero, found.normal_but_zero) == {
        "multifd": (0, zero, 0), "legacy": (zero, 0, 0), "none": (0, 0, zero)
    }[zero_pages]  # fmt: skip
    assert json.loads(found.device_state[6:])["devices"] == []
    assert result.memory_bytes == len(content)


@pytest.mark.parametrize("page_size", [16384, 65536])
@pytest.mark.parametrize("zero_pages", ["multifd", "legacy"])
def test_larger_pages(work: Path, page_size: int, zero_pages: str) -> None:
    content = images.write_pages(work / "image.raw", 100, page_size)
    found, _ = send(work, work / "image.raw", "zstd", page_size=page_size, zero_pages=zero_pages)
    assert found.page_size == page_size
    assert bytes(found.blocks["pc.ram"]) == content


def test_holes_are_zero_pages_and_are_not_read(work: Path) -> None:
    path = work / "image.raw"
    with open(path, "wb") as file:
        file.truncate(64 << 20)
        file.seek(20 << 20)
        file.write(b"here")
        file.seek((40 << 20) + 4096)
        file.write(b"there")
    for zero_pages, where in (("multifd", "packet_zero"), ("legacy", "main_zero")):
        found, _ = send(work, path, zero_pages=zero_pages)
        assert bytes(found.blocks["pc.ram"]) == path.read_bytes()
        assert (found.normal, getattr(found, where)) == (2, (64 << 8) - 2)
    found, _ = send(work, path, zero_pages="none")
    assert (found.normal, found.normal_but_zero) == (64 << 8, (64 << 8) - 2)


@pytest.mark.parametrize("sync", ["round", "section"])
def test_a_snapshot_keeps_its_state_uuid_and_mode(work: Path, sync: str) -> None:
    stream = streams.small(page_size=4096)
    if sync == "section":
        stream.main = stream.main.replace(streams.FLUSH, b"").replace(streams.section(2, flush=False), b"")
    stream.write(work / "recording")
    multifd.receive(f"recording:{work / 'recording'}", work / "snap")
    found, _ = send(work, work / "snap", "zlib")
    assert found.flushes == (2 if sync == "round" else 0)
    assert found.machine == "pc-q35-10.0"
    assert found.uuids == {streams.UUID}
    assert found.device_state == streams.DEVICE_STATE + streams.description()
    assert {name: bytes(memory) for name, memory in found.blocks.items()} == stream.ram
    assert (found.main_zero, found.packet_zero) == (1, 0), "legacy is right for every destination"


def fails(
    work: Path, there: str, says: str, error: type[MultifdError], compressor: str = "none", **options: object
) -> None:
    if not (work / "image.raw").exists():
        images.write_pages(work / "image.raw", 4000, 4096)
    options.setdefault("timeout", peers.TIMEOUT)
    with pytest.raises(error, match=says) as caught:
        multifd.send(open_snapshot(work / "image.raw"), there, compressor, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            bytes.fromhex("0001000400000001"),
            r"reports that it failed \(code 1\).*compressor none, 2 channels, .*RAM blocks pc.ram [0-9]+ KiB;",
        ),
        (bytes.fromhex("000200040000000100010004000000ff"), r"failed \(code 255\)"),
        (bytes.fromhex("00010000"), "SHUT with 0 bytes"),
    ],
)
def test_a_destination_that_says_no(work: Path, answer: bytes, says: str) -> None:
    there = peers.Keeping(2, answer)
    fails(work, there.uri, says, PeerError)
    there.join()


def test_a_destination_that_never_confirms(work: Path) -> None:
    there = peers.Keeping(2, b"")
    fails(work, there.uri, r"nothing moved for 1 s \(--timeout\)", PeerError, timeout=1)
    there.join()


class Deaf:
    """Accepts, and then does what it was told: nothing, or close."""

    def __init__(self, connections: int, close: bool) -> None:
        import socket

        self.server = socket.create_server(("127.0.0.1", 0))
        self.uri = f"tcp:127.0.0.1:{self.server.getsockname()[1]}"
        self.socks: list[socket.socket] = []
        self.job = threading.Thread(target=self.run, args=(connections, close))
        self.job.start()

    def run(self, connections: int, close: bool) -> None:
        for _ in range(connections):
            self.socks.append(self.server.accept()[0])
        if close:
            self.end()

    def end(self) -> None:
        for sock in self.socks:
            sock.close()
        self.server.close()


def test_a_destination_that_does_not_read(work: Path) -> None:
    images.write_pages(work / "image.raw", 8000, 4096)
    there = Deaf(3, close=False)
    fails(work, there.uri, r"channel \d: the other side does not read: nothing moved for 1 s", PeerError, timeout=1)
    there.job.join()
    there.end()


def test_a_destination_that_goes_away(work: Path) -> None:
    there = Deaf(3, close=True)
    fails(work, there.uri, "closed the connection.*must fit over there", PeerError)
    there.job.join()


def test_nobody_there(work: Path) -> None:
    fails(work, f"unix:{work}/none", "is the destination listening there", HostError)
    fails(work, "tcp:127.0.0.1:1", "is the destination listening there", HostError)
    fails(work, "tcp:no.such.host.invalid:1", "cannot connect", HostError)


@pytest.mark.parametrize(
    ("uri", "compressor", "options", "error", "says"),
    [
        ("tcp:127.0.0.1", "none", {}, UsageError, "is no URI: use tcp:HOST:PORT"),
        ("recording:x", "none", {}, UsageError, "can only be received"),
        ("tcp:h:1", "zstd,level=21", {}, UsageError, "level 21 is outside -131072..20"),
        ("tcp:h:1", "zlib,level=10", {}, UsageError, "level 10 is outside 0..9"),
        ("tcp:h:1", "none,level=1", {}, UsageError, "none has no level"),
        ("tcp:h:1", "nope", {}, HostError, "no compressor is named 'nope'"),
        ("tcp:h:1", "none", {"channels": 0}, UsageError, "0 channels: QEMU takes 1 to 255"),
        ("tcp:h:1", "none", {"channels": 256}, UsageError, "256 channels"),
    ],
)
def test_mistakes_before_anything_is_sent(
    work: Path, uri: str, compressor: str, options: dict[str, object], error: type[MultifdError], says: str
) -> None:
    fails(work, uri, says, error, compressor, **options)


def test_a_source_that_shrinks_while_it_is_sent(work: Path) -> None:
    path = work / "image.raw"
    images.write_pages(path, 8000, 4096)
    there = Deaf(3, close=False)

    def shrink() -> None:
        there.job.join()
        os.truncate(path, 4096)
        drain(there)

    job = threading.Thread(target=shrink)
    job.start()
    fails(work, there.uri, r"image.raw shrank to \d+ bytes while it was read; it had 32768000", HostError)
    job.join()


def drain(there: Deaf) -> None:
    """Let the sender go on, now that its file is short."""
    threads = [threading.Thread(target=lambda sock=sock: swallow(sock)) for sock in there.socks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    there.end()


def swallow(sock: object) -> None:
    try:
        while sock.recv(1 << 20):  # type: ignore[attr-defined]
            pass
    except ConnectionError:
        pass


def test_a_source_that_fails_while_it_is_read(work: Path) -> None:
    (work / "image.raw").write_bytes(bytes(4096))
    source = open_snapshot(work / "image.raw")
    (work / "image.raw").unlink()
    there = Deaf(0, close=True)
    with pytest.raises(CallerError, match="No such file"):
        multifd.send(source, there.uri)
    there.job.join()


class Huge:
    """A compressor that breaks the rules."""

    from multifd.hookspecs import Channel, Facts, Probe, hookimpl

    @hookimpl
    def multifd_compressor(self) -> Facts:
        return self.Facts("huge", "huge", 31, "too large a payload")

    @hookimpl
    def multifd_send_prepare(self) -> list[bytes]:
        return [bytes((1 << 20) + 1)]

    @hookimpl
    def multifd_probe(self) -> Probe:
        return self.Probe(True, "none")

    @hookimpl
    def multifd_recv(self, channel: Channel) -> None:
        channel.read_into(bytearray(channel.next_packet_size))


def test_a_payload_no_receiver_takes_is_not_sent(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from multifd.codec.compressor import Compressor

    huge = Compressor("huge", Huge(), "test 1")
    monkeypatch.setattr(choice, "select", lambda *_, **__: (huge, huge.settings({}, sending=True)))
    there = peers.Keeping(2, b"")
    fails(
        work,
        there.uri,
        r"channel \d: huge .*: multifd_send_prepare made 1048577 bytes; the contract:",
        CompressorError,
        "huge",
    )
    there.join()


def test_a_thread_that_cannot_start_leaves_no_other(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`_nothing_left` looks whether the first one's has ended."""
    images.write_pages(work / "image.raw", 100, 4096)
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name == "channel 1":
            raise RuntimeError("can't start new thread")
        start(thread)

    there = peers.Keeping(2)
    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(HostError, match="no thread can be started: raise `ulimit -u`"):
        multifd.send(open_snapshot(work / "image.raw"), there.uri)
    there.join()


@pytest.mark.parametrize(
    "answer", [b"", b"\x00\x02\x00\x04\x00\x00\x00\x01", b"\x00\x01\x00", b"\x00\x01\x00\x04\x00\x00\x00\x07"]
)
def test_a_channel_that_is_closed_while_main_stays_open(work: Path, answer: bytes) -> None:
    """What the main channel says is the cause; where it says nothing, a PONG, or half a word, the channel is."""
    (work / "image.raw").write_bytes(bytes(range(256)) * 4096 * 64)
    with socket.create_server(("127.0.0.1", 0)) as server, ExitStack() as stack:

        def serve() -> None:
            main, _ = server.accept()
            stack.enter_context(main)
            main.sendall(answer)
            for _ in range(2):
                server.accept()[0].close()

        thread = threading.Thread(target=serve)
        thread.start()
        says = r"failed \(code 7\)" if answer.endswith(b"\7") else "channel [01]: the other side closed the connection"
        fails(work, f"tcp:127.0.0.1:{server.getsockname()[1]}", f"{says}.*must fit over there", PeerError)
        thread.join()
