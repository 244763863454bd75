"""A snapshot being received."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
import uuid as uuids
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

from multifd.crew import Crew
from multifd.errors import CallerError, PeerError, os_errors
from multifd.log import log
from multifd.memory.arrivals import Arrivals
from multifd.memory.zeropages import ZEROS
from multifd.snapshot.digests import LIST, described, make_digests
from multifd.snapshot.directory import Access, Directory
from multifd.snapshot.disks import Disk
from multifd.snapshot.format import (
    CONFIGURATION,
    DEVICE_STATE,
    EARLY,
    EARLY_STATE,
    FORMAT,
    INDEX,
    WITH_NEEDS,
    read_index,
    store_index,
)
from multifd.wire.block import Block
from multifd.wire.events import Place


class BlockFile:
    """One RAM block's file while it is received.

    Each page belongs to one thread at a time, so writing needs no lock.  QEMU 7.2 sometimes
    sends a page twice between two sync points, over two channels; since nobody can tell which
    of two writes wins, the second is not made but compared at the sync point.  Where it
    differs, a later epoch has to bring the page again (`unsettled`).
    """

    def __init__(self, block: Block, directory: Directory, name: str, page_size: int) -> None:
        """A new one.  Raises OSError."""
        self.block = block
        self.path = directory.path / name
        self._page_size = page_size
        self._again: list[tuple[int, bytes]] = []
        # Seen: a dozen repeats in 4096 pages; a peer that only repeats must not fill memory.
        self._again_limit = 1024 + block.used_length // page_size // 16
        self._disputed: set[int] = set()
        self._fd = directory.create(name)
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
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):  # what is on the disk was synced, the rest is not needed
                os.close(fd)


class SnapshotWriter:
    """A snapshot being received; appears under `path` only with `complete`.

    Raises CallerError where `path` exists (an empty directory is taken), HostError for
    everything the disk refuses.
    """

    def __init__(self, path: str | Path, page_size: int, access: Access | None = None) -> None:
        self.path = Path(os.path.abspath(path))
        self.page_size = page_size
        self.blocks: dict[str, BlockFile] = {}
        self.device_state_bytes = 0
        check_free(self.path)
        #: Where all of it is: the draft, then under its own name; None where it is to stay.
        self._draft: Path | None = None
        self._early: dict[Place, BinaryIO] = {}
        with os_errors(self.path.parent):
            self._draft = _make_draft(self.path)
            directory = None
            try:
                directory = self._directory = Directory(self._draft, access)
                directory.give()
                self._device_state = os.fdopen(directory.create(DEVICE_STATE), "wb")
            except BaseException:
                _remove(self._draft, directory)
                raise

    def create_blocks(self, blocks: Sequence[Block]) -> None:
        """Make one sparse file per block."""
        for number, block in enumerate(blocks):
            readable = re.sub(r"[^A-Za-z0-9._-]+", "-", block.idstr).strip("-.")[:100]
            name = f"{number}-{readable}.raw"
            with os_errors(self._directory.path / name):
                self.blocks[block.idstr] = BlockFile(block, self._directory, name, self.page_size)

    def next_epoch(self) -> None:
        """All channels stand at a sync point."""
        for block in self.blocks.values():
            block.next_epoch()

    def add_device_state(self, data: bytes) -> None:
        """Append what came after the RAM sections."""
        with os_errors(self._directory.path / DEVICE_STATE):
            self._device_state.write(data)
        self.device_state_bytes += len(data)

    def add_early(self, place: Place, data: bytes) -> None:
        """Append what came of a section other than RAM's before RAM was complete."""
        with os_errors(self._directory.path):
            if place not in self._early:
                self._early[place] = os.fdopen(self._directory.create(EARLY_STATE.format(place.value)), "wb")
            self._early[place].write(data)

    def complete(
        self,
        configuration: bytes,
        *,
        uuid: bytes,
        machine: str,
        sync: str,
        transfer: dict[str, Any],
        ram_section: int = 1,
        disks: Sequence[Disk] | None = None,
    ) -> None:
        """Bring all of it to the disk, then give the snapshot its name.  `disks` are the guest's, where known."""
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
        if self._early:
            files = {place.value: EARLY_STATE.format(place.value) for place in Place if place in self._early}
            early = {"ram_section": ram_section} | files
            index |= {"format": WITH_NEEDS, "needs": [EARLY], "early_sections": early}
        if disks is not None:
            index["disks"] = [disk.to_json() for disk in disks]
        assert self._draft is not None, "it was completed"
        with os_errors(self._draft):
            for file in (self._device_state, *self._early.values()):
                file.flush()
                os.fsync(file.fileno())
                file.close()
            self._directory.write_whole(CONFIGURATION, configuration)
            store_index(self._directory, index)
            try:
                os.rename(self._draft, self.path)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise CallerError(f"{self.path} appeared while the snapshot was received") from error
                raise
            self._draft = self._directory.path = self.path
            _sync_parent(self.path)
        self._draft = None
        self._directory.close()

    def add_digests(
        self, crew: Crew | None = None, *, plain: bool = False, on_wait: Callable[[], None] = lambda: None
    ) -> str:
        """Make the digests of the whole snapshot, put them into it, and return the manifest digest.

        `crew` is a new one, for this alone; `plain` adds the plain SHA-256 of each file, and reads its holes for it.
        `on_wait` is called where it takes more than PATIENCE.  Raises HostError, Cancelled, and CallerError where
        somebody else has changed the snapshot.
        """
        directory = self._directory
        names = read_index(directory).names
        files, lists = make_digests(directory, names, crew or Crew(), plain=plain, on_wait=on_wait)
        index = read_index(directory)  # others may have put something in meanwhile
        if index.names != names:
            raise CallerError(f"{self.path / INDEX} was changed meanwhile")
        found = index.whole["digests"] = described(directory, index, files)
        for entry, file in zip(index.whole["blocks"], files, strict=False):
            entry["sha256"] = file.sha256
        with os_errors(self.path):
            directory.write_whole(LIST, lists)
            store_index(directory, index.whole)
        return str(found["manifest"])

    def discard(self) -> None:
        """Leave nothing behind but a snapshot that was completed.  Safe to call twice."""
        with ExitStack() as steps:
            steps.callback(self._directory.close)
            steps.callback(self._close)
            for block in self.blocks.values():
                steps.callback(block.close)
            if self._draft is not None:
                # First: to close a file may take long, or fail.
                steps.callback(_remove, self._draft, self._directory)

    def _close(self) -> None:
        for file in (self._device_state, *self._early.values()):
            with suppress(OSError):  # what it could not write it tries to write again
                file.close()


