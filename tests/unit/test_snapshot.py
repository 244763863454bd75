"""Snapshots: whole or not there, readable by other tools, checked when they are read."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import multifd
from disks import small_disk
from multifd.errors import CallerError, HostError, PeerError
from multifd.snapshot import writer
from multifd.snapshot.writer import SnapshotWriter
from multifd.wire.block import Block

PAGE = 4096

DATA = Path(__file__).parents[1] / "data"


def page(fill: int) -> memoryview:
    return memoryview(bytes([fill]) * PAGE)


def make(path: Path, *blocks: Block) -> SnapshotWriter:
    writer = SnapshotWriter(path, PAGE)
    writer.create_blocks(blocks or [Block("pc.ram", 8 * PAGE)])
    return writer


def complete(writer: SnapshotWriter) -> None:
    writer.complete(b"\7\0\0\0\0", uuid=bytes(range(16)), machine="pc-q35-10.0", sync="round", transfer={})


def test_it_appears_only_when_complete(work: Path) -> None:
    path = work / "snap"
    writer = make(path, Block("pc.ram", 8 * PAGE), Block("/rom@etc/acpi/tables", 2 * PAGE), Block("..", PAGE))
    writer.blocks["pc.ram"].store(2 * PAGE, page(7))
    writer.add_device_state(b"state")
    assert not path.exists()
    complete(writer)
    index = json.loads((path / "snapshot.json").read_text())
    assert index["uuid"] == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert (index["machine"], index["page_size"], index["sync"]) == ("pc-q35-10.0", PAGE, "round")
    assert [block["idstr"] for block in index["blocks"]] == ["pc.ram", "/rom@etc/acpi/tables", ".."]
    assert [block["used_length"] for block in index["blocks"]] == [8 * PAGE, 2 * PAGE, PAGE]
    ram = path / index["blocks"][0]["file"]
    assert ram.read_bytes() == bytes(2 * PAGE) + page(7) + bytes(5 * PAGE)
    assert ram.stat().st_blocks * 512 <= 2 * PAGE, "zero pages take no room"
    assert (path / index["device_state"]).read_bytes() == b"state"
    assert (path / index["configuration"]).read_bytes() == b"\7\0\0\0\0"
    assert index["blocks"][0]["sha256"] is None
    writer.add_digests(plain=True)
    index = json.loads((path / "snapshot.json").read_text())
    assert index["blocks"][0]["sha256"] == hashlib.sha256(ram.read_bytes()).hexdigest()
    assert os.listdir(work) == ["snap"]


def test_a_discarded_one_leaves_nothing(work: Path) -> None:
    writer = make(work / "snap")
    writer.blocks["pc.ram"].store(0, page(1))
    writer.discard()
    writer.discard()
    assert os.listdir(work) == []


def test_discard_keeps_what_was_completed(work: Path) -> None:
    writer = make(work / "snap")
    complete(writer)
    writer.discard()
    assert multifd.open_snapshot(work / "snap").machine == "pc-q35-10.0"


@pytest.mark.parametrize("what", ["file", "full directory", "no parent"])
def test_a_taken_name_is_refused_before_anything_is_written(work: Path, what: str) -> None:
    path = work / "snap"
    if what == "file":
        path.write_text("mine")
    elif what == "full directory":
        path.mkdir()
        (path / "mine").write_text("mine")
    else:
        path = work / "nowhere" / "snap"
    before = sorted(work.rglob("*"))
    with pytest.raises(CallerError, match=r"exists already: remove it|create it first"):
        SnapshotWriter(path, PAGE)
    assert sorted(work.rglob("*")) == before


def test_an_empty_directory_is_taken(work: Path) -> None:
    (work / "snap").mkdir()
    complete(make(work / "snap"))
    assert (work / "snap" / "snapshot.json").exists()


def test_a_name_taken_meanwhile_is_not_overwritten(work: Path) -> None:
    writer = make(work / "snap")
    (work / "snap").mkdir()
    (work / "snap" / "mine").write_text("mine")
    with pytest.raises(CallerError, match="appeared while"):
        complete(writer)
    writer.discard()
    assert os.listdir(work / "snap") == ["mine"]


def test_zero_pages_clear_what_came_before(work: Path) -> None:
    writer = make(work / "snap")
    ram = writer.blocks["pc.ram"]
    ram.store(0, memoryview(bytes(page(5)) * 3))
    writer.next_epoch()
    ram.clear(PAGE, 7 * PAGE)
    complete(writer)
    assert ram.path.name == "0-pc.ram.raw"
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == bytes(page(5)) + bytes(7 * PAGE)


def test_pages_that_come_twice_in_an_epoch(work: Path) -> None:
    """QEMU 7.2 repeats pages: the same content is fine, another has to come again."""
    writer = make(work / "snap")
    ram = writer.blocks["pc.ram"]
    ram.store(0, memoryview(bytes(page(1)) * 4))
    ram.store(PAGE, memoryview(bytes(page(1)) + bytes(page(9)) + bytes(page(1))))
    ram.clear(0, PAGE)
    writer.next_epoch()
    assert ram.unsettled() == [0, 2 * PAGE]
    ram.store(2 * PAGE, page(3))
    writer.next_epoch()
    assert ram.unsettled() == [0]
    ram.store(0, page(4))
    writer.next_epoch()
    assert ram.unsettled() == []
    assert ram.missing() == (4, 4 * PAGE)
    writer.discard()


def test_a_peer_that_only_repeats_fills_no_memory(work: Path) -> None:
    writer = make(work / "snap")
    ram = writer.blocks["pc.ram"]
    with pytest.raises(PeerError, match="came twice between two SYNCs"):
        for _ in range(100_000):
            ram.store(0, page(1))
    writer.discard()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path, 256) as disk:
        yield disk


def test_a_full_disk_is_named(tiny_disk: Path) -> None:
    writer = make(tiny_disk / "snap", Block("pc.ram", 1 << 20))
    with pytest.raises(HostError, match="the disk is full: free some space"):
        for number in range(256):
            writer.blocks["pc.ram"].store(number * PAGE, page(1))
    writer.discard()
    assert os.listdir(tiny_disk) == []


def test_device_state_that_fills_the_disk(tiny_disk: Path) -> None:
    """In small pieces: some of it waits for the disk still when all is thrown away."""
    writer = make(tiny_disk / "snap")
    with pytest.raises(HostError, match=r"device_state.bin: the disk is full: free some space"):
        for _ in range(1000):
            writer.add_device_state(bytes(1000))
    writer.discard()
    assert os.listdir(tiny_disk) == []


def test_a_block_no_file_can_hold(work: Path) -> None:
    writer = SnapshotWriter(work / "snap", PAGE)
    with pytest.raises(HostError, match=r"larger than this file system|disk is full|Invalid|enough memory"):
        writer.create_blocks([Block("pc.ram", (1 << 63) - PAGE)])
    writer.discard()
    assert os.listdir(work) == []


@pytest.mark.parametrize(
    ("size", "says"),
    [(0, "is empty"), (PAGE + 1, "4097 bytes, which is not a multiple of the page size 4096"), (PAGE, None)],
)
def test_a_raw_image(tmp_path: Path, size: int, says: str | None) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(size))
    if says is None:
        (block,) = multifd.open_snapshot(image, block="mem").blocks
        assert block.block == Block("mem", PAGE)
    else:
        with pytest.raises(CallerError, match=says):
            multifd.open_snapshot(image)


def test_what_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(CallerError, match="No such file"):
        multifd.open_snapshot(tmp_path / "nothing")
    with pytest.raises(CallerError, match=r"holds no snapshot\.json"):
        multifd.open_snapshot(tmp_path)
    with pytest.raises(CallerError, match="neither a file nor"):
        multifd.open_snapshot("/dev/null")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 3}, "format 3, this multifd reads 1 and 2: upgrade it"),
        ({"format": 2}, "is damaged: needs is missing"),
        ({"format": 2, "needs": ["early-sections", "pac\nked"]}, r"needs pac\\nked, which this multifd does not know"),
        ({"format": 2, "needs": ["early-sections"]}, "early_sections is missing"),
        (
            {"format": 2, "needs": ["early-sections"], "early_sections": {"ram_section": 1, "in_ram": "../x"}},
            "is no name of a file",
        ),
        ({"page_size": 4095}, "make no sense"),
        ({"sync": "never"}, "make no sense"),
        ({"blocks": []}, "make no sense"),
        ({"uuid": "x"}, "is damaged"),
        ({"blocks": [{"idstr": "a"}]}, r"is damaged: blocks\[0\].used_length is missing"),
        (
            {"blocks": [{"idstr": "a", "used_length": PAGE, "file": "0-pc.ram.raw"}]},
            r"32768 bytes, snapshot\.json says 4096",
        ),
        ({"blocks": [{"idstr": "a", "used_length": PAGE, "file": "/etc/passwd"}]}, "is no name of a file"),
        ({"configuration": "gone.bin"}, "gone.bin: No such file"),
        (None, "is damaged"),
    ],
)
def test_a_damaged_snapshot_is_refused(work: Path, change: dict[str, Any] | None, says: str) -> None:
    complete(make(work / "snap"))
    index = work / "snap" / "snapshot.json"
    index.write_text("{" if change is None else json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(CallerError, match=says):
        multifd.open_snapshot(work / "snap")


def test_nothing_is_left_where_the_first_file_cannot_be_made(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "DEVICE_STATE", "no such directory/state")
    with pytest.raises(HostError, match="No such file"):
        SnapshotWriter(work / "snap", PAGE)
    assert os.listdir(work) == []


def test_a_snapshot_of_0_1_is_read_for_ever() -> None:
    """`tests/data/snapshot-0.1` was made by 0.1.0 of a small recording."""
    snapshot = multifd.open_snapshot(DATA / "snapshot-0.1")
    assert (snapshot.machine, snapshot.page_size, snapshot.sync) == ("pc-q35-10.0", PAGE, "round")
    assert snapshot.uuid == bytes(range(16))
    (block,) = snapshot.blocks
    assert (block.block.idstr, block.block.used_length) == ("pc.ram", 4 * PAGE)
    memory = bytearray(4 * PAGE)
    with block.open() as reader:
        reader.read_into(0, memoryview(memory))
    assert hashlib.sha256(memory).hexdigest() == snapshot.index["blocks"][0]["sha256"]
    found = multifd.inspect(DATA / "snapshot-0.1")
    assert (found["ended"], found["normal_pages"], found["zero_pages"]) == ("complete", 3, 1)


def test_keys_that_it_does_not_know_are_written_back(work: Path) -> None:
    """Whoever rewrites snapshot.json: here for the digests, after somebody else has put something in."""
    writer = make(work / "snap", Block("pc.ram", PAGE))
    complete(writer)
    path = work / "snap" / "snapshot.json"
    index = json.loads(path.read_text())
    index["labels"] = {"ticket": 7}
    index["blocks"][0]["where"] = [0, 4096]
    path.write_text(json.dumps(index))
    writer.add_digests(plain=True)
    found = json.loads(path.read_text())
    assert found.pop("labels") == {"ticket": 7}
    assert found["blocks"][0].pop("where") == [0, 4096]
    assert found["blocks"][0]["sha256"] == hashlib.sha256(bytes(PAGE)).hexdigest()


def test_a_directory_that_may_not_be_searched_is_one_line(work: Path) -> None:
    """Seen by another user: snapshots are their owner's."""
    complete(make(work / "snap"))
    (work / "snap").chmod(0o700)
    work.chmod(0o755)
    code = (
        "import os, sys\nimport multifd\nfrom multifd.errors import CallerError\n"
        "import multifd.jobs.inspect, multifd.snapshot.reader\nos.setgid(65534)\nos.setuid(65534)\n"
        "for look in (multifd.open_snapshot, multifd.inspect):\n"
        "    try:\n        look(sys.argv[1])\n    except CallerError as error:\n        print(error)\n"
    )
    if os.getuid():
        pytest.skip("only root can be another user")
    command = [sys.executable, "-c", code, str(work / "snap")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.count("Permission denied\n") == 2
