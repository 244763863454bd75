"""Real QEMUs for the tests: 7.2, 10.0 and 11.1, a guest's memory in a file, driven over QMP."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import images
from multifd.errors import MultifdError
from multifd.qemu.monitor import Monitor
from standin import TOP, fetch

RELEASES = ("7.2", "10.0", "11.1")
FETCHED = TOP / ".qemu"
#: What a guest has.
MIB = 24
#: A QEMU 10.0 whose migration fails in a SYNC can hang for good, its monitor too: the thread of a channel that
#: sees another one fail leaves without waking who waits for it.  With one channel it cannot happen.
FAILING_CHANNELS = 1
UUID = "6d756c74-7266-4d4c-8a00-0029de9fda03"


@cache
def binary(release: str, system: str = "x86_64") -> str:
    """The path of a QEMU of this release."""
    return str(fetch("get_qemu.py", FETCHED, release, system))


def common(one: str, other: str) -> str:
    """A machine type that both releases have: where they are the same, their newest."""
    return "q35" if one == other else f"pc-q35-{min(one, other, key=RELEASES.index)}"


def content() -> bytes:
    """24 MiB of guest memory: text, programs, templates, noise, zeros."""
    memory = images.memory()
    return memory + bytes(4 << 20) + memory[::-1][: 4 << 20] + memory[: 8 << 20]


class Qemu:
    """A QEMU whose guest is paused and whose RAM is the file `ram`."""

    def __init__(
        self,
        release: str,
        folder: Path,
        name: str,
        *,
        machine: str = "q35",
        mib: int = MIB,
        incoming: bool = False,
        shared: bool = True,
        more: Sequence[str] = (),
        system: str = "x86_64",
        block: str = "pc.ram",
    ) -> None:
        """Where it is not `shared`, its RAM is its own, and in no file; `block` is the machine's name for it."""
        self.ram = folder / f"{name}.ram"
        self.log = folder / f"{name}.log"
        self.qmp = qmp = folder / f"{name}.qmp"
        memory = f"memory-backend-file,mem-path={self.ram},share=on" if shared else "memory-backend-ram"
        command = [
            binary(release, system),
            *("-accel", "tcg", "-m", f"{mib}M", "-uuid", UUID, "-S"),
            *("-machine", f"{machine},memory-backend={block}"),
            *("-object", f"{memory},id={block},size={mib}M"),
            *("-nodefaults", "-display", "none", "-vga", "none"),
            *("-qmp", f"unix:{qmp},server=on,wait=off"),
            *(("-incoming", "defer") if incoming else ()),
            *more,
        ]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.monitor = Monitor(str(qmp), timeout=60)
                return
            except MultifdError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.close()
                    raise AssertionError(f"QEMU does not start: {self.log.read_text()}") from None
                time.sleep(0.05)

    def reconnect(self) -> None:
        """The monitor takes one client at a time; it was somebody else's turn."""
        self.monitor = Monitor(str(self.qmp), timeout=60)

    def fill(self, content: bytes) -> None:
        with open(self.ram, "r+b") as file:
            file.write(content)

    def prepare(self, *, channels: int = 2, method: str = "none", **more: object) -> None:
        """multifd on, with these parameters; capabilities are given as True or False."""
        states = {"multifd": True} | {
            key.replace("_", "-"): value for key, value in more.items() if isinstance(value, bool)
        }
        self.monitor.command(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": state} for name, state in states.items()],
        )
        parameters = {key: value for key, value in more.items() if not isinstance(value, bool)}
        self.monitor.command(
            "migrate-set-parameters", multifd_channels=channels, multifd_compression=method, **parameters
        )

    def listen(self, uri: str) -> str:
        """Wait for a migration; where, port 0 resolved."""
        self.monitor.command("migrate-incoming", uri=uri)
        if not uri.startswith("tcp:"):
            return uri
        (address,) = self.monitor.command("query-migrate")["socket-address"]
        return f"tcp:{address['host']}:{address['port']}"

    def status(self) -> str:
        found = self.monitor.command("query-migrate")
        return str(found.get("status", "none"))

    def wait(self, *wanted: str, seconds: float = 60) -> str:
        deadline = time.monotonic() + seconds
        while (now := self.status()) not in wanted and time.monotonic() < deadline:
            time.sleep(0.05)
        assert now in wanted, (
            f"QEMU's migration is {now}: {self.monitor.command('query-migrate')} {self.log.read_text()}"
        )
        return now

    def close(self) -> None:
        if hasattr(self, "monitor"):
            self.monitor.close()
        with suppress(OSError):
            self.process.kill()
        self.process.wait()


Start = Callable[..., Qemu]


@contextmanager
def qemus() -> Iterator[list[Qemu]]:
    """A list; whatever QEMUs are in it are ended."""
    running: list[Qemu] = []
    try:
        yield running
    finally:
        for one in running:
            one.close()
