"""Digests of a snapshot's files: of pieces of 1 MiB, so that many threads make them and each page sent can be checked.

A file's digest is the SHA-256 of its list of pieces: offset, length and SHA-256 of each that is not all zero (RECORD),
in the order of the file.  A hole and zeros are the same, and neither is read where the file system knows its holes.
The lists lie in pieces.bin, one behind the other in the order of snapshot.json's `digests.files`: the blocks', the
configuration's, the device state's, the early sections' where there are any.  The manifest digest stands for all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import uuid as uuids
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from multifd.crew import Crew
from multifd.errors import CallerError, HostError, os_errors
from multifd.snapshot.directory import Directory, next_data, read_into
from multifd.snapshot.format import INDEX, Index, get, get_digest

PIECE = 1 << 20
#: Offset, length, SHA-256; big-endian.
RECORD = struct.Struct(">QQ32s")
LIST = "pieces.bin"
#: Bytes of the longest pieces.bin, of 16 TiB of memory.
MAX_LIST = 768 << 20
MAX_THREADS = 8
#: Seconds after which somebody who waits is told what for.
PATIENCE = 1.0
UNCHECKED = "nothing was sent, --no-verify does without the check"
_ZEROS = bytearray(PIECE)


def is_zero(data: memoryview) -> bool:
    """Whether at most a piece is all zero."""
    # A bytearray on the left compares in one step (see `memory.zeropages`).
    return (_ZEROS if len(data) == PIECE else _ZEROS[: len(data)]) == data


class Pieces:
    """The list of one file's pieces, to check what is read of it; any thread may."""

    def __init__(self, name: str, length: int, records: bytes) -> None:
        """`name` is the RAM block's or the file's, for messages; `length` is what the file had, in bytes."""
        self._name = name
        self._length = length
        self._records = records

    def check(self, offset: int, data: memoryview) -> None:
        """One whole piece of the file.  Raises HostError where it is not what was received."""
        record = self._at(offset)
        if not record:
            right = is_zero(data)
        else:
            _, length, known = RECORD.unpack(record)
            right = length == len(data) and hashlib.sha256(data).digest() == known
        if not right:
            raise self._wrong(offset, len(data))

    def check_hole(self, offset: int, length: int) -> None:
        """A piece that is a hole.  Raises HostError where it was none."""
        if self._at(offset):
            raise self._wrong(offset, length)

    def check_length(self, length: int) -> None:
        """All of the file was read, so many bytes.  Raises HostError where it had more, or less."""
        if length != self._length:
            raise self._wrong(min(length, self._length), abs(length - self._length))

    def _at(self, offset: int) -> bytes:
        size = RECORD.size
        found = bisect_left(
            range(len(self._records) // size),
            offset,
            key=lambda number: RECORD.unpack_from(self._records, number * size)[0],
        )
        record = self._records[found * size : (found + 1) * size]
        return record if record[:8] == offset.to_bytes(8, "big") else b""

    def _wrong(self, offset: int, length: int) -> HostError:
        return HostError(
            f"{self._name}, offset {offset:#x}: these {length} bytes are not those that were received (SHA-256): the "
            "snapshot was changed, or its disk fails; the migration was given up, --no-verify does without the check"
        )


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Of one file: its bytes, how many pieces are listed, and the list's SHA-256.

    `sha256` is the content's, where it is known.
    """

    size: int
    pieces: int
    digest: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Digests:
    """What snapshot.json says of digests: of each file, in the order of `Index.names`."""

    manifest: str
    files: tuple[FileDigest, ...]


def manifest_digest(directory: Directory, index: Index, digests: Sequence[str]) -> str:
    """What stands for the snapshot: all that `send` makes of it; `digests` are its files'.  Raises CallerError."""
    files = [[directory.look(name).st_size, digest] for name, digest in zip(index.names, digests, strict=True)]
    blocks, (configuration, device_state, *early) = files[: len(index.files)], files[len(index.files) :]
    text = {
        "format": index.format,
        "uuid": str(uuids.UUID(bytes=index.uuid)),
        "machine": index.machine,
        "page_size": index.page_size,
        "sync": index.sync,
        "blocks": [[block.idstr, *file] for block, file in zip(index.blocks, blocks, strict=True)],
        "configuration": configuration,
        "device_state": device_state,
    }
    if index.early is not None:
        places = [place.value for place in index.early.files]
        text["early_sections"] = {"ram_section": index.early.ram_section} | dict(zip(places, early, strict=True))
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()


def read_digests(index: Index) -> Digests | None:
    """What the index says of digests; None where it has none.  Raises ValueError."""
    if index.whole.get("digests") is None:
        return None
    whole = get(index.whole, "digests", dict)
    files = []
    if get(whole, "piece_size", int, "digests.") != PIECE:
        raise ValueError(f"digests.piece_size is not {PIECE}")
    for number, entry in enumerate(get(whole, "files", list, "digests.")):
        where = f"digests.files[{number}]."
        size, pieces = get(entry, "size", int, where), get(entry, "pieces", int, where)
        listed = get_digest(entry, "digest", where)
        if size < 0 or pieces < 0 or listed is None:
            raise ValueError(f"{where}size, {where}pieces or {where}digest makes no sense")
        files.append(FileDigest(size, pieces, listed, get_digest(entry, "sha256", where)))
    known = get_digest(whole, "manifest", "digests.")
    if known is None or len(files) != len(index.names):
        raise ValueError("digests.manifest or digests.files makes no sense")
    if sum(file.pieces for file in files) * RECORD.size > MAX_LIST:
        raise ValueError("digests.files: too many pieces")
    return Digests(known, tuple(files))


def load_pieces(directory: Directory, index: Index, digests: Digests) -> list[Pieces]:
    """The lists of pieces, each of which is what the index says.

    Raises CallerError where one of them, or the index, is not as it was when the digests were made.
    """
    for name, file in zip(index.names, digests.files, strict=True):
        if directory.look(name).st_size != file.size:
            raise _changed(directory.path / name)
    if manifest_digest(directory, index, [file.digest for file in digests.files]) != digests.manifest:
        raise _changed(directory.path / INDEX)
    try:
        data = directory.read(LIST, sum(file.pieces for file in digests.files) * RECORD.size)
    except CallerError as error:
        raise CallerError(f"{error}; {UNCHECKED}") from error
    found = []
    start = 0
    shown = [*(block.idstr for block in index.blocks), *index.others]
    for name, file in zip(shown, digests.files, strict=True):
        records = data[start : start + file.pieces * RECORD.size]
        start += len(records)
        if hashlib.sha256(records).hexdigest() != file.digest:
            raise _changed(directory.path / LIST)
        found.append(Pieces(f"{directory.path}: {name}", file.size, records))
    return found


def _changed(path: Path) -> CallerError:
    return CallerError(f"{path} is not as it was when the digests were made: {UNCHECKED}")


@dataclass(slots=True)
class _File:
    """One to be digested; threads add to `records`."""

    fd: int
    path: Path
    length: int
    records: dict[int, bytes] = field(default_factory=dict)
    sha256: str | None = None


class _Digesting:
    """Threads that each take the next piece."""

    def __init__(self, files: Sequence[_File], crew: Crew, *, plain: bool) -> None:
        self._crew = crew
        self._files = files
        self._tasks = self._listed(plain=plain)  # guarded by the crew's lock, as is `working`
        self.working = 0

    def run(self, name: str, on_wait: Callable[[], None]) -> None:
        """Wait for all of them; `name` is each thread's.  Raises Cancelled, HostError where there is no thread."""
        self.working = min(MAX_THREADS, len(os.sched_getaffinity(0)))
        for _ in range(self.working):
            self._crew.spawn(name, self._work)
        with self._crew.changed:
            done = self._crew.wait_for(lambda: not self.working, PATIENCE)
        if not done:
            on_wait()
            with self._crew.changed:
                self._crew.wait_for(lambda: not self.working)

    def _listed(self, *, plain: bool) -> Iterator[Callable[[memoryview], None]]:
        if plain:  # these are the longest
            for file in sorted(self._files, key=lambda file: -file.length):
                yield partial(self._whole, file)
        for file in self._files:
            offset = 0
            while (data := next_data(file.fd, offset, file.length)) < file.length:
                offset = data // PIECE * PIECE
                yield partial(self._piece, file, offset)
                offset += PIECE

    def _work(self) -> None:
        buffer = memoryview(bytearray(PIECE))
        while True:
            with self._crew.changed:
                self._crew.check()
                task = next(self._tasks, None)
                if task is None:
                    self.working -= 1
                    self._crew.changed.notify_all()
                    return
            task(buffer)

    def _piece(self, file: _File, offset: int, buffer: memoryview) -> None:
        data = buffer[: file.length - offset]
        read_into(file.fd, offset, data, file.path, file.length)
        if not is_zero(data):
            file.records[offset] = RECORD.pack(offset, len(data), hashlib.sha256(data).digest())

    def _whole(self, file: _File, buffer: memoryview) -> None:
        found = hashlib.sha256()
        for offset in range(0, file.length, PIECE):
            self._crew.check()
            data = buffer[: file.length - offset]
            read_into(file.fd, offset, data, file.path, file.length)
            found.update(data)
        file.sha256 = found.hexdigest()


def make_digests(
    directory: Directory, names: Sequence[str], crew: Crew, *, plain: bool, on_wait: Callable[[], None]
) -> tuple[list[FileDigest], bytes]:
    """The digests of files, and pieces.bin.  `on_wait` is called where they are not there within PATIENCE.

    Raises HostError, CallerError; Cancelled where the crew is, which is for this alone and over then.
    """
    with ExitStack() as cleanup:
        files = []
        for name in names:
            with os_errors(directory.path / name):
                fd = directory.open(name)
                cleanup.callback(os.close, fd)
                files.append(_File(fd, directory.path / name, os.fstat(fd).st_size))
        cleanup.callback(crew.join)
        digesting = _Digesting(files, crew, plain=plain)
        name = f"the digests of {directory.path}, which is complete without them"
        crew.run(name, partial(digesting.run, name, on_wait))
    found, lists = [], []
    for file in files:
        records = b"".join(record for _, record in sorted(file.records.items()))
        lists.append(records)
        found.append(FileDigest(file.length, len(file.records), hashlib.sha256(records).hexdigest(), file.sha256))
    return found, b"".join(lists)


def described(directory: Directory, index: Index, files: Sequence[FileDigest]) -> dict[str, Any]:
    """For snapshot.json.  Raises CallerError."""
    return {
        "manifest": manifest_digest(directory, index, [file.digest for file in files]),
        "piece_size": PIECE,
        "files": [
            {"size": file.size, "pieces": file.pieces, "digest": file.digest}
            | ({"sha256": file.sha256} if file.sha256 else {})
            for file in files
        ],
    }
