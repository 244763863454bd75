"""Numbers of QEMU's wire: packet flags, compression methods, the main channel's words.

Facts from QEMU 7.2 and 10.0; each was seen on the wire of at least one of them unless said
otherwise.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

MULTIFD_MAGIC = 0x11223344
MULTIFD_VERSION = 1
VM_FILE_MAGIC = 0x5145564D  # "QEVM"
VM_FILE_VERSION = 3
RAM_VERSION = 4

#: Memory in one packet, bytes; a packet holds PACKET_SIZE // page_size pages.
PACKET_SIZE = 512 * 1024
#: QEMU's receivers read a compressed payload into a buffer of this many bytes.
MAX_PAYLOAD = 2 * PACKET_SIZE
#: The page size of a stream that names none: x86, arm with 4 KiB pages, riscv, s390x, ppc.
DEFAULT_PAGE_SIZE = 4096


class PacketFlag(IntFlag):
    """The flags word of a packet (offset 8)."""

    SYNC = 0x01
    DEVICE_STATE = 0x40  # QEMU 10.0 and later


#: Where the compression method sits in the flags word, and how wide the field is.  QEMU gave
#: out one bit per method but compares the field for equality, so it is a number of 0..31.
COMPRESSION_SHIFT = 1
COMPRESSION_MASK = 0x1F << COMPRESSION_SHIFT  # QEMU 9.2 and later; four bits in 9.1, three from 5.0 to 9.0

#: Method -> number in the compression field.
METHODS = {"none": 0, "zlib": 1, "zstd": 2, "qpl": 4, "uadk": 8, "qatzip": 16}
#: Those that QEMU has for devices.
DEVICE_METHODS = {"qpl", "uadk", "qatzip"}
METHOD_NAMES = {number: name for name, number in METHODS.items()}
#: Free for methods between multifd peers: every QEMU refuses them.
THIRD_PARTY_FLAGS = range(27, 32)


def method_number(flags: int) -> int:
    """The number of the method in a flags word."""
    return (flags & COMPRESSION_MASK) >> COMPRESSION_SHIFT


#: Third parties' methods, by those who know their compressors.
_named: dict[int, str] = {}


def name_method(number: int, name: str) -> None:
    """Say what a third party's method is called; the first name stays."""
    if number in THIRD_PARTY_FLAGS:
        _named.setdefault(number, name)


def method_name(number: int) -> str:
    """The method's name, or `method N` where nobody has said one."""
    return METHOD_NAMES.get(number) or _named.get(number) or f"method {number}"


class Section(IntEnum):
    """The byte that opens each part of the main channel."""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


class RamSave(IntFlag):
    """Flags in the low bits of each word of a RAM section: those that a source with multifd sends."""

    ZERO = 0x002
    MEM_SIZE = 0x004
    PAGE = 0x008
    EOS = 0x010
    CONTINUE = 0x020
    MULTIFD_FLUSH = 0x200


class Command(IntEnum):
    """Commands on the main channel.

    POSTCOPY_ADVISE has 16 bytes of data where postcopy-ram is on, none where dirty-bitmaps alone is.
    """

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_DISCARD = 6
    PACKAGED = 7
    COLO = 8
    SWITCHOVER_START = 11


class ReturnPath(IntEnum):
    """Messages of the return path: u16 type, u16 length, data."""

    SHUT = 1
    PONG = 2
    REQUEST_PAGES_OF = 3
    REQUEST_PAGES = 4
    SWITCHOVER_ACK = 7  # QEMU 8.1 and later; 7.2 fails where one comes
