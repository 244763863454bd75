"""A monitor's other side that is late, refuses, talks nonsense or goes away: what a real QEMU does seldom."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

import peers
from multifd.errors import MultifdError, PeerError
from multifd.jobs.doctor.compare import advise, compare
from multifd.jobs.doctor.devices import PciDevice
from multifd.jobs.doctor.memory import MemoryDevice, RamBlock
from multifd.jobs.doctor.side import describe, examine
from multifd.net.connection import Ended, Stalled
from multifd.qemu import driver as driver_module
from multifd.qemu import monitor as monitor_module
from multifd.qemu.driver import Destination, Source
from multifd.qemu.monitor import Monitor
from multifd.qemu.states import Guest, Migration, blocked, destination_obstacle, source_obstacle
from multifd.snapshot.disks import Disk
from told import warns

GREETING = b'{"QMP": {}}\r\n'
EVENT = b'{"event": "MIGRATION", "data": {"status": "active"}}\r\n'

Answer = Callable[[str, dict[str, Any]], dict[str, Any]]


@contextmanager
def serving(work: Path, serve: Callable[[socket.socket], object]) -> Iterator[str]:
    """Where somebody serves one client with bytes of his own, until that has gone."""

    def run() -> None:
        sock, _ = server.accept()
        with sock, suppress(ConnectionError):
            sock.settimeout(peers.TIMEOUT)
            serve(sock)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(work / "qmp"))
        server.listen()
        server.settimeout(peers.TIMEOUT)
        thread = threading.Thread(target=run)
        thread.start()
        yield str(work / "qmp")
        thread.join(peers.TIMEOUT)
        assert not thread.is_alive()


def monitor(work: Path, answer: Answer, before: bytes = b"") -> Any:
    """Where a QMP monitor is that answers each command so, an id apart, and says something before each answer."""

    def serve(sock: socket.socket) -> None:
        sock.sendall(GREETING)
        with sock.makefile("r") as lines:
            for line in lines:
                asked = json.loads(line)
                said = answer(asked["execute"], asked.get("arguments", {}))
                sock.sendall(before + json.dumps({"id": asked["id"]} | said).encode() + b"\n")

    return serving(work, serve)


#: What a QEMU answers that is about to be a source; `-incoming defer` for a destination.
USUAL: dict[str, Any] = {
    "query-status": {"running": True, "status": "running"},
    "query-migrate": {},
    "query-migrate-capabilities": [{"capability": "multifd", "state": False}, {"capability": "events", "state": False}],
    "query-migrate-parameters": {"multifd-channels": 2, "multifd-compression": "none"},
    "query-uuid": {"UUID": "6d756c74-7266-4d4c-8a00-0029de9fda03"},
}


def usual(asked: list[str] | None = None, **odd: Any) -> Answer:
    """A QEMU's usual answers, but for those given, values or iterators of values; a `list` is told what was asked."""

    def answer(name: str, _: dict[str, Any]) -> dict[str, Any]:
        if asked is not None:
            asked.append(name)
        value = odd.get(name.replace("-", "_"), USUAL.get(name, {}))
        return {"return": next(value) if isinstance(value, Iterator) else value}

    return answer


def source(where: str, timeout: float = peers.TIMEOUT) -> Source:
    return Source(where, channels=2, method=None, timeout=timeout)


def one_line(error: BaseException, *said: str) -> None:
    text = str(error)
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert len(text) < 600
    for words in said:
        assert words in text


def test_a_late_answer_is_not_that_of_the_next_command(work: Path) -> None:
    given_up = threading.Event()

    def answer(name: str, _: dict[str, Any]) -> dict[str, Any]:
        if name == "late":
            given_up.wait(peers.TIMEOUT)
        return {"return": name}

    with monitor(work, answer) as where, Monitor(where) as client:
        with pytest.raises(Stalled, match=r"qmp: late: QEMU gives no answer within 0.2 s$"):
            client.command("late", 0.2)
        given_up.set()
        assert client.command("next") == "next"


def flood(sock: socket.socket) -> None:
    while True:
        sock.sendall(EVENT * 100)


def trickle(sock: socket.socket) -> None:
    for byte in EVENT * 100_000:
        sock.sendall(bytes([byte]))
        time.sleep(0.01)


def grow(sock: socket.socket) -> None:
    while True:
        sock.sendall(b"x")
        time.sleep(0.001)


