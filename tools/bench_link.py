"""Compare the adaptive settings with the fixed ones, over links of several rates.

    make bench-link                              2 GiB of memory as in tools/memory_image.py
    sudo .venv/bin/python tools/bench_link.py GUEST.raw GUEST.raw...      real guests' memory, one after the other

As root: each link is a pair of network namespaces, held to its rate by the kernel (tc, tbf).  Both ends run on
the same two cores.  Medians of three alternating runs, of nine for random memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import Report, check_arrived, reporting
from measure import LOOPBACK, Link, make_image, transfer

RATES = {"100 Mbit/s": "100mbit", "1 Gbit/s": "1gbit", "10 Gbit/s": "10gbit", "unlimited": ""}
#: The three that everybody knows come first.
FIXED = ("none", "zlib", "zstd", "zlib,level=6", "zstd,level=3", "zstd,level=6", "zstd,level=9")
KNOWN = FIXED[:3]
ADAPTIVE = ("adaptive", "zstd,level=adaptive", "zlib,level=adaptive")
#: Seconds before each transfer.  A virtual machine may give freed memory back to its host, and needs up to three times
#: as long to fill it again: that is over by then, and what the last snapshot had is still at hand.
SETTLE = 4.5
#: Less than a GiB: from there on hosts were seen to take memory back at once.
NOISE_MIB = 900
HOSTS = ("multifd-source", "multifd-target")
ADDRESSES = ("192.0.2.1", "192.0.2.2")


@contextmanager
def linked(rate: str) -> Iterator[Link]:
    """Two hosts of our own with a link of this rate between them; loopback without one."""
    if not rate:
        yield LOOPBACK
        return
    try:
        for host in HOSTS:
            _ip("netns", "add", host)
        _ip("link", "add", "eth0", "netns", HOSTS[0], "type", "veth", "peer", "eth0", "netns", HOSTS[1])
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            _ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "eth0", "up")
            shape = ["tc", "-n", host, "qdisc", "add", "dev", "eth0", "root", "tbf"]
            subprocess.run([*shape, "rate", rate, "burst", "1mb", "latency", "20ms"], check=True)
        source, destination = (("ip", "netns", "exec", host) for host in HOSTS)
        yield Link(source, destination, ADDRESSES[1])
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], stderr=subprocess.DEVNULL, check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def medians(image: Path, runs: int, link: Link, settings: tuple[str, ...]) -> dict[str, float]:
    """The median of each setting's seconds, its transfers run in turn."""
    found: dict[str, list[float]] = {setting: [] for setting in settings}
    snapshot = image.with_name("snapshot")
    for _ in range(runs):
        transfer(image, snapshot, "none")
        for setting, times in found.items():
            time.sleep(SETTLE)
            source, _ = transfer(image, snapshot, setting, link=link)
            times.append(source.result["seconds"])
    check_arrived(image, snapshot)
    return {setting: statistics.median(times) for setting, times in found.items()}


def measure(report: Report, image: Path, runs: int, rates: list[str]) -> None:
    for name in rates:
        with linked(RATES[name]) as link:
            times = medians(image, runs, link, ("none", *ADAPTIVE, *FIXED[1:]))  # the short ones side by side
        print(f"{name}: " + ", ".join(f"{setting} {seconds:.2f} s" for setting, seconds in times.items()))
        best, worst = min(times[one] for one in FIXED), max(times[one] for one in KNOWN)
        for setting in ADAPTIVE[:2]:
            value = times[setting] / best
            report.line(f"{name}: {setting} / best fixed", value, "<= 1.15", value <= 1.15)
            value = worst / times[setting]
            report.line(f"{name}: worst of {'/'.join(KNOWN)} / {setting}", value, ">= 1.25", value >= 1.25)


def measure_noise(report: Report, image: Path, runs: int) -> None:
    times = medians(image, runs, LOOPBACK, ("none", *ADAPTIVE))
    for setting in ADAPTIVE:
        value = times[setting] / times["none"]
        report.line(f"random memory, {setting}: time / none", value, "<= 1.05", value <= 1.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("memory", nargs="*", type=Path, help="raw images of guests (2 GiB are built without)")
    parser.add_argument("--rate", action="append", choices=RATES, help="only this link; repeatable")
    parser.add_argument("--runs", type=int, default=3, help="alternating runs of each (3)")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="where to work (/dev/shm)")
    arguments = parser.parse_args()
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        sys.exit("needs root and iproute2, for links in network namespaces")
    with reporting(arguments.directory) as (report, image):
        if arguments.memory:
            with open(image, "wb") as whole:
                for path in arguments.memory:
                    with open(path, "rb") as one:
                        shutil.copyfileobj(one, whole, 1 << 20)
        else:
            make_image(image, 2048)
        measure(report, image, arguments.runs, arguments.rate or list(RATES))
        with open(image, "wb") as noise:
            noise.writelines(os.urandom(1 << 20) for _ in range(NOISE_MIB))
        measure_noise(report, image, 3 * arguments.runs)


if __name__ == "__main__":
    main()
