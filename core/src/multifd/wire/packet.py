"""The packets on a multifd channel: layouts, packing, unpacking with every bound; no I/O.

All integers are big-endian.  Checked against QEMU 7.2.22, 10.0.13 and 11.1.3.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

from multifd.errors import PeerError
from multifd.wire.flags import COMPRESSION_SHIFT, MULTIFD_MAGIC, MULTIFD_VERSION, PACKET_SIZE, PacketFlag, method_number

Buffer = bytes | bytearray | memoryview

MAGIC = struct.Struct(">I")
#: magic, version, uuid, id; then 39 reserved bytes.
INIT = struct.Struct(">II16sB39x")
#: magic, version, flags: enough to tell a RAM packet from a device-state packet.
PREFIX = struct.Struct(">III")
#: magic, version, flags, pages_alloc, normal_pages, next_packet_size, packet_num, zero_pages,
#: 28 reserved bytes, ramblock; the offsets follow.
RAM = struct.Struct(">IIIIIIQI28x256s")

# Plain numbers: arithmetic with an IntFlag makes a member of every result, for packets of a peer.
SYNC = PacketFlag.SYNC.value
DEVICE_STATE_FLAG = PacketFlag.DEVICE_STATE.value

PAGE_SIZES = tuple(1 << bits for bits in range(10, 17))


def pages_per_packet(page_size: int) -> int:
    """How many pages of `page_size` bytes a packet can name."""
    return PACKET_SIZE // page_size


def header_length(page_size: int) -> int:
    """Bytes of a RAM packet before its payload: 1344 with 4 KiB pages."""
    return RAM.size + 8 * pages_per_packet(page_size)


@lru_cache(maxsize=256)
def _offsets(count: int) -> struct.Struct:
    return struct.Struct(f">{count}Q")


def _check_prefix(magic: int, version: int, otherwise: str = "") -> None:
    if magic != MULTIFD_MAGIC:
        raise PeerError(f"magic {magic:#010x} instead of {MULTIFD_MAGIC:#010x}: not a multifd packet{otherwise}")
    if version != MULTIFD_VERSION:
        raise PeerError(f"multifd version {version}, this side knows {MULTIFD_VERSION}")


@dataclass(frozen=True, slots=True)
class InitPacket:
    """The first packet of every multifd channel.

    `uuid` is the VM's, 16 bytes in printed order, all zero if it has none; `id` counts the
    channels from 0.
    """

    uuid: bytes
    id: int

    def pack(self) -> bytes:
        """The 64 bytes on the wire."""
        return INIT.pack(MULTIFD_MAGIC, MULTIFD_VERSION, self.uuid, self.id)

    @classmethod
    def unpack(cls, data: Buffer) -> InitPacket:
        """Raises PeerError for a wrong magic or version."""
        magic, version, uuid, channel_id = INIT.unpack(data)
        _check_prefix(magic, version)
        return cls(uuid, channel_id)


@dataclass(frozen=True, slots=True)
class RamPacket:
    """One packet of pages, all of one RAM block, or a SYNC.

    `method` is the number in the compression field.  `normal` and `zero` are byte offsets in
    the block; the payload holds the normal pages in this order.  `next_packet_size` is the
    payload's length in bytes, 0 where no page is normal, whatever the header said (senders
    before 9.0 leave the previous packet's number there).  `room` is how many pages a packet without any has room for:
    none, as from 10.0 on, unless it came with more.
    """

    method: int = 0
    sync: bool = False
    packet_num: int = 0
    ramblock: str = ""
    normal: tuple[int, ...] = ()
    zero: tuple[int, ...] = ()
    next_packet_size: int = 0
    room: int = 0

    def pack(self, page_size: int) -> bytes:
        """The header as QEMU 9.0 and later write it; the payload follows it on the wire."""
        room = pages_per_packet(page_size)
        offsets = self.normal + self.zero
        if len(offsets) > room:
            raise ValueError(f"{len(offsets)} pages in a packet of {room}")
        flags = self.method << COMPRESSION_SHIFT if offsets else 0
        return b"".join(
            (
                RAM.pack(
                    MULTIFD_MAGIC,
                    MULTIFD_VERSION,
                    flags | (SYNC if self.sync else 0),
                    room if offsets else self.room,
                    len(self.normal),
                    self.next_packet_size,
                    self.packet_num,
                    len(self.zero),
                    self.ramblock.encode("ascii"),
                ),
                _offsets(len(offsets)).pack(*offsets),
                bytes(8 * (room - len(offsets))),
            )
        )

    @classmethod
    def unpack(cls, data: Buffer, page_size: int) -> RamPacket:
        """Read a header of `header_length(page_size)` bytes.

        Only what the counts say is looked at: QEMU 7.2 leaves old numbers and names in the
        rest.  Raises PeerError for a wrong magic or version, for counts that do not fit, and
        for a block name without its end.  Offsets are checked by `block.check_packet`.
        """
        magic, version, flags, alloc, normal, size, num, zero, name = RAM.unpack_from(data)
        _check_prefix(magic, version)
        room = pages_per_packet(page_size)
        if alloc not in (0, room):
            theirs = PACKET_SIZE // alloc if PACKET_SIZE % alloc == 0 else 0
            right = f": the guest's is {theirs} (--page-size {theirs})" if theirs in PAGE_SIZES else ""
            raise PeerError(f"packet {num} has room for {alloc} pages, {room} of {page_size} bytes fit{right}")
        if normal > alloc or zero > alloc - normal:
            raise PeerError(f"packet {num} holds {normal} normal and {zero} zero pages, but has room for {alloc}")
        offsets: tuple[int, ...] = ()
        ramblock = ""
        if normal or zero:
            offsets = _offsets(normal + zero).unpack_from(data, RAM.size)
            end = name.find(b"\0")
            if end < 1:
                raise PeerError(f"packet {num}: the RAM block's name is {'empty' if end == 0 else 'not ended'}")
            ramblock = name[:end].decode("ascii", "backslashreplace")
        return cls(
            method_number(flags),
            bool(flags & SYNC),
            num,
            ramblock,
            offsets[:normal],
            offsets[normal:],
            size if normal else 0,
            0 if offsets else alloc,
        )


def may_be_empty(cut: Buffer) -> bool:
    """Whether what came of a header can be of a packet without pages, SYNC and method."""
    _, _, flags, _, normal, _, _, zero, _ = RAM.unpack(bytes(cut[: RAM.size]).ljust(RAM.size, b"\0"))
    return not (flags or normal or zero)


def is_device_state(prefix: Buffer, page_size: int) -> bool:
    """Which header a packet's first 12 bytes begin: of device state, or of RAM.

    Raises PeerError for a wrong magic or version: nothing in a SYNC, the first packet, says how long its header is, so
    that the next one is missed where the guest's page size is not `page_size`.
    """
    magic, version, flags = PREFIX.unpack(prefix)
    _check_prefix(magic, version, f", or the guest's page size is not {page_size} (--page-size)")
    return bool(flags & DEVICE_STATE_FLAG)