@pytest.mark.parametrize("say", [flood, trickle, grow])
def test_a_command_ends_in_time_whatever_trickles(work: Path, say: Callable[[socket.socket], None]) -> None:
    def serve(sock: socket.socket) -> None:
        sock.sendall(GREETING)
        sock.recv(1000)
        sock.sendall(b'{"return": {}, "id": 1}\n')
        sock.recv(1000)
        say(sock)

    with serving(work, serve) as where, Monitor(where, timeout=0.5) as client:
        started = time.monotonic()
        with pytest.raises(Stalled, match=r"query-status: QEMU gives no answer within 0.5 s \(--timeout\)"):
            client.command("query-status")
        assert time.monotonic() - started < 10  # they go on for ever; a loaded machine is slow


def test_a_greeting_has_to_come_in_time(work: Path) -> None:
    with serving(work, grow) as where, pytest.raises(PeerError, match="is not a QMP monitor: it says xx+"):
        Monitor(where, timeout=0.5)


@pytest.mark.parametrize("size", [100, monitor_module.LONGEST_LINE - 1000])
def test_a_long_line_is_an_answer(work: Path, size: int) -> None:
    with monitor(work, lambda *_: {"return": "x" * size}) as where, Monitor(where) as client:
        assert len(client.command("query-qmp-schema")) == size


def test_a_line_without_end_is_refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "LONGEST_LINE", 1 << 20)

    def serve(sock: socket.socket) -> None:
        sock.sendall(GREETING)
        while True:
            sock.sendall(b"x" * 65536)

    with (
        serving(work, serve) as where,
        pytest.raises(PeerError, match="qmp_capabilities: .* a line of more than 1 MiB"),
    ):
        Monitor(where)


@pytest.mark.parametrize(
    "greeting",
    [
        b"QEMU 10.0.13 monitor - type 'help' for more information\r\n",
        b"\xff\xfb\x01\x1b[2J\r\n",
        b"null\n",
        b"[]\n",
        b"5\n",
        b'"QMP"\n',
        b"{}\n",
        EVENT,
        b"[" * 100_000 + b"\n",
        b"9" * 100_000 + b"\n",
        b'{"x":' + b"[" * 900 + b"]" * 900 + b"}\n",
    ],
    ids=lambda value: repr(value[:12]),
)
def test_a_greeting_that_is_none(work: Path, greeting: bytes) -> None:
    with serving(work, lambda sock: sock.sendall(greeting)) as where, pytest.raises(PeerError) as caught:
        Monitor(where)
    one_line(caught.value, "qmp", "is not a QMP monitor")


DEEP = b"[" * 900 + b"]" * 900


@pytest.mark.parametrize(
    "line",
    [
        b'{"x": ' + DEEP + b"}",
        b'{"error": {"desc": ' + DEEP + b"}}",
        b"null",
        b"[]",
        b"5",
        b'"x"',
        b"{",
        b"\xff\x00",
        b"",
        b"{}",
        b'{"error": {"class": "x"}}',
        b'{"error": 5}',
    ],
)
def test_an_answer_that_is_none(work: Path, line: bytes) -> None:
    def serve(sock: socket.socket) -> None:
        sock.sendall(GREETING)
        sock.recv(1000)
        sock.sendall(line + b"\n")

    with serving(work, serve) as where, pytest.raises(PeerError) as caught:
        Monitor(where, timeout=5)
    assert not isinstance(caught.value, Stalled)
    one_line(caught.value, f"{where}: qmp_capabilities: ")


def test_qemus_words_are_escaped_and_shortened(work: Path) -> None:
    words = "no\n\x1b[2J\udc80 " + "very " * 1000
    with monitor(work, lambda *_: {"error": {"desc": words}}) as where, pytest.raises(PeerError) as caught:
        Monitor(where)
    one_line(caught.value, "QEMU says: no\\n\\x1b[2J\\udc80 very very", "...")


def close(_: socket.socket) -> None:
    """As it does in any case."""


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))


@pytest.mark.parametrize("end", [close, reset])
@pytest.mark.parametrize("said", [b"", b'{"return": '])
def test_a_monitor_that_goes_away(work: Path, end: Callable[[socket.socket], None], said: bytes) -> None:
    def serve(sock: socket.socket) -> None:
        sock.sendall(GREETING)
        sock.recv(1000)
        sock.sendall(said)
        end(sock)

    with serving(work, serve) as where, pytest.raises(Ended) as caught:
        Monitor(where)
    one_line(caught.value, f"{where}: qmp_capabilities: QEMU closed its monitor")


