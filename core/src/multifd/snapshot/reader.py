"""A snapshot, or a raw memory image, open to be read."""

from __future__ import annotations

import os
import stat
import uuid as uuids
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from multifd.errors import CallerError, HostError, os_errors
from multifd.snapshot.format import FORMAT, INDEX, SYNC_MODES, read_index
from multifd.wire.block import Block
from multifd.wire.flags import DEFAULT_PAGE_SIZE
from multifd.wire.packet import PAGE_SIZES


class BlockReader:
    """A RAM block's file, open for reading; any thread may read, until it is closed."""

    def __init__(self, block: Block, path: Path) -> None:
        """Raises CallerError where the file cannot be opened."""
        self.block = block
        self.path = path
        with os_errors(path, CallerError):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the block's bytes from `offset` on.  Raises HostError.

        Read, not mapped: a mapped file that shrinks or fails kills the process with SIGBUS.
        """
        done = 0
        while done < len(buffer):
            at = offset + done
            with os_errors(f"{self.path} cannot be read at byte {at}"):
                count = os.preadv(self._fd, [buffer[done:]], at)
            if not count:
                raise HostError(
                    f"{self.path} shrank to {at} bytes while it was read; it had {self.block.used_length}: nothing was "
                    "confirmed, start again"
                )
            done += count

    def next_data(self, offset: int) -> int:
        """Where the first byte at or after `offset` is that is not in a hole; the block's length where none is."""
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError:
            # Past the last data, or a file system that knows no holes: then look at everything.
            try:
                end = os.lseek(self._fd, 0, os.SEEK_END)
                os.lseek(self._fd, offset, os.SEEK_HOLE)
            except OSError:
                return offset
            return self.block.used_length if end >= self.block.used_length else offset


@dataclass(frozen=True)
class SnapshotBlock:
    """A RAM block and the file that holds its pages."""

    block: Block
    path: Path

    def open(self) -> BlockReader:
        """For reading, in a `with`.  Raises CallerError."""
        return BlockReader(self.block, self.path)


@dataclass(frozen=True)
class Snapshot:
    """Memory that can be sent or looked into: a snapshot's, or one raw image's.

    `uuid` are 16 bytes; `configuration` and `device_state` are the recorded ones, None for a raw image; `sync` is the
    mode that the snapshot was received in; `index` is snapshot.json.
    """

    path: Path
    blocks: tuple[SnapshotBlock, ...]
    page_size: int = DEFAULT_PAGE_SIZE
    uuid: bytes = bytes(16)
    machine: str = ""
    sync: str = "round"
    configuration: bytes | None = None
    device_state: Path | None = None
    index: dict[str, Any] = field(default_factory=dict)

    @property
    def memory_bytes(self) -> int:
        """All blocks' lengths together."""
        return sum(item.block.used_length for item in self.blocks)


def open_snapshot(path: str | Path, *, block: str = "pc.ram", page_size: int | None = None) -> Snapshot:
    """Open a snapshot's directory, or a raw image, which becomes the one block named `block`.

        snapshot = multifd.open_snapshot("snap")
        for item in snapshot.blocks:
            print(item.block.idstr, item.block.used_length)

    `page_size`, in bytes, is for raw images; a snapshot says its own.  Raises CallerError for what is
    neither, for an image that is empty or not a multiple of the page size.
    """
    path = Path(path)
    with os_errors(path, CallerError):
        is_directory = path.is_dir()
    if is_directory:
        snapshot = _open_directory(path)
        if page_size not in (None, snapshot.page_size):
            raise CallerError(
                f"{path} has pages of {snapshot.page_size} bytes, not {page_size}: leave the page size out"
            )
        return snapshot
    page_size = page_size or DEFAULT_PAGE_SIZE
    length = _file_length(path)
    if not length:
        raise CallerError(f"{path} is empty: there is no memory to send")
    if length % page_size:
        raise CallerError(
            f"{path} has {length} bytes, which is not a multiple of the page size {page_size} "
            f"({length % page_size} too many): is it a whole memory image?"
        )
    return Snapshot(path, (SnapshotBlock(Block(block, length), path),), page_size)


def _file_length(path: Path) -> int:
    with os_errors(path, CallerError), open(path, "rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise CallerError(f"{path} is neither a file nor a block device nor a snapshot's directory")
        return file.seek(0, os.SEEK_END)


def _open_directory(path: Path) -> Snapshot:
    index = read_index(path)
    index_path = path / INDEX
    try:
        if index["format"] != FORMAT:
            raise CallerError(f"{index_path} has format {index['format']!r}, this multifd reads {FORMAT}: upgrade it")
        blocks = tuple(
            SnapshotBlock(Block(entry["idstr"], entry["used_length"]), path / Path(entry["file"]).name)
            for entry in index["blocks"]
        )
        configuration = path / Path(index["configuration"]).name
        with os_errors(configuration, CallerError):
            recorded = configuration.read_bytes()
        snapshot = Snapshot(
            path,
            blocks,
            index["page_size"],
            uuids.UUID(index["uuid"]).bytes,
            index["machine"],
            index["sync"],
            recorded,
            path / Path(index["device_state"]).name,
            index,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CallerError(f"{index_path} is damaged: {type(error).__name__} {error}") from error
    if snapshot.page_size not in PAGE_SIZES or snapshot.sync not in SYNC_MODES or not blocks:
        raise CallerError(f"{index_path} is damaged: page_size, sync or blocks make no sense")
    for item in blocks:
        length = _file_length(item.path)
        if length != item.block.used_length:
            raise CallerError(f"{item.path} has {length} bytes, {INDEX} says {item.block.used_length}")
    return snapshot
