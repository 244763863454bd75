"""The software compressors beside the conformance suite: levels, growth, and a bomb that decodes to 1 GiB."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

import images
import streams
from multifd.codec.selection import load
from multifd.effort.choice import Choice
from multifd.errors import CompressorError
from pairs import PAGE, Pair

PACKET = 512 * 1024
NAMES = ["none", "zlib", "zstd", "qatzip-sw", "qpl-sw", "uadk-sw"]


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("zlib", range(10)),
        ("zstd", [-100, -5, -1, 0, 1, 2, 3, 6, 10, 15, 19, 20]),
        ("qatzip-sw", range(1, 10)),
        ("qpl-sw", range(1, 10)),
        ("uadk-sw", range(1, 10)),
    ],
)
def test_levels_mean_what_their_users_expect(name: str, levels: Sequence[int]) -> None:
    """Another implementation decodes each; more effort makes no more bytes; 0 stores in zlib."""
    stdlib = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    pages = b"".join(path.read_bytes() for path in stdlib)[: 2 * 512 * 1024]
    packets = [pages[: 512 * 1024], pages[512 * 1024 :]]
    sizes = {}
    for level in levels:
        pair = Pair(name, {"level": str(level)})
        payloads = [pair.encode([packet]) for packet in packets]
        other = streams.PageDecoder(name)
        assert b"".join(b"".join(other.decode(payload, 128, PAGE)) for payload in payloads) == pages
        sizes[level] = sum(map(len, payloads))
        pair.close()
    if name == "zlib":
        assert len(pages) < sizes[0] < len(pages) * 1.001, "level 0 stores"
        assert sizes[9] <= sizes[6] < sizes[3] < sizes[1]
        assert sizes[2] <= sizes[1] * 1.03, "both ISA-L's"
    elif name in ("qpl-sw", "uadk-sw"):
        assert sizes[9] <= sizes[6] < sizes[4] < sizes[3] < sizes[2] < sizes[1]
    elif name == "qatzip-sw":
        assert sizes[9] <= sizes[6] < sizes[4] < sizes[3] < sizes[2] <= sizes[1]
    else:
        assert sizes[20] <= sizes[10] <= sizes[1] * 1.02
        assert sizes[1] < sizes[-5] < sizes[-100]
        assert abs(sizes[0] - sizes[3]) < 100, "0 is the library's default"


@pytest.mark.parametrize("name", NAMES)
def test_random_pages_grow_little(name: str) -> None:
    pair = Pair(name)
    data = random.Random(8).randbytes(512 * 1024)
    assert len(pair.encode([data])) <= len(data) * 1.001 + 100
    pair.close()


@pytest.mark.parametrize("name", ["zlib", "zstd", "qatzip-sw", "qpl-sw", "uadk-sw"])
def test_the_level_may_change_before_any_packet(name: str) -> None:
    """One stream for a receiver that decodes page by page; storing adds a thousandth at most."""
    compressor = load(name)
    settings = compressor.settings({"level": "adaptive"}, sending=True)
    rungs = Choice.of(compressor, settings).ways
    view = compressor.channel(0, PAGE, settings, live=True)
    compressor.hook.multifd_send_setup(channel=view)
    mix = random.Random(4)
    memory = images.memory()
    receiver = streams.PageDecoder(name)
    used = set()
    for _ in range(120):
        at = mix.randrange(len(memory) - PACKET)
        pages = memory[at : at + PACKET]
        view.level = mix.choice(rungs)[1].level
        payload = b"".join(compressor.hook.multifd_send_prepare(channel=view, pages=[memoryview(pages)]))
        used.add(view.level)
        assert b"".join(receiver.decode(payload, len(pages) // PAGE, PAGE)) == pages
        assert len(payload) <= len(pages) * 1.001
    compressor.cleanup("send", view)
    assert used == set(compressor.facts.ladder)


BOMB = """
import struct, sys, zlib
sys.path.insert(0, {tests!r})
import pairs, streams
from multifd.codec.selection import select
from multifd.codec.settings import Spec
from multifd.errors import CompressorError
from multifd.testing import harness

name = sys.argv[1]
content = bytes(1 << 30)
page_size = 65536 if name in ("qpl-sw", "uadk-sw") else 4096
first = b"x" * page_size
if name == "zlib":
    stream = zlib.compressobj(9)
    warm = stream.compress(first) + stream.flush(zlib.Z_SYNC_FLUSH)
    bomb = stream.compress(content) + stream.flush(zlib.Z_SYNC_FLUSH)