ODD = [
    ("query-status", []),
    ("query-status", None),
    ("query-status", {"status": "running"}),
    ("query-status", {"running": "yes"}),
    ("query-migrate", None),
    ("query-migrate", 5),
    ("query-migrate", {"status": 5}),
    ("query-migrate", {"status": "failed", "error-desc": ["x"]}),
    ("query-migrate-capabilities", None),
    ("query-migrate-capabilities", {}),
    ("query-migrate-capabilities", [1, 2]),
    ("query-migrate-capabilities", [{"capability": 5, "state": True}]),
    ("query-migrate-capabilities", [{"capability": "multifd"}]),
    ("query-migrate-parameters", "x\n\x1b" * 1000),
    ("query-migrate-parameters", None),
]


@pytest.mark.parametrize(("command", "value"), ODD, ids=lambda value: str(value)[:30])
def test_an_answer_of_another_kind(work: Path, command: str, value: Any) -> None:
    asked: list[str] = []
    with (
        monitor(work, usual(asked, **{command.replace("-", "_"): value})) as where,
        pytest.raises(PeerError, match="this is no answer of a QEMU's") as caught,
    ):
        source(where)
    one_line(caught.value, f"{where}: {command}: ")
    assert not [name for name in asked if name.startswith("migrate-set")], "nothing is changed"


DRIVE = {"file": "a.raw", "ro": False, "drv": "raw", "image": {"filename": "a.raw", "format": "raw"}}


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        [5],
        [{"qdev": 5}],
        [{"qdev": "disk", "inserted": {"ro": True}}],
        [{"qdev": "disk", "inserted": DRIVE | {"ro": "no"}}],
        [{"qdev": "disk", "inserted": DRIVE | {"image": {"filename": None, "format": "raw"}}}],
        [{"qdev": "disk", "inserted": DRIVE | {"image": {"filename": "\ud800", "format": "raw"}}}],
        [{"qdev": "disk", "inserted": DRIVE | {"image": {"filename": "x" * 100_000, "format": "raw"}}}],
    ],
    ids=["null", "object", "number", "device", "nothing", "access", "file", "half a character", "long"],
)
def test_disks_of_another_kind(work: Path, value: Any) -> None:
    """They are not known then; the snapshot is none the worse."""
    with monitor(work, usual(query_block=value)) as where, source(where) as here:
        with warns("which disks the guest has is not known, .*: query-block: this is no answer of a QEMU's") as said:
            assert here.disks() is None
        assert len(said[0]) < 600


def test_disks(work: Path) -> None:
    below = {"filename": "b.qcow2", "format": "qcow2", "backing-image": {"filename": "base", "format": "raw"}}
    filters = {"filename": "json:", "format": "copy-on-read", "backing-image": below}
    value = [
        {"device": "ide0-cd0", "qdev": "/machine/unattached/device[23]"},
        {"device": "spare", "inserted": DRIVE},
        {"device": "", "qdev": "disk", "inserted": DRIVE | {"node-name": "top", "ro": True, "image": filters}},
    ]
    with monitor(work, usual(query_block=value)) as where, source(where) as here:
        assert here.disks() == (Disk("b.qcow2", "qcow2", "top", "disk", read_only=True),)


@pytest.mark.parametrize("value", [None, {}, {"UUID": 5}, {"UUID": "guest"}, {"UUID": "00"}], ids=str)
def test_a_uuid_of_another_kind(work: Path, value: Any) -> None:
    answer = usual(query_uuid=value, query_status={"running": False, "status": "inmigrate"})
    with (
        monitor(work, answer) as where,
        Destination(where, channels=2, method="none", timeout=peers.TIMEOUT) as there,
        pytest.raises(PeerError, match="query-uuid: this is no answer of a QEMU's"),
    ):
        _ = there.uuid


