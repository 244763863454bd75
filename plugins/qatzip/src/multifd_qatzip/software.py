"""The compressor "qatzip-sw": QEMU's qatzip format without libqatzip, on any machine.

It writes members of 64 KiB, which a receiver's device can take, and reads whatever a device,
libqatzip's software path or QEMU wrote.  ISA-L makes levels 1 to 3: at level 1 within 3 % of
the size of libqatzip's software path, and several times as fast; zlib makes the others, with
libqatzip's own memory level.  The compressor "qatzip" uses this module where the device cannot.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from multifd.errors import CompressorError
from multifd.formats.deflate import ERRORS, PROVIDER, VERSION, crc32, inflate, isal_zlib
from multifd.hookspecs import MAX_PAYLOAD, METHODS, PACKET_SIZE, Buffer, Channel, Facts, Probe, hookimpl
from multifd_qatzip.members import MEMBER_SIZE, TRAILER, Member, pack_header, parse

#: libqatzip takes 10 to 12 at set-up and then fails to compress in software (1.2.0 to 2.0.0).
LEVELS = range(1, 10)
DEFAULT_LEVEL = 1
#: Stores; ISA-L; ISA-L at a third of the speed; zlib.
LADDER = (0, 1, 3, 6)
ISAL_LEVELS = range(1, 4) if isal_zlib else range(0)
RAW = -15
MEMORY_LEVEL = 9
XFL = {1: 4, 9: 2}


def join(pages: Sequence[memoryview]) -> Buffer:
    """One packet's pages as one buffer, copied only where they are apart.

    Raises CompressorError for more than a packet.
    """
    size = sum(map(len, pages))
    if not 0 < size <= PACKET_SIZE:
        raise CompressorError(f"{size} bytes of pages to compress; a packet has 1 to {PACKET_SIZE}")
    return pages[0] if len(pages) == 1 else b"".join(pages)


def compress(data: Buffer, level: int) -> list[Buffer]:
    """A payload of `data`, as buffers."""
    return [piece for source in sources(data) for piece in compress_member(source, level)]


def sources(data: Buffer) -> list[memoryview]:
    """What goes into each member."""
    view = memoryview(data)
    return [view[at : at + MEMBER_SIZE] for at in range(0, len(view), MEMBER_SIZE)]


def compress_member(source: memoryview, level: int) -> list[Buffer]:
    """One member, as buffers."""
    deflated = _deflate(source, level)
    head = pack_header(len(source), len(deflated), XFL.get(level, 0))
    return [head, deflated, TRAILER.pack(crc32(source), len(source))]


def _deflate(source: memoryview, level: int) -> bytes:
    if level in ISAL_LEVELS:
        deflated: bytes = isal_zlib.compress(source, level, RAW)
        return deflated
    stream = zlib.compressobj(level, zlib.DEFLATED, RAW, MEMORY_LEVEL)
    return stream.compress(source) + stream.flush()


def decompress(payload: memoryview, members: Sequence[Member], pages: memoryview) -> None:
    """Fill `pages` from a payload whose framing was checked.  Raises CompressorError."""
    at = 0
    for member in members:
        decompress_member(payload, member, pages[at : at + member.size])
        at += member.size


def decompress_member(payload: memoryview, member: Member, target: memoryview) -> None:
    """Decode one member.

    Raises CompressorError unless its data ends where it should, makes what its header says and
    has the CRC-32 of its trailer.
    """
    try:
        inflate(payload[member.start : member.end], target, RAW)
    except ERRORS as error:
        raise CompressorError(f"byte {member.start} of the payload: damaged deflate data: {error}") from error
    except CompressorError as error:
        raise CompressorError(f"byte {member.start} of the payload: {error}") from error
    crc = crc32(target)
    if crc != member.crc:
        raise CompressorError(
            f"byte {member.start} of the payload: decodes to CRC-32 {crc:08x} instead of {member.crc:08x}"
        )


def read_payload(channel: Channel, buffer: memoryview, expected: int) -> tuple[memoryview, list[Member]]:
    """Read one payload into `buffer` and check its framing."""
    if channel.next_packet_size > len(buffer):
        raise CompressorError(f"a payload of {channel.next_packet_size} bytes; a packet has at most {len(buffer)}")
    payload = buffer[: channel.next_packet_size]
    channel.read_into(payload)
    return payload, parse(payload, expected)


@hookimpl
def multifd_compressor() -> Facts:
    summary = "QEMU's qatzip format in software, levels 1-9"
    return Facts("qatzip-sw", "qatzip", METHODS["qatzip"], summary, LEVELS, DEFAULT_LEVEL, ladder=LADDER)


@hookimpl
def multifd_probe() -> Probe:
    return Probe(True, PROVIDER, VERSION)


@hookimpl
def multifd_send_prepare(channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
    return compress(join(pages), DEFAULT_LEVEL if channel.level is None else channel.level)


@hookimpl
def multifd_recv_setup(channel: Channel) -> None:
    channel.compress_data = memoryview(bytearray(MAX_PAYLOAD))


@hookimpl
def multifd_recv(channel: Channel, pages: memoryview) -> None:
    payload, members = read_payload(channel, channel.compress_data, len(pages))
    decompress(payload, members, pages)


@hookimpl
def multifd_recv_cleanup(channel: Channel) -> None:
    channel.compress_data = None
