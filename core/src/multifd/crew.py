"""Threads that succeed or fail together, and whoever waits for them.

    crew = multifd.Crew()
    timer = threading.Timer(60, crew.cancel)
    timer.start()
    result = multifd.send("guest.raw", "unix:there.sock", crew=crew)
    timer.cancel()
    timer.join()
    print(result.seconds)

The first failure is the one that is raised, and ends all others; `cancel` is one, from any thread.  A crew is for one
job.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, TypeVar

from multifd.errors import Cancelled, HostError, shortage
from multifd.log import About, about

T = TypeVar("T")

#: Seconds that threads may take to end once the job is over: after a cancel, after a failure (whose cause may still
#: be on its way), after success.  A thread that takes longer is in a call that nothing can wake.
ENDING = {"cancelled": 0.4, "failed": 2.0, "done": 5.0}
PATIENCE = 0.9


class Crew:
    """The threads of one job, and the lock for what they share."""

    def __init__(self, changed: threading.Condition | None = None) -> None:
        """`changed` is another crew's, where both share what it guards."""
        #: Guards what the job's threads share; told of each change.
        self.changed = changed or threading.Condition()
        #: Seconds in which the job ends after a cancel, or else the command line ends it.  More where something must
        #: not be left half done.
        self.patience = PATIENCE
        #: What its threads log is of this migration; None: of none in particular.
        self.about: About | None = None
        #: Whether there is anybody whom `cancel` reaches.
        self.used = False
        # Guarded by the condition:
        self.over = False
        self._failure: BaseException | None = None
        self._until = 0.0
        self._threads: list[threading.Thread] = []
        self._wakes: list[Callable[[], None]] = []
        self._before_cancel: list[Callable[[], None]] = []
        self._cancelled = False
        self._after: Crew | None = None

    def spawn(self, name: str, action: Callable[[], None]) -> threading.Thread:
        """Do something in a thread of its own; what it raises fails the crew.

        Raises Cancelled where the crew is over, HostError where the machine has no thread left.
        """

        def work() -> None:
            try:
                with about(self.about):
                    action()
            except BaseException as error:  # noqa: BLE001 - whoever waits raises it
                self.fail(error)

        thread = threading.Thread(target=work, name=name, daemon=True)
        with self.changed:
            self.check()
            self.used = True
            start(thread)
            self._threads = [other for other in self._threads if other.is_alive()] + [thread]
        return thread

    def run(self, name: str, action: Callable[[], T]) -> T:
        """The result of something that is done in a thread of its own, so that whoever waits for it can be woken.

        Raises what it raises, or the crew's failure.
        """
        results: list[T] = []

        def work() -> None:
            result = action()
            with self.changed:
                results.append(result)
                self.changed.notify_all()

        thread = self.spawn(name, work)
        try:
            with self.changed:
                self.changed.wait_for(lambda: results or self.over)
        except BaseException as error:  # noqa: BLE001 - Ctrl-C, where this is Python's main thread
            self.fail(error)
        if not results:
            thread.join(self.left)
        if results:
            return results[0]
        assert self._failure is not None
        raise self._failure

    @contextmanager
    def every(self, seconds: float, action: Callable[[], None]) -> Iterator[None]:
        """Do something every so often while the body runs, in a thread of its own."""
        stopped = False

        def work() -> None:
            while True:
                with self.changed:
                    if self.changed.wait_for(lambda: stopped or self.over, seconds):
                        return
                action()

        thread = self.spawn("progress", work)
        try:
            yield
        finally:
            with self.changed:
                stopped = True
                self.changed.notify_all()
            thread.join(max(self.left, ENDING["cancelled"]))

    def on_end(self, wake: Callable[[], None]) -> None:
        """What is called once the crew is over, to wake whoever blocks somewhere; at once where it is."""
        with self.changed:
            self.used = True
            if not self.over:
                self._wakes.append(wake)
                return
        wake()

    def on_cancel(self, action: Callable[[], None]) -> None:
        """What is done first where the job is cancelled, while nobody has been woken."""
        self.used = True
        self._before_cancel.insert(0, action)

    def wait_for(self, condition: Callable[[], object], seconds: float | None = None) -> bool:
        """Wait with `changed` held until a condition holds; False after so many seconds.

        Raises Cancelled once the crew is over.
        """
        held = self.changed.wait_for(lambda: self.over or condition(), seconds)
        self.check()
        return bool(held)

    def check(self) -> None:
        """Raises Cancelled once the crew is over."""
        if self.over:
            raise Cancelled("the job is over")

    def followed_by(self, other: Crew) -> None:
        """What is done after the job, and ends with `cancel`, too."""
        # In this order, and `cancel` in the other: one of both sees what the other did.
        self._after = other
        if self._cancelled:
            other.cancel()

    def cancel(self) -> None:
        """End the job, which then raises Cancelled; from any thread, and twice."""
        self._cancelled = True
        self.fail(Cancelled("cancelled"))
        if self._after is not None:
            self._after.cancel()

    def fail(self, error: BaseException) -> BaseException:
        """End the job with an error, unless it is over; returns the one that it ended with."""
        cancelled = isinstance(error, (Cancelled, KeyboardInterrupt))
        if cancelled and not self.over:
            for action in self._before_cancel:
                action()
        with self.changed:
            if not self.over:
                self._failure = shortage(error)
                self._end("cancelled" if cancelled else "failed")
            return self._failure or error

    def end(self) -> None:
        """End all threads without a failure."""
        with self.changed:
            if not self.over:
                self._end("done")

    def _end(self, how: str) -> None:
        self.over = True
        self._until = time.monotonic() + ENDING[how]
        wakes, self._wakes = self._wakes, []
        self.changed.notify_all()
        for wake in wakes:
            wake()

    def join(self) -> None:
        """End all threads, and wait for them; for those that nothing can wake not for ever."""
        self.end()
        self.await_threads(self.left)

    def await_threads(self, seconds: float) -> None:
        """Wait for them to end by themselves, so long at most."""
        deadline = time.monotonic() + seconds
        for thread in list(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))

    def stuck(self) -> list[str]:
        """The names of the threads that have not ended, where all should have."""
        return [thread.name for thread in self._threads if thread.is_alive()]

    def adopt(self, other: Crew) -> None:
        """The threads of another one that is over, and have not ended."""
        with self.changed:
            self._threads += [thread for thread in other._threads if thread.is_alive()]

    @property
    def left(self) -> float:
        """Seconds that the threads still have to end, once the crew is over."""
        return max(0.0, self._until - time.monotonic())


