"""What demo and bench share: two multifd processes joined by a socket, and what they cost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MULTIFD = [sys.executable, "-m", "multifd"]


@dataclass
class Process:
    """A child, its JSON result, its CPU seconds, and the peak of its anonymous memory.

    `started_cpu` seconds do not count, where it is a service whose start is nobody's concern.
    """

    child: subprocess.Popen[str]
    started_cpu: float = 0.0
    cpu_seconds: float = 0.0
    peak_anonymous: int = 0
    result: dict[str, Any] = field(default_factory=dict)

    def finish(self) -> None:
        assert self.child.stdout is not None
        text = self.child.stdout.read()
        _, status, usage = os.wait4(self.child.pid, 0)
        self.child.returncode = os.waitstatus_to_exitcode(status)
        if self.child.returncode:
            errors = self.child.stderr.read() if self.child.stderr else ""
            sys.exit(f"{' '.join(self.child.args)} failed {errors}")  # type: ignore[arg-type]
        self.cpu_seconds = usage.ru_utime + usage.ru_stime - self.started_cpu
        self.result = json.loads(text) if text.startswith("{") else {}

    def sample(self) -> None:
        """Read the anonymous memory, in bytes; a process that has ended has none."""
        try:
            found = re.search(r"Anonymous: +(\d+) kB", Path(f"/proc/{self.child.pid}/smaps_rollup").read_text())
        except OSError:
            return
        if found:
            self.peak_anonymous = max(self.peak_anonymous, int(found[1]) * 1024)


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has taken so far, its threads' together; /proc/PID/stat has it in hundredths only."""
    return time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3), which Python has not


@contextmanager
def sampled(processes: list[Process], interval: float) -> Iterator[None]:
    """Look at their memory every so many seconds; 0 is never."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(interval):
            for process in processes:
                process.sample()

    thread = threading.Thread(target=run, daemon=True)
    if interval:
        thread.start()
    yield
    stop.set()
    if interval:
        thread.join()


@dataclass(frozen=True)
class Link:
    """What joins two processes: the command that puts each on its host, and the destination's address there."""

    source: tuple[str, ...] = ()
    destination: tuple[str, ...] = ()
    host: str = "127.0.0.1"


LOOPBACK = Link()


def transfer(
    image: Path,
    snapshot: Path,
    compressor: str,
    *,
    channels: int = 2,
    sample_interval: float = 0,
    link: Link = LOOPBACK,
) -> tuple[Process, Process]:
    """Send an image between two processes; (source, destination), finished."""
    shutil.rmtree(snapshot, ignore_errors=True)
    common = ["--compressor", compressor, "--channels", str(channels), "--json"]
    destination = Process(
        subprocess.Popen(
            [*link.destination, *MULTIFD, "receive", f"tcp:{link.host}:0", "-o", str(snapshot), "--no-digest", *common],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    assert destination.child.stderr is not None
    uri = destination.child.stderr.readline().split()[-1]
    command = [*link.source, *MULTIFD, "send", str(image), uri, *common]
    source = Process(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    with sampled([source, destination], sample_interval):
        source.finish()
        destination.finish()
    for process in (source, destination):
        assert process.child.stderr is not None
        process.child.stderr.close()
    return source, destination


def same(image: Path, snapshot: Path) -> bool:
    """Whether what arrived is byte for byte what was sent."""
    index = json.loads((snapshot / "snapshot.json").read_text())
    (block,) = index["blocks"]
    size = 1 << 20
    with open(image, "rb") as sent, open(snapshot / block["file"], "rb") as arrived:
        while True:
            one, other = sent.read(size), arrived.read(size)
            if one != other:
                return False
            if not one:
                return True


def make_image(image: Path, mib: int) -> None:
    """Build the image where it is not there yet."""
    if image.exists() and image.stat().st_size == mib << 20:
        return
    image.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("memory_image.py")), str(image), "--mib", str(mib)], check=True
    )
    print(f"built {image} ({mib} MiB) from memory and files of this machine in {time.monotonic() - started:.0f} s")