elif name == "qatzip-sw":
    warm = streams.qatzip_member(first, 9)
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    deflated = stream.compress(content) + stream.flush()
    claim = struct.pack("<II", 512 * 1024, len(deflated))
    bomb = warm[:16] + claim + deflated + struct.pack("<II", 0, 512 * 1024)
elif page_size == 65536:  # a length below a page: 64 MiB each
    method = name.removesuffix("-sw")
    warm = streams.encode(method, first, page_size)
    stream = zlib.compressobj(9, zlib.DEFLATED, -12)
    header = bytes.fromhex("789c") if method == "uadk" else b""
    page = header + stream.compress(content[: 60 << 20]) + stream.flush()
    bomb = streams.page_list([page] * 8)
else:
    zstd = streams.other_zstd()
    options = {{zstd.CompressionParameter.compression_level: 1, zstd.CompressionParameter.window_log: 27}}
    stream = zstd.ZstdCompressor(options=options)
    warm = stream.compress(first, mode=stream.FLUSH_BLOCK)
    bomb = stream.compress(content, mode=stream.FLUSH_BLOCK)
assert len(bomb) <= 1 << 20, len(bomb)
del content, stream

compressor, settings = select(Spec(name), sending=False)
channel = compressor.channel(0, page_size, settings)
compressor.hook.multifd_recv_setup(channel=channel)
assert pairs.decode(compressor, channel, warm, page_size) == first

before = harness.peak_begins()
try:
    pairs.decode(compressor, channel, bomb, 512 * 1024)
except CompressorError as error:
    assert "holds more" in str(error) or "to more than" in str(error), error
else:
    raise SystemExit("the bomb was taken")
print((harness.peak() - before) / (1 << 20))
"""


@pytest.mark.parametrize("name", ["zlib", "zstd", "qatzip-sw", "qpl-sw", "uadk-sw"])
def test_a_bomb_costs_less_than_8_mib(name: str) -> None:
    """A payload of at most 1 MiB that decodes to 1 GiB, in the middle of a stream."""
    tests = str(streams.__file__).rpartition("/")[0]
    result = subprocess.run(
        [sys.executable, "-c", BOMB.format(tests=tests), name], capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 8


def test_a_stream_of_zlib_needs_its_header() -> None:
    """A payload of stored blocks needs no zlib to be read; QEMU refuses one that begins a stream without a header."""
    sender, receiver = Pair("zlib", {"level": "0"}), Pair("zlib")
    pages = random.Random(7).randbytes(32 * PAGE)
    payloads = [sender.encode([pages]) for _ in range(3)]
    with pytest.raises(CompressorError, match="not zlib's"):
        receiver.decode(payloads[1], len(pages))
    for payload in payloads:
        assert sender.decode(payload, len(pages)) == pages
    sender.close()
    receiver.close()


@pytest.mark.parametrize("name", ["zlib", "zstd"])
def test_stored_blocks_of_other_sizes(name: str) -> None:
    """As long as what this sender stores, but cut elsewhere."""
    pages = random.Random(8).randbytes(40 * PAGE)
    sender, receiver = Pair(name, {"level": "0" if name == "zlib" else "-131072"}), Pair(name)
    if name == "zlib":
        assert receiver.decode(sender.encode([pages]), len(pages)) == pages
        sizes, head, end = [50000, 60000, 53840], b"", struct.pack("<BHH", 0, 0, 0xFFFF)
        headers = [struct.pack("<BHH", 0, size, size ^ 0xFFFF) for size in sizes]
    else:
        sizes, head, end = [100000, 63840], bytes.fromhex("28b52ffd0038"), b""
        headers = [(size << 3 | (size == sizes[-1])).to_bytes(3, "little") for size in sizes]
    payload, start = head, 0
    for size, header in zip(sizes, headers, strict=True):
        payload += header + pages[start : start + size]
        start += size
    payload += end
    assert start == len(pages)
    assert receiver.decode(payload, len(pages)) == pages
    assert receiver.decode(sender.encode([pages]), len(pages)) == pages, "the stream goes on"
    sender.close()
    receiver.close()
