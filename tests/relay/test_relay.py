"""The relay between our own ends: every pair of methods, and everybody who goes away."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

import images
import multifd
import peers
import streams
from captures import Capture
from multifd import open_snapshot
from multifd.errors import CallerError, HostError, PeerError
from multifd.jobs.relay import channels
from multifd.jobs.relay.counters import STAGES
from multifd.jobs.relay.metrics import serving
from multifd.jobs.relay.outcome import Relayed
from relaying import Relaying, closing
from told import warns

METHODS = ["none", "zlib", "zstd", "qatzip-sw", "qpl-sw", "uadk-sw"]


def refused(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(("source", "to"), list(itertools.product(METHODS, METHODS)))
def test_every_pair_of_methods(work: Path, source: str, to: str) -> None:
    content = images.write_memory(work)
    there = peers.Receiving(work / "snap", channels=3)
    with closing(Relaying(there.uri, source=source, to=to)) as relaying:
        sent = multifd.send(open_snapshot(work / "image.raw"), relaying.uri, source, channels=3)
        arrived = there.join()
        result = relaying.result()
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content
    assert (result.normal_pages, result.zero_pages) == (sent.normal_pages, sent.zero_pages)
    assert (result.bytes_in, result.bytes_out) == (sent.wire_bytes, arrived.wire_bytes)
    assert (result.packets, result.channels, result.confirmed) == (sent.packets, 3, True)
    assert arrived.compressor == to
    if source == to:
        assert result.bytes_in == result.bytes_out


def test_two_in_a_row_over_unix_sockets(work: Path) -> None:
    content = images.write_memory(work)
    there = peers.Receiving(work / "snap", f"unix:{work}/there")
    with (
        closing(Relaying(there.uri, listen=f"unix:{work}/b", to="none")) as second,
        closing(Relaying(second.uri, listen=f"unix:{work}/a", to="zstd,level=3")) as first,
    ):
        multifd.send(open_snapshot(work / "image.raw"), first.uri, "none")
        there.join()
        assert first.result().bytes_out == second.result().bytes_in < len(content) / 2
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content


def test_auto_writes_with_the_best_that_the_destination_accepts(work: Path) -> None:
    content = images.write_memory(work)
    there = peers.Receiving(work / "snap", compressor="zstd")
    with closing(Relaying(there.uri, source="auto", to="auto,accepts=zstd+none")) as relaying:
        multifd.send(open_snapshot(work / "image.raw"), relaying.uri, "auto,accepts=zlib")
        there.join()
        result = relaying.result()
    assert (result.source, result.destination) == ("zlib", "zstd")
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content


def test_one_migration_after_another(work: Path) -> None:
    content = images.write_memory(work)
    with closing(Relaying(f"unix:{work}/there", migrations=3, to="zlib")) as relaying:
        for number in range(3):
            there = peers.Receiving(work / f"snap{number}", f"unix:{work}/there")
            multifd.send(open_snapshot(work / "image.raw"), relaying.uri, "zstd")
            there.join()
            assert (work / f"snap{number}" / "0-pc.ram.raw").read_bytes() == content
        outcomes = relaying.join()
    assert [type(outcome) for outcome in outcomes] == [Relayed] * 3


def test_a_second_migration_meanwhile_is_refused_and_mixes_nothing(work: Path) -> None:
    stream = streams.small("zlib", return_path=True, channels=2)
    there = peers.Receiving(work / "snap", channels=2)
    with closing(Relaying(there.uri, to="zstd")) as relaying:
        socks = [peers.dial(relaying.uri) for _ in range(3)]
        cuts = [stream.main.index(b"pc.ram") + 20, 100, 100]
        for sock, data, cut in zip(socks, [stream.main, *stream.channels], cuts, strict=True):
            sock.sendall(data[:cut])
        assert peers.eventually(lambda: relaying.connections() == 6), (
            "it serves this one, with three to the destination"
        )
        with warns("is a second main channel, the relay serves one migration at a time") as warned:
            other = peers.dial(relaying.uri)
            other.sendall(stream.main[: cuts[0]])
            assert refused(other)
            assert peers.eventually(lambda: len(warned) > 0)
        with warns("which is not the migration that the relay serves") as warned:
            late = peers.dial(relaying.uri)
            late.sendall(streams.init(1))
            assert refused(late)
            assert peers.eventually(lambda: len(warned) > 0)
        with warns("begins with 0x47455420, neither a migration") as warned:
            stranger = peers.dial(relaying.uri)
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert refused(stranger)
            assert peers.eventually(lambda: len(warned) > 0)
        for sock, data, cut in zip(socks, [stream.main, *stream.channels], cuts, strict=True):
            sock.sendall(data[cut:])
        there.join()
        assert relaying.result().confirmed
        for sock in (*socks, other, late, stranger):
            sock.close()
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == stream.ram["pc.ram"]


@pytest.mark.parametrize("moving", [True, False])
def test_a_channel_may_be_quiet_while_another_moves(moving: bool) -> None:
    """Inside a packet; the relay was idle for longer before."""
    stream = streams.small("zlib", return_path=True, channels=2)
    quiet, busy = stream.channels
    there = peers.Keeping(2, everything=sum(map(len, [stream.main, quiet, busy])) if moving else None)
    with closing(Relaying(there.uri, timeout=1.5)) as relaying:
        time.sleep(1.6)
        with peers.dial(relaying.uri) as main, peers.dial(relaying.uri) as first, peers.dial(relaying.uri) as second:
            main.sendall(stream.main)
            first.sendall(quiet[:-1])
            second.sendall(busy[:-20])
            if not moving:
                assert "nothing moved for 1.5 s (--timeout)" in relaying.error()
            else:
                for at in range(len(busy) - 20, len(busy)):
                    time.sleep(0.1)
                    second.sendall(busy[at : at + 1])
                first.sendall(quiet[-1:])
                assert relaying.result().confirmed
    there.join()


def test_a_channel_may_be_late(work: Path) -> None:
    """The source connected all of them first, but the relay has not met it when the main channel is complete."""
    stream = streams.small("zlib", return_path=True, channels=2)
    there = peers.Receiving(work / "snap", channels=2)
    with (
        closing(Relaying(there.uri, to="zstd")) as relaying,
        peers.dial(relaying.uri) as main,
        peers.dial(relaying.uri) as first,
        peers.dial(relaying.uri) as late,
    ):
        main.sendall(stream.main)
        first.sendall(stream.channels[0])
        time.sleep(0.3)
        late.sendall(stream.channels[1])
        there.join()
        assert relaying.result().confirmed
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == stream.ram["pc.ram"]


def test_what_an_earlier_migration_left_behind_is_dropped(work: Path) -> None:
    """A channel that connects when its main channel has failed already does not spoil the next migration."""
    content = images.write_memory(work)
    there = peers.Receiving(work / "snap")
    with closing(Relaying(there.uri, to="zlib")) as relaying:
        with peers.dial(relaying.uri) as late:
            late.sendall(streams.init(0))
        multifd.send(open_snapshot(work / "image.raw"), relaying.uri)
        there.join()
        assert relaying.result().confirmed
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content


def test_nobody_at_the_destination(work: Path) -> None:
    images.write_memory(work)
    with closing(Relaying(f"unix:{work}/nobody", to="zlib")) as relaying:
        with pytest.raises(PeerError):
            multifd.send(open_snapshot(work / "image.raw"), relaying.uri)
        assert f"cannot connect to unix:{work}/nobody: No such file or directory" in relaying.error()


def test_a_destination_that_expects_another_method(work: Path) -> None:
    images.write_memory(work)
    there = peers.Receiving(work / "snap", compressor="zlib")
    with closing(Relaying(there.uri, to="zstd")) as relaying:
        with pytest.raises(PeerError):
            multifd.send(open_snapshot(work / "image.raw"), relaying.uri)
        with pytest.raises(PeerError, match="the sender uses zstd, this side expects zlib"):
            there.join()
        assert "the destination" in relaying.error()


@pytest.mark.may_warn(".*closed without a byte")
def test_a_source_of_another_method_than_said(work: Path) -> None:
    images.write_memory(work)
    there = peers.Receiving(work / "snap", timeout=3)
    with closing(Relaying(there.uri, source="zlib", to="zstd")) as relaying:
        with pytest.raises(PeerError):
            multifd.send(open_snapshot(work / "image.raw"), relaying.uri, "zstd")
        assert "the sender uses zstd, this side expects zlib" in relaying.error()
    with pytest.raises(PeerError):
        there.join()
    assert not (work / "snap").exists()


# A connection that the relay had just made for a channel may end with the migration, before its first byte.
@pytest.mark.may_warn(".*closed without a byte")
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_a_source_that_dies(work: Path, cut: int) -> None:
    """Of main and two channels one is cut short, then all are closed: nothing arrives."""
    stream = streams.small("zlib", channels=2)
    files = [stream.main, *stream.channels]
    files[cut] = files[cut][: len(files[cut]) // 2]
    there = peers.Receiving(work / "snap", channels=2, timeout=3)  # a channel may never come
    with closing(Relaying(there.uri, to="zstd")) as relaying:
        peers.play(relaying.uri, files, 65536, dies=True)
        with pytest.raises(PeerError):
            there.join()
        assert relaying.error() == "the source ended early: cancelled, or gone"
    assert not (work / "snap").exists()


def wrong_ends(stream: streams.Stream) -> dict[str, streams.Stream]:
    """A stream of two channels, whole but for one thing."""
    page = streams.packet([0], [], payload=bytes(4096), number=5)
    flush = streams.FLUSH + streams.EOS + streams.FOOTER
    head, _, rest = stream.main.rpartition(flush)
    first, second = stream.channels
    packet = 64 + streams.header_length(4096)
    return {
        "a SYNC too many": streams.Stream(stream.main, [first, second + streams.sync(number=5)]),
        "a page behind the last SYNC": streams.Stream(stream.main, [first + page, second]),
        "a marker too few": streams.Stream(head + streams.EOS + streams.FOOTER + rest, [first, second]),
        "a SYNC doubled": streams.Stream(stream.main, [first, second + streams.sync(number=4)]),
        "a packet missing": streams.Stream(
            stream.main, [first[:packet] + first[-streams.header_length(4096) :], second]
        ),
        "a packet twice": streams.Stream(
            stream.main,
            [first[: -streams.header_length(4096)] + first[packet:], second],
        ),
    }


@pytest.mark.parametrize("late", [False, True], ids=["", "its channels come late"])
@pytest.mark.parametrize("said", ["nothing", "its head", "its first sync point"])
def test_a_cancel_in_the_set_up_reaches_the_destination(said: str, late: bool) -> None:
    """A QEMU that waits for channels notices nothing of its source's end before the last of them is there."""
    stream = streams.small(channels=2)
    first = stream.main.index(streams.EOS) + len(streams.EOS)
    main = stream.main[: {"nothing": 0, "its head": 8, "its first sync point": first}[said]]
    sent = [data[: 64 + (streams.header_length(65536) if "sync" in said else 0)] for data in stream.channels]
    there = peers.Keeping(2)
    with closing(Relaying(there.uri)) as relaying:
        socks = [peers.dial(relaying.uri)]
        socks[0].sendall(main)
        if late:
            socks[0].shutdown(socket.SHUT_RDWR)
        for data in sent:
            socks.append(peers.dial(relaying.uri))
            socks[-1].sendall(data)
        for sock in socks:
            sock.close()
        assert relaying.error() == "the source ended early: cancelled, or gone"
    there.join()
    assert there.main == main
    assert there.channels == dict(enumerate(sent))


