"""A QEMU's monitor: commands in QMP, one at a time.

    with Monitor("here.qmp") as monitor:
        print(monitor.command("query-status")["status"])

QEMU serves one client of a monitor at a time.
"""

from __future__ import annotations

import json
from typing import Any, Self

from multifd.errors import PeerError
from multifd.net.connect import connect
from multifd.net.connection import Ended, Stalled
from multifd.net.deadline import Silence
from multifd.net.uri import Uri


class Monitor:
    """One QMP session; one thread at a time."""

    def __init__(self, where: str, timeout: float = 30.0) -> None:
        """`where` is the monitor's socket: a path, `unix:PATH` or `tcp:HOST:PORT`.

        Raises HostError where nobody listens, PeerError where it is no QMP monitor, or another client has it.
        """
        uri = Uri.parse(where) if where.startswith(("unix:", "tcp:")) else Uri("unix", path=where)
        self.name = str(uri)
        silence = Silence(timeout)
        silence.awaited = True
        self._connection = connect(uri, silence, "QEMU's monitor")
        self._unread = b""
        self._commands = 0
        try:
            try:
                greeting = self._read()
            except Stalled:
                raise PeerError(
                    f"{self.name} takes the connection and says nothing for {timeout:g} s: another client holds this "
                    "monitor: libvirt? then virt-qemu-qmp-proxy"
                ) from None
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
