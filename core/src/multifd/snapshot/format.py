"""A snapshot on disk: one sparse file per RAM block, the device state, and snapshot.json.

    DIR/snapshot.json        format, uuid, machine, page_size, sync, blocks, files, transfer, disks, digests
    DIR/0-pc.ram.raw         RAM block 0, as long as the block, holes where pages are zero
    DIR/configuration.bin    the main channel's configuration section, as it came
    DIR/device_state.bin     what followed the RAM sections, as it came, description included
    DIR/early_*.bin          format 2: sections other than RAM's that came before RAM was complete, by where they came
    DIR/pieces.bin           the digests of all files' pieces (`multifd.snapshot.digests`)

It is written under another name beside its own and renamed when all of it is on disk; digests follow.
"""

from __future__ import annotations

import json
import re
import uuid as uuids
from dataclasses import dataclass
from typing import Any, TypeVar

from multifd.errors import CallerError, PeerError
from multifd.log import escaped
from multifd.snapshot.directory import Directory
from multifd.snapshot.disks import Disk
from multifd.wire.block import MAX_LENGTH, Block, check_blocks
from multifd.wire.document import is_text, parse_document
from multifd.wire.events import Place
from multifd.wire.packet import PAGE_SIZES

#: What is written where a reader needs nothing more, and what else is read: `needs` names what it needs then.
FORMAT = 1
WITH_NEEDS = 2
EARLY = "early-sections"
INDEX = "snapshot.json"
CONFIGURATION = "configuration.bin"
DEVICE_STATE = "device_state.bin"
EARLY_STATE = "early_{}.bin"
SYNC_MODES = ("section", "round")
#: Bytes; with the 4096 blocks that a stream may have, it is some 2 MiB long.
MAX_INDEX = 16 << 20
#: What `transfer` counts, and somebody looks at.
_COUNTS = {
    *("channels", "packets", "normal_pages", "zero_pages", "wire_bytes", "memory_bytes", "rounds", "sync_points"),
}

T = TypeVar("T")
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Early:
    """The early sections: the files of those that came at each place, and the number that RAM's sections had."""

    files: dict[Place, str]
    ram_section: int


@dataclass(frozen=True, slots=True)
class Index:
    """What snapshot.json says, checked; `whole` is all of it, unknown keys too.

    `files` are the RAM blocks' names of files, in the blocks' order.
    """

    whole: dict[str, Any]
    uuid: bytes
    machine: str
    page_size: int
    sync: str
    blocks: tuple[Block, ...]
    files: tuple[str, ...]
    configuration: str
    device_state: str
    early: Early | None
    #: The guest's when it was taken; None where nobody knows.
    disks: tuple[Disk, ...] | None

    @property
    def format(self) -> int:
        """The number of the format."""
        return FORMAT if self.early is None else WITH_NEEDS

    @property
    def others(self) -> list[str]:
        """The files that are no block's: the configuration's, the device state's, the early sections'."""
        return [self.configuration, self.device_state, *(self.early.files.values() if self.early is not None else ())]

    @property
    def names(self) -> list[str]:
        """Of all files, in the order of their digests: first the blocks'."""
        return [*self.files, *self.others]


def _load(directory: Directory) -> dict[str, Any]:
    """snapshot.json as it is.  Raises CallerError where there is none, or it is no JSON object."""
    path = directory.path / INDEX
    try:
        found = parse_document(directory.read(INDEX, MAX_INDEX))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise CallerError(f"{path} is damaged: {error}") from error
    except CallerError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CallerError(f"{directory.path} holds no {INDEX}: it is not a snapshot") from None
        raise
    return found


def store_index(directory: Directory, index: dict[str, Any]) -> None:
    """Replace snapshot.json at once.  What was read from it is written back, unknown keys too.  Raises OSError."""
    directory.write_whole(INDEX, (json.dumps(index, indent=2) + "\n").encode())


def read_index(directory: Directory) -> Index:
    """snapshot.json, with every value checked that is used.  Raises CallerError."""
    whole = _load(directory)
    path = directory.path / INDEX
    try:
        number = get(whole, "format", int)
        if number not in (FORMAT, WITH_NEEDS):
            raise CallerError(f"{path} has format {str(number)[:20]}, this multifd reads 1 and 2: upgrade it")
        needs = get(whole, "needs", list) if number == WITH_NEEDS else []
        if unknown := [need for need in needs if need != EARLY]:
            what = escaped(str(unknown[0])[:40])
            raise CallerError(f"{path} needs {what}, which this multifd does not know: upgrade it")
        return _checked(whole, early=EARLY in needs)
    except (ValueError, PeerError) as error:
        raise CallerError(f"{path} is damaged: {error}") from error


