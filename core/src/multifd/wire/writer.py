"""The main channel of a source: each method returns bytes to be written in turn; no I/O."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from multifd.wire.block import Block
from multifd.wire.flags import DEFAULT_PAGE_SIZE, RAM_VERSION, VM_FILE_MAGIC, VM_FILE_VERSION, Command, Section
from multifd.wire.layout import (
    COMMAND_HEAD,
    CONTINUE,
    EOS,
    FILE_HEADER,
    FLUSH,
    MEM_SIZE,
    SECTION_HEAD,
    U32,
    WORD,
    ZERO,
    ZERO_WORD,
)

#: The number of RAM's sections where none is recorded; QEMU 10.0 has the same.
RAM_SECTION = 1


class Writer:
    """Makes the main channel of a source: each method returns bytes to be written in turn."""

    def __init__(self, page_size: int, sync: str, ram_section: int = RAM_SECTION) -> None:
        """`sync` is `round` or `section`: what the destination's machine type wants.

        `ram_section` is the number of RAM's sections, which none of the recorded ones may have.
        """
        self._section = U32.pack(ram_section)
        self._page_size = page_size
        self._sync = sync
        self._block = ""

    def head(self, configuration: bytes | None = None) -> bytes:
        """File header and configuration, recorded or made for a raw image.

        The made one names no machine, which every destination takes.
        """
        if configuration is None:
            configuration = bytes([Section.CONFIGURATION]) + U32.pack(0)
            if self._page_size != DEFAULT_PAGE_SIZE:
                name = b"configuration/target-page-bits"
                bits = self._page_size.bit_length() - 1
                configuration += bytes([Section.SUBSECTION, len(name)]) + name + U32.pack(1) + U32.pack(bits)
        return FILE_HEADER.pack(VM_FILE_MAGIC, VM_FILE_VERSION) + configuration

    def open_return_path(self) -> bytes:
        """Ask the destination to answer, with the ping that QEMU sends first."""
        ping = COMMAND_HEAD.pack(Command.PING, 4) + U32.pack(1)
        return (
            bytes([Section.COMMAND]) + COMMAND_HEAD.pack(Command.OPEN_RETURN_PATH, 0) + bytes([Section.COMMAND]) + ping
        )

    def ram_start(self, blocks: Iterable[Block]) -> bytes:
        """The first RAM section, with its sync point."""
        parts = [bytes([Section.START]), self._section, b"\x03ram", SECTION_HEAD.pack(0, RAM_VERSION)]
        blocks = list(blocks)
        parts.append(WORD.pack(sum(block.used_length for block in blocks) | MEM_SIZE))
        for block in blocks:
            name = block.idstr.encode("ascii")
            parts += [bytes([len(name)]), name, WORD.pack(block.used_length)]
        return b"".join(parts) + self.ram_close()

    def ram_end(self) -> bytes:
        """Opens the last RAM section; ZERO words and `ram_close` follow."""
        return bytes([Section.END]) + self._section

    def zero_pages(self, idstr: str, offsets: Sequence[int]) -> bytes:
        """ZERO words for pages of one block."""
        first = b""
        if idstr != self._block:
            self._block = idstr
            name = idstr.encode("ascii")
            first = WORD.pack(offsets[0] | ZERO) + bytes([len(name)]) + name + b"\0"
            offsets = offsets[1:]
        again = ZERO | CONTINUE
        return first + b"".join([ZERO_WORD.pack(offset | again, 0) for offset in offsets])

    def ram_close(self) -> bytes:
        """The sync point and the end of a RAM section."""
        flush = WORD.pack(FLUSH) if self._sync == "round" else b""
        return flush + WORD.pack(EOS) + bytes([Section.FOOTER]) + self._section

    def end(self) -> bytes:
        """What follows RAM where there is no recorded device state: the end and a description."""
        text = json.dumps({"page_size": self._page_size, "devices": []}).encode()
        return bytes([Section.EOF, Section.VMDESCRIPTION]) + U32.pack(len(text)) + text
