"""Methods qpl and uadk in software: by packets written by hand, by zlib, by damage, by what QEMU's uadk lacks."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import pytest

import images
import multifd
import peers
import qatdriver
import streams
from multifd import open_snapshot
from multifd.errors import CompressorError, UsageError
from multifd.formats import deflate, pagelist
from pairs import PAGE, Pair
from relaying import Relaying, closing

METHODS = ["qpl", "uadk"]


def bits(text: str) -> bytes:
    """Bits in the order of the stream, as bytes: RFC 1951 fills each from its lowest bit."""
    text = text.replace(" ", "")
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8][::-1], 2) for at in range(0, len(text), 8))


# A page of zeros by RFC 1951, 3.2.6: last block, fixed codes; literal 0; fifteen times length 258
# (symbol 285) and once 225 (symbol 283, 30 in five more bits), each at distance 1; end of block.
ZERO_PAGE = bits("1 10  00110000" + "11000101 00000" * 15 + "11000011 01111 00000" + "0000000")
# Adler-32 by RFC 1950: 1 + the sum of all bytes, and 4096 times 1.
ZERO_PAGE_UADK = b"\x78\x9c" + ZERO_PAGE + bytes.fromhex("10000001")
NOISE = random.Random(5).randbytes(PAGE)
GOLDEN = {
    "qpl": bytes.fromhex("0000001d 00001000 0000001d") + ZERO_PAGE + NOISE + ZERO_PAGE,
    "uadk": bytes.fromhex("00000023 00001000 00000023") + ZERO_PAGE_UADK + NOISE + ZERO_PAGE_UADK,
}


@pytest.mark.parametrize("method", METHODS)
def test_a_packet_written_by_hand(method: str) -> None:
    pair = Pair(f"{method}-sw")
    assert pair.decode(GOLDEN[method], 3 * PAGE) == bytes(PAGE) + NOISE + bytes(PAGE)
    pair.close()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("page_size", [1024, 4096, 65536])
@pytest.mark.parametrize("level", [1, 2, 3, 9])
def test_a_device_can_read_what_it_writes(method: str, page_size: int, level: int) -> None:
    """One stream a page, matches no further back than 4 KiB, raw where that is no shorter."""
    pair = Pair(f"{method}-sw", {"level": str(level)}, page_size=page_size)
    mix = random.Random(level)
    far = mix.randbytes(page_size // 2) * 2
    noise = mix.randbytes(page_size)
    memory = images.memory()
    pages = [memory[:page_size], memory[page_size:][:page_size], far, noise, bytes(page_size)]
    data = streams.read_page_list(pair.encode([b"".join(pages[:2]), b"".join(pages[2:])]), len(pages))
    assert [streams.decode_page(method, made, page_size) for made in data] == pages
    assert data[3] == noise
    assert [len(made) < page_size for made in data] == [True, True, page_size <= 4096, False, True], "far is too far"
    pair.close()


@pytest.mark.parametrize("method", METHODS)
def test_without_isal_zlib_does_it_all(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagelist, "ISAL_LEVELS", {})
    monkeypatch.setattr(deflate, "decompressobj", zlib.decompressobj)
    pair = Pair(f"{method}-sw")
    data = images.memory()[: 40 * PAGE]
    payload = pair.encode([data])
    assert len(payload) < len(data)
    assert [streams.decode_page(method, made, PAGE) for made in streams.read_page_list(payload, 40)] == [
        data[at : at + PAGE] for at in range(0, len(data), PAGE)
    ]
    assert pair.decode(payload, len(data)) == data
    for bad, says in BAD[method]:
        with pytest.raises(CompressorError, match=says):
            pair.decode(bad, PAGE)
    pair.close()


def page(content: bytes, method: str, flush: int = zlib.Z_FINISH) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15 if method == "qpl" else 15)
    return stream.compress(content) + stream.flush(flush)


def bad_payloads(method: str) -> list[tuple[bytes, str]]:
    """Payloads for one page, and what is said of them."""
    text = streams.pattern(1, PAGE)
    good = page(text, method)
    one = streams.page_list
    cases = [
        (b"\0\0\0\x05", r"a payload of 4 bytes; 1 pages take 5 to 4100"),
        (bytes(5), "page 0: a length of 0 bytes; 1 to 4096 are allowed"),
        (one([bytes(4097)]), "a payload of 4101 bytes; 1 pages take 5 to 4100"),
        (struct.pack(">I", 4097) + good, "page 0: a length of 4097 bytes; 1 to 4096 are allowed"),
        (struct.pack(">I", 0xFFFFFFFF) + good, "page 0: a length of 4294967295 bytes"),
        (one([good]) + b"x", rf"lengths of 1 pages add up to 4 \+ {len(good)} bytes, the payload has {len(good) + 5}"),
        (one([good])[:-1], rf"lengths of 1 pages add up to 4 \+ {len(good)} bytes, the payload has {len(good) + 3}"),
        (one([good[:-1]]), r"page 0: ends inside its deflate data, at \d+ of 4096"),
        (one([good[:20]]), r"page 0: ends inside its deflate data, at \d+ of 4096"),
        (one([good + b"xy"]), "page 0: has 2 bytes left over"),
        (one([good + good]), f"page 0: has {len(good)} bytes left over"),
        (one([page(text, method, zlib.Z_SYNC_FLUSH)]), "page 0: ends inside its deflate data, at 4096 of 4096"),
        (one([page(text[:-1], method)]), "page 0: decodes to 4095 bytes instead of 4096"),
        (one([page(b"", method)]), "page 0: decodes to 0 bytes instead of 4096"),
        (one([page(text + b"x", method)]), "page 0: decodes to more than its 4096 bytes"),
        (one([page(bytes(1 << 20), method)]), "page 0: decodes to more than its 4096 bytes"),
        (one([b"\xff" * 99]), "page 0: damaged deflate data"),
        (one([page(text, "uadk" if method == "qpl" else "qpl")]), "page 0: (damaged deflate data|decodes to|ends)"),
    ]
    if method == "uadk":
        preset = zlib.compressobj(9, zlib.DEFLATED, 15, zdict=text)
        cases += [
            (one([good[:-1] + bytes([good[-1] ^ 1])]), "page 0: damaged deflate data: .*check"),
            (one([preset.compress(text) + preset.flush()]), "page 0: damaged deflate data"),
        ]
    return cases


BAD = {method: bad_payloads(method) for method in METHODS}


@pytest.mark.parametrize(
    ("method", "number"), [(method, number) for method in METHODS for number in range(len(BAD[method]))]
)
def test_a_bad_payload_is_refused_with_both_values(method: str, number: int) -> None:
    payload, says = BAD[method][number]
    pair = Pair(f"{method}-sw")
    with pytest.raises(CompressorError, match=says):
        pair.decode(payload, PAGE)
    assert pair.decode(GOLDEN[method], 3 * PAGE)[:PAGE] == bytes(PAGE), "the next packet"
    pair.close()


def test_the_page_that_is_wrong_is_named() -> None:
    pair = Pair("qpl-sw")
    good = page(bytes(PAGE), "qpl")
    with pytest.raises(CompressorError, match="page 2: ends inside its deflate data"):
        pair.decode(streams.page_list([good, NOISE, good[:-1], good]), 4 * PAGE)
    with pytest.raises(CompressorError, match="page 1: a length of 0 bytes"):
        pair.decode(streams.page_list([good, b"", good, good]), 4 * PAGE)
    pair.close()


@pytest.mark.parametrize("method", METHODS)
def test_any_zlib_stream_is_read(method: str) -> None:
    """Whatever block types, window and level its sender has."""
    pair = Pair(f"{method}-sw")
    sign = -1 if method == "qpl" else 1
    text = streams.pattern(9, PAGE)
    made = []
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE):
        for window in (9, 12, 15):
            stream = zlib.compressobj(6, zlib.DEFLATED, sign * window, 8, strategy)
            made.append(stream.compress(text) + stream.flush())
    stored = zlib.compressobj(0, zlib.DEFLATED, sign * 15)
    two_blocks = zlib.compressobj(6, zlib.DEFLATED, sign * 15)
    made.append(two_blocks.compress(text[:100]) + two_blocks.flush(zlib.Z_FULL_FLUSH) + two_blocks.compress(text[100:]))
    made[-1] += two_blocks.flush()
    assert len(stored.compress(text) + stored.flush()) > PAGE, "a page of stored blocks cannot be sent"
    assert pair.decode(streams.page_list(made), len(made) * PAGE) == text * len(made)
    pair.close()


def test_random_damage_is_refused_or_harmless() -> None:
    """uadk has a checksum in each page that is compressed; qpl has none, and raw pages have none."""
    pair = Pair("uadk-sw")
    mix = random.Random(4)
    data = b"".join(streams.pattern(number, PAGE) for number in range(20))
    payload = pair.encode([data])
    messages = set()
    for _ in range(3000):
        bad = qatdriver.damage(mix, payload)
        try:
            assert pair.decode(bad, len(data)) == data, "wrong data taken"
        except CompressorError as error:
            messages.add(str(error).split(":")[-1])
    assert len(messages) > 8
    assert all("\n" not in message for message in messages)
    assert pair.decode(payload, len(data)) == data
    pair.close()


# --- uadk, towards a QEMU without its device ---


def test_raw_sends_every_page_as_it_is() -> None:
    pair = Pair("uadk-sw", {"raw": "on"})
    pages = [bytes(PAGE), streams.pattern(1, PAGE), NOISE]
    payload = pair.encode([pages[0] + pages[1], pages[2]])
    assert payload == bytes.fromhex("00001000 00001000 00001000") + b"".join(pages)
    assert pair.decode(payload, 3 * PAGE) == b"".join(pages)
    pair.close()
    with pytest.raises(UsageError, match="qpl-sw has no option 'raw'"):
        Pair("qpl-sw", {"raw": "on"})


class WithoutDevice:
    """A destination as QEMU 10.0's uadk is without its device, by the specification.

    It reads raw pages only, and leaves a zero page as it is, thinking that it never came.
    """

    def __init__(self, size: int) -> None:
        self.memory = bytearray(b"\xaa" * size)
        self.zero_entries = 0

    def take(self, data: bytes, page_size: int) -> None:
        at = 64
        while at < len(data):
            flags, _, normal, size, _, zero = struct.unpack_from(">IIIIQI", data, at + 8)
            offsets = struct.unpack_from(f">{normal + zero}Q", data, at + 320)
            at += streams.header_length(page_size)
            if normal:
                assert flags >> 1 & 31 == streams.METHODS["uadk"]
                pages = streams.read_page_list(data[at : at + size], normal)
                at += size
                for offset, page in zip(offsets, pages, strict=False):
                    assert len(page) == page_size, "hardware not available"
                    self.memory[offset : offset + page_size] = page
            for offset in offsets[normal:]:
                self.zero_entries += 1
                if self.memory[offset : offset + page_size] == b"\xaa" * page_size:
                    self.memory[offset : offset + page_size] = bytes(page_size)  # it was fresh


def two_rounds() -> streams.Stream:
    """Pages 0 to 3; in the second round page 0 has become zero, page 1 too but is sent as a page."""
    size = 65536
    text = [streams.pattern(number, size) for number in range(4)]
    blocks = [("pc.ram", 4 * size)]
    main = b"".join(
        (
            streams.FILE_HEADER,
            streams.configuration(page_bits=16),
            streams.RETURN_PATH,
            streams.ram_start(blocks),
            streams.section(2),
            streams.section(3),
            streams.DEVICE_STATE,
            streams.description(),
        )
    )
    first = streams.packet([0, size, 2 * size], [3 * size], payload=b"".join(text[:3]), page_size=size)
    second = streams.packet([size, 2 * size], [0], payload=bytes(size) + text[3], page_size=size)
    third = streams.packet([], [size], page_size=size)
    sync = streams.sync(size)
    channel = streams.init(0) + sync + first + sync + second + third + sync
    return streams.Stream(main, streams.numbered([channel]), {"pc.ram": bytes(size) * 2 + text[3] + bytes(size)})


@pytest.mark.parametrize("find", [False, True])
def test_zero_pages_of_later_rounds_go_as_pages_to_uadk(find: bool) -> None:
    stream = two_rounds()
    packets = 64 + 6 * streams.header_length(65536) + 7 * (4 + 65536)
    there = peers.Keeping(1, everything=len(stream.main) + packets)
    with closing(Relaying(there.uri, to="uadk-sw,raw=on", find_zero_pages=find)) as relaying:
        peers.play(relaying.uri, [stream.main, *stream.channels], 65536)
        result = relaying.result()
    there.join()
    destination = WithoutDevice(4 * 65536)
    destination.take(there.channels[0], 65536)
    assert destination.memory == stream.ram["pc.ram"]
    assert destination.zero_entries == 1, "the first round's"
    assert (result.normal_pages, result.zero_pages) == (7, 1)


def test_towards_others_they_stay_zero_pages(work: Path) -> None:
    stream = two_rounds()
    there = peers.Receiving(work / "snap", channels=1)
    with closing(Relaying(there.uri, to="qpl-sw", find_zero_pages=True)) as relaying:
        peers.play(relaying.uri, [stream.main, *stream.channels], 65536)
        result = relaying.result()
    there.join()
    assert (work / "snap/0-pc.ram.raw").read_bytes() == stream.ram["pc.ram"]
    assert (result.normal_pages, result.zero_pages) == (4, 4)


@pytest.mark.parametrize("zero_pages", ["multifd", "none"])
def test_send_to_uadk_without_its_device(work: Path, zero_pages: str) -> None:
    """Each page is sent once, so that its zero pages are fresh ones."""
    content = images.memory()[: 4 << 20]
    (work / "image.raw").write_bytes(content)
    there = peers.Keeping(1)
    multifd.send(open_snapshot(work / "image.raw"), there.uri, "uadk-sw,raw=on", channels=1, zero_pages=zero_pages)
    there.join()
    destination = WithoutDevice(len(content))
    destination.take(there.channels[0], PAGE)
    assert destination.memory == content
    assert (destination.zero_entries > 50) == (zero_pages == "multifd")
