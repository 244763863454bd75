"""RAM's sections on the main channel: the block list, pages, sync points; no I/O."""

from __future__ import annotations

import struct
from collections.abc import Generator, Sequence

from multifd.errors import PeerError
from multifd.wire.block import Block, check_blocks, check_offset
from multifd.wire.cursor import Cursor
from multifd.wire.events import BlockList, Event, PageData, SyncPoint, ZeroPages
from multifd.wire.flags import RAM_VERSION, Section
from multifd.wire.layout import CONTINUE, EOS, FLUSH, MEM_SIZE, PAGE, WORD, ZERO, ZERO_WORD

MAX_BLOCKS = 4096
#: ZERO words read in one step; keeps an event small.
ZERO_BATCH = 1024
FOOTER = struct.Struct(">BI")

# Reads like the format: yields events, and None for "more data".
Steps = Generator[Event | None, None, None]


def read_footer(cursor: Cursor, section: int) -> Generator[None, None, None]:
    """What ends any section.  Raises PeerError."""
    kind, footer = yield from cursor.unpack(FOOTER)
    if kind != Section.FOOTER or footer != section:
        raise cursor.wrong(f"a footer of section {section} should be here, not {kind:#04x} {footer}")


class RamSections:
    """Reads them; `section` is their number once the first came, `sync` as `Parser`'s."""

    def __init__(self, cursor: Cursor) -> None:
        self.section: int | None = None
        self.sync = ""
        self._cursor = cursor
        self._blocks: dict[str, Block] = {}
        self._block: Block | None = None

    def start(self, section: int, instance: int, version: int, page_size: int, *, taken: bool) -> Steps:
        """The first one, behind its head; its number may be `taken`."""
        if self.section is not None:
            raise self._cursor.wrong(f"section {section} (ram): RAM begins twice")
        if taken:
            raise self._cursor.wrong(f"section {section} (ram) has the number of another one")
        if instance or version != RAM_VERSION:
            raise self._cursor.wrong(
                f"ram section version {version}, instance {instance}: this side knows {RAM_VERSION}, 0"
            )
        self.section = section
        yield from self.read(page_size, first=True)

    def read(self, page_size: int, *, first: bool = False) -> Steps:
        """The words of one, to its footer."""
        cursor = self._cursor
        assert self.section is not None
        while True:
            word = yield from cursor.number(WORD)
            flags = word & (page_size - 1)
            address = word - flags
            if flags == EOS:
                break
            if flags == FLUSH:
                self.sync = self.sync or "round"
                yield SyncPoint()
            elif flags & ~CONTINUE in (ZERO, PAGE):
                if not flags & CONTINUE:
                    name = yield from cursor.name()
                    self._block = self._blocks.get(name)
                    if self._block is None:
                        raise cursor.wrong(f"a page of RAM block {name!r}, which the source did not list")
                yield from self._page(address, page_size, zero=bool(flags & ZERO))
            elif flags == MEM_SIZE and first and not self._blocks:
                yield from self._block_list(address, page_size)
            else:
                raise cursor.wrong(f"RAM flags {flags:#x} are unknown here")
        if not self._blocks:
            raise cursor.wrong("the first RAM section lists no blocks")
        if self.sync != "round":
            self.sync = "section"
            yield SyncPoint()
        yield from read_footer(cursor, self.section)

    def _page(self, address: int, page_size: int, *, zero: bool) -> Steps:
        block, cursor = self._block, self._cursor
        if block is None:
            raise cursor.wrong("a page that goes on in the block of the page before it, and there was none")
        if not zero:
            data = yield from cursor.take(page_size)
            self._check(block, (address,), page_size)
            yield PageData(block.idstr, address, data)
            return
        fill = yield from cursor.byte()
        if fill:
            raise cursor.wrong(f"a page filled with {fill:#04x}: only zero is sent this way")
        offsets = [address]
        # Words of one block follow each other by the thousand: read all that are here at once.
        plain = ZERO | CONTINUE
        mask = page_size - 1
        ready = min((len(cursor.buffer) - cursor.position) // ZERO_WORD.size, ZERO_BATCH)
        end = cursor.position + ready * ZERO_WORD.size
        for word, fill in ZERO_WORD.iter_unpack(cursor.buffer[cursor.position : end]):
            if fill or word & mask != plain:
                break
            offsets.append(word - plain)
        cursor.position += (len(offsets) - 1) * ZERO_WORD.size
        self._check(block, offsets, page_size)
        yield ZeroPages(block.idstr, tuple(offsets))

    def _check(self, block: Block, offsets: Sequence[int], page_size: int) -> None:
        # An address in a word is a multiple of the page size by its layout.
        if max(offsets) + page_size > block.used_length:
            try:
                check_offset(block, max(offsets), page_size)
            except PeerError as error:
                raise self._cursor.wrong(str(error)) from None

    def _block_list(self, total: int, page_size: int) -> Steps:
        cursor = self._cursor
        blocks: list[Block] = []
        while total > 0:
            name = yield from cursor.name()
            length = yield from cursor.number(WORD)
            if length > total or len(blocks) == MAX_BLOCKS:
                raise cursor.wrong(f"RAM block {name!r} of {length} bytes: the list does not add up to its total")
            total -= length
            blocks.append(Block(name, length))
        try:
            check_blocks(blocks, page_size)
        except PeerError as error:
            raise cursor.wrong(str(error)) from None
        self._blocks = {block.idstr: block for block in blocks}
        yield BlockList(tuple(blocks))
