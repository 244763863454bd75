"""Deflate: by ISA-L, which the plugins ask for where it exists, or by zlib alone.

In core because several plugins need it, and only for them: nothing that starts without one of
them imports this, nor ISA-L with it.
"""

from __future__ import annotations

import zlib
from typing import Any

from multifd.errors import CompressorError
from multifd.wire.packet import Buffer

isal: Any
isal_zlib: Any
try:  # wheels exist for x86-64 and aarch64; elsewhere zlib does it all
    import isal
    from isal import isal_zlib
except ImportError:
    isal = isal_zlib = None

PROVIDER = "zlib+ISA-L" if isal_zlib else "zlib"
VERSION = zlib.ZLIB_RUNTIME_VERSION + (f"+{isal.ISAL_VERSION}" if isal_zlib else "")
#: What a decompressor raises for damaged data.
ERRORS = (zlib.error, isal_zlib.error) if isal_zlib else (zlib.error,)
#: Bytes decoded at once, however much there is: larger pieces are no faster and cost a process 20 MiB per channel.
STEP = 64 * 1024

decompressobj = (isal_zlib or zlib).decompressobj
crc32 = (isal_zlib or zlib).crc32


def inflate(data: Buffer, target: memoryview, window: int) -> None:
    """Decode one whole stream into exactly `target`.

    Raises CompressorError for a stream that makes less or more, has no end, or has bytes behind it, and one of ERRORS
    for a damaged one.
    """
    stream = decompressobj(window)
    size, done = len(target), 0
    while done < size and (output := stream.decompress(data, min(STEP, size - done))):
        end = done + len(output)
        target[done:end] = output
        done, data = end, stream.unconsumed_tail
    if not stream.eof:
        if done == size and stream.decompress(data, 1):
            raise CompressorError(f"decodes to more than its {size} bytes")
        if not stream.eof:
            raise CompressorError(f"ends inside its deflate data, at {done} of {size} bytes")
    if done < size:
        raise CompressorError(f"decodes to {done} bytes instead of {size}")
    if stream.unused_data:
        raise CompressorError(f"has {len(stream.unused_data)} bytes left over")
