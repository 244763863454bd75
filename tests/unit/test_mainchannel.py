"""The main channel: parsed in any pieces, written as QEMU takes it."""

from __future__ import annotations

import struct

import pytest

import streams
from captures import CAPTURES, Capture
from multifd.errors import PeerError
from multifd.wire.block import Block
from multifd.wire.events import BlockList, Configuration, DeviceState, Event, Opaque, SyncPoint, ZeroPages
from multifd.wire.mainchannel import Parser, find_description
from multifd.wire.returnpath import ReturnPathParser, pong, shut
from multifd.wire.writer import Writer


def events_of(data: bytes, piece: int = 1 << 20) -> tuple[list[Event], Parser]:
    parser = Parser()
    found: list[Event] = []
    for at in range(0, len(data), piece):
        parser.feed(data[at : at + piece])
        found += parser.events()
    return found, parser


def summary(events: list[Event]) -> tuple[list[object], bytes]:
    """Events with device state joined and zero pages apart, so that pieces do not matter."""
    state = b"".join(event.data for event in events if isinstance(event, DeviceState))
    rest: list[object] = []
    for event in events:
        if isinstance(event, ZeroPages):
            rest += [(event.idstr, offset) for offset in event.offsets]
        elif not isinstance(event, DeviceState):
            rest.append(event)
    return rest, state


@pytest.mark.parametrize("capture", CAPTURES.values(), ids=CAPTURES.keys())
def test_captures_are_read_as_their_manifest_says(capture: Capture) -> None:
    main = capture.files()[0]
    events, parser = events_of(main)
    facts = capture.facts
    rest, state = summary(events)
    assert isinstance(rest[0], Configuration)
    assert rest[0].machine == facts["machine"]
    (blocks,) = (event.blocks for event in events if isinstance(event, BlockList))
    assert [(block.idstr, block.used_length) for block in blocks] == [
        (block["name"], block["length"]) for block in facts["blocks"]
    ]
    assert rest.count(SyncPoint()) == facts["sync_points"]
    assert sum(isinstance(event, tuple) for event in rest) == facts["main_channel_zero_pages"]
    assert f"per {parser.sync}" == facts["sync"]
    assert state == main[facts["device_state_offset"] :]
    assert parser.complete
    assert "devices" in (parser.description or {})
    parser.end()


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 8, 9, 13, 64, 1021])
def test_pieces_do_not_matter(piece: int) -> None:
    words = b"".join(streams.zero_word(n * 4096, "pc.ram" if n in (3, 5) else None) for n in (3, 4, 5, 6, 7))
    data = (
        streams.FILE_HEADER
        + streams.configuration(page_bits=12, uuid=streams.UUID)
        + streams.RETURN_PATH
        + streams.ram_start([("pc.ram", 1 << 20), ("vga", 1 << 16)])
        + streams.section(2, words + streams.page_word(0, b"\x7e" * 4096, "vga"), flush=False)
        + streams.section(2, streams.FLUSH * 3, flush=False)
        + streams.section(3)
        + streams.DEVICE_STATE
        + streams.description()
    )
    whole = summary(events_of(data)[0])
    events, parser = events_of(data, piece)
    assert summary(events) == whole
    assert parser.complete
    assert whole[0].count(SyncPoint()) == 5
    assert whole[1] == streams.DEVICE_STATE + streams.description()


def head(**options: int) -> bytes:
    return streams.FILE_HEADER + streams.configuration(**options)  # type: ignore[arg-type]