@pytest.mark.parametrize("channels", [1, 2])
def test_the_next_migration_may_come_at_once_after_a_cancel(channels: int) -> None:
    """None of its channels is taken for the one before, which has the same VM and may lack some."""
    stream = streams.small(return_path=True, channels=2)
    there = peers.Keeping(1 + 2 + channels)
    with closing(Relaying(there.uri, migrations=2)) as relaying:
        with ExitStack() as stack:
            for data in [stream.main[:300], *(data[:64] for data in stream.channels[:channels])]:
                stack.enter_context(peers.dial(relaying.uri)).sendall(data)
            assert peers.eventually(lambda: relaying.connections() == 2 * (1 + channels))
        order = [1, 2, 0]  # as QEMU: its main channel, connected first, is silent until the others have come
        with ExitStack() as stack:
            socks = [stack.enter_context(peers.dial(relaying.uri)) for _ in range(3)]
            for number in order:
                socks[number].sendall([stream.main, *stream.channels][number])
                time.sleep(0.05)
            answer = b""
            while answer[-8:] != streams.SHUT_DONE and (data := socks[0].recv(4096)):
                answer += data
        first, second = relaying.join()
        assert str(first) == "the source ended early: cancelled, or gone"
        assert isinstance(second, Relayed), second
        assert second.confirmed
    there.join()


