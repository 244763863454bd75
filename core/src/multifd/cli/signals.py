"""A command beside the main thread, which waits for signals and nothing else."""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from multifd.cli.output import say
from multifd.crew import Crew, leave
from multifd.errors import MultifdError

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: Seconds after which the patience is looked at again, and an interrupt that nobody has heard is made again.
LOOK = 60.0
AGAIN = 1.0
#: Seconds for a last word.
TELLING = 0.2


class Stopped(BaseException):
    """A signal has ended the command."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


def run_beside(run: Callable[[], int], crew: Crew) -> int:
    """Run a command in a thread of its own; the first signal cancels its crew, the second one ends the process.

    Returns what the command returns, and raises what it raises, Stopped where a signal ended it.
    """
    results: list[int] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(run())
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            errors.append(error)
        finally:
            os.write(ended, b"\0")

    with _signals() as (came, ended):
        thread = threading.Thread(target=work, name="the command", daemon=True)
        thread.start()
        stopped = _watch(came, crew, thread)
        thread.join()
    if results:
        return results[0]
    if stopped and isinstance(errors[0], (MultifdError, KeyboardInterrupt)):
        raise Stopped(stopped)
    raise errors[0]


def run_alone(run: Callable[[], int]) -> int:
    """Run a command in the main thread of a process that has no other, as one that forks needs it.

    Raises Stopped at a signal.
    """
    for number in STOPPING:
        signal.signal(number, _stop)
    return run()


def _stop(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)
    raise Stopped(number)


def ignore_at_exit() -> None:
    """Once everything else has been done at the process's end, signals do nothing.

    Python puts the default handlers back before it has ended, and a signal's own code would be the process's.
    """
    atexit.register(lambda: [signal.signal(number, signal.SIG_IGN) for number in STOPPING])


def settle(code: int) -> None:
    """The command has ended with this code: a signal that comes now ends the process with it, not with its own."""
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(code))


def leave_stuck(code: int, names: list[str]) -> NoReturn:
    """End the process although threads are in calls that nothing can wake: a plugin's, the disk's."""
    _leave(code, f"{', '.join(sorted(set(names)))}: nothing wakes it (a plugin, a disk): left as it is")


def _leave(code: int, why: str) -> NoReturn:
    def tell() -> None:
        say(why)
        with suppress(OSError, AttributeError):  # it may be full, or none
            sys.stdout.flush()

    telling = threading.Thread(target=tell, daemon=True)
    with suppress(RuntimeError):  # no thread is left
        telling.start()
        telling.join(TELLING)  # a terminal that has stopped takes nothing
    leave(code)


@contextmanager
def _signals() -> Iterator[tuple[int, int]]:
    """The ends of a pipe in which each signal that stops is a byte, its number; no thread's system calls see it.

    Signals do nothing else from then on, until `settle`.
    """
    came, ended = os.pipe()
    os.set_blocking(ended, False)
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # as nohup has it
    for number in STOPPING[: 2 if ignored else 3]:
        signal.signal(number, lambda *_: None)
    wakeup = signal.set_wakeup_fd(ended)
    try:
        yield came, ended
    finally:
        signal.set_wakeup_fd(wakeup)
        os.close(came)
        os.close(ended)


def _watch(came: int, crew: Crew, thread: threading.Thread) -> int:
    """Until the command has ended; the signal that came meanwhile, or 0."""
    stopped = 0
    since = 0.0
    poll = select.poll()
    poll.register(came, select.POLLIN)
    while True:
        left = since + crew.patience - time.monotonic()
        look = LOOK if crew.used else AGAIN
        if not poll.poll(min(max(0.0, left), look) * 1000 if stopped else None):
            if time.monotonic() < since + crew.patience:  # it may have got more meanwhile
                if not crew.used:
                    _interrupt(thread)
                continue
            leave_stuck(128 + stopped, crew.stuck() or [thread.name])
        number = os.read(came, 1)[0]
        if number == 0:
            return stopped
        if number not in STOPPING:
            continue
        if stopped:
            _leave(128 + number, "ended by a second signal: what was to be put back or removed may be as it was")
        stopped = number
        since = time.monotonic()
        if not crew.used:
            _interrupt(thread)
        # Always: Python drops an interrupt that falls into what it does behind an import.  Not here: it may wait for a
        # lock that is held while somebody writes to a terminal that has stopped.
        cancelling = threading.Thread(target=crew.cancel, name="cancelling", daemon=True)
        try:
            cancelling.start()
        except RuntimeError:  # no thread is left
            crew.cancel()


def _interrupt(thread: threading.Thread) -> None:
    """Raise KeyboardInterrupt in a thread, as Ctrl-C does in Python's main one: at its next step, not inside a call."""
    import ctypes

    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt))
