"""Compare settings of zstd and zlib with QEMU's way on real memory: bytes, CPU time, pages that repeat.

    python tools/compare_streams.py IMAGE... [--mib 128] [--runs 3]

QEMU's way is its settings, a call for each page.  Every rival gets the same packets as QEMU makes them (512 KiB,
zero pages left out, two channels in turn), 8 MiB of them, then the next rival does: what else runs on the machine
slows all of them alike.  The least time of the runs counts for each 8 MiB.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import zstandard

import multifd_zlib
import multifd_zstd
from bench import PAGE, plan
from multifd.codec.selection import select
from multifd.codec.settings import Spec

CHANNELS = 2
#: Packets that a rival gets in one go.
PIECE = 16

QEMU, OURS = "QEMU's way", " (multifd's)"

#: One packet's runs in, the payload's length out.
Stream = Callable[[list[memoryview]], int]


def by_page(compress: Callable[[memoryview], bytes], flush: Callable[[], bytes]) -> Stream:
    def stream(runs: list[memoryview]) -> int:
        length = sum(len(compress(run[at : at + PAGE])) for run in runs for at in range(0, len(run), PAGE))
        return length + len(flush())

    return stream


def qemu_zstd(level: int) -> Stream:
    stream = zstandard.ZstdCompressor(level).compressobj()
    return by_page(stream.compress, lambda: stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))


def qemu_zlib(level: int) -> Stream:
    stream = zlib.compressobj(level)
    return by_page(stream.compress, lambda: stream.flush(zlib.Z_SYNC_FLUSH))


def plugin(method: str, level: int) -> Stream:
    compressor, settings = select(Spec(method, {"level": str(level)}), sending=True)
    channel = compressor.channel(0, PAGE, settings)
    compressor.hook.multifd_send_setup(channel=channel)
    return lambda runs: sum(map(len, compressor.hook.multifd_send_prepare(channel=channel, pages=runs)))


def tuned_zstd(level: int, **tuned: Any) -> Stream:
    """The plugin with other settings than its own; without any, the library's, in one frame."""
    patch = mock.patch.dict(multifd_zstd.TUNED, {level: tuned})
    with patch:
        stream = plugin("zstd", level)

    def patched(runs: list[memoryview]) -> int:
        with patch:  # the plugin looks at its first packet
            return stream(runs)

    return patched


def tuned_zlib(level: int, isal: int, memory: int) -> Stream:
    with (
        mock.patch.dict(multifd_zlib.ISAL_LEVELS, {level: isal}),
        mock.patch.object(multifd_zlib, "ISAL_MEMORY", memory),
    ):
        return plugin("zlib", level)


#: Level -> settings of zstd: window, hash and chain in bits, shortest match, and whether long-distance matching is on.
ZSTD: dict[int, list[dict[str, int]]] = {
    -1: [
        {"window_log": 22, "hash_log": 14, "min_match": 6},
        {"window_log": 22, "hash_log": 14, "min_match": 5},
        {"window_log": 22, "hash_log": 15, "min_match": 5},
    ],
    1: [
        {"window_log": 20, "hash_log": 15, "min_match": 6},
        {"window_log": 22, "hash_log": 15, "min_match": 6},
        {"window_log": 24, "hash_log": 15, "min_match": 6},
        {"window_log": 22, "hash_log": 14, "min_match": 6},
        {"window_log": 22, "hash_log": 14, "min_match": 5},
        {"window_log": 22, "hash_log": 15, "min_match": 5},
        {"window_log": 22, "hash_log": 15, "min_match": 4},
        {"window_log": 22, "hash_log": 16, "min_match": 6},
        {"window_log": 22, "hash_log": 15, "min_match": 6, "enable_ldm": 1},
    ],
    2: [
        {"window_log": 22, "hash_log": 15, "min_match": 5},
        {"window_log": 22, "hash_log": 16, "min_match": 5},
        {"window_log": 22, "hash_log": 17, "min_match": 6},
    ],
    3: [
        {"window_log": 22, "hash_log": 17, "chain_log": 16, "min_match": 5},
        {"window_log": 22, "hash_log": 17, "chain_log": 17, "min_match": 5},
        {"window_log": 22, "hash_log": 18, "chain_log": 16, "min_match": 5},
        {"window_log": 22, "hash_log": 17, "chain_log": 16, "min_match": 4},
        {"window_log": 22, "hash_log": 17, "chain_log": 16, "min_match": 5, "enable_ldm": 1},
    ],
}
#: Level of zlib -> ISA-L's levels and memLevels.
ZLIB = {1: [(1, 2), (2, 1), (2, 2), (2, 8), (3, 2)], 2: [(3, 2), (3, 8)]}


