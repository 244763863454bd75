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

from multifd.errors import CallerError, UsageError
from multifd.hookspecs import hookimpl
from multifd.net.recording import RecordingWriter
from multifd.observe.hooks import BACK, ObservedChannel


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
        self._directory = self._first
        if self._number > 1:
            self._directory = self._first.with_name(f"{self._first.name}-{self._number}")
        self._recordings: dict[str, RecordingWriter] = {}
        self._check(self._directory)
        part = _incomplete(self._directory)
        self._recordings = {
            direction: RecordingWriter(part / direction if len(directions) > 1 else part) for direction in directions
        }

    @hookimpl
    def multifd_observe_main(self, direction: str, data: memoryview) -> None:
        if direction != BACK:
            self._recordings[direction].main(data)

    @hookimpl
    def multifd_observe_packet(
        self, channel: ObservedChannel, header: memoryview, payload: Sequence[memoryview]
    ) -> None:
        self._recordings[channel.direction].channel(channel.id, channel.init, [header, *payload])

    @hookimpl
    def multifd_observe_finish(self, complete: bool) -> None:
        with ExitStack() as cleanup:
            for recording in self._recordings.values():
                cleanup.callback(recording.close, to_disk=complete)
        if complete:
            _incomplete(self._directory).rename(self._directory)


def _incomplete(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.incomplete")
