"""Cut the conformance suite's captures: the first packets of one channel of recorded migrations.

    python tests/support/cut_captures.py CAPTURES

CAPTURES is a directory of recordings (main.bin.zst, chK.bin.zst) of QEMU 10.0, one for each method
that QEMU knows.  Writes `core/src/multifd/testing/captures`: each method's bytes as they were on
the wire, packed with zlib, and `captures.json` with the SHA-256 of each packet's pages, which
Python's own zlib, gzip and zstd decode here; nothing of multifd takes part.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import streams

INTO = Path(__file__).parents[2] / "core" / "src" / "multifd" / "testing" / "captures"
PAGE = 4096
PACKETS = 3
INIT = 64


def decoded(method: str, decoder: streams.PageDecoder, payload: bytes, pages: int) -> bytes:
    """One packet's pages."""
    if method not in ("qpl", "uadk"):
        return b"".join(decoder.decode(payload, pages, PAGE))
    # One length for each page, then the pages: as they are, or deflate (qpl), or zlib (uadk).
    lengths = struct.unpack_from(f">{pages}I", payload)
    at, found = 4 * pages, []
    for length in lengths:
        data = payload[at : at + length]
        at += length
        found.append(data if length == PAGE else zlib.decompress(data, -15 if method == "qpl" else 15))
        assert len(found[-1]) == PAGE
    assert at == len(payload)
    return b"".join(found)


def packets(method: str, data: bytes) -> Iterator[tuple[int, bytes]]:
    """Each packet with normal pages: where it ends, and its pages."""
    decoder = streams.PageDecoder(method)
    at = INIT
    while at < len(data):
        flags, _, normal, size = struct.unpack_from(">IIII", data, at + 8)
        at += streams.header_length(PAGE)
        if normal:
            assert flags >> 1 == streams.METHODS[method]
            at += size
            yield at, decoded(method, decoder, data[at - size : at], normal)


def digests(method: str, data: bytes) -> list[str]:
    """The SHA-256 of each packet's pages."""
    return [hashlib.sha256(pages).hexdigest() for _, pages in packets(method, data)]


def main() -> None:
    captures = Path(sys.argv[1])
    found = {}
    for method in streams.METHODS:
        name = f"q100-{method}-2ch"
        data = streams.other_zstd().decompress((captures / name / "ch0.bin.zst").read_bytes())
        *_, (end, _) = islice(packets(method, data), PACKETS)
        data = data[:end]
        (INTO / f"{method}.z").write_bytes(zlib.compress(data, 9))
        found[method] = {"capture": name, "bytes": len(data), "page_size": PAGE, "sha256": digests(method, data)}
    (INTO / "captures.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
