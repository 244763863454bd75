"""A snapshot on disk: one sparse file per RAM block, the device state, and snapshot.json.

    DIR/snapshot.json        format, uuid, machine, page_size, sync, blocks, files, transfer
    DIR/0-pc.ram.raw         RAM block 0, as long as the block, holes where pages are zero
    DIR/configuration.bin    the main channel's configuration section, as it came
    DIR/device_state.bin     what followed the RAM sections, as it came, description included

It is written under another name beside its own and renamed when all of it is on disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import uuid as uuids
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multifd.errors import CallerError, HostError, PeerError
from multifd.flags import DEFAULT_PAGE_SIZE
from multifd.ram import ZEROS, Arrivals, Block
from multifd.wire import PAGE_SIZES, Buffer

FORMAT = 1
INDEX = "snapshot.json"
CONFIGURATION = "configuration.bin"
DEVICE_STATE = "device_state.bin"
SYNC_MODES = ("section", "round")


def _host_error(path: Path | str, error: OSError) -> HostError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HostError(f"{path}: the disk is full: free some space or choose another directory")
    if error.errno == errno.EFBIG:
        return HostError(f"{path}: the RAM block is larger than this file system's largest file")
    return HostError(f"{path}: {error.strerror or error}")


@contextmanager
def _files_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _host_error(error.filename or path, error) from error


def _write_whole(path: Path, data: Buffer) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_index(directory: Path, index: dict[str, Any]) -> None:
    draft = directory / (INDEX + ".new")
    _write_whole(draft, (json.dumps(index, indent=2) + "\n").encode())
    os.replace(draft, directory / INDEX)
    _sync_directory(directory)


class BlockFile:
    """One RAM block's file while it is received.

    Each page belongs to one thread at a time, so writing needs no lock.  QEMU 7.2 sometimes
    sends a page twice between two sync points, over two channels; since nobody can tell which
    of two writes wins, the second is not made but compared at the sync point.  Where it
    differs, a later epoch has to bring the page again (`unsettled`).
    """

    def __init__(self, block: Block, path: Path, page_size: int) -> None:
        self.block = block
        self.path = path
        self._page_size = page_size
        self._again: list[tuple[int, bytes]] = []
        # Seen: a dozen repeats in 4096 pages; a peer that only repeats must not fill memory.
        self._again_limit = 1024 + block.used_length // page_size // 16
        self._disputed: set[int] = set()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(self._fd, block.used_length)
            self._arrivals = Arrivals(block.used_length // page_size)
        except OSError:
            os.close(self._fd)
            raise

    def store(self, offset: int, pages: memoryview) -> None:
        """Write a run of pages.  Raises HostError where the disk does not take them."""
        _, again = self._arrivals.mark(offset // self._page_size, len(pages) // self._page_size)
        self._place(offset, pages, again)

    def clear(self, offset: int, length: int) -> None:
        """Make a run of at most PACKET_SIZE bytes zero; what never came is zero already."""
        came, again = self._arrivals.mark(offset // self._page_size, length // self._page_size)
        if came:
            self._place(offset, memoryview(ZEROS)[:length], again)

    def _place(self, offset: int, pages: memoryview, again: set[int]) -> None:
        if not again:
            self._write(offset, pages)
            return
        size = self._page_size
        for start in range(0, len(pages), size):
            page = pages[start : start + size]
            number = (offset + start) // size
            if number in again:
                if len(self._again) >= self._again_limit:
                    raise PeerError(f"{len(self._again)} pages of {self.block.idstr} came twice between two SYNCs")
                self._again.append((number, hashlib.sha1(page).digest()))
            else:
                self._write(offset + start, page)

    def _write(self, offset: int, pages: memoryview) -> None:
        try:
            written = os.pwrite(self._fd, pages, offset)
            while written < len(pages):
                written += os.pwrite(self._fd, pages[written:], offset + written)
        except OSError as error:
            raise _host_error(self.path, error) from error

    def next_epoch(self) -> None:
        """A sync point was passed: no thread writes while this looks at what came twice."""
        self._disputed = {number for number in self._disputed if not self._arrivals.this_epoch(number)}
        size = self._page_size
        for number, digest in self._again:
            with _files_of(self.path):
                page = os.pread(self._fd, size, number * size)
            if hashlib.sha1(page).digest() != digest:
                self._disputed.add(number)
        self._again.clear()
        self._arrivals.next_epoch()

    def unsettled(self) -> list[int]:
        """Offsets of pages that came twice in one epoch, with two contents, and never again."""
        return sorted(number * self._page_size for number in self._disputed)

    def missing(self) -> tuple[int, int]:
        """How many pages never came, and the offset of the first (negative if none)."""
        count, first = self._arrivals.missing()
        return count, first * self._page_size

    def sync(self) -> None:
        """Everything written is on the disk.  Raises HostError."""
        with _files_of(self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        """Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class SnapshotWriter:
    """A snapshot being received; appears under `path` only with `complete`.

    Raises CallerError where `path` exists (an empty directory is taken), HostError for
    everything the disk refuses.
    """

    def __init__(self, path: str | Path, page_size: int) -> None:
        self.path = Path(os.path.abspath(path))
        self.page_size = page_size
        self.blocks: dict[str, BlockFile] = {}
        self.device_state_bytes = 0
        self._index: dict[str, Any] = {}
        check_free(self.path)
        with _files_of(self.path.parent):
            self._draft = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.", suffix=".partial", dir=self.path.parent))
            try:
                self._device_state = open(self._draft / DEVICE_STATE, "w+b")  # noqa: SIM115 - closed by complete or discard
            except BaseException:
                shutil.rmtree(self._draft, ignore_errors=True)
                raise

    def create_blocks(self, blocks: Sequence[Block]) -> None:
        """Make one sparse file per block."""
        for number, block in enumerate(blocks):
            readable = re.sub(r"[^A-Za-z0-9._-]+", "-", block.idstr).strip("-.")[:100]
            path = self._draft / f"{number}-{readable}.raw"
            with _files_of(path):
                self.blocks[block.idstr] = BlockFile(block, path, self.page_size)

    def next_epoch(self) -> None:
        """All channels stand at a sync point."""
        for block in self.blocks.values():
            block.next_epoch()

    def add_device_state(self, data: bytes) -> None:
        """Append what came after the RAM sections."""
        with _files_of(self._draft / DEVICE_STATE):
            self._device_state.write(data)
        self.device_state_bytes += len(data)

    def complete(self, configuration: bytes, *, uuid: bytes, machine: str, sync: str, transfer: dict[str, Any]) -> None:
        """Bring all of it to the disk, then give the snapshot its name."""
        for block in self.blocks.values():
            block.sync()
            block.close()
        self._index = {
            "format": FORMAT,
            "uuid": str(uuids.UUID(bytes=uuid)),
            "machine": machine,
            "page_size": self.page_size,
            "sync": sync,
            "blocks": [
                {"idstr": name, "used_length": file.block.used_length, "file": file.path.name, "sha256": None}
                for name, file in self.blocks.items()
            ],
            "configuration": CONFIGURATION,
            "device_state": DEVICE_STATE,
            "transfer": transfer,
        }
        with _files_of(self._draft):
            self._device_state.flush()
            os.fsync(self._device_state.fileno())
            self._device_state.close()
            _write_whole(self._draft / CONFIGURATION, configuration)
            _write_index(self._draft, self._index)
            try:
                os.rename(self._draft, self.path)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise CallerError(f"{self.path} appeared while the snapshot was received") from error
                raise
            _sync_directory(self.path.parent)

    def add_digests(self) -> None:
        """Compute each block's SHA-256 and put it into snapshot.json of the whole snapshot."""
        for entry in self._index["blocks"]:
            with _files_of(self.path / entry["file"]), open(self.path / entry["file"], "rb") as file:
                entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        with _files_of(self.path):
            _write_index(self.path, self._index)

    def discard(self) -> None:
        """Leave nothing behind but a snapshot that was completed.  Safe to call twice."""
        for block in self.blocks.values():
            block.close()
        self._device_state.close()
        shutil.rmtree(self._draft, ignore_errors=True)


