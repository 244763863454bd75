"""Whether `receive` tells a source that it may switch over: message 7, where that is known to be right."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import peers
import streams
from commands import fails

ACK = b"\0\x07\0\0"


def answered(work: Path, stream: streams.Stream) -> bytes:
    there = peers.Receiving(work / "snap", channels=len(stream.channels))
    answer = peers.play(there.uri, [stream.main, *stream.channels], 1 << 20)
    there.join()
    return answer


@pytest.mark.parametrize(
    ("machine", "acked"), [(b"pc-q35-10.0", True), (b"pc-q35-11.1", False), (b"other-board", False)]
)
def test_by_the_machine_type(work: Path, machine: bytes, acked: bool) -> None:
    stream = streams.small(return_path=True, channels=2)
    stream.main = stream.main.replace(b"pc-q35-10.0", machine)
    answer = answered(work, stream)
    assert answer.count(ACK) == acked
    assert answer.replace(ACK, b"").startswith(b"\0\x02\0\x04")
    assert answer.endswith(streams.SHUT_DONE)


def test_not_to_a_source_as_7_2(work: Path) -> None:
    """Its SYNCs have room for a packet full; it would fail."""
    stream = streams.small(return_path=True, page_size=4096)
    (channel,) = stream.channels
    data = bytearray(channel)
    for at in (64, len(data) - streams.header_length(4096)):
        assert struct.unpack_from(">II", data, at + 8) == (1, 0)
        struct.pack_into(">I", data, at + 12, 128)
    stream.channels[0] = bytes(data)
    assert ACK not in answered(work, stream)


def test_not_where_nobody_listens(work: Path) -> None:
    stream = streams.small()
    there = peers.Receiving(work / "snap", channels=len(stream.channels))
    assert peers.play(there.uri, [stream.main, *stream.channels], 1 << 20, dies=True) == b""
    there.join()


def test_when_a_guest_is_stopped_is_usage(work: Path) -> None:
    receive = ("receive", f"unix:{work}/here", "-o", work / "snap")
    fails(2, r"say where that is, too \(--qmp\)", *receive, "--stop-after", "30s")
    for words in ("soon", "0s", "5", "1.5rounds"):
        fails(2, "write 30s or 5rounds", *receive, "--qmp", work / "nobody", "--stop-after", words)
