"""Measure multifd against rivals in the same run; each line is a ratio and its limit.

    make bench

Rivals: the codec alone, for zlib and zstd; a bare loop that sends and stores the same pages over
the same kind of sockets, for none; five installed plugins, for 200.  Medians of alternating
runs.  Works in memory (/dev/shm): a disk would be what is measured.
"""

from __future__ import annotations

import argparse
import mmap
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from measure import MULTIFD, make_image, same, transfer
from multifd.codec.selection import select
from multifd.codec.settings import Spec
from multifd.jobs.bench.measure import Codec, Spent
from multifd.memory.buffer import packet_buffer
from multifd.memory.runs import runs as joined
from multifd.memory.zeropages import part
from multifd.observe.hooks import OUT
from multifd.observe.observers import Observers
from multifd.wire.flags import PACKET_SIZE
from multifd.wire.packet import InitPacket, RamPacket

PAGE = 4096
CHANNELS = 2
#: Bytes of a RAM packet's header, which the bare loop sends and drops.
HEADER = 1344
EMPTY = RamPacket()

#: One packet: the runs of its normal pages, (offset in the image, length).
Packet = list[tuple[int, int]]


def plan(image: Path) -> list[Packet]:
    """The normal pages of every packet, as a sender with zero detection sends them."""
    packets = []
    buffer = memoryview(packet_buffer())
    with open(image, "rb", 0) as file:
        for offset in range(0, image.stat().st_size, PACKET_SIZE):
            length = file.readinto(buffer)
            _, normal, _ = part(buffer[:length], PAGE, range(offset, offset + length, PAGE))
            if normal:
                packets.append(joined(normal, PAGE))
    return packets


class Alone:
    """A compressor alone, in one thread, on packets already in memory."""

    def __init__(self, name: str, image: Path, packets: Sequence[Packet]) -> None:
        self.compressor, self.settings = select(Spec(name), sending=True)
        self.file = open(image, "rb")  # noqa: SIM115 - lives as long as this
        self.memory = memoryview(mmap.mmap(self.file.fileno(), 0, prot=mmap.PROT_READ))
        self.packets = packets
        self.payloads: list[bytes] = []

    def encode(self) -> Spent:
        with self._set_up() as codec:
            self.payloads = [
                codec.encode([self.memory[offset : offset + length] for offset, length in packet])
                for packet in self.packets
            ]
        return codec.encoding

    def decode(self) -> Spent:
        with self._set_up() as codec:
            for packet, payload in zip(self.packets, self.payloads, strict=True):
                codec.decode(payload, sum(length for _, length in packet))
        return codec.decoding

    def _set_up(self) -> closing[Codec]:
        codec = Codec(self.compressor, self.settings, PAGE)
        codec.set_up()
        return closing(codec)


def in_threads(action: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=action, args=(number,)) for number in range(CHANNELS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def bare_send(image: Path, packets: Sequence[Packet], sockets: Sequence[socket.socket]) -> None:
    """Gather each packet's runs straight from the mapped image, with nothing else done."""
    with open(image, "rb") as file:
        memory = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))

    def run(number: int) -> None:
        sock = sockets[number]
        for packet in packets[number::CHANNELS]:
            pending = [memoryview(bytes(HEADER)), *(memory[offset : offset + length] for offset, length in packet)]
            while pending:
                drop(pending, sock.sendmsg(pending))
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)

    in_threads(run)