def check_free(path: Path) -> None:
    """Raises CallerError where a snapshot could not appear under this name."""
    try:
        taken = any(path.iterdir())
    except FileNotFoundError:
        taken = False
    except OSError:
        taken = True
    if taken:
        raise CallerError(f"{path} exists already: remove it or choose another name")
    if not path.parent.is_dir():
        raise CallerError(f"{path.parent} is not a directory: create it first")


@dataclass(frozen=True)
class SourceBlock:
    """A RAM block and the file that holds its pages."""

    block: Block
    path: Path


@dataclass(frozen=True)
class Source:
    """What can be sent: a snapshot, or one raw memory image.

    `configuration` and `device_state` are the recorded bytes; None for a raw image.  `sync`
    is the mode the snapshot was received in.
    """

    path: Path
    blocks: tuple[SourceBlock, ...]
    page_size: int = DEFAULT_PAGE_SIZE
    uuid: bytes = bytes(16)
    machine: str = ""
    sync: str = "round"
    configuration: bytes | None = None
    device_state: Path | None = None
    index: dict[str, Any] = field(default_factory=dict)


def open_source(path: str | Path, *, block: str = "pc.ram", page_size: int | None = None) -> Source:
    """A snapshot's directory, or a raw image that becomes the one block named `block`.

    `page_size` is for raw images; a snapshot says its own.  Raises CallerError for what is
    neither, for an image that is empty or not a multiple of the page size.
    """
    path = Path(path)
    if path.is_dir():
        source = _open_snapshot(path)
        if page_size not in (None, source.page_size):
            raise CallerError(f"{path} has pages of {source.page_size} bytes, not {page_size}: leave the page size out")
        return source
    page_size = page_size or DEFAULT_PAGE_SIZE
    length = _file_length(path)
    if not length:
        raise CallerError(f"{path} is empty: there is no memory to send")
    if length % page_size:
        raise CallerError(
            f"{path} has {length} bytes, which is not a multiple of the page size {page_size} "
            f"({length % page_size} too many): is it a whole memory image?"
        )
    return Source(path, (SourceBlock(Block(block, length), path),), page_size)


