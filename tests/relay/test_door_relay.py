"""Who connects to the relay and is not its migration: before it and meanwhile, plain and over TLS; and a thousand.

A stranger must not raise anything here, nor end or hold a migration; of others there is no warning.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

import images
import multifd
import peers
import strangers
import streams
from multifd import open_snapshot
from multifd.jobs.relay.outcome import Relayed
from relaying import Relaying, closing
from strangers import FOREIGN, Serving, Source, receiving

pytestmark = [pytest.mark.timeout(90), pytest.mark.may_warn(": ignored$|more connections were ignored")]

CROWD = 80
MIB = 1 << 20
#: Strangers may cost a process this much memory, all together.
ALLOWANCE = 64 * MIB
THOUSAND = 1000
#: Seconds that a source waits behind a thousand; the kernel tries a connection again after 1, 3, 7, 15, 31 s.
PATIENCE = 75


def active(relaying: Relaying) -> float:
    return next(value for sample, value in relaying.relay.counters().items() if sample.name == "active")


def whole(relaying: Relaying, count: int = 1) -> None:
    """So many migrations, all confirmed, and nothing else was one."""
    outcomes = relaying.join()
    assert [isinstance(outcome, Relayed) and outcome.confirmed for outcome in outcomes] == [True] * count, outcomes


def serve(relaying: Relaying, snapshot: Path, wrap: strangers.Wrap = None) -> None:
    """One migration, with nobody else meanwhile; the relay connects to `there`, beside the snapshot."""
    with receiving(snapshot, f"unix:{snapshot.parent}/there") as job, Source(wrap) as source:
        source.begin(relaying.uri)
        source.finish()
        job.join()
    assert strangers.memory(snapshot) == source.ram


@pytest.mark.parametrize("kind", strangers.KINDS)
def test_before(work: Path, either: Path | None, wrap: strangers.Wrap, held: list[socket.socket], kind: str) -> None:
    with closing(Relaying(f"unix:{work}/there", listen_tls_creds=either)) as relaying:
        held += strangers.KINDS[kind](relaying.uri, wrap)
        if kind in strangers.DROPPED_AT_ONCE[either is not None]:
            assert all(map(strangers.is_gone, held))
        serve(relaying, work / "snap", wrap)
        whole(relaying)
    assert all(map(strangers.is_gone, held))


@pytest.mark.parametrize("kind", [*strangers.KINDS, *strangers.MEANWHILE])
def test_meanwhile(work: Path, either: Path | None, wrap: strangers.Wrap, held: list[socket.socket], kind: str) -> None:
    """And the next migration is served, though they are still there."""
    with closing(Relaying(f"unix:{work}/there", 2, listen_tls_creds=either, to="zlib")) as relaying:
        with receiving(work / "snap", f"unix:{work}/there") as job, Source(wrap) as source:
            source.begin(relaying.uri)
            source.moves()
            held += (strangers.KINDS | strangers.MEANWHILE)[kind](relaying.uri, wrap)
            # A main channel that is met only when this migration is over is the next one's.
            second = kind in strangers.MEANWHILE and "main channel" in kind
            if second or kind in strangers.DROPPED_AT_ONCE[either is not None]:
                assert all(map(strangers.is_gone, held))
            source.finish()
            job.join()
        assert strangers.memory(work / "snap") == source.ram
        serve(relaying, work / "next", wrap)
        whole(relaying, 2)
    assert all(map(strangers.is_gone, held))


def test_all_of_them_while_a_guest_moves(
    work: Path, either: Path | None, wrap: strangers.Wrap, held: list[socket.socket]
) -> None:
    """Our own source, over a network that takes a second or two for it."""
    content = images.write_memory(work)
    with (
        receiving(work / "snap") as job,
        closing(Relaying(job.uri, listen_tls_creds=either, to="zlib")) as relaying,
        ExitStack() as stack,
    ):
        link = peers.SlowLink(relaying.uri, 4 * MIB)
        stack.callback(link.close)
        moved: list[multifd.jobs.report.Result] = []
        image = open_snapshot(work / "image.raw")
        moving = threading.Thread(target=lambda: moved.append(multifd.send(image, link.uri, tls_creds=either)))
        moving.start()
        stack.callback(moving.join, peers.TIMEOUT)
        assert peers.eventually(lambda: active(relaying) == 1)
        for come in (strangers.KINDS | strangers.MEANWHILE).values():
            held += come(relaying.uri, wrap)
        assert active(relaying) == 1, "they came while it moved"
        job.join()
        whole(relaying)
    assert len(moved) == 1
    assert strangers.memory(work / "snap") == content


def test_all_of_them_at_a_unix_socket(work: Path, held: list[socket.socket]) -> None:
    with closing(Relaying(f"unix:{work}/there", 2, listen=f"unix:{work}/here")) as relaying:
        for come in strangers.KINDS.values():
            held += come(relaying.uri, None)
        serve(relaying, work / "snap")
        for come in strangers.KINDS.values():
            held += come(relaying.uri, None)
        serve(relaying, work / "next")
        whole(relaying, 2)


# --- places, and how long one keeps its own ---


def test_a_crowd_that_says_nothing(work: Path, held: list[socket.socket]) -> None:
    """Before a migration, and more of them in the middle of it."""
    with closing(Relaying(f"unix:{work}/there", 2)) as relaying:
        held += strangers.silent(relaying.uri, CROWD)
        with receiving(work / "snap", f"unix:{work}/there") as job, Source() as source:
            source.begin(relaying.uri)
            source.moves()
            held += strangers.silent(relaying.uri, CROWD)
            source.finish()
            job.join()
        serve(relaying, work / "next")
        whole(relaying, 2)
    assert strangers.memory(work / "snap") == source.ram


@pytest.mark.parametrize(("either", "first"), [("tls", "the main channel"), (None, "the crowd")], indirect=["either"])
def test_a_main_channel_that_waits_for_its_others(
    work: Path, either: Path | None, wrap: strangers.Wrap, held: list[socket.socket], first: str
) -> None:
    """QEMU's says nothing until they have connected; the crowd comes from elsewhere, and wants its place."""
    with (
        receiving(work / "snap") as job,
        closing(Relaying(job.uri, listen_tls_creds=either)) as relaying,
        Source(wrap) as source,
    ):
        if first == "the main channel":
            source.connect(relaying.uri, 0)
            held += strangers.silent(relaying.uri, CROWD, "127.0.0.9")
        else:
            held += strangers.silent(relaying.uri, 40, "127.0.0.9")
            source.connect(relaying.uri, 0)
            held += strangers.silent(relaying.uri, CROWD - 40, "127.0.0.9")
        time.sleep(2.5)  # a place is wanted, and all are old
        source.begin(relaying.uri, 1, 2, 0)
        source.finish()
        job.join()
        whole(relaying)
    assert strangers.memory(work / "snap") == source.ram


