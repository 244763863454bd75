"""The commands as a user runs them: output, one line of error, exit codes, signals."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import images
import multifd
import streams
from captures import OWN_CAPTURES
from commands import MULTIFD, fails, run
from peers import eventually


@contextmanager
def receiving(work: Path, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [*MULTIFD, "receive", "tcp:127.0.0.1:0", "-o", str(work / "snap"), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        line = child.stderr.readline()
        assert line.startswith("multifd: listening on tcp:127.0.0.1:")
        yield child, line.split()[-1]
        if child.poll() is None:
            child.wait(30)


#: Seconds, on a machine with other work: less than the time that a peer is waited for.
AT_ONCE = 20
FIELDS = {"seconds", "normal_pages", "zero_pages", "wire_bytes", "memory_bytes", "packets", "channels", "compressor"}


def test_send_and_receive(work: Path) -> None:
    content = images.write_pages(work / "image.raw", 1000, 4096)
    with receiving(work, "--json", "--sha256") as (child, uri):
        sent = run("send", work / "image.raw", uri, "--compressor", "zlib", "--level", "3", "--json")
        received, errors = child.communicate(timeout=30)
    assert sent.returncode == child.returncode == 0, sent.stderr + errors
    assert sent.stderr == errors == "", "piped, it is quiet"
    for text in (sent.stdout, received):
        assert set(json.loads(text)) >= FIELDS
        assert json.loads(text)["memory_bytes"] == len(content)
    index = json.loads((work / "snap" / "snapshot.json").read_text())
    assert (work / "snap" / index["blocks"][0]["file"]).read_bytes() == content
    assert index["blocks"][0]["sha256"] == hashlib.sha256(content).hexdigest()
    assert json.loads(received)["digest"] == index["digests"]["manifest"]
    assert json.loads(sent.stdout)["digest"] is None, "an image has none"


def test_for_people(work: Path) -> None:
    images.write_pages(work / "image.raw", 1000, 4096)
    with receiving(work, "--no-digest") as (child, uri):
        sent = run("send", work / "image.raw", uri, "--block", "mem")
        received, _ = child.communicate(timeout=30)
    assert re.fullmatch(
        r"sent 3.9 MiB in .* s \(.*/s\): 1000 pages, \d+ of them zero; .* 2 channels, none\n", sent.stdout
    )
    assert f"into {work}/snap: 1000 pages" in received
    assert json.loads((work / "snap" / "snapshot.json").read_text())["blocks"][0]["sha256"] is None
    shown = run("inspect", work / "snap").stdout
    assert "block              mem: 4096000 bytes" in shown
    assert "ended              complete" in shown


def test_inspect_a_recording() -> None:
    result = run("inspect", OWN_CAPTURES / "q72-none-2ch", "--json")
    found = json.loads(result.stdout)
    assert (found["machine"], found["method"], found["ended"]) == ("pc-q35-7.2", "none", "complete")


def test_inspect_says_which_packets_are_missing(work: Path) -> None:
    stream = streams.small(page_size=4096, channels=2)
    first, second = stream.channels
    head = streams.header_length(4096)
    streams.Stream(stream.main, [first[: 64 + head] + first[-head:], second]).write(work)
    assert multifd.inspect(work)["ended"] == "sync point 2: 1 packet of 2 to 4 never came, from 2 on"
    (work / "ch0.bin").write_bytes(first + first[64 + head : -head])
    assert multifd.inspect(work)["ended"] == "channel 0: 1 packet after its last SYNC"
    (work / "ch0.bin").write_bytes(first + first[64 : 64 + 500])
    assert multifd.inspect(work)["ended"] == "channel 0: it ended after 500 of 1344 bytes of a packet's header"


def test_inspect_a_cut_recording_says_how_it_ended(work: Path) -> None:
    stream = streams.small(channels=2)
    stream.channels[1] = stream.channels[1][:-100]
    stream.main = stream.main[:-1]
    stream.write(work / "recording")
    found = json.loads(run("inspect", work / "recording", "--json").stdout)
    assert "main channel: the stream ended at byte" in found["ended"]
    assert "channel 1: it ended after 284 of 384 bytes of a packet's header" in found["ended"]
    assert found["normal_pages"] == 3


def test_compressors() -> None:
    rows = {row["name"]: row for row in json.loads(run("compressors", "--json").stdout)}
    assert rows["zstd"]["available"]
    assert re.search(
        r"^zlib +zlib +1 +software +zlib\+ISA-L .*\[multifd-zlib ", run("compressors").stdout, re.MULTILINE
    )


def test_version() -> None:
    assert re.fullmatch(r"multifd \d+\.\d+\.\d+\n", run("--version").stdout)


def test_usage_errors_exit_with_2(work: Path) -> None:
    images.write_pages(work / "image.raw", 4, 4096)
    target = ("send", work / "image.raw", "tcp:127.0.0.1:1")
    fails(2, "COMMAND")
    fails(2, "invalid choice", "fly")
    fails(2, "-o/--output", "receive", "tcp:127.0.0.1:0")
    fails(2, "is no URI: use tcp:HOST:PORT", "receive", "127.0.0.1:4444", "-o", work / "snap")
    fails(2, "level 99 is outside 0..9", *target, "--compressor", "zlib", "--level", "99")
    fails(2, "zstd has no option 'speed'; it has: level", *target, "--compressor", "zstd,speed=1")
    fails(2, "0 channels", *target, "--channels", "0")
    fails(2, "invalid choice", *target, "--zero-pages", "some")
    fails(2, "timeout", *target, "--timeout", "-1")
    fails(2, "page size 5000 is none of", "receive", "tcp:127.0.0.1:0", "-o", work / "snap", "--page-size", "5000")
    fails(2, "adaptive has no option 'speed'", *target, "--compressor", "adaptive,speed=1")


def test_errors_are_one_line_and_exit_with_1(work: Path) -> None:
    images.write_pages(work / "image.raw", 4, 4096)
    (work / "odd.raw").write_bytes(bytes(5000))
    fails(1, "is the destination listening there", "send", work / "image.raw", f"unix:{work}/none")
    fails(1, "did you mean zlib", "send", work / "image.raw", "tcp:127.0.0.1:1", "--compressor", "zlbi")
    fails(1, "odd.raw has 5000 bytes, which is not a multiple", "send", work / "odd.raw", "tcp:127.0.0.1:1")
    fails(1, "No such file", "send", work / "gone.raw", "tcp:127.0.0.1:1")
    fails(1, "is not a directory", "inspect", work / "image.raw")
    fails(1, r"holds no main\.bin", "inspect", work)
    fails(1, r"holds no main\.bin", "receive", f"recording:{work}", "-o", work / "snap")
    fails(1, "exists already", "receive", "tcp:127.0.0.1:0", "-o", work / "image.raw")
    fails(1, "cannot listen on", "receive", "unix:/nowhere/at/all", "-o", work / "snap")
    assert not (work / "snap").exists()


def test_debug_adds_the_traceback(work: Path) -> None:
    result = run("inspect", work, "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("multifd: ")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("stage", ["listening", "receiving"])
def test_ctrl_c_ends_cleanly_at_once(work: Path, number: signal.Signals, code: int, stage: str) -> None:
    from peers import dial

    with receiving(work) as (child, uri):
        if stage == "receiving":
            stream = streams.small(channels=2)
            with dial(uri) as main, dial(uri) as channel, dial(uri) as other:
                main.sendall(stream.main[: stream.main.index(b"pc.ram") + 20])
                channel.sendall(stream.channels[0][:5000])
                other.sendall(stream.channels[1][:64])
                assert eventually(lambda: any(work.iterdir()))
                child.send_signal(number)
                child.wait(AT_ONCE)
        else:
            child.send_signal(number)
            child.wait(AT_ONCE)
        assert child.returncode == code
        assert child.stderr is not None
        assert child.stderr.read() in ("multifd: interrupted\n", "")
    assert not list(work.iterdir())


def test_a_signal_at_its_very_end_does_not_change_its_code() -> None:
    for number in range(20):
        command = [*MULTIFD, "inspect", "/nowhere"]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            assert process.stderr.read(1)
            time.sleep(number / 1000)
            process.terminate()
            assert process.wait(30) == 1


def test_ctrl_c_while_sending(work: Path) -> None:
    import socket

    images.write_pages(work / "image.raw", 8000, 4096)
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"tcp:127.0.0.1:{server.getsockname()[1]}"
        child = subprocess.Popen([*MULTIFD, "send", str(work / "image.raw"), uri], stderr=subprocess.PIPE, text=True)
        socks = [server.accept()[0] for _ in range(3)]
        for sock in socks[1:]:
            assert len(sock.recv(4096, socket.MSG_WAITALL)) == 4096
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=AT_ONCE)
        for sock in socks:
            sock.close()
    assert (child.returncode, errors) == (130, "multifd: interrupted\n")


def test_progress_on_a_terminal(work: Path) -> None:
    images.write_pages(work / "image.raw", 120_000, 4096)
    ours, theirs = pty.openpty()
    with receiving(work) as (_, uri):
        child = subprocess.Popen(
            [*MULTIFD, "send", str(work / "image.raw"), uri, "--compressor", "zlib,level=9"],
            stderr=theirs,
            stdout=subprocess.DEVNULL,
        )
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 4096):
                shown += data
        except OSError:
            pass
        os.close(ours)
        assert child.wait(30) == 0
    assert re.search(rb"MiB/s, ratio \d+\.\d\d, \d+ s left", shown)
    assert shown.endswith(b"\r\x1b[K")


@pytest.mark.parametrize("command", ["send", "receive", "doctor"])
def test_a_peer_that_takes_connections_and_says_nothing(work: Path, command: str) -> None:
    """A destination, or a monitor that another client holds: the command's own main thread is what waits."""
    images.write_memory(work)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{work}/silent")
        silent.listen()
        arguments: dict[str, tuple[object, ...]] = {
            "send": (work / "image.raw", f"unix:{work}/silent"),
            "receive": (f"unix:{work}/here", "-o", work / "snap", "--qmp", work / "silent"),
            "doctor": ("--source-qmp", work / "silent", "--destination-qmp", work / "silent"),
        }
        says = (
            r"nothing moved for 1 s \(--timeout\)"
            if command == "send"
            else "another client holds this monitor: libvirt"
        )
        fails(1, says, command, *arguments[command], "--timeout", "1")


def test_a_source_that_stops_in_the_middle_of_a_word(work: Path) -> None:
    stream = streams.small()
    sent = stream.main[: stream.main.index(b"pc.ram")]
    with subprocess.Popen(
        [*MULTIFD, "receive", f"unix:{work}/here", "-o", str(work / "snap"), "--timeout", "1"],
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert eventually((work / "here").exists)
        with socket.socket(socket.AF_UNIX) as main:
            main.connect(f"{work}/here")
            main.sendall(sent)
            _, said = child.communicate(timeout=30)
    assert child.returncode == 1
    assert said.splitlines()[-1] == (
        f"multifd: main channel: sent {len(sent)} bytes and then nothing for 1 s (--timeout)"
    )
