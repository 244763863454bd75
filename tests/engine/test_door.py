"""Who connects to `receive` and is not its migration: before it and meanwhile, plain and over TLS.

All of it with warnings as errors, as everywhere: a stranger must not raise anything here, nor end or hold a migration.
"""

from __future__ import annotations

import json
import select
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import multifd
import peers
import strangers
import streams
from multifd.errors import PeerError
from strangers import FOREIGN, Source, receiving

pytestmark = [pytest.mark.timeout(90), pytest.mark.may_warn(": ignored$|more connections were ignored")]

#: 64 are met at a time; a few more, and places are wanted.
CROWD = 80


@pytest.mark.parametrize("kind", strangers.KINDS)
def test_before(work: Path, either: Path | None, wrap: strangers.Wrap, held: list[socket.socket], kind: str) -> None:
    with receiving(work / "snap", tls_creds=either) as job, Source(wrap) as source:
        held += strangers.KINDS[kind](job.uri, wrap)
        if kind in strangers.DROPPED_AT_ONCE[either is not None]:
            assert all(map(strangers.is_gone, held))
        source.begin(job.uri)
        source.finish()
        job.join()
    assert strangers.memory(work / "snap") == source.ram
    assert all(map(strangers.is_gone, held))


@pytest.mark.parametrize("kind", [*strangers.KINDS, *strangers.MEANWHILE])
def test_meanwhile(work: Path, either: Path | None, wrap: strangers.Wrap, held: list[socket.socket], kind: str) -> None:
    """One channel is not there yet: it listens."""
    with receiving(work / "snap", tls_creds=either) as job, Source(wrap) as source:
        source.begin(job.uri, 0, 1)
        held += (strangers.KINDS | strangers.MEANWHILE)[kind](job.uri, wrap)
        if kind in strangers.DROPPED_AT_ONCE[either is not None]:
            assert all(map(strangers.is_gone, held))
        source.finish()
        job.join()
    assert strangers.memory(work / "snap") == source.ram
    assert all(map(strangers.is_gone, held))


def test_all_of_them_at_a_unix_socket(work: Path, held: list[socket.socket]) -> None:
    with receiving(work / "snap", f"unix:{work}/here") as job, Source() as source:
        for come in strangers.KINDS.values():
            held += come(job.uri, None)
        source.begin(job.uri, 0, 1)
        for come in (strangers.KINDS | strangers.MEANWHILE).values():
            held += come(job.uri, None)
        source.finish()
        job.join()
    assert strangers.memory(work / "snap") == source.ram


@pytest.mark.parametrize("where", ["tcp", "unix"])
def test_it_listens_until_all_have_come(work: Path, where: str) -> None:
    """The main channel and as many others as were said."""
    uri = "tcp:127.0.0.1:0" if where == "tcp" else f"unix:{work}/here"
    with receiving(work / "snap", uri) as job, Source() as source:
        source.begin(job.uri, 0, 1)
        with peers.dial(job.uri):
            pass
        source.begin(job.uri, 2)
        source.moves()

        def is_refused() -> bool:
            try:
                peers.dial(job.uri).close()
            except (ConnectionRefusedError, FileNotFoundError):
                return True
            return False

        assert peers.eventually(is_refused, strangers.SOON)
        source.finish()
        job.join()
    assert strangers.memory(work / "snap") == source.ram


# --- places, and how long one keeps its own ---


def test_a_crowd_that_says_nothing_in_tls(work: Path, keys: Path, held: list[socket.socket]) -> None:
    """Some have done their handshake, more have not."""
    wrap = strangers.tls(keys)
    with receiving(work / "snap", tls_creds=keys) as job, Source(wrap) as source:
        began = time.monotonic()
        held += [strangers.dial(job.uri, wrap) for _ in range(CROWD - 20)]  # all have a place: each is greeted
        held += strangers.silent(job.uri, CROWD)
        source.begin(job.uri)
        assert time.monotonic() - began > 1.9, "until somebody was 2 s old nobody more was greeted"
        source.finish()
        job.join()
    assert strangers.memory(work / "snap") == source.ram


def test_nobody_is_turned_away_who_is_young(work: Path, held: list[socket.socket]) -> None:
    """Where all places are taken the next ones wait, and those within keep theirs for 2 s."""
    with receiving(work / "snap") as job, Source() as source:
        began = time.monotonic()
        held += strangers.silent(job.uri, CROWD)
        poll = select.poll()
        for sock in held:
            poll.register(sock, select.POLLIN)
        assert poll.poll(1000 * strangers.SOON), "one has gone"
        assert time.monotonic() - began > 1.9
        source.begin(job.uri)
        source.finish()
        job.join()


@pytest.mark.parametrize(("either", "first"), [(None, "the main channel"), ("tls", "the crowd")], indirect=["either"])
def test_a_main_channel_that_waits_for_its_others(
    work: Path, either: Path | None, wrap: strangers.Wrap, held: list[socket.socket], first: str
) -> None:
    """QEMU's says nothing until they have connected; the crowd comes from elsewhere, and wants its place."""
    with receiving(work / "snap", tls_creds=either) as job, Source(wrap) as source:
        if first == "the main channel":
            source.connect(job.uri, 0)
            held += strangers.silent(job.uri, CROWD, "127.0.0.9")
        else:
            held += strangers.silent(job.uri, 40, "127.0.0.9")
            source.connect(job.uri, 0)
            held += strangers.silent(job.uri, CROWD - 40, "127.0.0.9")
        time.sleep(2.5)  # a place is wanted, and all are old
        source.begin(job.uri, 1, 2, 0)
        source.finish()
        job.join()
    assert strangers.memory(work / "snap") == source.ram


