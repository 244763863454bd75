"""A running Linux guest that prints a heartbeat: it checks its own memory, or rewrites it, or does next to nothing."""

from __future__ import annotations

import re
from pathlib import Path

from qemus import FETCHED
from standin import fetch

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