def _file_length(path: Path) -> int:
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise CallerError(f"{path} is neither a file nor a block device nor a snapshot's directory")
            return file.seek(0, os.SEEK_END)
    except OSError as error:
        raise CallerError(f"{path}: {error.strerror}") from error


def _open_snapshot(path: Path) -> Source:
    index_path = path / INDEX
    try:
        index = json.loads(index_path.read_bytes())
    except FileNotFoundError:
        raise CallerError(f"{path} holds no {INDEX}: it is not a snapshot") from None
    except OSError as error:
        raise CallerError(f"{index_path}: {error.strerror}") from error
    except ValueError as error:
        raise CallerError(f"{index_path} is damaged: {error}") from error
    try:
        if index["format"] != FORMAT:
            raise CallerError(f"{index_path} has format {index['format']!r}, this multifd reads {FORMAT}: upgrade it")
        blocks = tuple(
            SourceBlock(Block(entry["idstr"], entry["used_length"]), path / Path(entry["file"]).name)
            for entry in index["blocks"]
        )
        source = Source(
            path,
            blocks,
            index["page_size"],
            uuids.UUID(index["uuid"]).bytes,
            index["machine"],
            index["sync"],
            (path / Path(index["configuration"]).name).read_bytes(),
            path / Path(index["device_state"]).name,
            index,
        )
    except OSError as error:
        raise CallerError(f"{error.filename}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CallerError(f"{index_path} is damaged: {type(error).__name__} {error}") from error
    if source.page_size not in PAGE_SIZES or source.sync not in SYNC_MODES or not blocks:
        raise CallerError(f"{index_path} is damaged: page_size, sync or blocks make no sense")
    for item in blocks:
        length = _file_length(item.path)
        if length != item.block.used_length:
            raise CallerError(f"{item.path} has {length} bytes, {INDEX} says {item.block.used_length}")
    return source