def test_a_sync_point_waits_for_its_syncs() -> None:
    """A QEMU that has read it waits for them with its main loop, for ever where the relay or the source goes now."""
    stream = streams.small(return_path=True)
    until = stream.main.rindex(streams.FLUSH) + len(streams.FLUSH) - 1
    channel = stream.channels[0]
    rest = streams.header_length(65536)
    there = peers.Keeping(1, everything=len(stream.main) + len(channel))
    with (
        closing(Relaying(there.uri)) as relaying,
        peers.dial(relaying.uri) as source,
        peers.dial(relaying.uri) as other,
    ):
        source.sendall(stream.main)
        other.sendall(channel[:-rest])
        assert peers.eventually(lambda: there.missing == len(stream.main) - until + rest)
        time.sleep(0.2)
        assert there.missing == len(stream.main) - until + rest
        other.sendall(channel[-rest:])
        assert relaying.result().confirmed
    there.join()
    assert [there.main, there.channels[0]] == [stream.main, channel]


def last_byte_alone(uri: str, sent: Sequence[bytes]) -> bytes:
    """Be a source whose main channel's last byte comes when all else has passed; what it was answered."""
    with ExitStack() as stack:
        main, *others = [stack.enter_context(peers.dial(uri)) for _ in sent]
        main.sendall(sent[0][:-1])
        for sock, data in zip(others, sent[1:], strict=True):
            sock.sendall(data)
        time.sleep(0.1)
        answer = b""
        with suppress(ConnectionError):
            main.sendall(sent[0][-1:])
            while data := main.recv(4096):
                answer += data
        return answer


