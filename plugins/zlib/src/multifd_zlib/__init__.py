"""The compressor "zlib": one deflate stream per channel, flushed at the end of each packet.

QEMU feeds zlib page by page; the wire only asks for one stream, so this takes a whole packet
per call.  Levels mean what they mean in zlib: 0 stores, 1 is fast, 9 is small.  For the lowest
two ISA-L makes streams within 2 % of zlib's size, 5 and 2 times as fast (measured on the
bench's image); its levels stop at 3, so the higher ones are zlib's.  Stored blocks need neither: they are
the pages themselves, with five bytes before 64 KiB of them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from multifd.errors import CompressorError
from multifd.formats.deflate import ERRORS, PROVIDER, STEP, VERSION, decompressobj, isal_zlib
from multifd.formats.stored import copy_stored, lengths, stored
from multifd.hookspecs import MAX_PAYLOAD, METHODS, Buffer, Channel, Facts, Probe, hookimpl

__version__ = "0.2.0"

#: zlib's level -> ISA-L's level that makes streams of its size.
ISAL_LEVELS = {1: 2, 2: 3} if isal_zlib else {}
#: How much ISA-L gathers before it ends a block.  Small blocks fit memory better, whose pages differ: 1.1 % fewer
#: bytes than with its default of 8, decoded 4 % faster, made 5 % slower; with 1 it takes twice the time.
ISAL_MEMORY = 2
#: Stores; ISA-L; ISA-L at a third of the speed; zlib at a tenth.
LADDER = (0, 1, 2, 6)
#: The two bytes before the first block.
HEADER = b"\x78\x01"
STORED = struct.Struct("<BHH")
MOST_STORED = 0xFFFF
#: How far back a stream looks.
WINDOW = 1 << zlib.MAX_WBITS
#: A sync flush ends every payload of QEMU.
FLUSH_MARKER = b"\x00\x00\xff\xff"
#: What a flush adds after a page's last symbol is shorter than this: the end of the block (15
#: bits at most), an empty block, the marker.
FLUSH_ROOM = 16


class _Deflate(Protocol):
    def compress(self, data: Buffer, /) -> bytes: ...

    def flush(self, mode: int, /) -> bytes: ...


@dataclass(slots=True)
class _Encoder:
    level: int
    #: None where it stores.
    stream: _Deflate | None
    window: int = zlib.MAX_WBITS


class _Inflate(Protocol):
    eof: bool
    unconsumed_tail: bytes

    def decompress(self, data: Buffer, /, max_length: int) -> bytes: ...


@dataclass(slots=True)
class _Decoder:
    stream: _Inflate
    #: Whether the stream's header was read.
    begun: bool = False
    #: The last pages, where the stream has not seen them.
    unseen: bytes = b""
    payload: memoryview = field(default_factory=lambda: memoryview(bytearray(MAX_PAYLOAD)))


@hookimpl
def multifd_compressor() -> Facts:
    return Facts("zlib", "zlib", METHODS["zlib"], "deflate, levels 0-9", range(10), 1, ladder=LADDER)


@hookimpl
def multifd_probe() -> Probe:
    return Probe(True, PROVIDER, VERSION)


@hookimpl
def multifd_send_setup(channel: Channel) -> None:
    level = 1 if channel.level is None else channel.level
    channel.compress_data = _Encoder(level, _deflater(level, zlib.MAX_WBITS))


def _deflater(level: int, window: int) -> _Deflate | None:
    if level == 0:
        return None
    fast = ISAL_LEVELS.get(level)
    stream: _Deflate
    if fast is None:
        stream = zlib.compressobj(level, zlib.DEFLATED, window)
    else:
        stream = isal_zlib.compressobj(fast, wbits=window, memLevel=ISAL_MEMORY)
    return stream


@hookimpl
def multifd_send_prepare(channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
    encoder: _Encoder = channel.compress_data
    if channel.live and channel.level is not None and channel.level != encoder.level:
        encoder.level, encoder.stream = channel.level, _deflater(channel.level, encoder.window)
    stream, first = encoder.stream, encoder.window == zlib.MAX_WBITS
    # After a flush a stream may go on with what another deflater makes, without a header and a look back.
    encoder.window = -zlib.MAX_WBITS
    if stream is None:
        payload = stored(pages, MOST_STORED, _stored_headers(sum(map(len, pages))))
        return [HEADER, *payload] if first else payload
    # One call per packet: each gives up the interpreter and has to win it back.
    data = pages[0] if len(pages) == 1 else b"".join(pages)
    return [stream.compress(data), stream.flush(zlib.Z_SYNC_FLUSH)]


@lru_cache
def _stored_headers(size: int) -> Sequence[bytes]:
    """What is before each stored block, and the empty one after the last, which is what a flush makes."""
    return tuple(STORED.pack(0, one, one ^ 0xFFFF) for one in (*lengths(size, MOST_STORED), 0))


@hookimpl
def multifd_send_cleanup(channel: Channel) -> None:
    channel.compress_data = None


@hookimpl
def multifd_recv_setup(channel: Channel) -> None:
    channel.compress_data = _Decoder(decompressobj())


@hookimpl
def multifd_recv(channel: Channel, pages: memoryview) -> None:
    decoder: _Decoder = channel.compress_data
    size = channel.next_packet_size
    payload = decoder.payload[:size]
    channel.read_into(payload)
    skippable = decoder.begun and (decoder.unseen or len(pages) >= WINDOW)
    if skippable and copy_stored(payload, pages, MOST_STORED, _stored_headers(len(pages))):
        decoder.unseen = (decoder.unseen + bytes(pages[-WINDOW:]))[-WINDOW:]
        return
    if decoder.unseen:
        decoder.stream, decoder.unseen = decompressobj(-zlib.MAX_WBITS, zdict=decoder.unseen), b""
    # The last bytes apart: the pages must need all of the payload but its flush.
    split = max(0, size - FLUSH_ROOM)
    stream = decoder.stream
    try:
        done = _inflate(stream, payload[:split], pages) if split else 0
        more = done == len(pages)
        if not more:
            done += _inflate(stream, payload[split:], pages[done:])
            more = done == len(pages) and stream.decompress(stream.unconsumed_tail, 1) != b""
    except ERRORS as error:
        raise CompressorError(f"the payload is not zlib's: {error}") from error
    if more:
        raise CompressorError(f"the payload of {size} bytes holds more than its {len(pages)} bytes of pages")
    if done < len(pages):
        raise CompressorError(f"the payload of {size} bytes decodes to {done} bytes instead of {len(pages)}")
    end = bytes(payload[split:])
    marker = end.rfind(FLUSH_MARKER)
    if stream.eof or 0 <= marker != len(end) - len(FLUSH_MARKER):
        raise CompressorError(f"the payload of {size} bytes does not end with its flush: bytes are left over")
    decoder.begun = True


def _inflate(stream: _Inflate, data: Buffer, pages: memoryview) -> int:
    """Decode `data` into `pages` as far as either goes, in small steps; says how many bytes."""
    done = 0
    while done < len(pages):
        room = min(STEP, len(pages) - done)
        output = stream.decompress(data, room)
        pages[done : done + len(output)] = output
        done += len(output)
        data = stream.unconsumed_tail
        if len(output) < room:
            break
    return done


@hookimpl
def multifd_recv_cleanup(channel: Channel) -> None:
    channel.compress_data = None
