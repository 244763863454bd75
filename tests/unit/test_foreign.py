"""Files that hold no guest's memory as it lies there are named; a raw image never is."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import images
import multifd
import peers
import streams
from commands import fails
from multifd.errors import CallerError
from multifd.snapshot.foreign import foreign

PAGE = 4096
MEMORY = images.memory()


def zip_archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("guest.raw", MEMORY[: 1 << 20])
    return file.getvalue()


def libvirt(magic: bytes, number: int, order: str = "<") -> bytes:
    xml = b"<domain/>\0"
    return magic + struct.pack(f"{order}5I56x", 2, len(xml), 1, number, 0) + xml + b"QEVM"


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("guest.raw")
        info.size = len(MEMORY)
        archive.addfile(info, io.BytesIO(MEMORY))
    return file.getvalue()


def core(kind: int = 4, order: int = 1) -> bytes:
    return b"\x7fELF" + bytes([2, order, 1]) + bytes(9) + kind.to_bytes(2, ("little", "big")[order - 1]) + bytes(46)


STREAM = b"QEVM\x00\x00\x00\x03\x07\x00\x00\x00\x02pc"
CAPABILITIES = b"\x05\x1aconfiguration/capabilities\x00\x00\x00\x01\x00\x00\x00\x01\x0amapped-ram"
LIME = b"EMiL" + struct.pack("<IQQ8x", 1, 0, 0x9FBFF)
AVML = b"AVML" + struct.pack("<IQQ8x", 2, 0x1000, 0x9F000)
QCOW2 = b"QFI\xfb" + struct.pack(">I", 3)
#: A frame of one block, stored.
LZ4 = bytes.fromhex("04224d18604082") + struct.pack("<I", 1 << 31 | PAGE) + bytes([7]) * PAGE + bytes(4)
VMSS = struct.pack("<III64s16x", 0xBED2BED2, 8, 20, b"Checkpoint")

NAMED: dict[str, tuple[Callable[[], bytes], str]] = {
    "stream": (lambda: STREAM, "a migration stream .*switch multifd on and migrate into `multifd receive`"),
    "mapped": (lambda: STREAM + CAPABILITIES, "a mapped-ram file .*start its guest again"),
    "libvirt": (lambda: libvirt(b"LibvirtQemudSave", 0), r"a libvirt save image \(virsh save, raw\): `virsh restore`"),
    "zstd": (lambda: libvirt(b"LibvirtQemudSave", 5, ">"), r"a libvirt save image \(virsh save, zstd\)"),
    "part": (lambda: libvirt(b"LibvirtQemudPart", 0), "a libvirt save image that was never finished"),
    "core": (core, "an ELF core .*pmemsave writes a raw image"),
    "core of s390x": (lambda: core(order=2), "an ELF core"),
    "kdump": (lambda: b"KDUMP   \x06", "a kdump-compressed dump: "),
    "flattened": (lambda: b"makedumpfile".ljust(16, b"\0") + bytes(7) + b"\1", "a kdump-compressed dump, flattened"),
    "windows": (lambda: b"PAGEDU64", "a Windows crash dump"),
    "lime": (lambda: LIME, "a LiME image.*format=padded"),
    "avml": (lambda: AVML, "a compressed AVML image"),
    "qcow2": (lambda: QCOW2, "a qcow2 disk image: .*-loadvm"),
    "vmss": (lambda: VMSS, r"a VMware checkpoint .*\.vmem file beside it"),
    "gzip": (lambda: gzip.compress(MEMORY), r"compressed \(gzip\): decompress it first \(gzip -d\)"),
    "xz": (lambda: lzma.compress(MEMORY[: 1 << 20]), "compressed .xz.: .*xz -d"),
    "bzip2": (lambda: bz2.compress(MEMORY[: 1 << 20]), "compressed .bzip2.: .*bzip2 -d"),
    "zst": (lambda: bytes(streams.other_zstd().compress(MEMORY)), "compressed .zstd.: .*zstd -d"),
    "lz4": (lambda: LZ4, "compressed .lz4.: .*lz4 -d"),
    "zip": (zip_archive, "a zip archive: unpack it first"),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive: unpack it first"),
    "qed": (lambda: b"QED\0", "a QED disk image: the guest's memory is not in it"),
    "vmdk": (lambda: b"KDMV\1\0\0\0", "a VMDK disk image"),
    "vhdx": (lambda: b"vhdxfile", "a VHDX disk image"),
    "vhd": (lambda: b"conectix", "a VHD disk image"),
    "vdi": (lambda: b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe", "a VDI disk"),
    "tar": (tar, "a tar archive: unpack it first"),
}


@pytest.mark.parametrize("kind", NAMED)
def test_what_it_is_is_said(work: Path, kind: str) -> None:
    make, says = NAMED[kind]
    data = make()
    path = work / "image.raw"
    path.write_bytes(data + bytes(-len(data) % PAGE))
    for look in (multifd.open_snapshot, multifd.inspect):
        with pytest.raises(CallerError, match=f"image.raw is {says}"):
            look(path)


def test_each_command_says_it_and_how_to_insist(work: Path) -> None:
    path = work / "image.raw"
    path.write_bytes(core().ljust(PAGE, b"\0"))
    for command in (("send", path, f"unix:{work}/nobody"), ("bench", path)):
        fails(1, "image.raw is an ELF core .*; if it is a raw image that only begins so: --raw", *command)
    fails(1, "image.raw is an ELF core .*a snapshot$", "inspect", path)


def test_a_raw_image_is_taken_whatever_it_begins_with(work: Path) -> None:
    path = work / "image.raw"
    path.write_bytes(core().ljust(PAGE) + MEMORY)
    there = peers.Receiving(work / "snap")
    multifd.send(multifd.open_snapshot(path, raw=True), there.uri)
    there.join()
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == path.read_bytes()
    fails(1, "cannot connect to", "send", path, f"unix:{work}/nobody", "--raw")


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\0",
        bytes(PAGE),
        MEMORY,
        b"\x53\xff\x00\xf0" * 256,  # a BIOS's interrupt vectors
        b"QEVM\x00\x00\x00\x02",
        core(2),
        b"\x7fELF\x02\x03\x01",
        b"makedumpfile 1.7",
        b"EMiL" + struct.pack("<IQQ8x", 1, 9, 8),
        b"EMiL",
        b"QFI\xfb" + struct.pack(">I", 9),
        struct.pack("<III64s", 0xBED2BED2, 8, 20, b"\x01"),
        struct.pack("<III64s", 0xBED2BED2, 8, 1 << 20, b"Checkpoint"),
        b"\x1f\x8b\x08\xe0",
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x07",
        b"\x28\xb5\x2f\xfd\x08",
        b"\x04\x22\x4d\x18\x00",
        b"BZh9memory",
        bytes(257) + b"ustar\x0000",
    ],
)
def test_what_only_begins_like_one_is_memory(head: bytes) -> None:
    assert foreign(head) is None


def test_a_recordings_main_channel_is_named_too(work: Path) -> None:
    folder = work / "recording"
    folder.mkdir()
    (folder / "ch0.bin").write_bytes(bytes(64))
    (folder / "main.bin").write_bytes(libvirt(b"LibvirtQemudSave", 3))
    says = r"main.bin is no recording's: it is a libvirt save image \(virsh save, xz\)"
    fails(1, says, "inspect", folder)
    fails(1, says, "receive", f"recording:{folder}", "-o", work / "snap")
    assert not (work / "snap").exists()
