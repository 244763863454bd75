"""The qatzip format and its software codec: judged by gzip, by an encoder of our own, by damage."""

from __future__ import annotations

import gzip
import random
import struct
import threading
import time
from pathlib import Path

import pytest

import images
import multifd
import peers
import qatdriver
import streams
from multifd import open_snapshot
from multifd.errors import CompressorError, PeerError
from multifd_qatzip import hardware
from multifd_qatzip.library import NO_INSTANCE, DeviceError
from multifd_qatzip.members import Member, device_takes
from pairs import PAGE, Pair


def member(size: int = PAGE, **changes: int) -> bytes:
    """A good member, or one with a wrong field."""
    data = streams.pattern(3, size)
    payload = bytearray(streams.qatzip_member(data, 1))
    struct.pack_into("<I", payload, 16, changes.get("size", size))
    struct.pack_into("<I", payload, 20, changes.get("deflate", len(payload) - 32))
    struct.pack_into(
        "<I", payload, len(payload) - 8, changes.get("crc", struct.unpack_from("<I", payload, len(payload) - 8)[0])
    )
    struct.pack_into("<I", payload, len(payload) - 4, changes.get("trailer", changes.get("size", size)))
    return bytes(payload)


LENGTH = len(member())
BAD = [
    (b"", r"holds 0 bytes in 0 members, the packet's pages have 4096"),
    (member()[:20], r"byte 0 of the payload: a member's header has 24 bytes, 20 are left"),
    (member()[:-1], rf"byte 0 of the payload: a member of {LENGTH} bytes, {LENGTH - 1} are left"),
    (member() + b"x", rf"byte {LENGTH} of the payload: a member's header has 24 bytes, 1 are left"),
    (member() * 2, rf"byte {LENGTH} of the payload: a member of 4096 bytes behind the packet's last page"),
    (member(8192), r"byte 0 of the payload: a member of 8192 bytes, the packet's pages take 1 to 4096 more"),
    (member(2048), r"holds 2048 bytes in 1 members, the packet's pages have 4096"),
    (member(size=0), r"a member of 0 bytes, the packet's pages take 1 to 4096 more"),
    (member(trailer=4095), r"a member of 4096 bytes by its header, 4095 by its trailer"),
    (member(deflate=1 << 31), rf"a member of {(1 << 31) + 32} bytes, {LENGTH} are left"),
    (member(crc=1), r"byte 24 of the payload: decodes to CRC-32 [0-9a-f]{8} instead of 00000001"),
    (gzip.compress(bytes(PAGE), mtime=0), r"1f8b0800.* is no QATzip member, which starts with 1f8b080400000000"),
    (b"\0" * 100, r"0000000000000000.* is no QATzip member"),
]


@pytest.mark.parametrize(("payload", "says"), BAD)
def test_a_bad_payload_is_refused_with_both_values(payload: bytes, says: str) -> None:
    pair = Pair("qatzip-sw")
    with pytest.raises(CompressorError, match=says):
        pair.decode(payload, PAGE)
    assert pair.decode(member(), PAGE) == streams.pattern(3, PAGE), "the next packet"
    pair.close()


def test_deflate_data_that_ends_early_or_late() -> None:
    pair = Pair("qatzip-sw")
    short, long = streams.qatzip_member(bytes(PAGE - 1), 1), streams.qatzip_member(bytes(PAGE + 1), 1)
    for payload, says in (
        (short, "decodes to 4095 bytes instead of 4096"),
        (long, "decodes to more than its 4096 bytes"),
    ):
        lying = bytearray(payload)
        struct.pack_into("<I", lying, 16, PAGE)
        struct.pack_into("<I", lying, len(lying) - 4, PAGE)
        with pytest.raises(CompressorError, match=says):
            pair.decode(bytes(lying), PAGE)
    good = streams.qatzip_member(bytes(PAGE), 1)
    padded = bytearray(good[:-8] + b"left" + good[-8:])
    struct.pack_into("<I", padded, 20, len(padded) - 32)
    with pytest.raises(CompressorError, match="has 4 bytes left over"):
        pair.decode(bytes(padded), PAGE)
    pair.close()


@pytest.mark.parametrize("level", range(1, 10))
@pytest.mark.parametrize("pages", [1, 15, 16, 17, 128])
def test_it_reads_what_libqatzip_writes_in_software(level: int, pages: int) -> None:
    """One member per packet, whatever its size."""
    pair = Pair("qatzip-sw")
    memory = images.memory()
    for data in (memory[: pages * PAGE], memory[-pages * PAGE :], random.Random(level).randbytes(pages * PAGE)):
        assert pair.decode(streams.qatzip_member(data, level), len(data)) == data
    pair.close()