def test_who_trickles(work: Path) -> None:
    """What comes byte by byte is right, but not there in time: all go at a time that was set when they came."""
    heads = {"a channel": streams.init(0, FOREIGN), "a main channel": Source().head, "TLS": strangers.client_hello()}
    with closing(Relaying(f"unix:{work}/there", timeout=2)) as relaying:
        gone = strangers.trickle(relaying.uri, heads, None)
        serve(relaying, work / "snap")
        whole(relaying)
    assert gone == heads.keys()


# --- which is the migration ---


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (0, 2, 1)])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_channel_of_another_vm_comes_first(
    work: Path, held: list[socket.socket], number: int, order: tuple[int, ...]
) -> None:
    """Its VM has this one channel and no main channel."""
    with (
        receiving(work / "snap") as job,
        closing(Relaying(job.uri, to="zlib")) as relaying,
        Source(tells=True) as source,
    ):
        held += strangers.channel(number)(relaying.uri, None)
        source.begin(relaying.uri, *order)
        source.finish()
        job.join()
        whole(relaying)
    assert strangers.memory(work / "snap") == source.ram


def test_a_channel_of_another_vm_and_a_source_that_says_nothing_of_its_own(
    work: Path, held: list[socket.socket]
) -> None:
    with receiving(work / "snap") as job, closing(Relaying(job.uri)) as relaying, Source() as source:
        held += strangers.channel(0)(relaying.uri, None)
        source.begin(relaying.uri)
        source.finish()
        job.join()
        whole(relaying)
    assert strangers.memory(work / "snap") == source.ram


