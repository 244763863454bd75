"""The compressor "plain": an example to put your own method into.

Each payload is one zlib stream of its packet's pages; channels keep nothing from packet to packet.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from multifd.errors import CompressorError
from multifd.hookspecs import Channel, Facts, Probe, hookimpl
from multifd.wire import Buffer

__version__ = "0.1.0"


@hookimpl
def multifd_compressor() -> Facts:
    return Facts("plain", "plain", 31, "an example, levels 1-9", levels=range(1, 10), default_level=1)


@hookimpl
def multifd_probe() -> Probe:
    return Probe(True, provider="zlib", version=zlib.ZLIB_RUNTIME_VERSION)


@hookimpl
def multifd_send_prepare(channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
    stream = zlib.compressobj(1 if channel.level is None else channel.level)
    return [*map(stream.compress, pages), stream.flush()]


@hookimpl
def multifd_recv(channel: Channel, pages: memoryview) -> None:
    payload = bytearray(channel.next_packet_size)
    channel.read_into(payload)
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(payload, len(pages) + 1)  # no more than shows that there is more
    except zlib.error as error:
        raise CompressorError(f"the payload of {len(payload)} bytes is damaged: {error}") from error
    if len(data) != len(pages) or not stream.eof or stream.unused_data:
        raise CompressorError(
            f"the payload of {len(payload)} bytes is not one stream of {len(pages)} bytes of pages: it gave {len(data)}"
        )
    pages[:] = data
