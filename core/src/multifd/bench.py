"""What every compressor costs and gains on one's own memory, and which one to migrate with.

Packets spread evenly over an image go through each setting's two ends, in one thread and in
memory, and what is decoded is compared with what was encoded.  A migration is modelled as

    seconds = max(encode CPU / cores, decode CPU / cores, wire bytes / link)

and nothing else: source, link and destination work at the same time, so the slowest decides; the
guest writes nothing meanwhile; pages come from memory and go to memory.  Both ends are multifd's.
CPU time is the thread's, as machines are shared; a device's work is none, so the wall clock tells
its time.  MB and GB are 10^6 and 10^9 bytes of normal pages, bandwidths bits per second.
"""

from __future__ import annotations

import html
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, cycle, groupby, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from multifd import plugins
from multifd.effort import Choice, Effort
from multifd.errors import CallerError, CompressorError, MultifdError, counted
from multifd.flags import PACKET_SIZE
from multifd.hookspecs import Facts
from multifd.migrate import next_data, open_block
from multifd.plugins import HOOK_ERRORS, Compressor, Settings, Spec
from multifd.ram import packet_buffer, without, zero_indexes
from multifd.send import Batch, Encoder, read_batch
from multifd.snapshot import Source, open_source
from multifd.wire import header_length

MODEL = "seconds = max(encode CPU / cores, decode CPU / cores, wire bytes / link)"
#: Bits per second of the links that a recommendation is made for where none is named.
LINKS = (1e8, 1e9, 1e10, 2.5e10, 1e11)
#: Normal pages that each setting is measured on, bytes, and the seconds after which it has seen enough.
SAMPLE_BYTES = 64 << 20
SAMPLE_SECONDS = 2.0
#: Bytes of the image that are read at most, where most of them are zero.
READ_BYTES = 1 << 30
#: Levels that are tried where a compressor has them, with its default and its highest.  Not 0: zlib and zstd mean
#: something else by it than an effort.
LEVELS = (-50, -5, -1, 1, 2, 3, 6, 9, 12, 15, 19)
#: Times that differ by less are the same, and the one with less CPU time is better.
TOLERANCE = 0.05


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


class Codec:
    """A compressor's sending and receiving channel joined by memory; `encoding` and `decoding` say what they took."""

    def __init__(self, compressor: Compressor, settings: Settings, page_size: int) -> None:
        self._compressor = compressor
        self._encoder = Encoder(0, page_size, Effort(Choice.of(compressor, settings)))
        self._receiver = compressor.channel(0, page_size, compressor.settings({}, sending=False))
        self._receiver.bind(self._read_into)
        self._unread = memoryview(b"")
        self._buffer = packet_buffer()
        self.encoding = Spent()
        self.decoding = Spent()

    def set_up(self) -> None:
        """Raises CompressorError."""
        self._encoder.set_up()
        try:
            self._compressor.hook.multifd_recv_setup(channel=self._receiver)
        except HOOK_ERRORS as error:
            raise self._compressor.failed("multifd_recv_setup", error) from error

    def encode(self, pages: Sequence[memoryview]) -> bytes:
        """One packet's payload.  Raises CompressorError."""
        with self.encoding:
            payload = self._encoder.encode(pages)
        return b"".join(payload)

    def decode(self, payload: bytes, length: int) -> bytes:
        """The `length` bytes of pages in a payload.  Raises CompressorError."""
        self._receiver.next_packet_size = len(payload)
        self._unread = memoryview(payload)
        pages = memoryview(self._buffer)[:length]
        try:
            with self.decoding:
                self._compressor.hook.multifd_recv(channel=self._receiver, pages=pages)
        except HOOK_ERRORS as error:
            raise self._compressor.failed("multifd_recv", error) from error
        if self._unread:
            raise CompressorError(f"{len(self._unread)} of {len(payload)} payload bytes are left over")
        return self._buffer[:length]

    def close(self) -> None:
        """Clean both ends up."""
        self._encoder.close()
        self._compressor.cleanup("recv", self._receiver)

    def _read_into(self, wanted: memoryview) -> None:
        if len(wanted) > len(self._unread):
            raise ValueError(f"read_into of {len(wanted)} bytes, {len(self._unread)} are left of this payload")
        wanted[:] = self._unread[: len(wanted)]
        self._unread = self._unread[len(wanted) :]


