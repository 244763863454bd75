"""Driving a QEMU over its monitor: the settings of a migration, its start and its end.

    with Monitor("/run/vm.qmp") as monitor:
        print(monitor.command("query-status")["status"])

The settings that `Source` and `Destination` change are put back when they are closed.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

from multifd.errors import MultifdError, PeerError
from multifd.transport import Ended, Lost, Silence, Uri, connect

#: Seconds between two looks at a migration.
POLL = 0.1
ENDED = ("completed", "failed", "cancelled")
THEN = ("stop", "resume", "quit")
#: Capabilities that send memory or state another way than over multifd's packets.
OTHER_WAYS = ("postcopy-ram", "mapped-ram", "x-colo", "background-snapshot")
#: Compression of pages on the main channel, which QEMU refuses beside multifd or ignores.
OTHER_COMPRESSION = ("xbzrle", "compress")
OFF = dict.fromkeys((*OTHER_WAYS, *OTHER_COMPRESSION), False)


class Monitor:
    """One QMP session; one thread at a time."""

    def __init__(self, where: str, timeout: float = 30.0) -> None:
        """`where` is the monitor's socket: a path, `unix:PATH` or `tcp:HOST:PORT`.

        Raises HostError where nobody listens, PeerError where it is no QMP monitor.
        """
        uri = Uri.parse(where) if where.startswith(("unix:", "tcp:")) else Uri("unix", path=where)
        self.name = str(uri)
        silence = Silence(timeout)
        silence.awaited = True
        self._connection = connect(uri, silence, "QEMU's monitor")
        self._unread = b""
        self._commands = 0
        try:
            greeting = self._read()
            if "QMP" not in greeting:
                raise PeerError(f"{self.name} is not a QMP monitor: it begins with {json.dumps(greeting)[:80]}")
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
        self._connection.close()

    def command(self, name: str, /, **arguments: object) -> Any:
        """Run a command and return its answer.  Raises PeerError with QEMU's own words."""
        self._commands += 1
        message: dict[str, Any] = {"execute": name, "id": self._commands}
        if arguments:
            message["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._connection.write([json.dumps(message).encode() + b"\n"])
        while True:
            answer = self._read()
            if answer.get("id") != self._commands:
                continue  # an event, or the late answer to a command that timed out
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise PeerError(f"{self.name}: {name}: QEMU says: {answer['error']['desc']}")

    def _read(self) -> dict[str, Any]:
        while b"\n" not in self._unread:
            data = self._connection.read_some(65536, due=True)
            if not data:
                raise Ended(f"{self.name}: QEMU closed its monitor: is it still there, and does nobody else use it?")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise PeerError(f"{self.name} is not a QMP monitor: it says {line[:80]!r}")
        return answer


class Settings:
    """Migration capabilities and parameters of one QEMU, changed for a time."""

    def __init__(self, monitor: Monitor, capabilities: Mapping[str, bool], parameters: Mapping[str, object]) -> None:
        """Raises PeerError where QEMU does not take one; then all are as they were."""
        self._monitor = monitor
        now = {item["capability"]: item["state"] for item in monitor.command("query-migrate-capabilities")}
        wanted = {name: state for name, state in capabilities.items() if now.get(name, False) != state}
        self._capabilities = {name: now[name] for name in wanted if name in now}
        current = monitor.command("query-migrate-parameters")
        self._parameters = {
            name: current[name] for name, value in parameters.items() if current.get(name, value) != value
        }
        try:
            self._set(wanted, dict(parameters))
        except BaseException:
            self.restore()
            raise

    def _set(self, capabilities: dict[str, bool], parameters: dict[str, object]) -> None:
        if capabilities:
            items = [{"capability": name, "state": state} for name, state in capabilities.items()]
            self._monitor.command("migrate-set-capabilities", capabilities=items)
        if parameters:
            self._monitor.command("migrate-set-parameters", **parameters)

    def restore(self) -> None:
        """Put back what was changed.  Warns of what QEMU refuses; one that has gone needs nothing."""
        # In reverse: mapped-ram is not taken beside a compression.
        for capabilities, parameters in (({}, self._parameters), (self._capabilities, {})):
            try:
                self._set(capabilities, parameters)
            except (Ended, Lost):
                return
            except MultifdError as error:
                names = ", ".join([*capabilities, *parameters])
                warnings.warn(f"not put back as it was: {names}: {error}", RuntimeWarning, stacklevel=2)


class _Side:
    """One end of a migration, driven; a context that puts the settings back."""

    def __init__(
        self, where: str, capabilities: dict[str, bool], parameters: Mapping[str, object], timeout: float
    ) -> None:
        self.monitor = Monitor(where, timeout)
        self._timeout = timeout
        try:
            # First: it may fail, and nothing is changed yet.
            self._was_running: bool = self.monitor.command("query-status")["running"]
            self._settings = Settings(self.monitor, OFF | capabilities, parameters)
        except BaseException:
            self.monitor.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._settings.restore()
        finally:
            self.monitor.close()

    def status(self) -> dict[str, Any]:
        """`query-migrate`'s answer; `status` is `none` before there was one."""
        answer: dict[str, Any] = self.monitor.command("query-migrate")
        return {"status": "none"} | answer

    def wait(self) -> None:
        """Wait until the migration has ended.  Raises PeerError where it did not end well."""
        found = self._ended(self._timeout)
        if found["status"] != "completed":
            raise PeerError(f"{self.monitor.name}: QEMU's migration is {_words(found)}")

    def _ended(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while (found := self.status())["status"] not in ENDED and time.monotonic() < deadline:
            time.sleep(POLL)
        return found

    def explain(self, error: MultifdError) -> MultifdError:
        """An error of ours, with what QEMU has to say about it."""
        with suppress(MultifdError):
            found = self._ended(1)
            if found.get("error-desc"):
                return type(error)(f"{error}; QEMU's migration is {_words(found)}")
        return error


def _words(found: Mapping[str, Any]) -> str:
    return "; QEMU says: ".join(filter(None, (found["status"], found.get("error-desc"))))


class Source(_Side):
    """A QEMU whose guest is to be sent."""

    def __init__(self, where: str, *, channels: int, method: str | None, timeout: float) -> None:
        """Set it up: `method` is the compression, its own unless given.  Raises PeerError, HostError."""
        parameters: dict[str, object] = {"multifd-channels": channels}
        if method is not None:
            parameters["multifd-compression"] = method
        super().__init__(where, {"multifd": True, "return-path": True}, parameters, timeout)

    def start(self, uri: str) -> None:
        """Begin to send to `uri`.  Raises PeerError."""
        self.monitor.command("migrate", uri=uri)

    def recover(self, failure: type[BaseException] | None, *_: object) -> None:
        """Like `__exit__`, for an ExitStack: after a failure, or Ctrl-C, give the migration up, and let a guest
        that ran go on.  QEMU takes no settings back before.
        """
        if failure is None:
            return
        with suppress(MultifdError):
            if self._ended(1)["status"] not in (*ENDED, "none"):
                self.monitor.command("migrate_cancel")
                self._ended(5)
            if self._was_running and not self.monitor.command("query-status")["running"]:
                self.monitor.command("cont")

    def leave(self, then: str) -> None:
        """What becomes of the guest: `stop` leaves it stopped, `resume` lets it run, `quit` ends QEMU."""
        if then == "resume":
            self.monitor.command("cont")
        elif then == "quit":
            with suppress(PeerError):  # it may be gone before it answers
                self.monitor.command("quit")


class Destination(_Side):
    """A QEMU started with `-incoming defer`."""

    def __init__(self, where: str, *, channels: int, method: str, timeout: float) -> None:
        """Set it up.  Raises PeerError, HostError."""
        super().__init__(
            where, {"multifd": True}, {"multifd-channels": channels, "multifd-compression": method}, timeout
        )

    def listen(self, uri: str) -> None:
        """Wait for a migration at `uri`.  Raises PeerError."""
        self.monitor.command("migrate-incoming", uri=uri)

    @property
    def uuid(self) -> bytes:
        """The guest's uuid, which the channels have to name; zero where it has none."""
        text: str = self.monitor.command("query-uuid")["UUID"]
        return bytes.fromhex(text.replace("-", ""))
