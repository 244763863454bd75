"""A snapshot on disk: one sparse file per RAM block, the device state, and snapshot.json.

    DIR/snapshot.json        format, uuid, machine, page_size, sync, blocks, files, transfer
    DIR/0-pc.ram.raw         RAM block 0, as long as the block, holes where pages are zero
    DIR/configuration.bin    the main channel's configuration section, as it came
    DIR/device_state.bin     what followed the RAM sections, as it came, description included

It is written under another name beside its own and renamed when all of it is on disk.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from multifd.errors import CallerError, os_errors
from multifd.wire.packet import Buffer

FORMAT = 1
INDEX = "snapshot.json"
CONFIGURATION = "configuration.bin"
DEVICE_STATE = "device_state.bin"
SYNC_MODES = ("section", "round")


def read_index(directory: Path) -> dict[str, Any]:
    """What snapshot.json says.  Raises CallerError where there is none, or it is no JSON object."""
    path = directory / INDEX
    with os_errors(path, CallerError):
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise CallerError(f"{directory} holds no {INDEX}: it is not a snapshot") from None
    try:
        index = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CallerError(f"{path} is damaged: {error}") from error
    if not isinstance(index, dict):
        raise CallerError(f"{path} is damaged: it is no JSON object")
    return index


def write_index(directory: Path, index: dict[str, Any]) -> None:
    """Replace snapshot.json at once.  What was read from it is written back, unknown keys too.  Raises OSError."""
    draft = directory / (INDEX + ".new")
    write_whole(draft, (json.dumps(index, indent=2) + "\n").encode())
    os.replace(draft, directory / INDEX)
    sync_directory(directory)


def write_whole(path: Path, data: Buffer) -> None:
    """A file that is on the disk when this returns.  Raises OSError."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """The names in a directory are on the disk when this returns.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