def _checked(whole: dict[str, Any], *, early: bool) -> Index:
    entries = get(whole, "blocks", list)
    blocks, files = [], []
    for number, entry in enumerate(entries):
        where = f"blocks[{number}]."
        idstr = get(entry, "idstr", str, where)
        if not idstr.isascii() or not 0 < len(idstr) < 256:
            raise ValueError(f"{where}idstr is not 1 to 255 ASCII characters")
        blocks.append(Block(idstr, get(entry, "used_length", int, where)))
        files.append(_name(entry, "file", where))
        get_digest(entry, "sha256", where)
    found = Index(
        whole,
        uuids.UUID(get(whole, "uuid", str)).bytes,
        get(whole, "machine", str),
        get(whole, "page_size", int),
        get(whole, "sync", str),
        tuple(blocks),
        tuple(files),
        _name(whole, "configuration"),
        _name(whole, "device_state"),
        _early(whole) if early else None,
        _disks(whole),
    )
    if found.page_size not in PAGE_SIZES or found.sync not in SYNC_MODES or not blocks:
        raise ValueError("page_size, sync or blocks make no sense")
    if len(found.machine) > 1024 or not is_text(found.machine):
        raise ValueError("machine is no machine type's name")
    if not all(0 < block.used_length <= MAX_LENGTH for block in blocks):
        raise ValueError("a used_length is no file's")
    check_blocks(blocks, found.page_size)
    transfer = get(whole, "transfer", dict) if "transfer" in whole else {}
    for key in transfer.keys() & _COUNTS:
        if not 0 <= get(transfer, key, int, "transfer.") < 1 << 64:
            raise ValueError(f"transfer.{key} is no count")
    for key, kind in (("compressor", str), ("description", bool)):
        if key in transfer:
            get(transfer, key, kind, "transfer.")
    names = [*found.names, INDEX]
    if len({*names}) != len(names):
        raise ValueError("two of its files have one name")
    return found


def _early(whole: dict[str, Any]) -> Early:
    entry = get(whole, "early_sections", dict)
    where = "early_sections."
    ram_section = get(entry, "ram_section", int, where)
    if not 0 <= ram_section < 1 << 32:
        raise ValueError(f"{where}ram_section makes no sense")
    return Early({place: _name(entry, place.value, where) for place in Place if place.value in entry}, ram_section)


def _disks(whole: dict[str, Any]) -> tuple[Disk, ...] | None:
    if "disks" not in whole:
        return None
    found = []
    for number, entry in enumerate(get(whole, "disks", list)):
        where = f"disks[{number}]."
        file, format_, node, device = (get(entry, key, str, where) for key in ("file", "format", "node", "device"))
        found.append(Disk(file, format_, node, device, get(entry, "read_only", bool, where)))
    return tuple(found)


def get(entry: object, key: str, kind: type[T], where: str = "") -> T:
    """A value of an object of snapshot.json, of exactly this type: True is no number.  Raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where.removesuffix('.')} is no object")
    if key not in entry:
        raise ValueError(f"{where}{key} is missing")
    value = entry[key]
    if type(value) is not kind:
        raise ValueError(f"{where}{key} is of type {type(value).__name__}, not {kind.__name__}")
    return value


def get_digest(entry: object, key: str, where: str = "") -> str | None:
    """A SHA-256 in hexadecimal; None where there is none.  Raises ValueError."""
    if not isinstance(entry, dict) or entry.get(key) is None:
        return None
    text = get(entry, key, str, where)
    if not _DIGEST.fullmatch(text):
        raise ValueError(f"{where}{key} is no SHA-256")
    return text


def _name(entry: object, key: str, where: str = "") -> str:
    """A file's name, which leads nowhere but into the directory."""
    name = get(entry, key, str, where)
    if name in ("", ".", "..") or "/" in name or "\0" in name or len(name) > 255 or not is_text(name):
        raise ValueError(f"{where}{key} is no name of a file")
    return name
