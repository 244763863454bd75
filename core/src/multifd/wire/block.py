"""RAM blocks, and every check of a packet or a word against them; no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

from multifd.errors import PeerError
from multifd.log import escaped
from multifd.wire.packet import RamPacket

#: Bytes of the longest file that the system's calls can name.
MAX_LENGTH = (1 << 63) - 1
#: RAM blocks that a message names, and characters of a name: a stream may have 4096 of 255 each.
LISTED = 8
NAME = 60


@dataclass(frozen=True, slots=True)
class Block:
    """A RAM block: a named piece of guest memory, `used_length` bytes long."""

    idstr: str
    used_length: int


def listed(blocks: Sequence[Block]) -> str:
    """RAM blocks and their exact lengths, the largest first, in a message: `pc.ram 24 MiB, pc.bios 256 KiB`."""
    largest = sorted(blocks, key=lambda block: -block.used_length)
    shown = [f"{escaped(block.idstr[:NAME])} {_exact(block.used_length)}" for block in largest[:LISTED]]
    left = len(blocks) - len(shown)
    return ", ".join(shown) + (f", and {left} more" if left else "")


def _exact(length: int) -> str:
    """Bytes in the largest unit that leaves no fraction: a page too many is seen."""
    units = iter(("bytes", "KiB", "MiB", "GiB"))
    unit = next(units)
    while length % 1024 == 0 and (larger := next(units, None)):
        length //= 1024
        unit = larger
    return f"{length} {unit}"


def check_blocks(blocks: Sequence[Block], page_size: int) -> None:
    """Refuse a block list that no source sends.  Raises PeerError."""
    names = set()
    for block in blocks:
        if block.idstr in names:
            raise PeerError(f"RAM block {block.idstr} is listed twice")
        names.add(block.idstr)
        if not 0 < len(block.idstr) < 256:  # as its bytes are shown, where they are no letters
            raise PeerError(f"a RAM block's name has {len(block.idstr)} characters, not 1 to 255")
        if not block.used_length or block.used_length % page_size:
            raise PeerError(
                f"RAM block {block.idstr} has {block.used_length} bytes, not a multiple of the page size {page_size}"
            )
        if block.used_length > MAX_LENGTH:
            raise PeerError(f"RAM block {block.idstr} has {block.used_length} bytes, more than a file can have")


def check_offset(block: Block, offset: int, page_size: int) -> None:
    """One page's offset against its block.  Raises PeerError."""
    if offset % page_size:
        raise PeerError(f"offset {offset:#x} in {block.idstr} is not a multiple of the page size {page_size}")
    if offset + page_size > block.used_length:
        raise PeerError(f"offset {offset:#x} is beyond the end of {block.idstr} ({block.used_length:#x} bytes)")


def check_packet(blocks: Mapping[str, Block], packet: RamPacket, page_size: int) -> Block:
    """The block a packet's pages belong to, after its name and every offset were checked.

    Raises PeerError for a block that is not in the list, an offset that is not aligned or
    lies beyond the block.
    """
    block = blocks.get(packet.ramblock)
    if block is None:
        raise PeerError(
            f"packet {packet.packet_num} is for RAM block {packet.ramblock!r}, the source listed {', '.join(blocks)}"
        )
    offsets = packet.normal + packet.zero
    if reduce(or_, offsets) % page_size or max(offsets) + page_size > block.used_length:
        for offset in offsets:
            check_offset(block, offset, page_size)
    return block
