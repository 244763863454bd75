"""A snapshot being received."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import uuid as uuids
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from multifd.errors import CallerError, PeerError, os_errors
from multifd.memory.arrivals import Arrivals
from multifd.memory.zeropages import ZEROS
from multifd.snapshot.format import (
    CONFIGURATION,
    DEVICE_STATE,
    FORMAT,
    INDEX,
    read_index,
    sync_directory,
    write_index,
    write_whole,
)
from multifd.wire.block import Block


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
        with os_errors(self.path):
            written = os.pwrite(self._fd, pages, offset)
            while written < len(pages):
                written += os.pwrite(self._fd, pages[written:], offset + written)

    def next_epoch(self) -> None:
        """A sync point was passed: no thread writes while this looks at what came twice."""
        self._disputed = {number for number in self._disputed if not self._arrivals.this_epoch(number)}
        size = self._page_size
        for number, digest in self._again:
            with os_errors(self.path):
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
        with os_errors(self.path):
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
        check_free(self.path)
        with os_errors(self.path.parent):
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
            with os_errors(path):
                self.blocks[block.idstr] = BlockFile(block, path, self.page_size)

    def next_epoch(self) -> None:
        """All channels stand at a sync point."""
        for block in self.blocks.values():
            block.next_epoch()

    def add_device_state(self, data: bytes) -> None:
        """Append what came after the RAM sections."""
        with os_errors(self._draft / DEVICE_STATE):
            self._device_state.write(data)
        self.device_state_bytes += len(data)

    def complete(self, configuration: bytes, *, uuid: bytes, machine: str, sync: str, transfer: dict[str, Any]) -> None:
        """Bring all of it to the disk, then give the snapshot its name."""
        for block in self.blocks.values():
            block.sync()
            block.close()
        index = {
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
        with os_errors(self._draft):
            self._device_state.flush()
            os.fsync(self._device_state.fileno())
            self._device_state.close()
            write_whole(self._draft / CONFIGURATION, configuration)
            write_index(self._draft, index)
            try:
                os.rename(self._draft, self.path)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise CallerError(f"{self.path} appeared while the snapshot was received") from error
                raise
            sync_directory(self.path.parent)

    def add_digests(self) -> None:
        """Compute each block's SHA-256 and put it into snapshot.json of the whole snapshot.

        Raises HostError, and CallerError where somebody else has changed snapshot.json to what is none.
        """
        digests = {}
        for block in self.blocks.values():
            path = self.path / block.path.name
            with os_errors(path), open(path, "rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        index = read_index(self.path)
        try:
            for entry in index["blocks"]:
                entry["sha256"] = digests[entry["file"]]
        except (KeyError, TypeError) as error:
            raise CallerError(f"{self.path / INDEX} was changed meanwhile: {type(error).__name__} {error}") from error
        with os_errors(self.path):
            write_index(self.path, index)

    def discard(self) -> None:
        """Leave nothing behind but a snapshot that was completed.  Safe to call twice."""
        for block in self.blocks.values():
            block.close()
        with suppress(OSError):  # what it could not write it tries to write again
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
