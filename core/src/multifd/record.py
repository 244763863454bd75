"""The observer `record`: a recording that `multifd inspect` and `receive recording:` read.

`--observe record=DIR` writes DIR/main.bin and DIR/chK.bin, byte for byte what passed; a relay
DIR/in/... as it came and DIR/out/... as it went, and its second migration DIR-2.  Until the
migration is complete, and for good where it fails, it is called DIR.incomplete.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from multifd.errors import CallerError, UsageError
from multifd.hookspecs import hookimpl
from multifd.observers import BACK, ObservedChannel
from multifd.transport import MAIN_FILE


class Record:
    """Each file is written by the thread of its channel."""

    def __init__(self, directory: str) -> None:
        """Raises UsageError without a directory, CallerError where it exists or has no parent."""
        if not directory:
            raise UsageError("--observe record: say where to, record=DIR")
        self._first = Path(os.path.abspath(directory))
        self._number = 0
        self._check(self._first)

    def _check(self, directory: Path) -> None:
        for path in (directory, _incomplete(directory)):
            if os.path.lexists(path):
                raise CallerError(f"--observe record: {path} exists already: choose another, or remove it")
        if not os.access(directory.parent, os.W_OK | os.X_OK):
            raise CallerError(f"--observe record: {directory.parent} is no directory that can be written to")

    @hookimpl
    def multifd_observe_start(self, directions: Sequence[str]) -> None:
        self._number += 1
        self._files: dict[tuple[str, str], BinaryIO] = {}
        self._directory = self._first
        if self._number > 1:
            self._directory = self._first.with_name(f"{self._first.name}-{self._number}")
        self._check(self._directory)
        part = _incomplete(self._directory)
        self._folders = {direction: part / direction if len(directions) > 1 else part for direction in directions}

    @hookimpl
    def multifd_observe_main(self, direction: str, data: memoryview) -> None:
        if direction != BACK:
            (self._files.get((direction, MAIN_FILE)) or self._open(direction, MAIN_FILE)).write(data)

    @hookimpl
    def multifd_observe_packet(
        self, channel: ObservedChannel, header: memoryview, payload: Sequence[memoryview]
    ) -> None:
        name = f"ch{channel.id}.bin"
        file = self._files.get((channel.direction, name))
        if file is None:
            file = self._open(channel.direction, name)
            file.write(channel.init)
        file.write(header)
        for piece in payload:
            file.write(piece)

    def _open(self, direction: str, name: str) -> BinaryIO:
        folder = self._folders[direction]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The guest's memory is nobody else's business.
        fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        file = self._files[direction, name] = os.fdopen(fd, "wb")
        return file

    @hookimpl
    def multifd_observe_finish(self, complete: bool) -> None:
        files, self._files = self._files, {}
        with ExitStack() as cleanup:
            for file in files.values():
                cleanup.callback(file.close)
            if complete:
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                _incomplete(self._directory).rename(self._directory)


def _incomplete(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.incomplete")
