"""What a migration through the relay came to, and how far one is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from multifd.jobs.relay.channel import Channel
from multifd.jobs.relay.counters import Sample
from multifd.jobs.relay.mainchannel import MainChannel
from multifd.jobs.report import Progress
from multifd.net.socket import SocketConnection
from multifd.wire.counts import Counts
from multifd.wire.flags import method_name


@dataclass(frozen=True, slots=True)
class Relayed:
    """What one migration through the relay came to.

    Bytes are those of all connections, from source to destination.  `confirmed` says that the destination answered
    that it has everything; where it is False, return-path is off on the source: nobody asked.  `rounds_checked`
    is False where a part of the main channel could not be read, so that only the destination can tell whether all of it
    came.  `uuid` is the VM's, as the source has it; `source_address` and `destination_address` are URIs.
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
    rounds_checked: bool
    statistics: dict[str, int]
    uuid: str
    source_address: str
    destination_address: str

    @classmethod
    def of(
        cls,
        seconds: float,
        main: tuple[SocketConnection, SocketConnection],
        channels: Sequence[Channel],
        about: Mapping[str, str],
        *,
        to: str | None,
        used: Mapping[str, int],
        confirmed: bool,
        rounds_checked: bool,
    ) -> Self:
        """Of a migration with this main channel, from its source and to its destination, and these multifd channels.

        `about` is as for `multifd.log`; `to` is what it was written with, None where payloads passed as they were;
        `used` counts packets by their setting, where several were chosen between.
        """
        source, destination = main
        counts = Counts.total(channel.counts for channel in channels)
        statistics = Counter(used)
        for channel in channels:
            statistics.update(channel.statistics)
        came = "+".join(map(method_name, sorted(set().union(*(channel.methods for channel in channels))))) or "none"
        return cls(
            seconds=round(seconds, 6),
            bytes_in=source.bytes_read + sum(channel.source.bytes_read for channel in channels),
            bytes_out=destination.bytes_written + sum(channel.destination.bytes_written for channel in channels),
            packets=counts.packets,
            normal_pages=counts.normal_pages,
            zero_pages=counts.zero_pages,
            channels=len(channels),
            source=came,
            destination=to or came,
            confirmed=confirmed,
            rounds_checked=rounds_checked,
            statistics=dict(statistics),
            uuid=about["uuid"],
            source_address=about["source"],
            destination_address=about["destination"],
        )


def counters(
    main: tuple[SocketConnection, SocketConnection | None], channels: Sequence[Channel], to: str | None
) -> dict[Sample, float]:
    """What went through so far; the main channel, from its source and to its destination, has no method."""
    source, destination = main
    found: dict[Sample, float] = {}
    for channel in channels:
        found |= channel.counters(to)
    found[Sample("bytes", (("direction", "in"), ("channel", "main")))] = source.bytes_read
    if destination is not None:
        found[Sample("bytes", (("direction", "out"), ("channel", "main")))] = destination.bytes_written
    return found


def progress(
    seconds: float, main: MainChannel, destination: SocketConnection | None, channels: Sequence[Channel]
) -> Progress:
    """How far one is; its main channel may not have reached the destination yet.  In postcopy it is about that."""
    pages = main.zero_pages + main.followed // main.page_size + sum(channel.counts.pages for channel in channels)
    wire = sum(channel.destination.bytes_written for channel in channels)
    wire += destination.bytes_written if destination is not None else 0
    return Progress(seconds, pages, main.memory_bytes // main.page_size, pages * main.page_size, wire)
