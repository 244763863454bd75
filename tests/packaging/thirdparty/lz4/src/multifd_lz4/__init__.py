"""The compressor "lz4": each payload is one LZ4 block of its packet's pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from multifd.errors import CompressorError
from multifd.hookspecs import Channel, Facts, Option, Probe, hookimpl
from multifd.wire import Buffer

__version__ = "0.1.0"

block: Any
try:
    from lz4 import block, library_version_string
except ImportError as error:
    block = None
    WHY_NOT = str(error)


@hookimpl
def multifd_compressor() -> Facts:
    options = (Option("acceleration", 1, "1 to 65537: faster and larger, at level 0"),)
    return Facts("lz4", "lz4", 28, "LZ4: 0 fast, 1-12 small", range(13), 0, options)


@hookimpl
def multifd_probe() -> Probe:
    if block is None:
        return Probe(False, reason=WHY_NOT, install="pip install lz4")
    return Probe(True, "liblz4", library_version_string())


@hookimpl
def multifd_send_setup(channel: Channel) -> None:
    if block is None:
        raise CompressorError(WHY_NOT)
    acceleration = int(channel.options["acceleration"])
    if not 1 <= acceleration <= 65537:
        raise CompressorError(f"acceleration={acceleration} is not 1 to 65537")
    if channel.level:
        channel.compress_data = {"mode": "high_compression", "compression": channel.level}
    else:
        channel.compress_data = {"mode": "fast", "acceleration": acceleration}


@hookimpl
def multifd_send_prepare(channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
    return [block.compress(b"".join(pages), store_size=False, **channel.compress_data)]


@hookimpl
def multifd_recv_setup(channel: Channel) -> None:
    if block is None:
        raise CompressorError(WHY_NOT)
    if not 1 <= int(channel.options["acceleration"]) <= 65537:
        raise CompressorError(f"acceleration={channel.options['acceleration']} is not 1 to 65537")


@hookimpl
def multifd_recv(channel: Channel, pages: memoryview) -> None:
    payload = bytearray(channel.next_packet_size)
    channel.read_into(payload)
    try:
        data = block.decompress(payload, uncompressed_size=len(pages))
    except block.LZ4BlockError as error:
        raise CompressorError(f"the payload of {len(payload)} bytes is damaged: {error}") from error
    if len(data) != len(pages):
        raise CompressorError(f"the payload holds {len(data)} bytes of pages instead of {len(pages)}")
    pages[:] = data