@dataclass(slots=True)
class Sample:
    """Packets' runs of normal pages, and how much of the image was looked at to find them, bytes."""

    packets: list[list[memoryview]] = field(default_factory=list)
    looked_bytes: int = 0
    hole_bytes: int = 0
    normal_bytes: int = 0


def take_sample(source: Source) -> Sample:
    """Read packets spread evenly over all blocks, until there are SAMPLE_BYTES of normal pages.

    Holes count as zero pages and are not read.  What a packet of a large image has in common with
    its neighbours is not seen, as they are not taken together.  Raises CallerError where all of it is zero,
    HostError where a file cannot be read.
    """
    sample = Sample()
    buffer = memoryview(packet_buffer())
    with ExitStack() as cleanup:
        files = [open_block(item.block, item.path, cleanup) for item in source.blocks]
        ends = list(accumulate(-(-file.block.used_length // PACKET_SIZE) for file in files))
        for number in spread(ends[-1]):
            which = bisect_right(ends, number)
            file = files[which]
            offset = (number - (ends[which - 1] if which else 0)) * PACKET_SIZE
            length = min(PACKET_SIZE, file.block.used_length - offset)
            sample.looked_bytes += length
            if next_data(file.fd, offset, file.block.used_length) >= offset + length:
                sample.hole_bytes += length
                continue
            read_batch(Batch(file, offset, length), buffer)
            _add(sample, buffer[:length], source.page_size)
            read = sample.looked_bytes - sample.hole_bytes
            if sample.normal_bytes >= SAMPLE_BYTES or (read >= READ_BYTES and sample.packets):
                break
    if not sample.packets:
        raise CallerError(f"{source.path} holds zero pages only: there is nothing to compress")
    return sample


def spread(count: int) -> Iterator[int]:
    """The numbers of range(count), each once, in an order of which any beginning is spread evenly."""
    step = max(int(count * (math.sqrt(5) - 1) / 2), 1)
    while math.gcd(step, count) != 1:
        step += 1
    return (number * step % count for number in range(count))


def _add(sample: Sample, pages: memoryview, page_size: int) -> None:
    """Keep a packet's normal pages, which are copied next to each other but stay the runs that they were."""
    runs = without(zero_indexes(pages, page_size), len(pages) // page_size)
    if runs:
        data = memoryview(b"".join(pages[first * page_size : end * page_size] for first, end in runs))
        ends = list(accumulate((end - first) * page_size for first, end in runs))
        sample.packets.append([data[start:end] for start, end in zip([0, *ends], ends, strict=False)])
        sample.normal_bytes += len(data)


def levels(facts: Facts) -> Sequence[int | None]:
    """The levels to try, in rising order; None where there is no level."""
    if facts.levels is None:
        return [None]
    wanted = {*LEVELS, facts.default_level, facts.levels[-1]}
    return sorted(level for level in wanted if level is not None and level in facts.levels)


@dataclass(frozen=True, slots=True)
class Row:
    """One setting, measured; or a compressor that could not be, with the `reason` and nothing else.

    A speed is that of one core, or of one channel of a device, in MB of normal pages per second.
    CPU seconds are for a GB of them.  `sampled_bytes` of them were encoded and decoded.
    """

    compressor: str
    level: int | None = None
    sampled_bytes: int = 0
    encode_mb_per_s: float = 0.0
    decode_mb_per_s: float = 0.0
    ratio: float = 0.0
    encode_cpu_s_per_gb: float = 0.0
    decode_cpu_s_per_gb: float = 0.0
    reason: str = ""

    @property
    def text(self) -> str:
        """As `--compressor` takes it."""
        return self.compressor if self.level is None else f"{self.compressor},level={self.level}"


@dataclass(frozen=True, slots=True)
class Bench:
    """All settings on one image, of which `looked_bytes` were looked at, `zero_bytes` of them zero pages."""

    path: Path
    page_size: int
    cores: int
    memory_bytes: int
    looked_bytes: int
    zero_bytes: int
    sampled_bytes: int
    sampled_packets: int
    rows: tuple[Row, ...]

    @property
    def normal_bytes(self) -> float:
        """Normal pages of the whole image; estimated where not all of it was looked at."""
        return self.memory_bytes * self.sampled_bytes / self.looked_bytes

    @property
    def measured(self) -> list[Row]:
        """The rows that are more than a reason."""
        return [row for row in self.rows if row.sampled_bytes]

    @property
    def none(self) -> Row:
        """The row that all others are compared with."""
        return next(row for row in self.rows if row.compressor == "none")

    def wire_bytes(self, row: Row) -> float:
        """Payloads and packet headers of the whole image."""
        headers = self.memory_bytes / PACKET_SIZE * header_length(self.page_size)
        return self.normal_bytes / row.ratio + headers

    def busy_seconds(self, row: Row) -> float:
        """What the slower of the two sides takes to encode or decode it all with its cores."""
        return self.normal_bytes / 1e6 / min(row.encode_mb_per_s, row.decode_mb_per_s) / self.cores

    def seconds(self, row: Row, link: float) -> float:
        """The time of a migration with this setting over a link of so many bits per second: the model."""
        return max(self.busy_seconds(row), self.wire_bytes(row) * 8 / link)

    def pays_below(self, row: Row) -> float:
        """Bits per second of the link below which this takes less time than none; 0 where it never does."""
        if self.wire_bytes(row) >= self.wire_bytes(self.none):
            return 0.0
        return self.wire_bytes(self.none) * 8 / max(self.busy_seconds(row), self.busy_seconds(self.none))

    def recommend(self, link: float) -> Row:
        """The setting with the least time; of those as good as the best, the one with the least CPU time."""
        best = min(self.seconds(row, link) for row in self.measured)
        good = [row for row in self.measured if self.seconds(row, link) <= best * (1 + TOLERANCE)]
        return min(good, key=lambda row: row.encode_cpu_s_per_gb + row.decode_cpu_s_per_gb)

    def report(self, links: Sequence[float]) -> dict[str, Any]:
        """All of it as a JSON-ready object."""
        return {
            "image": str(self.path),
            "page_size": self.page_size,
            "memory_bytes": self.memory_bytes,
            "looked_bytes": self.looked_bytes,
            "zero_bytes": self.zero_bytes,
            "sampled_bytes": self.sampled_bytes,
            "sampled_packets": self.sampled_packets,
            "cores": self.cores,
            "model": MODEL,
            "settings": [self._row(row) for row in self.rows],
            "links": [
                {
                    "link_bit_per_s": link,
                    "recommended": (best := self.recommend(link)).text,
                    "seconds": self.seconds(best, link),
                    "none_seconds": self.seconds(self.none, link),
                }
                for link in links
            ],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        if not row.sampled_bytes:
            return {"setting": row.text, "compressor": row.compressor, "level": row.level, "reason": row.reason}
        return {"setting": row.text, **asdict(row), "pays_below_bit_per_s": self.pays_below(row)}


def bench(path: str | Path, *, cores: int = 2, on_setting: Callable[[str], None] | None = None) -> Bench:
    """Measure every available compressor on an image or a snapshot, `cores` of each side at work.

    `on_setting` is told each setting before it is measured.  Raises CallerError for what is no
    image or holds zero pages only, or without none, HostError where it cannot be read; a compressor that is not
    available or fails is a row with its reason.
    """
    source = open_source(path)
    sample = take_sample(source)
    states = plugins.rows()
    if not any(state["name"] == "none" and state["available"] for state in states):
        raise CallerError("all others are compared with none: leave it in (--disable, MULTIFD_DISABLE)")
    found: list[Row | _Measured] = []
    for state in states:
        reason = "; ".join(filter(None, (state["reason"], state["install"] if state["reason"] else "")))
        if state["available"]:
            found += _measure_all(state["name"], state["hardware"], reason, sample, source.page_size, on_setting)
        else:
            found.append(Row(state["name"], reason=reason))
    # Packets differ, and a slow setting saw only the first of them: what the best of those that saw all of them made
    # of these and of all tells what it would have made of all.
    done = [item for item in found if isinstance(item, _Measured)]
    reference = min(done, key=lambda item: (-len(item.sizes), sum(item.sizes)))
    return Bench(
        path=source.path,
        page_size=source.page_size,
        cores=cores,
        memory_bytes=sum(item.block.used_length for item in source.blocks),
        looked_bytes=sample.looked_bytes,
        zero_bytes=sample.looked_bytes - sample.normal_bytes,
        sampled_bytes=sample.normal_bytes,
        sampled_packets=len(sample.packets),
        rows=tuple(item if isinstance(item, Row) else item.row(reference) for item in found),
    )


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
        return max(spent.wall if self.hardware else spent.cpu, 1e-9)

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


def _measure_all(
    name: str,
    hardware: bool,
    reason: str,
    sample: Sample,
    page_size: int,
    on_setting: Callable[[str], None] | None,
) -> Iterator[Row | _Measured]:
    """Every level of one compressor; `reason` is why it works less well than its name promises."""
    try:
        compressor = plugins.load(name)
    except MultifdError as error:
        yield Row(name, reason=str(error))
        return
    for level in levels(compressor.facts):
        blank = Row(name, level, reason=reason)
        if on_setting:
            on_setting(blank.text)
        measured = _Measured(blank, hardware)
        try:
            _measure(compressor, measured, sample, page_size)
        except MultifdError as error:
            yield replace(blank, reason=str(error))
        else:
            yield measured


def _measure(compressor: Compressor, measured: _Measured, sample: Sample, page_size: int) -> None:
    """Send the sample through, as far as the time goes.  Raises CompressorError."""
    settings = compressor.settings(Spec.parse(measured.blank.text).settings, sending=True)
    with closing(Codec(compressor, settings, page_size)) as codec:
        codec.set_up()
        measured.encoding, measured.decoding = codec.encoding, codec.decoding
        for pages in sample.packets:
            data = b"".join(pages)
            payload = codec.encode(pages)
            if codec.decode(payload, len(data)) != data:
                raise CompressorError(f"{compressor}: what it decodes is not what it encoded")
            measured.lengths.append(len(data))
            measured.sizes.append(len(payload))
            if measured.seconds(codec.encoding) + measured.seconds(codec.decoding) > SAMPLE_SECONDS:
                break


# --- the picture ---

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1040, 78, 172, 104, 64
LINE_HEIGHT = 16
#: Bits per second at the ends of its axis; a link beyond them widens it.
NARROW, WIDE = 1e7, 4e11
#: Red, green, blue per compressor; the lower a level, the more white is in it.
COLOURS = (
    (31, 96, 160),
    (196, 64, 20),
    (20, 120, 60),
    (130, 55, 165),
    (150, 90, 5),
    (15, 110, 130),
    (180, 25, 90),
    (80, 90, 20),
)


def picture(bench: Bench, links: Sequence[float]) -> str:
    """An SVG of migration time over bandwidth, both logarithmic: a curve per setting, a dot for the best on a link."""
    rows = bench.measured
    colours = _colours(rows)
    narrow, wide = min(NARROW, *links), max(WIDE, *links)
    slowest = max(bench.seconds(row, narrow) for row in rows) * 1.2
    fastest = min(bench.seconds(row, wide) for row in rows) / 1.2
    right, bottom = WIDTH - RIGHT, TOP + max(500, LINE_HEIGHT * len(rows))

    def x(link: float) -> float:
        return LEFT + (right - LEFT) * math.log(link / narrow) / math.log(wide / narrow)

    def y(seconds: float) -> float:
        return TOP + (bottom - TOP) * math.log(slowest / seconds) / math.log(slowest / fastest)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + BOTTOM}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(LEFT, 28, f"Migration time of {bench.path.name} over the link's bandwidth", size=18),
        _text(LEFT, 48, f"{counted(bench.cores, 'core')} on each side; {MODEL}", fill="#555"),
        _text(LEFT - 8, TOP - 15, "best", anchor="end"),
    ]
    for value, name in _ticks(narrow, wide):
        parts.append(_line(x(value), TOP, x(value), bottom, "#ccc" if name else "#eee"))
        if name:
            parts.append(_text(x(value), bottom + 20, bandwidth(value), anchor="middle"))
    for value, name in _ticks(fastest, slowest):
        parts.append(_line(LEFT, y(value), right, y(value), "#ccc" if name else "#eee"))
        parts.append(_text(LEFT - 8, y(value) + 4, name, anchor="end"))
    middle = (TOP + bottom) / 2
    parts += [
        _text((LEFT + right) / 2, bottom + 46, "bandwidth of the link", anchor="middle"),
        f'<g transform="rotate(-90 22 {middle})">{_text(22, middle, "migration time, seconds", anchor="middle")}</g>',
    ]
    for first, end, row in _best(bench, narrow, wide):
        width = x(end) - x(first)
        parts.append(
            f'<rect x="{x(first):.1f}" y="{TOP - 28}" width="{width:.1f}" height="20" fill="{colours[row]}" '
            f'stroke="white"><title>{_escape(row.text)}</title></rect>'
        )
        if width > 7 * len(_short(row)):
            parts.append(_text((x(first) + x(end)) / 2, TOP - 14, _short(row), fill="white", anchor="middle", size=12))
    rows = sorted(rows, key=lambda row: bench.seconds(row, wide), reverse=True)
    heights = _apart([y(bench.seconds(row, wide)) for row in rows], bottom)
    for row, height in zip(rows, heights, strict=True):
        knee = bench.wire_bytes(row) * 8 / bench.busy_seconds(row)
        corners = [link for link in (narrow, knee, wide) if narrow <= link <= wide]
        points = [(x(link), y(bench.seconds(row, link))) for link in corners]
        leader = [(right + 4, points[-1][1]), (right + 18, height), (right + 22, height)]
        curve, lead = (" ".join(f"{a:.1f},{b:.1f}" for a, b in line) for line in (points, leader))
        width = 3 if row is bench.none else 1.8
        parts.append(
            f'<g class="setting" fill="none" stroke="{colours[row]}"><title>{_escape(row.text)}, ratio {row.ratio:.2f}'
            f'</title><polyline points="{curve}" stroke-width="{width}" stroke-linejoin="round"/>'
            f'<polyline points="{lead}" stroke-opacity="0.5"/></g>'
        )
        parts.append(_text(right + 26, height + 4, _short(row), fill=colours[row]))
    for link in links:
        best = bench.recommend(link)
        seconds = bench.seconds(best, link)
        parts.append(
            f'<circle cx="{x(link):.1f}" cy="{y(seconds):.1f}" r="5" fill="{colours[best]}" stroke="white" '
            f'stroke-width="1.5"><title>{_escape(best.text)}, {seconds:.3g} s</title></circle>'
        )
    return "\n".join([*parts, "</svg>\n"])


def bandwidth(bits: float) -> str:
    """Bits per second for people: three digits and a unit."""
    for unit in ("bit/s", "kbit/s", "Mbit/s", "Gbit/s"):
        if bits < 999.5:
            return f"{bits:.3g} {unit}"
        bits /= 1000
    return f"{bits:.4g} Tbit/s"


def _short(row: Row) -> str:
    return row.compressor if row.level is None else f"{row.compressor} {row.level}"


def _colours(rows: Sequence[Row]) -> dict[Row, str]:
    found = dict.fromkeys(rows, "#111")
    names = dict.fromkeys(row.compressor for row in rows if row.compressor != "none")
    for name, colour in zip(names, cycle(COLOURS), strict=False):
        mine = [row for row in rows if row.compressor == name]
        for place, row in enumerate(reversed(mine)):
            white = 0.3 * place / len(mine)
            found[row] = "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in colour)
    return found


def _ticks(low: float, high: float) -> Iterator[tuple[float, str]]:
    """1, 2, 5, 10 ... between two values; only powers of ten have a name."""
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for digit in (1, 2, 5):
            value = float(f"{digit}e{power}")
            if low <= value <= high:
                yield value, f"{value:g}" if digit == 1 else ""


def _best(bench: Bench, narrow: float, wide: float) -> Iterator[tuple[float, float, Row]]:
    """The best setting from one bandwidth to the next."""
    steps = 400
    edges = [narrow * (wide / narrow) ** (step / steps) for step in range(steps + 1)]
    for row, group in groupby(pairwise(edges), key=lambda edge: bench.recommend(math.sqrt(edge[0] * edge[1]))):
        spans = list(group)
        yield spans[0][0], spans[-1][1], row


def _apart(heights: Sequence[float], bottom: float) -> list[float]:
    """Rising heights, moved as little as makes them a line of text apart, and none below the bottom."""
    groups: list[list[float]] = []  # of heights less their lines: what overlaps shares its mean
    for place, height in enumerate(heights):
        groups.append([height - place * LINE_HEIGHT])
        while len(groups) > 1 and fmean(groups[-2]) >= fmean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    means = [fmean(group) for group in groups for _ in group]
    highest = bottom - (len(heights) - 1) * LINE_HEIGHT
    return [min(mean, highest) + place * LINE_HEIGHT for place, mean in enumerate(means)]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, *, fill: str = "#111", anchor: str = "start", size: int = 13) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="{fill}">{_escape(text)}</text>'


def _escape(text: str) -> str:
    """A file's name may hold what XML cannot."""
    return html.escape("".join(letter if letter.isprintable() else "?" for letter in text))