@pytest.mark.parametrize("to", [None, "zstd"])
@pytest.mark.parametrize("return_path", [True, False])
def test_what_is_not_whole_is_refused_every_time(
    monkeypatch: pytest.MonkeyPatch, to: str | None, return_path: bool
) -> None:
    """Before the destination, which takes everything, has the last byte: neither side says that it is done."""
    monkeypatch.setattr(channels, "LATE_CHANNEL", 0.1)
    good = streams.small("zlib", page_size=4096, return_path=return_path, channels=2)
    for what, stream in wrong_ends(good).items():
        for number in range(3):
            there = peers.Keeping(2)
            with closing(Relaying(there.uri, to=to)) as relaying:
                sent = [stream.main, *stream.channels]
                answer = peers.play(relaying.uri, sent, 65536) if number else last_byte_alone(relaying.uri, sent)
                said = relaying.error()
            with suppress(OSError):  # it may have had all of them
                there.stop()
            there.join()
            assert re.search("after the last, but the main channel ended|sync point 2: |packet 2: zlib", said), (
                what,
                number,
                said,
            )
            assert answer == b"", (what, number)
            assert there.main != stream.main, (what, number)


@pytest.mark.parametrize("return_path", [False, True])
def test_a_source_without_description(return_path: bool) -> None:
    """With suppress-vmdesc=on.  The destination gets all of it; without its answer nobody can tell it from a cut."""
    stream = streams.small("zlib", return_path=return_path, channels=2)
    main = stream.main.removesuffix(streams.description()) + b"\0"
    answer = streams.SHUT_DONE if return_path else b""
    there = peers.Keeping(2, answer, everything=len(main) + sum(map(len, stream.channels)), described=False)
    with closing(Relaying(there.uri)) as relaying:
        peers.play(relaying.uri, [main, *stream.channels], 65536, dies=not return_path)
        if return_path:
            assert relaying.result().confirmed
        else:
            assert "ended early: cancelled, or gone; or it runs with suppress-vmdesc=on" in relaying.error()
    there.join()
    assert [there.main, *(there.channels[number] for number in range(2))] == [main, *stream.channels]


