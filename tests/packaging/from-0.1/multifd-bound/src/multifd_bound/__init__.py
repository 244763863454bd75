"""The compressor "bound": an example of a C library behind the hooks, to put your own into.

Each payload is one zlib stream of its packet's pages, made and read by libz.so.1.  The library is
loaded by the probe and by set-up, never by an import, so that a machine without it is told what is
missing.  cffi's ABI mode needs no compiler and no header; what it declares has to be right.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from multifd.errors import CompressorError, HostError
from multifd.hookspecs import Channel, Facts, Probe, hookimpl
from multifd.wire import Buffer

__version__ = "0.1.0"

LIBRARY = "libz.so.1"
DECLARATIONS = """
    const char *zlibVersion(void);
    unsigned long compressBound(unsigned long source_size);
    int compress2(void *target, unsigned long *target_size, const void *source, unsigned long source_size, int level);
    int uncompress2(void *target, unsigned long *target_size, const void *source, unsigned long *source_size);
"""
OK = 0


@cache
def _library() -> tuple[Any, Any]:
    """cffi's ffi, and the library.  Raises HostError with the loader's words."""
    try:
        from cffi import FFI

        ffi = FFI()
        ffi.cdef(DECLARATIONS)
        return ffi, ffi.dlopen(LIBRARY)
    except (ImportError, OSError) as error:
        raise HostError(" ".join(str(error).split())) from error


@hookimpl
def multifd_compressor() -> Facts:
    return Facts("bound", "bound", 31, "an example, levels 1-9", levels=range(1, 10), default_level=1)


@hookimpl
def multifd_probe() -> Probe:
    try:
        ffi, lib = _library()
    except HostError as error:
        return Probe(False, LIBRARY, reason=str(error), install="install zlib")
    return Probe(True, LIBRARY, ffi.string(lib.zlibVersion()).decode())


@hookimpl
def multifd_send_setup(channel: Channel) -> None:
    channel.compress_data = _library()


@hookimpl
def multifd_send_prepare(channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
    ffi, lib = channel.compress_data
    source = pages[0] if len(pages) == 1 else b"".join(pages)
    target = bytearray(lib.compressBound(len(source)))
    size = ffi.new("unsigned long *", len(target))
    level = 1 if channel.level is None else channel.level
    code = lib.compress2(ffi.from_buffer(target), size, ffi.from_buffer(source), len(source), level)
    if code != OK:
        raise CompressorError(f"compress2 of {len(source)} bytes: error {code}")
    return [memoryview(target)[: size[0]]]


@hookimpl
def multifd_send_cleanup(channel: Channel) -> None:
    channel.compress_data = None


@hookimpl
def multifd_recv_setup(channel: Channel) -> None:
    channel.compress_data = _library()


@hookimpl
def multifd_recv(channel: Channel, pages: memoryview) -> None:
    ffi, lib = channel.compress_data
    payload = bytearray(channel.next_packet_size)
    channel.read_into(payload)
    made, taken = ffi.new("unsigned long *", len(pages)), ffi.new("unsigned long *", len(payload))
    code = lib.uncompress2(ffi.from_buffer(pages), made, ffi.from_buffer(payload), taken)
    if code != OK:
        raise CompressorError(f"the payload of {len(payload)} bytes is damaged: uncompress2: error {code}")
    if (made[0], taken[0]) != (len(pages), len(payload)):
        raise CompressorError(
            f"the payload gave {made[0]} of {len(pages)} bytes of pages, and used {taken[0]} of its {len(payload)}"
        )


@hookimpl
def multifd_recv_cleanup(channel: Channel) -> None:
    channel.compress_data = None
