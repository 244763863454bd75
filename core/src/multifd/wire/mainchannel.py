"""The main channel: a parser and a writer that do no I/O.

    parser = Parser()
    parser.feed(data)  # any piece of the stream
    for event in parser.events():  # all that is complete; it stops where more data is needed
        print(type(event).__name__)
    parser.end()  # the connection ended: was that allowed?

All integers are big-endian.  Checked against QEMU 7.2.22, 10.0.13 and 11.1.3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from multifd.errors import PeerError
from multifd.wire.configuration import read_configuration
from multifd.wire.cursor import Cursor, Unsupported
from multifd.wire.early import Body, body_of, told
from multifd.wire.events import CommandReceived, DeviceState, EarlyState, Event, Opaque, Place, RamEnd
from multifd.wire.flags import DEFAULT_PAGE_SIZE, VM_FILE_MAGIC, VM_FILE_VERSION, Command, Section
from multifd.wire.layout import COMMAND_HEAD, FILE_HEADER, SECTION_HEAD, U32, WORD
from multifd.wire.ramsections import RamSections, Steps, read_footer

#: Bytes of data of the commands known here.
COMMAND_LENGTHS: dict[int, tuple[int, ...]] = {
    Command.OPEN_RETURN_PATH: (0,),
    Command.PING: (4,),
    Command.POSTCOPY_ADVISE: (0, 16),
    Command.SWITCHOVER_START: (0,),
}
#: Sections beside RAM's that may go on at a time; QEMU has one for each kind.
MAX_LIVE = 64
#: A description longer than this is not looked for (QEMU's are some 10 KiB to a few 100 KiB).
MAX_DESCRIPTION = 16 << 20

_POSTCOPY = "turn postcopy-ram off on the source (receive --qmp does), this side cannot take it"


class Parser:
    """Reads a main channel from its first byte.

    `sync` is the mode once the first RAM section told it: `round` where it holds
    MULTIFD_FLUSH (machine types 8.1 and newer), else `section`.  `description` is the VM
    description once the stream has come to its end.  `ram_section` is the number of RAM's sections.
    """

    def __init__(self, page_size: int | None = None, *, passes: bool = False) -> None:
        """`page_size`, in bytes, is assumed where the stream tells none.

        Where it `passes`, what cannot be taken is no error but an event, `Opaque`: what follows is read no further.
        """
        self.page_size = page_size or DEFAULT_PAGE_SIZE
        self.description: dict[str, Any] | None = None
        self._asked = page_size
        self._passes = passes
        self._cursor = Cursor()
        self._ram = RamSections(self._cursor)
        self._live: dict[int, Body] = {}
        self._command_at: int | None = None
        self._postcopy = False
        self._last = False
        self._tail = bytearray()
        self._steps = self._parse()

    @property
    def inside(self) -> bool:
        """Whether the bytes so far end inside something, so that more is due; elsewhere a source may be silent."""
        return self._cursor.inside

    @property
    def sync(self) -> str:
        """See the class."""
        return self._ram.sync

    @property
    def ram_section(self) -> int | None:
        """See the class."""
        return self._ram.section

    @property
    def position(self) -> int:
        """Bytes read so far; while `events` goes on, the end of the event that it gave."""
        return self._cursor.offset

    @property
    def settled(self) -> int:
        """As `position`, without the beginning of a command whose end has not come."""
        return self.position if self._command_at is None else self._command_at

    def feed(self, data: bytes) -> None:
        """Add bytes; `events` says what they complete."""
        self._cursor.feed(data)

    def events(self) -> Iterator[Event]:
        """What the bytes so far complete.  Raises PeerError where they are not a migration, or one of another kind."""
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
        at = self._cursor.fed
        if not self._last:
            raise PeerError(f"the stream ended at byte {at}, before the RAM sections were complete")
        if description_required:
            raise PeerError(
                f"the stream ended at byte {at} without its VM description, so device state may be cut: if the "
                "source runs with suppress-vmdesc=on, allow it with --no-description"
            )
        if not self._tail or self._tail[-1] != Section.EOF:
            raise PeerError(f"the stream ended at byte {at}, inside the device state")

    def _parse(self) -> Steps:
        cursor = self._cursor
        try:
            yield from self._parts()
            last: Event = RamEnd()
        except Unsupported as why:
            if not self._passes:
                raise
            last = Opaque(str(why), self._postcopy)
        self._command_at = None
        self._last = True
        cursor.inside = False
        yield last
        while True:
            while cursor.position == len(cursor.buffer):
                yield None
            data = cursor.rest()
            if not self._postcopy:  # there is none then, and pages may look like one
                self._look_for_description(data)
            yield DeviceState(data)

    def _parts(self) -> Steps:
        """All that comes before RAM is complete."""
        cursor, ram = self._cursor, self._ram
        magic, version = yield from cursor.unpack(FILE_HEADER)
        if magic != VM_FILE_MAGIC:
            raise cursor.wrong(f"magic {magic:#010x} instead of {VM_FILE_MAGIC:#010x} (QEVM): not a migration stream")
        if version != VM_FILE_VERSION:
            raise cursor.wrong(f"migration stream version {version}, this side knows {VM_FILE_VERSION}")
        configuration, kind = yield from read_configuration(cursor)
        self.page_size = configuration.page_size or self._asked or DEFAULT_PAGE_SIZE
        yield configuration
        if configuration.capabilities:
            names = " and ".join(configuration.capabilities)
            raise cursor.wrong(f"the source has {names} on, which leave memory out: turn it off there", Unsupported)
        place = Place.BEFORE_RAM
        while True:
            if kind == Section.COMMAND:
                yield from self._command()
            elif kind in (Section.START, Section.FULL, Section.PART, Section.END):
                cursor.keep(bytes([kind]))
                section = yield from cursor.number(U32)
                if kind in (Section.START, Section.FULL):
                    name = yield from cursor.name()
                    instance, version = yield from cursor.unpack(SECTION_HEAD)
                    if name == "ram" and kind == Section.START:
                        cursor.keep_no_more()
                        yield from ram.start(section, instance, version, self.page_size, taken=section in self._live)
                        place = Place.IN_RAM
                    else:
                        self._begin(section, name)
                        yield from self._early(section, place)
                elif section == ram.section:
                    cursor.keep_no_more()
                    yield from ram.read(self.page_size)
                    if kind == Section.END:
                        return
                elif section in self._live:
                    yield from self._early(section, place)
                else:
                    raise cursor.wrong(f"section {section} goes on, and never began")
                if kind in (Section.FULL, Section.END):
                    self._live.pop(section, None)
            elif kind == Section.EOF:
                raise cursor.wrong("the source ended the stream before RAM was complete: did it fail or cancel?")
            else:
                raise cursor.wrong(f"section type {kind:#04x} is not expected here")
            kind = yield from cursor.kind()

    def _begin(self, section: int, name: str) -> None:
        """A section that is not RAM's.  Raises Unsupported where nobody knows its layout."""
        body = body_of(name)
        if body is None:
            raise self._cursor.wrong(f"section {section} ({name}) before RAM is complete: {told(name)}", Unsupported)
        if len(self._live) == MAX_LIVE:
            raise self._cursor.wrong(f"more than {MAX_LIVE} sections beside RAM's")
        if section in self._live or section == self._ram.section:
            raise self._cursor.wrong(f"section {section} ({name}) has the number of another one")
        self._live[section] = body

    def _early(self, section: int, place: Place) -> Steps:
        """What is left of one, to its footer."""
        cursor = self._cursor
        for _ in self._live[section](cursor):
            if data := cursor.kept():
                yield EarlyState(place, data)
            yield None
        yield from read_footer(cursor, section)
        yield EarlyState(place, cursor.kept())
        cursor.keep_no_more()

    def _command(self) -> Steps:
        cursor = self._cursor
        self._command_at = self.position - 1  # its section's type is read
        number, length = yield from cursor.unpack(COMMAND_HEAD)
        wanted = COMMAND_LENGTHS.get(number)
        if wanted is not None and length not in wanted:
            wants = " or ".join(map(str, wanted))
            raise cursor.wrong(f"command {number} with {length} bytes of data, not {wants}")
        begins = 4 <= number <= 10 or (number == Command.POSTCOPY_ADVISE and length > 0)
        if begins and not (self._passes and number in (Command.POSTCOPY_ADVISE, Command.POSTCOPY_DISCARD)):
            self._postcopy = number in (Command.POSTCOPY_LISTEN, Command.POSTCOPY_RUN, Command.PACKAGED)
            remedy = "the guest is to go on at the destination" if self._postcopy and self._passes else _POSTCOPY
            what = "COLO" if number == Command.COLO else f"postcopy: {remedy}"
            raise cursor.wrong(f"command {number} belongs to {what}", Unsupported)
        data = yield from cursor.take(length)
        self._command_at = None
        yield CommandReceived(number, data)
        if number == Command.POSTCOPY_ADVISE and length and WORD.unpack_from(data)[0] != self.page_size:
            # Then the block list has another layout, of which nothing tells for which blocks.
            raise cursor.wrong("postcopy of memory in huge pages", Unsupported)

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
