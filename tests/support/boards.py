"""QEMU's machines of every architecture, and what a migration of each comes to."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import multifd
import peers
from qemus import MIB, RELEASES, Qemu, binary
from qemus import content as guest_content
from relaying import Relaying, closing

METHODS = ("none", "zlib", "zstd")
CHANNELS = {"none": 3, "zlib": 1, "zstd": 2}
#: Seconds that a migration may take on a busy machine.
PATIENCE = 20


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


@dataclass(frozen=True, slots=True)
class Board:
    """A machine: `-machine name` of qemu-system-`system`.  `block` is what it calls its RAM."""

    name: str
    system: str
    block: str
    #: How the types are named that stay the same from release to release; none do unless given.
    versioned: str = ""
    versions: Sequence[str] = RELEASES
    mib: int = MIB

    def __str__(self) -> str:
        return f"{self.system}-{self.name}"

    def types(self, release: str = RELEASES[-1]) -> Sequence[str]:
        """As `-machine` of this release takes them."""
        if not self.versioned:
            return [self.name]
        return [self.versioned.format(version) for version in self.versions if _number(version) <= _number(release)]

    def options(self, release: str, kind: str) -> dict[str, Any]:
        """What `Qemu` is started with, as this type."""
        more: tuple[str, ...] = ()
        if self.name == "versatilepb":  # it plays sounds
            more = ("-audiodev", "none,id=sound")
            kind += "" if release == "7.2" else ",audiodev=sound"
        return {"machine": kind, "mib": self.mib, "system": self.system, "block": self.block, "more": more}


BOARDS = (
    Board("q35", "x86_64", "pc.ram", "pc-q35-{}", ("7.2", "8.2", "9.2", "10.0", "11.1")),
    Board("pc", "x86_64", "pc.ram", "pc-i440fx-{}"),
    Board("microvm", "x86_64", "microvm.ram"),
    Board("virt", "aarch64", "mach-virt.ram", "virt-{}"),
    Board("virt", "arm", "mach-virt.ram", "virt-{}"),
    Board("versatilepb", "arm", "versatile.ram"),
    Board("virt", "riscv64", "riscv_virt_board.ram"),
    Board("virt", "loongarch64", "loongarch.ram", mib=1024),
    Board("s390-ccw-virtio", "s390x", "s390.ram", "s390-ccw-virtio-{}"),
    Board("pseries", "ppc64", "ppc_spapr.ram", "pseries-{}", mib=256),
    Board("powernv9", "ppc64", "pnv.ram", mib=1024),
    Board("clipper", "alpha", "ram"),
)


@cache
def exact_version(release: str) -> str:
    """`7.2.22` of 7.2."""
    said = subprocess.run([binary(release), "--version"], check=True, capture_output=True, text=True).stdout
    return said.split("version ")[1].split()[0]


@cache
def content() -> bytes:
    """A guest's memory; where that is zero, 256 KiB of which every other KiB is noise: pages may be as small."""
    noise = random.Random(7).randbytes(256 << 10)
    memory = bytearray(guest_content())
    for at in range(0, len(noise), 2048):
        memory[(8 << 20) + at : (8 << 20) + at + 1024] = noise[at : at + 1024]
    return bytes(memory)


def equal(one: Path, other: Path) -> bool:
    """Whether the files are; one may be a gigabyte."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with open(one, "rb") as left, open(other, "rb") as right:
        while (data := left.read(4 << 20)) == right.read(4 << 20):
            if not data:
                return True
    return False


class Trial:
    """Migrations of one machine; `start` begins a QEMU and ends it when all is done.

    Each method fails (MultifdError, AssertionError) where the guest does not arrive whole.
    """

    def __init__(self, board: Board, kind: str, work: Path) -> None:
        self._board = board
        self._kind = kind
        self._work = work
        self._count = 0

    def qemu(self, running: list[Qemu], release: str, *, incoming: bool = False) -> Qemu:
        """A guest whose memory is `content`, or one that waits."""
        self._count += 1
        options = self._board.options(release, self._kind)
        qemu = Qemu(release, self._work, f"qemu{self._count}", incoming=incoming, **options)
        running.append(qemu)
        if not incoming:
            qemu.fill(content())
        return qemu

    def receive(self, source: Qemu, method: str, snapshot: Path) -> None:
        """Into a snapshot; the guest is stopped then."""
        source.prepare(channels=CHANNELS[method], method=method, return_path=True)
        job = peers.Receiving(snapshot, channels=CHANNELS[method], timeout=PATIENCE)
        source.monitor.command("migrate", uri=job.uri)
        job.join()
        source.wait("completed", seconds=PATIENCE)
        (image,) = snapshot.glob(f"*-{self._board.block}.raw")
        assert equal(image, source.ram), "the snapshot's memory is not the source's"

    def send(self, snapshot: Path, target: Qemu, method: str, sync: str | None = None) -> None:
        """Out of a snapshot into one that waits, which then goes on."""
        target.monitor.close()
        multifd.send(
            snapshot,
            f"unix:{self._work}/there{self._count}",
            method,
            channels=CHANNELS[method],
            qmp=str(target.qmp),
            sync=sync,
            timeout=PATIENCE,
        )
        target.reconnect()
        (image,) = snapshot.glob(f"*-{self._board.block}.raw")
        self._arrived(target, image)

    def relay(self, source: Qemu, target: Qemu, method: str, to: str) -> None:
        """From one into another."""
        source.prepare(channels=CHANNELS[to], method=method, return_path=True)
        target.prepare(channels=CHANNELS[to], method=to)
        there = target.listen(f"unix:{self._work}/there{self._count}")
        with closing(Relaying(there, source=method, to=to, timeout=PATIENCE)) as relaying:
            source.monitor.command("migrate", uri=relaying.uri)
            ended = source.wait("completed", "failed", seconds=PATIENCE)
            assert relaying.result().confirmed
        assert ended == "completed"
        self._arrived(target, source.ram)

    def alone(self, source: Qemu, target: Qemu) -> None:
        """From one into another with nothing between."""
        source.prepare(return_path=True)
        target.prepare()
        source.monitor.command("migrate", uri=target.listen(f"unix:{self._work}/alone{self._count}"))
        assert source.wait("completed", "failed", seconds=PATIENCE) == "completed", "QEMU's migration fails"
        self._arrived(target, source.ram)

    def _arrived(self, target: Qemu, memory: Path) -> None:
        target.wait("completed", seconds=PATIENCE)
        assert equal(target.ram, memory), "the destination's memory is not the source's"
        target.monitor.command("cont")
