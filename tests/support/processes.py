"""multifd's commands as processes that are killed, stopped and signalled."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from commands import MULTIFD
from peers import TIMEOUT, eventually


class Command:
    """One of them, in a process group of its own; what it says is in the file `log`."""

    def __init__(self, log: Path, *arguments: object) -> None:
        self.log = log
        self.name = " ".join(map(str, arguments))
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                [*MULTIFD, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def listens(self) -> None:
        """Once it does."""
        ready = eventually(lambda: b"listening on" in self.log.read_bytes() or self.process.poll() is not None)
        assert ready, "it does not begin to listen"
        assert self.process.poll() is None, self.log.read_text()

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def ends(self, seconds: float = TIMEOUT) -> int:
        """Its exit code, and no process of its own stays."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} goes on after {seconds} s: {self.log.read_text()}") from None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, 0)
            raise AssertionError(f"{self.name} has left a process")
        return code

    def told(self, number: int, seconds: float) -> tuple[int, float]:
        """What it ends with once it has got that signal, and how many seconds later."""
        began = time.monotonic()
        self.send(number)
        code = self.ends(seconds)
        return code, time.monotonic() - began

    def close(self) -> None:
        """Whatever it does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
