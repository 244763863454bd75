"""Blocks, runs, zero pages, and which pages have come."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from multifd.errors import PeerError
from multifd.memory import runs
from multifd.memory.arrivals import Arrivals
from multifd.memory.buffer import packet_buffer
from multifd.memory.zeropages import part, zero_indexes
from multifd.wire.block import Block, check_blocks, check_packet, listed
from multifd.wire.flags import PACKET_SIZE
from multifd.wire.packet import RamPacket

PAGE = 4096
BLOCKS = {"pc.ram": Block("pc.ram", 16 * PAGE), "big": Block("big", 1 << 40)}


def test_runs_join_neighbours_and_keep_the_order() -> None:
    assert runs.runs([], PAGE) == []
    assert runs.runs([PAGE], PAGE) == [(PAGE, PAGE)]
    assert runs.runs([0, PAGE, 2 * PAGE], PAGE) == [(0, 3 * PAGE)]
    assert runs.runs([8 * PAGE, 0, PAGE, 3 * PAGE], PAGE) == [(8 * PAGE, PAGE), (0, 2 * PAGE), (3 * PAGE, PAGE)]
    assert runs.runs([PAGE, PAGE], PAGE) == [(PAGE, PAGE), (PAGE, PAGE)]
    assert runs.runs([2 * PAGE, PAGE, 0], PAGE) == [(2 * PAGE, PAGE), (PAGE, PAGE), (0, PAGE)]
    # Same first and last as a run, but not one.
    assert runs.runs([0, 2 * PAGE, PAGE, 3 * PAGE], PAGE) == [(n * PAGE, PAGE) for n in (0, 2, 1, 3)]


def test_runs_of_anything_give_the_offsets_back() -> None:
    mix = random.Random(3)
    for _ in range(300):
        offsets = [mix.randrange(24) * PAGE for _ in range(mix.randrange(1, 40))]
        found = runs.runs(offsets, PAGE)
        assert [at for start, length in found for at in range(start, start + length, PAGE)] == offsets
        assert all(start + length != after for (start, length), (after, _) in pairwise(found))


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
def test_zero_pages_are_found_whatever_byte_is_set(page_size: int) -> None:
    count = PACKET_SIZE // page_size
    memory = memoryview(packet_buffer())
    assert list(zero_indexes(memory, page_size)) == list(range(count))
    for byte in (0, 1, 7, 8, page_size // 2, page_size - 1):
        memory[3 * page_size + byte] = 1
        assert list(zero_indexes(memory, page_size)) == [index for index in range(count) if index != 3]
        memory[3 * page_size + byte] = 0
    memory[:] = b"\1" * len(memory)
    assert list(zero_indexes(memory, page_size)) == []
    assert list(zero_indexes(memory[: 2 * page_size], page_size)) == []


def test_zero_pages_are_parted_from_the_others() -> None:
    def parted(kinds: str) -> tuple[list[bytes], tuple[int, ...], tuple[int, ...]]:
        """`0` is a zero page, anything else a page of it."""
        pages = b"".join((bytes(PAGE) if kind == "0" else kind.encode() * PAGE) for kind in kinds)
        runs, normal, zero = part(memoryview(pages), PAGE, range(7 * PAGE, (7 + len(kinds)) * PAGE, PAGE))
        return (
            [bytes(run[::PAGE]) for run in runs],
            tuple(at // PAGE for at in normal),
            tuple(at // PAGE for at in zero),
        )

    assert parted("abc") == ([b"abc"], (7, 8, 9), ())
    assert parted("000") == ([], (), (7, 8, 9))
    assert parted("a0bc0d") == ([b"a", b"bc", b"d"], (7, 9, 10, 12), (8, 11))


def test_a_packet_is_checked_before_it_is_used() -> None:
    def check(block: str, *offsets: int) -> Block:
        return check_packet(BLOCKS, RamPacket(ramblock=block, normal=offsets[:1], zero=offsets[1:]), PAGE)

    assert check("pc.ram", 0, 15 * PAGE) is BLOCKS["pc.ram"]
    assert check("big", (1 << 40) - PAGE) is BLOCKS["big"]
    with pytest.raises(PeerError, match=r"'vga.vram', the source listed pc.ram, big"):
        check("vga.vram", 0)
    with pytest.raises(PeerError, match="0x10 in pc.ram is not a multiple of the page size 4096"):
        check("pc.ram", 0, 16)
    with pytest.raises(PeerError, match="beyond the end of pc.ram"):
        check("pc.ram", 0, 16 * PAGE)
    with pytest.raises(PeerError, match="beyond the end"):
        check("big", 0xFFFF_FFFF_FFFF_F000)


def test_block_lists_that_no_source_sends() -> None:
    with pytest.raises(PeerError, match="listed twice"):
        check_blocks([Block("a", PAGE), Block("a", PAGE)], PAGE)
    for length in (0, 100, PAGE + 1):
        with pytest.raises(PeerError, match=f"{length} bytes"):
            check_blocks([Block("a", length)], PAGE)
    with pytest.raises(PeerError, match="9223372036854775808 bytes, more than a file can have"):
        check_blocks([Block("a", 1 << 63)], PAGE)


def test_arrivals_know_never_before_and_this_epoch() -> None:
    pages = Arrivals(8)
    assert pages.missing() == (8, 0)
    assert pages.mark(0, 4) == (False, set())
    assert pages.mark(3, 2) == (True, {3})
    assert pages.missing() == (3, 5)
    pages.next_epoch()
    assert not pages.this_epoch(3)
    assert pages.mark(3, 1) == (True, set())
    assert pages.this_epoch(3)


def test_arrivals_stay_right_over_more_epochs_than_a_byte_counts() -> None:
    pages = Arrivals(3)
    pages.mark(0, 1)
    for epoch in range(1000):
        pages.next_epoch()
        assert not pages.this_epoch(0), epoch
        assert pages.mark(1, 1)[1] == set(), epoch
    assert pages.mark(0, 1) == (True, set())
    assert pages.missing() == (1, 2)


def test_blocks_in_a_message() -> None:
    """Exactly, the largest first, and no more than a line of them."""
    assert listed([Block("rom", PAGE), Block("pc.ram", 3 << 30), Block("odd", (24 << 20) + PAGE)]) == (
        "pc.ram 3 GiB, odd 24580 KiB, rom 4 KiB"
    )
    many = listed([Block(f"\x1b{number}" + "x" * 250, 512 * (number + 1)) for number in range(20)])
    assert many.startswith("\\x1b19xxx")
    assert "x 10 KiB, " in many
    assert "x 9728 bytes, " in many
    assert many.endswith(", and 12 more")
    assert len(many) < 800
