"""What the commands say, and to whom: people, machines, nobody at all."""

from __future__ import annotations

import json
import os
import pty
import resource
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import pytest

import images
import multifd
import peers
import streams
from captures import OWN_CAPTURES
from commands import MULTIFD, run
from multifd.cli.lines import Lines
from multifd.cli.records import Records
from multifd.errors import PeerError
from multifd.log import log

CAPTURE = OWN_CAPTURES / "q72-none-2ch"
UUID = "00010203-0405-0607-0809-0a0b0c0d0e0f"
#: Each writes where what it is for is written.
OUTPUTS: list[Sequence[object]] = [
    ("compressors",),
    ("compressors", "--json"),
    ("inspect", CAPTURE),
    ("inspect", CAPTURE, "--json"),
]
#: How a shell puts an output where it cannot be written, and what is said then.
NOWHERE = {">&-": "is closed", ">/dev/full": "the disk is full", "| true": "Broken pipe"}


def shell(*command: object, to: str) -> subprocess.CompletedProcess[str]:
    words = " ".join(f"'{word}'" for word in (*MULTIFD, *command))
    line = f"set -o pipefail; sleep 0.1; {words} {to}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)


@contextmanager
def relaying(work: Path, *arguments: object, **streams: object) -> Iterator[subprocess.Popen[bytes]]:
    """A relay from `here` to `there`, for as many migrations as come."""
    command = [*MULTIFD, "relay", "--listen", f"unix:{work}/here", "--connect", f"unix:{work}/there", *arguments]
    with subprocess.Popen([str(word) for word in command], **streams) as process:  # type: ignore[call-overload]
        try:
            assert peers.eventually((work / "here").exists)
            yield process
        finally:
            process.terminate()
            assert process.wait(30) == 0


def migrate(work: Path, name: str, *, through: str = "here") -> None:
    there = peers.Receiving(work / name, f"unix:{work}/there", channels=1)
    stream = streams.small("zlib", return_path=True)
    assert peers.play(f"unix:{work}/{through}", [stream.main, *stream.channels], 65536).endswith(streams.SHUT_DONE)
    there.join()


@pytest.mark.parametrize("to", NOWHERE)
@pytest.mark.parametrize("command", OUTPUTS, ids=lambda command: "-".join(map(str, command)).replace("/", "."))
def test_a_command_that_cannot_write_what_it_is_for_fails(command: Sequence[object], to: str) -> None:
    result = shell(*command, to=to)
    if to == "| true":
        assert result.returncode in (0, 1), "it may have written before `true` ended"
    else:
        assert result.returncode == 1
    if result.returncode:
        (line,) = result.stderr.splitlines()
        assert line.startswith("multifd: standard output")
        assert NOWHERE[to] in line