@pytest.mark.parametrize("as_json", [False, True])
def test_without_return_path_nothing_is_confirmed(work: Path, as_json: bool) -> None:
    stream = streams.small("zlib", channels=2)
    there = peers.Receiving(work / "snap", channels=2)
    command = ["relay", "--listen", f"unix:{work}/here", "--connect", there.uri, "--migrations", "1"]
    command += ["--json"] if as_json else []
    with subprocess.Popen([sys.executable, "-m", "multifd", *command], stdout=subprocess.PIPE, text=True) as relay:
        assert peers.eventually((work / "here").exists)
        peers.play(f"unix:{work}/here", [stream.main, *stream.channels], 65536, dies=True)
        there.join()
        said, _ = relay.communicate(timeout=peers.TIMEOUT)
    assert relay.returncode == 0
    if as_json:
        assert json.loads(said)["confirmed"] is False
    else:
        assert said.endswith("; passed on, not confirmed: return-path is off on the source\n")


class Leaving:
    """A destination that takes the main channel and leaves what the others hold, then goes."""

    def __init__(self, where: Path) -> None:
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(where))
        self._server.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        main, _ = self._server.accept()
        channel, _ = self._server.accept()
        with main, channel, suppress(ConnectionError):
            while main.recv(1 << 16):
                pass
        self._server.close()

    def join(self) -> None:
        self._thread.join(peers.TIMEOUT)


def test_a_destination_that_left_bytes_unread_is_no_success(work: Path) -> None:
    """Nobody asked for its word, and it did not take what a channel held."""
    stream = streams.small()
    there = Leaving(work / "there")
    with closing(Relaying(f"unix:{work}/there")) as relaying:
        peers.play(relaying.uri, [stream.main, *stream.channels], 65536, dies=True)
        assert "the destination closed the connection before it had taken all that it was sent" in relaying.error()
    there.join()


