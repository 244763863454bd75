"""Digests of a snapshot: anybody can make them again, and what was changed is not sent."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import multifd
import peers
import streams
from multifd.crew import Crew
from multifd.errors import CallerError, Cancelled, HostError, MultifdError
from multifd.jobs.report import Result
from multifd.snapshot import digests, directory
from multifd.snapshot.writer import SnapshotWriter
from multifd.wire.block import Block
from multifd.wire.events import Place
from told import warns

PAGE = 4096
MIB = 1 << 20
DOCS = Path(__file__).parents[2] / "docs"
STATE = streams.DEVICE_STATE + streams.description()


def make(path: Path, *, zeros: bool = False, plain: bool = False, early: Sequence[Place] = ()) -> str:
    """A snapshot of 5 MiB, of which 2 are zero, and another block; `zeros` are written, not holes.

    The manifest digest.
    """
    mix = random.Random(1)
    writer = SnapshotWriter(path, PAGE)
    writer.create_blocks([Block("pc.ram", 5 * MIB), Block("vga", 3 * PAGE)])
    ram = writer.blocks["pc.ram"]
    for offset in range(0, 5 * MIB, PAGE):
        if not MIB <= offset < 3 * MIB:
            ram.store(offset, memoryview(mix.randbytes(PAGE)))
        elif zeros:
            ram.store(offset, memoryview(bytes(PAGE)))
    writer.blocks["vga"].store(PAGE, memoryview(bytes([9]) * PAGE))
    writer.add_device_state(STATE)
    for place in early:
        writer.add_early(place, place.value.encode())
    writer.complete(b"\7\0\0\0\0", uuid=bytes(range(16)), machine="", sync="round", transfer={})
    return writer.add_digests(plain=plain)


def index(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((path / "snapshot.json").read_text())
    return found


@pytest.mark.parametrize("early", [(), (Place.IN_RAM,), (Place.BEFORE_RAM, Place.IN_RAM)], ids=len)
def test_anybody_can_make_it_again(work: Path, early: Sequence[Place]) -> None:
    """With the lines of docs/snapshots.md, which know nothing of this project."""
    manifest = make(work / "snap", early=early)
    (script,) = re.findall(r"```python\n(.*?)```", (DOCS / "snapshots.md").read_text(), re.DOTALL)
    command = [sys.executable, "-c", script, str(work / "snap")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == f"{manifest}\n"
    assert multifd.inspect(work / "snap")["digest"] == manifest
    assert multifd.open_snapshot(work / "snap").digest == manifest


def test_a_hole_is_as_good_as_zeros(work: Path) -> None:
    assert make(work / "holes") == make(work / "zeros", zeros=True)
    assert (work / "zeros" / "0-pc.ram.raw").stat().st_blocks > (work / "holes" / "0-pc.ram.raw").stat().st_blocks


def test_the_plain_ones_are_those_of_the_files(work: Path) -> None:
    make(work / "snap", plain=True)
    names = ["0-pc.ram.raw", "1-vga.raw", "configuration.bin", "device_state.bin"]
    expected = [hashlib.sha256((work / "snap" / name).read_bytes()).hexdigest() for name in names]
    found = json.loads((work / "snap" / "snapshot.json").read_text())
    assert [file["sha256"] for file in found["digests"]["files"]] == expected
    assert [block["sha256"] for block in found["blocks"]] == expected[:2]


def test_holes_are_not_read(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = directory.read_into

    def noting(fd: int, offset: int, buffer: memoryview, *rest: object) -> None:
        read.append(len(buffer))
        real(fd, offset, buffer, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(digests, "read_into", noting)
    writer = SnapshotWriter(work / "snap", PAGE)
    writer.create_blocks([Block("pc.ram", 64 << 30)])
    writer.blocks["pc.ram"].store(40 << 30, memoryview(bytes([1]) * PAGE))
    writer.complete(b"\7\0\0\0\0", uuid=bytes(16), machine="", sync="round", transfer={})
    writer.add_digests()
    assert sum(read) <= MIB + 5


def refused(snapshot: Path, says: str) -> bytes:
    """`send` fails with that; what the destination got of the main channel."""
    there = peers.Keeping(1)
    with pytest.raises(MultifdError, match=says) as caught:
        multifd.send(snapshot, there.uri, channels=1)
    assert "\n" not in str(caught.value)
    there.join()
    return there.main


def test_one_flipped_byte_in_a_hundred_places(work: Path) -> None:
    make(work / "snap")
    mix = random.Random(2)
    for number in range(100):
        name, block, length = (("0-pc.ram.raw", "pc.ram", 5 * MIB), ("1-vga.raw", "vga", 3 * PAGE))[number % 10 == 0]
        at = mix.randrange(length)
        with open(work / "snap" / name, "r+b", buffering=0) as file:
            (was,) = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([was ^ 1 << mix.randrange(8)]), at)
            main = refused(work / "snap", rf"snap: {block}, offset {at // MIB * MIB:#x}: these \d+ bytes are not those")
            assert STATE not in main
            os.pwrite(file.fileno(), bytes([was]), at)
    there = peers.Keeping(1)
    sent = multifd.send(work / "snap", there.uri, channels=1)
    there.join()
    assert sent.digest == multifd.inspect(work / "snap")["digest"]
    assert STATE in there.main


@pytest.mark.parametrize("name", ["configuration.bin", "device_state.bin"])
def test_a_flipped_byte_beside_the_memory_is_named_before_anybody_is_called(work: Path, name: str) -> None:
    make(work / "snap")
    data = bytearray((work / "snap" / name).read_bytes())
    data[-1] ^= 1
    (work / "snap" / name).write_bytes(data)
    with pytest.raises(HostError, match=rf"snap: {name}, offset 0x0: these {len(data)} bytes"):
        multifd.send(work / "snap", f"unix:{work}/nobody")


def punch(path: Path) -> None:
    """A piece becomes a hole."""
    with open(path / "0-pc.ram.raw", "r+b") as file:
        content = file.read()
        file.truncate(0)
        file.truncate(len(content))
        file.seek(0)
        file.write(content[:MIB])
        file.seek(4 * MIB)
        file.write(content[4 * MIB :])


def test_a_piece_that_became_a_hole(work: Path) -> None:
    make(work / "snap")
    punch(work / "snap")
    assert STATE not in refused(work / "snap", "snap: pc.ram, offset 0x300000: ")


def change(key: str, value: object) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        found = index(path)
        found[key] = value
        (path / "snapshot.json").write_text(json.dumps(found))

    return changed


def shorten(path: Path) -> None:
    os.truncate(path / "device_state.bin", 10)


def forge(path: Path) -> None:
    """All of pieces.bin fits the memory as it is, but not snapshot.json."""
    data = bytearray((path / "pieces.bin").read_bytes())
    data[20] ^= 1
    (path / "pieces.bin").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (change("machine", "pc-q35-9.0"), r"snapshot\.json is not as it was when the digests were made"),
        (change("sync", "section"), r"snapshot\.json is not as it was"),
        (shorten, r"device_state\.bin is not as it was"),
        (forge, r"pieces\.bin is not as it was"),
        (lambda path: (path / "pieces.bin").unlink(), r"pieces\.bin: No such file"),
        (lambda path: os.truncate(path / "pieces.bin", 48), r"pieces\.bin is not as it was"),
        (lambda path: os.truncate(path / "pieces.bin", 1 << 40), r"pieces\.bin has more than \d+ bytes"),
    ],
)
def test_what_the_digests_are_of_is_checked_too(work: Path, damage: Callable[[Path], None], says: str) -> None:
    make(work / "snap")
    damage(work / "snap")
    with pytest.raises(CallerError, match=says):
        multifd.send(work / "snap", f"unix:{work}/nobody")


def test_inspect_says_that_it_was_changed(work: Path) -> None:
    make(work / "snap")
    change("machine", "pc-q35-9.0")(work / "snap")
    assert multifd.inspect(work / "snap")["ended"] == "complete, but changed since its digests were made"


def test_without_the_check_it_is_sent_as_it_is(work: Path) -> None:
    make(work / "snap")
    punch(work / "snap")
    there = peers.Keeping(1)
    assert multifd.send(work / "snap", there.uri, channels=1, verify=False).digest is None
    there.join()


def receive(work: Path, **options: object) -> Result:
    streams.small().write(work / "recording")
    return multifd.receive(f"recording:{work / 'recording'}", work / "snap", **options)  # type: ignore[arg-type]


def test_receive_and_send_say_the_same_one(work: Path) -> None:
    received = receive(work)
    there = peers.Receiving(work / "again")
    assert multifd.send(work / "snap", there.uri).digest == received.digest
    assert there.join().digest == received.digest


def test_who_waits_is_told_once(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Path] = []
    waiting = threading.Event()
    real = directory.read_into

    def slow(*arguments: object) -> None:
        assert waiting.wait(peers.TIMEOUT), "nobody was told"
        real(*arguments)  # type: ignore[arg-type]

    def tell() -> None:
        told.append(work / "snap" / "snapshot.json")
        assert told[-1].exists(), "it is complete by then"
        waiting.set()

    monkeypatch.setattr(digests, "read_into", slow)
    monkeypatch.setattr(digests, "PATIENCE", 0.01)
    assert receive(work, on_digests=tell).digest
    assert len(told) == 1


def test_cancel_ends_them(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot is complete all the same, and so is the command."""
    crew = Crew()
    started = time.monotonic()

    def slow(*_: object) -> None:
        time.sleep(0.001)  # a disk that never comes to its end

    monkeypatch.setattr(digests, "read_into", slow)
    monkeypatch.setattr(digests, "PATIENCE", 0.01)
    monkeypatch.setattr(digests, "next_data", lambda *_: 0)
    with warns("the snapshot is complete, but has no digests: cancelled"):
        assert receive(work, on_digests=crew.cancel, crew=crew).digest is None
    assert time.monotonic() - started < peers.TIMEOUT
    assert multifd.open_snapshot(work / "snap").digest is None


def test_a_cancel_that_comes_before_them_ends_them(work: Path) -> None:
    crew, after = Crew(), Crew()
    crew.end()
    crew.cancel()
    crew.followed_by(after)
    with pytest.raises(Cancelled):
        after.check()
