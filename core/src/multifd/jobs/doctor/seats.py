"""Seats of devices on other buses than PCI: QEMU finds their state by controller, and port, lun or nr."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from multifd.jobs.doctor.trouble import Trouble

#: The properties that make a seat, by what a device implements.
SEATS = {
    "usb-device": ("port",),
    "scsi-device": ("channel", "scsi-id", "lun"),
    "virtio-serial-port": ("nr",),
}
#: The seats of these are one list in their controller's state, which has to be the same on both sides.
LISTED = "virtio-serial-port"


@dataclass(frozen=True, slots=True, order=True)
class Seat:
    """`at` is written as the options of a -device are; `bus` is the controller's PCI address where it has one.

    A USB device that was started without a port has one of QEMU's choice, which `at` does not tell.
    """

    kind: str
    bus: str
    at: str
    listed: bool

    def __str__(self) -> str:
        return f"{self.kind} at {self.at} of {self.bus}"


def compare_seats(source: Sequence[Seat], destination: Sequence[Seat]) -> Iterator[Trouble]:
    """Each of the source's has to be taken on the destination; one without a twin there is told by its type."""
    placed_by_qemu = {seat.kind for seat in (*source, *destination) if seat.at.endswith("=")}
    ours, theirs = (Counter(seat for seat in side if seat.kind not in placed_by_qemu) for side in (source, destination))
    left = sorted((theirs - ours).elements())
    for seat in sorted((ours - theirs).elements()):
        twin = next((other for other in left if other.kind == seat.kind), None)
        if twin is not None:
            left.remove(twin)
            where, instead = seat.at, twin.at
            if seat.bus != twin.bus:
                where, instead = f"{seat.at} of {seat.bus}", f"{twin.at} of {twin.bus}"
            yield Trouble(
                f"{seat.kind} is at {where} on the source, at {instead} on the destination",
                f"start the destination with -device {seat.kind},{seat.at}, behind the same controller",
            )
    for seat in left:
        if seat.listed:
            yield Trouble(f"the source has no {seat}, the destination has one", "start the destination without")
