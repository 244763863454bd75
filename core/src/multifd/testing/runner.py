"""Runs checks, each in a child process of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from multifd.codec.settings import Spec
from multifd.log import log
from multifd.testing.checks import Check
from multifd.testing.harness import Broken, NotAsked, NotRun, Subject, describe, texts

PASSED, FAILED = "passed", "failed"
#: What the compressor does not claim; what could not be asked.
NOT_ASKED, NOT_RUN = "not asked", "not run"
#: Seconds that a check may take before it counts as hanging.
TIMEOUT = 60


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one check.

    Of one that failed, `called` and `came` say what was called and what came back, and `sentence`
    is what it breaks; of one that was not asked or not run, `reason` says why.
    """

    check: str
    result: str
    sentence: str
    called: str = ""
    came: str = ""
    reason: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        """For people: what is to say of it."""
        if self.result == FAILED:
            return f'{self.called} {self.came}\nThe contract: "{self.sentence}"'
        return self.reason


def run(spec: Spec, checks: Iterable[Check]) -> Iterator[Outcome]:
    """Run checks of one compressor, one after another.

    To be called in a process of one thread that has not loaded the compressor: each check is forked
    from it.  What a check prints goes to standard error.
    """
    texts()  # once, and not in each child
    for check in checks:
        yield _run_in_child(spec, check)


def _run_in_child(spec: Spec, check: Check) -> Outcome:
    sys.stdout.flush()
    sys.stderr.flush()
    begin = time.monotonic()
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read_end)
        _child(spec, check, write_end)
    os.close(write_end)
    try:
        with open(read_end, "rb") as answer:
            text = answer.read()
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(pid, 0)
    found = json.loads(text or "{}") or _died(status)
    return Outcome(check.name, sentence=check.sentence, **found, seconds=round(time.monotonic() - begin, 2))


def _died(status: int) -> dict[str, str]:
    code = os.waitstatus_to_exitcode(status)
    came = f"ended its process with exit status {code}"
    if code == -signal.SIGALRM:
        came = f"did not end within {TIMEOUT} s"
    elif code < 0:
        came = f"killed its process ({signal.Signals(-code).name})"
    return {"result": FAILED, "called": "the check", "came": came}


def _child(spec: Spec, check: Check, write_end: int) -> None:
    """Ends the process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends it where it hangs, inside a library too
    signal.alarm(TIMEOUT)
    warnings.simplefilter("ignore")
    log.disabled = True
    os.dup2(2, 1)
    try:
        found = {"result": PASSED}
        check.function(Subject(spec))
    except NotAsked as reason:
        found = {"result": NOT_ASKED, "reason": str(reason)}
    except NotRun as reason:
        found = {"result": NOT_RUN, "reason": str(reason)}
    except Broken as broken:
        found = {"result": FAILED, "called": broken.called, "came": broken.came}
    except BaseException as error:  # noqa: BLE001 - the answer, whatever it is
        found = {"result": FAILED, "called": "the check", "came": describe(error)}
    os.write(write_end, json.dumps(found).encode())
    os._exit(0)
