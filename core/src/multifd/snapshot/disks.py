"""A guest's disks, which are not in its snapshot: which they were when it was taken; no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from multifd.log import escaped
from multifd.wire.document import is_text

#: Disks, and characters of each text, that a message shows.
NAMED = 8
SHOWN = 200
#: Characters of a text: a node of many parts is named by all of them, in JSON.
LONGEST = 64 << 10


@dataclass(frozen=True, slots=True)
class Disk:
    """What a guest's device reads and writes.

    `file` is its name as QEMU says it, on the host where that ran; `format` and `node` are the block driver's, as
    `qcow2`, and the block node's name; `device` is the device's id, or its path in QEMU (QOM) where it has none.
    """

    file: str
    format: str
    node: str
    device: str
    read_only: bool

    def __post_init__(self) -> None:
        """Raises ValueError where a text is none that can be written."""
        for text in (self.file, self.format, self.node, self.device):
            if len(text) > LONGEST or not is_text(text):
                raise ValueError("a disk's name is no text")

    def __str__(self) -> str:
        """`/images/root.qcow2 (qcow2, node root)`; a node that QEMU has named itself has no name that lasts."""
        node = f", node {_short(self.node)}" if self.node and not self.node.startswith("#") else ""
        return f"{_short(self.file)} ({_short(self.format)}{node}{', read-only' if self.read_only else ''})"

    def to_json(self) -> dict[str, Any]:
        """For snapshot.json."""
        return asdict(self)


def _short(text: str) -> str:
    return escaped(text[:SHOWN]) + ("..." if len(text) > SHOWN else "")


def named(disks: Sequence[Disk]) -> str:
    """Some of them in a message."""
    left = len(disks) - NAMED
    return ", ".join(map(str, disks[:NAMED])) + (f", and {left} more" if left > 0 else "")
