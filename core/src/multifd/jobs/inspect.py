"""What a recording or a snapshot holds, without decoding a payload."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from multifd.engine.headers import read_packet
from multifd.errors import CallerError, MultifdError, PeerError, counted, os_errors
from multifd.jobs.recording import kind_of, open_named
from multifd.net.connection import MAIN_READ, Connection, Ended
from multifd.snapshot.format import INDEX
from multifd.snapshot.reader import open_snapshot
from multifd.wire.block import check_packet
from multifd.wire.counts import Counts
from multifd.wire.events import BlockList, Configuration, DeviceState, EarlyState, PageData, SyncPoint, ZeroPages
from multifd.wire.flags import PACKET_SIZE, method_name
from multifd.wire.mainchannel import Parser
from multifd.wire.numbers import ChannelNumbers, Numbers, Round
from multifd.wire.packet import INIT, InitPacket, RamPacket, header_length


def inspect(path: str | Path) -> dict[str, Any]:
    """Describe a recording (`main.bin`, `chK.bin`) or a snapshot as a JSON-ready object.

    Raises CallerError for what is neither.  A recording that is cut or damaged is described as
    far as it goes; `ended` says how it ended.
    """
    path = Path(path)
    with os_errors(path, CallerError):
        if not path.is_dir():
            path.stat()
            kind = kind_of(path)
            raise CallerError(
                f"{path} is {kind}" if kind else f"{path} is not a directory: a recording and a snapshot both are"
            )
        try:
            os.lstat(path / INDEX)  # whatever it is
            is_snapshot = True
        except FileNotFoundError:
            is_snapshot = False
    return _snapshot(path) if is_snapshot else _recording(path)


def _snapshot(path: Path) -> dict[str, Any]:
    snapshot = open_snapshot(path)
    transfer = snapshot.index.get("transfer", {})
    wire = transfer.get("wire_bytes", 0)
    ended = "complete" if transfer.get("description", True) else "complete, without a VM description"
    if snapshot.digests is not None and snapshot.digests.manifest != snapshot.digest:
        ended += ", but changed since its digests were made"
    return {
        "kind": "snapshot",
        "machine": snapshot.machine,
        "uuid": str(UUID(bytes=snapshot.uuid)),
        "page_size": snapshot.page_size,
        "sync": snapshot.sync,
        "blocks": [
            {
                "idstr": item.block.idstr,
                "used_length": item.block.used_length,
                "file": item.path.name,
                "stored_bytes": item.stored_bytes(),
                "sha256": entry.get("sha256"),
            }
            for item, entry in zip(snapshot.blocks, snapshot.index["blocks"], strict=True)
        ],
        "early_state_bytes": snapshot.early_state_bytes,
        "device_state_bytes": snapshot.device_state_bytes,
        "disks": None if snapshot.disks is None else [disk.to_json() for disk in snapshot.disks],
        "digest": snapshot.digest,
        "channels": transfer.get("channels"),
        "method": transfer.get("compressor"),
        "packets": transfer.get("packets"),
        "normal_pages": transfer.get("normal_pages"),
        "zero_pages": transfer.get("zero_pages"),
        "wire_bytes": wire,
        "ratio": _ratio(transfer.get("memory_bytes", 0), wire),
        "rounds": transfer.get("rounds"),
        "sync_points": transfer.get("sync_points"),
        "syncs": transfer.get("sync_points", 0) * transfer.get("channels", 0) or None,
        "ended": ended,
    }


def _ratio(memory: int, wire: int) -> float | None:
    return round(memory / wire, 3) if wire else None


@dataclass(slots=True)
class _Tally:
    """Counts of one channel, and which epochs had pages."""

    counts: Counts = field(default_factory=Counts)
    syncs: int = 0
    busy: set[int] = field(default_factory=set)
    methods: Counter[str] = field(default_factory=Counter)
    numbers: ChannelNumbers = field(default_factory=ChannelNumbers)
    rounds: list[Round] = field(default_factory=list)
    problem: str = ""

    def add(self, packet: RamPacket) -> None:
        """A packet of a multifd channel."""
        self.counts.add(packet)
        self.note(len(packet.normal) + len(packet.zero))
        self.syncs += packet.sync
        if ended := self.numbers.add(packet):
            self.rounds.append(ended)

    def note(self, pages: int) -> None:
        """Pages came since the last SYNC."""
        if pages:
            self.busy.add(self.syncs)


def _recording(path: Path) -> dict[str, Any]:
    with ExitStack() as cleanup:
        main, channels = open_named(str(path))
        for connection in (main, *channels):
            cleanup.callback(connection.close)
        parser = Parser()
        head: dict[str, Any] = {
            "machine": "",
            "uuid": None,
            "blocks": [],
            "early_state_bytes": 0,
            "device_state_bytes": 0,
        }
        main_tally = _main(main, parser, head)
        tallies = [_channel(connection, parser, head) for connection in channels]
        wire = main.bytes_read + sum(connection.bytes_read for connection in channels)
    every = [main_tally, *tallies]
    counts = Counts.total(tally.counts for tally in every)
    problems = [tally.problem for tally in every if tally.problem]
    for number, tally in enumerate(tallies):
        if tally.problem:
            continue
        if tally.syncs != main_tally.syncs:
            problems.append(f"channel {number}: {tally.syncs} SYNCs for {main_tally.syncs} sync points")
        elif tally.numbers.since_sync:
            problems.append(f"channel {number}: {counted(tally.numbers.since_sync, 'packet')} after its last SYNC")
    if not problems:
        problems = _numbers_problems(tallies, parser.page_size)
    methods: Counter[str] = sum((tally.methods for tally in tallies), Counter())
    return {
        "kind": "recording",
        "machine": head["machine"],
        "uuid": head["uuid"],
        "page_size": parser.page_size,
        "sync": parser.sync,
        "blocks": head["blocks"],
        "early_state_bytes": head["early_state_bytes"],
        "device_state_bytes": head["device_state_bytes"],
        "channels": len(channels),
        "method": "+".join(sorted(methods)) or None,
        "packets": counts.packets,
        "normal_pages": counts.normal_pages,
        "zero_pages": counts.zero_pages,
        "main_zero_pages": main_tally.counts.zero_pages,
        "wire_bytes": wire,
        "ratio": _ratio(counts.pages * parser.page_size, wire),
        "rounds": len(set().union(*(tally.busy for tally in every))),
        "sync_points": main_tally.syncs,
        "syncs": sum(tally.syncs for tally in tallies),
        "ended": "; ".join(problems) or "complete",
    }


def _numbers_problems(tallies: Sequence[_Tally], page_size: int) -> list[str]:
    """Packets that are missing, or not where they belong."""
    numbers = Numbers(page_size)
    try:
        odd = [numbers.sync_point(rounds) for rounds in zip(*(tally.rounds for tally in tallies), strict=True)]
    except PeerError as error:
        return [str(error)]
    return [text for text in odd if text]


def _main(main: Connection, parser: Parser, head: dict[str, Any]) -> _Tally:
    tally = _Tally()
    try:
        while data := main.read_some(MAIN_READ):
            parser.feed(data)
            for event in parser.events():
                match event:
                    case Configuration(machine, _, uuid):
                        head["machine"] = machine
                        head["uuid"] = str(UUID(bytes=uuid)) if uuid else None
                    case EarlyState(_, data):
                        head["early_state_bytes"] += len(data)
                    case BlockList(blocks):
                        head["blocks"] = [{"idstr": block.idstr, "used_length": block.used_length} for block in blocks]
                        head["by_name"] = {block.idstr: block for block in blocks}
                    case ZeroPages(_, offsets):
                        tally.counts.zero_pages += len(offsets)
                        tally.note(len(offsets))
                    case PageData():
                        tally.counts.normal_pages += 1
                        tally.note(1)
                    case SyncPoint():
                        tally.syncs += 1
                    case DeviceState(data):
                        head["device_state_bytes"] += len(data)
        parser.end()
    except MultifdError as error:
        tally.problem = str(error.at("main channel"))
    return tally


def _channel(connection: Connection, parser: Parser, head: dict[str, Any]) -> _Tally:
    tally = _Tally()
    size = parser.page_size
    header = memoryview(bytearray(header_length(size)))
    payload = memoryview(bytearray(PACKET_SIZE))
    name = connection.name
    try:
        connection.read_into(header[: INIT.size])
        init = InitPacket.unpack(header[: INIT.size])
        name = f"channel {init.id}"
        head["uuid"] = head["uuid"] or str(UUID(bytes=init.uuid))
        while True:
            try:
                packet = read_packet(connection, header, size)
            except Ended as ended:
                if ended.got and not tally.numbers.may_end_in(header[: ended.got]):
                    tally.problem = f"{name}: {ended}"
                return tally  # else judged by its SYNCs
            tally.add(packet)
            if packet.normal or packet.zero:
                check_packet(head.get("by_name", {}), packet, size)
                from multifd.codec.naming import learn  # to look for plugins takes time

                learn(packet.method)
                tally.methods[method_name(packet.method)] += 1
                left = packet.next_packet_size
                while left:
                    part = payload[: min(left, PACKET_SIZE)]
                    connection.read_into(part)
                    left -= len(part)
    except MultifdError as error:
        tally.problem = str(error.at(name))
    return tally
