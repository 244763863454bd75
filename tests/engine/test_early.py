"""Sections other than RAM's that come before RAM is complete: received, sent again in their place, relayed."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import multifd
import peers
import streams
from captures import SHARED_CAPTURES
from multifd.errors import PeerError
from multifd.wire.events import EarlyState, Place
from multifd.wire.mainchannel import Parser
from relaying import Relaying, closing

CASES = SHARED_CAPTURES.parent / "cases" / "streams"
SIZE = 65536


def early(kind: int, number: int, body: bytes, name: str = "", version: int = 1) -> bytes:
    """A section, whole."""
    head = bytes([len(name)]) + name.encode() + struct.pack(">II", 0, version) if name else b""
    return bytes([kind]) + struct.pack(">I", number) + head + body + b"\x7e" + struct.pack(">I", number)


def htab(number: int = 0x232) -> bytes:
    piece = bytes(4) + struct.pack(">IHH", 7, 2, 1) + bytes(range(32)) + bytes(8)
    return early(1, number, struct.pack(">I", 24), "spapr/htab") + early(2, number, piece)


def no_htab(number: int) -> bytes:
    return early(1, number, b"\xff" * 4, "spapr/htab") + early(2, number, b"\xff" * 4)


def virtio_mem(number: int) -> bytes:
    body = struct.pack(">QQQIQ", 4 << 30, 65 * 2 << 20, 2 << 20, 0, 2 << 20) + bytes(16)
    return early(4, number, body, "0:01.0/virtio-mem-device-early")


def attributes(number: int) -> bytes:
    piece = struct.pack(">QQ", 0x7000 | 2, 5) + b"abcde" + struct.pack(">QQ", 8, 1)
    return early(1, number, struct.pack(">Q", 1), "s390-storage_attributes") + early(2, number, piece)


def bitmaps(number: int) -> bytes:
    begin = b"\x1c\x04disk\x04bit0" + struct.pack(">IB", 65536, 1) + b"\x01"
    bits = b"\x40" + struct.pack(">QIQ", 0, 2048, 3) + b"xyz" + b"\x42" + struct.pack(">QI", 2048, 2048)
    return early(1, number, begin, "dirty-bitmap") + early(2, number, bits + b"\x20\x01")


kinds = pytest.mark.parametrize("kind", [htab, no_htab, virtio_mem, attributes, bitmaps])


def with_early(before: bytes, inside: bytes, *, return_path: bool = False) -> streams.Stream:
    """`small`, with sections before RAM's first one and behind it."""
    stream = streams.small(return_path=return_path, channels=2)
    first = streams.ram_start([("pc.ram", 4 * SIZE)])
    assert stream.main.count(first) == 1
    return replace(stream, main=stream.main.replace(first, before + first + inside))


