"""A QEMU's monitor: commands in QMP, one at a time, and its word when a migration's status changes.

    with Monitor("here.qmp") as monitor:
        print(monitor.command("query-status")["status"])

QEMU serves one client of a monitor at a time.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self, TypeVar

from multifd.crew import Crew
from multifd.errors import MultifdError, PeerError
from multifd.log import escaped
from multifd.net.connect import connect
from multifd.net.connection import Ended, Stalled
from multifd.net.deadline import Silence
from multifd.net.socket import SocketConnection
from multifd.net.uri import Uri
from multifd.wire.document import parse_document

T = TypeVar("T")

#: Bytes.  The longest line of a QEMU, 10.0's answer to query-qmp-schema, has 220 KiB.
LONGEST_LINE = 16 << 20
#: Seconds for an answer where QEMU may be unable to give one: it is blocked while it writes to us.
BRIEF = 0.3
#: Events whose times say how long a guest stood still.
TIMED = ("STOP", "RESUME", "MIGRATION")
#: Characters of what a monitor says that a message shows.
SHOWN = 200
#: And of its reason for a refusal or a failure: a path is in it, and each device on the way there (11.1).
REASON = 400


class Monitor:
    """One QMP session.  Several threads take turns: each waits for the other's answer first."""

    def __init__(self, where: str, timeout: float = 30.0, crew: Crew | None = None) -> None:
        """`where` is the monitor's socket: a path, `unix:PATH` or `tcp:HOST:PORT`.

        `timeout`, in seconds, is for the connection, the greeting, and then for each command's answer;
        where `crew` is cancelled, each is brief from then on.
        Raises HostError where nobody listens, PeerError where it is no QMP monitor, or another client has it.
        """
        uri = Uri.parse(where) if where.startswith(("unix:", "tcp:")) else Uri("unix", path=where)
        self.name = str(uri)
        self._timeout = timeout
        self._silence = Silence(timeout)
        self._silence.awaited = True
        self._turn = threading.Lock()
        self._unread = bytearray()
        self._commands = 0
        self._changed = False
        #: The status that the last event MIGRATION told, whatever QEMU sent as that.
        self.told: object = None
        #: Seconds, by QEMU's clock, of the last event of each name in TIMED.
        self.times: dict[str, float] = {}
        self._hurried = False
        self._connection: SocketConnection | None = None
        if crew is not None:
            crew.on_cancel(self.hurry)
        self._connection = connect(uri, self._silence, "QEMU's monitor")
        try:
            self._greet()
            self.command("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Safe to call twice."""
        if self._connection is not None:
            self._connection.close()

    def hurry(self) -> None:
        """From any thread: the command that runs, and each later one, has BRIEF to be answered; after one that is not,
        no other is tried.
        """
        self._hurried = True
        if self._connection is None:
            self._silence.cancel()
        else:
            self._silence.timeout = min(self._silence.timeout, time.monotonic() - self._silence.last + BRIEF)

    def command(self, name: str, within: float | None = None, /, **arguments: object) -> Any:
        """Run a command and return its answer, which has `within` seconds to come; the monitor's timeout unless given.

        Raises PeerError with QEMU's own words, Stalled where no answer comes in time (a late one is not taken for that
        of the next command), Ended or Lost where QEMU goes away.
        """
        seconds = self._timeout if within is None else within
        if self._hurried:
            seconds = min(seconds, BRIEF)
        if not self._turn.acquire(timeout=seconds):
            raise Stalled(f"{self.name}: {name}: another command's answer is not here within {round(seconds, 1):g} s")
        try:
            answer = self._run(name, arguments, time.monotonic() + seconds)
        except Stalled:
            if self._hurried:
                self.close()
            hint = " (--timeout)" if within is None else ""
            raise Stalled(f"{self.name}: {name}: QEMU gives no answer within {round(seconds, 1):g} s{hint}") from None
        except MultifdError as error:
            raise error.at(f"{self.name}: {name}") from error
        finally:
            self._turn.release()
        if "return" in answer:
            return answer["return"]
        refusal = answer.get("error")
        words = refusal.get("desc") if isinstance(refusal, dict) else None
        raise PeerError(f"{self.name}: {name}: QEMU says: {shown(words if isinstance(words, str) else answer, REASON)}")

    def ask(self, name: str, read: Callable[[Any], T], within: float | None = None, /, **arguments: object) -> T:
        """Run a command; what `read` makes of its answer.

        Raises what `command` does, and PeerError where `read` can make nothing of it: it raises LookupError, TypeError,
        AttributeError, ValueError.
        """
        answer = self.command(name, within, **arguments)
        try:
            return read(answer)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise PeerError(f"{self.name}: {name}: this is no answer of a QEMU's: {shown(answer)}") from error

    def await_change(self, seconds: float) -> bool:
        """Wait until a migration's status changes; at once where it has changed since the last call.

        False where it does not within so many seconds, or another thread has its turn.  QEMU tells it (the event
        MIGRATION) while capability `events` is on.  Raises PeerError, Ended, HostError.
        """
        deadline = time.monotonic() + seconds
        if not self._turn.acquire(timeout=max(0.0, seconds)):
            return False
        try:
            while not self._changed:
                self._note(self._message(deadline))
            self._changed = False
        except Stalled:
            return False
        except MultifdError as error:
            raise error.at(self.name) from error
        finally:
            self._turn.release()
        return True

    def _greet(self) -> None:
        try:
            greeting = self._message(time.monotonic() + self._timeout)
        except Stalled:
            if self._unread:
                raise PeerError(f"{self.name} is not a QMP monitor: it says {shown(self._unread)}") from None
            raise PeerError(
                f"{self.name} takes the connection and says nothing for {self._timeout:g} s: another client holds this "
                "monitor: libvirt? then virt-qemu-qmp-proxy"
            ) from None
        except MultifdError as error:
            raise error.at(self.name) from error
        if "QMP" not in greeting:
            raise PeerError(f"{self.name} is not a QMP monitor: it begins with {shown(greeting)}")

    def _run(self, name: str, arguments: dict[str, object], deadline: float) -> dict[str, Any]:
        self._commands += 1
        message: dict[str, Any] = {"execute": name, "id": self._commands}
        if arguments:
            message["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._wait_until(deadline)
        assert self._connection is not None
        self._connection.write([json.dumps(message).encode() + b"\n"])
        while True:
            answer = self._message(deadline)
            # QEMU leaves the id out of an error only where it could not read what we wrote.
            if not self._note(answer) and answer.get("id", self._commands) == self._commands:
                return answer

    def _note(self, message: dict[str, Any]) -> bool:
        """Whether it is an event."""
        if message.get("event") in TIMED:
            with suppress(LookupError, TypeError):
                at = message["timestamp"]
                self.times[message["event"]] = at["seconds"] + at["microseconds"] / 1e6
        if message.get("event") == "MIGRATION":
            self._changed = True
            data = message.get("data")
            self.told = data.get("status") if isinstance(data, dict) else None
        return "event" in message

    def _message(self, deadline: float) -> dict[str, Any]:
        """The next one; Stalled where it is not here by the deadline (monotonic), whatever trickles."""
        line = self._line(deadline)
        try:
            message = parse_document(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise PeerError(f"it is not a QMP monitor: it says {shown(line)}")
        return message

    def _line(self, deadline: float) -> bytearray:
        searched = 0
        assert self._connection is not None
        while (end := self._unread.find(b"\n", searched)) < 0:
            searched = len(self._unread)
            if searched > LONGEST_LINE:
                raise PeerError(f"it is not a QMP monitor: a line of more than {LONGEST_LINE >> 20} MiB")
            self._wait_until(deadline)
            data = self._connection.read_some(65536, due=True)
            if not data:
                raise Ended("QEMU closed its monitor: is it still there, and does nobody else use it?")
            self._unread += data
        line = self._unread[:end]
        del self._unread[: end + 1]
        return line

    def _wait_until(self, deadline: float) -> None:
        """The next read or write is given up at this time, were nothing to move.  Raises Stalled where it is over."""
        now = time.monotonic()
        if deadline <= now:
            raise Stalled("the time is over")
        self._silence.timeout = deadline - now
        self._silence.last = now


def of(kind: type[T], value: Any) -> T:
    """The value, where it is of this type; for `Monitor.ask`.  Raises TypeError."""
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def shown(said: object, most: int = SHOWN) -> str:
    """What a monitor says, in a message: on one line, escaped, `most` characters of it."""
    if isinstance(said, bytes | bytearray):
        said = said[: most + 1].decode(errors="backslashreplace")
    text = said if isinstance(said, str) else json.dumps(said)
    return escaped(text[:most]) + ("..." if len(text) > most else "")
