"""What lies in a snapshot's directory is not trusted, and what is put there is its owner's alone."""

from __future__ import annotations

import grp
import json
import os
import resource
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

import multifd
import streams
from commands import fails
from disks import small_disk
from multifd.errors import CallerError, HostError
from multifd.jobs.bench.measure import bench
from multifd.snapshot import writer
from multifd.snapshot.disks import Disk
from multifd.snapshot.writer import SnapshotWriter
from multifd.wire.block import Block
from multifd.wire.events import Place

PAGE = 4096
#: Who reads a snapshot.
READERS: list[Callable[[Path], object]] = [
    multifd.open_snapshot,
    multifd.inspect,
    bench,
    lambda path: multifd.send(path, f"unix:{path}/nobody"),
]


def make(path: Path) -> None:
    """A snapshot of two blocks and early sections, with digests."""
    writer = SnapshotWriter(path, PAGE)
    writer.create_blocks([Block("pc.ram", 8 * PAGE), Block("vga", 4 * PAGE)])
    writer.blocks["pc.ram"].store(PAGE, memoryview(bytes([7]) * PAGE))
    writer.add_device_state(b"the devices")
    writer.add_early(Place.IN_RAM, b"the page table")
    transfer = {"packets": 3, "channels": 2}
    disks = [Disk("/images/root.qcow2", "qcow2", "root", "first", read_only=False)]
    writer.complete(b"\7\0\0\0\0", uuid=bytes(16), machine="pc", sync="round", transfer=transfer, disks=disks)
    writer.add_digests()


def refused(path: Path, says: str = "", readers: list[Callable[[Path], object]] = READERS) -> None:
    for read in readers:
        with pytest.raises(CallerError, match=says) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def turn_into(kind: str, path: Path) -> None:
    """Put something else where a file is."""
    content = path.with_name("elsewhere")
    path.rename(content)
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(content.name)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        with closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.bind(str(path))
    elif kind == "device":
        try:
            os.mknod(path, 0o20600, os.makedev(1, 5))  # /dev/zero, which never ends
        except PermissionError:
            pytest.skip("only root can make a device")


@pytest.mark.parametrize("kind", ["FIFO", "link", "dangling link", "directory", "socket", "device"])
@pytest.mark.parametrize(
    "name", ["snapshot.json", "0-pc.ram.raw", "configuration.bin", "device_state.bin", "early_in_ram.bin"]
)
def test_what_is_no_regular_file_is_refused(work: Path, kind: str, name: str) -> None:
    make(work / "snap")
    turn_into(kind, work / "snap" / name)
    refused(work / "snap", rf"{name} is a {kind.removeprefix('dangling ')}, not a regular file")


def test_the_list_of_pieces_is_no_exception(work: Path) -> None:
    make(work / "snap")
    turn_into("FIFO", work / "snap" / "pieces.bin")
    refused(work / "snap", r"pieces.bin is a FIFO", READERS[3:])
    multifd.inspect(work / "snap")


def test_an_image_that_is_a_fifo_is_refused(work: Path) -> None:
    os.mkfifo(work / "image.raw")
    refused(work / "image.raw", "neither a file nor a block device", [multifd.open_snapshot, bench])


def test_an_image_may_be_a_link(work: Path) -> None:
    (work / "image.raw").write_bytes(bytes(PAGE))
    (work / "link").symlink_to("image.raw")
    assert multifd.open_snapshot(work / "link").memory_bytes == PAGE


@contextmanager
def changed_index(path: Path) -> Iterator[dict[str, Any]]:
    index = json.loads((path / "snapshot.json").read_text())
    yield index
    (path / "snapshot.json").write_text(json.dumps(index))


def nested(levels: int) -> object:
    found: object = 1
    for _ in range(levels):
        found = [found]
    return found


MISSING = object()
WRONG = {
    "missing": MISSING,
    "null": None,
    "true": True,
    "text": "x",
    "half a character": "\ud800",
    "number": 7,
    "negative": -PAGE,
    "huge": 1 << 64,
    "endless": 10**4200,
    "fraction": 4096.0,
    "nan": float("nan"),
    "list": [],
    "object": {},
    "nested": nested(80),
    "long": "x" * 100_000,
    "up": "../snap/0-pc.ram.raw",
    "parent": "..",
    "zero": "a\0b",
}


MAY_BE_OBJECTS = [("transfer",)]


