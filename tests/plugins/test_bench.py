"""Which compressor pays on an image: measured with the real ones, broken ones among them."""

from __future__ import annotations

import json
import math
import random
import re
import sysconfig
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import multifd
from commands import fails, run
from multifd import open_snapshot
from multifd.codec.selection import load
from multifd.errors import CallerError
from multifd.jobs.bench import measure
from multifd.jobs.bench.measure import SAMPLE_SECONDS, levels, take_sample
from multifd.jobs.bench.model import LINKS, Bench, Row
from multifd.jobs.bench.picture import LINE_HEIGHT, RIGHT, WIDTH
from sites import Site

PAGE = 4096
PACKET = 512 * 1024
SVG = "{http://www.w3.org/2000/svg}"

#: A compressor that is zlib's but for one hook.
ALMOST_ZLIB = """
import time
import multifd_zlib
from multifd_zlib import *
from multifd_zlib import multifd_send_setup, multifd_send_prepare, multifd_recv_setup, multifd_recv
from multifd.hookspecs import Facts, Probe, hookimpl
@hookimpl
def multifd_compressor():
    return Facts("zlib-{name}", "zlib", 1, "for a test")
@hookimpl
def {hook}:
    {body}
"""
BROKEN = {
    "lies": ("multifd_recv(channel, pages)", "multifd_zlib.multifd_recv(channel, pages); pages[7] ^= 1"),
    "raises": ("multifd_send_prepare(channel, pages)", "raise RuntimeError('the card is on fire')"),
    "leaves": ("multifd_recv(channel, pages)", "channel.read_into(bytearray(10))"),
    "locked": ("multifd_recv_setup(channel)", "raise OSError('no free instance')"),
    "gone": ("multifd_probe()", "return Probe(False, reason='no such card', install='buy one')"),
}
#: Sees one packet only: that takes more seconds than a setting is measured for.
SLOW = (
    "multifd_send_prepare(channel, pages)",
    f"""end = time.thread_time() + {SAMPLE_SECONDS}
    while time.thread_time() < end: pass
    return multifd_zlib.multifd_send_prepare(channel, pages)""",
)


def text(size: int) -> bytes:
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return b"".join(path.read_bytes() for path in sources)[:size]


def write_image(path: Path) -> None:
    """Two packets of text, the second with 28 zero pages, one packet that does not shrink, and a hole of 5."""
    second = text(2 * PACKET)[PACKET:]
    path.write_bytes(
        text(PACKET) + second[: 50 * PAGE] + bytes(28 * PAGE) + second[78 * PAGE :] + random.Random(1).randbytes(PACKET)
    )
    with open(path, "r+b") as file:
        file.truncate(8 * PACKET)


@dataclass
class Found:
    """What one run said, and drew."""

    report: dict[str, Any]
    svg: str

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["setting"]: row for row in self.report["settings"]}


