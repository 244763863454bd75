"""Recordings: a directory with `main.bin` and `chK.bin`, one file for each connection of a migration, byte for byte."""

from __future__ import annotations

import importlib
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from multifd.errors import CallerError, HostError, os_errors
from multifd.net.connection import Ended
from multifd.net.wake import Wake
from multifd.wire.packet import Buffer

MAIN_FILE = "main.bin"
CHANNEL_FILE = "ch{}.bin"


class RecordedConnection:
    """One connection's bytes from a file, plain or compressed with zstd; writes go nowhere."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.bytes_read = 0
        self.bytes_written = 0
        self._file: BinaryIO
        with os_errors(path, CallerError):
            # A FIFO does not wait for a writer then.
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise CallerError(f"{path} is no regular file")
        self._raw = self._file = os.fdopen(fd, "rb")
        if path.suffix == ".zst":
            reader = _zstd_reader(self._raw)
            if reader is None:
                self._raw.close()
                raise HostError(f"{path} is compressed with zstd: pip install zstandard, or unpack it with `zstd -d`")
            self._file = reader

    def ready(self, wake: Wake) -> bool:  # noqa: ARG002 - a file never waits
        return True

    def read_into(self, view: memoryview, *, at_least: int | None = None, due: bool = False) -> int:  # noqa: ARG002
        got = 0
        while got < len(view):
            data = self._read(len(view) - got)
            if not data:
                if at_least is not None and got >= at_least:
                    break
                raise Ended(f"the recording ends after {got} of {len(view)} bytes", got)
            view[got : got + len(data)] = data
            got += len(data)
        return got

    def read_some(self, limit: int, *, due: bool = False) -> bytes:  # noqa: ARG002
        return self._read(limit)

    def _read(self, limit: int) -> bytes:
        try:
            data = self._file.read(limit)
        except Exception as error:  # zstandard and compression.zstd each have their own
            raise HostError(f"{self.name} cannot be read: {error}") from error
        self.bytes_read += len(data)
        return data

    def write(self, buffers: Sequence[Buffer]) -> None:
        self.bytes_written += sum(map(len, buffers))

    def interrupt(self, *, reading_only: bool = False) -> None:
        """Nobody blocks here."""

    def close(self) -> None:
        self._file.close()
        self._raw.close()


def _zstd_reader(file: BinaryIO) -> BinaryIO | None:
    """With whatever zstd there is: Python 3.14 brings one."""
    for module, attribute in (("compression.zstd", "ZstdFile"), ("zstandard", "open")):
        try:
            opened: BinaryIO = getattr(importlib.import_module(module), attribute)(file, "rb")
        except ImportError:
            continue
        return opened
    return None


def open_recording(directory: str) -> tuple[RecordedConnection, list[RecordedConnection]]:
    """The main channel and the multifd channels of a recording, `main.bin` and `chK.bin`.

    Each may be plain or `.zst`.  Raises CallerError where main or a channel is missing.
    """
    folder = Path(directory)
    main = _recorded_path(folder, MAIN_FILE)
    if main is None:
        raise CallerError(f"{folder} holds no {MAIN_FILE} or {MAIN_FILE}.zst: it is not a recording")
    paths: list[Path] = []
    while (path := _recorded_path(folder, CHANNEL_FILE.format(len(paths)))) is not None:
        paths.append(path)
    if not paths:
        raise CallerError(f"{folder} holds no ch0.bin or ch0.bin.zst: it is not a recording of a multifd migration")
    with ExitStack() as failed:
        opened = []
        for path in (main, *paths):
            opened.append(RecordedConnection(path))
            failed.callback(opened[-1].close)
        failed.pop_all()
    return opened[0], opened[1:]


def _recorded_path(folder: Path, name: str) -> Path | None:
    with os_errors(folder, CallerError):
        for path in (folder / name, folder / (name + ".zst")):
            if path.exists():
                return path
    return None


class RecordingWriter:
    """Writes a recording of whoever sends; each file is one thread's.  Raises OSError."""

    def __init__(self, directory: Path) -> None:
        """`directory` is made with its first file."""
        self._directory = directory
        self._files: dict[str, BinaryIO] = {}

    def main(self, data: Buffer) -> None:
        """Bytes of the main channel, in order."""
        self._file(MAIN_FILE).write(data)

    def channel(self, number: int, init: bytes, pieces: Sequence[Buffer]) -> None:
        """Bytes of a multifd channel, in order, behind the `init` that it began with."""
        for piece in pieces:
            self._file(CHANNEL_FILE.format(number), init).write(piece)

    def _file(self, name: str, first: bytes = b"") -> BinaryIO:
        file = self._files.get(name)
        if file is None:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The guest's memory is nobody else's business.
            fd = os.open(self._directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            file = self._files[name] = os.fdopen(fd, "wb")
            file.write(first)
        return file

    def close(self, *, to_disk: bool) -> None:
        """Close all files, `to_disk` when all of them are on it.  Safe to call twice."""
        files, self._files = self._files, {}
        with ExitStack() as cleanup:
            for file in files.values():
                cleanup.callback(file.close)
            if to_disk:
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
