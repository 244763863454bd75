"""The configuration section, with which a main channel begins: machine type, page size, uuid; no I/O."""

from __future__ import annotations

from collections.abc import Generator

from multifd.wire.cursor import Cursor
from multifd.wire.events import Configuration
from multifd.wire.flags import Section
from multifd.wire.layout import U32
from multifd.wire.packet import PAGE_SIZES

MAX_MACHINE_NAME = 256
#: QEMU lists two at most.
MAX_CAPABILITIES = 64
#: Page sizes that no stream names, for they are the smallest of their target: of its machine types, without version.
#: Of an ARM board only where its CPU is older than ARMv7, or of profile M: others name theirs (QEMU 7.2 to 11.1).
_BOARDS = {
    1024: "ast1030-evb b-l475e-iot01a canon-a1100 collie emcraft-sf2 fby35 g220a-bmc imx25-pdk integratorcp kzm "
    "lm3s6965evb lm3s811evb microbit mps2-an385 mps2-an386 mps2-an500 mps2-an505 mps2-an511 mps2-an521 mps3-an524 "
    "mps3-an536 mps3-an547 musca-a musca-b1 musicpal netduino2 netduinoplus2 olimex-stm32-h405 palmetto-bmc "
    "quanta-q71l-bmc raspi0 raspi1ap realview-eb realview-eb-mpcore stm32vldiscovery supermicrox11-bmc sx1 sx1-v1 "
    "versatileab versatilepb",
    8192: "clipper niagara or1k-sim sun4u sun4v",
    16384: "KIT_AURIX_TC277_TRB tricore_testboard",
}
PAGE_SIZE_OF = {machine: size for size, machines in _BOARDS.items() for machine in machines.split()}


def read_configuration(cursor: Cursor) -> Generator[None, None, tuple[Configuration, int]]:
    """The section, and the byte after it, which opens the next.  Raises PeerError."""
    kind = yield from cursor.kind()
    if kind != Section.CONFIGURATION:
        raise cursor.wrong(f"section type {kind:#04x} where the configuration should be: machine with no type?")
    length = yield from cursor.number(U32)
    if length > MAX_MACHINE_NAME:
        raise cursor.wrong(f"a machine type of {length} bytes")
    name = yield from cursor.take(length)
    raw = bytearray([kind]) + U32.pack(length) + name
    machine = name.decode("ascii", "backslashreplace")
    page_size = PAGE_SIZE_OF.get(machine)
    uuid = None
    capabilities: list[str] = []
    while (kind := (yield from cursor.kind())) == Section.SUBSECTION:
        subsection = yield from cursor.name()
        version = yield from cursor.number(U32)
        if version != 1:
            raise cursor.wrong(f"{subsection} has version {version}, this side knows 1")
        if subsection == "configuration/target-page-bits":
            bits = yield from cursor.number(U32)
            if bits > 63 or 1 << bits not in PAGE_SIZES:
                raise cursor.wrong(f"a page size of 2^{bits} bytes")
            page_size = 1 << bits
            content = U32.pack(bits)
        elif subsection == "configuration/uuid":
            content = uuid = yield from cursor.take(16)
        elif subsection == "configuration/capabilities":
            content, capabilities = yield from _capabilities(cursor)
        else:
            raise cursor.wrong(f"subsection {subsection!r} of the configuration is unknown")
        raw += bytes([Section.SUBSECTION, len(subsection)]) + subsection.encode() + U32.pack(1) + content
    return Configuration(machine, page_size, uuid, bytes(raw), tuple(capabilities)), kind


def _capabilities(cursor: Cursor) -> Generator[None, None, tuple[bytes, list[str]]]:
    """Those that change the stream's layout, and the bytes that say so."""
    count = yield from cursor.number(U32)
    if count > MAX_CAPABILITIES:
        raise cursor.wrong(f"{count} capabilities")
    raw = U32.pack(count)
    names = []
    for _ in range(count):
        length = yield from cursor.byte()
        name = yield from cursor.take(length)
        raw += bytes([length]) + name
        names.append(name.decode("ascii", "backslashreplace"))
    return raw, names
