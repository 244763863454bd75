"""Settings measured on memory: a sample of an image, through each compressor's two ends."""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import astuple, dataclass, field, replace
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path
from typing import Any

from multifd.codec.children import LIMIT, Died, Memory, Say, answers
from multifd.codec.compressor import Compressor
from multifd.codec.probing import compressors
from multifd.codec.readers import Readers
from multifd.codec.selection import load
from multifd.codec.settings import Settings, Spec
from multifd.crew import Crew
from multifd.effort.choice import Choice
from multifd.effort.controller import Effort
from multifd.engine.decoder import Decoder
from multifd.engine.encoder import Encoder
from multifd.errors import CallerError, CompressorError, MultifdError
from multifd.hookspecs import Facts
from multifd.jobs.bench.model import Bench, Row
from multifd.log import log, take_warnings
from multifd.memory.buffer import packet_buffer
from multifd.memory.zeropages import part
from multifd.snapshot.reader import Snapshot, open_snapshot
from multifd.wire.flags import PACKET_SIZE
from multifd.wire.packet import RamPacket

#: Normal pages that each setting is measured on, bytes, and the seconds after which it has seen enough.
SAMPLE_BYTES = 64 << 20
SAMPLE_SECONDS = 2.0
#: Bytes of the image that are read at most, where most of them are zero.
READ_BYTES = 1 << 30
#: Levels that are tried where a compressor has them, with its default and its highest.  Not 0: zlib and zstd mean
#: something else by it than an effort.
LEVELS = (-50, -5, -1, 1, 2, 3, 6, 9, 12, 15, 19)


@dataclass(slots=True)
class Spent:
    """Seconds spent inside `with`."""

    cpu: float = 0.0
    wall: float = 0.0

    def __enter__(self) -> None:
        self.wall -= time.perf_counter()
        self.cpu -= time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.cpu += time.thread_time()
        self.wall += time.perf_counter()

    def seconds(self, hardware: bool) -> float:
        """What counts of it: a device's work takes no CPU time."""
        return self.wall if hardware else self.cpu


class _Memory:
    """A payload to be read as from a connection."""

    def __init__(self) -> None:
        self.unread = memoryview(b"")

    def read_into(self, view: memoryview, *, at_least: int | None = None, due: bool = False) -> int:  # noqa: ARG002
        view[:] = self.unread[: len(view)]
        self.unread = self.unread[len(view) :]
        return len(view)


class Codec:
    """A compressor's sending and receiving channel joined by memory; `encoding` and `decoding` say what they took."""

    def __init__(self, compressor: Compressor, settings: Settings, page_size: int) -> None:
        self._page_size = page_size
        self._flag = compressor.facts.flag
        self._encoder = Encoder(0, page_size, Effort(Choice.of(compressor, settings)))
        self._memory = _Memory()
        self._decoder = Decoder(0, self._memory, Readers((compressor, compressor.settings({}, sending=False))))
        self._buffer = packet_buffer()
        self._packets = 0
        self.encoding = Spent()
        self.decoding = Spent()

    def set_up(self) -> None:
        """Raises CompressorError."""
        self._encoder.set_up()
        self._decoder.begin(self._flag, self._page_size)

    def encode(self, pages: Sequence[memoryview]) -> bytes:
        """One packet's payload.  Raises CompressorError."""
        with self.encoding:
            payload = self._encoder.encode(pages)
        return b"".join(payload)

    def decode(self, payload: bytes, length: int) -> bytes:
        """The `length` bytes of pages in a payload.  Raises CompressorError, PeerError."""
        self._memory.unread = memoryview(payload)
        packet = RamPacket(self._flag, packet_num=self._packets, next_packet_size=len(payload))
        self._packets += 1
        with self.decoding:
            self._decoder.decode(packet, memoryview(self._buffer)[:length], self._page_size)
        return self._buffer[:length]

    def close(self) -> None:
        """Clean both ends up."""
        self._encoder.close()
        self._decoder.close()


@dataclass(slots=True)
class Sample:
    """Packets' runs of normal pages, and how much of the image was looked at to find them, bytes."""

    packets: list[list[memoryview]] = field(default_factory=list)
    looked_bytes: int = 0
    hole_bytes: int = 0
    normal_bytes: int = 0

    @property
    def runs(self) -> list[list[int]]:
        """Of each packet the lengths of its runs, bytes."""
        return [[len(run) for run in packet] for packet in self.packets]


