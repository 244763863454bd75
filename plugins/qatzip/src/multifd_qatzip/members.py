"""The payload of method qatzip: gzip members with QATzip's extension, back to back.

Each member is a header with both lengths, raw deflate data (window 15), CRC-32 and length of
the source.  A device makes a member of each 64 KiB; libqatzip's software path, and so a QEMU
without a device, makes one of the whole packet.  The same from QATzip 1.0.9 to 2.0.0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from multifd.errors import CompressorError

#: magic and deflate, flags (extra field), mtime, XFL, OS, length of the extra field, "QZ", its
#: length, source bytes, deflate bytes
HEADER = struct.Struct("<3sBIBBH2sHII")
TRAILER = struct.Struct("<II")
FIXED_HEAD = b"\x1f\x8b\x08\x04\x00\x00\x00\x00"
FIXED_TAIL = b"\xff\x0c\x00QZ\x08\x00"
#: Source bytes of a member that a device makes or takes: libqatzip's default buffer.
MEMBER_SIZE = 64 * 1024
#: Shorter ones libqatzip keeps from the device (its default threshold).
DEVICE_LEAST = 1024
#: Deflate bytes of a member that a device makes or takes; its Huffman codes have 9 bits a byte at most.
DEVICE_DEFLATE_MOST = MEMBER_SIZE * 9 // 8 + 1024
#: Bytes of such a member, with header and trailer.
MEMBER_MOST = HEADER.size + DEVICE_DEFLATE_MOST + TRAILER.size


@dataclass(frozen=True, slots=True)
class Member:
    """One member: its deflate data is `payload[start:end]`, `size` the bytes of its source."""

    start: int
    end: int
    size: int
    xfl: int
    crc: int

    @property
    def whole(self) -> slice:
        """Where it is in the payload, with header and trailer."""
        return slice(self.start - HEADER.size, self.end + TRAILER.size)


def parse(payload: memoryview, expected: int) -> list[Member]:
    """Check the framing of a whole payload that has to hold `expected` bytes of pages.

    Raises CompressorError, saying what is there and what should be, unless the members fill the
    payload to its last byte and their sources have `expected` bytes together.
    """
    members: list[Member] = []
    at = done = 0
    while at < len(payload):
        member = _member(payload, at, expected - done)
        members.append(member)
        done += member.size
        at = member.end + TRAILER.size
    if done != expected:
        raise CompressorError(
            f"the payload of {len(payload)} bytes holds {done} bytes in {len(members)} members, "
            f"the packet's pages have {expected}"
        )
    return members


def _member(payload: memoryview, at: int, wanted: int) -> Member:
    left = len(payload) - at
    if left < HEADER.size:
        raise CompressorError(f"byte {at} of the payload: a member's header has {HEADER.size} bytes, {left} are left")
    head, tail = bytes(payload[at : at + 8]), bytes(payload[at + 9 : at + 16])
    if (head, tail) != (FIXED_HEAD, FIXED_TAIL):
        raise CompressorError(
            f"byte {at} of the payload: {head.hex()}..{tail.hex()} is no QATzip member, "
            f"which starts with {FIXED_HEAD.hex()}..{FIXED_TAIL.hex()}"
        )
    *_, size, deflate_size = HEADER.unpack_from(payload, at)
    if not 0 < size <= wanted:
        raise CompressorError(
            f"byte {at} of the payload: a member of {size} bytes, the packet's pages take 1 to {wanted} more"
            if wanted
            else f"byte {at} of the payload: a member of {size} bytes behind the packet's last page"
        )
    start = at + HEADER.size
    end = start + deflate_size
    if end + TRAILER.size > len(payload):
        raise CompressorError(f"byte {at} of the payload: a member of {end + TRAILER.size - at} bytes, {left} are left")
    crc, trailer_size = TRAILER.unpack_from(payload, end)
    if trailer_size != size:
        raise CompressorError(
            f"byte {at} of the payload: a member of {size} bytes by its header, {trailer_size} by its trailer"
        )
    return Member(start, end, size, payload[at + 8], crc)


def pack_header(size: int, deflate_size: int, xfl: int) -> bytes:
    """The header of a member; `xfl` as in gzip: 4 for the fastest level, 2 for the smallest, else 0."""
    return HEADER.pack(FIXED_HEAD[:3], FIXED_HEAD[3], 0, xfl, FIXED_TAIL[0], 12, b"QZ", 8, size, deflate_size)


def device_takes(member: Member) -> bool:
    """Whether libqatzip gives a member to the device, and not to zlib."""
    return (
        DEVICE_LEAST <= member.size <= MEMBER_SIZE
        and member.end - member.start <= DEVICE_DEFLATE_MOST
        and member.xfl in (0, 2, 4)
    )
