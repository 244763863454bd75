"""What a compressor takes and makes on a sample of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

from multifd.codec.compressor import Compressor
from multifd.codec.sessions import Sessions
from multifd.codec.settings import Settings
from multifd.wire.flags import PACKET_SIZE


def measure(
    compressor: Compressor,
    settings: Settings,
    sample: memoryview,
    page_size: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Compress a sample of memory: seconds and payload bytes, each per byte of pages.  Raises CompressorError.

    The second half counts, where there are two: the first gets the library going.  `clock` says which seconds: by
    default those that pass, which a device's are too.
    """
    half = len(sample) // 2 // page_size * page_size
    with closing(Sessions("send", 0)) as sessions:
        channel = sessions.get(compressor, settings, page_size)

        def compress(pages: memoryview) -> tuple[float, float]:
            size = 0
            started = clock()
            for at in range(0, len(pages), PACKET_SIZE):
                packet = [pages[at : at + PACKET_SIZE]]
                size += sum(map(len, compressor.encode(channel, packet)))
            return (clock() - started) / len(pages), size / len(pages)

        if half:
            compress(sample[:half])
        return compress(sample[half:])
