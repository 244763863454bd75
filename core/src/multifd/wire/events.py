"""What the main channel says, as `mainchannel.Parser` gives it."""

from __future__ import annotations

from dataclasses import dataclass

from multifd.wire.block import Block


@dataclass(frozen=True, slots=True)
class Configuration:
    """The stream's head: machine type, page size (None where the stream names none), uuid.

    `raw` are its bytes as they came, the configuration byte included, the file header not.
    """

    machine: str
    page_size: int | None
    uuid: bytes | None
    raw: bytes


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


@dataclass(frozen=True, slots=True)
class RamEnd:
    """The RAM sections are complete; what follows is device state."""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """Bytes after the RAM sections, as they came."""

    data: bytes


Event = Configuration | CommandReceived | BlockList | ZeroPages | PageData | SyncPoint | RamEnd | DeviceState
