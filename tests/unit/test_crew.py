"""Threads that succeed or fail together."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest

import peers
from multifd.crew import Crew, doing
from multifd.errors import Cancelled, HostError


def test_the_first_failure_ends_all_and_is_the_one_to_hear_of() -> None:
    crew = Crew()

    def wait() -> None:
        with crew.changed:
            crew.wait_for(lambda: False)

    def fail() -> None:
        raise ValueError("mine")

    for number in range(3):
        crew.spawn(f"waiter {number}", wait)
    threading.Timer(0.05, lambda: crew.spawn("failing", fail)).start()
    with pytest.raises(ValueError, match="mine"):
        crew.run("job", wait)
    crew.join()
    assert crew.stuck() == []


def test_whoever_blocks_is_woken() -> None:
    crew = Crew()
    ours, theirs = os.pipe()
    crew.on_end(lambda: os.close(theirs))

    def read() -> None:
        os.read(ours, 1)
        crew.check()

    threading.Timer(0.05, crew.cancel).start()
    with pytest.raises(Cancelled):
        crew.run("reading", read)
    crew.join()
    os.close(ours)
    crew.on_end(lambda: called.append(True))
    assert called == [True], "one that comes late is called at once"


called: list[bool] = []


def test_what_nothing_wakes_is_named_and_left_behind() -> None:
    crew = Crew()
    go = threading.Event()

    def sleep() -> None:
        with doing("a plugin's call"):
            go.wait(peers.TIMEOUT)

    began = time.monotonic()
    threading.Timer(0.05, crew.cancel).start()
    with pytest.raises(Cancelled):
        crew.run("job", sleep)
    crew.join()
    assert time.monotonic() - began < peers.TIMEOUT / 2
    assert crew.stuck() == ["a plugin's call"]
    go.set()
    assert peers.eventually(lambda: crew.stuck() == [])


def test_an_end_well_is_no_failure() -> None:
    crew = Crew()
    assert crew.run("job", lambda: 7) == 7
    crew.join()
    crew.cancel()
    with pytest.raises(Cancelled):
        crew.spawn("late", lambda: None)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "there is not enough memory"),
        (OSError(errno.EMFILE, "x"), "no descriptor is left: raise `ulimit -n`"),
        (OSError(errno.ENOMEM, "x"), "there is not enough memory"),
    ],
)
def test_what_the_machine_is_short_of(error: Exception, says: str) -> None:
    crew = Crew()

    def fail() -> None:
        raise error

    with pytest.raises(HostError, match=says):
        crew.run("job", fail)
    crew.join()


def test_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(HostError, match="no thread can be started: raise `ulimit -u`"):
        Crew().run("job", lambda: None)


def test_what_is_done_every_so_often_fails_the_job_with_its_error() -> None:
    crew = Crew()

    def show() -> None:
        raise ValueError("mine")

    def wait() -> None:
        with crew.changed:
            crew.wait_for(lambda: False)

    with crew.every(0.01, show), pytest.raises(ValueError, match="mine"):
        crew.run("job", wait)
    crew.join()
