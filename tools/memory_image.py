"""Build a memory image of contents that exist on this machine: what a guest's memory is made of.

About 40 % zero pages, 25 % process memory (the heap of a child Python that has parsed its
standard library), the rest file contents as a page cache holds them (programs, libraries,
texts).  Extents of 4 KiB to 1 MiB are mixed with a fixed seed, as a guest's memory is.

    python tools/memory_image.py IMAGE [--mib 512]
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PAGE = 4096
ZERO_SHARE, HEAP_SHARE = 0.40, 0.25
HEAP_MODE = "--write-heap"


def write_heap(size: int) -> None:
    """The child: fill memory with syntax trees, then write `size` bytes of it to stdout."""
    trees = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        try:
            trees.append(ast.parse(path.read_bytes()))
        except (SyntaxError, ValueError, RecursionError):
            continue
        if len(trees) % 50 == 0 and resident() > 1.3 * size:
            break
    left = size
    maps = Path("/proc/self/maps").read_text(encoding="ascii").splitlines()
    with open("/proc/self/mem", "rb", 0) as memory:
        for line in maps:
            area, permissions, _, _, inode, *_ = line.split()
            if not permissions.startswith("rw") or inode != "0":
                continue
            start, end = (int(number, 16) for number in area.split("-"))
            memory.seek(start)
            while left > 0 and start < end:
                data = memory.read(min(end - start, 1 << 20, left))
                pages = (data[at : at + PAGE] for at in range(0, len(data), PAGE))
                used = b"".join(page for page in pages if any(page))
                sys.stdout.buffer.write(used)
                start, left = start + len(data), left - len(used)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


def file_pages(size: int) -> Iterator[bytes]:
    """Contents of programs, libraries and texts, each filled up to whole pages."""
    folders = ["/usr/lib", "/usr/bin", "/usr/share", sysconfig.get_path("stdlib")]
    for folder in folders:
        taken = 0
        for root, subfolders, names in os.walk(folder):
            subfolders.sort()
            for name in sorted(names):
                path = Path(root, name)
                try:
                    if path.is_symlink() or not path.is_file():
                        continue
                    data = path.read_bytes()[: 4 << 20]
                except OSError:
                    continue
                taken += len(data)
                yield data + bytes(-len(data) % PAGE)
                if taken > size:
                    break
            if taken > size:
                break


def build(image: Path, size: int) -> None:
    pages = size // PAGE
    heap_size = int(pages * HEAP_SHARE) * PAGE
    with subprocess.Popen([sys.executable, __file__, HEAP_MODE, str(heap_size)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        heap = child.stdout.read(heap_size)
    file_size = size - int(pages * ZERO_SHARE) * PAGE - len(heap)
    found = bytearray()
    for data in file_pages(file_size // 3):
        found += data
    contents = heap + bytes(found[:file_size])
    mix = random.Random(1)
    extents = []
    at = 0
    while at < len(contents):
        length = min(mix.choice((1, 2, 4, 16, 64, 256)) * PAGE, len(contents) - at)
        extents.append((at, length))
        at += length
    left = pages - len(contents) // PAGE
    while left > 0:
        count = min(mix.choice((1, 2, 4, 16, 64, 256)), left)
        extents.append((-1, count * PAGE))
        left -= count
    mix.shuffle(extents)
    with open(image, "wb") as file:
        for at, length in extents:
            # Written, not skipped: a memory dump has no holes.
            file.write(bytes(length) if at < 0 else contents[at : at + length])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--mib", type=int, default=512, help="size in MiB (512)")
    arguments = parser.parse_args()
    build(arguments.image, arguments.mib << 20)


if __name__ == "__main__":
    if sys.argv[1:2] == [HEAP_MODE]:
        write_heap(int(sys.argv[2]))
    else:
        main()