@pytest.mark.parametrize("level", range(1, 10))
def test_a_receivers_device_can_take_what_it_writes(level: int) -> None:
    """The limits of libqatzip's hardware path, read off the bytes."""
    pair = Pair("qatzip-sw", {"level": str(level)})
    for data in qatdriver.packets(5, level):
        payload = pair.encode([data])
        at = done = 0
        while at < len(payload):
            head, xfl, tail, size, deflate = struct.unpack_from("<8sB7sII", payload, at)
            assert (head, tail) == (b"\x1f\x8b\x08\x04\0\0\0\0", b"\xff\x0c\0QZ\x08\0")
            assert xfl in (0, 2, 4)
            assert size == min(65536, len(data) - done)
            assert deflate <= 65536 * 9 // 8 + 1024
            assert gzip.decompress(payload[at : at + deflate + 32]) == data[done : done + size]
            at += deflate + 32
            done += size
        assert done == len(data)
    pair.close()


def test_more_than_a_packet_is_refused() -> None:
    pair = Pair("qatzip-sw")
    with pytest.raises(CompressorError, match="528384 bytes of pages to compress; a packet has 1 to 524288"):
        pair.encode([bytes(129 * PAGE)])
    with pytest.raises(CompressorError, match="0 bytes of pages"):
        pair.encode([])
    with pytest.raises(CompressorError, match="a payload of 1048577 bytes; a packet has at most 1048576"):
        pair.decode(bytes((1 << 20) + 1), PAGE)
    pair.close()


def test_random_damage_is_refused_or_harmless() -> None:
    found = qatdriver.corruptions("qatzip-sw", 4000)
    assert found["refused"] > 3500
    assert len(found["messages"]) > 8


def test_importing_it_loads_no_library_of_qat() -> None:
    assert qatdriver.in_child("loads_nothing")["maps"] == []


def test_another_method_is_refused_with_both_names(work: Path) -> None:
    (work / "image.raw").write_bytes(images.memory()[: 1 << 20])
    job = peers.Receiving(work / "snap", compressor="qatzip-sw")
    with pytest.raises(PeerError, match="the destination's own message says why"):
        multifd.send(open_snapshot(work / "image.raw"), job.uri, "zlib")
    with pytest.raises(PeerError, match="the sender uses zlib, this side expects qatzip: start both"):
        job.join()


class Jobs:
    """Two threads' jobs on one instance, through the room that they wait in."""

    def __init__(self) -> None:
        self.instances = hardware._Instances()
        self.holding = threading.Event()
        self.release = threading.Event()
        self.asked = 0

    def hold(self) -> str:
        self.holding.set()
        assert self.release.wait(20)
        return "held"

    def ask(self) -> str:
        self.asked += 1
        if self.holding.is_set():
            error = DeviceError("busy")
            error.code = NO_INSTANCE
            raise error
        return "done"


def test_a_busy_instance_is_waited_for_without_asking_again_and_again() -> None:
    jobs = Jobs()
    done: list[str] = []

    def finish() -> None:
        jobs.instances.run(jobs.hold, wait=True)
        jobs.holding.clear()

    holder = threading.Thread(target=finish)
    holder.start()
    assert jobs.holding.wait(20)
    waiters = [threading.Thread(target=lambda: done.append(jobs.instances.run(jobs.ask, wait=True))) for _ in range(2)]
    for waiter in waiters:
        waiter.start()
    assert peers.eventually(lambda: jobs.asked == 2)
    time.sleep(0.3)  # in which another would ask again
    assert (done, jobs.asked) == ([], 2), "each asked once, and waits"
    jobs.holding.clear()
    jobs.release.set()
    for thread in (holder, *waiters):
        thread.join(20)
        assert not thread.is_alive()
    assert done == ["done", "done"]


def test_where_nobody_holds_an_instance_waiting_is_no_use() -> None:
    jobs = Jobs()
    jobs.holding.set()
    started = time.monotonic()
    with pytest.raises(DeviceError, match="busy"):
        jobs.instances.run(jobs.ask, wait=True)
    assert (jobs.asked, time.monotonic() - started < 5) == (1, True)


@pytest.mark.parametrize(
    ("changes", "takes"),
    [
        ({}, True),
        ({"size": 1023}, False),
        ({"size": 1024}, True),
        ({"size": 65536}, True),
        ({"size": 65537}, False),
        ({"xfl": 2}, True),
        ({"xfl": 1}, False),
        ({"end": 24 + 65536 * 9 // 8 + 1024}, True),
        ({"end": 24 + 65536 * 9 // 8 + 1025}, False),
    ],
)
def test_what_a_device_takes(changes: dict[str, int], takes: bool) -> None:
    assert device_takes(Member(**({"start": 24, "end": 1024, "size": 4096, "xfl": 0, "crc": 0} | changes))) is takes
