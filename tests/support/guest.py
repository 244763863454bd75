"""A running Linux guest that prints a heartbeat: it checks its own memory, or rewrites it, or does next to nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import peers
from qemus import FETCHED, Qemu, Start, common
from standin import Missing, fetch

#: One line per beat: the number, and whether 24 MiB of memory, copied each time, are as they were.
INIT = """#!/busybox sh
/busybox mount -t tmpfs none /tmp
/busybox dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
sum=$(/busybox md5sum </tmp/data)
beat=0
while :; do
    beat=$((beat + 1))
    /busybox cp /tmp/data /tmp/copy$((beat % 2))
    if [ "$(/busybox md5sum </tmp/copy$((beat % 2)))" = "$sum" ] && [ "$(/busybox md5sum </tmp/data)" = "$sum" ]; then
        echo "beat $beat"
    else
        echo "ERROR $beat"
    fi
done
"""


#: One line per beat: 24 MiB of memory have been written again, in place, as fast as it goes.
REWRITES = """#!/busybox sh
/busybox mount -t tmpfs none /tmp
/busybox dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
beat=0
while :; do
    beat=$((beat + 1))
    for at in 0 8 16; do
        /busybox dd if=/tmp/data of=/tmp/copy bs=1M seek=$at conv=notrunc 2>/dev/null
    done
    echo "beat $beat"
done
"""

#: A line three times a second.
IDLES = """#!/busybox sh
beat=0
while :; do
    beat=$((beat + 1))
    echo "beat $beat"
    /busybox sleep 0.3
done
"""


def files() -> Path:
    """The directory with `vmlinuz` and `busybox`."""
    return fetch("get_qemu.py", FETCHED, "guest")


def _entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """A file of a cpio archive in the format that Linux unpacks (newc)."""
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


def initrd(folder: Path, program: str) -> Path:
    """The initial RAM disk with busybox and the program."""
    busybox = (files() / "busybox").read_bytes()
    archive = b"".join(
        (
            _entry("dev", 0o040755),
            _entry("tmp", 0o040755),
            _entry("dev/console", 0o020600, device=(5, 1)),
            _entry("dev/null", 0o020666, device=(1, 3)),
            _entry("dev/urandom", 0o020666, device=(1, 9)),
            _entry("busybox", 0o100755, busybox),
            _entry("init", 0o100755, program.encode()),
            _entry("TRAILER!!!", 0),
        )
    )
    path = folder / "initrd"
    path.write_bytes(archive)
    return path


def options(folder: Path, serial: Path, program: str = INIT) -> list[str]:
    """What QEMU is started with; `serial` is where the guest's lines go.  One program for each folder."""
    path = folder / "initrd"
    return [
        *("-kernel", str(files() / "vmlinuz"), "-initrd", str(path if path.exists() else initrd(folder, program))),
        *("-append", "console=ttyS0 quiet panic=-1 mitigations=off idle=poll", "-serial", f"file:{serial}"),
    ]


def beats(*serials: Path) -> list[int]:
    """The beats that the guest counted, one log after the other.  Fails for an ERROR of the guest's."""
    text = "".join(path.read_text(errors="replace") for path in serials)
    assert "ERROR" not in text, text[-500:]
    return [int(number) for number in re.findall(r"^beat (\d+)\r?$", text, re.MULTILINE)]


class Guest:
    """A Linux guest that runs in a QEMU, and moves to others, of another release where that is given.

    Not 7.2: without us, too, it loses pages that a guest dirties under TCG.
    """

    def __init__(
        self, start: Start, work: Path, release: str = "10.0", to: str = "10.0", *, shared: bool = True
    ) -> None:
        """`shared` is as for `Qemu`."""
        self._start = start
        self._releases = (release, to)
        self._work = work
        self._shared = shared
        self.serials: list[Path] = []
        self.qemu = self.new("first", incoming=False)
        self.qemu.monitor.command("cont")
        self.beats(3)

    def new(self, name: str, *, incoming: bool = True) -> Qemu:
        serial = self._work / f"{name}.serial"
        try:
            more = options(self._work, serial)
        except Missing as missing:
            pytest.skip(str(missing))
        self.serials.append(serial)
        machine = common(*self._releases)
        return self._start(
            self._releases[incoming], name, machine=machine, incoming=incoming, mib=128, shared=self._shared, more=more
        )

    def beats(self, count: int) -> None:
        """So many more beats, none missing since the first."""
        before = len(beats(*self.serials))
        assert peers.eventually(lambda: len(beats(*self.serials)) >= before + count, 60), self.serials[-1].read_text()
        found = beats(*self.serials)
        assert found == list(range(1, len(found) + 1)), "a beat is missing"