def places(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Of every value in a JSON document but itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def put(index: Any, place: tuple[str | int, ...], value: object) -> None:
    for key in place[:-1]:
        index = index[key]
    if value is MISSING:
        del index[place[-1]]
    else:
        index[place[-1]] = value


@pytest.mark.parametrize("what", WRONG)
def test_each_key_of_the_index(work: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands there, each reader reads it or says one line; wrong types of what is needed are refused."""
    from multifd.cli.inspect import run

    make(work / "snap")
    good = (work / "snap" / "snapshot.json").read_text()
    for place in places(json.loads(good)):
        index = json.loads(good)
        put(index, place, WRONG[what])
        (work / "snap" / "snapshot.json").write_text(json.dumps(index))
        if place == ("format",) or what == "nested" or (what == "object" and place not in MAY_BE_OBJECTS):
            refused(work / "snap", r"snapshot\.json (is damaged|has format|needs)")
            continue
        readers: list[Callable[[Path], object]] = [
            multifd.open_snapshot,
            lambda path: run(Namespace(path=path, json=False)),
        ]
        for read in readers:
            try:
                read(work / "snap")
            except CallerError as error:
                assert "\n" not in str(error)
                assert len(str(error)) < 400
        capsys.readouterr().out.encode()  # a terminal can show it
    (work / "snap" / "snapshot.json").write_text(good)
    multifd.open_snapshot(work / "snap")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\xff",
        "[" * 100_000,
        '{"a":' * 100_000,
        "{}" + " " * (17 << 20),
        '{"format": 1' + "0" * 5000,
    ],
)
def test_what_is_no_index(work: Path, text: str) -> None:
    make(work / "snap")
    (work / "snap" / "snapshot.json").write_text(text, encoding="latin-1")
    refused(work / "snap", r"snapshot\.json (is damaged|has more than)")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda index: index["blocks"].append(index["blocks"][0]), "pc.ram is listed twice"),
        (lambda index: index["blocks"][1].update(file="0-pc.ram.raw"), "two of its files have one name"),
        (lambda index: index.update(device_state="snapshot.json"), "two of its files have one name"),
        (lambda index: index["blocks"][0].update(used_length=PAGE + 1), "not a multiple"),
        (lambda index: index["blocks"][0].update(used_length=PAGE), r"has 32768 bytes, snapshot\.json says 4096"),
        (lambda index: index["blocks"][0].update(idstr="\u00e9"), "1 to 255 ASCII"),
        (lambda index: index["disks"][0].update(read_only=0), r"disks\[0\]\.read_only is of type int, not bool"),
        (lambda index: index["disks"].append({"file": 7}), r"disks\[1\]\.file is of type int, not str"),
        (lambda index: index["disks"][0].update(node="\ud800"), "a disk's name is no text"),
        (lambda index: index.update(disks=None), "disks is of type NoneType, not list"),
    ],
)
def test_an_index_that_cannot_be(work: Path, change: Callable[[Any], None], says: str) -> None:
    make(work / "snap")
    with changed_index(work / "snap") as index:
        change(index)
    refused(work / "snap", says)


@pytest.mark.parametrize("umask", [0, 0o777])
def test_all_of_it_is_the_owners_whatever_the_umask(work: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        make(work / "snap")
    finally:
        os.umask(before)
    assert (work / "snap").stat().st_mode & 0o7777 == 0o700
    assert {path.stat().st_mode & 0o7777 for path in (work / "snap").iterdir()} == {0o600}


def receive(work: Path, **options: Any) -> None:
    streams.small().write(work / "recording")
    multifd.receive(f"recording:{work / 'recording'}", work / "snap", **options)


@pytest.mark.parametrize("by", ["name", "number"])
def test_a_group_may_read_it(work: Path, by: str) -> None:
    group = os.getgroups()[-1] if os.getuid() else 65534
    receive(work, group=str(group) if by == "number" else grp.getgrgid(group).gr_name)
    for path in (work / "snap", *(work / "snap").iterdir()):
        found = path.stat()
        assert (found.st_mode & 0o7777, found.st_gid) == (0o750 if path.is_dir() else 0o640, group)


def test_a_group_that_is_none(work: Path) -> None:
    with pytest.raises(CallerError, match="there is no group 'no such group' here"):
        receive(work, group="no such group")
    for number in ("4294967296", "4294967295", "9" * 10, -1):
        with pytest.raises(CallerError, match="is no group's number"):
            receive(work, group=number)
    with pytest.raises(CallerError, match="there is no group '9999"):
        receive(work, group="9" * 5000)
    assert os.listdir(work) == ["recording"]


def as_nobody(work: Path, *arguments: object) -> str:
    """The error of a command by somebody else, who may search this directory and no more."""
    if os.getuid():
        pytest.skip("only root can be another user")
    work.chmod(0o755)
    code = (
        "import os, sys\nfrom multifd.cli.main import main\n"
        # First as root, who may read what is imported, wherever it lies; it is refused.
        "assert main([*sys.argv[1:], '-o', '/dev/null/snap']) == 1\n"
        "os.setgroups([])\nos.setgid(65534)\nos.setuid(65534)\nsys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1, result.stderr
    _, error = result.stderr.splitlines()
    return error


def test_a_group_that_one_may_not_give(work: Path) -> None:
    (work / "mine").mkdir()
    os.chown(work / "mine", 65534, 65534)
    error = as_nobody(work, "receive", f"unix:{work}/mine/x", "-o", work / "mine" / "snap", "--group", "0")
    assert f"{work}/mine/snap: it cannot be given to group 0: Operation not permitted" in error
    assert os.listdir(work / "mine") == []


def test_an_output_that_cannot_be_written(work: Path) -> None:
    error = as_nobody(work, "receive", "tcp:127.0.0.1:0", "-o", work / "snap")
    assert f"{work}: no snapshot can be made there: Permission denied" in error


@pytest.mark.parametrize(
    "what", ["link", "dangling link", "file", "full directory", "no parent", "parent is a file", "long"]
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_received(work: Path, what: str) -> None:
    path = work / "snap"
    if what == "link":
        (work / "there").mkdir()
        path.symlink_to("there")
    elif what == "dangling link":
        path.symlink_to("nowhere")
    elif what == "file":
        path.write_text("mine")
    elif what == "full directory":
        path.mkdir()
        (path / "mine").write_text("mine")
    elif what == "no parent":
        path = work / "nowhere" / "snap"
    elif what == "parent is a file":
        (work / "file").write_text("mine")
        path = work / "file" / "snap"
    else:
        path = work / ("x" * 256)
    before = sorted(work.rglob("*"))
    says = "is a link: name" if "link" in what else r"exists already: remove|create it first|Not a dir|name too long"
    fails(1, says, "receive", "tcp:127.0.0.1:0", "-o", path)  # one line: it does not listen
    assert sorted(work.rglob("*")) == before


def test_a_mount_point_is_refused_before_anything_is_received(work: Path) -> None:
    """An empty one is: nothing can take its place in the end."""
    (work / "snap").mkdir()
    with small_disk(work / "snap", 64):
        fails(
            1,
            "is where a file system is mounted: name a directory in it",
            "receive",
            "tcp:127.0.0.1:0",
            "-o",
            work / "snap",
        )


def test_the_longest_name(work: Path) -> None:
    make(work / ("\u00e9" * 127))
    assert multifd.open_snapshot(work / ("\u00e9" * 127)).machine == "pc"


@contextmanager
def no_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def begun(path: Path) -> SnapshotWriter:
    writer = SnapshotWriter(path, PAGE)
    writer.create_blocks([Block("pc.ram", 8 * PAGE)])
    writer.add_device_state(b"the devices")
    return writer


def complete(writer: SnapshotWriter) -> None:
    writer.complete(b"\7\0\0\0\0", uuid=bytes(16), machine="pc", sync="round", transfer={})


def test_a_discarded_one_leaves_nothing_though_no_descriptor_is_left(work: Path) -> None:
    """Where they ran out is where a snapshot is discarded."""
    found = begun(work / "snap")
    with no_descriptors():
        with pytest.raises(HostError, match="no descriptor is left"):
            found.create_blocks([Block("vga", PAGE)])
        found.discard()
    assert os.listdir(work) == []


def test_a_discarded_one_leaves_nothing_that_others_put_in(work: Path) -> None:
    found = begun(work / "snap")
    (draft,) = work.iterdir()
    (draft / "core").write_text("dumped")
    found.discard()
    assert os.listdir(work) == []


def test_a_snapshot_whose_name_is_not_on_the_disk_is_none(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(writer, "_sync_parent", fail)
    found = begun(work / "snap")
    with pytest.raises(HostError, match="Input/output error"):
        complete(found)
    found.discard()
    assert os.listdir(work) == []


def test_a_file_that_cannot_be_closed_keeps_none_of_the_others(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = begun(work / "snap")
    close = os.close

    def fail(fd: int) -> None:
        close(fd)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", fail)
        found.discard()
    assert os.listdir(work) == []


def test_a_process_that_is_left_leaves_no_draft(work: Path) -> None:
    """At a second signal, or where a thread hangs: a draft is the guest's memory."""
    code = (
        "import sys\nfrom multifd.crew import leave, undone\nfrom multifd.snapshot.writer import SnapshotWriter\n"
        "writer = SnapshotWriter(sys.argv[1], 4096)\nwith undone(writer.discard):\n    leave(7)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(work / "snap")], timeout=60, check=False)
    assert result.returncode == 7
    assert os.listdir(work) == []


def test_disks_are_named_in_bounds(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a file is called is anybody's text; there may be many."""
    make(work / "snap")
    with changed_index(work / "snap") as index:
        first = index["disks"][0]
        index["disks"] = [first | {"file": f"/\x1b[2J{number}" + "x" * 500} for number in range(20)]
    with caplog.at_level("INFO", "multifd"), pytest.raises(HostError, match="cannot connect"):
        multifd.send(work / "snap", f"unix:{work}/nobody", verify=False)
    (said,) = [text for text in caplog.messages if "disks" in text]
    assert said.startswith("the destination is to have the guest's disks as they were then: /\\x1b[2J0xxx")
    assert said.endswith("... (qcow2, node root), and 12 more")
    assert len(said) < 2500
    assert said.isprintable()


def test_a_snapshot_from_before_says_nothing_of_disks(work: Path) -> None:
    make(work / "snap")
    with changed_index(work / "snap") as index:
        del index["disks"]
    assert multifd.open_snapshot(work / "snap").disks is None
    assert multifd.inspect(work / "snap")["disks"] is None
