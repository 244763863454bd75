"""A relay and a guest that goes on at the destination while its memory follows (postcopy); streams made by hand."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

import peers
import streams
from relaying import Relaying, closing
from told import warns

ADVISE = b"\x08\x00\x03\x00\x10\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00"
DISCARD = b"\x08\x00\x06\x00\x05abcde"
PACKAGED = b"\x08\x00\x07\x00\x04\x00\x00\x00\x00"
PASSES = "passes unread, and rounds are not checked"


def stream(commands: bytes) -> streams.Stream:
    """A small one with these among its RAM sections."""
    small = streams.small(return_path=True, channels=2)
    first = streams.ram_start([("pc.ram", 4 * 65536)])
    assert small.main.count(first) == 1
    return replace(small, main=small.main.replace(first, ADVISE + first + commands))


def keeping(sent: streams.Stream) -> peers.Keeping:
    return peers.Keeping(2, everything=len(sent.main) + sum(map(len, sent.channels)))


@contextmanager
def unfinished(uri: str, sent: streams.Stream, left: int = 1) -> Iterator[Sequence[socket.socket]]:
    """A source that has sent all but the last bytes of its main channel."""
    with ExitStack() as stack:
        socks = [stack.enter_context(peers.dial(uri)) for _ in (sent.main, *sent.channels)]
        for sock, data in zip(socks, (sent.main[:-left], *sent.channels), strict=True):
            sock.sendall(data)
        yield socks


def test_what_comes_before_the_switch_is_read() -> None:
    """Postcopy is on, its pages to discard are told, and the guest stays all the same."""
    sent = stream(DISCARD)
    there = keeping(sent)
    with closing(Relaying(there.uri)) as relaying:
        peers.play(relaying.uri, [sent.main, *sent.channels], 65536)
        outcome = relaying.result()
    there.join()
    assert there.main == sent.main
    assert outcome.confirmed
    assert outcome.rounds_checked


@pytest.mark.parametrize("piece", [3, 65536])
def test_what_comes_behind_it_passes_untouched(piece: int) -> None:
    sent = stream(DISCARD + PACKAGED)
    there = keeping(sent)
    with warns(f"command 7 belongs to postcopy: .*{PASSES}"), closing(Relaying(there.uri)) as relaying:
        peers.play(relaying.uri, [sent.main, *sent.channels], piece)
        outcome = relaying.result()
    there.join()
    assert there.main == sent.main
    assert outcome.confirmed
    assert not outcome.rounds_checked


@pytest.mark.may_warn(PASSES)
def test_a_relay_that_is_stopped_goes_on_while_the_guest_is_in_two_places() -> None:
    sent = stream(PACKAGED)
    there = keeping(sent)
    with closing(Relaying(there.uri, migrations=2)) as relaying, unfinished(relaying.uri, sent) as (main, *_):
        assert peers.eventually(lambda: there.missing == 1)
        with warns("the guest's memory is in two places .*: the relay goes on until the migration has ended") as said:
            relaying.relay.stop()
            assert peers.eventually(lambda: bool(said))
        time.sleep(0.5)
        assert not relaying.outcomes
        main.sendall(sent.main[-1:])
        assert main.recv(100) == streams.SHUT_DONE
        main.close()
        assert relaying.result().confirmed
    there.join()


@pytest.mark.may_warn(PASSES)
def test_a_destination_that_does_not_begin_is_not_waited_for_longer_than_any() -> None:
    """It has the guest's state, and says nothing: the source can go on."""
    sent = stream(PACKAGED)
    pages = bytes(64 << 20)
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"tcp:127.0.0.1:{server.getsockname()[1]}"
        with closing(Relaying(uri, timeout=1)) as relaying, unfinished(relaying.uri, sent) as (main, *_):
            with pytest.raises(ConnectionError):
                main.sendall(pages)
            said = relaying.error()
    assert "nothing moved for 1 s" in said
    assert "the guest does not run there yet (postcopy): if the destination waits for one more connection, turn" in said