def unexpected(stderr: str) -> list[str]:
    """What was said, but for a qatzip that is here without its device."""
    return [line for line in stderr.splitlines() if "qatzip works in software" not in line]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One run over everything: it takes the time of a dozen settings."""
    folder = tmp_path_factory.mktemp("bench")
    site = Site(folder)
    for name, (hook, body) in {**BROKEN, "slow": SLOW}.items():
        site.install(f"zlib-{name}", ALMOST_ZLIB.format(name=name, hook=hook, body=body))
    image = folder / 'guest <&"\1>.raw'
    write_image(image)
    svg = folder / "time.svg"
    result = site.run("-m", "multifd", "bench", str(image), "--json", "--svg", str(svg), "--link", "2.5Gbit/s")
    assert (result.returncode, unexpected(result.stderr)) == (0, [])
    return Found(json.loads(result.stdout), svg.read_text())


def test_every_available_compressor_is_measured(found: Found) -> None:
    measured = {row["compressor"] for row in found.report["settings"] if "ratio" in row}
    available = {row["name"] for row in multifd.compressors() if row["available"]}
    assert available >= {"none", "zlib", "zstd", "qatzip-sw"}
    assert measured == available | {"zlib-slow"}
    assert {"zlib,level=1", "zlib,level=9", "zstd,level=-5", "zstd,level=1", "zstd,level=20"} <= set(found.rows)
    for row in found.rows.values():
        if "ratio" in row:
            assert row["sampled_bytes"] > 0
            assert row["encode_mb_per_s"] > 0
            assert row["decode_mb_per_s"] > 0
            assert row["encode_cpu_s_per_gb"] > 0
            assert row["pays_below_bit_per_s"] >= 0


def test_what_was_sampled(found: Found) -> None:
    report = found.report
    assert (report["memory_bytes"], report["page_size"], report["cores"]) == (8 * PACKET, PAGE, 2)
    assert report["looked_bytes"] == 8 * PACKET
    assert report["zero_bytes"] == 5 * PACKET + 28 * PAGE
    assert (report["sampled_packets"], report["sampled_bytes"]) == (3, 3 * PACKET - 28 * PAGE)
    assert found.rows["zstd,level=1"]["sampled_bytes"] == report["sampled_bytes"]
    assert found.rows["none"]["ratio"] == 1
    assert found.rows["zlib,level=9"]["ratio"] > found.rows["zlib,level=1"]["ratio"] > 1.5


def test_a_slow_setting_is_judged_as_if_it_had_seen_everything(found: Found) -> None:
    """Its one packet shrinks to a quarter; the image does not."""
    slow = found.rows["zlib-slow"]
    assert slow["sampled_bytes"] == PACKET
    assert slow["ratio"] == pytest.approx(found.rows["zlib,level=1"]["ratio"], rel=0.2)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lies", r"zlib-lies \(multifd-zlib-lies 1.0\): what it decodes is not what it encoded"),
        ("raises", "multifd_send_prepare: .* failed: RuntimeError: the card is on fire"),
        ("leaves", r"packet 0: \d+ of \d+ payload bytes are left over"),
        ("locked", "multifd_recv_setup: .* failed: OSError: no free instance"),
        ("gone", "no such card; buy one"),
    ],
)
def test_a_compressor_that_fails_is_a_row(found: Found, name: str, reason: str) -> None:
    row = found.rows[f"zlib-{name}"]
    assert re.fullmatch(reason, row["reason"]), row["reason"]
    assert "ratio" not in row


def test_the_picture(found: Found) -> None:
    root = ElementTree.fromstring(found.svg)
    curves = {
        curve.findtext(f"{SVG}title", "").split(", ")[0]: curve
        for curve in root.iter(f"{SVG}g")
        if "class" in curve.attrib
    }
    measured = {row["setting"] for row in found.report["settings"] if "ratio" in row}
    assert set(curves) == measured
    colours = {name: curve.attrib["stroke"] for name, curve in curves.items()}
    assert len(set(colours.values())) == len(measured)
    written = [element.text or "" for element in root.iter(f"{SVG}text")]
    assert "bandwidth of the link" in written
    assert "migration time, seconds" in written
    assert {"10 Mbit/s", "1 Gbit/s", "100 Gbit/s", "none", "zlib 1", "zstd 20"} <= set(written)
    assert 'Migration time of guest <&"?>.raw' in written[0]
    for curve in curves.values():
        points = [tuple(map(float, point.split(","))) for point in curve[1].attrib["points"].split()]
        assert points == sorted(points), "bandwidth grows to the right"
        assert [y for _, y in points] == sorted(y for _, y in points), "time falls with it"
    labels = [element for element in root.iter(f"{SVG}text") if float(element.attrib["x"]) > WIDTH - RIGHT]
    assert len(labels) == len(measured)
    heights = sorted(float(element.attrib["y"]) for element in labels)
    assert all(lower - upper > LINE_HEIGHT - 0.2 for upper, lower in pairwise(heights)), "none hides another"


def made(*rows: Row, cores: int = 2) -> Bench:
    """A GB of memory, half of it zero."""
    return Bench(Path("made"), PAGE, cores, 10**9, 10**8, 5 * 10**7, 5 * 10**7, 100, rows)


NONE = Row("none", None, 1, 1e5, 1e4, 1.0, 0.01, 0.1)
LIGHT = Row("zstd", 1, 1, 250.0, 1000.0, 4.0, 4.0, 1.0)
STRONG = Row("zstd", 19, 1, 2.0, 800.0, 8.0, 500.0, 1.25)
STORED = Row("zlib", 0, 1, 2000.0, 2000.0, 0.999, 0.5, 0.5)


def test_the_model() -> None:
    """500 MB over 2 cores at 250 MB/s take a second; a quarter of them over 1 Gbit/s as long."""
    one = made(NONE, LIGHT, STRONG)
    assert one.seconds(LIGHT, math.inf) == pytest.approx(1.0)
    assert one.seconds(LIGHT, 1e9) == pytest.approx(1.0, rel=0.03)
    assert one.seconds(LIGHT, 1e8) == pytest.approx(10.0, rel=0.03)
    assert one.seconds(NONE, 1e9) == pytest.approx(4.0, rel=0.01)
    assert made(NONE, LIGHT, cores=8).seconds(LIGHT, math.inf) == pytest.approx(0.25)
    assert one.seconds(STRONG, 1e9) == pytest.approx(125)


def test_it_pays_below_where_the_curves_cross() -> None:
    one = made(NONE, LIGHT, STRONG, STORED)
    for row in (LIGHT, STRONG):
        below = one.pays_below(row)
        assert one.seconds(row, below * 0.99) < one.seconds(NONE, below * 0.99)
        assert one.seconds(row, below * 1.01) > one.seconds(NONE, below * 1.01)
    assert one.pays_below(STORED) == 0


def test_the_recommendation_follows_the_link() -> None:
    one = made(NONE, LIGHT, STRONG)
    assert [one.recommend(link) for link in (1e6, 1e9, math.inf)] == [STRONG, LIGHT, NONE]
    as_good = Row("zlib", 1, 1, 200.0, 1000.0, 3.9, 3.0, 1.0)
    assert made(NONE, LIGHT, as_good).recommend(1e6) is as_good, "less CPU time for nearly the same"


@pytest.mark.may_warn("qatzip works in software")
def test_the_recommendation_on_an_image(tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(text(64 * PAGE))
    told: list[str] = []
    measured = measure.bench(image, cores=1, on_setting=told.append)
    assert told == [row.text for row in measured.rows if row.sampled_bytes]
    assert measured.recommend(math.inf).compressor == "none"
    slow = measured.recommend(1e6)
    assert slow.ratio > 0.9 * max(row.ratio for row in measured.measured) > 3


def test_for_people(tmp_path: Path) -> None:
    (tmp_path / "image.raw").write_bytes(text(32 * PAGE) + bytes(32 * PAGE))
    result = run("bench", tmp_path / "image.raw", "--cores", "1")
    assert (result.returncode, unexpected(result.stderr)) == (0, [])
    lines = result.stdout.splitlines()
    assert lines[0].endswith(
        "image.raw: 256.0 KiB, 50% of it zero pages; measured on 128.0 KiB of the others, in 1 packet"
    )
    assert re.search(
        r"^zlib,level=1 +\d+ +\d+ +\d\.\d\d +\d+\.\d\d +[\d.]+ [MGk]bit/s +128.0 KiB$", result.stdout, re.MULTILINE
    )
    assert re.search(r"^100 Mbit/s +--compressor \S+,level=\S+ +0\.\d+ +0\.01\d+$", result.stdout, re.MULTILINE)
    assert "with 1 core on each side" in result.stdout
    assert len([line for line in lines if re.match(r"\d+ [MG]bit/s ", line)]) == len(LINKS)


def test_holes_are_not_read(work: Path) -> None:
    with open(work / "image.raw", "wb") as file:
        file.truncate(1 << 32)
        file.seek(3 << 30)
        file.write(text(PACKET))
    before = read_so_far()
    sample = take_sample(open_snapshot(work / "image.raw"))
    assert read_so_far() - before < 16 << 20
    assert (sample.normal_bytes, sample.hole_bytes, sample.looked_bytes) == (PACKET, (1 << 32) - PACKET, 1 << 32)


def read_so_far() -> int:
    """Bytes that this process has read."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_large_image_is_sampled_evenly(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A different byte in each packet tells where it is from."""
    monkeypatch.setattr(measure, "SAMPLE_BYTES", 10 * PACKET)
    (work / "image.raw").write_bytes(b"".join(bytes([number]) * PACKET for number in range(1, 101)))
    sample = take_sample(open_snapshot(work / "image.raw"))
    places = sorted(pages[0][0] for pages in sample.packets)
    assert len(places) == 10
    assert all(3 < right - left < 20 for left, right in pairwise(places))
    assert places[0] < 20
    assert places[-1] > 80


