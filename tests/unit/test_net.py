"""Connections on real sockets, where no migration is needed to see what they do."""

from __future__ import annotations

import os
import resource
import socket
import statistics
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import peers
import streams
from multifd.crew import Crew
from multifd.errors import CallerError, Cancelled, HostError, UsageError
from multifd.net.connect import connect
from multifd.net.deadline import Silence
from multifd.net.door import AGAIN, Door
from multifd.net.listener import Listener
from multifd.net.recording import open_recording
from multifd.net.uri import Uri
from told import warns


def test_a_connection_that_is_to_outlast_its_network_probes_no_more() -> None:
    silence = Silence(1)
    with closing(Listener(Uri.parse("tcp:127.0.0.1:0"), Silence(30))) as listener:
        connection = connect(listener.uri, silence)
        with closing(connection), socket.socket(fileno=os.dup(connection.fileno())) as same:
            assert same.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            connection.outlast()
            assert same.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


def test_a_writer_hears_of_a_reset_at_once() -> None:
    """It had filled our buffers, they were drained after the end: nothing else would tell it."""
    silence = Silence(peers.TIMEOUT)
    listener = Listener(Uri.parse("tcp:127.0.0.1:0"), Silence(30))
    sock = peers.dial(str(listener.uri))
    connection = listener.accept(silence)
    assert connection is not None
    sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        while True:
            sock.send(bytes(1 << 20))
    connection.interrupt()
    while connection.read_some(1 << 20):
        pass
    connection.reset()
    closing_later = threading.Timer(0.1, connection.close)
    closing_later.start()
    sock.settimeout(peers.TIMEOUT)
    with pytest.raises(ConnectionError):
        sock.sendall(bytes(1 << 20))
    closing_later.join()
    sock.close()
    listener.close()


def test_a_door_without_descriptors_waits_for_one(work: Path) -> None:
    crew = Crew()
    listener = Listener(Uri.parse(f"unix:{work}/here"), Silence(30))
    door = Door(listener, peers.TIMEOUT, crew)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with peers.dial(str(listener.uri)) as sock:
        first_free = os.dup(sock.fileno())
        os.close(first_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, limits[1]))
        try:
            with warns("here cannot .* no descriptor is left: raise `ulimit -n`") as warned:
                door.begin()
                assert peers.eventually(lambda: len(warned) > 0)
                time.sleep(3 * AGAIN)
            assert len(warned) == 1, "once, however often it tries"
            assert door.came == 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert peers.eventually(lambda: door.came == 1)
        door.close()
        crew.join()


def test_a_path_that_is_too_long_is_said_to_be() -> None:
    uri = Uri.parse(f"unix:/{'x' * 108}")
    with pytest.raises(HostError, match="x: AF_UNIX path too long"):
        connect(uri, Silence(peers.TIMEOUT))
    with pytest.raises(CallerError, match="x: AF_UNIX path too long"):
        Listener(uri, Silence(30))


def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing wakes who asks it; a number is known without it."""
    answers, asked = threading.Event(), socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, **options: Any) -> Any:
        assert options.get("flags", 0) & socket.AI_NUMERICHOST or answers.wait(peers.TIMEOUT)
        return asked(host, port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with closing(Listener(Uri.parse("tcp:127.0.0.1:0"), Silence(30))) as listener:
        connect(listener.uri, Silence(0.5)).close()
        uri = Uri("tcp", host="localhost", port=listener.uri.port)
        with pytest.raises(HostError, match=r"cannot connect to .*: the name server has not answered within 0.5 s"):
            connect(uri, Silence(0.5))
        with pytest.raises(CallerError, match=r"cannot listen on .*: the name server has not answered within 0.5 s"):
            Listener(uri, Silence(0.5))
        silence = Silence(30)
        canceller = threading.Timer(0.2, silence.cancel)
        canceller.start()
        with pytest.raises(Cancelled):
            connect(uri, silence)
        canceller.join()
        answers.set()
        connect(uri, Silence(30)).close()
        assert peers.eventually(lambda: not [each for each in threading.enumerate() if "looking up" in each.name])


def test_what_can_be_no_name() -> None:
    with pytest.raises(HostError, match=r"cannot connect to tcp:a..b:1: 'a..b' can be no host's name"):
        connect(Uri.parse("tcp:a..b:1"), Silence(30))


@pytest.mark.parametrize("port", ["65536", "9" * 5000, "-1", "x", ""])
def test_what_can_be_no_port(port: str) -> None:
    with pytest.raises(UsageError, match="is no URI"):
        Uri.parse(f"tcp:localhost:{port}")


@pytest.mark.parametrize("kind", ["FIFO", "directory", "device"])
@pytest.mark.parametrize("name", ["main.bin", "main.bin.zst", "ch0.bin", "ch1.bin"])
def test_a_recording_is_regular_files(work: Path, kind: str, name: str) -> None:
    """Or links to them; nobody waits for a FIFO's writer."""
    streams.small().write(work)
    (work / "main.bin").rename(work / "elsewhere")
    (work / "main.bin").symlink_to("elsewhere")
    main, channels = open_recording(str(work))
    for connection in (main, *channels):
        connection.close()
    if name == "main.bin.zst":
        (work / "main.bin").unlink()
    (work / name).unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(work / name)
    elif kind == "directory":
        (work / name).mkdir()
    else:
        (work / name).symlink_to("/dev/zero")
    with pytest.raises(CallerError, match=f"{name} is no regular file"):
        open_recording(str(work))


def test_small_pieces_are_acknowledged_at_once() -> None:
    """A sender that waits for that, as QEMU's main channel does, would lose 40 ms with each."""
    silence = Silence(peers.TIMEOUT)
    pieces = 60
    with closing(Listener(Uri.parse("tcp:127.0.0.1:0"), Silence(30))) as listener, socket.socket() as sender:
        sender.settimeout(peers.TIMEOUT)
        sender.connect((listener.uri.host, listener.uri.port))
        reader = listener.accept(silence)
        assert reader is not None
        taken = []
        for _ in range(pieces):
            started = time.monotonic()
            reader.write([b"answer"])  # after that the kernel waits longest
            sender.recv(16)
            sender.sendall(b"x")
            sender.sendall(b"y")
            got = 0
            while got < 2:
                got += len(reader.read_some(16))
            taken.append(time.monotonic() - started)
        reader.close()
        assert statistics.median(taken) < 0.04 / 3