def take_sample(snapshot: Snapshot) -> Sample:
    """Read packets spread evenly over all blocks, until there are SAMPLE_BYTES of normal pages.

    Holes count as zero pages and are not read.  What a packet of a large image has in common with
    its neighbours is not seen, as they are not taken together.  Raises CallerError where all of it is zero,
    HostError where a file cannot be read.
    """
    sample = Sample()
    buffer = memoryview(packet_buffer())
    with ExitStack() as cleanup:
        blocks = [cleanup.enter_context(item.open()) for item in snapshot.blocks]
        ends = list(accumulate(-(-block.block.used_length // PACKET_SIZE) for block in blocks))
        for number in spread(ends[-1]):
            which = bisect_right(ends, number)
            block = blocks[which]
            offset = (number - (ends[which - 1] if which else 0)) * PACKET_SIZE
            length = min(PACKET_SIZE, block.block.used_length - offset)
            sample.looked_bytes += length
            if block.next_data(offset) >= offset + length:
                sample.hole_bytes += length
                continue
            block.read_into(offset, buffer[:length])
            _add(sample, buffer[:length], snapshot.page_size)
            read = sample.looked_bytes - sample.hole_bytes
            if sample.normal_bytes >= SAMPLE_BYTES or (read >= READ_BYTES and sample.packets):
                break
    if not sample.packets:
        raise CallerError(f"{snapshot.path} holds zero pages only: there is nothing to compress")
    return sample


def spread(count: int) -> Iterator[int]:
    """The numbers of range(count), each once, in an order of which any beginning is spread evenly."""
    step = max(int(count * (math.sqrt(5) - 1) / 2), 1)
    while math.gcd(step, count) != 1:
        step += 1
    return (number * step % count for number in range(count))


def _add(sample: Sample, pages: memoryview, page_size: int) -> None:
    """Keep a packet's normal pages, which are copied next to each other but stay the runs that they were."""
    runs, _, _ = part(pages, page_size, range(0, len(pages), page_size))
    if runs:
        data = memoryview(b"".join(runs))
        ends = list(accumulate(map(len, runs)))
        sample.packets.append([data[start:end] for start, end in zip([0, *ends], ends, strict=False)])
        sample.normal_bytes += len(data)


def levels(facts: Facts) -> Sequence[int | None]:
    """The levels to try, in rising order; None where there is no level."""
    if facts.levels is None:
        return [None]
    wanted = {*LEVELS, facts.default_level, facts.levels[-1]}
    return sorted(level for level in wanted if level is not None and level in facts.levels)


@dataclass(slots=True)
class _Measured:
    """What one setting made of the first packets of a sample: their bytes of pages, and of payload."""

    blank: Row
    hardware: bool
    lengths: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    encoding: Spent = field(default_factory=Spent)
    decoding: Spent = field(default_factory=Spent)

    def seconds(self, spent: Spent) -> float:
        """What counts of it; more than nothing."""
        return max(spent.seconds(self.hardware), 1e-9)

    def row(self, reference: _Measured) -> Row:
        """With the size that `reference` saw more packets for; see `bench`."""
        share = sum(reference.sizes[: len(self.sizes)]) / sum(reference.sizes)
        sampled = sum(self.lengths)
        return replace(
            self.blank,
            sampled_bytes=sampled,
            encode_mb_per_s=sampled / 1e6 / self.seconds(self.encoding),
            decode_mb_per_s=sampled / 1e6 / self.seconds(self.decoding),
            ratio=sum(reference.lengths) * share / sum(self.sizes),
            encode_cpu_s_per_gb=self.encoding.cpu / sampled * 1e9,
            decode_cpu_s_per_gb=self.decoding.cpu / sampled * 1e9,
        )


def _reason(state: Mapping[str, Any]) -> str:
    """Why it does not work, or less well than its name promises."""
    return "; ".join(filter(None, (state["reason"], state["install"] if state["reason"] else "")))


def _measure_all(
    state: Mapping[str, Any],
    sample: Sample,
    memory: Memory,
    page_size: int,
    on_setting: Callable[[str], None] | None,
    crew: Crew,
) -> Iterator[Row | _Measured]:
    """Every level of one compressor, in a child process: one in which it crashes or hangs is a row, others go on."""
    name = state["name"]
    begun = 0
    while True:
        blank = Row(name, reason=_reason(state))
        task = {
            "name": name,
            "hardware": state["hardware"],
            "begun": begun,
            "page_size": page_size,
            "runs": sample.runs,
        }
        try:
            for answer in answers(__name__, task, memory=memory, limit=LIMIT, crew=crew):
                match answer:
                    case {"level": level}:
                        begun += 1
                        blank = replace(blank, level=level)
                        if on_setting:
                            on_setting(blank.text)
                    case {"reason": reason}:
                        yield replace(blank, reason=reason)
                    case {"told": text}:
                        log.warning(f"{blank.text}: {text}")
                    case {"sizes": sizes, "encoding": encoding, "decoding": decoding}:
                        lengths = [sum(runs) for runs in sample.runs[: len(sizes)]]
                        yield _Measured(blank, state["hardware"], lengths, sizes, Spent(*encoding), Spent(*decoding))
            return
        except Died as died:
            yield replace(blank, reason=str(died))
            if blank.level is None:
                return


class _Telling(logging.Handler):
    """What a child logs is told by its parent."""

    def __init__(self, say: Say) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say({"told": record.getMessage()})


def child(task: Mapping[str, Any], data: memoryview, say: Say) -> None:
    """The child's part: what is left of a compressor's levels, measured; says something at each packet."""
    take_warnings()
    log.addHandler(_Telling(say))
    try:
        compressor = load(task["name"])
    except MultifdError as error:
        say({"reason": str(error)})
        return
    ends = accumulate(chain.from_iterable(task["runs"]), initial=0)
    views = (data[start:end] for start, end in pairwise(ends))
    packets = [list(islice(views, len(runs))) for runs in task["runs"]]
    for level in levels(compressor.facts)[task["begun"] :]:
        say({"level": level})
        try:
            say(_measure(compressor, Row(compressor.name, level), packets, task, say))
        except MultifdError as error:
            say({"reason": str(error)})


def _measure(
    compressor: Compressor, setting: Row, packets: Sequence[Sequence[memoryview]], task: Mapping[str, Any], say: Say
) -> dict[str, Any]:
    """Send packets through, as far as the time goes.  Raises CompressorError."""
    settings = compressor.settings(Spec.parse(setting.text).settings, sending=True)
    sizes: list[int] = []
    hardware = task["hardware"]
    with closing(Codec(compressor, settings, task["page_size"])) as codec:
        codec.set_up()
        for pages in packets:
            data = b"".join(pages)
            payload = codec.encode(pages)
            if codec.decode(payload, len(data)) != data:
                raise CompressorError(f"{compressor}: what it decodes is not what it encoded")
            sizes.append(len(payload))
            say({})
            if codec.encoding.seconds(hardware) + codec.decoding.seconds(hardware) > SAMPLE_SECONDS:
                break
    return {"sizes": sizes, "encoding": astuple(codec.encoding), "decoding": astuple(codec.decoding)}


def bench(
    path: str | Path,
    *,
    cores: int = 2,
    raw: bool = False,
    on_setting: Callable[[str], None] | None = None,
    crew: Crew | None = None,
) -> Bench:
    """Measure every available compressor on an image or a snapshot, `cores` of each side at work.

    Each is measured in a child process.  `raw` is `open_snapshot`'s.  `on_setting` is told each setting before it is
    measured; `crew` is a new Crew, whose `cancel` ends all of it.  Raises CallerError for what is no image or holds
    zero pages only, or without none, HostError where it cannot be read, Cancelled; a compressor that is not available,
    fails, crashes or hangs is a row with its reason.
    """
    snapshot = open_snapshot(path, raw=raw)
    sample = take_sample(snapshot)
    crew = crew or Crew()
    states = compressors(crew)
    if not any(state["name"] == "none" and state["available"] for state in states):
        raise CallerError("all others are compared with none: leave it in (--disable, MULTIFD_DISABLE)")
    found: list[Row | _Measured] = []
    with Memory(chain.from_iterable(sample.packets)) as memory:
        for state in states:
            if state["available"]:
                found += _measure_all(state, sample, memory, snapshot.page_size, on_setting, crew)
            else:
                found.append(Row(state["name"], reason=_reason(state)))
    # Packets differ, and a slow setting saw only the first of them: what the best of those that saw all of them made
    # of these and of all tells what it would have made of all.
    done = [item for item in found if isinstance(item, _Measured)]
    reference = min(done, key=lambda item: (-len(item.sizes), sum(item.sizes)))
    return Bench(
        path=snapshot.path,
        page_size=snapshot.page_size,
        cores=cores,
        memory_bytes=snapshot.memory_bytes,
        looked_bytes=sample.looked_bytes,
        zero_bytes=sample.looked_bytes - sample.normal_bytes,
        sampled_bytes=sample.normal_bytes,
        sampled_packets=len(sample.packets),
        rows=tuple(item if isinstance(item, Row) else item.row(reference) for item in found),
    )
