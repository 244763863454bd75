"""A recording to be read, and what is none named for what it is."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from multifd.errors import CallerError
from multifd.net.recording import MAIN_FILE, RecordedConnection, open_recording
from multifd.snapshot.directory import read_head
from multifd.snapshot.foreign import HEAD, STREAM, foreign


def open_named(directory: str) -> tuple[RecordedConnection, list[RecordedConnection]]:
    """As `open_recording`.  Raises CallerError, also where the main channel's file is of another kind."""
    path = Path(directory) / MAIN_FILE
    if kind := kind_of(path, but=STREAM):
        raise CallerError(f"{path} is no recording's: it is {kind}")
    return open_recording(directory)


def kind_of(path: Path, *, but: bytes = b"") -> str | None:
    """What a file is that is neither memory nor begins with `but`, and what to do; None, too, where it cannot be read.

    As `foreign` says it.
    """
    with suppress(OSError, CallerError):
        head = read_head(path, HEAD)
        return None if but and head.startswith(but) else foreign(head)
    return None
