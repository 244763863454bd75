"""A snapshot, or a raw memory image, open to be read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from multifd.errors import CallerError, os_errors
from multifd.snapshot.digests import (
    PIECE,
    Digests,
    Pieces,
    load_pieces,
    manifest_digest,
    read_digests,
)
from multifd.snapshot.directory import Directory, next_data, open_file, read_into
from multifd.snapshot.disks import Disk
from multifd.snapshot.foreign import HEAD, foreign
from multifd.snapshot.format import INDEX, Early, Index, read_index
from multifd.wire.block import Block
from multifd.wire.events import Place
from multifd.wire.flags import DEFAULT_PAGE_SIZE

#: Bytes; QEMU's are some hundred.
MAX_CONFIGURATION = 64 << 10


class BlockReader:
    """A RAM block's file, open for reading; any thread may read, until it is closed."""

    def __init__(self, block: Block, path: Path, fd: int, pieces: Pieces | None = None) -> None:
        """`fd` is the file's, and closed with this; `pieces` are what `read_piece` checks."""
        self.block = block
        self.path = path
        self._fd = fd
        self._pieces = pieces
        with suppress(OSError):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the block's bytes from `offset` on.  Raises HostError."""
        read_into(self._fd, offset, buffer, self.path, self.block.used_length)

    def read_piece(self, offset: int, buffer: memoryview) -> None:
        """The same for a whole piece; raises HostError, too, where it is not what was received."""
        read_into(self._fd, offset, buffer, self.path, self.block.used_length)
        if self._pieces is not None:
            self._pieces.check(offset, buffer)

    def check_hole(self, offset: int, length: int) -> None:
        """A piece that lies in a hole, and is not read.  Raises HostError where it was none."""
        if self._pieces is not None:
            self._pieces.check_hole(offset, length)

    def next_data(self, offset: int) -> int:
        """Where the first byte at or after `offset` is that is not in a hole; the block's length where none is."""
        return next_data(self._fd, offset, self.block.used_length)


@dataclass(frozen=True)
class SnapshotBlock:
    """A RAM block and the file that holds its pages; `directory` is the snapshot's, None for an image."""

    block: Block
    path: Path
    directory: Directory | None = None

    def stored_bytes(self) -> int:
        """What the file takes of the disk.  Raises CallerError."""
        if self.directory is not None:
            return self.directory.look(self.path.name).st_blocks * 512
        with os_errors(self.path, CallerError):
            return self.path.stat().st_blocks * 512

    def open(self, pieces: Pieces | None = None) -> BlockReader:
        """For reading, in a `with`.  Raises CallerError."""
        with os_errors(self.path, CallerError):
            fd = open_file(self.path) if self.directory is None else self.directory.open(self.path.name)
        return BlockReader(self.block, self.path, fd, pieces)