def test_a_snapshot_with_many_blocks(work: Path) -> None:
    from captures import OWN_CAPTURES
    from multifd import receive

    receive(f"recording:{OWN_CAPTURES}/q100-m72-zlib-2ch", work / "snap", digests=False)
    source = open_snapshot(work / "snap")
    sample = take_sample(source)
    whole = [(work / "snap" / item.path.name).read_bytes() for item in source.blocks]
    pages = [data[at : at + PAGE] for data in whole for at in range(0, len(data), PAGE)]
    assert sample.looked_bytes == sum(map(len, whole))
    assert sample.normal_bytes == PAGE * sum(any(page) for page in pages)


def test_mistakes_are_one_line(work: Path) -> None:
    (work / "empty.raw").touch()
    (work / "odd.raw").write_bytes(bytes(5000))
    (work / "zero.raw").write_bytes(bytes(8 * PAGE))
    fails(1, "gone.raw: No such file", "bench", work / "gone.raw")
    fails(1, "empty.raw is empty", "bench", work / "empty.raw")
    fails(1, "odd.raw has 5000 bytes, which is not a multiple", "bench", work / "odd.raw")
    fails(1, "zero.raw holds zero pages only", "bench", work / "zero.raw")
    (work / "one.raw").write_bytes(b"1" * 4096)
    fails(1, "compared with none: leave it in", "bench", work / "one.raw", "--disable", "none")
    fails(1, "holds no snapshot.json", "bench", work)
    fails(1, "no/such is not a directory", "bench", work / "zero.raw", "--svg", work / "no/such/file.svg")
    fails(2, "'10' is no bandwidth: write 10Gbit/s", "bench", work / "zero.raw", "--link", "10")
    fails(2, "no bandwidth", "bench", work / "zero.raw", "--link", "0Gbit/s")
    fails(2, "0 is less than 1", "bench", work / "zero.raw", "--cores", "0")
    with pytest.raises(CallerError):
        measure.bench(work / "zero.raw")


def test_levels_come_from_the_facts() -> None:
    tried = {name: levels(load(name).facts) for name in ("none", "zlib", "zstd", "qatzip-sw")}
    assert tried["none"] == [None]
    assert tried["zlib"] == [1, 2, 3, 6, 9]
    assert tried["qatzip-sw"] == [1, 2, 3, 6, 9]
    assert tried["zstd"] == [-50, -5, -1, 1, 2, 3, 6, 9, 12, 15, 19, 20]
