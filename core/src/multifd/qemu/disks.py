"""The disks that a QEMU's guest has, as its monitor tells."""

from __future__ import annotations

from typing import Any

from multifd.qemu.monitor import of
from multifd.snapshot.disks import Disk

#: Block drivers that have no file of their own, but pass on to what is below them.
FILTERS = ("throttle", "copy-on-read", "copy-before-write", "preallocate", "blkdebug", "blklogwrites", "compress")


def read_disks(answer: Any) -> tuple[Disk, ...]:
    """`query-block`'s answer, for `Monitor.ask`: what guests' devices and pflashes have in them.

    The same in 7.2, 10.0 and 11.1.  Block nodes that no device has are not in it.
    """
    found = []
    for entry in of(list, answer):
        inserted = entry.get("inserted")
        device = of(str, entry.get("qdev", ""))
        if inserted is None or not device:
            continue
        image = inserted["image"]
        while image["format"] in FILTERS and "backing-image" in image:
            image = image["backing-image"]
        found.append(
            Disk(
                of(str, image["filename"]),
                of(str, image["format"]),
                of(str, inserted.get("node-name", "")),
                device,
                of(bool, inserted["ro"]),
            )
        )
    return tuple(found)
