"""The compressor "zstd": frames of many packets, a block flushed at the end of each packet.

QEMU feeds the library page by page into one frame per channel; this takes a whole packet per
call, and at some levels begins a new frame when the window is full: until then the library has
all of it in one piece, and looks for matches without minding where its buffer wraps (a tenth less time).
Level 0 is the library's default; negative levels are faster than 1.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from multifd.errors import CompressorError
from multifd.formats.stored import copy_stored, lengths, stored
from multifd.hookspecs import MAX_PAYLOAD, METHODS, PACKET_SIZE, Buffer, Channel, Facts, Probe, hookimpl

zstandard: Any
try:
    import zstandard
except ImportError as error:
    zstandard = None
    _WHY_NOT = str(error)

__version__ = "0.2.0"

#: The largest window a decoder of QEMU takes, and what level 20 may ask for.
MAX_WINDOW = 1 << 27
FRAME_MAGIC = 0xFD2FB528
#: What decodes to nothing: inside a frame, and between two.
EMPTY_BLOCK = bytes(3)
EMPTY_FRAME = struct.pack("<II", 0x184D2A50, 0)

#: Level -> settings that make fewer bytes of real memory than its own, or as many in less time; each with frames of a
#: window's length.  docs/streams.md has the numbers of four images.  Level 0 is 3.
TUNED = {
    -1: {"window_log": 22, "hash_log": 14, "min_match": 5},
    1: {"window_log": 22, "hash_log": 15, "min_match": 6},
    2: {"window_log": 22, "hash_log": 17, "min_match": 6},
    3: {"window_log": 22, "hash_log": 17, "chain_log": 16, "min_match": 5},
}
TUNED[0] = TUNED[3]

#: The first stores: the library would find nothing in most memory at this level.
LADDER = (-131072, -20, -1, 1, 3, 6, 9)
#: A frame of the shortest window whose blocks may have 128 KiB, of unknown length and without a checksum.
RAW_FRAME = struct.pack("<IBB", FRAME_MAGIC, 0, (17 - 10) << 3)
MOST_RAW = 1 << 17


@dataclass(slots=True)
class _Encoder:
    level: int
    live: bool
    made_for: int | None = None
    compressor: Any = None
    frame: Any = None
    frame_length: int = 0
    room: int = 0

    def _set_up(self, level: int) -> None:
        tuned = TUNED.get(level, {})
        parameters = zstandard.ZstdCompressionParameters.from_level(
            level, write_content_size=False, write_checksum=False, **tuned
        )
        self.made_for = level
        self.compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self.frame_length = 1 << parameters.window_log if tuned or self.live else sys.maxsize

    def compress(self, pages: Sequence[memoryview], level: int) -> list[Buffer]:
        if self.frame is None and self.live and level == LADDER[0]:
            self.level = level
            return stored(pages, MOST_RAW, _raw_headers(sum(map(len, pages))))
        # One call per packet: each gives up the interpreter and has to win it back.
        data = pages[0] if len(pages) == 1 else b"".join(pages)
        if self.frame is None:
            if self.compressor is None or level != self.made_for:
                self._set_up(level)
            self.level = level
            self.frame = self.compressor.compressobj()
            self.room = self.frame_length
        frame = self.frame
        self.room -= len(data)
        if self.room >= PACKET_SIZE:
            return [frame.compress(data), frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
        # Ended with its last packet: QEMU takes an end at the head of the next one for missing pages.
        self.frame = None
        return [frame.compress(data), frame.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH)]


@hookimpl
def multifd_compressor() -> Facts:
    return Facts(
        "zstd", "zstd", METHODS["zstd"], "Zstandard, levels 1-20 and negative", range(-131072, 21), 1, ladder=LADDER
    )


@hookimpl
def multifd_probe() -> Probe:
    if zstandard is None:
        return Probe(False, reason=_WHY_NOT, install="pip install zstandard")
    version = ".".join(map(str, zstandard.ZSTD_VERSION))
    return Probe(True, "libzstd (zstandard)", f"{version} ({zstandard.__version__})")


@hookimpl
def multifd_send_setup(channel: Channel) -> None:
    channel.compress_data = _Encoder(1 if channel.level is None else channel.level, channel.live)


@hookimpl
def multifd_send_prepare(channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
    encoder: _Encoder = channel.compress_data
    if not channel.live or channel.level is None:
        return encoder.compress(pages, encoder.level)
    payload = encoder.compress(pages, channel.level)
    channel.level = encoder.level  # another one waits for the next frame
    return payload


@lru_cache
def _raw_headers(size: int) -> Sequence[bytes]:
    """What is before each block of a frame of raw blocks, the last of which is marked so, and after it."""
    sizes = lengths(size, MOST_RAW)
    first, *others = ((one << 3 | (end == len(sizes))).to_bytes(3, "little") for end, one in enumerate(sizes, 1))
    return (RAW_FRAME + first, *others, b"")


@hookimpl
def multifd_send_cleanup(channel: Channel) -> None:
    channel.compress_data = None


class _PayloadUsedUp(Exception):
    """The reader asks for more than the packet has."""


@dataclass(slots=True)
class _Payload:
    """One packet's payload and a block of nothing, as a file for the stream reader.

    Raises at its end: an empty read would mean the end of the stream, for good.
    """

    parts: list[Buffer] = field(default_factory=list)

    def read(self, _: int = -1) -> Buffer:
        if not self.parts:
            raise _PayloadUsedUp
        return self.parts.pop(0)


@dataclass(slots=True)
class _Blocks:
    """Walks frames and blocks by their headers, to see that each payload ends with a block.

    The library keeps what follows the last whole block for the next call, and would mix it with
    the next packet.
    """

    in_frame: bool = False
    checksum: bool = False

    def walk(self, payload: memoryview) -> None:
        """Raises CompressorError where a payload is not whole blocks."""
        position = 0
        try:
            while position < len(payload):
                position = self._block(payload, position) if self.in_frame else self._frame(payload, position)
        except (struct.error, IndexError):
            position = len(payload) + 1
        if position != len(payload):
            raise CompressorError(f"the payload of {len(payload)} bytes does not end with a block: bytes are left over")

    def _frame(self, payload: memoryview, position: int) -> int:
        magic, descriptor = struct.unpack_from("<IB", payload, position)
        if magic != FRAME_MAGIC:
            raise CompressorError(f"the payload is not zstd's: magic {magic:#010x} instead of {FRAME_MAGIC:#010x}")
        single = descriptor >> 5 & 1
        self.in_frame, self.checksum = True, bool(descriptor & 4)
        content_size = (single, 2, 4, 8)[descriptor >> 6]
        return position + 5 + (not single) + (0, 1, 2, 4)[descriptor & 3] + content_size

    def _block(self, payload: memoryview, position: int) -> int:
        header = payload[position] | payload[position + 1] << 8 | payload[position + 2] << 16
        run_length = header >> 1 & 3 == 1
        position += 3 + (1 if run_length else header >> 3)
        if header & 1:
            self.in_frame = False
            position += 4 * self.checksum
        return position


@dataclass(slots=True)
class _Decoder:
    source: _Payload
    reader: Any
    blocks: _Blocks = field(default_factory=_Blocks)
    payload: memoryview = field(default_factory=lambda: memoryview(bytearray(MAX_PAYLOAD)))


@hookimpl
def multifd_recv_setup(channel: Channel) -> None:
    source = _Payload()
    # Decodes straight into the pages and stops when they are full, so that a bomb costs nothing.
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    channel.compress_data = _Decoder(source, decompressor.stream_reader(source, read_across_frames=True))


@hookimpl
def multifd_recv(channel: Channel, pages: memoryview) -> None:
    decoder: _Decoder = channel.compress_data
    payload = decoder.payload[: channel.next_packet_size]
    channel.read_into(payload)
    if not decoder.blocks.in_frame and copy_stored(payload, pages, MOST_RAW, _raw_headers(len(pages))):
        return
    decoder.blocks.walk(payload)
    # The library gives out what it holds back only when it gets more input.
    decoder.source.parts = [payload, EMPTY_BLOCK if decoder.blocks.in_frame else EMPTY_FRAME]
    try:
        decoder.reader.readinto(pages)
    except _PayloadUsedUp:
        raise CompressorError(
            f"the payload of {len(payload)} bytes decodes to less than its {len(pages)} bytes of pages"
        ) from None
    except zstandard.ZstdError as error:
        raise CompressorError(f"the payload is not zstd's: {error}") from error
    try:
        more = decoder.reader.read(1)
    except _PayloadUsedUp:
        return
    except zstandard.ZstdError as error:
        raise CompressorError(f"the payload is damaged after its pages: {error}") from error
    raise CompressorError(
        f"the payload of {len(payload)} bytes holds more than its {len(pages)} bytes of pages"
        + ("" if more else ": the stream ended")
    )


@hookimpl
def multifd_recv_cleanup(channel: Channel) -> None:
    channel.compress_data = None