def test_what_another_vm_sends_whole_is_a_migration_and_the_next_is_served(work: Path) -> None:
    """Its main channel has a block list, and breaks off: that one fails, as it does for everybody."""
    foreign = strangers.foreign_stream()
    with closing(Relaying(f"unix:{work}/there", 2)) as relaying:
        cut = streams.Stream(foreign.main, [data[:10000] for data in foreign.channels])
        with (
            receiving(work / "other", f"unix:{work}/there"),
            strangers.closing(strangers.come_whole(relaying.uri, cut)),
        ):
            assert peers.eventually(lambda: active(relaying) == 1)
        assert peers.eventually(lambda: active(relaying) == 0)
        serve(relaying, work / "snap")
        first, second = relaying.join()
    assert not isinstance(first, Relayed)
    assert isinstance(second, Relayed)


# --- what is told of them ---


def test_a_port_scan_is_no_migration(
    work: Path, either: Path | None, wrap: strangers.Wrap, held: list[socket.socket]
) -> None:
    """Neither for the metrics, nor for observers, nor for the destination."""
    seen = work / "stats"
    there = socket.create_server(("127.0.0.1", 0))
    there.settimeout(0.3)
    target = f"tcp:127.0.0.1:{there.getsockname()[1]}"
    with (
        there,
        closing(Relaying(target, listen_tls_creds=either, observe=[f"stats={seen}"])) as relaying,
    ):
        for come in strangers.KINDS.values():
            held += come(relaying.uri, wrap)
            assert active(relaying) == 0
        with pytest.raises(TimeoutError):
            there.accept()
        assert active(relaying) == 0
    assert relaying.outcomes == []
    assert seen.read_text() == ""


def test_a_migration_begins_with_its_block_list(work: Path, held: list[socket.socket]) -> None:
    seen = work / "stats"
    with (
        receiving(work / "snap") as job,
        closing(Relaying(job.uri, observe=[f"stats={seen}"])) as relaying,
        Source() as source,
    ):
        for come in strangers.KINDS.values():
            held += come(relaying.uri, None)
        source.connect(relaying.uri, 0)
        source.say(0, source.head)
        source.begin(relaying.uri, 1, 2)
        time.sleep(0.3)
        assert active(relaying) == 0
        source.say(0, source.blocks)
        source.moves()
        assert active(relaying) == 1
        source.finish()
        job.join()
        assert peers.eventually(lambda: active(relaying) == 0)
        whole(relaying)
    (line,) = seen.read_text().splitlines()
    assert '"complete": true' in line


@contextmanager
def serving(job: str, snapshot: Path) -> Iterator[Serving]:
    """Either command for one migration, which comes into the snapshot."""
    with ExitStack() as stack:
        options = ["tcp:127.0.0.1:0", "-o", snapshot]
        if job == "relay":
            there = stack.enter_context(receiving(snapshot, f"unix:{snapshot.parent}/there"))
            options = ["--listen", "tcp:127.0.0.1:0", "--connect", there.uri, "--migrations", 1]
        yield stack.enter_context(Serving(job, *options))


@pytest.mark.parametrize("job", ["receive", "relay"])
def test_each_is_told_once(work: Path, held: list[socket.socket], job: str) -> None:
    """With its address; and however many come after it, the log does not grow with them."""
    with serving(job, work / "snap") as command:
        (first,) = strangers.KINDS["speaks HTTP"](command.uri, None)
        held.append(first)
        address = "{}:{}".format(*first.getsockname())
        assert strangers.is_gone(first)
        for _ in range(10):
            for kind in ("speaks HTTP", "sends a foreign magic", "sends one byte and closes", "sends QEVM and closes"):
                held += strangers.KINDS[kind](command.uri, None)
        with Source() as source:
            source.begin(command.uri)
            source.finish()
        assert command.wait() == 0, command.said
    assert strangers.memory(work / "snap") == source.ram
    assert sum(address in line for line in command.said) == 1, command.said
    told = [found for line in command.said for found in re.findall(r"127\.0\.0\.1:\d+", line)]
    assert len(told) == len(set(told)), command.said
    assert "Traceback" not in "\n".join(command.said)


# --- what they cost ---


