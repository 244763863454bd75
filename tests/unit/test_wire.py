"""Packets: the layouts of the specification, and every bound a receiver must check."""

from __future__ import annotations

import struct

import pytest

import streams
from multifd.errors import PeerError
from multifd.wire.flags import method_number
from multifd.wire.packet import InitPacket, RamPacket, header_length, is_device_state


@pytest.mark.parametrize(("page_size", "length"), [(1024, 4416), (4096, 1344), (8192, 832), (16384, 576), (65536, 384)])
def test_header_length_follows_the_page_size(page_size: int, length: int) -> None:
    assert header_length(page_size) == length


def test_init_packet_is_the_specifications() -> None:
    assert InitPacket(streams.UUID, 7).pack() == streams.init(7)
    assert InitPacket.unpack(streams.init(254)) == InitPacket(streams.UUID, 254)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (streams.init(0, magic=0x5145564D), "magic 0x5145564d instead of 0x11223344"),
        (streams.init(0, version=2), "multifd version 2, this side knows 1"),
    ],
)
def test_wrong_init_packet_names_both_values(data: bytes, says: str) -> None:
    with pytest.raises(PeerError, match=says):
        InitPacket.unpack(data)


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
@pytest.mark.parametrize("method", streams.METHODS)
def test_ram_packet_is_the_specifications(page_size: int, method: str) -> None:
    far = 5 << 30  # beyond 4 GiB
    normal, zero = (far, 0, 3 * page_size), (far + page_size, 2 * page_size)
    packet = RamPacket(
        streams.METHODS[method], packet_num=9, ramblock="/rom@etc/x", normal=normal, zero=zero, next_packet_size=321
    )
    by_hand = streams.packet(normal, zero, block="/rom@etc/x", method=method, page_size=page_size, size=321, number=9)
    assert packet.pack(page_size) == by_hand
    assert RamPacket.unpack(by_hand, page_size) == packet


def test_sync_packet_names_no_method_and_no_page() -> None:
    assert RamPacket(method=2, sync=True, packet_num=3).pack(4096) == streams.sync(number=3)


def test_qemu_before_9_0_leaves_old_numbers_behind() -> None:
    """QEMU 7.2: a SYNC with the previous packet's size, name and offsets, alloc 128."""
    stale = streams.packet([4096] * 3, block="pc.ram", size=12288, flags=1, counts=(0, 0))
    assert RamPacket.unpack(stale, 4096) == RamPacket(sync=True, room=128)
    with_data = streams.packet([8192], size=77, flags=0x02 | 1)
    packet = RamPacket.unpack(with_data, 4096)
    assert (packet.sync, packet.normal, packet.next_packet_size, packet.method) == (True, (8192,), 77, 1)


def test_unknown_flag_bits_are_ignored() -> None:
    assert RamPacket.unpack(streams.packet([0], size=1, flags=0x04 | 0xFFFFFF80), 4096).method == 2


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (streams.packet([0], magic=0x11223345), "magic 0x11223345 instead of 0x11223344"),
        (streams.packet([0], version=0), "version 0"),
        (streams.packet([0], alloc=129), "129 pages, 128 of 4096 bytes fit"),
        (streams.packet([0], alloc=0), "1 normal and 0 zero pages, but has room for 0"),
        (streams.packet([0], counts=(129, 0)), "129 normal"),
        (streams.packet([0], counts=(100, 29)), "100 normal and 29 zero pages, but has room for 128"),
        (streams.packet([0], counts=(0xFFFFFFFF, 1)), "4294967295 normal"),
        (streams.packet([0], block="x" * 256), "name is not ended"),
        (streams.packet([0], block=""), "name is empty"),
    ],
)
def test_a_lying_header_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(PeerError, match=says):
        RamPacket.unpack(data[: header_length(4096)], 4096)


def test_too_many_pages_are_not_packed() -> None:
    with pytest.raises(ValueError, match="129 pages"):
        RamPacket(normal=tuple(range(0, 129 * 4096, 4096)), ramblock="r").pack(4096)


def test_a_device_state_packet_is_told_from_a_ram_packet() -> None:
    assert is_device_state(struct.pack(">III", streams.MAGIC, 1, 0x40), 4096)
    assert not is_device_state(streams.sync()[:12], 4096)


@pytest.mark.parametrize(
    ("word", "number"), [(0x00, 0), (0x02, 1), (0x04, 2), (0x08, 4), (0x10, 8), (0x20, 16), (0x3E, 31)]
)
def test_the_method_is_a_number_within_the_flags(word: int, number: int) -> None:
    assert method_number(word | 0x41) == number