@pytest.mark.parametrize(
    "value", [None, [], 5, "x", {}, {"qemu": 5}, [5], [{"name": "migrate-set-parameters"}]], ids=str
)
@pytest.mark.parametrize(
    "command",
    ["qom-get", "query-version", "query-memory-size-summary", "query-uuid", "query-qmp-schema", "query-migrate"],
)
def test_doctor_is_told_nonsense(work: Path, command: str, value: Any) -> None:
    good = {
        "qom-get": "pc-q35-10.0-machine",
        "query-version": {"qemu": {"major": 10, "minor": 0, "micro": 0}},
        "query-memory-size-summary": {"base-memory": 1},
        "query-qmp-schema": [{"name": "migrate-set-parameters", "arg-type": "1"}, {"name": "1", "members": []}],
    }
    answers = {key.replace("-", "_"): value for key, value in (good | {command: value}).items()}
    with monitor(work, usual(**answers)) as where, Monitor(where) as client:
        if (command, value) in (("qom-get", "x"), ("query-migrate", {}), ("query-migrate", {"qemu": 5})):
            examine(client)
            return
        with pytest.raises(PeerError) as caught:
            examine(client)
    one_line(caught.value, f"{where}: {command}: ")


def test_what_a_build_leaves_out_is_not_compared(work: Path) -> None:
    """It is said that it is not, and nothing is missing on the side that does not tell."""
    answers = usual(
        qom_get="pc-q35-10.0-machine",
        query_version={"qemu": {"major": 10, "minor": 0, "micro": 0}},
        query_memory_size_summary={"base-memory": 1 << 30},
        query_qmp_schema=[{"name": "migrate-set-parameters", "arg-type": "1"}, {"name": "1", "members": []}],
        query_migrate_capabilities=[{"capability": name, "state": True} for name in ("multifd", "return-path")],
    )

    def answer(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        said = answers(name, arguments)
        known = said["return"] or name in ("qmp_capabilities", "query-migrate")
        if known and arguments.get("property") != "memory":
            return said
        return {"error": {"class": "CommandNotFound", "desc": f"The command {name} has not been found"}}

    with monitor(work, answer) as where, Monitor(where) as client:
        bare = examine(client)
    full = replace(
        bare,
        status="inmigrate",
        memory_slots=3,
        ram_blocks=(RamBlock("pc.ram", 1 << 30, 1 << 30),),
        memory_devices=(MemoryDevice(1 << 32, "dimm", 1 << 20),),
        pci_devices={"00:01.0": PciDevice("e1000", 0x8086, 0x100E)},
        devices={"usb-tablet": 1},
        cpus=2,
        cpu="EPYC-x86_64-cpu",
        untold=(),
    )
    source, destination = replace(full, status="running"), replace(bare, status="inmigrate")
    for ours, theirs, who in ((source, destination, "destination"), (bare, full, "source")):
        assert compare(ours, theirs) == []
        assert [one.what for one in advise(ours, theirs)] == [
            (
                f"the {who} does not tell of its cpus, devices, memory slots, ram blocks, memory devices, pci devices, "
                "disks"
            )
        ]
    # ... and both are compared where both tell.
    less = replace(full, ram_blocks=(), pci_devices={}, devices={}, memory_devices=(), memory_slots=0, cpus=1, cpu="")
    assert len(compare(source, less)) == 7


@pytest.mark.parametrize(
    "value", [{}, {"tls-creds": 5}, {"multifd-channels": None}, {"multifd-compression": "\x1b"}], ids=str
)
def test_doctor_is_told_parameters_that_are_none(work: Path, value: Any) -> None:
    answers = {
        "qom_get": "\x1b-\u00b2.\u00b2",
        "query_version": {"qemu": {"major": 10, "minor": 0, "micro": 0}},
        "query_memory_size_summary": {"base-memory": 1},
        "query_qmp_schema": [{"name": "migrate-set-parameters", "arg-type": "1"}, {"name": "1", "members": []}],
        "query_migrate_capabilities": [{"capability": "multifd", "state": True}],
        "query_migrate_parameters": value,
    }
    with monitor(work, usual(**answers)) as where, Monitor(where) as client:
        try:
            side = examine(client)
        except PeerError as error:
            one_line(error, f"{where}: query-migrate-parameters: ")
            return
    for text in (describe(side), *(f"{trouble.what}: {trouble.remedy}" for trouble in compare(side, side))):
        assert text.isprintable()


def test_nothing_is_changed_where_the_guest_is_not_known_to_run(work: Path) -> None:
    asked = []

    def answer(name: str, _: dict[str, Any]) -> dict[str, Any]:
        asked.append(name)
        return {"error": {"desc": "not now"}} if name == "query-status" else {"return": {}}

    with monitor(work, answer) as where, pytest.raises(PeerError, match="query-status: QEMU says: not now"):
        source(where)
    assert asked == ["qmp_capabilities", "query-status"]


def test_a_setting_that_is_not_put_back_is_told_and_the_others_are(work: Path) -> None:
    put_back = []

    def answer(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        match name:
            case "query-migrate-parameters":
                return {"return": {"multifd-channels": 7}}
            case "migrate-set-parameters" if arguments == {"multifd-channels": 7}:
                return {"error": {"desc": "not now"}}
            case "migrate-set-capabilities":
                put_back.append({item["capability"]: item["state"] for item in arguments["capabilities"]})
        return {"return": USUAL.get(name, {})}

    with monitor(work, answer) as where:
        driver = source(where)
        with (
            warns("not put back as it was: multifd-channels: .*QEMU says: not now"),
            driver,
        ):
            assert put_back[0]["events"], "on for the time of the job"
            put_back.clear()
    assert put_back == [{"multifd": False, "events": False}]


def test_a_monitor_that_does_not_answer_is_not_asked_to_put_back_twice(work: Path) -> None:
    silent = threading.Event()
    asked = []

    def answer(name: str, _: dict[str, Any]) -> dict[str, Any]:
        if silent.is_set():
            asked.append(name)
            done.wait(peers.TIMEOUT)
        return {"return": {"multifd-channels": 7} if name == "query-migrate-parameters" else USUAL.get(name, {})}

    done = threading.Event()
    with monitor(work, answer) as where:
        driver = source(where, timeout=1)
        with warns("not put back as it was: multifd-channels, events, multifd: "), driver:
            silent.set()
        done.set()
    assert asked == ["migrate-set-parameters"]


def test_an_event_that_comes_while_an_answer_is_awaited_is_not_lost(work: Path) -> None:
    with monitor(work, lambda *_: {"return": 1}, before=EVENT) as where, Monitor(where) as client:
        assert client.await_change(0), "before the answer to qmp_capabilities"
        assert not client.await_change(0.01)
        assert client.command("x") == 1
        assert client.await_change(0)


def test_an_event_wakes_who_waits(work: Path) -> None:
    waits = threading.Event()

    def serve(sock: socket.socket) -> None:
        sock.sendall(GREETING)
        sock.recv(1000)
        sock.sendall(b'{"return": {}, "id": 1}\n')
        waits.wait(peers.TIMEOUT)
        sock.sendall(b'{"event": "STOP"}\n' + EVENT)

    with serving(work, serve) as where, Monitor(where) as client:
        assert not client.await_change(0.05)
        waits.set()
        assert client.await_change(peers.TIMEOUT)


def test_several_threads_take_turns(work: Path) -> None:
    with monitor(work, lambda name, _: {"return": name}, before=EVENT) as where, Monitor(where) as client:
        wrong = []

        def ask(name: str) -> None:
            for _ in range(100):
                if client.command(name) != name:
                    wrong.append(name)
                client.await_change(0)

        threads = [threading.Thread(target=ask, args=(f"of-{number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(peers.TIMEOUT)
        assert not wrong


def test_a_wait_of_qemus_is_named_once_and_its_end_is_an_event(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "LOOK", 0.05)
    statuses = iter([{}, *[{"status": "pre-switchover"}] * 6, {"status": "completed"}])
    with monitor(work, usual(query_migrate=statuses)) as where, source(where) as driver:
        with warns("waits in pre-switchover .*pause-before-switchover off.*migrate-continue") as said:
            driver.wait()
        assert len(said) == 1


@pytest.mark.parametrize("status", ["pre-switchover", "wait-unplug", "device", "colo", "postcopy-paused"])
@pytest.mark.may_warn(".*QEMU's migration waits")
def test_a_wait_that_does_not_end_is_the_error(work: Path, status: str) -> None:
    answers = chain([{}], repeat({"status": status}))
    with monitor(work, usual(query_migrate=answers)) as where, source(where, timeout=1) as driver:
        assert f"QEMU's migration waits in {status} " in driver.waits()
        with pytest.raises(PeerError, match=f"QEMU's migration waits in {status} "):
            driver.wait()


def test_nobody_waits_where_nothing_is_said(work: Path) -> None:
    done = threading.Event()
    asked = []

    def answer(name: str, _: dict[str, Any]) -> dict[str, Any]:
        asked.append(name)
        if asked.count("query-migrate") == 3:
            done.wait(peers.TIMEOUT)
        return {"return": {"status": "active"} if asked.count("query-migrate") > 1 else USUAL.get(name, {})}

    with monitor(work, answer) as where:
        driver = source(where)
        assert driver.waits() == ""
        assert driver.waits() == "", "blocked: no answer at once"
        done.set()
        driver.monitor.close()


def test_a_migration_is_cancelled_by_a_qemu_that_answers_late(work: Path) -> None:
    """Its main loop is blocked until our connections are reset: `cancel`, reset, `recover`."""
    was_reset = threading.Event()
    asked: list[str] = []

    def answer(name: str, _: dict[str, Any]) -> dict[str, Any]:
        asked.append(name)
        if name == "migrate_cancel":
            was_reset.wait(peers.TIMEOUT)
        if name == "query-migrate" and "migrate_cancel" in asked:
            return {"return": {"status": "cancelled"}}
        if name == "query-status":
            return {"return": {"running": "migrate_cancel" not in asked}}
        return {"return": USUAL.get(name, {})}

    with monitor(work, answer) as where, source(where) as driver:
        driver.cancel()
        was_reset.set()
        driver.recover(KeyboardInterrupt)
        assert asked[-4:] == ["migrate_cancel", "query-migrate", "query-status", "cont"]


def migration(status: str, *, listening: bool = False) -> Migration:
    return Migration(status, "", listening)


@pytest.mark.parametrize(
    ("guest", "status", "says"),
    [
        ("running", "none", None),
        ("paused", "completed", None),  # it came here itself, and goes on
        ("running", "failed", None),
        ("running", "cancelled", None),
        ("running", "setup", "is migrating already (setup): migrate_cancel"),
        ("running", "active", "is migrating already (active): migrate_cancel"),
        ("finish-migrate", "pre-switchover", "is migrating already (pre-switchover): migrate_cancel"),
        ("finish-migrate", "device", "is migrating already (device): migrate_cancel"),
        ("running", "cancelling", "is migrating already (cancelling): "),
        ("finish-migrate", "postcopy-active", "is migrating already (postcopy-active): let that end"),
        ("postmigrate", "completed", "guest stopped by a migration that is completed (postmigrate): cont"),
        ("finish-migrate", "failed", "guest stopped by a migration that is failed (finish-migrate): cont"),
        ("inmigrate", "none", "waits for a migration itself"),
    ],
)
def test_what_hinders_a_source(guest: str, status: str, says: str | None) -> None:
    found = source_obstacle(Guest(guest, running=guest == "running"), migration(status))
    assert (found and says in f"{found.what}: {found.remedy}") if says else found is None


def test_a_source_whose_devices_do_not_migrate() -> None:
    assert blocked(Migration.read({})) is None
    found = blocked(Migration.read({"blocked-reasons": ["non-migratable\ndevice: nvme", "another"]}))
    assert found is not None
    assert found.what == "does not migrate its guest: QEMU says: non-migratable\\ndevice: nvme (and 1 more)"


@pytest.mark.parametrize(
    ("guest", "status", "says"),
    [
        ("inmigrate", "none", None),
        ("inmigrate", "setup", None),
        ("inmigrate", "active", "has a migration coming in already (active): start it again"),
        ("inmigrate", "failed", "has had its migration, which is failed: start it again"),
        ("running", "completed", "is running, it does not wait: start it with -incoming defer"),
    ],
)
def test_what_hinders_a_destination(guest: str, status: str, says: str | None) -> None:
    found = destination_obstacle(Guest(guest, running=False), migration(status))
    assert (found and says in f"{found.what}: {found.remedy}") if says else found is None


def test_an_obstacle_is_told_before_anything_is_changed(work: Path) -> None:
    asked: list[str] = []
    with (
        monitor(work, usual(asked, query_migrate={"status": "active"})) as where,
        pytest.raises(MultifdError) as caught,
    ):
        source(where)
    assert str(caught.value) == (
        f"unix:{where} is migrating already (active): migrate_cancel on its monitor gives that up"
    )
    assert asked == ["qmp_capabilities", "query-status", "query-migrate"]


def test_what_a_killed_multifd_left_is_told(work: Path) -> None:
    on = [{"capability": name, "state": True} for name in ("events", "multifd", "return-path")]
    answer = usual(query_migrate={"status": "failed", "error-desc": "gone"}, query_migrate_capabilities=on)
    with monitor(work, answer) as where:
        with warns(r"is failed; QEMU says: gone, and multifd, return-path, events are on"):
            driver = source(where)
        driver.monitor.close()