@pytest.mark.timeout(240)
def test_a_thousand_that_say_nothing(work: Path) -> None:
    """With 256 descriptors; 64 of them go every 2 s, so that takes half a minute."""
    with strangers.many_descriptors(2000), ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(thousand_at_receive, work), pool.submit(thousand_at_relay, work)]:
            future.result(200)


def thousand_at_receive(work: Path) -> None:
    usual = 0
    for count in (0, THOUSAND):
        output = work / f"taken-{count}"
        with Serving("receive", "tcp:127.0.0.1:0", "-o", output, descriptors=256) as command:
            with strangers.closing(strangers.silent(command.uri, count)), Source(patience=PATIENCE) as source:
                source.begin(command.uri)
                source.moves()
                peak = command.peak()
                source.finish()
                assert command.wait() == 0, command.said[-3:]
            assert strangers.memory(output) == source.ram
        if not count:
            usual = peak
        else:
            assert peak < usual + ALLOWANCE
            counted_in_few_lines(command.said)


def thousand_at_relay(work: Path) -> None:
    """They come in the middle of a migration, are there before the next, and have gone before the last."""
    there = f"unix:{work}/there"
    options = ["--listen", "tcp:127.0.0.1:0", "--connect", there, "--migrations", 4]
    held: list[socket.socket] = []
    with Serving("relay", *options, descriptors=256) as command, strangers.closing(held):
        usual = 0
        for number in range(4):
            output = work / f"relayed-{number}"
            with receiving(output, there, first_timeout=PATIENCE) as job, Source(patience=PATIENCE) as source:
                source.begin(command.uri)
                source.moves()
                if number == 0:
                    usual = command.peak()
                elif number == 1:
                    held += strangers.silent(command.uri, THOUSAND)
                    time.sleep(1)
                elif number == 3:
                    assert command.peak() < usual + ALLOWANCE
                source.finish()
                job.join()
            assert strangers.memory(output) == source.ram
        assert command.wait() == 0, command.said[-3:]
    counted_in_few_lines(command.said)


def counted_in_few_lines(said: list[str]) -> None:
    assert len(said) < 100, said[-3:]
    numbers = [int(found) for line in said for found in re.findall(r"(?<![\d.:])\d+(?![\d.:])", line)]
    assert any(10 <= number <= THOUSAND for number in numbers), said


@pytest.mark.parametrize("job", ["receive", "relay"])
def test_what_they_send_is_not_kept(work: Path, held: list[socket.socket], job: str) -> None:
    """Each sends what it can: behind its init packet, in front of a block list, in a header without an end."""
    pours = {
        "channel": (streams.init(0, strangers.FOREIGN), bytes(4096)),
        "main": (Source().head, strangers.PING),
        "name": (streams.FILE_HEADER + b"\x07\xff\xff\xff\xf0", b"name"),
        "HTTP": (b"GET / HTTP/1.1\r\n", b"X-Header: 1\r\n"),
    }
    with serving(job, work / "snap") as command:
        before = command.peak()
        for _ in range(12):
            for head, again in pours.values():
                sock = peers.dial(command.uri)
                held.append(sock)
                strangers.pour(sock, head, again, 8 * MIB, 0.05)
        with Source() as source:
            source.begin(command.uri)
            source.moves()
            after = command.peak()
            source.finish()
        assert command.wait() == 0, command.said[-3:]
    assert after < before + ALLOWANCE
    assert strangers.memory(work / "snap") == source.ram


@pytest.mark.parametrize("job", ["receive", "relay"])
def test_who_waits_is_waited_for_asleep(work: Path, held: list[socket.socket], job: str) -> None:
    """Whatever they have said, and have left to be read."""
    with serving(job, work / "snap") as command:
        for come in strangers.KINDS.values():
            held += come(command.uri, None)
        for head in (streams.init(0, strangers.FOREIGN), Source().head, b"Q"):
            sock = peers.dial(command.uri)
            held.append(sock)
            strangers.pour(sock, head, bytes(4096), MIB, 0.05)
            with suppress(OSError):  # it may have been turned away
                sock.shutdown(socket.SHUT_WR)
        time.sleep(0.3)
        before = command.busy()
        time.sleep(1)
        assert command.busy() - before < 0.5
        with Source() as source:
            source.begin(command.uri)
            source.finish()
        assert command.wait() == 0, command.said[-3:]
    assert strangers.memory(work / "snap") == source.ram
