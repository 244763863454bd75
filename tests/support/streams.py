"""Migration streams made and read by hand, from the specification alone, with struct.

Nothing here comes from multifd, so that it can judge multifd.
"""

from __future__ import annotations

import gzip
import importlib
import json
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METHODS = {"none": 0, "zlib": 1, "zstd": 2, "qpl": 4, "uadk": 8, "qatzip": 16}
UUID = bytes(range(16))
MAGIC = 0x11223344
DEVICE_STATE = b"\x04\x00\x00\x00\x09\x05timer\x00\x00\x00\x00\x00\x00\x00\x02some\x00state\x7e\x00\x00\x00\x09"
PACKET = 512 * 1024


def header_length(page_size: int) -> int:
    return 320 + 8 * (PACKET // page_size)


def init(number: int, uuid: bytes = UUID, magic: int = MAGIC, version: int = 1) -> bytes:
    return struct.pack(">II16sB7x32x", magic, version, uuid, number)


def packet(
    normal: Sequence[int] = (),
    zero: Sequence[int] = (),
    *,
    block: str = "pc.ram",
    payload: bytes = b"",
    method: str = "none",
    page_size: int = 4096,
    size: int | None = None,
    flags: int | None = None,
    alloc: int | None = None,
    counts: tuple[int, int] | None = None,
    number: int = 0,
    magic: int = MAGIC,
    version: int = 1,
) -> bytes:
    """A RAM packet with its payload; every field can be told to lie."""
    room = PACKET // page_size
    offsets = [*normal, *zero]
    normal_count, zero_count = counts or (len(normal), len(zero))
    head = struct.pack(
        ">IIIIIIQI28x256s",
        magic,
        version,
        METHODS[method] << 1 if flags is None else flags,
        room if alloc is None else alloc,
        normal_count,
        len(payload) if size is None else size,
        number,
        zero_count,
        block.encode(),
    )
    return head + struct.pack(f">{room}Q", *offsets, *[0] * (room - len(offsets))) + payload


def sync(page_size: int = 4096, number: int = 0) -> bytes:
    return packet(block="", flags=1, alloc=0, page_size=page_size, number=number)


def configuration(machine: str = "pc-q35-10.0", page_bits: int | None = None, uuid: bytes | None = None) -> bytes:
    parts = [b"\x07", struct.pack(">I", len(machine)), machine.encode()]
    if page_bits is not None:
        parts += [b"\x05\x1econfiguration/target-page-bits", struct.pack(">II", 1, page_bits)]
    if uuid is not None:
        parts += [b"\x05\x12configuration/uuid", struct.pack(">I", 1), uuid]
    return b"".join(parts)


FILE_HEADER = struct.pack(">II", 0x5145564D, 3)
RETURN_PATH = b"\x08\x00\x01\x00\x00" + b"\x08\x00\x02\x00\x04\x00\x00\x00\x01"
SWITCHOVER_START = b"\x08\x00\x0b\x00\x00"
#: What a destination answers that has everything.
SHUT_DONE = struct.pack(">HHI", 1, 4, 0)
FLUSH = struct.pack(">Q", 0x200)
EOS = struct.pack(">Q", 0x10)
FOOTER = b"\x7e" + struct.pack(">I", 1)


def ram_start(blocks: Sequence[tuple[str, int]], *, flush: bool = True, total: int | None = None) -> bytes:
    parts = [b"\x01" + struct.pack(">I", 1) + b"\x03ram" + struct.pack(">II", 0, 4)]
    parts.append(struct.pack(">Q", (sum(length for _, length in blocks) if total is None else total) | 4))
    for name, length in blocks:
        parts.append(bytes([len(name)]) + name.encode() + struct.pack(">Q", length))
    return b"".join(parts) + (FLUSH if flush else b"") + EOS + FOOTER


def zero_word(offset: int, block: str | None = None) -> bytes:
    if block is None:
        return struct.pack(">QB", offset | 0x22, 0)
    return struct.pack(">QB", offset | 2, len(block)) + block.encode() + b"\0"


def page_word(offset: int, data: bytes, block: str) -> bytes:
    return struct.pack(">QB", offset | 8, len(block)) + block.encode() + data


def section(kind: int, words: bytes = b"", *, flush: bool = True) -> bytes:
    return bytes([kind]) + struct.pack(">I", 1) + words + (FLUSH if flush else b"") + EOS + FOOTER


def description() -> bytes:
    text = json.dumps({"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0}]}).encode()
    return b"\x00\x06" + struct.pack(">I", len(text)) + text


@dataclass
class Stream:
    """A whole migration: the bytes of main and of each multifd channel, and the RAM they carry."""

    main: bytes
    channels: list[bytes]
    ram: dict[str, bytes] = field(default_factory=dict)

    def write(self, directory: Path) -> Path:
        """As a recording."""
        directory.mkdir(exist_ok=True)
        (directory / "main.bin").write_bytes(self.main)
        for number, data in enumerate(self.channels):
            (directory / f"ch{number}.bin").write_bytes(data)
        return directory


def pattern(page: int, page_size: int) -> bytes:
    """A page unlike any other, that compresses."""
    return (f"page {page:6} ".encode() * (page_size // 12 + 1))[:page_size]


def small(method: str = "none", *, page_size: int = 65536, return_path: bool = False, channels: int = 1) -> Stream:
    """A complete migration of four pages, one of them zero, in as few bytes as the wire allows."""
    pages = [pattern(0, page_size), bytes(page_size), pattern(2, page_size), pattern(3, page_size)]
    data = b"".join(page for page in pages if any(page))
    main = b"".join(
        (
            FILE_HEADER,
            configuration(page_bits=page_size.bit_length() - 1),
            RETURN_PATH if return_path else b"",
            ram_start([("pc.ram", 4 * page_size)]),
            section(2, flush=False),
            SWITCHOVER_START,
            section(3),
            DEVICE_STATE,
            description(),
        )
    )
    offsets = [0, 2 * page_size, 3 * page_size]
    body = packet(
        offsets,
        [page_size],
        payload=encode(method, data, page_size),
        method=method,
        page_size=page_size,
        number=channels,
    )
    first = [sync(page_size, number) for number in range(channels)]
    last = [sync(page_size, channels + 1 + number) for number in range(channels)]
    streams = [init(0) + first[0] + body + last[0]] + [
        init(number) + first[number] + last[number] for number in range(1, channels)
    ]
    return Stream(main, streams, {"pc.ram": b"".join(pages)})


def merged(stream: Stream) -> tuple[Stream, bytes]:
    """`small` of one channel, its last SYNC in its packet of pages, as QEMU 7.2 does; and what 7.2 sends after it."""
    size = 65536
    data = bytearray(stream.channels[0][: -header_length(size)])
    room = struct.pack(">I", PACKET // size)
    data[64 + 12 : 64 + 16] = room
    page = 64 + header_length(size)
    data[page + 11] |= 1
    struct.pack_into(">Q", data, page + 24, 2)
    empty = packet(block="", page_size=size, flags=0, size=77, number=2)
    return Stream(stream.main, [bytes(data)], stream.ram), empty


def numbered(channels: Sequence[bytes]) -> list[bytes]:
    """The channels with their packets numbered as QEMU 10.0 does, round by round, whatever else is wrong with them."""
    found = [bytearray(data) for data in channels]
    start = struct.pack(">II", MAGIC, 1)
    ends = [64] * len(found)
    number = 0
    while any(data.find(start, end) >= 0 for data, end in zip(found, ends, strict=True)):
        for channel, data in enumerate(found):
            synced = False
            while not synced and (at := data.find(start, ends[channel])) >= 0:
                ends[channel] = at + 8
                if len(data) < at + 32:
                    break
                synced = bool(data[at + 11] & 1)
                struct.pack_into(">Q", data, at + 24, number)
                number += 1
    return [bytes(data) for data in found]


def encode(method: str, data: bytes, page_size: int = 4096) -> bytes:
    """A first packet's payload as QEMU makes it."""
    if method == "none":
        return data
    if method == "zlib":
        stream = zlib.compressobj(1)
        return stream.compress(data) + stream.flush(zlib.Z_SYNC_FLUSH)
    if method == "qatzip":
        return qatzip_member(data, 1)
    if method in ("qpl", "uadk"):
        return page_list([encode_page(method, data[at : at + page_size]) for at in range(0, len(data), page_size)])
    zstd = other_zstd()
    compressor = zstd.ZstdCompressor(level=1)
    return bytes(compressor.compress(data, mode=zstd.ZstdCompressor.FLUSH_BLOCK))


def encode_page(method: str, page: bytes) -> bytes:
    """A page as QPL or the Kunpeng's driver make it, raw where that is no shorter."""
    if method == "qpl":
        stream = zlib.compressobj(1, zlib.DEFLATED, -12, 8, zlib.Z_FIXED)
        made = stream.compress(page) + stream.flush()
    else:
        stream = zlib.compressobj(1, zlib.DEFLATED, -12)
        made = b"\x78\x9c" + stream.compress(page) + stream.flush() + struct.pack(">I", zlib.adler32(page))
    return made if len(made) < len(page) else page


def page_list(pages: Sequence[bytes]) -> bytes:
    """The payload of methods qpl and uadk: lengths, then data."""
    return struct.pack(f">{len(pages)}I", *map(len, pages)) + b"".join(pages)


def read_page_list(payload: bytes, pages: int) -> list[bytes]:
    """The pages' data."""
    lengths = struct.unpack_from(f">{pages}I", payload)
    assert 4 * pages + sum(lengths) == len(payload)
    found, at = [], 4 * pages
    for length in lengths:
        found.append(payload[at : at + length])
        at += length
    return found


def decode_page(method: str, data: bytes, page_size: int) -> bytes:
    """As a device does it: within a window of 4 KiB, one whole stream."""
    if len(data) == page_size:
        return data
    assert 0 < len(data) < page_size
    if method.startswith("uadk"):
        assert data[:2] == b"\x78\x9c"
        assert len(zlib.decompress(data)) == page_size, "and its Adler-32"
        data = data[2:-4]
    # zlib looks further back than its window within the output of one call.  Where a page is longer, byte by byte.
    stream = zlib.decompressobj(-12)
    step = 1 if page_size > 4096 else page_size + 1
    page = bytearray()
    while not stream.eof:
        piece = stream.decompress(data, step)
        data = stream.unconsumed_tail
        assert piece or stream.eof, "output missing"
        page += piece
    assert not stream.unused_data
    assert len(page) == page_size
    return bytes(page)


def qatzip_member(data: bytes, level: int) -> bytes:
    """What libqatzip makes of a packet in software: one member, flushed after each 64 KiB."""
    stream = zlib.compressobj(level, zlib.DEFLATED, -15, 9)
    pieces = []
    for at in range(0, len(data), 65536):
        last = at + 65536 >= len(data)
        pieces += [stream.compress(data[at : at + 65536]), stream.flush(zlib.Z_FINISH if last else zlib.Z_FULL_FLUSH)]
    deflated = b"".join(pieces)
    xfl = {1: 4, 9: 2}.get(level, 0)
    head = struct.pack("<8sB7sII", b"\x1f\x8b\x08\x04", xfl, b"\xff\x0c\0QZ\x08\0", len(data), len(deflated))
    return head + deflated + struct.pack("<II", zlib.crc32(data), len(data))


def other_zstd() -> Any:
    """A zstd that is not the plugin's: Python's own, or its backport."""
    return importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


class PageDecoder:
    """Decodes payloads as QEMU's receiver does: one page of output at a time, one stream."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.stream = None
        if method == "zlib":
            self.stream = zlib.decompressobj()
        elif method == "zstd":
            self.stream = other_zstd().ZstdDecompressor(options=None)

    def decode(self, payload: bytes, pages: int, page_size: int) -> list[bytes]:
        if self.method == "none":
            assert len(payload) == pages * page_size
            return [payload[at : at + page_size] for at in range(0, len(payload), page_size)]
        if self.method.startswith("qatzip"):
            whole = gzip.decompress(payload)
            assert len(whole) == pages * page_size
            return [whole[at : at + page_size] for at in range(0, len(whole), page_size)]
        if self.method.startswith(("qpl", "uadk")):
            return [decode_page(self.method, data, page_size) for data in read_page_list(payload, pages)]
        assert self.stream is not None
        out = []
        data = payload
        for _ in range(pages):
            page = b""
            while len(page) < page_size:
                piece = self.stream.decompress(data, page_size - len(page))
                data = self.stream.unconsumed_tail if self.method == "zlib" else b""
                assert piece, "output missing"
                page += piece
            out.append(page)
        if self.method == "zstd" and (self.stream.eof or not self.stream.decompress(b"", 1)) and self.stream.eof:
            assert not self.stream.unused_data, "a frame may only end with a packet"
            self.stream = other_zstd().ZstdDecompressor(options=None)
        assert not self.stream.eof, "a stream must not end"
        return out


@dataclass
class Decoded:
    """What an independent receiver found in a source's bytes."""

    machine: str = ""
    page_size: int = 4096
    blocks: dict[str, bytearray] = field(default_factory=dict)
    came: dict[str, set[int]] = field(default_factory=dict)
    commands: list[int] = field(default_factory=list)
    markers: int = 0
    flushes: int = 0
    syncs: list[int] = field(default_factory=list)
    main_zero: int = 0
    packet_zero: int = 0
    normal: int = 0
    methods: set[int] = field(default_factory=set)
    uuids: set[bytes] = field(default_factory=set)
    device_state: bytes = b""
    normal_but_zero: int = 0


def read_source(main: bytes, channels: Sequence[bytes], method: str) -> Decoded:
    """Read all a source wrote, under the receiver's rules of the specification."""
    found = Decoded()
    body = _read_main(main, found)
    found.device_state = body
    numbers = set()
    packet_nums: set[int] = set()
    for data in channels:
        magic, version, uuid, number = struct.unpack_from(">II16sB", data)
        assert (magic, version) == (MAGIC, 1)
        assert data[25:64] == bytes(39)
        numbers.add(number)
        found.uuids.add(uuid)
        found.syncs.append(_read_channel(data, found, PageDecoder(method), packet_nums))
    assert numbers == set(range(len(channels)))
    for name, memory in found.blocks.items():
        assert len(found.came[name]) == len(memory) // found.page_size, "every page comes"
    return found


def _read_main(data: bytes, found: Decoded) -> bytes:
    assert data[:8] == FILE_HEADER
    assert data[8] == 7
    (length,) = struct.unpack_from(">I", data, 9)
    found.machine = data[13 : 13 + length].decode()
    at = 13 + length
    while data[at] == 5:
        subsection = data[at + 2 : at + 2 + data[at + 1]]
        at += 2 + len(subsection) + 4
        if subsection == b"configuration/target-page-bits":
            found.page_size = 1 << struct.unpack_from(">I", data, at)[0]
            at += 4
        else:
            assert subsection == b"configuration/uuid"
            at += 16
    block = ""
    while True:
        kind = data[at]
        if kind == 8:
            command, length = struct.unpack_from(">HH", data, at + 1)
            found.commands.append(command)
            at += 5 + length
            continue
        assert kind in (1, 2, 3)
        (ram_id,) = struct.unpack_from(">I", data, at + 1)
        at += 5
        if kind == 1:
            assert data[at : at + 4] == b"\x03ram"
            assert struct.unpack_from(">II", data, at + 4) == (0, 4)
            at += 12
        while True:
            (word,) = struct.unpack_from(">Q", data, at)
            at += 8
            flags = word % found.page_size
            address = word - flags
            if flags == 0x10:
                break
            if flags == 0x200:
                found.flushes += 1
            elif flags == 4:
                while address:
                    name = data[at + 1 : at + 1 + data[at]].decode()
                    (length,) = struct.unpack_from(">Q", data, at + 1 + len(name))
                    at += 9 + len(name)
                    address -= length
                    found.blocks[name] = bytearray(b"\xaa" * length)
                    found.came[name] = set()
            else:
                assert flags in (2, 0x22), hex(flags)
                if flags == 2:
                    block = data[at + 1 : at + 1 + data[at]].decode()
                    at += 1 + len(block)
                assert data[at] == 0
                at += 1
                _put(found, block, address, bytes(found.page_size))
                found.main_zero += 1
        found.markers += 1
        assert data[at] == 0x7E
        assert struct.unpack_from(">I", data, at + 1) == (ram_id,)
        at += 5
        if kind == 3:
            return data[at:]


def _put(found: Decoded, block: str, offset: int, page: bytes) -> None:
    assert offset % found.page_size == 0
    assert offset + len(page) <= len(found.blocks[block])
    assert offset not in found.came[block], "a page comes once in an epoch"
    found.came[block].add(offset)
    found.blocks[block][offset : offset + len(page)] = page


def _read_channel(data: bytes, found: Decoded, decoder: PageDecoder, packet_nums: set[int]) -> int:
    at, syncs = 64, 0
    size = found.page_size
    room = PACKET // size
    while at < len(data):
        magic, version, flags, alloc, normal, length, number, zero = struct.unpack_from(">IIIIIIQI", data, at)
        assert (magic, version) == (MAGIC, 1)
        assert data[at + 36 : at + 64] == bytes(28)
        assert number not in packet_nums
        packet_nums.add(number)
        name = data[at + 64 : at + 320].split(b"\0")[0].decode()
        offsets = struct.unpack_from(f">{normal + zero}Q", data, at + 320)
        at += header_length(size)
        assert normal + zero <= alloc <= room
        if flags & 1:
            assert (flags, normal, zero, length) == (1, 0, 0, 0), "SYNC is a packet of its own"
            syncs += 1
            continue
        assert syncs == 1, "data comes between the SYNC of SETUP and the last"
        assert normal + zero
        assert length <= 2 * PACKET
        found.methods.add(flags >> 1)
        if normal:
            pages = decoder.decode(data[at : at + length], normal, size)
            for offset, page in zip(offsets, pages, strict=False):
                found.normal_but_zero += not any(page)
                _put(found, name, offset, page)
        else:
            assert length == 0
        at += length
        for offset in offsets[normal:]:
            _put(found, name, offset, bytes(size))
        found.normal += normal
        found.packet_zero += zero
    return syncs