def rivals() -> Iterator[tuple[str, dict[str, Callable[[], Stream]]]]:
    """Title, and name -> a new stream; QEMU's way first."""
    for level, tries in ZSTD.items():
        rows: dict[str, Callable[[], Stream]] = {
            QEMU: partial(qemu_zstd, level),
            "the same, a call for each packet": partial(tuned_zstd, level),
        }
        for tuned in tries:
            name = ", ".join(f"{key.removesuffix('_log')} {value}" for key, value in tuned.items())
            mine = tuned == multifd_zstd.TUNED.get(level)
            rows[name + OURS * mine] = partial(tuned_zstd, level, **tuned)
        yield f"zstd, level {level}", rows
    for level, pairs in ZLIB.items():
        rows = {QEMU: partial(qemu_zlib, level)}
        for pair in pairs:
            mine = pair == (multifd_zlib.ISAL_LEVELS.get(level), multifd_zlib.ISAL_MEMORY)
            rows["ISA-L {}, memLevel {}".format(*pair) + OURS * mine] = partial(tuned_zlib, level, *pair)
        yield f"zlib, level {level}", rows


def pieces(image: Path, mib: int) -> list[list[list[memoryview]]]:
    """About `mib` MiB of the image's packets, in pieces spread evenly over it."""
    with open(image, "rb") as file:
        memory = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    packets = [[memory[offset : offset + length] for offset, length in packet] for packet in plan(image)]
    found = [packets[at : at + PIECE] for at in range(0, len(packets), PIECE)]
    step = max(1, len(packets) // (2 * mib))
    return found[::step]


def repeats(image: Path) -> str:
    """How many pages have been sent before, and how many of these a window of 4 or 128 MiB still holds."""
    last: dict[bytes, int] = {}
    total = 0
    found = dict.fromkeys((4 << 20, 128 << 20, sys.maxsize), 0)
    with open(image, "rb") as file:
        for offset, length in chain.from_iterable(plan(image)):
            file.seek(offset)
            run = file.read(length)
            for at in range(0, length, PAGE):
                digest = hashlib.blake2b(run[at : at + PAGE], digest_size=16).digest()
                for window in found:
                    found[window] += digest in last and total - last[digest] < window
                last[digest] = total
                total += PAGE
    near, far, any_distance = (count * PAGE / total for count in found.values())
    return (
        f"{image.stem}: {total >> 20} MiB of normal pages; repeated within 4 MiB {near:.1%}, "
        f"128 MiB {far:.1%}, at any distance {any_distance:.1%}"
    )


def measure(
    streams: dict[str, Callable[[], Stream]], image: Sequence[list[list[memoryview]]], runs: int
) -> dict[str, tuple[int, float]]:
    """Name -> bytes and CPU seconds."""
    sizes: dict[str, int] = {}
    times: dict[tuple[str, int], float] = defaultdict(lambda: float("inf"))
    for _ in range(runs):
        sizes = dict.fromkeys(streams, 0)
        channels = {name: [new() for _ in range(CHANNELS)] for name, new in streams.items()}
        for number, piece in enumerate(image):
            for name, ours in channels.items():
                started = time.process_time()
                for first, stream in enumerate(ours):
                    sizes[name] += sum(map(stream, piece[first::CHANNELS]))
                seconds = time.process_time() - started
                times[name, number] = min(times[name, number], seconds)
    return {name: (sizes[name], sum(times[name, number] for number in range(len(image)))) for name in streams}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--mib", type=int, default=128, help="how much of each image's memory (128)")
    parser.add_argument("--runs", type=int, default=3, help="how often (3)")
    arguments = parser.parse_args()
    taken = {image: pieces(image, arguments.mib) for image in arguments.images}
    for image in taken:
        print(repeats(image))
    print()
    for title, streams in rivals():
        print(f"{title}: bytes and CPU time, QEMU's way is 1", flush=True)
        found = {image: measure(streams, taken[image], arguments.runs) for image in taken}
        print(f"{'':<62}" + "".join(f"{image.stem:>16}" for image in taken))
        for name in streams:
            cells = []
            for results in found.values():
                (size, seconds), (least, first) = results[name], results[QEMU]
                cells.append(f"{size / least:>9.3f} {seconds / first:>6.2f}")
            print(f"{name:<62}" + "".join(cells))
        print(flush=True)


if __name__ == "__main__":
    main()