@dataclass(frozen=True)
class Snapshot:
    """Memory that can be sent or looked into: a snapshot's, or one raw image's.

    `uuid` are 16 bytes; `configuration` and `device_state` are the recorded ones, None for a raw image; `sync` is the
    mode that the snapshot was received in; `index` is snapshot.json; `digests` are its files', where it has any.
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
    digests: Digests | None = None
    _opened: tuple[Directory, Index] | None = field(default=None, repr=False)

    @property
    def memory_bytes(self) -> int:
        """All blocks' lengths together."""
        return sum(item.block.used_length for item in self.blocks)

    @property
    def disks(self) -> tuple[Disk, ...] | None:
        """The guest's when it was taken, which are not in the snapshot; None where nobody knows."""
        return None if self._opened is None else self._opened[1].disks

    @property
    def digest(self) -> str | None:
        """The manifest digest, of what snapshot.json says by now.  Raises CallerError."""
        if self._opened is None or self.digests is None:
            return None
        return manifest_digest(*self._opened, [file.digest for file in self.digests.files])

    @property
    def device_state_bytes(self) -> int:
        """Its length.  Raises CallerError."""
        return self._length([self._opened[1].device_state] if self._opened is not None else [])

    @property
    def early_state_bytes(self) -> int:
        """The length of all early sections.  Raises CallerError."""
        return self._length(self.early.files.values() if self.early is not None else [])

    def _length(self, names: Iterable[str]) -> int:
        return sum(self._opened[0].look(name).st_size for name in names) if self._opened is not None else 0

    def load_pieces(self) -> list[Pieces]:
        """What reading is checked against: of the files in the order of `Index.names`; or nothing.

        All but the blocks' are checked at once.  Raises CallerError, and HostError where one of them is not what was
        received.
        """
        if self._opened is None or self.digests is None:
            return []
        pieces = load_pieces(*self._opened, self.digests)
        configuration, device_state, *early = pieces[len(self.blocks) :]
        configuration.check(0, memoryview(self.configuration or b""))
        for reading in (self.read_device_state(device_state), *map(self.read_early, self.places, early)):
            for _ in reading:
                pass
        return pieces

    @property
    def early(self) -> Early | None:
        """The sections other than RAM's that came before RAM was complete, if any did."""
        return self._opened[1].early if self._opened is not None else None

    @property
    def places(self) -> list[Place]:
        """Where early sections came."""
        return list(self.early.files) if self.early is not None else []

    def read_device_state(self, pieces: Pieces | None = None) -> Iterator[bytes]:
        """The recorded device state, piece by piece.  Raises CallerError, HostError."""
        return self._read(self.device_state.name if self.device_state is not None else None, pieces)

    def read_early(self, place: Place, pieces: Pieces | None = None) -> Iterator[bytes]:
        """The early sections that came there, piece by piece.  Raises CallerError, HostError."""
        return self._read(self.early.files.get(place) if self.early is not None else None, pieces)

    def _read(self, name: str | None, pieces: Pieces | None) -> Iterator[bytes]:
        if self._opened is None or name is None:
            return
        with (
            os_errors(self.path / name, CallerError),
            os.fdopen(self._opened[0].open(name), "rb") as file,
        ):
            offset = 0
            while data := file.read(PIECE):
                if pieces is not None:
                    pieces.check(offset, memoryview(data))
                offset += len(data)
                yield data
            if pieces is not None:
                pieces.check_length(offset)


def open_snapshot(
    path: str | Path, *, block: str = "pc.ram", page_size: int | None = None, raw: bool = False
) -> Snapshot:
    """Open a snapshot's directory, or a raw image, which becomes the one block named `block`.

        snapshot = multifd.open_snapshot("snap")
        for item in snapshot.blocks:
            print(item.block.idstr, item.block.used_length)

    `page_size`, in bytes, is for raw images; a snapshot says its own.  Raises CallerError for what is
    neither, for an image that is empty or not a multiple of the page size, and, unless `raw`, for a file that begins as
    one of another kind (a core, a qcow2 or compressed file), which is named.
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
    with os_errors(path, CallerError), os.fdopen(open_file(path), "rb") as file:
        kind = None if raw else foreign(file.read(HEAD))
        length = file.seek(0, os.SEEK_END)
    if kind:
        raise CallerError(f"{path} is {kind}; if it is a raw image that only begins so: --raw")
    if not length:
        raise CallerError(f"{path} is empty: there is no memory to send")
    if length % page_size:
        raise CallerError(
            f"{path} has {length} bytes, which is not a multiple of the page size {page_size} "
            f"({length % page_size} too many): is it a whole memory image?"
        )
    return Snapshot(path, (SnapshotBlock(Block(block, length), path),), page_size)


def _open_directory(path: Path) -> Snapshot:
    with os_errors(path, CallerError):
        directory = Directory(path)
    with closing(directory):
        return _opened(path, directory)


def _opened(path: Path, directory: Directory) -> Snapshot:
    index = read_index(directory)
    try:
        digests = read_digests(index)
    except ValueError as error:
        raise CallerError(f"{path / INDEX} is damaged: {error}") from error
    for block, name in zip(index.blocks, index.files, strict=True):
        length = directory.look(name).st_size
        if length != block.used_length:
            raise CallerError(f"{path / name} has {length} bytes, {INDEX} says {block.used_length}")
    for name in index.others:
        directory.look(name)
    return Snapshot(
        path,
        tuple(
            SnapshotBlock(block, path / name, directory) for block, name in zip(index.blocks, index.files, strict=True)
        ),
        index.page_size,
        index.uuid,
        index.machine,
        index.sync,
        directory.read(index.configuration, MAX_CONFIGURATION),
        path / index.device_state,
        index.whole,
        digests,
        (directory, index),
    )
