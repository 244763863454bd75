"""Compare qatzip-sw with libqatzip's own software, and count what the plugin adds to a device's work.

make bench

libqatzip is the machine's, or fetched by tools/get_libqatzip.py; the device is the tests'
stand-in, whose own time does not count: only what the plugin spends around libqatzip's calls.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from bench import PAGE, Report, plan
from measure import make_image
from multifd.wire.packet import Buffer
from pairs import Pair
from qatdriver import Proxy, Raw
from standin import Missing, get_libqatzip, make_standin

T = TypeVar("T")

PACKET = 512 * 1024
PACKETS = 32


def full_packets(image: Path) -> list[bytes]:
    """Packets of 128 normal pages, evenly over the image."""
    packets = []
    with open(image, "rb") as file:
        pages = b""
        for runs in plan(image):
            for offset, length in runs:
                file.seek(offset)
                pages += file.read(length)
            while len(pages) >= PACKET:
                packets.append(pages[:PACKET])
                pages = pages[PACKET:]
    return packets[:: max(1, len(packets) // PACKETS)][:PACKETS]


def timed(action: Callable[[bytes], T], inputs: Sequence[bytes]) -> tuple[float, list[T]]:
    started = time.perf_counter()
    outputs = [action(data) for data in inputs]
    return time.perf_counter() - started, outputs


def software(image: Path, runs: int) -> dict[str, Any]:
    """libqatzip's own software path and qatzip-sw on the same packets, in turn."""
    packets = full_packets(image)
    raw, ours = Raw(1), Pair("qatzip-sw", {"level": "1"})
    encode, decode, size = [], [], 0.0

    def prepare(data: bytes) -> Sequence[Buffer]:
        payload: Sequence[Buffer] = ours.compressor.hook.multifd_send_prepare(
            channel=ours.sender, pages=[memoryview(data)]
        )
        return payload

    for _ in range(runs):
        theirs_encode, theirs = timed(raw.compress, packets)
        ours_encode, mine = timed(prepare, packets)
        theirs_decode, back = timed(lambda payload: raw.decompress(payload, PACKET), theirs)
        ours_decode, again = timed(lambda payload: ours.decode(payload, PACKET), theirs)
        assert back == again == packets
        encode.append(theirs_encode / ours_encode)
        decode.append(theirs_decode / ours_decode)
        size = sum(len(piece) for payload in mine for piece in payload) / sum(map(len, theirs))
    mib = len(packets) * PACKET / (1 << 20)
    speeds = [mib / seconds for seconds in (theirs_encode, ours_encode, theirs_decode, ours_decode)]
    return {"encode": statistics.median(encode), "decode": statistics.median(decode), "size": size, "MiB/s": speeds}


def device(image: Path, runs: int) -> dict[str, Any]:
    """Microseconds per packet outside libqatzip's calls."""
    packets = full_packets(image)
    pair = Pair("qatzip", {"sw-fallback": "off"})
    inside = 0.0

    def stopwatch(function: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            nonlocal inside
            started = time.perf_counter()
            code = function(*arguments)
            inside += time.perf_counter() - started
            return code

        return call

    found = pair.sender.compress_data.session._library
    real = found.lib
    found.lib = Proxy(real, **{name: stopwatch(getattr(real, name)) for name in ("qzCompress", "qzDecompress")})
    hook = pair.compressor.hook
    costs: dict[str, list[float]] = {"contiguous": [], "scattered": [], "decode": []}
    back = memoryview(bytearray(PACKET))
    for _ in range(runs):
        for data in packets:
            view = memoryview(data)
            for way, pages in (
                ("contiguous", [view]),
                ("scattered", [view[at : at + PAGE] for at in range(0, PACKET, PAGE)]),
            ):
                inside, started = 0.0, time.perf_counter()
                made = hook.multifd_send_prepare(channel=pair.sender, pages=pages)
                costs[way].append(time.perf_counter() - started - inside)
            payload = b"".join(made)
            pair.receiver.next_packet_size = len(payload)
            pair.receiver.bind(lambda wanted, payload=payload: wanted.__setitem__(slice(None), payload))  # type: ignore[misc]
            inside, started = 0.0, time.perf_counter()
            hook.multifd_recv(channel=pair.receiver, pages=back)
            costs["decode"].append(time.perf_counter() - started - inside)
            assert back == data
    return {name: statistics.median(found) * 1e6 for name, found in costs.items()}


def part(name: str, library: Path, image: Path, runs: int) -> dict[str, Any]:
    """Run one of the above in a process of its own: libqatzip stays loaded until a process ends."""
    result = subprocess.run(
        [sys.executable, __file__, "--part", name, "--image", str(image), "--runs", str(runs)],
        env=os.environ | {"MULTIFD_LIBQATZIP": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        sys.exit(result.stderr)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of each, in turn (5)")
    parser.add_argument("--part", choices=("software", "device"), help=argparse.SUPPRESS)
    parser.add_argument("--image", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps({"software": software, "device": device}[arguments.part](arguments.image, arguments.runs)))
        return
    report = Report()
    with tempfile.TemporaryDirectory(prefix="multifd-bench-") as folder:
        image = Path(folder, "guest.raw")
        make_image(image, 128)
        try:
            library, standin = get_libqatzip(), make_standin(Path(folder))
        except Missing as missing:
            print(f"left out: qatzip, {missing}")
            return
        found = part("software", library, image, arguments.runs)
        theirs_encode, ours_encode, theirs_decode, ours_decode = found["MiB/s"]
        detail = f"{ours_encode:.0f} and {theirs_encode:.0f} MiB/s"
        report.line("qatzip-sw 1: compresses / libqatzip", found["encode"], ">= 4", found["encode"] >= 4, detail)
        detail = f"{ours_decode:.0f} and {theirs_decode:.0f} MiB/s, what libqatzip wrote"
        report.line("qatzip-sw 1: decodes / libqatzip", found["decode"], ">= 1.5", found["decode"] >= 1.5, detail)
        report.line("qatzip-sw 1: size / libqatzip", found["size"], "<= 1.03", found["size"] <= 1.03)
        found = part("device", standin, image, arguments.runs)
        for name, limit in (("contiguous", 150), ("scattered", 500), ("decode", 150)):
            what = f"qatzip on a device, {name}: own us/packet"
            report.line(what, found[name], f"<= {limit}", found[name] <= limit)
    report.finish()


if __name__ == "__main__":
    main()
