"""Payloads that are the pages themselves, with a few bytes before each block of them: what does not shrink."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from multifd.hookspecs import Channel
from multifd.wire import Buffer


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


def stored(pages: Iterable[memoryview], most: int, between: Sequence[bytes]) -> list[Buffer]:
    """The payload of blocks of `most` bytes, each behind its part of `between`, whose last part is the end."""
    payload: list[Buffer] = []
    for header, block in zip(between, cut(pages, most), strict=False):
        payload += (header, *block)
    payload.append(between[-1])
    return payload


def read_stored(channel: Channel, payload: memoryview, pages: memoryview, most: int, between: Sequence[bytes]) -> bool:
    """Read the channel's next payload: where it is what `stored` makes of these pages, straight into them.

    Where it is another one, it is in `payload` then, all of it, and the answer is False.
    """
    channel.read_into(payload)
    if len(payload) != len(pages) + sum(map(len, between)):
        return False
    position = 0
    for start, header in zip(range(0, len(pages), most), between, strict=False):
        end = position + len(header)
        if payload[position:end] != header:
            return False
        size = min(most, len(pages) - start)
        pages[start : start + size] = payload[end : end + size]
        position = end + size
    return payload[position:] == between[-1]
