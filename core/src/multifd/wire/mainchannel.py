"""The main channel: a parser and a writer that do no I/O.

    parser = Parser()
    parser.feed(data)  # any piece of the stream
    for event in parser.events():  # all that is complete; it stops where more data is needed
        print(type(event).__name__)
    parser.end()  # the connection ended: was that allowed?

All integers are big-endian.  Checked against QEMU 7.2.22 and 10.0.13.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from multifd.errors import PeerError
from multifd.wire.block import Block, check_blocks, check_offset
from multifd.wire.events import (
    BlockList,
    CommandReceived,
    Configuration,
    DeviceState,
    Event,
    PageData,
    RamEnd,
    SyncPoint,
    ZeroPages,
)
from multifd.wire.flags import DEFAULT_PAGE_SIZE, RAM_VERSION, VM_FILE_MAGIC, VM_FILE_VERSION, Command, Section
from multifd.wire.layout import (
    COMMAND_HEAD,
    CONTINUE,
    EOS,
    FILE_HEADER,
    FLUSH,
    MEM_SIZE,
    PAGE,
    SECTION_HEAD,
    U32,
    WORD,
    ZERO,
    ZERO_WORD,
)
from multifd.wire.packet import PAGE_SIZES

#: Bytes of data of the commands known here.
COMMAND_LENGTHS: dict[int, int] = {Command.OPEN_RETURN_PATH: 0, Command.PING: 4, Command.SWITCHOVER_START: 0}

MAX_MACHINE_NAME = 256
MAX_BLOCKS = 4096
#: A description longer than this is not looked for (QEMU's are some 10 KiB to a few 100 KiB).
MAX_DESCRIPTION = 16 << 20
#: ZERO words read in one step; keeps an event small.
ZERO_BATCH = 1024

_POSTCOPY = "turn postcopy-ram off on the source: this side cannot take it"


class Unsupported(PeerError):
    """A migration, but of a kind that cannot be taken: the source's settings or devices have to change."""


