"""What the main channel says, as `mainchannel.Parser` gives it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from multifd.wire.block import Block


@dataclass(frozen=True, slots=True)
class Configuration:
    """The stream's head: machine type, page size (None where neither the stream nor the machine type tells it), uuid.

    `raw` are its bytes as they came, the configuration byte included, the file header not.  `capabilities` are those
    of the source's that change the layout of what follows.
    """

    machine: str
    page_size: int | None
    uuid: bytes | None
    raw: bytes
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CommandReceived:
    """A command: `Command.OPEN_RETURN_PATH`, `PING` with 4 bytes of data, or one to skip."""

    number: int
    data: bytes


@dataclass(frozen=True, slots=True)
class BlockList:
    """The RAM blocks, in the source's order."""

    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class ZeroPages:
    """ZERO words: pages of one block that are all zero."""

    idstr: str
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PageData:
    """A PAGE word: one page with its content."""

    idstr: str
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class SyncPoint:
    """The marker that belongs to the next SYNC of every multifd channel."""


class Place(Enum):
    """Where a section that is not RAM's came, and has to be sent again."""

    BEFORE_RAM = "before_ram"
    #: Behind RAM's first section, before its last one.
    IN_RAM = "in_ram"


@dataclass(frozen=True, slots=True)
class EarlyState:
    """Bytes of sections other than RAM's that came before RAM was complete: whole ones, head and footer included."""

    place: Place
    data: bytes


@dataclass(frozen=True, slots=True)
class Opaque:
    """From here on the stream cannot be read, and why; what follows comes as device state does.

    Where it is `postcopy`, the guest is about to run at the destination, and its memory is in two places.
    """

    why: str
    postcopy: bool


@dataclass(frozen=True, slots=True)
class RamEnd:
    """The RAM sections are complete; what follows is device state."""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """Bytes after the RAM sections, or after `Opaque`, as they came."""

    data: bytes


Event = (
    Configuration
    | CommandReceived
    | BlockList
    | ZeroPages
    | PageData
    | SyncPoint
    | EarlyState
    | Opaque
    | RamEnd
    | DeviceState
)
