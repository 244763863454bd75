"""What a file is that holds no guest's memory as it lies there, by its first bytes; no I/O.

A raw image may begin with anything: a short magic counts only where what is behind it fits, too.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

#: Bytes of the beginning of a file that tell.
HEAD = 4096
STREAM = b"QEVM\x00\x00\x00\x03"

_RAW = "QEMU's pmemsave writes a raw image of such a guest, `multifd receive --qmp` a snapshot"
_RESUME = "start its guest again, and take it with `multifd receive --qmp`"
#: What a libvirt save image says of how its stream is packed, by number.
_LIBVIRT = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")
#: Of a LiME range: version, first and last byte.
_LIME = struct.Struct("<4xIQQ")
_VMWARE = {0xBAD1BAD1, 0xBED2BED0, 0xBED2BED2, 0xBED3BED3}


def _anything(_: bytes) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of file: its magic, `at` this byte; `fits` looks at the rest of the head, HEAD bytes at least."""

    magic: bytes
    what: str
    remedy: str
    fits: Callable[[bytes], bool] = _anything
    at: int = 0


def _is_core(head: bytes) -> bool:
    return head[4] in (1, 2) and head[5] in (1, 2) and int.from_bytes(head[16:18], ("little", "big")[head[5] - 1]) == 4


def _is_lime(head: bytes) -> bool:
    version, first, last = _LIME.unpack_from(head)
    return version in (1, 2) and first <= last


def _is_gzip(head: bytes) -> bool:
    flags, hint, system = head[3], head[8], head[9]
    return flags < 0x20 and hint in (0, 2, 4) and (system < 14 or system == 255)


def _is_tar(head: bytes) -> bool:
    try:
        told = int(head[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    return told == sum(head[:148]) + 8 * ord(" ") + sum(head[156:512])


def _is_vmware(head: bytes) -> bool:
    magic, groups = struct.unpack_from("<I4xI", head)
    name = head[12:76].partition(b"\0")[0]
    return magic in _VMWARE and 0 < groups < 1024 and bool(name) and name.isalnum()


def _unpack_first(program: str) -> str:
    return f"decompress it first ({program} -d)"


_DISK = "the guest's memory is not in it"

_KINDS = (
    _Kind(
        STREAM,
        "a mapped-ram file (QEMU's `migrate file:`)",
        f"it is no stream: {_RESUME}",
        lambda head: b"\x0amapped-ram" in head[:1024],
    ),
    _Kind(
        STREAM,
        "a migration stream (QEMU's `migrate file:` or `exec:`, or the main channel of a recording)",
        "switch multifd on and migrate into `multifd receive`; a recording's directory is for `multifd receive "
        "recording:DIR`",
    ),
    _Kind(b"\x7fELF", "an ELF core (dump-guest-memory, virsh dump --memory-only)", _RAW, _is_core),
    _Kind(b"KDUMP   ", "a kdump-compressed dump", _RAW),
    _Kind(b"DISKDUMP", "a kdump-compressed dump", _RAW),
    _Kind(b"makedumpfile\0\0\0\0", "a kdump-compressed dump, flattened (makedumpfile, dump-guest-memory)", _RAW),
    _Kind(b"PAGEDUMP", "a Windows crash dump", _RAW),
    _Kind(b"PAGEDU64", "a Windows crash dump", _RAW),
    _Kind(b"EMiL", "a LiME image, its ranges with headers between them", "take it with LiME's format=padded", _is_lime),
    _Kind(b"AVML", "a compressed AVML image", "AVML's avml-convert decompresses it", _is_lime),
    _Kind(
        b"QFI\xfb",
        "a qcow2 disk image",
        f"what savevm put into one is for QEMU's -loadvm: {_RESUME}",
        lambda head: int.from_bytes(head[4:8]) in (1, 2, 3),
    ),
    _Kind(b"QED\0", "a QED disk image", _DISK),
    _Kind(b"KDMV", "a VMDK disk image", _DISK),
    _Kind(b"vhdxfile", "a VHDX disk image", _DISK),
    _Kind(b"conectix", "a VHD disk image", _DISK),
    _Kind(b"\x7f\x10\xda\xbe", "a VDI disk image", _DISK, at=64),
    _Kind(b"PK\x03\x04", "a zip archive", "unpack it first (unzip)"),
    _Kind(b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first (7z x)"),
    _Kind(b"", "a VMware checkpoint (.vmss, .vmsn)", "the memory is in the .vmem file beside it", _is_vmware),
    _Kind(b"\x1f\x8b\x08", "compressed (gzip)", _unpack_first("gzip"), _is_gzip),
    _Kind(b"\xfd7zXZ\0", "compressed (xz)", _unpack_first("xz")),
    _Kind(b"\x28\xb5\x2f\xfd", "compressed (zstd)", _unpack_first("zstd"), lambda head: not head[4] & 8),
    _Kind(b"\x04\x22\x4d\x18", "compressed (lz4)", _unpack_first("lz4"), lambda head: head[4] & 0xC2 == 0x40),
    _Kind(b"BZh", "compressed (bzip2)", _unpack_first("bzip2"), lambda head: head[4:10] == b"1AY&SY"),
    _Kind(b"\x89LZO\0\r\n\x1a\n", "compressed (lzop)", _unpack_first("lzop")),
    _Kind(b"ustar", "a tar archive", "unpack it first (tar -x)", _is_tar, 257),
)


def foreign(head: bytes) -> str | None:
    """What a file is that begins so, and what to do: `compressed (xz): decompress it first (xz -d)`; None for memory.

    `head` are its first HEAD bytes, or all of a shorter one.
    """
    head = head.ljust(HEAD, b"\0")
    if head.startswith((b"LibvirtQemudSave", b"LibvirtQemudPart")):
        return _libvirt(head)
    for kind in _KINDS:
        if head.startswith(kind.magic, kind.at) and kind.fits(head):
            return f"{kind.what}: {kind.remedy}"
    return None


def _libvirt(head: bytes) -> str:
    if head.startswith(b"LibvirtQemudPart"):
        return "a libvirt save image that was never finished: the guest is not in it"
    # Of whichever byte order its host has.
    number = min(int.from_bytes(head[28:32], "little"), int.from_bytes(head[28:32], "big"))
    packed = f", {_LIBVIRT[number]}" if number < len(_LIBVIRT) else ""
    return f"a libvirt save image (virsh save{packed}): `virsh restore` starts its guest again; {_RESUME}"
