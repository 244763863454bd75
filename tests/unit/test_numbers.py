"""Packet numbers: which rounds are whole, and what is said of those that are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from multifd.errors import PeerError
from multifd.wire.numbers import ChannelNumbers, Missing, Numbers, Round
from multifd.wire.packet import RamPacket, header_length

PAGE = 4096
FULL = 128


def data(number: int, *, sync: bool = False) -> RamPacket:
    return RamPacket(packet_num=number, ramblock="pc.ram", normal=(0,), sync=sync)


def sync(number: int, room: int = 0) -> RamPacket:
    return RamPacket(packet_num=number, sync=True, room=room)


def empty(number: int) -> RamPacket:
    return RamPacket(packet_num=number, room=FULL)


def judge(*channels: Sequence[RamPacket]) -> list[str]:
    """What is said at each sync point."""
    rounds: list[list[Round]] = []
    for packets in channels:
        numbers = ChannelNumbers()
        rounds.append([ended for packet in packets if (ended := numbers.add(packet))])
        assert not numbers.since_sync
    whole = Numbers(PAGE)
    return [whole.sync_point(each) for each in zip(*rounds, strict=True)]


def test_as_10_0_counts() -> None:
    first = [sync(0), data(2), data(5), sync(6), data(8), sync(9)]
    second = [sync(1), data(3), data(4), sync(7), sync(10)]
    assert judge(first, second) == ["", "", ""]


def test_as_7_2_counts() -> None:
    """Packet 2 has become SYNC 4; the empty one may come after the next SYNC, and repeats that one's number then."""
    first = [sync(0, FULL), data(4, sync=True), empty(4), data(6), sync(8, FULL)]
    second = [sync(1, FULL), data(3), sync(5, FULL), data(7), sync(9, FULL)]
    assert judge(first, second) == ["", "", ""]
    late = [sync(0, FULL), data(4, sync=True), sync(6, FULL), empty(6)]
    assert judge(late, [sync(1, FULL), data(3), sync(5, FULL), sync(7, FULL)]) == ["", "", ""]


WRONG: list[tuple[list[RamPacket], list[RamPacket], str]] = [
    ([sync(0), data(2), sync(4)], [sync(1), sync(5)], "sync point 2: 1 packet of 2 to 5 never came, from 3 on"),
    (
        [sync(0), data(2), sync(5)],
        [sync(1), data(2), sync(4)],
        "packet 2 came twice, or after its round: 3 was next",
    ),
    ([sync(0), data(2), data(2), sync(4)], [sync(1), sync(3)], "packet 2 came after packet 2: one came twice"),
    ([sync(0), data(3), data(2), sync(4)], [sync(1), sync(5)], "packet 2 came after packet 3: one came twice, or too"),
    (
        [sync(0), sync(3), data(2), sync(5)],
        [sync(1), sync(4), sync(6)],
        "sync point 2: 1 packet of 2 to 4 never came, from 2 on",
    ),
    (
        [sync(0), sync(2), data(5), sync(6)],
        [sync(1), data(3), sync(4), data(3), sync(7)],
        "packet 3 came after packet 4: one came twice, or too late",
    ),
    ([sync(1)], [sync(2)], "sync point 1: 1 packet of 0 to 2 never came, from 0 on"),
    ([sync(0, FULL), data(3, sync=True)], [sync(1, FULL), sync(2, FULL)], "sync point 2: 1 packet too many of 2 to 3"),
    ([sync(0), sync(2**63)], [sync(1), sync(2)], "9223372036854775805 packets of 2 to 9223372036854775808 never came"),
]


@pytest.mark.parametrize(("first", "second", "says"), WRONG)
def test_what_is_wrong_is_said(first: list[RamPacket], second: list[RamPacket], says: str) -> None:
    with pytest.raises(PeerError, match=says):
        judge(first, second)


def test_only_what_may_be_another_channels_is_missing() -> None:
    with pytest.raises(Missing):
        judge([sync(0), data(2), sync(3)])
    with pytest.raises(PeerError) as caught:
        judge([sync(0), data(1), sync(3)], [sync(1), sync(2)])
    assert not isinstance(caught.value, Missing)


@pytest.mark.parametrize("room", [1, FULL - 1])
def test_of_another_kind_is_told_once_and_not_refused(room: int) -> None:
    first = [sync(0, room), data(2), sync(4, room), sync(7, room)]
    second = [sync(1, room), sync(5, room), sync(9, room)]
    said = judge(first, second)
    assert "sync point 2: 1 packet of 2 to 5 never came, from 3 on; its SYNCs are like no known QEMU's" in said[1]
    assert f"(0 with pages, others with room for {room})" in said[1]
    assert [said[0], said[2]] == ["", ""]


def test_an_empty_packet_belongs_to_one_that_was_pages_and_sync() -> None:
    """And to nothing else: anywhere it repeats a number."""
    with pytest.raises(PeerError, match="packet 2 came after packet 2"):
        judge([sync(0, FULL), sync(2, FULL), empty(2), sync(4, FULL)], [sync(1, FULL), sync(3, FULL), sync(5, FULL)])
    numbers = ChannelNumbers()
    for packet in (sync(0, FULL), data(2, sync=True)):
        numbers.add(packet)
    head = replace(empty(2)).pack(PAGE)
    assert all(numbers.may_end_in(head[:cut]) for cut in range(header_length(PAGE)))
    assert not numbers.may_end_in(data(3).pack(PAGE)[:24])
    numbers.add(empty(2))
    assert not numbers.may_end_in(head[:1])