@pytest.mark.parametrize("lacking", ["descriptors", "threads"])
def test_what_the_machine_is_short_of_ends_one_migration(
    work: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    content = images.write_memory(work)
    stream = streams.small(channels=1)
    real_start = threading.Thread.start

    def pipe() -> tuple[int, int]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def start(thread: threading.Thread) -> None:
        """The main channel's own starts, what it starts for the destination's answers does not."""
        if threading.current_thread().name == "main channel":
            raise RuntimeError("can't start new thread")
        real_start(thread)

    with closing(Relaying(f"unix:{work}/there", migrations=2)) as relaying:
        with monkeypatch.context() as patch, socket.socket(socket.AF_UNIX) as there, peers.dial(relaying.uri) as main:
            there.bind(f"{work}/there")
            there.listen()
            if lacking == "descriptors":
                patch.setattr("os.pipe", pipe)
                main.sendall(stream.main)
                with peers.dial(relaying.uri) as channel:
                    channel.sendall(stream.channels[0])
                    assert peers.eventually(lambda: relaying.outcomes != [])
            else:
                patch.setattr(threading.Thread, "start", start)
                main.sendall(stream.main)
                assert peers.eventually(lambda: relaying.outcomes != [])
        receiving = peers.Receiving(work / "snap", f"unix:{work}/there")
        multifd.send(open_snapshot(work / "image.raw"), relaying.uri)
        receiving.join()
        failed, passed = relaying.join()
    assert isinstance(failed, HostError)
    assert ("no descriptor is left" if lacking == "descriptors" else "no thread can be started") in str(failed)
    assert isinstance(passed, Relayed)
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content


def test_stop_ends_what_is_under_way(work: Path) -> None:
    stream = streams.small("zlib", channels=2)
    there = peers.Receiving(work / "snap", channels=2, timeout=3)
    relaying = Relaying(there.uri, to="zstd")
    sock = peers.dial(relaying.uri)
    sock.sendall(stream.main[:200])

    def passing() -> bool:
        migration = relaying.relay._current
        return migration is not None and migration._destination is not None and migration._destination.bytes_written > 0

    assert peers.eventually(passing)
    relaying.relay.stop()
    assert relaying.join() == []
    sock.close()
    with pytest.raises(PeerError):
        there.join()


def test_stop_while_the_destination_takes_no_connection() -> None:
    """Its queue is full, so that nobody answers: the relay does not wait for that."""
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        relaying = Relaying(f"tcp:127.0.0.1:{full.getsockname()[1]}", timeout=600)
        main = stack.enter_context(peers.dial(relaying.uri))
        main.sendall(streams.small().main[:200])
        assert peers.eventually(lambda: relaying.connections() > 0)
        time.sleep(0.3)  # it is connecting
        relaying.relay.stop()
        assert relaying.join() == []


def test_zero_pages_that_the_source_did_not_mark(work: Path) -> None:
    content = images.write_memory(work)
    there = peers.Receiving(work / "snap")
    with closing(Relaying(there.uri, source="zlib", to="zlib", find_zero_pages=True)) as relaying:
        sent = multifd.send(open_snapshot(work / "image.raw"), relaying.uri, "zlib", zero_pages="none")
        arrived = there.join()
        result = relaying.result()
    zeros = sum(not any(content[at : at + 4096]) for at in range(0, len(content), 4096))
    assert (sent.zero_pages, result.zero_pages, arrived.zero_pages) == (0, zeros, zeros)
    assert zeros > 100
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content


@pytest.mark.parametrize("piece", [1, 7, 65536])
def test_switchover_start_is_taken_out_and_nothing_else(work: Path, piece: int) -> None:
    stream = streams.small("zlib", return_path=True)
    assert stream.main.count(streams.SWITCHOVER_START) == 1
    length = len(stream.main) + len(stream.channels[0])
    there = peers.Keeping(1, everything=length - len(streams.SWITCHOVER_START))
    with closing(Relaying(there.uri, drop_switchover_start=True)) as relaying:
        peers.play(relaying.uri, [stream.main, *stream.channels], piece)
        assert relaying.result().confirmed
    there.join()
    assert there.main == stream.main.replace(streams.SWITCHOVER_START, b"")
    assert there.channels[0] == stream.channels[0]


@pytest.mark.parametrize("cut", range(1, 5))
def test_switchover_start_that_comes_in_two_parts(cut: int) -> None:
    stream = streams.small("zlib", return_path=True)
    at = stream.main.index(streams.SWITCHOVER_START)
    rest = len(stream.main) - at - len(streams.SWITCHOVER_START) + len(stream.channels[0])
    there = peers.Keeping(1, everything=at + rest)
    with (
        closing(Relaying(there.uri, drop_switchover_start=True)) as relaying,
        peers.dial(relaying.uri) as main,
        peers.dial(relaying.uri) as channel,
    ):
        main.sendall(stream.main[: at + cut])
        assert peers.eventually(lambda: there.missing == rest)
        main.sendall(stream.main[at + cut :])
        channel.sendall(stream.channels[0])
        assert relaying.result().confirmed
    there.join()
    assert there.main == stream.main.replace(streams.SWITCHOVER_START, b"")


def test_a_destination_that_goes_without_its_confirmation_is_no_success() -> None:
    stream = streams.small("zlib", return_path=True)
    there = peers.Keeping(1, b"", everything=len(stream.main) + len(stream.channels[0]))
    with closing(Relaying(there.uri)) as relaying:
        peers.play(relaying.uri, [stream.main, *stream.channels], 65536)
        assert "the destination closed the connection" in relaying.error()
    there.join()


def test_what_passes_unread_is_not_changed(own_capture: dict[str, Capture]) -> None:
    """Real bytes of QEMU 7.2, with what it leaves in its headers."""
    files = own_capture["q72-none-2ch"].files()
    there = peers.Keeping(2, b"", everything=sum(map(len, files)))
    with closing(Relaying(there.uri)) as relaying:
        peers.play(relaying.uri, files, 65521)
        assert not relaying.result().confirmed
    there.join()
    assert [there.main, *there.channels.values()] == [files[0], *(files[1 + number] for number in there.channels)]


def scrape(uri: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{uri.removeprefix('tcp:')}/metrics", timeout=peers.TIMEOUT) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_metrics_add_up_over_migrations(work: Path) -> None:
    images.write_memory(work)
    sent = arrived = 0
    with (
        closing(Relaying(f"unix:{work}/there", migrations=2, to="zstd")) as relaying,
        serving("tcp:127.0.0.1:0", relaying.relay.counters) as uri,
    ):
        assert scrape(uri) == {"multifd_relay_active": 0}
        for number in range(2):
            there = peers.Receiving(work / f"snap{number}", f"unix:{work}/there")
            result = multifd.send(open_snapshot(work / "image.raw"), relaying.uri, "zlib")
            sent += result.wire_bytes
            arrived += there.join().wire_bytes
        relaying.join()
        found = scrape(uri)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://{uri.removeprefix('tcp:')}/", timeout=peers.TIMEOUT)
        with pytest.raises(CallerError, match=f"cannot listen on {uri}: Address already in use"):
            serving(uri, dict).__enter__()
    assert found['multifd_relay_migrations_total{outcome="completed"}'] == 2

    def total(name: str, label: str = "") -> float:
        return sum(value for key, value in found.items() if key.startswith(f"multifd_relay_{name}{{{label}"))

    assert (total("bytes_total", 'direction="in"'), total("bytes_total", 'direction="out"')) == (sent, arrived)
    assert total("pages_total", 'kind="zero"') == 2 * result.zero_pages
    assert total("pages_total", 'kind="normal"') == 2 * result.normal_pages
    assert total("packets_total") == 2 * result.packets
    both = 'channel="0",from="zlib",to="zstd"}'
    assert all(found[f'multifd_relay_stage_seconds_total{{stage="{stage}",{both}'] > 0 for stage in STAGES)
    assert found[f"multifd_relay_ratio{{{both}"] > 1.5


def test_a_uuid_is_rewritten(work: Path) -> None:
    images.write_memory(work)
    there = peers.Receiving(work / "snap")
    with closing(Relaying(there.uri, uuid=bytes(range(16)))) as relaying:
        multifd.send(open_snapshot(work / "image.raw"), relaying.uri)
        there.join()
    assert '"uuid": "00010203-0405-0607-0809-0a0b0c0d0e0f"' in (work / "snap" / "snapshot.json").read_text()


def test_relay_tells_its_metrics() -> None:
    command = ["relay", "--listen", "tcp:127.0.0.1:0", "--connect", "tcp:127.0.0.1:1", "--metrics", "tcp:127.0.0.1:0"]
    with subprocess.Popen([sys.executable, "-m", "multifd", *command], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = process.stderr.readline().strip()
        uri = said.removeprefix("multifd: metrics on tcp:")
        with urllib.request.urlopen(f"http://{uri}/metrics", timeout=30) as answer:
            assert b"\nmultifd_relay_active 0\n" in answer.read()
        process.terminate()
        assert process.wait(30) == 0
