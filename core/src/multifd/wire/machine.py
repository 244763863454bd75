"""What a machine type's name says of the QEMU that made it; no I/O."""

from __future__ import annotations

import re

#: QEMU's own versioned names.  A distribution's say its own version (`pc-q35-rhel9.6.0`), others none (`microvm`).
VERSIONED = re.compile(r"(?:pc-q35|pc-i440fx|virt|pseries|s390-ccw-virtio)-(\d{1,3})\.(\d{1,3})", re.ASCII)


def version(machine: str) -> tuple[int, int] | None:
    """The release of QEMU's that a machine type is of; None where its name does not tell."""
    found = VERSIONED.fullmatch(machine)
    return (int(found[1]), int(found[2])) if found else None


def takes_unasked_ack(machine: str) -> bool:
    """Whether a source from 10.0 on, with this machine type, takes a switchover-ack that it may not wait for.

    From machine type 11.1 on it counts whom it has to wait for, and fails where one too many comes (seen with 11.1).
    Before, it waits for one while capability switchover-ack is on, and takes it otherwise, too (seen with 10.0 and
    11.1): the wire does not tell whether that is on.
    """
    return (found := version(machine)) is not None and found <= (11, 0)
