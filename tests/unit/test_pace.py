"""How many bytes a second are written, in a time of the test's own."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from multifd.errors import Cancelled, UsageError
from multifd.net.connection import Lost
from multifd.net.deadline import Silence
from multifd.net.rate import CATCH_UP, LEAST, Pace, Rate
from multifd.net.socket import SocketConnection


class Time:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("late", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("limit", [1000, 10**6, 10**10])
def test_what_went_is_what_may(limit: int, late: float) -> None:
    """Also where whoever waits is woken late, as on a busy machine."""
    clock = Time()
    rate = Rate(limit, clock)
    sent = 0
    while clock.now < 50 + 60:
        clock.now += rate.wait(rate.step) + late * (sent % 3 == 0)
        sent += rate.step
        assert sent <= limit * (clock.now - 50 + CATCH_UP) + rate.step, "never ahead of it"
    assert sent >= 0.97 * limit * (clock.now - 50)


def test_several_take_turns() -> None:
    """Each waits for those who asked before, and for nobody else."""
    clock = Time()
    rate = Rate(1000, clock)
    assert [rate.wait(500) for _ in range(4)] == [0, 0.5, 1.0, 1.5]
    clock.now += 2
    assert rate.wait(500) == 0


def test_nobody_saves_up() -> None:
    clock = Time()
    rate = Rate(1000, clock)
    clock.now += 1000
    sent = 0
    while not rate.wait(10):
        sent += 10
    assert sent <= 1000 * CATCH_UP + 10


@pytest.mark.parametrize("limit", [0, -1])
def test_a_rate_of_nothing(limit: int) -> None:
    with pytest.raises(UsageError, match="nothing would ever go"):
        Rate(limit)


def test_a_wait_for_the_rate_is_no_silence() -> None:
    silence = Silence(0.4, idle_timeout=0.4)
    pace = Pace(Rate(2 * LEAST))
    pieces = [bytes(LEAST), bytes(2 * LEAST)]
    worst = 0.0
    for _ in pace.steps(pieces, silence):
        worst = max(worst, time.monotonic() - silence.last)
        silence.check("test", awaited=True)
    assert worst < 0.2


def test_pieces_are_the_whole() -> None:
    pace = Pace(Rate(10**7))
    pieces = [bytes([number]) * length for number, length in enumerate((3, 0, 2_500_000, 1, 0))]
    steps = [b"".join(step) for step in pace.steps(pieces, Silence(10))]
    assert b"".join(steps) == b"".join(pieces)
    assert max(map(len, steps)) == 10**6
    assert not list(pace.steps([b""], Silence(10)))


@pytest.mark.parametrize("how", ["interrupt", "cancel"])
def test_a_wait_is_ended_at_once(how: str) -> None:
    pace, silence = Pace(Rate(1)), Silence(30)
    pace.next_step(LEAST, silence)
    threading.Timer(0.2, pace.interrupt if how == "interrupt" else silence.cancel).start()
    began = time.monotonic()
    if how == "cancel":
        with pytest.raises(Cancelled):
            pace.next_step(1, silence)
    else:
        pace.next_step(1, silence)
    assert time.monotonic() - began < 5
    while threading.active_count() > 1:
        time.sleep(0.01)


def test_a_connection_that_is_interrupted_waits_no_more() -> None:
    here, there = socket.socketpair()
    connection = SocketConnection(here, "test", Silence(30))
    connection.pace = Pace(Rate(1))
    timer = threading.Timer(0.2, connection.interrupt)
    timer.start()
    with pytest.raises(Lost):
        connection.write([bytes(3 * LEAST)])
    timer.join()
    connection.close()
    there.close()
