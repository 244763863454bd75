"""Does the device work?  Only a job of its own tells.

libqatzip reports success with no device, no compression instance and no pinned memory, and then
works in software without a word.  So a child process has the device compress and decompress one
buffer with software forbidden; a crash, a hang and what the libraries print stay in there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass

from multifd.errors import MultifdError
from multifd_qatzip import library
from multifd_qatzip.members import MEMBER_MOST, MEMBER_SIZE

#: Seconds; a start of the device takes well under one.
TIMEOUT = 6.0
NOISE_MOST = 300
ANSWER = "multifd-qatzip trial: "


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of it: libqatzip's `code` where it gave one, and why not, in words."""

    works: bool
    code: int = 0
    why_not: str = ""


_lock = threading.Lock()


def _after_fork() -> None:
    """A thread of the parent may have held it."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
_done: dict[int, Trial] = {}


def trial() -> Trial:
    """Try the device, once per process."""
    with _lock:
        pid = os.getpid()
        if pid not in _done:
            _done[pid] = _try_in_child()
        return _done[pid]


def _try_in_child() -> Trial:
    try:
        child = subprocess.run(
            # A new process, not a fork; -P: nothing from the current directory.
            [sys.executable, "-P", "-c", "from multifd_qatzip.trial import main; main()"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return Trial(False, why_not=f"a trial of the device did not end within {TIMEOUT:g} s")
    noise = " ".join(child.stderr.split())[-NOISE_MOST:]
    answers = [line for line in child.stdout.splitlines() if line.startswith(ANSWER)]  # libraries print, too
    if answers and not child.returncode:
        found = Trial(**json.loads(answers[0].removeprefix(ANSWER)))
    else:
        status = child.returncode
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        found = Trial(False, why_not=f"a trial of the device died ({how})")
    if found.works or not noise:
        return found
    return Trial(False, found.code, f"{found.why_not} [{noise}]")


def main() -> None:
    """The child: prints a line of JSON."""
    answer = {"works": True, "code": library.OK, "why_not": ""}
    try:
        _one_job()
    except MultifdError as error:
        answer = {"works": False, "code": getattr(error, "code", library.OK), "why_not": str(error)}
    print(f"\n{ANSWER}{json.dumps(answer)}", flush=True)


def _one_job() -> None:
    found = library.load()
    source = bytes(range(256)) * (MEMBER_SIZE // 256)
    compressing = library.Session(found, library.COMPRESS, 1)
    member = compressing.compress(source, memoryview(bytearray(MEMBER_MOST)))
    pages = memoryview(bytearray(len(source)))
    library.Session(found, library.DECOMPRESS).decompress(member, pages)
    if pages != source:
        raise library.DeviceError("the device returned other data than it was given")