class Parser:
    """Reads a main channel from its first byte.

    `sync` is the mode once the first RAM section told it: `round` where it holds
    MULTIFD_FLUSH (machine types 8.1 and newer), else `section`.  `description` is the VM
    description once the stream has come to its end.  `inside` says that the bytes so far end
    inside something, so that more is due; between sections a source may be silent.
    """

    def __init__(self, page_size: int | None = None) -> None:
        """`page_size` is assumed where the stream names none."""
        self.page_size = page_size or DEFAULT_PAGE_SIZE
        self.sync = ""
        self.description: dict[str, Any] | None = None
        self.inside = True
        self._buffer = bytearray()
        self._position = 0
        self._consumed = 0
        self._command_at: int | None = None
        self._blocks: dict[str, Block] = {}
        self._block: Block | None = None
        self._in_device_state = False
        self._tail = bytearray()
        self._steps = self._parse()

    @property
    def position(self) -> int:
        """Bytes read so far; while `events` goes on, the end of the event that it gave."""
        return self._consumed + self._position

    @property
    def settled(self) -> int:
        """As `position`, without the beginning of a command whose end has not come."""
        return self.position if self._command_at is None else self._command_at

    def feed(self, data: bytes) -> None:
        """Add bytes; `events` says what they complete."""
        if self._position:
            del self._buffer[: self._position]
            self._consumed += self._position
            self._position = 0
        self._buffer += data

    def events(self) -> Iterator[Event]:
        """What the bytes so far complete.  Raises PeerError where they are not a migration."""
        for event in self._steps:
            if event is None:
                return
            yield event

    @property
    def complete(self) -> bool:
        """Whether the stream so far ends with its description."""
        return self.description is not None

    def end(self, *, description_required: bool = True) -> None:
        """The connection ended.  Raises PeerError unless it may end here.

        Device state cut at a zero byte looks like a stream that never had a description, so
        one without is refused unless it is not required.
        """
        if self.complete:
            return
        at = self._consumed + len(self._buffer)
        if not self._in_device_state:
            raise PeerError(f"the stream ended at byte {at}, before the RAM sections were complete")
        if description_required:
            raise PeerError(
                f"the stream ended at byte {at} without its VM description, so device state may be cut: if the "
                "source runs with suppress-vmdesc=on, allow it with --no-description"
            )
        if not self._tail or self._tail[-1] != Section.EOF:
            raise PeerError(f"the stream ended at byte {at}, inside the device state")

    # A coroutine that reads like the format: it yields events, and None for "more data".
    _Steps = Generator[Event | None, None, None]

    def _take(self, count: int) -> Generator[None, None, bytes]:
        while len(self._buffer) - self._position < count:
            yield None
        start = self._position
        self._position += count
        return bytes(self._buffer[start : self._position])

    def _unpack(self, layout: struct.Struct) -> Generator[None, None, tuple[Any, ...]]:
        data = yield from self._take(layout.size)
        return layout.unpack(data)

    def _number(self, layout: struct.Struct) -> Generator[None, None, int]:
        (number,) = yield from self._unpack(layout)
        return int(number)

    def _byte(self) -> Generator[None, None, int]:
        data = yield from self._take(1)
        return data[0]

    def _kind(self) -> Generator[None, None, int]:
        """The byte that opens the next part."""
        self.inside = False
        kind = yield from self._byte()
        self.inside = True
        return kind

    def _name(self) -> Generator[None, None, str]:
        length = yield from self._byte()
        data = yield from self._take(length)
        return data.decode("ascii", "backslashreplace")

    def _wrong(self, text: str, kind: type[PeerError] = PeerError) -> PeerError:
        return kind(f"at byte {self.position}: {text}")

    def _parse(self) -> _Steps:
        magic, version = yield from self._unpack(FILE_HEADER)
        if magic != VM_FILE_MAGIC:
            raise self._wrong(f"magic {magic:#010x} instead of {VM_FILE_MAGIC:#010x} (QEVM): not a migration stream")
        if version != VM_FILE_VERSION:
            raise self._wrong(f"migration stream version {version}, this side knows {VM_FILE_VERSION}")
        kind = yield from self._configuration()
        ram_id = None
        while True:
            if kind == Section.COMMAND:
                yield from self._command()
            elif kind == Section.START and ram_id is None:
                ram_id = yield from self._ram_start()
                yield from self._ram_body(ram_id, first=True)
            elif kind in (Section.PART, Section.END) and ram_id is not None:
                section = yield from self._number(U32)
                if section != ram_id:
                    raise self._wrong(f"section {section} is not RAM's ({ram_id}) and cannot be delimited")
                yield from self._ram_body(ram_id)
                if kind == Section.END:
                    break
            else:
                yield from self._refuse_section(kind)
            kind = yield from self._kind()
        self.inside = False
        self._in_device_state = True
        yield RamEnd()
        while True:
            while self._position == len(self._buffer):
                yield None
            data = bytes(self._buffer[self._position :])
            self._position = len(self._buffer)
            self._look_for_description(data)
            yield DeviceState(data)

    def _configuration(self) -> Generator[Event | None, None, int]:
        """The configuration section; returns the byte after it, which opens the next."""
        kind = yield from self._kind()
        if kind != Section.CONFIGURATION:
            raise self._wrong(f"section type {kind:#04x} where the configuration should be: machine with no type?")
        length = yield from self._number(U32)
        if length > MAX_MACHINE_NAME:
            raise self._wrong(f"a machine type of {length} bytes")
        name = yield from self._take(length)
        raw = bytearray([kind]) + U32.pack(length) + name
        page_size = uuid = None
        while (kind := (yield from self._kind())) == Section.SUBSECTION:
            subsection = yield from self._name()
            version = yield from self._number(U32)
            if version != 1:
                raise self._wrong(f"{subsection} has version {version}, this side knows 1")
            if subsection == "configuration/target-page-bits":
                bits = yield from self._number(U32)
                if bits > 63 or 1 << bits not in PAGE_SIZES:
                    raise self._wrong(f"a page size of 2^{bits} bytes")
                page_size = self.page_size = 1 << bits
                content = U32.pack(bits)
            elif subsection == "configuration/uuid":
                content = uuid = yield from self._take(16)
            elif subsection == "configuration/capabilities":
                yield from self._refuse_capabilities()
            else:
                raise self._wrong(f"subsection {subsection!r} of the configuration is unknown")
            raw += bytes([Section.SUBSECTION, len(subsection)]) + subsection.encode() + U32.pack(1) + content
        yield Configuration(name.decode("ascii", "backslashreplace"), page_size, uuid, bytes(raw))
        return kind

    def _refuse_capabilities(self) -> Generator[None, None, None]:
        count = yield from self._number(U32)
        names: list[str] = []
        while len(names) < min(count, 8):
            names += [(yield from self._name())]
        text = f"the source has {' and '.join(names)} on, which leave memory out: turn it off there"
        raise self._wrong(text, Unsupported)

    def _command(self) -> _Steps:
        self._command_at = self.position - 1  # its section's type is read
        number, length = yield from self._unpack(COMMAND_HEAD)
        if 3 <= number <= 10:
            what = "COLO" if number == 8 else f"postcopy: {_POSTCOPY}"
            raise self._wrong(f"command {number} belongs to {what}", Unsupported)
        wanted = COMMAND_LENGTHS.get(number)
        if wanted is not None and length != wanted:
            raise self._wrong(f"command {number} with {length} bytes of data, not {wanted}")
        data = yield from self._take(length)
        self._command_at = None
        yield CommandReceived(number, data)

    def _refuse_section(self, kind: int) -> _Steps:
        if kind in (Section.START, Section.FULL):
            section, name, _, _ = yield from self._section_head()
            raise self._wrong(
                f"section {section} ({name}) before RAM is complete: devices with live sections of their own "
                "(VFIO, block migration, dirty bitmaps) cannot be delimited",
                Unsupported,
            )
        if kind == Section.EOF:
            raise self._wrong("the source ended the stream before RAM was complete: did it fail or cancel?")
        raise self._wrong(f"section type {kind:#04x} is not expected here")

    def _section_head(self) -> Generator[None, None, tuple[int, str, int, int]]:
        section = yield from self._number(U32)
        name = yield from self._name()
        instance, version = yield from self._unpack(SECTION_HEAD)
        return section, name, instance, version

    def _ram_start(self) -> Generator[Event | None, None, int]:
        section, name, instance, version = yield from self._section_head()
        if name != "ram" or instance:
            raise self._wrong(f"the first section is {name!r} instance {instance}, not ram: it cannot be delimited")
        if version != RAM_VERSION:
            raise self._wrong(f"ram section version {version}, this side knows {RAM_VERSION}")
        return section

    def _ram_body(self, section: int, *, first: bool = False) -> _Steps:
        """The words of one RAM section, to its EOS and footer."""
        while True:
            word = yield from self._number(WORD)
            flags = word & (self.page_size - 1)
            address = word - flags
            if flags == EOS:
                break
            if flags == FLUSH:
                self.sync = self.sync or "round"
                yield SyncPoint()
            elif flags & ~CONTINUE in (ZERO, PAGE):
                if not flags & CONTINUE:
                    name = yield from self._name()
                    self._block = self._blocks.get(name)
                    if self._block is None:
                        raise self._wrong(f"a page of RAM block {name!r}, which the source did not list")
                yield from self._page(address, zero=bool(flags & ZERO))
            elif flags == MEM_SIZE and first and not self._blocks:
                yield from self._block_list(address)
            else:
                raise self._wrong(f"RAM flags {flags:#x} are unknown here")
        if first and not self._blocks:
            raise self._wrong("the first RAM section lists no blocks")
        if self.sync != "round":
            self.sync = "section"
            yield SyncPoint()
        kind, footer = yield from self._unpack(struct.Struct(">BI"))
        if kind != Section.FOOTER or footer != section:
            raise self._wrong(f"a footer of section {section} should be here, not {kind:#04x} {footer}")

    def _page(self, address: int, *, zero: bool) -> _Steps:
        block = self._block
        if block is None:
            raise self._wrong("a page that goes on in the block of the page before it, and there was none")
        if not zero:
            data = yield from self._take(self.page_size)
            self._check(block, (address,))
            yield PageData(block.idstr, address, data)
            return
        fill = yield from self._byte()
        if fill:
            raise self._wrong(f"a page filled with {fill:#04x}: only zero is sent this way")
        offsets = [address]
        # Words of one block follow each other by the thousand: read all that are here at once.
        plain = ZERO | CONTINUE
        mask = self.page_size - 1
        ready = min((len(self._buffer) - self._position) // ZERO_WORD.size, ZERO_BATCH)
        end = self._position + ready * ZERO_WORD.size
        for word, fill in ZERO_WORD.iter_unpack(self._buffer[self._position : end]):
            if fill or word & mask != plain:
                break
            offsets.append(word - plain)
        self._position += (len(offsets) - 1) * ZERO_WORD.size
        self._check(block, offsets)
        yield ZeroPages(block.idstr, tuple(offsets))

    def _check(self, block: Block, offsets: Sequence[int]) -> None:
        # An address in a word is a multiple of the page size by its layout.
        if max(offsets) + self.page_size > block.used_length:
            try:
                check_offset(block, max(offsets), self.page_size)
            except PeerError as error:
                raise self._wrong(str(error)) from None

    def _block_list(self, total: int) -> _Steps:
        blocks: list[Block] = []
        while total > 0:
            name = yield from self._name()
            length = yield from self._number(WORD)
            if length > total or len(blocks) == MAX_BLOCKS:
                raise self._wrong(f"RAM block {name!r} of {length} bytes: the list does not add up to its total")
            total -= length
            blocks.append(Block(name, length))
        try:
            check_blocks(blocks, self.page_size)
        except PeerError as error:
            raise self._wrong(str(error)) from None
        self._blocks = {block.idstr: block for block in blocks}
        yield BlockList(tuple(blocks))

    def _look_for_description(self, data: bytes) -> None:
        self.description = None
        self._tail += data
        if len(self._tail) > 2 * MAX_DESCRIPTION:
            del self._tail[:-MAX_DESCRIPTION]
        if self._tail[-1:] == b"}":
            self.description = find_description(self._tail)


def find_description(tail: bytes | bytearray) -> dict[str, Any] | None:
    """The VM description where `tail` ends with one: EOF, 06, length, JSON, and nothing more.

    Device state has no length of its own, so this looks from the end; JSON holds no zero byte,
    so the last `00 06` is the right one or lies inside the length.
    """
    head = bytes([Section.EOF, Section.VMDESCRIPTION])
    position = len(tail)
    for _ in range(4):
        position = tail.rfind(head, 0, position + 1)
        if position < 0:
            return None
        text = position + len(head) + U32.size
        if text < len(tail) and text + U32.unpack_from(tail, text - U32.size)[0] == len(tail):
            try:
                found = json.loads(tail[text:])
            except (ValueError, RecursionError):  # no JSON, or nested deeper than anybody's
                return None
            return found if isinstance(found, dict) else None
    return None
