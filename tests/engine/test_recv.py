"""Hand-made streams: lies, cuts and flips are refused, and never make a wrong snapshot."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import multifd
import streams
from multifd.codec import readers
from multifd.codec.compressor import Compressor
from multifd.errors import CompressorError, HostError, MultifdError, PeerError, UsageError
from multifd.hookspecs import Channel, Facts, Probe, hookimpl
from multifd.jobs.report import Result
from multifd.snapshot.writer import BlockFile

SIZE = 65536


def receive(work: Path, stream: streams.Stream, **options: object) -> Result:
    stream.write(work / "recording")
    return multifd.receive(f"recording:{work / 'recording'}", work / "snap", **options)  # type: ignore[arg-type]


def memory(work: Path) -> dict[str, bytes]:
    index = json.loads((work / "snap" / "snapshot.json").read_text())
    return {block["idstr"]: (work / "snap" / block["file"]).read_bytes() for block in index["blocks"]}


def forget(work: Path) -> None:
    for path in (work / "snap").iterdir():
        path.unlink()
    (work / "snap").rmdir()


def refused(
    work: Path, stream: streams.Stream, says: str | None = None, error: type[MultifdError] = MultifdError
) -> None:
    with pytest.raises(error, match=says) as caught:
        receive(work, stream)
    assert "\n" not in str(caught.value)
    assert [path.name for path in work.iterdir()] == ["recording"], "nothing is left behind"


@pytest.mark.parametrize("method", ["none", "zlib", "zstd", "qatzip", "qpl", "uadk"])
@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_whole_stream_is_taken(work: Path, method: str, page_size: int, channels: int) -> None:
    stream = streams.small(method, page_size=page_size, channels=channels)
    result = receive(work, stream)
    assert memory(work) == stream.ram
    assert (result.normal_pages, result.zero_pages, result.packets) == (3, 1, 2 * channels + 1)
    assert result.memory_bytes == 4 * page_size
    index = json.loads((work / "snap" / "snapshot.json").read_text())
    assert index["page_size"] == page_size
    assert index["transfer"]["rounds"] == 1
    assert index["transfer"]["sync_points"] == 2


@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["none", "zlib", "zstd", "qatzip", "qpl", "uadk"])
def test_cut_at_every_byte(work: Path, method: str) -> None:
    stream = streams.small(method)
    if method == "none":
        lengths = [*range(1300), *range(1300, len(stream.channels[0]), 4099)]
    else:
        lengths = list(range(len(stream.channels[0])))
    early = "^the source ended early: cancelled, or gone; "
    for cut in lengths:
        refused(
            work, replace(stream, channels=[stream.channels[0][:cut]]), early if cut >= 64 else "is it a migration|64"
        )
    for cut in range(len(stream.main)):
        refused(work, replace(stream, main=stream.main[:cut]), early if cut >= 4 else "is it a migration")
    receive(work, stream)


def flips(stream: streams.Stream, mix: random.Random) -> Iterator[tuple[streams.Stream, int]]:
    """Streams with one bit flipped, and where the payload was hit (-1: elsewhere).

    Every bit of the fields that say what and where; one bit of every other byte; some of the payload.
    """
    channel = stream.channels[0]
    head = streams.header_length(SIZE)
    data = 64 + head
    payload = data + head
    telling = set(range(26)) | {data + at for at in (*range(36), *range(320, 320 + 32), *range(64, 72))}
    spots = [(at, bit) for at in sorted(telling) for bit in range(8)]
    others = [at for at in range(len(channel)) if at not in telling and not payload <= at < payload + 3 * SIZE]
    spots += [(at, mix.randrange(8)) for at in others]
    spots += [(payload + mix.randrange(3 * SIZE), mix.randrange(8)) for _ in range(40)]
    for at, bit in spots:
        hit = bytearray(channel)
        hit[at] ^= 1 << bit
        yield replace(stream, channels=[bytes(hit)]), at - payload if payload <= at < payload + 3 * SIZE else -1
    for at in range(len(stream.main)):
        hit = bytearray(stream.main)
        hit[at] ^= 1 << mix.randrange(8)
        yield replace(stream, main=bytes(hit)), -1


@pytest.mark.timeout(600)
@pytest.mark.may_warn(".*SYNCs are like no known QEMU's")
def test_flipped_bits_are_refused_or_hit_nothing_but_themselves(work: Path) -> None:
    stream = streams.small("none")
    whole = stream.ram["pc.ram"]
    taken = 0
    for flipped, hit in flips(stream, random.Random(5)):
        try:
            receive(work, flipped, digests=False)
        except MultifdError as error:
            assert hit < 0, "a payload of method none has no check"
            assert "\n" not in str(error)
            assert [path.name for path in work.iterdir()] == ["recording"]
            continue
        taken += 1
        (got,) = memory(work).values()
        forget(work)
        if hit < 0:
            assert got == whole
        else:
            where = hit + (SIZE if hit >= SIZE else 0)  # page 1 is the zero page
            assert got[:where] == whole[:where]
            assert got[where + 1 :] == whole[where + 1 :]
            assert got[where] != whole[where]
    assert taken > 40


@pytest.mark.timeout(300)
@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_flipped_compressed_payloads_crash_nothing(work: Path, method: str) -> None:
    """Neither stream has checksums, so wrong content can pass; what was not hit must be right."""
    stream = streams.small(method)
    mix = random.Random(6)
    channel = stream.channels[0]
    start = 64 + 2 * streams.header_length(SIZE)
    end = len(channel) - streams.header_length(SIZE)
    refusals = 0
    for at in range(start, end):
        hit = bytearray(channel)
        hit[at] ^= 1 << mix.randrange(8)
        try:
            receive(work, replace(stream, channels=[bytes(hit)]), digests=False)
        except MultifdError as error:
            refusals += 1
            assert "\n" not in str(error)
        else:
            assert memory(work)["pc.ram"][SIZE : 2 * SIZE] == bytes(SIZE)
            forget(work)
    assert refusals > 30


def with_packet(body: bytes, *, ram: tuple[tuple[str, int], ...] = (("pc.ram", 4 * SIZE),)) -> streams.Stream:
    main = (
        streams.FILE_HEADER
        + streams.configuration(page_bits=16)
        + streams.ram_start(list(ram))
        + streams.section(3)
        + streams.DEVICE_STATE
        + streams.description()
    )
    channel = streams.init(0) + streams.sync(SIZE) + body + streams.sync(SIZE)
    return streams.Stream(main, streams.numbered([channel]))


def data(*normal: int, **lies: object) -> bytes:
    zero = [at for at in range(0, 4 * SIZE, SIZE) if at not in normal]
    lies.setdefault("payload", bytes([1]) * SIZE * len(normal))
    return streams.packet(normal, zero, page_size=SIZE, **lies)  # type: ignore[arg-type]


DEVICE_PACKET = struct.pack(">III256sII", streams.MAGIC, 1, 0x40, b"vfio", 0, 4) + b"abcd"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (data(0, magic=1), "channel 0: magic 0x00000001 instead of 0x11223344"),
        (data(0, version=7), "channel 0: multifd version 7, this side knows 1"),
        (data(0, block="vga"), "channel 0: .*'vga', the source listed pc.ram"),
        (data(5), "channel 0: offset 0x5 in pc.ram is not a multiple"),
        (data(4 * SIZE), "channel 0: offset 0x40000 is beyond the end of pc.ram"),
        (data(0, alloc=9), "channel 0: .* 9 pages, 8 of 65536 bytes fit"),
        (data(0, counts=(9, 0)), "channel 0: .*9 normal"),
        (data(0, size=SIZE - 1), "none: payload of 65535 bytes for 65536 bytes of pages"),
        (data(0, size=0), "a payload of 0 bytes for 1 pages"),
        (data(0, size=(1 << 20) + 1), "a payload of 1048577 bytes for 1 pages; 1 to 1048576 are allowed"),
        (data(0, size=0xFFFFFFFF), "a payload of 4294967295 bytes"),
        (data(0, method="uadk", payload=b"x"), "packet 1: uadk.*: a payload of 1 bytes; 1 pages take 5 to 65540"),
        (data(0, flags=29 << 1), "the packets are method 29, and no compressor"),
        (data(0) + data(0), "the first at 0x0|came twice"),
        (DEVICE_PACKET, "VFIO devices cannot be taken"),
        (streams.sync(SIZE) + data(0), "3 SYNCs and 0 packets after the last, .* after 2 sync points"),
        (b"", "4 pages of pc.ram never came, the first at 0x0"),
        (
            streams.packet([0], page_size=SIZE, payload=bytes(SIZE)),
            "3 pages of pc.ram never came, the first at 0x10000",
        ),
        (data(0, method="zlib", payload=b"\x78\x9c" + bytes(50)), "packet 1: zlib: "),
        (data(0, method="zstd", payload=bytes(50)), "packet 1: zstd: .*magic 0x00000000"),
    ],
)
def test_lies_are_refused_with_both_values(work: Path, body: bytes, says: str) -> None:
    if body == data(0) + data(0):
        body = data(0) + data(0, payload=bytes([2]) * SIZE)
    refused(work, with_packet(body), says)


def test_a_page_sent_twice_with_the_same_content_is_fine(work: Path) -> None:
    receive(work, with_packet(data(0) + data(0)))
    assert memory(work)["pc.ram"][:SIZE] == bytes([1]) * SIZE


def test_missing_pages_are_taken_when_asked(work: Path) -> None:
    receive(work, with_packet(streams.packet([SIZE], page_size=SIZE, payload=b"x" * SIZE)), missing_allowed=True)
    assert memory(work)["pc.ram"] == bytes(SIZE) + b"x" * SIZE + bytes(2 * SIZE)


def test_zero_pages_come_before_the_payload_and_need_none(work: Path) -> None:
    """A zero-only packet has no payload, whatever its size field says (QEMU before 9.0: stale)."""
    body = streams.packet([], range(0, 4 * SIZE, SIZE), page_size=SIZE, size=999, method="zstd")
    receive(work, with_packet(body))
    assert memory(work)["pc.ram"] == bytes(4 * SIZE)


def test_a_later_epoch_wins(work: Path) -> None:
    stream = with_packet(data(0, SIZE) + streams.sync(SIZE) + data(0, payload=bytes([9]) * SIZE))
    main = stream.main.replace(streams.section(3), streams.section(2) + streams.section(3))
    receive(work, replace(stream, main=main))
    assert memory(work)["pc.ram"] == bytes([9]) * SIZE + bytes(3 * SIZE)


def test_several_blocks_and_offsets_beyond_4_gib(work: Path) -> None:
    """The block is 8 GiB, the file is sparse, the pages lie at its end."""
    length = 8 << 30
    body = streams.packet([length - SIZE, 5 << 30], page_size=SIZE, payload=b"e" * SIZE + b"f" * SIZE)
    body += streams.packet([0], block="vga", page_size=SIZE, payload=b"v" * SIZE)
    stream = with_packet(body, ram=(("pc.ram", length), ("vga", SIZE)))
    receive(work, stream, missing_allowed=True, digests=False)
    index = json.loads((work / "snap" / "snapshot.json").read_text())
    path = work / "snap" / index["blocks"][0]["file"]
    assert path.stat().st_size == length
    with open(path, "rb") as file:
        file.seek(5 << 30)
        assert file.read(SIZE) == b"f" * SIZE
        file.seek(length - SIZE)
        assert file.read() == b"e" * SIZE


def test_a_method_that_differs_names_both_and_the_fix(work: Path) -> None:
    streams.small("zstd").write(work / "recording")
    with pytest.raises(PeerError) as caught:
        multifd.receive(f"recording:{work / 'recording'}", work / "snap", "zlib")
    assert str(caught.value) == (
        "channel 0: the sender uses zstd, this side expects zlib: start both with the same --compressor"
    )


@pytest.mark.parametrize(
    ("channels", "says"),
    [
        ([streams.init(1)], "channel 1: the sender uses at least 2 channels, this side expects 1"),
        ([streams.init(0), streams.init(0)], "channel 0: came twice"),
        ([streams.init(0), streams.init(1, uuid=bytes(16))], "uuid 0{32}.*the other channels have|uuid 000102"),
        ([streams.init(0, version=2)], "version 2"),
        ([b"GET / HTTP/1.1\r\n\r\n" + bytes(99)], "begins with 0x47455420, neither a migration"),
        ([b"\x16\x03\x01" + bytes(99)], "it speaks TLS, this side does not"),
        ([b"\x11\x22"], "ch0.bin ended after 2 bytes"),
        ([b""], "ch0.bin ended after 0 bytes"),
        ([streams.init(0)[:40]], "40 of the 64 bytes"),
    ],
)
def test_wrong_channels(work: Path, channels: list[bytes], says: str) -> None:
    refused(work, replace(streams.small(), channels=channels), says)


def test_a_main_channel_with_another_uuid(work: Path) -> None:
    stream = streams.small()
    main = stream.main.replace(streams.configuration(page_bits=16), streams.configuration(page_bits=16, uuid=bytes(16)))
    refused(work, replace(stream, main=main), "uuid")


def test_more_syncs_than_markers_and_fewer(work: Path) -> None:
    stream = streams.small()
    channel = stream.channels[0]
    refused(work, replace(stream, channels=[channel + streams.sync(SIZE, 3)]), "3 SYNCs .* 2 sync points")
    refused(work, replace(stream, channels=[channel[: -streams.header_length(SIZE)]]), "ended early: .*before SYNC 2")


def test_what_qemu_7_2_may_cut_off_is_not_missed(work: Path) -> None:
    """The very last empty packet, after the last SYNC, whole or cut."""
    stream, empty = streams.merged(streams.small())
    for cut in (0, 1, 12, 100, len(empty)):
        receive(work, replace(stream, channels=[stream.channels[0] + empty[:cut]]))
        assert memory(work) == stream.ram
        forget(work)
    refused(work, replace(stream, channels=[stream.channels[0] + 2 * empty]), "2 SYNCs and 1 packet after the last")
    page = streams.packet([0], page_size=SIZE, payload=bytes(SIZE), number=4)
    for cut in (20, 100, len(page) - 1):
        refused(work, replace(stream, channels=[stream.channels[0] + page[:cut]]), "the source ended early: .*")


def test_recordings_that_are_none(work: Path) -> None:
    with pytest.raises(MultifdError, match=r"holds no main\.bin"):
        multifd.receive(f"recording:{work}", work / "snap")
    (work / "main.bin").write_bytes(streams.small().main)
    with pytest.raises(MultifdError, match=r"holds no ch0\.bin"):
        multifd.receive(f"recording:{work}", work / "snap")
    (work / "ch0.bin.zst").write_bytes(b"not zstd")
    with pytest.raises(HostError, match=r"ch0\.bin\.zst cannot be read"):
        multifd.receive(f"recording:{work}", work / "snap")
    with pytest.raises(UsageError, match="has 1 channels, not 4"):
        multifd.receive(f"recording:{work}", work / "snap", channels=4)


def zlib_payload(content: bytes, end: int = zlib.Z_SYNC_FLUSH) -> bytes:
    stream = zlib.compressobj(1)
    return stream.compress(content) + stream.flush(end)


PAGES = bytes([1]) * (2 * SIZE)


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (zlib_payload(PAGES[:-1]), "decodes to 131071 bytes instead of 131072"),
        (zlib_payload(PAGES + b"x"), "holds more than its 131072"),
        (zlib_payload(PAGES * 5), "holds more than its 131072"),
        (zlib_payload(PAGES) + b"\0", "does not end with its flush: bytes are left over"),
        (zlib_payload(PAGES) + b"junk", "zlib: the payload"),
        (zlib_payload(PAGES) + bytes(64), "zlib: the payload"),
        (zlib_payload(PAGES) + zlib_payload(PAGES), "zlib: the payload"),
        (zlib_payload(PAGES, zlib.Z_FINISH), "zlib: the payload"),
        (zlib_payload(PAGES)[:-9], "zlib: the payload"),
    ],
)
def test_zlib_payloads_of_another_size(work: Path, payload: bytes, says: str) -> None:
    refused(work, with_packet(data(0, SIZE, method="zlib", payload=payload)), says, CompressorError)


@pytest.mark.parametrize("flush", [zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_PARTIAL_FLUSH])
@pytest.mark.parametrize("level", [0, 1, 6, 9])
@pytest.mark.parametrize("per_page", [False, True])
def test_every_flush_that_qemu_takes_is_taken(work: Path, flush: int, level: int, per_page: bool) -> None:
    mix = random.Random(level)
    pages = [mix.randbytes(SIZE), bytes(SIZE - 1) + b"x", streams.pattern(1, SIZE), mix.randbytes(SIZE)]
    stream = zlib.compressobj(level)
    body = b""
    for number in (0, 2):
        payload = b""
        for page in pages[number : number + 2]:
            payload += stream.compress(page) + (stream.flush(flush) if per_page else b"")
        payload += b"" if per_page else stream.flush(flush)
        offsets = [number * SIZE, (number + 1) * SIZE]
        body += streams.packet(offsets, page_size=SIZE, method="zlib", payload=payload)
    receive(work, with_packet(body))
    assert memory(work)["pc.ram"] == b"".join(pages)


def zstd_payload(content: bytes, *, end: bool = False) -> bytes:
    zstd = streams.other_zstd()
    compressor = zstd.ZstdCompressor(level=1)
    mode = zstd.ZstdCompressor.FLUSH_FRAME if end else zstd.ZstdCompressor.FLUSH_BLOCK
    return bytes(compressor.compress(content, mode=mode))


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (zstd_payload(PAGES[:-1]), "decodes to less than its 131072"),
        (zstd_payload(PAGES[:-1], end=True), "decodes to less than its 131072"),
        (zstd_payload(PAGES + b"x"), "holds more than its 131072"),
        (zstd_payload(PAGES * 5), "holds more than its 131072"),
        (zstd_payload(PAGES) + b"\0", "does not end with a block: bytes are left over"),
        (zstd_payload(PAGES) + b"\0\0\0", "packet 1: zstd"),
        (zstd_payload(PAGES)[:-1], "does not end with a block"),
        (zstd_payload(PAGES, end=True) + b"junkjunk", "not zstd's: magic"),
        (zstd_payload(PAGES, end=True) + zstd_payload(PAGES, end=True), "holds more"),
        (b"\x28\xb5\x2f\xfd", "does not end with a block"),
        (b"\x28\xb5\x2f\xfd\x00\xff" + bytes(3), "zstd: the payload"),
    ],
)
def test_zstd_payloads_of_another_size(work: Path, payload: bytes, says: str) -> None:
    if payload == zstd_payload(PAGES) + b"\0\0\0":
        receive(work, with_packet(data(0, SIZE, method="zstd", payload=payload)))  # an empty block: nothing left over
        return
    refused(work, with_packet(data(0, SIZE, method="zstd", payload=payload)), says, CompressorError)


@pytest.mark.parametrize("frames", ["one", "per packet", "flush per page"])
def test_every_frame_that_qemu_takes_is_taken(work: Path, frames: str) -> None:
    zstd = streams.other_zstd()
    mix = random.Random(1)
    pages = [mix.randbytes(SIZE), bytes(SIZE - 1) + b"x", streams.pattern(1, SIZE), mix.randbytes(SIZE)]
    flush_block, flush_frame = zstd.ZstdCompressor.FLUSH_BLOCK, zstd.ZstdCompressor.FLUSH_FRAME
    options = {zstd.CompressionParameter.checksum_flag: 1, zstd.CompressionParameter.content_size_flag: 1}
    stream = zstd.ZstdCompressor(options=options if frames == "per packet" else None)
    body = b""
    for number in (0, 2):
        pair = pages[number : number + 2]
        if frames == "flush per page":
            payload = b"".join(stream.compress(page, mode=flush_block) for page in pair)
        else:
            payload = stream.compress(b"".join(pair), mode=flush_frame if frames == "per packet" else flush_block)
        offsets = [number * SIZE, (number + 1) * SIZE]
        body += streams.packet(offsets, page_size=SIZE, method="zstd", payload=payload)
    receive(work, with_packet(body))
    assert memory(work)["pc.ram"] == b"".join(pages)


class Careless:
    """A compressor that reads another number of bytes than the payload has."""

    def __init__(self, reads: int) -> None:
        self.reads = reads

    @hookimpl
    def multifd_compressor(self) -> Facts:
        return Facts("careless", "careless", 31, "breaks the rules")

    @hookimpl
    def multifd_probe(self) -> Probe:
        return Probe(True, "none")

    @hookimpl
    def multifd_send_prepare(self, pages: Sequence[memoryview]) -> Sequence[memoryview]:
        return pages

    @hookimpl
    def multifd_recv(self, channel: Channel) -> None:
        channel.read_into(bytearray(channel.next_packet_size + self.reads))


@pytest.mark.parametrize(
    ("reads", "says"),
    [
        (-1, "1 of 7 payload bytes are left over"),
        (1, r"careless \(test 1\) failed: ValueError: read_into of 8 bytes, 7 are left"),
    ],
)
def test_a_compressor_must_read_its_payload(work: Path, monkeypatch: pytest.MonkeyPatch, reads: int, says: str) -> None:
    compressor = Compressor("careless", Careless(reads), "test 1")
    monkeypatch.setattr(readers, "select_for_flag", lambda _: (compressor, compressor.settings({}, sending=False)))
    refused(work, with_packet(data(0, flags=31 << 1, payload=b"payload")), says)


class Watching(Careless):
    def __init__(self, events: list[str]) -> None:
        super().__init__(0)
        self.events = events

    @hookimpl
    def multifd_recv(self, channel: Channel) -> None:
        self.events.append("payload")
        channel.read_into(bytearray(channel.next_packet_size))


def test_zero_pages_come_before_the_payload(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a packet without normal pages has no payload: the compressor is not called."""
    events: list[str] = []
    compressor = Compressor("careless", Watching(events), "test 1")
    monkeypatch.setattr(readers, "select_for_flag", lambda _: (compressor, compressor.settings({}, sending=False)))
    real = BlockFile.clear

    def clear(self: BlockFile, offset: int, length: int) -> None:
        events.append("zero")
        real(self, offset, length)

    monkeypatch.setattr(BlockFile, "clear", clear)
    packets = [
        streams.packet([0], [SIZE], payload=b"payload", flags=31 << 1, page_size=SIZE),
        streams.packet([], [2 * SIZE], flags=31 << 1, page_size=SIZE, number=1),
        streams.packet([3 * SIZE], [], payload=b"payload", flags=31 << 1, page_size=SIZE, number=2),
    ]
    receive(work, with_packet(b"".join(packets)))
    assert events == ["zero", "payload", "zero", "payload"]


def test_a_block_that_claims_8_tib_costs_no_memory(work: Path) -> None:
    main = (
        streams.FILE_HEADER
        + streams.configuration()
        + streams.ram_start([("pc.ram", 8 << 40)])
        + streams.section(3)
        + streams.DEVICE_STATE
        + streams.description()
    )
    streams.Stream(main, [streams.init(0) + streams.sync() + streams.sync(number=1)]).write(work / "recording")
    code = (
        "import re, sys\nimport multifd\nfrom multifd.errors import MultifdError\n"
        "try:\n    multifd.receive(f'recording:{sys.argv[1]}/recording', f'{sys.argv[1]}/snap')\n"
        "except MultifdError as error:\n    print(error)\n"
        r"print(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(work)], capture_output=True, text=True, timeout=60, check=True
    )
    message, peak = result.stdout.splitlines()
    assert "2147483648 pages of pc.ram never came" in message
    assert int(peak) < 64 * 1024
