"""Jobs that are ended from outside: from another thread, by a callback, by signals, and what cannot be woken."""

from __future__ import annotations

import importlib
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import images
import multifd
import peers
import streams
from multifd.errors import Cancelled, PeerError
from multifd.jobs.destination import connections
from multifd.jobs.report import Progress
from multifd.net.connection import Stalled
from multifd.net.deadline import Silence

MULTIFD = [sys.executable, "-m", "multifd"]
#: A compressor whose library does not come back for a minute.
HANGING = """
import ctypes
from multifd.hookspecs import Facts, Probe, hookimpl

@hookimpl
def multifd_compressor():
    return Facts(name="none-hanging", method="none", flag=0, summary="never comes back")

@hookimpl
def multifd_probe():
    return Probe(available=True)

@hookimpl
def multifd_send_setup(channel):
    pass

@hookimpl
def multifd_send_prepare(channel, pages):
    ctypes.CDLL(None).sleep(60)
    return pages

@hookimpl
def multifd_send_cleanup(channel):
    pass

@hookimpl
def multifd_recv_setup(channel):
    pass

@hookimpl
def multifd_recv(channel, pages):
    ctypes.CDLL(None).sleep(60)

@hookimpl
def multifd_recv_cleanup(channel):
    pass
"""


@pytest.mark.parametrize("stage", ["listening", "set-up", "moving"])
def test_receive_from_another_thread(work: Path, stage: str) -> None:
    crew = multifd.Crew()
    stream = streams.small(channels=2)
    job = peers.Receiving(work / "snap", crew=crew)
    socks = []
    if stage != "listening":
        socks = [peers.dial(job.uri) for _ in range(1 if stage == "set-up" else 3)]
        for sock, data in zip(socks, [stream.main, *stream.channels], strict=False):
            sock.sendall(data[: 100 if stage == "set-up" else len(data) // 2])
        time.sleep(0.1)
    began = time.monotonic()
    crew.cancel()
    with pytest.raises(Cancelled):
        job.join()
    assert time.monotonic() - began < peers.TIMEOUT / 3
    for sock in socks:
        sock.close()
    assert not list(work.iterdir())


def test_whoever_has_just_been_met_is_let_go(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crew = multifd.Crew()
    stream = streams.small(channels=2)
    module = importlib.import_module("multifd.jobs.destination.receive")

    def meet(*arguments: Any) -> Any:
        found = connections.meet(*arguments)
        crew.cancel()
        return found

    monkeypatch.setattr(module, "meet", meet)
    job = peers.Receiving(work / "snap", crew=crew)
    peers.play(job.uri, [stream.main, *stream.channels], 65536)
    with pytest.raises(Cancelled):
        job.join()


def test_send_from_another_thread(work: Path) -> None:
    """Its destination does not read."""
    images.write_pages(work / "image.raw", 5000, 4096)
    crew = multifd.Crew()
    threading.Timer(0.3, crew.cancel).start()
    with socket.create_server(("127.0.0.1", 0)) as there:
        began = time.monotonic()
        with pytest.raises(Cancelled):
            multifd.send(work / "image.raw", f"tcp:127.0.0.1:{there.getsockname()[1]}", crew=crew)
        assert time.monotonic() - began < peers.TIMEOUT / 3


@pytest.mark.parametrize("side", ["send", "receive"])
def test_a_callback_that_raises_fails_the_job_with_its_error(work: Path, side: str) -> None:
    images.write_pages(work / "image.raw", 30_000, 4096)

    def show(_: Progress) -> None:
        raise ValueError("mine")

    if side == "send":
        job = peers.Receiving(work / "snap")
        with pytest.raises(ValueError, match="mine"):
            multifd.send(work / "image.raw", job.uri, "zlib,level=9", rate=1 << 20, on_progress=show)
        with pytest.raises(PeerError):
            job.join()
    else:
        listening = threading.Event()
        uri: list[str] = []

        def told(where: str) -> None:
            uri.append(where)
            listening.set()

        def send() -> None:
            assert listening.wait(peers.TIMEOUT)
            with pytest.raises(PeerError):
                multifd.send(work / "image.raw", uri[0], "zlib,level=9", rate=1 << 20)

        sending = threading.Thread(target=send)
        sending.start()
        with pytest.raises(ValueError, match="mine"):
            multifd.receive("tcp:127.0.0.1:0", work / "snap", on_listening=told, on_progress=show)
        sending.join()
    assert not (work / "snap").exists()


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT], [signal.SIGHUP]])
def test_what_nothing_wakes_is_named_and_left(work: Path, signals: list[signal.Signals]) -> None:
    (work / "multifd_hanging.py").write_text(HANGING)
    images.write_pages(work / "image.raw", 500, 4096)
    command = ["receive", f"unix:{work}/here", "-o", str(work / "snap")]
    command += ["--plugin", str(work / "multifd_hanging.py"), "--compressor", "none-hanging"]
    with subprocess.Popen([*MULTIFD, *command], stderr=subprocess.PIPE, text=True) as job:
        assert peers.eventually((work / "here").exists)
        sender = subprocess.Popen(
            [*MULTIFD, "send", str(work / "image.raw"), f"unix:{work}/here"], stderr=subprocess.DEVNULL
        )
        assert peers.eventually(lambda: any(path.suffix == ".partial" for path in work.iterdir()))
        time.sleep(0.3)
        began = time.monotonic()
        for number in signals:
            job.send_signal(number)
        _, said = job.communicate(timeout=peers.TIMEOUT)
        assert time.monotonic() - began < peers.TIMEOUT / 6, "a second, on an idle machine"
        assert job.returncode == 128 + signals[-1]
        sender.wait(peers.TIMEOUT)
    assert not (work / "here").exists()
    if len(signals) > 1:  # two that come at once are one to the kernel
        assert "multifd: ended by a second signal: what was to be put back" in said or "nothing wakes it" in said
    else:
        assert "channel 0, channel 1: nothing wakes it" in said
        assert not (work / "snap").exists()
        assert [path.name for path in work.iterdir() if path.suffix == ".partial"] == []


def test_what_the_kernel_has_sent_is_movement() -> None:
    """Nobody has written or read for longer than the timeout, but the peer takes what was written before."""
    queue = list(range(100_000, 0, -5000))
    silence = Silence(0.2)
    silence.include(lambda: queue.pop(0) if len(queue) > 1 else queue[0])
    began = time.monotonic()
    with pytest.raises(Stalled, match=r"nothing moved for 0.2 s \(--timeout\)"):
        while True:
            silence.check("waiting", awaited=True)
            time.sleep(0.05)
    assert time.monotonic() - began >= 20 * 0.05


@pytest.mark.parametrize(
    "then",
    [
        "with crew.changed: crew.wait_for(lambda: False, 20)",  # a job that begins to use its crew
        "time.sleep(0.01)",  # a command that has none
    ],
)
def test_a_signal_whose_interrupt_is_lost_ends_the_command_all_the_same(then: str) -> None:
    """Python drops one that comes while it cleans up behind an import."""
    script = f"""
import time
from multifd.cli.signals import Stopped, run_beside
from multifd.crew import Crew

crew = Crew()

def run():
    try:
        print("here", flush=True)
        while True:
            time.sleep(0.01)
    except KeyboardInterrupt:
        pass
    while True:
        {then}

try:
    run_beside(run, crew)
except Stopped as stopped:
    raise SystemExit(stopped.code)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