@pytest.mark.parametrize("piece", [1, 5, 1 << 20])
@kinds
def test_each_kind_is_read_whole(kind: Callable[[int], bytes], piece: int) -> None:
    data = with_early(kind(8), kind(9)).main
    parser = Parser()
    found = dict.fromkeys(Place, b"")
    for at in range(0, len(data), piece):
        parser.feed(data[at : at + piece])
        for event in parser.events():
            if isinstance(event, EarlyState):
                found[event.place] += event.data
    parser.end()
    assert found == {Place.BEFORE_RAM: kind(8), Place.IN_RAM: kind(9)}


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (early(4, 9, b"", "0000:00:02.0/vfio"), r"0000:00:02\.0/vfio\) before .* \(VFIO\): detach it before"),
        (early(1, 9, b"", "block"), r"the disks' content \(migrate -b\)"),
        (early(1, 9, b"", "some-day"), r"some-day\) before .* which this side does not know"),
        (htab() + early(1, 0x232, b"\xff" * 4, "spapr/htab"), "has the number of another one"),
        (early(1, 1, b"\xff" * 4, "spapr/htab"), "has the number of another one"),
        (virtio_mem(37) + b"\x02" + struct.pack(">I", 37), "section 37 goes on, and never began"),
        (no_htab(9) + early(3, 9, b"\xff" * 4) + early(2, 9, b"\xff" * 4), "section 9 goes on, and never began"),
        (b"".join(early(1, 100 + n, b"\1", "dirty-bitmap") for n in range(65)), "more than 64 sections"),
        (htab()[:-1] + b"\x00", "a footer of section 562 should be here"),
        (early(4, 9, struct.pack(">QQQIQ", 0, 1 << 60, 0, 0, 0), "virtio-mem-device-early"), "in blocks of 0"),
        (
            early(1, 9, struct.pack(">QQ", 2, 1 << 62), "s390-storage_attributes"),
            "a piece of 4611686018427387904 bytes",
        ),
        (early(1, 9, struct.pack(">Q", 0x20), "s390-storage_attributes"), "flags 0x20 of storage attributes"),
        (early(1, 9, b"\x80", "dirty-bitmap"), "flags 0x80 of a dirty bitmap"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_by_name(work: Path, section: bytes, says: str) -> None:
    recording = with_early(b"", section).write(work / "recording")
    with pytest.raises(PeerError, match=says):
        multifd.receive(f"recording:{recording}", work / "snap")
    assert not (work / "snap").exists()


@pytest.mark.parametrize(
    ("before", "says"),
    [
        (no_htab(1), r"section 1 \(ram\) has the number of another one"),
        (attributes(9) + early(2, 9, struct.pack(">QQ", 2, 1 << 19) + bytes(1 << 19) + b"\0" * 7 + b"\1"), "more than"),
    ],
)
def test_what_comes_before_ram_is_bounded(work: Path, before: bytes, says: str) -> None:
    recording = with_early(before, b"").write(work / "recording")
    with pytest.raises(PeerError, match=says):
        multifd.receive(f"recording:{recording}", work / "snap")
    assert not (work / "snap").exists()


def files(snapshot: Path) -> dict[str, bytes]:
    """All but what the transfer counted."""
    return {path.name: path.read_bytes() for path in snapshot.iterdir() if path.name != "snapshot.json"}


def sent_again(snapshot: Path, again: Path, channels: int = 2) -> None:
    there = peers.Receiving(again, channels=channels, missing_allowed=True)
    multifd.send(snapshot, there.uri, "none", channels=channels, timeout=peers.TIMEOUT)
    there.join()
    assert files(again) == files(snapshot)
    assert multifd.inspect(again)["digest"] == multifd.inspect(snapshot)["digest"]


@pytest.mark.parametrize("case", ["virtio-mem-q100", "pseries-q100"])
def test_what_real_machines_sent_is_kept_and_sent_again(work: Path, case: str) -> None:
    if not CASES.is_dir():
        pytest.skip(f"{CASES} is not here")
    multifd.receive(f"recording:{CASES / case}", work / "snap", missing_allowed=True)
    shown = multifd.inspect(work / "snap")
    assert shown["early_state_bytes"] == multifd.inspect(CASES / case)["early_state_bytes"] > 0
    assert shown["ended"] == multifd.inspect(CASES / case)["ended"] == "complete"
    assert json.loads((work / "snap" / "snapshot.json").read_text())["format"] == 2
    sent_again(work / "snap", work / "again")


def test_both_places_are_kept_and_the_number_of_ram(work: Path) -> None:
    """A recorded section may have the number that our own RAM sections have otherwise."""
    one = early(1, 1, b"\xff" * 4, "spapr/htab")
    stream = with_early(one, bitmaps(5))
    main = stream.main.replace(
        b"\x01" + struct.pack(">I", 1) + b"\x03ram", b"\x01" + struct.pack(">I", 77) + b"\x03ram"
    )
    for kind in (2, 3):
        main = main.replace(bytes([kind]) + struct.pack(">I", 1), bytes([kind]) + struct.pack(">I", 77))
    main = main.replace(streams.EOS + streams.FOOTER, streams.EOS + b"\x7e" + struct.pack(">I", 77))
    multifd.receive(f"recording:{replace(stream, main=main).write(work / 'recording')}", work / "snap")
    assert files(work / "snap")["early_before_ram.bin"] == one
    assert files(work / "snap")["early_in_ram.bin"] == bitmaps(5)
    sent_again(work / "snap", work / "again")


def test_a_change_of_early_state_is_noticed_before_anybody_is_called(work: Path) -> None:
    multifd.receive(f"recording:{with_early(b'', htab()).write(work / 'recording')}", work / "snap")
    path = work / "snap" / "early_in_ram.bin"
    path.write_bytes(path.read_bytes()[:-7] + b"X" + path.read_bytes()[-6:])
    with pytest.raises(multifd.errors.HostError, match=r"early_in_ram\.bin, offset 0x0"):
        multifd.send(work / "snap", f"unix:{work}/nobody")


@kinds
def test_a_relay_reads_on_behind_them(work: Path, kind: Callable[[int], bytes]) -> None:
    stream = with_early(kind(8), kind(9), return_path=True)
    there = peers.Receiving(work / "snap", channels=2)
    with closing(Relaying(there.uri, to="zlib")) as relaying:
        peers.play(relaying.uri, [stream.main, *stream.channels], 65536)
        outcome = relaying.result()
    there.join()
    assert outcome.confirmed
    assert outcome.rounds_checked


UNREAD = {
    "vfio": early(1, 9, b"who knows", "0000:00:02.0/vfio"),
    "block": early(1, 9, b"", "block") + early(2, 9, b"sectors"),
    "another command of postcopy": b"\x08\x00\x0a\x00\x00",
    "postcopy, huge pages": b"\x08\x00\x03\x00\x10" + struct.pack(">QQ", 0x201000, 4096),
}


@pytest.mark.may_warn("passes unread, and rounds are not checked")
@pytest.mark.parametrize("return_path", [False, True])
@pytest.mark.parametrize("what", UNREAD)
def test_what_a_relay_cannot_read_passes_untouched_and_is_said(
    what: str, return_path: bool, caplog: pytest.LogCaptureFixture
) -> None:
    stream = with_early(b"", UNREAD[what], return_path=return_path)
    everything = len(stream.main) + sum(map(len, stream.channels))
    there = peers.Keeping(2, streams.SHUT_DONE if return_path else b"", everything=everything)
    with closing(Relaying(there.uri)) as relaying:
        peers.play(relaying.uri, [stream.main, *stream.channels], 65536, dies=not return_path)
        outcome = relaying.result()
    there.join()
    assert [there.main, *(there.channels[number] for number in range(2))] == [stream.main, *stream.channels]
    assert outcome.confirmed is return_path
    assert not outcome.rounds_checked
    assert caplog.text.count("passes unread") == 1


@pytest.mark.may_warn("passes unread, and rounds are not checked")
@pytest.mark.parametrize("return_path", [False, True])
def test_a_source_that_ends_what_is_not_read_is_no_success(return_path: bool) -> None:
    stream = with_early(b"", UNREAD["vfio"], return_path=return_path)
    main = stream.main[:-1]  # its description is cut
    there = peers.Keeping(2, b"", everything=len(main) + sum(map(len, stream.channels)))
    with closing(Relaying(there.uri)) as relaying:
        peers.play(relaying.uri, [main, *stream.channels], 65536, dies=True)
        assert "the source ended early: cancelled, or gone" in relaying.error()
    there.join()


@pytest.mark.may_warn("passes unread, and rounds are not checked")
def test_other_capabilities_pass(work: Path) -> None:
    """x-ignore-shared has another block list, which only the two QEMUs know."""
    stream = with_early(b"", b"", return_path=True)
    raw = streams.configuration(page_bits=16)
    named = b"\x05\x1aconfiguration/capabilities" + struct.pack(">II", 1, 1) + b"\x0fx-ignore-shared"
    stream = replace(stream, main=stream.main.replace(raw, raw + named))
    there = peers.Keeping(2, everything=len(stream.main) + sum(map(len, stream.channels)))
    with closing(Relaying(there.uri)) as relaying:
        peers.play(relaying.uri, [stream.main, *stream.channels], 65536)
        assert relaying.result().confirmed
    there.join()
    assert there.main == stream.main
    with pytest.raises(PeerError, match="x-ignore-shared on, which leave memory out"):
        multifd.receive(f"recording:{stream.write(work / 'recording')}", work / "snap")


@pytest.mark.parametrize(
    ("machine", "size"), [("clipper", 8192), ("versatilepb", 1024), ("sun4u", 8192), ("q35", 4096)]
)
def test_the_page_size_is_known_by_the_machine_type(work: Path, machine: str, size: int) -> None:
    stream = streams.small(page_size=size, channels=2)
    main = stream.main.replace(streams.configuration(page_bits=size.bit_length() - 1), streams.configuration(machine))
    stream = replace(stream, main=main)
    multifd.receive(f"recording:{stream.write(work / 'recording')}", work / "snap")
    assert multifd.inspect(work / "snap")["page_size"] == size
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == stream.ram["pc.ram"]


def test_a_page_size_that_nothing_tells_is_asked_for(work: Path) -> None:
    stream = streams.small(page_size=8192, channels=1)
    main = stream.main.replace(streams.configuration(page_bits=13), streams.configuration("some-board"))
    recording = replace(stream, main=main).write(work / "recording")
    with pytest.raises(PeerError, match=r"the guest's page size is not 4096 \(--page-size\)"):
        multifd.receive(f"recording:{recording}", work / "snap")
    multifd.receive(f"recording:{recording}", work / "snap", page_size=8192)
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == stream.ram["pc.ram"]


def unread(*, channels: Sequence[bytes | None], main: bytes | None = None, ends: Collection[int] = ()) -> str:
    """What a relay says of a source without return path whose main channel it cannot read.

    A channel that is None never comes; those in `ends` the source ends.  The destination takes all that comes, then
    goes.
    """
    stream = with_early(b"", UNREAD["vfio"])
    sent = [main or stream.main, *(data for data in channels if data is not None)]
    there = peers.Keeping(len(sent) - 1, b"", everything=sum(map(len, sent)))
    with closing(Relaying(there.uri, timeout=3)) as relaying:
        socks = [peers.dial(relaying.uri) for _ in sent]
        for number, (sock, data) in enumerate(zip(socks, sent, strict=True)):
            sock.sendall(data)
            if number in ends:
                sock.shutdown(socket.SHUT_WR)
        said = relaying.error()
        for sock in socks:
            sock.close()
    there.join()
    return said


@pytest.mark.may_warn("passes unread, and rounds are not checked")
@pytest.mark.parametrize("what", ["a channel that goes on", "half a packet", "no channel"])
def test_what_is_not_all_there_is_no_success_though_nobody_is_asked(what: str) -> None:
    """The destination alone can tell, and is not asked: it closes as one that is done."""
    whole, other = with_early(b"", UNREAD["vfio"]).channels
    if what == "a channel that goes on":
        said = unread(channels=[whole, other], ends=[0, 1])
    elif what == "half a packet":
        said = unread(channels=[whole[:100_000], other], ends=[0, 2])
    else:
        said = unread(channels=[None, None], ends=[0])
    assert "the destination closed the connection before it had taken all that it was sent" in said


@pytest.mark.may_warn("passes unread, and rounds are not checked")
def test_what_looks_like_an_end_in_the_middle_is_none() -> None:
    """State that nobody here can read may hold the bytes of a VM description."""
    stream = with_early(b"", early(1, 9, b"x" + streams.description(), "0000:00:02.0/vfio"))
    cut = stream.main[: stream.main.index(streams.description()) + len(streams.description())]
    there = peers.Keeping(2, b"", described=False)
    with closing(Relaying(there.uri, timeout=3)) as relaying:
        socks = [peers.dial(relaying.uri) for _ in range(3)]
        for sock, data in zip(socks, [cut, *stream.channels], strict=True):
            sock.sendall(data)
        time.sleep(0.3)  # that much has passed, and looks like an end
        socks[0].sendall(b"more")
        for sock in socks:
            sock.shutdown(socket.SHUT_WR)
        assert "the source ended early: cancelled, or gone" in relaying.error()
        for sock in socks:
            sock.close()
    there.join()


def test_a_destination_that_never_answers_is_given_up_once_the_source_has_gone() -> None:
    stream = streams.small(return_path=True, channels=1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        with closing(Relaying(f"tcp:{host}:{port}", timeout=1)) as relaying:
            socks = [peers.dial(relaying.uri) for _ in range(2)]
            for sock, data in zip(socks, [stream.main, *stream.channels], strict=True):
                sock.sendall(data)
            taken = [server.accept()[0] for _ in range(2)]
            for sock in socks:
                sock.shutdown(socket.SHUT_WR)
            assert "nothing moved for 1 s" in relaying.error()
            for sock in (*socks, *taken):
                sock.close()