def ram(*blocks: tuple[str, int], **options: int) -> bytes:
    return head() + streams.ram_start(blocks or [("pc.ram", 1 << 20)], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x11\x22\x33\x44" + bytes(60), "magic 0x11223344 instead of 0x5145564d"),
        (streams.FILE_HEADER[:4] + struct.pack(">I", 2), "version 2, this side knows 3"),
        (streams.FILE_HEADER + b"\x01", "where the configuration should be"),
        (streams.FILE_HEADER + b"\x07" + struct.pack(">I", 1 << 30), "machine type of 1073741824 bytes"),
        (head(page_bits=40), r"page size of 2\^40"),
        (head(page_bits=9), r"page size of 2\^9"),
        (head() + b"\x05\x03foo" + struct.pack(">I", 1), "'foo' of the configuration is unknown"),
        (
            head() + b"\x05\x1aconfiguration/capabilities" + struct.pack(">II", 1, 1) + b"\x0fx-ignore-shared\x01",
            "x-ignore-shared on, which leave memory out",
        ),
        (head() + b"\x08\x00\x03\x00\x10" + bytes(16), "command 3 belongs to postcopy: turn postcopy-ram off"),
        (head() + b"\x08\x00\x08\x00\x00", "COLO"),
        (head() + b"\x08\x00\x02\x00\x03abc", "command 2 with 3 bytes of data, not 4"),
        (head() + b"\x00", "ended the stream before RAM was complete"),
        (head() + b"\x7f", "section type 0x7f is not expected"),
        (head() + b"\x01" + struct.pack(">I", 1) + b"\x05block" + struct.pack(">II", 0, 1), "the disks' content"),
        (head() + b"\x01" + struct.pack(">I", 1) + b"\x03ram" + struct.pack(">II", 0, 3), "ram section version 3"),
        (ram() + b"\x04" + struct.pack(">I", 9) + b"\x04vfio" + struct.pack(">II", 0, 1), r"section 9 \(vfio\) before"),
        (ram() + b"\x02" + struct.pack(">I", 2), "section 2 goes on, and never began"),
        (ram() + b"\x02" + struct.pack(">IQ", 1, 0x40), "RAM flags 0x40 are unknown"),
        (ram() + b"\x02" + struct.pack(">I", 1) + streams.zero_word(0), "there was none"),
        (
            ram() + b"\x02" + struct.pack(">I", 1) + streams.zero_word(0, "nope"),
            "'nope', which the source did not list",
        ),
        (ram() + b"\x02" + struct.pack(">I", 1) + streams.zero_word(1 << 20, "pc.ram"), "beyond the end of pc.ram"),
        (ram() + b"\x02" + struct.pack(">I", 1) + streams.zero_word(0, "pc.ram")[:-1] + b"\x01", "filled with 0x01"),
        (ram() + b"\x02" + struct.pack(">I", 1) + streams.EOS + b"\x7e" + struct.pack(">I", 7), "footer of section 1"),
        (ram() + streams.ram_start([("a", 4096)]), "RAM begins twice"),
        (ram(("a", 8192), total=1 << 12), "does not add up to its total"),
        (ram(("a", 4096), ("a", 4096)), "listed twice"),
        (ram(("", 4096)), "a RAM block's name has 0 characters, not 1 to 255"),
        (ram(("a", 0), ("b", 4096)), "0 bytes"),
        (
            head() + b"\x01" + struct.pack(">I", 1) + b"\x03ram" + struct.pack(">II", 0, 4) + streams.EOS,
            "lists no blocks",
        ),
    ],
)
def test_what_no_migration_sends_is_refused(data: bytes, says: str) -> None:
    for piece in (1, len(data)):
        with pytest.raises(PeerError, match=says):
            events_of(data, piece)


def complete(state: bytes = streams.DEVICE_STATE, end: bytes | None = None) -> bytes:
    return ram() + streams.section(3) + state + (streams.description() if end is None else end)


def test_device_state_cut_anywhere_is_not_complete() -> None:
    whole = complete()
    for cut in range(len(complete(b"", b"")), len(whole)):
        _, parser = events_of(whole[:cut])
        assert not parser.complete, cut
        with pytest.raises(PeerError, match=r"without its VM description.*--no-description"):
            parser.end()


def test_a_stream_without_description_is_taken_only_when_asked() -> None:
    _, parser = events_of(complete(end=b"\0"))
    with pytest.raises(PeerError, match="without its VM description"):
        parser.end()
    parser.end(description_required=False)
    _, parser = events_of(complete(end=b"\x7f"))
    with pytest.raises(PeerError, match="inside the device state"):
        parser.end(description_required=False)


