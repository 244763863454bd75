"""Payloads that are the pages themselves, with a few bytes before each block of them: what does not shrink."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from multifd.wire.packet import Buffer


def cut(buffers: Iterable[memoryview], most: int) -> Iterator[list[memoryview]]:
    """The same bytes, not copied, in blocks of `most` bytes, the last one shorter."""
    block: list[memoryview] = []
    room = most
    for buffer in buffers:
        start = 0
        while start < len(buffer):
            block.append(buffer[start : start + room])
            start += len(block[-1])
            room -= len(block[-1])
            if not room:
                yield block
                block, room = [], most
    if block:
        yield block


def lengths(size: int, most: int) -> list[int]:
    """Those of the blocks of so many bytes."""
    return [min(most, size - start) for start in range(0, size, most)]


def stored(pages: Iterable[memoryview], most: int, between: Sequence[bytes]) -> list[Buffer]:
    """The payload of blocks of `most` bytes, each behind its part of `between`, whose last part is the end."""
    payload: list[Buffer] = []
    for header, block in zip(between, cut(pages, most), strict=False):
        payload += (header, *block)
    payload.append(between[-1])
    return payload


def copy_stored(payload: memoryview, pages: memoryview, most: int, between: Sequence[bytes]) -> bool:
    """Fill the pages from a payload that is what `stored` makes of them; False where it is another one."""
    if len(payload) != len(pages) + sum(map(len, between)):
        return False
    position = start = 0
    for header, size in zip(between, lengths(len(pages), most), strict=False):
        end = position + len(header)
        if payload[position:end] != header:
            return False
        pages[start : start + size] = payload[end : end + size]
        position, start = end + size, start + size
    return payload[position:] == between[-1]