def test_who_trickles(work: Path, keys: Path) -> None:
    """What comes byte by byte is right, but not there in time: all go at a time that was set when they came."""
    heads = {"a channel": streams.init(0, FOREIGN), "a main channel": Source().head, "TLS": strangers.client_hello()}
    wrap = strangers.tls(keys)
    with receiving(work / "snap", tls_creds=keys, timeout=2) as job, Source(wrap) as source:
        gone = strangers.trickle(job.uri, heads, wrap)
        source.begin(job.uri)
        source.finish()
        job.join()
    assert gone == heads.keys()
    assert strangers.memory(work / "snap") == source.ram


# --- which is the migration ---


def named(known: bool) -> dict[str, Any]:
    return {"uuid": streams.UUID} if known else {}


@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize("known", [False, True], ids=["", "uuid"])
def test_a_channel_of_another_vm_comes_first(work: Path, held: list[socket.socket], known: bool, tells: bool) -> None:
    """Its VM has this one channel, ours has both."""
    with receiving(work / "snap", **named(known)) as job, Source(tells=tells) as source:
        held += strangers.channel(0)(job.uri, None)
        source.begin(job.uri)
        source.moves()
        source.finish()
        job.join()
    assert strangers.memory(work / "snap") == source.ram


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_in_whatever_order_they_come(work: Path, held: list[socket.socket], order: tuple[int, ...]) -> None:
    with receiving(work / "snap") as job, Source() as source:
        held += strangers.channel(1)(job.uri, None)
        source.begin(job.uri, *order)
        source.finish()
        job.join()
    assert strangers.memory(work / "snap") == source.ram


def test_all_channels_of_another_vm_come_first(work: Path, held: list[socket.socket]) -> None:
    """Both groups have all; the main channel says whose it is."""
    with receiving(work / "snap") as job, Source(tells=True) as source:
        for number in range(2):
            held += strangers.channel(number)(job.uri, None)
        source.begin(job.uri)
        source.finish()
        job.join()
    assert strangers.memory(work / "snap") == source.ram


@pytest.mark.parametrize("known", [False, True], ids=["", "uuid"])
def test_the_whole_main_channel_of_another_vm_comes_first(work: Path, held: list[socket.socket], known: bool) -> None:
    """It says whose it is, and none of its channels is here."""
    with receiving(work / "snap", **named(known)) as job, Source() as source:
        held += strangers.says(strangers.foreign_stream().main, stays=True)(job.uri, None)
        source.begin(job.uri)
        source.finish()
        job.join()
    assert strangers.memory(work / "snap") == source.ram


@pytest.mark.parametrize("tells", [False, True])
def test_the_whole_migration_of_another_vm_comes_first(work: Path, tells: bool) -> None:
    """Who says whose migration it takes refuses another's channels; a source that lost one closes all."""
    foreign = strangers.foreign_stream(tells=tells)
    with receiving(work / "snap", uuid=streams.UUID) as job, Source(tells=tells) as source:
        with strangers.closing(strangers.come_whole(job.uri, foreign)) as (_, first, _):
            assert strangers.is_gone(first)
        source.begin(job.uri)
        source.finish()
        job.join()
    assert strangers.memory(work / "snap") == source.ram


def test_the_command_takes_only_this_vms_migration(work: Path) -> None:
    foreign = strangers.foreign_stream()
    wanted = uuid.UUID(bytes=streams.UUID)
    with strangers.Serving("receive", "tcp:127.0.0.1:0", "-o", work / "snap", "--uuid", wanted) as command:
        with strangers.closing(strangers.come_whole(command.uri, foreign)) as (_, first, _):
            assert strangers.is_gone(first)
        with Source() as source:
            source.begin(command.uri)
            source.finish()
        assert command.wait() == 0, command.said
    assert strangers.memory(work / "snap") == source.ram


# --- what is told of them ---


def test_who_looks_on_sees_no_stranger(work: Path, held: list[socket.socket]) -> None:
    """Observers begin with the first block list, and see one migration."""
    seen = work / "stats"
    with receiving(work / "snap", observe=[f"stats={seen}"]) as job, Source() as source:
        for come in strangers.KINDS.values():
            held += come(job.uri, None)
        source.begin(job.uri)
        source.finish()
        job.join()
    (line,) = seen.read_text().splitlines()
    found = json.loads(line)
    assert found["complete"] is True
    assert found["main_bytes"]["in"] == len(streams.small(return_path=True).main) + len(strangers.PING)
    assert [row["channel"] for row in found["channels"] if row["normal_pages"]] == [0]


def test_where_only_strangers_come_there_was_no_migration(work: Path, held: list[socket.socket]) -> None:
    seen = work / "stats"
    job = peers.Receiving(work / "snap", observe=[f"stats={seen}"], timeout=1, first_timeout=1)
    for come in strangers.KINDS.values():
        with suppress(OSError):  # it may have given up meanwhile
            held += come(job.uri, None)
    with pytest.raises(PeerError):
        job.join()
    assert seen.read_text() == ""
    assert not (work / "snap").exists()


def test_the_job_ends_while_strangers_wait(work: Path, held: list[socket.socket]) -> None:
    """Nobody comes but them: the time to wait for a source is not theirs to stretch."""
    with pytest.raises(PeerError):
        multifd.receive(
            "tcp:127.0.0.1:0",
            work / "snap",
            timeout=1,
            first_timeout=1,
            on_listening=lambda uri: held.extend(strangers.silent(uri, CROWD)),
        )
    assert list(work.iterdir()) == []
