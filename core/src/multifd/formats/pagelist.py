"""The payload that QEMU's methods qpl and uadk share: every page compressed by itself, its length in front.

    length of each normal page, u32 big-endian, in packet order
    the pages' data, back to back: raw where its length is a page, else one complete stream

In core because two plugins need it, neither of which may need the other, and so may a third one
for another device.  What differs is the stream: raw deflate (qpl), or the zlib format with the
header 78 9c (uadk); both keep to a window of 4 KiB, all that the devices have.

Nothing but Python is needed; ISA-L, which the plugins ask for where it exists, makes levels 1 and 2.
By itself a page of 4 KiB takes 13 us at level 1, 35 us at level 2, 100 to 200 us with zlib, and is
2.13, 2.46, 2.53 (level 3) to 2.61 (level 9) times smaller: programs, texts and process memory, on
one core of an AMD EPYC.  ISA-L's own levels 2 and 3 make nothing smaller of so little.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

from multifd.errors import CompressorError
from multifd.formats.deflate import ERRORS, PROVIDER, VERSION, inflate, isal_zlib
from multifd.hookspecs import Channel, Facts, Probe, hookimpl
from multifd.wire.flags import PACKET_SIZE
from multifd.wire.packet import Buffer

LEVELS = range(1, 10)
DEFAULT_LEVEL = 1
#: Every page raw; ISA-L at two levels; zlib at a tenth of the speed.
LADDER = (0, 1, 2, 6)
#: Level -> ISA-L's own; 0 has codes that are made beforehand, as the devices' are.
ISAL_LEVELS = {1: 0, 2: 1} if isal_zlib else {}
#: What the zlib format has to begin with: the driver of the Kunpeng's device writes it, and skips it unread.
ZLIB_HEADER = b"\x78\x9c"
#: Base 2 logarithm of the window: of the devices, and the largest that a decoder may meet.
WINDOW, ANY_WINDOW = 12, 15
LENGTH_SIZE = 4
#: The option of a sender that compresses nothing, where its compressor has it.
RAW = "raw"


class Job(NamedTuple):
    """One page to decompress: its number in the packet, its data, and where it goes."""

    number: int
    data: memoryview
    page: memoryview


class Codec(Protocol):
    """Makes and reads the pages of one channel in one direction."""

    def compress(self, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        """Each page's data; what is not shorter than its page goes raw."""

    def decompress(self, jobs: Sequence[Job]) -> None:
        """Fill every job's page; there is none in a packet of raw pages."""

    def close(self) -> None:
        """Release everything.  Safe twice."""


@lru_cache(maxsize=512)
def _lengths(count: int) -> struct.Struct:
    return struct.Struct(f">{count}I")


def encode(channel: Channel, runs: Sequence[memoryview], codec: Codec | None) -> list[Buffer]:
    """A payload of one packet's pages; with no codec every page goes raw."""
    size = channel.page_size
    if codec is None:
        return [_lengths(1).pack(size) * (sum(map(len, runs)) // size), *runs]
    pages = [run[at : at + size] for run in runs for at in range(0, len(run), size)]
    data = [made if len(made) < size else page for made, page in zip(codec.compress(pages), pages, strict=True)]
    return [_lengths(len(data)).pack(*map(len, data)), *data]


def decode(channel: Channel, pages: memoryview, codec: Codec, buffer: memoryview) -> None:
    """Read a payload and fill `pages`; `buffer` takes the data of as many pages.

    Raises CompressorError, saying what came and what should have, for a length of 0 or of more
    than a page, for lengths that do not add up, and for a page that does not decode to just its size.
    """
    size, claimed = channel.page_size, channel.next_packet_size
    count = len(pages) // size
    head = LENGTH_SIZE * count
    if not head < claimed <= head + len(pages):
        raise CompressorError(f"a payload of {claimed} bytes; {count} pages take {head + 1} to {head + len(pages)}")
    table = bytearray(head)
    channel.read_into(table)
    lengths = _lengths(count).unpack(table)
    if not 0 < min(lengths) <= max(lengths) <= size:
        number, length = next((number, length) for number, length in enumerate(lengths) if not 0 < length <= size)
        raise CompressorError(f"page {number}: a length of {length} bytes; 1 to {size} are allowed")
    total = sum(lengths)
    if head + total != claimed:
        raise CompressorError(
            f"the lengths of {count} pages add up to {head} + {total} bytes, the payload has {claimed}"
        )
    jobs: list[Job] = []
    if total == len(pages):  # all of them raw, as QEMU's uadk sends them where it has no device
        channel.read_into(pages)
        codec.decompress(jobs)
        return
    data = buffer[:total]
    channel.read_into(data)
    at = 0
    for number, length in enumerate(lengths):
        page = pages[number * size : (number + 1) * size]
        if length == size:
            page[:] = data[at : at + length]
        else:
            jobs.append(Job(number, data[at : at + length], page))
        at += length
    codec.decompress(jobs)


def receive_buffer() -> memoryview:
    """What `decode` reads into."""
    return memoryview(bytearray(PACKET_SIZE))


@dataclass(frozen=True, slots=True)
class Software:
    """Pages in software: raw deflate or, `wrapped`, the zlib format."""

    wrapped: bool
    level: int | None = None

    def compress(self, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        """Each page's data."""
        level = DEFAULT_LEVEL if self.level is None else self.level
        window = WINDOW if self.wrapped else -WINDOW
        data: list[bytes]
        if (own := ISAL_LEVELS.get(level)) is not None:
            data = [isal_zlib.compress(page, own, window) for page in pages]
        else:
            data = [_deflate(page, level, window) for page in pages]
        return [ZLIB_HEADER + made[len(ZLIB_HEADER) :] for made in data] if self.wrapped else data

    def decompress(self, jobs: Sequence[Job]) -> None:
        """Raises CompressorError, with the page's number, for data that is not one whole stream of just a page."""
        window = ANY_WINDOW if self.wrapped else -ANY_WINDOW
        for number, data, page in jobs:
            try:
                inflate(data, page, window)
            except ERRORS as error:
                raise CompressorError(f"page {number}: damaged deflate data: {error}") from error
            except CompressorError as error:
                raise error.at(f"page {number}") from error

    def close(self) -> None:
        """Nothing is held."""


def _deflate(page: memoryview, level: int, window: int) -> bytes:
    stream = zlib.compressobj(level, zlib.DEFLATED, window)
    return stream.compress(page) + stream.flush()


class SoftwareCompressor:
    """The hooks of a compressor without a device."""

    def __init__(self, facts: Facts, *, wrapped: bool) -> None:
        self._facts = facts
        self._wrapped = wrapped

    @hookimpl
    def multifd_compressor(self) -> Facts:
        return self._facts

    @hookimpl
    def multifd_probe(self) -> Probe:
        return Probe(True, PROVIDER, VERSION)

    @hookimpl
    def multifd_send_prepare(self, channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        raw = channel.options.get(RAW, False) or channel.level == LADDER[0]
        return encode(channel, pages, None if raw else Software(self._wrapped, channel.level))

    @hookimpl
    def multifd_recv_setup(self, channel: Channel) -> None:
        channel.compress_data = receive_buffer()

    @hookimpl
    def multifd_recv(self, channel: Channel, pages: memoryview) -> None:
        decode(channel, pages, Software(self._wrapped), channel.compress_data)

    @hookimpl
    def multifd_recv_cleanup(self, channel: Channel) -> None:
        channel.compress_data = None