def start(thread: threading.Thread) -> None:
    """Raises HostError where the machine has none left."""
    try:
        thread.start()
    except RuntimeError as error:
        raise HostError("no thread can be started: raise `ulimit -u` (systemd: TasksMax)") from error


@contextmanager
def doing(what: str) -> Iterator[None]:
    """What a thread does meanwhile is its name: a call that nothing can wake is told by it."""
    thread = threading.current_thread()
    before, thread.name = thread.name, what
    try:
        yield
    finally:
        thread.name = before


_undoings: dict[object, Callable[[], None]] = {}


@contextmanager
def undone(undo: Callable[[], None]) -> Iterator[None]:
    """What must not stay behind after the body, even where the process is left from inside of it (`leave`)."""
    key = object()
    _undoings[key] = undo
    try:
        yield
    finally:
        if _undoings.pop(key, None):
            undo()


def leave(code: int) -> NoReturn:
    """End the process at once, whatever its threads do."""
    undoing = threading.Thread(target=_undo_all, name="undoing", daemon=True)
    try:
        undoing.start()
        undoing.join(ENDING["cancelled"])  # it may take a disk that answers no more
    except RuntimeError:  # no thread is left
        _undo_all()
    os._exit(code)


def _undo_all() -> None:
    with suppress(KeyError):  # the job's own threads may undo the last one themselves
        while True:
            _, undo = _undoings.popitem()
            with suppress(Exception):
                undo()
