"""Migrations made by hand, mutations of their whole packets, and what each of these means.

Nothing here comes from multifd, so that it can judge multifd.  A migration is a guest whose memory changes while it
moves, written as QEMU 7.2 or 10.0 does; its last memory is known here.  A mutant is a stream that its source did not
send.
"""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streams

PAGE = 4096
INIT = 64
#: Their payloads refer back to the channel's earlier ones, and have no check.
WITH_STATE = ("zlib", "zstd")
WORDS = [f"{word} {number} " for word in ("page", "guest", "channel", "round") for number in range(40)]

Memory = dict[str, bytes]
#: A block and an offset.
Where = tuple[str, int]


@dataclass(frozen=True, eq=False)
class Packet:
    """One packet as it is on the wire, the round that it was made for, and what is in it.

    One with neither SYNC nor pages is the empty one that QEMU 7.2 sends for each SYNC with pages.
    """

    wire: bytes
    round: int
    number: int
    sync: bool
    normal: Sequence[Where]
    zero: Sequence[Where]
    payload: bytes

    @property
    def pages(self) -> list[Where]:
        return [*self.normal, *self.zero]

    @property
    def empty(self) -> bool:
        return not (self.sync or self.pages)


Channels = list[list[Packet]]


def wires(channels: Channels) -> list[bytes]:
    """The channels as bytes."""
    return [
        streams.init(number) + b"".join(packet.wire for packet in channel) for number, channel in enumerate(channels)
    ]


#: The words of each section of RAM on the main channel, the first one's behind its block list.
Sections = list[list[bytes]]


@dataclass(frozen=True)
class Migration:
    """A whole one: its channels, its main channel's sections, and the pages that are zero there, round by round."""

    method: str
    old: bool
    return_path: bool
    channels: Channels
    memory: Memory
    sections: Sections
    zeros: list[list[Where]]

    def main(self, sections: Sections | None = None) -> bytes:
        """The main channel, with these sections in place of its own."""
        first, *middle, last = (b"".join(words) for words in sections or self.sections)
        blocks = streams.ram_start([(name, len(data)) for name, data in self.memory.items()], flush=False)
        end = streams.EOS + streams.FOOTER
        parts = [
            streams.FILE_HEADER,
            streams.configuration("pc-q35-7.2" if self.old else "pc-q35-10.0"),
            streams.RETURN_PATH if self.return_path else b"",
            blocks.removesuffix(end) + first + end,
            *(streams.section(2, words, flush=False) for words in middle),
            b"" if self.old else streams.SWITCHOVER_START,
            streams.section(3, last, flush=False),
            streams.DEVICE_STATE,
            streams.description(),
        ]
        return b"".join(parts)


# --- a migration ---

#: A packet's pages: normal ones, and zero ones.
Job = tuple[list[Where], list[Where]]


def make(mix: random.Random, method: str, *, old: bool | None = None) -> Migration:
    """1 to 4 channels, 1 to 4 rounds; as QEMU 7.2 where `old`, else as 10.0."""
    source = _Source(mix, method, mix.random() < 0.5 if old is None else old)
    zeros = [source.round(index) for index in range(mix.randint(1, 4) + 1)]
    if mix.random() < 0.8:  # QEMU may cut the last ones off
        source.settle(len(zeros), source.owed)
    memory = {name: bytes(data) for name, data in source.memory.items()}
    if source.old:  # a sync point at the end of each section
        sections = [[streams.zero_word(at, name) for name, at in each] for each in zeros]
    else:  # at each FLUSH: none, one or several in a section
        sections = [[streams.FLUSH], []]
        for _ in zeros[2:]:
            sections += [[]] if mix.random() < 0.7 else []
            sections[-1].append(streams.FLUSH)
        sections.append([streams.FLUSH])
    return Migration(method, source.old, mix.random() < 0.5, source.channels, memory, sections, zeros)