def check_free(path: Path, access: Access | None = None) -> None:
    """Raises CallerError where no snapshot could appear under this name, or be given to a group."""
    with os_errors(path, CallerError):
        try:
            taken = not stat.S_ISDIR(os.lstat(path).st_mode) or any(path.iterdir())
        except FileNotFoundError:
            taken = False
        if os.path.islink(path):
            raise CallerError(f"{path} is a link: name the directory to make")
        if taken:
            raise CallerError(f"{path} exists already: remove it or choose another name")
        if os.path.ismount(path):
            raise CallerError(f"{path} is where a file system is mounted: name a directory in it")
        if not path.parent.is_dir():
            raise CallerError(f"{path.parent} is not a directory: create it first")
    with os_errors(f"{path.parent}: no snapshot can be made there", CallerError):
        draft = _make_draft(path)
    directory = None
    try:
        if access is not None and access.group is not None:
            with os_errors(f"{path}: it cannot be given to group {access.group}", CallerError):
                directory = Directory(draft, access)
                directory.give()
    finally:
        _remove(draft, directory)


def _make_draft(path: Path) -> Path:
    """Beside it, hidden; with no more than its owner's access whatever the umask.  Raises OSError."""
    name = os.fsdecode(os.fsencode(path.name)[:200])  # a name may have 255 bytes, and this has some more
    draft = tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=path.parent)
    os.chmod(draft, 0o700)
    return Path(draft)


def _remove(draft: Path, directory: Directory | None = None) -> None:
    """With all that is in it.  Takes no descriptor unless somebody else has put something in."""
    if directory is not None:
        directory.remove_made()
        directory.close()
    try:
        os.rmdir(draft)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
    if os.path.lexists(draft):
        log.warning(f"{draft} could not be removed: remove it, it holds guest memory")


def _sync_parent(path: Path) -> None:
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
