"""Sections other than RAM's that a source sends before its RAM is complete; no I/O.

Nothing on the wire says how long a section's body is, so that only those whose layout is known here can be passed by:
what QEMU 7.2 to 11.1 has but for VFIO's and the disks' of 7.2 (`migrate -b`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from multifd.wire.cursor import Cursor, Waits
from multifd.wire.layout import U32, WORD

Body = Callable[[Cursor], Waits]

#: Bytes of the longest piece that a section names: QEMU's have at most 512 KiB.
MAX_PIECE = 16 << 20

# hash table of a pseries guest with hash MMU: first hash PTE, how many valid ones follow, how many invalid ones do not
_HPTES = struct.Struct(">IHH")
_HPTE_SIZE = 16
_NO_TABLE = 0xFFFFFFFF
# virtio-mem: address, region, block size, NUMA node, plugged size
_VIRTIO_MEM = struct.Struct(">QQQIQ")
# storage attributes of an s390x guest: flags of a word, as RAM's in the low bits
_S390_EOS, _S390_MORE, _S390_DONE = 1, 2, 8
_S390_FLAGS = 0xFFF
# dirty bitmaps
_BITMAP_EOS, _BITMAP_ZEROES, _BITMAP_NAME, _BITMAP_NODE, _BITMAP_START, _BITMAP_BITS = (
    0x01,
    0x02,
    0x04,
    0x08,
    0x10,
    0x40,
)
_BITMAP_EXTRA = 0x80
_BITMAP_GRANULARITY = struct.Struct(">IB")
_BITMAP_PIECE = struct.Struct(">QI")


def _htab(cursor: Cursor) -> Waits:
    """pseries, with the hash MMU: the size of the table, or pieces of it."""
    if (yield from cursor.number(U32)) != 0:  # its size, or _NO_TABLE
        return
    while True:
        index, valid, invalid = yield from cursor.unpack(_HPTES)
        if not (index or valid or invalid):
            return
        yield from cursor.take(valid * _HPTE_SIZE)


def _virtio_mem(cursor: Cursor) -> Waits:
    """Which blocks of a virtio-mem device are plugged: a bit each, in words of 64."""
    _, region, block, _, _ = yield from cursor.unpack(_VIRTIO_MEM)
    if not block or region // block > MAX_PIECE:
        raise cursor.wrong(f"a virtio-mem region of {region} bytes in blocks of {block}")
    yield from cursor.take((region // block + 63) // 64 * 8)


def _storage_attributes(cursor: Cursor) -> Waits:
    """s390x: a byte for each page, while the guest hints (CMM)."""
    while (flags := (yield from cursor.number(WORD)) & _S390_FLAGS) != _S390_EOS:
        if flags == _S390_MORE:
            yield from _piece(cursor)
        elif flags != _S390_DONE:
            raise cursor.wrong(f"flags {flags:#x} of storage attributes are unknown")


def _dirty_bitmaps(cursor: Cursor) -> Waits:
    """Dirty bitmaps of block nodes."""
    while not (flags := (yield from cursor.byte())) & _BITMAP_EOS:
        if flags & _BITMAP_EXTRA:
            raise cursor.wrong(f"flags {flags:#x} of a dirty bitmap are unknown")
        for named in (_BITMAP_NODE, _BITMAP_NAME):
            if flags & named:
                yield from cursor.name()
        if flags & _BITMAP_START:
            yield from cursor.unpack(_BITMAP_GRANULARITY)
        elif flags & _BITMAP_BITS:
            yield from cursor.unpack(_BITMAP_PIECE)
            if not flags & _BITMAP_ZEROES:
                yield from _piece(cursor)


def _piece(cursor: Cursor) -> Waits:
    length = yield from cursor.number(WORD)
    if length > MAX_PIECE:
        raise cursor.wrong(f"a piece of {length} bytes, more than {MAX_PIECE}")
    yield from cursor.take(length)


#: By the section's name, or what it ends with, behind the device's address.
BODIES: dict[str, Body] = {
    "spapr/htab": _htab,
    "virtio-mem-device-early": _virtio_mem,
    "s390-storage_attributes": _storage_attributes,
    "dirty-bitmap": _dirty_bitmaps,
}


def body_of(name: str) -> Body | None:
    """What reads the body of a section of this name; None where nobody does."""
    return BODIES.get(name) or BODIES.get(name.rpartition("/")[2])


def told(name: str) -> str:
    """What a section is that nobody reads."""
    if name.rpartition("/")[2] == "vfio":
        return "state of a device that is assigned to the guest (VFIO): detach it before the migration"
    if name == "block":
        return "the disks' content (migrate -b): let the destination have them otherwise, as by drive-mirror"
    return "a device's with a live section of its own, which this side does not know"