def bare_receive(
    output: Path, size: int, packets: Sequence[Packet], sockets: Sequence[socket.socket], how: str
) -> None:
    """Scatter each packet's runs to their place in the mapped file, or write them from a buffer."""
    fd = os.open(output, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.ftruncate(fd, size)
    memory = memoryview(mmap.mmap(fd, size))

    def scatter(number: int) -> None:
        header = memoryview(bytearray(HEADER))
        for packet in packets[number::CHANNELS]:
            pending = [header, *(memory[offset : offset + length] for offset, length in packet)]
            while pending:
                drop(pending, sockets[number].recvmsg_into(pending, 0, socket.MSG_WAITALL)[0])
        sockets[number].close()

    def write(number: int) -> None:
        header = memoryview(bytearray(HEADER))
        buffer = memoryview(packet_buffer())
        for packet in packets[number::CHANNELS]:
            pending = [header, buffer[: sum(length for _, length in packet)]]
            while pending:
                drop(pending, sockets[number].recvmsg_into(pending, 0, socket.MSG_WAITALL)[0])
            done = 0
            for offset, length in packet:
                os.pwrite(fd, buffer[done : done + length], offset)
                done += length
        sockets[number].close()

    in_threads(scatter if how == "scatter" else write)
    os.close(fd)


def drop(pending: list[memoryview], count: int) -> None:
    """Take the first `count` bytes off a list of views."""
    while pending and count >= len(pending[0]):
        count -= len(pending.pop(0))
    if count:
        pending[0] = pending[0][count:]


def bare_loop(image: Path, output: Path, packets: Sequence[Packet], how: str) -> float:
    """Seconds the bare loop takes, two processes, from the first byte to the last one stored."""
    output.unlink(missing_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = [socket.create_connection(server.getsockname()) for _ in range(CHANNELS)]
        theirs = [server.accept()[0] for _ in range(CHANNELS)]
    started = time.perf_counter()
    child = os.fork()
    if not child:
        for sock in ours:
            sock.close()
        bare_receive(output, image.stat().st_size, packets, theirs, how)
        os._exit(0)
    for sock in theirs:
        sock.close()
    bare_send(image, packets, ours)
    seconds = time.perf_counter() - started
    os.waitpid(child, 0)
    for sock in ours:
        sock.close()
    return seconds


class Report:
    """Prints each figure with its limit; remembers what missed."""

    def __init__(self) -> None:
        self.missed: list[str] = []

    def line(self, what: str, value: float, limit: str, good: bool, detail: str = "") -> None:
        print(f"{what:<56}{value:>8.2f}  limit {limit:<10}{'ok' if good else 'MISSED':<8}{detail}", flush=True)
        if not good:
            self.missed.append(what)

    def finish(self) -> None:
        """Exit with 1 where something missed its limit."""
        if self.missed:
            print(f"missed: {'; '.join(self.missed)}")
            sys.exit(1)


def codec_lines(report: Report, image: Path, output: Path, packets: Sequence[Packet], runs: int) -> None:
    for name in ("zlib", "zstd", "qatzip-sw"):
        codec = Alone(name, image, packets)
        ratios, encodes, decodes, transfers = [], [], [], []
        for _ in range(runs):
            encodes.append(codec.encode().wall)
            decodes.append(codec.decode().wall)
            source, _ = transfer(image, output, name)
            transfers.append(source.result["seconds"])
            ratios.append(transfers[-1] / max(encodes[-1], decodes[-1]))
        check_arrived(image, output)
        detail = (
            f"transfer {statistics.median(transfers):.2f} s, encoding alone {statistics.median(encodes):.2f} s, "
            f"decoding alone {statistics.median(decodes):.2f} s, {sum(map(len, codec.payloads)) >> 20} MiB of payload"
        )
        ratio = statistics.median(ratios)
        report.line(f"{name} level 1: transfer / codec alone", ratio, "<= 1.35", ratio <= 1.35, detail)


def none_lines(report: Report, image: Path, output: Path, packets: Sequence[Packet], runs: int) -> None:
    bare_file = output.with_name("bare.raw")
    ours: list[float] = []
    bares: dict[str, list[float]] = {"scatter": [], "write": []}
    bare_loop(image, bare_file, packets, "scatter")
    for _ in range(3 * runs):  # a third of a second each: more of them, or the machine's noise is what counts
        for how, found in bares.items():
            found.append(bare_loop(image, bare_file, packets, how))
        source, _ = transfer(image, output, "none")
        ours.append(source.result["seconds"])
    check_arrived(image, output)
    bare_file.unlink()
    for how, found in bares.items():
        ratio = statistics.median(bare / our for bare, our in zip(found, ours, strict=True))
        detail = f"transfer {statistics.median(ours):.2f} s, bare loop {statistics.median(found):.2f} s"
        if how == "scatter":
            report.line("none: rate / bare loop's rate", ratio, ">= 0.80", ratio >= 0.8, detail)
        else:
            report.line("none: rate / bare loop with pwrite", ratio, "none", True, detail)


def hooks_line(report: Report, image: Path, output: Path, packets: Sequence[Packet], runs: int) -> None:
    """All hook calls that a side makes in a none transfer, and what it does for observers that are not there.

    One after another, as in a process they never run at once; but for the payload's reading, the hooks of none
    are nothing but a call.
    """
    compressor, settings = select(Spec("none"), sending=True)
    channel = compressor.channel(0, PAGE, settings)
    channel.bind(lambda _: None)
    watch = Observers().watch(OUT, InitPacket(bytes(16), 0), ())
    buffer = memoryview(packet_buffer())
    header = bytes(HEADER)
    views = [[buffer[:length] for _, length in packet] for packet in packets]

    def send() -> None:
        for pages in views:
            watch.clock.lap("wait")
            payload = compressor.call("multifd_send_prepare", channel=channel, pages=pages)
            watch.clock.lap("encode")
            watch.clock.lap("write")
            watch.packet(EMPTY, header, payload)

    def receive() -> None:
        for pages in views:
            watch.clock.lap("wait")
            channel.next_packet_size = len(pages[0])
            compressor.call("multifd_recv", doing="packet 0", channel=channel, pages=pages[0])
            watch.clock.lap("decode")
            watch.packet(EMPTY, header)

    shares = []
    for _ in range(runs):
        seconds = []
        for side in (send, receive):
            started = time.perf_counter()
            side()
            seconds.append(time.perf_counter() - started)
        source, _ = transfer(image, output, "none")
        shares.append((100 * max(seconds) / source.result["seconds"], max(seconds)))
    share, spent = sorted(shares)[len(shares) // 2]
    detail = f"{1e6 * spent / len(packets):.1f} us of the slower side for each of {len(packets)} packets"
    report.line("none: hooks, no observer, % of the transfer", share, "<= 2", share <= 2, detail)


def memory_lines(report: Report, image: Path, output: Path) -> None:
    for name in ("none", "zlib", "zstd", "qatzip-sw"):
        both = transfer(image, output, name, channels=4, sample_interval=0.01)
        for side, process in zip(("source", "destination"), both, strict=True):
            mib = process.peak_anonymous / (1 << 20)
            report.line(f"{name}, 4 channels: anonymous MiB of the {side}", mib, "<= 48", mib <= 48)


def start_line(report: Report, directory: Path, runs: int) -> None:
    """`multifd send` that fails to connect: start, find the compressor among many, load it."""
    image = directory / "page.raw"
    image.write_bytes(bytes(PAGE))
    times: dict[int, list[float]] = {5: [], 200: []}
    for count in times:
        fake_plugins(directory / f"plugins{count}", count)
    for _ in range(2 * runs):
        for count, found in times.items():
            started = time.perf_counter()
            subprocess.run(
                [*MULTIFD, "send", str(image), f"unix:{directory}/nobody"],
                env=os.environ | {"PYTHONPATH": str(directory / f"plugins{count}")},
                stderr=subprocess.DEVNULL,
                check=False,
            )
            found.append(time.perf_counter() - started)
    few, many = (statistics.median(times[count]) for count in times)
    detail = f"{few * 1000:.0f} ms and {many * 1000:.0f} ms"
    report.line("start of send: 200 plugins / 5 plugins", many / few, "< 2", many < 2 * few, detail)


def fake_plugins(folder: Path, count: int) -> None:
    for number in range(count):
        info = folder / f"multifd_fake{number}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: multifd-fake{number}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[multifd.compressors]\nfake{number} = multifd_fake{number}\n")
        (folder / f"multifd_fake{number}.py").write_text("raise RuntimeError('imported without need')\n")


def check_arrived(image: Path, output: Path) -> None:
    if not same(image, output):
        sys.exit("what arrived is not what was sent")


@contextmanager
def reporting(directory: Path) -> Iterator[tuple[Report, Path]]:
    """On two cores: a report, which ends the process at the end, and the image to be made; work beside it."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    report = Report()
    with tempfile.TemporaryDirectory(prefix="multifd-bench-", dir=directory) as folder:
        yield report, Path(folder, "guest.raw")
    report.finish()


def run(doc: str | None, measure: Callable[[Report, Path, int], None]) -> None:
    """A bench's `main`: `measure` is given the report, the image (work beside it) and how many runs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="size of the memory in MiB (512)")
    parser.add_argument("--runs", type=int, default=5, help="alternating runs of each (5)")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="where to work (/dev/shm)")
    arguments = parser.parse_args()
    with reporting(arguments.directory) as (report, image):
        make_image(image, arguments.mib)
        measure(report, image, arguments.runs)


def _measure(report: Report, image: Path, runs: int) -> None:
    output = image.with_name("snapshot")
    packets = plan(image)
    none_lines(report, image, output, packets, runs)
    hooks_line(report, image, output, packets, runs)
    codec_lines(report, image, output, packets, runs)
    memory_lines(report, image, output)
    start_line(report, image.parent, runs)


if __name__ == "__main__":
    run(__doc__, _measure)
