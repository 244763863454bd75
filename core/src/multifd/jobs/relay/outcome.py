"""What a migration through the relay came to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relayed:
    """What one migration through the relay came to.

    Bytes are those of all connections, from source to destination.  `confirmed` says that the destination answered
    that it has everything; where it is False, return-path is off on the source: nobody asked.
    """

    seconds: float
    bytes_in: int
    bytes_out: int
    packets: int
    normal_pages: int
    zero_pages: int
    channels: int
    source: str
    destination: str
    confirmed: bool
    statistics: dict[str, int]