def test_bytes_after_the_description_are_not_an_end() -> None:
    _, parser = events_of(complete() + b"x")
    assert not parser.complete


def test_the_description_is_found_by_its_length() -> None:
    for length in (0x0600, 0x0006, 0x060006, 0x1234):
        text = b'{"a":"' + b"x" * (length - 8) + b'"}'
        tail = b"\0\6\0\0\0\2{}" + b"state\0\6" + b"\0\6" + struct.pack(">I", len(text)) + text if length > 8 else None
        if tail is not None:
            found = find_description(tail)
            assert found is not None
            assert len(found["a"]) == length - 8
    assert find_description(b"\0\6\0\0\0\3{}") is None
    assert find_description(b"\0\6\0\0\0\2[]") is None
    assert find_description(b"}") is None
    nested = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert find_description(b"\0\6" + len(nested).to_bytes(4) + nested) is None


@pytest.mark.parametrize("sync", ["round", "section"])
@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_what_the_writer_makes_another_reader_takes(sync: str, page_size: int) -> None:
    writer = Writer(page_size, sync)
    blocks = [Block("pc.ram", 6 << 30), Block("vga", 16 * page_size)]
    far = 5 << 30
    data = writer.head() + writer.open_return_path() + writer.ram_start(blocks) + writer.ram_end()
    data += (
        writer.zero_pages("pc.ram", [0, far]) + writer.zero_pages("vga", [page_size]) + writer.zero_pages("vga", [0])
    )
    data += writer.ram_close() + writer.end()
    events, parser = events_of(data)
    assert parser.sync == sync
    assert parser.page_size == page_size
    assert parser.complete
    rest, _ = summary(events)
    assert [event for event in rest if isinstance(event, tuple)] == [
        ("pc.ram", 0), ("pc.ram", far), ("vga", page_size), ("vga", 0)
    ]  # fmt: skip
    assert BlockList(tuple(blocks)) in rest
    by_hand = b"\x03" + struct.pack(">I", 1) + streams.zero_word(0, "pc.ram") + streams.zero_word(far)
    assert by_hand in data


def test_the_return_path_is_read_in_any_pieces() -> None:
    for piece in (1, 3, 8, 100):
        parser = ReturnPathParser()
        data = pong(1) + shut(7)
        for at in range(0, len(data), piece):
            assert parser.shut is None
            parser.feed(data[at : at + piece])
        assert parser.shut == 7
    assert shut(0) == bytes.fromhex("0001000400000000")
    assert pong(1) == bytes.fromhex("0002000400000001")
    with pytest.raises(PeerError, match="SHUT with 0 bytes"):
        ReturnPathParser().feed(bytes.fromhex("00010000"))


@pytest.mark.parametrize(
    ("said", "runs"),
    [
        (pong(1), False),
        (pong(0x42), True),
        (bytes.fromhex("0004000c") + bytes(12), True),
        (bytes.fromhex("00030013") + bytes(12) + b"\x06pc.ram", True),
        (bytes.fromhex("00070000"), False),
    ],
)
def test_the_return_path_tells_that_the_guest_runs_there(said: bytes, runs: bool) -> None:
    parser = ReturnPathParser()
    for byte in pong(1) + said:
        assert not parser.runs
        parser.feed(bytes([byte]))
    assert parser.runs is runs


@pytest.mark.parametrize("number", [4, 5, 7])
def test_behind_the_switch_of_postcopy_nothing_ends_the_stream(number: int) -> None:
    """A page may hold what looks like a VM description."""
    parser = Parser(passes=True)
    parser.feed(head() + b"\x08\x00\x03\x00\x10" + struct.pack(">QQ", 4096, 4096))
    assert not any(isinstance(event, Opaque) for event in parser.events())
    parser.feed(b"\x08\x00\x06\x00\x03abc" + bytes([8, 0, number, 0, 0]) + b"\x00\x06\x00\x00\x00\x02{}")
    (opaque,) = [event for event in parser.events() if isinstance(event, Opaque)]
    assert opaque.postcopy
    assert f"command {number} belongs to postcopy: the guest is to go on at the destination" in opaque.why
    assert not parser.complete
