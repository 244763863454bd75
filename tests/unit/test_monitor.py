"""A monitor's other side that is late, or refuses: what a real QEMU does seldom."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import peers
from multifd.errors import PeerError
from multifd.qemu.driver import Source
from multifd.qemu.monitor import Monitor

Answer = Callable[[str, dict[str, Any]], dict[str, Any]]


@contextmanager
def monitor(work: Path, answer: Answer) -> Iterator[str]:
    """Where a QMP monitor is that answers each command so, an id apart."""

    def serve() -> None:
        sock, _ = server.accept()
        with sock, sock.makefile("rw") as lines:
            lines.write('{"QMP": {}}\n')
            lines.flush()
            for line in lines:
                asked = json.loads(line)
                said = answer(asked["execute"], asked.get("arguments", {}))
                lines.write(json.dumps(said | {"id": asked["id"]}) + "\n")
                try:
                    lines.flush()
                except BrokenPipeError:
                    break

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(work / "qmp"))
        server.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield str(work / "qmp")
        thread.join(peers.TIMEOUT)
        assert not thread.is_alive()


def test_a_late_answer_is_not_that_of_the_next_command(work: Path) -> None:
    given_up = threading.Event()

    def answer(name: str, _: dict[str, Any]) -> dict[str, Any]:
        if name == "late":
            given_up.wait(peers.TIMEOUT)
        return {"return": name}

    with monitor(work, answer) as where, Monitor(where, timeout=2) as client:
        with pytest.raises(PeerError, match="nothing moved"):
            client.command("late")
        given_up.set()
        assert client.command("next") == "next"


def test_nothing_is_changed_where_the_guest_is_not_known_to_run(work: Path) -> None:
    asked = []

    def answer(name: str, _: dict[str, Any]) -> dict[str, Any]:
        asked.append(name)
        return {"error": {"desc": "not now"}} if name == "query-status" else {"return": {}}

    with monitor(work, answer) as where, pytest.raises(PeerError, match="query-status: QEMU says: not now"):
        Source(where, channels=2, method=None, timeout=peers.TIMEOUT)
    assert asked == ["qmp_capabilities", "query-status"]


def test_a_setting_that_is_not_put_back_is_told_and_the_others_are(work: Path) -> None:
    put_back = []

    def answer(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        match name:
            case "query-status":
                return {"return": {"running": True}}
            case "query-migrate-capabilities":
                return {"return": [{"capability": "multifd", "state": False}]}
            case "query-migrate-parameters":
                return {"return": {"multifd-channels": 7}}
            case "migrate-set-parameters" if arguments == {"multifd-channels": 7}:
                return {"error": {"desc": "not now"}}
            case "migrate-set-capabilities":
                put_back.append(arguments["capabilities"])
        return {"return": {}}

    with monitor(work, answer) as where:
        driver = Source(where, channels=2, method=None, timeout=peers.TIMEOUT)
        with (
            pytest.warns(RuntimeWarning, match="not put back as it was: multifd-channels: .*QEMU says: not now"),
            driver,
        ):
            put_back.clear()
    assert put_back == [[{"capability": "multifd", "state": False}]]