@pytest.mark.parametrize("to", [">&-", ">/dev/full", "2>&-", "2>/dev/full", ">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_a_transfer_survives_that_nobody_hears_of_it(work: Path, to: str) -> None:
    content = images.write_pages(work / "image.raw", 1000, 4096)
    there = peers.Receiving(work / "snap", f"unix:{work}/there")
    result = shell("send", work / "image.raw", there.uri, "--compressor", "zlib", to=to)
    there.join()
    assert result.returncode == 0, result.stderr
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content
    if to == ">/dev/full":
        (line,) = result.stderr.splitlines()
        assert "standard output takes no more: the disk is full" in line
        assert "sent 3.9 MiB" in line, "what it came to is said where it can be"


def test_a_descriptor_that_was_closed_is_no_connection(work: Path) -> None:
    """A library that prints to standard error would print into it."""
    images.write_pages(work / "image.raw", 100, 4096)
    there = peers.Receiving(work / "snap", f"unix:{work}/there")
    command = f"{' '.join(MULTIFD)} relay --listen unix:{work}/here --connect {there.uri} --migrations 1 <&- >&- 2>&- &"
    with subprocess.Popen(["bash", "-c", f"{command} echo $!; wait $!"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert peers.eventually((work / "here").exists)
        assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)] == [os.devnull] * 3
        multifd.send(work / "image.raw", f"unix:{work}/here")
        there.join()
        assert process.wait(30) == 0


def test_a_relay_whose_log_nobody_reads_goes_on(work: Path) -> None:
    """Both of its pipes are full."""
    out, into = os.pipe()
    os.set_blocking(into, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(into, bytes(4096))
    os.set_blocking(into, True)
    with relaying(work, "-v", stdout=into, stderr=into):
        os.close(into)
        for number in range(3):
            migrate(work, f"snap{number}")
    os.close(out)


def test_a_relay_says_which_migration_it_speaks_of(work: Path) -> None:
    with relaying(work, "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        migrate(work, "snap")
        assert process.stdout is not None
        done = json.loads(process.stdout.readline())
        stream = streams.small("zlib", return_path=True)
        there = peers.Receiving(work / "other", f"unix:{work}/there", channels=1)
        peers.play(f"unix:{work}/here", [stream.main[:-20], *stream.channels], 65536, dies=True)
        with pytest.raises(PeerError):
            there.join()
        assert process.stderr is not None
        assert process.stderr.readline() == f"multifd: listening on unix:{work}/here\n".encode()
        failed = process.stderr.readline().decode()
    addresses = {"source_address": f"unix:{work}/here", "destination_address": f"unix:{work}/there"}
    assert done.items() >= ({"uuid": UUID} | addresses).items()
    assert failed.startswith(f"multifd: VM {UUID}, unix:{work}/here to unix:{work}/there: the source ended")


def test_records_for_machines(work: Path) -> None:
    with relaying(work, "--to", "zstd", "-v", "--log", "json", "--progress", "0.5", stderr=subprocess.PIPE) as process:
        migrate(work, "snap")
        process.terminate()
        assert process.stderr is not None
        records = [json.loads(line) for line in process.stderr.read().splitlines()]
    for record in records:
        assert datetime.fromisoformat(record["time"]).tzinfo is not None
        assert record["level"] in ("debug", "info")
    assert records[0]["message"].startswith("payloads are written by zstd")
    (chosen,) = [record for record in records if record["message"].startswith("packets of zlib are read by zlib")]
    assert chosen["uuid"] == UUID


def test_what_is_wrong_is_a_record_too(work: Path) -> None:
    result = run("inspect", work / "nowhere", "--log=json")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1
    assert json.loads(line)["level"] == "error"
    assert str(work / "nowhere") in json.loads(line)["message"]


@pytest.mark.parametrize("as_json", [False, True])
def test_progress_where_there_is_no_terminal(work: Path, as_json: bool) -> None:
    images.write_pages(work / "image.raw", 120_000, 4096)
    there = peers.Receiving(work / "snap", f"unix:{work}/there")
    more = ["--log", "json"] if as_json else []
    result = run("send", work / "image.raw", there.uri, "--compressor", "zlib,level=9", "--progress", "0.5", *more)
    there.join()
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    assert lines, "this machine takes more than half a second for that"
    if as_json:
        told = [json.loads(line) for line in lines]
        assert [record["pages"] for record in told] == sorted(record["pages"] for record in told)
        assert all(record["total_pages"] == 120_000 and 0 <= record["percent"] <= 100 for record in told)
        assert all(record["seconds_left"] >= 0 and record["ratio"] > 1 for record in told)
    else:
        assert all(line.startswith("multifd: progress: ") and line.endswith(" s left") for line in lines)


def test_what_was_decided(work: Path) -> None:
    images.write_pages(work / "image.raw", 100, 4096)
    there = peers.Receiving(work / "snap", f"unix:{work}/there")
    result = run("send", work / "image.raw", there.uri, "--compressor", "zlib,level=3", "-v")
    there.join()
    assert "compressor zlib (multifd-zlib " in result.stderr
    assert "level 3; zero pages multifd: an image's default; a sync point per round" in result.stderr


def test_a_snapshot_cannot_write_to_a_terminal(work: Path) -> None:
    multifd.receive(f"recording:{CAPTURE}", work / "snap")
    path = work / "snap" / "snapshot.json"
    index = json.loads(path.read_text())
    index["machine"] = "pc\x1b]0;owned\x07\nblock              fake: 0 bytes\u202e"
    path.write_text(json.dumps(index))
    result = run("inspect", work / "snap")
    assert result.returncode == 0
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("machine")]
    assert line.endswith(r"pc\x1b]0;owned\x07\nblock              fake: 0 bytes\u202e")


def test_one_record_is_one_line_whoever_else_speaks() -> None:
    """From four threads, to a pipe; and no longer than a pipe takes at once."""
    out, into = os.pipe()
    said = [b""]

    def read() -> None:
        while data := os.read(out, 65536):
            said[0] += data

    def talk(number: int) -> None:
        for count in range(500):
            log.warning(f"{number} {count}\n{'x' * (6 * count)}")

    reading = threading.Thread(target=read)
    reading.start()
    with logging_to(into, as_json=False):
        talking = [threading.Thread(target=talk, args=(number,)) for number in range(4)]
        for thread in talking:
            thread.start()
        for thread in talking:
            thread.join()
    os.close(into)
    reading.join()
    os.close(out)
    lines = said[0].decode().splitlines()
    assert len(lines) == 2000
    assert all(line.startswith("multifd: warning: ") and line.count("multifd") == 1 for line in lines)
    assert max(map(len, lines)) < select.PIPE_BUF


def test_records_and_progress_do_not_run_into_each_other_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    lines = Lines(theirs, "a terminal")
    lines.offer("45 %", unfinished=True)
    lines.offer("multifd: something")
    lines.offer("46 %", unfinished=True)
    lines.offer("")
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # its end
        while data := os.read(ours, 4096):
            shown += data
    os.close(ours)
    assert shown == b"\r\x1b[K45 %\r\x1b[Kmultifd: something\r\n\r\x1b[K46 %\r\x1b[K"


@contextmanager
def logging_to(fd: int, *, as_json: bool = True) -> Iterator[Lines]:
    """All that is logged, and nowhere else."""
    lines = Lines(fd, "a pipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "handlers", [Records(lines, as_json=as_json)])
        yield lines


def test_lines_that_nobody_read_are_counted() -> None:
    out, into = os.pipe()
    with logging_to(into):
        for _ in range(400):
            log.warning("x" * 3000, extra={"progress": {"number": _}})
            log.error("y" * 3000)
        before = os.read(out, 1 << 20).splitlines()
        log.error("again")
        os.close(into)
        *_, told, last = os.read(out, 1 << 20).splitlines()
    os.close(out)
    lost = 401 - len(before)  # the same warning is told once
    assert all(json.loads(line) for line in before)
    assert json.loads(told)["message"] == f"{lost} lines could not be written here"
    assert json.loads(last)["message"] == "again"


def test_a_line_that_could_not_be_finished_is_not_joined_by_another(work: Path) -> None:
    """A disk that is full takes what it has room for."""
    with open(work / "out", "wb") as file, logging_to(file.fileno()):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (250, hard))
        try:
            for _ in range(3):
                log.error("first " * 20)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.error("last")
    first, cut, told, last = (work / "out").read_bytes().splitlines()
    assert json.loads(first)["message"] == "first " * 20
    assert first.startswith(cut[:20])
    assert json.loads(told)["message"] == "2 lines could not be written here"
    assert json.loads(last)["message"] == "last"


def test_a_long_message_is_cut_before_it_is_written() -> None:
    out, into = os.pipe()
    with logging_to(into):
        log.error("\U0001f600" * 3000)
    os.close(into)
    line = os.read(out, 1 << 20)
    os.close(out)
    assert len(line) <= select.PIPE_BUF
    assert json.loads(line)["message"].endswith("\U0001f600...")


@pytest.mark.parametrize("command", ["inspect", "compressors"])
def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_all_of_it(command: str) -> None:
    out, into = os.pipe()
    os.set_blocking(into, False)
    with suppress(BlockingIOError):
        while True:
            os.write(into, bytes(4096))
    arguments = [command, str(CAPTURE)] if command == "inspect" else [command]
    with subprocess.Popen([*MULTIFD, *arguments], stdout=into, stderr=subprocess.PIPE) as process:
        os.close(into)
        time.sleep(1.5)
        found = b""
        while data := os.read(out, 65536):
            found += data
        assert process.wait(30) == 0
    os.close(out)
    assert found.strip(b"\0").decode() == run(*arguments).stdout


def test_addresses_cannot_write_to_a_terminal(work: Path) -> None:
    images.write_pages(work / "image.raw", 100, 4096)
    where = f"unix:{work}/q\n\x1b[31m\u202ez"
    command = [*MULTIFD, "relay", "--listen", f"unix:{work}/here", "--connect", where, "--migrations", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert peers.eventually((work / "here").exists)
        assert run("send", work / "image.raw", f"unix:{work}/here").returncode == 1
        assert process.stderr is not None
        _, failed = process.stderr.read().splitlines()
    assert r"q\n\x1b[31m\u202ez: cannot connect to" in failed
    assert failed.isprintable()


@pytest.mark.parametrize("command", [["--version"], ["--help"], ["inspect", "--help"]])
def test_help_that_cannot_be_written(command: list[str]) -> None:
    for to, why in ((">/dev/full", "the disk is full"), (">&-", "is closed")):
        result = shell(*command, to=to)
        assert result.returncode == 1
        (line,) = result.stderr.splitlines()
        assert line.startswith("multifd: standard output")
        assert why in line


def test_a_usage_error_is_a_record(work: Path) -> None:
    result = run("inspect", "--log", "json")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert json.loads(line)["message"] == (
        "inspect: the following arguments are required: RECORDING|SNAPSHOT; see multifd inspect --help"
    )
    result = run("send", "a", "unix:b", "--compresor", "zlib")
    assert result.stderr == "multifd: send: unrecognized arguments: --compresor zlib; see multifd send --help\n"
    result = run("inspect", work / "a", "b\x1b[31m\n\u202e" + "n" * 10000)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2
    assert line.isprintable()
    assert len(line) < 4096
