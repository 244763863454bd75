"""The compressor "none": pages as they are, through the same hooks as the others."""

from __future__ import annotations

import platform
from collections.abc import Sequence

from multifd.errors import CompressorError
from multifd.hookspecs import Channel, Facts, Probe, hookimpl
from multifd.wire.flags import METHODS
from multifd.wire.packet import Buffer


@hookimpl
def multifd_compressor() -> Facts:
    return Facts("none", "none", METHODS["none"], "pages as they are")


@hookimpl
def multifd_probe() -> Probe:
    return Probe(True, provider="Python", version=platform.python_version())


@hookimpl
def multifd_send_prepare(pages: Sequence[memoryview]) -> Sequence[Buffer]:
    return pages


@hookimpl
def multifd_recv(channel: Channel, pages: memoryview) -> None:
    if channel.next_packet_size != len(pages):
        raise CompressorError(f"payload of {channel.next_packet_size} bytes for {len(pages)} bytes of pages")
    channel.read_into(pages)