class _Source:
    def __init__(self, mix: random.Random, method: str, old: bool) -> None:
        self.mix = mix
        self.method = method
        self.old = old
        self.channels: Channels = [[] for _ in range(mix.randint(1, 4))]
        self.encoders = [_encoder(method) for _ in self.channels]
        self.memory = {"pc.ram": bytearray(PAGE * mix.randint(6, 20)), "vga.vram": bytearray(PAGE * mix.randint(1, 8))}
        self.number = 0
        #: The channels that have an empty packet to send.
        self.owed: set[int] = set()
        self.stale = [0] * len(self.channels)

    def round(self, index: int) -> list[Where]:
        """The guest writes, the channels send; returns what the main channel has to send.  Nothing in round 0."""
        much = (0, 1)[index] if index < 2 else self.mix.choice((0, 0.1, 0.5))
        jobs: list[Job] = []
        on_main: list[Where] = []
        room, block = 0, ""
        for name, data in self.memory.items():
            for at in range(0, len(data), PAGE):
                if self.mix.random() >= much:
                    continue
                data[at : at + PAGE] = page = _page(self.mix)
                zero = not any(page) and self.mix.random() < 0.9
                if zero and self.old:
                    on_main.append((name, at))
                    continue
                if not room or block != name:
                    # 7.2 sends a packet's last page once more at times, first in the next one.
                    again = self.old and block == name and self.mix.random() < 0.1
                    jobs.append((jobs[-1][0][-1:] if again else [], []))
                    room, block = self.mix.randint(1, 4), name
                room -= 1
                jobs[-1][zero].append((name, at))
        self._send(index, jobs)
        return on_main

    def _send(self, index: int, jobs: list[Job]) -> None:
        """A round's packets and its SYNCs."""
        mix = self.mix
        order: list[tuple[int, Job | None]] = [(mix.randrange(len(self.channels)), job) for job in jobs]
        order += [(channel, None) for channel in range(len(self.channels))]
        if not self.old:  # each channel takes a number when it sends
            turns = [channel for channel, _ in order]
            queues = {turn: iter([each for each in order if each[0] == turn]) for turn in turns}
            mix.shuffle(turns)
            order = [next(queues[turn]) for turn in turns]
        last = {channel: job for channel, job in order if job is not None}
        merged = {channel: job for channel, job in last.items() if self.old and mix.random() < 0.3}
        self.settle(index, {channel for channel in self.owed if channel in last or mix.random() < 0.7})
        for number, (channel, job) in enumerate(order, self.number):
            if job is None:
                self._packet(channel, index, number, merged.get(channel), sync=True)
            elif job is not merged.get(channel):  # whose number nobody sees
                self._packet(channel, index, number, job)
        self.number += len(order)
        self.settle(index + 1, self.owed)
        self.owed = set(merged)

    def settle(self, index: int, channels: set[int]) -> None:
        """Send the empty packets of some channels."""
        for channel in channels:
            self._packet(channel, index, self.channels[channel][-1].number)
        self.owed = self.owed - channels

    def _packet(self, channel: int, index: int, number: int, job: Job | None = None, *, sync: bool = False) -> None:
        normal, zero = job or ([], [])
        payload = b""
        if normal:
            payload = self.encoders[channel](b"".join(self.memory[name][at : at + PAGE] for name, at in normal))
            self.stale[channel] = len(payload)
        wire = streams.packet(
            [at for _, at in normal],
            [at for _, at in zero],
            block=(normal + zero)[0][0] if job else "",
            payload=payload,
            size=self.stale[channel] if self.old else len(payload),
            flags=(streams.METHODS[self.method] << 1 if job else 0) | sync,
            alloc=None if self.old or job else 0,
            number=number,
        )
        self.channels[channel].append(Packet(wire, index, number, sync, normal, zero, payload))


def _page(mix: random.Random) -> bytes:
    """Zero, noise, or text that repeats itself and others."""
    kind = mix.random()
    if kind < 0.4:
        return bytes(PAGE) if kind < 0.25 else mix.randbytes(PAGE)
    phrase = "".join(mix.choices(WORDS, k=12)).encode()
    return (phrase * (PAGE // len(phrase) + 1))[:PAGE]


def _encoder(method: str) -> Callable[[bytes], bytes]:
    """Of one channel."""
    if method == "zlib":
        stream = zlib.compressobj(1)
        return lambda data: stream.compress(data) + stream.flush(zlib.Z_SYNC_FLUSH)
    if method == "zstd":
        zstd = streams.other_zstd()
        compressor = zstd.ZstdCompressor(level=1)
        return lambda data: bytes(compressor.compress(data, mode=zstd.ZstdCompressor.FLUSH_BLOCK))
    return lambda data: streams.encode(method, data)


# --- what channels mean ---


def fits(made: Migration, channels: Channels) -> bool:
    """Whether a source may have sent these packets on these channels.

    All but the empty ones are there once, each in its round, and on each channel the numbers rise.  An empty one may be
    missing; where it is there, it repeats the number before it, and a SYNC with pages came before.
    """
    there: list[Packet] = []
    for channel in channels:
        last, owed, at = -1, 0, 0
        for packet in channel:
            if packet.empty and owed and packet.number == last:
                owed -= 1
                continue
            if packet.empty or packet.round != at or packet.number <= last:
                return False
            there.append(packet)
            last = packet.number
            at += packet.sync
            owed += packet.sync and bool(packet.pages)
        if at != len(made.zeros):
            return False
    wanted = [packet for channel in made.channels for packet in channel if not packet.empty]
    return len(there) == len(wanted) and set(there) == set(wanted)


def read(made: Migration, channels: Channels) -> Memory | None:
    """The memory that channels which fit carry, as another implementation reads it; None where it cannot."""
    rounds = [dict.fromkeys(each, bytes(PAGE)) for each in made.zeros]
    try:
        for channel in channels:
            decoder = streams.PageDecoder(made.method)
            for packet in channel:
                if packet.normal:
                    found = decoder.decode(packet.payload, len(packet.normal), PAGE)
                    rounds[packet.round].update(zip(packet.normal, found, strict=True))
                for where in packet.zero:
                    rounds[packet.round][where] = bytes(PAGE)
    except (AssertionError, EOFError, zlib.error, streams.other_zstd().ZstdError):
        return None
    last = {where: page for each in rounds for where, page in each.items()}
    return {name: b"".join(last[name, at] for at in range(0, len(data), PAGE)) for name, data in made.memory.items()}


@dataclass(frozen=True)
class Mutant:
    """What comes in place of a migration.

    Who takes it must have `memory`: the migration's, but for a few; where it is None, nobody may take it.
    """

    kind: str
    made: Migration
    main: bytes
    channels: list[bytes]
    memory: Memory | None


def judged(kind: str, made: Migration, channels: Channels, cut: list[bytes] | None = None) -> Mutant:
    """A mutant of whole packets; `cut`, the bytes, may have a last piece more.

    A packet whose payload has no state means the same on every channel.  One of zlib or zstd that came on another
    channel, among numbers that rise, is what another guest's source could have sent, byte for byte: it may mean other
    memory, and nobody can know.
    """
    memory = made.memory if fits(made, channels) else None
    if memory is not None and made.method in WITH_STATE:
        memory = read(made, channels)
    return Mutant(kind, made, made.main(), cut or wires(channels), memory)


# --- mutations of channels, in place; where there is nothing to mutate so, they stay as they are ---


def _pick(mix: random.Random, channels: Channels, *, sync: bool) -> tuple[int, int]:
    """A packet: a SYNC, or one that is not only that; its channel, and where it is there."""
    found = [
        (number, at)
        for number, channel in enumerate(channels)
        for at, packet in enumerate(channel)
        if (packet.sync if sync else packet.pages or packet.empty)
    ]
    return mix.choice(found)


def _place(mix: random.Random, channel: list[Packet], packet: Packet) -> int:
    """Where a packet can go: where its number belongs, or anywhere."""
    if mix.random() < 0.3:
        return mix.randint(0, len(channel))
    return sum(each.number < packet.number for each in channel)


def _rounds(channel: list[Packet]) -> Channels:
    """Split behind each SYNC; what comes behind the last one is the last."""
    found: Channels = [[]]
    for packet in channel:
        found[-1].append(packet)
        if packet.sync:
            found.append([])
    return found


def _join(rounds: Channels) -> list[Packet]:
    return [packet for each in rounds for packet in each]


def _drop(mix: random.Random, channels: Channels, *, sync: bool = False) -> None:
    number, at = _pick(mix, channels, sync=sync)
    del channels[number][at]


def _duplicate(mix: random.Random, channels: Channels, *, sync: bool = False) -> None:
    """At once, later, or on another channel."""
    number, at = _pick(mix, channels, sync=sync)
    packet = channels[number][at]
    to = number if mix.random() < 0.5 else mix.randrange(len(channels))
    after = at + 1 if mix.random() < 0.5 else mix.randint(at + 1, len(channels[number]))
    channels[to].insert(after if to == number else _place(mix, channels[to], packet), packet)


def _swap(mix: random.Random, channels: Channels) -> None:
    """Move a packet to another channel; exchange two, a round, or all from some round on."""
    if len(channels) < 2:
        return
    one, other = mix.sample(channels, 2)
    how = mix.choice(("move", "move", "packets", "rounds", "rest"))
    if how == "move":
        packet = one.pop(mix.randrange(len(one)))
        other.insert(_place(mix, other, packet), packet)
    elif how == "packets":
        at = mix.randrange(len(one))
        same = [to for to, packet in enumerate(other) if packet.round == one[at].round]
        to = mix.choice(same) if same and mix.random() < 0.8 else mix.randrange(len(other))
        one[at], other[to] = other[to], one[at]
    else:
        ours, theirs = _rounds(one), _rounds(other)
        at = mix.randrange(len(ours))
        stretch = slice(at, at + 1 if how == "rounds" else None)
        ours[stretch], theirs[stretch] = theirs[stretch], ours[stretch]
        one[:], other[:] = _join(ours), _join(theirs)


def _reorder(mix: random.Random, channels: Channels) -> None:
    """Within a round, before its SYNC."""
    split = [_rounds(channel) for channel in channels]
    found = [(number, at) for number, each in enumerate(split) for at, packets in enumerate(each) if len(packets) > 2]
    if found:
        number, at = mix.choice(found)
        packets = split[number][at]
        packets[:-1] = mix.sample(packets[:-1], len(packets) - 1)
        channels[number] = _join(split[number])


def _reorder_rounds(mix: random.Random, channels: Channels) -> None:
    """Move a packet to another round of its channel; exchange two packets, or two rounds."""
    number = mix.randrange(len(channels))
    split = _rounds(channels[number])
    one, other = mix.sample(range(len(split)), 2)
    how = mix.choice(("move", "packets", "rounds"))
    if how == "rounds":
        split[one], split[other] = split[other], split[one]
    elif split[one] and split[other]:
        at, to = mix.randrange(len(split[one])), mix.randrange(len(split[other]))
        if how == "packets":
            split[one][at], split[other][to] = split[other][to], split[one][at]
        else:
            split[other].insert(to, split[one].pop(at))
    channels[number] = _join(split)


def _replay(mix: random.Random, channels: Channels) -> None:
    """An earlier stretch once more, later, or on another channel."""
    channel = mix.choice(channels)
    start = mix.randrange(len(channel))
    stretch = channel[start : start + mix.randint(1, 4)]
    to = channel if mix.random() < 0.7 else mix.choice(channels)
    after = mix.randint(start + len(stretch), len(channel))
    at = after if to is channel else _place(mix, to, stretch[0])
    to[at:at] = stretch


_PACKETS: dict[str, Callable[[random.Random, Channels], None]] = {
    "drop a packet": _drop,
    "duplicate a packet": _duplicate,
    "swap channels": _swap,
    "reorder in a round": _reorder,
    "reorder across rounds": _reorder_rounds,
    "replay": _replay,
    "drop a SYNC": lambda mix, channels: _drop(mix, channels, sync=True),
    "double a SYNC": lambda mix, channels: _duplicate(mix, channels, sync=True),
}
KINDS = (*_PACKETS, "drop a flush", "double a flush", "cut a channel", "cut the main channel")


def _cut(mix: random.Random, made: Migration) -> Mutant:
    """A channel ends too early: between two packets, or at any byte."""
    number = mix.randrange(len(made.channels))
    ends = [INIT]
    for packet in made.channels[number]:
        ends.append(ends[-1] + len(packet.wire))
    at = mix.choice(ends[:-1]) if mix.random() < 0.3 else mix.randrange(ends[-1])
    channels, cut = list(made.channels), wires(made.channels)
    channels[number] = [packet for packet, end in zip(channels[number], ends[1:], strict=True) if end <= at]
    cut[number] = cut[number][:at]
    return judged("cut a channel", made, channels, cut)


def _flush(mix: random.Random, sections: Sections, *, old: bool, double: bool) -> bool:
    """One marker more on the main channel, or one less: for 7.2 an empty section, or two sections in one.

    False where there are no two: the first one lists the blocks, and there is always a last one.
    """
    if not old:
        words = mix.choice([words for words in sections if words])
        words[:1] = [streams.FLUSH] * 2 * double
    elif double:
        sections.insert(mix.randrange(1, len(sections)), [])
    elif len(sections) > 2:
        at = mix.randrange(1, len(sections) - 1)
        sections[at : at + 2] = [sections[at] + sections[at + 1]]
    else:
        return False
    return True


def mutate(mix: random.Random, made: Migration, kind: str) -> Mutant | None:
    """One mutant; None where this migration cannot be mutated so."""
    if kind == "cut a channel":
        return _cut(mix, made)
    main = made.main()
    if kind == "cut the main channel":
        return Mutant(kind, made, main[: mix.randrange(len(main))], wires(made.channels), None)
    if kind not in _PACKETS:
        sections = [list(words) for words in made.sections]
        if not _flush(mix, sections, old=made.old, double=kind.startswith("double")):
            return None
        return Mutant(kind, made, made.main(sections), wires(made.channels), None)
    channels = [list(channel) for channel in made.channels]
    _PACKETS[kind](mix, channels)
    return judged(kind, made, channels) if channels != made.channels else None


def mutants(mix: random.Random, method: str, count: int) -> Iterator[Mutant]:
    """So many, of all kinds, a few of each migration."""
    while count:
        made = make(mix, method)
        found = [mutant for kind in KINDS if (mutant := mutate(mix, made, kind)) is not None]
        yield from found[:count]
        count -= min(count, len(found))


# --- a receiver's answer ---


def taken(work: Path) -> Memory:
    """The memory of the snapshot `snap`, which is gone then."""
    snap = work / "snap"
    index = json.loads((snap / "snapshot.json").read_text())
    memory = {block["idstr"]: (snap / block["file"]).read_bytes() for block in index["blocks"]}
    shutil.rmtree(snap)
    return memory


def recorded(work: Path, mutant: Mutant, receive: Callable[..., Any], timeout: float = 30) -> Memory:
    """What `receive` makes of a recording; raises what it does."""
    shutil.rmtree(work / "recording", ignore_errors=True)
    streams.Stream(mutant.main, mutant.channels).write(work / "recording")
    receive(f"recording:{work / 'recording'}", work / "snap", digests=False, timeout=timeout)
    return taken(work)


def caught(work: Path, receive: Callable[..., Any], refusal: type[Exception], seed: int, count: int) -> str:
    """The first fault of a receiver among so many mutants, in words; else nothing."""
    mix = random.Random(seed)
    for mutant in mutants(mix, "none", count):
        try:
            memory = recorded(work, mutant, receive, timeout=0.3)
        except refusal:
            continue
        if memory != mutant.memory:
            return f"{mutant.kind}: {'taken' if mutant.memory is None else 'other memory'}"
    return ""
