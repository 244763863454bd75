"""Guests of real QEMUs that go on at the destination while their memory follows (postcopy), through relays."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guest import Guest
from peers import eventually
from processes import Command
from qemus import Qemu, Start, content
from relaying import Relaying, closing

#: Of those that can be had, the one that takes postcopy together with multifd on both sides.
RELEASE = "11.1"
PASSED_ON = "; passed on, confirmed by the destination; rounds not checked"


@contextmanager
def relay(work: Path, target: Qemu, *options: object) -> Iterator[Command]:
    """The command, before a target that waits behind it; its log is `target`'s name."""
    name = target.log.stem
    target.monitor.command("migrate-incoming", uri=f"unix:{work}/{name}")
    command = Command(
        work / f"{name}.relay",
        *("relay", "--listen", f"unix:{work}/to-{name}", "--connect", f"unix:{work}/{name}", *options),
    )
    try:
        command.listens()
        yield command
    finally:
        command.close()


def ram(source: Qemu, what: str) -> int:
    return int(source.monitor.command("query-migrate").get("ram", {}).get(what, 0))


def prepare(source: Qemu, target: Qemu, *, method: str = "none", rate: int) -> None:
    """Postcopy on at both; after the switch so many bytes a second come unasked."""
    source.prepare(return_path=True, postcopy_ram=True, max_bandwidth=20_000_000, max_postcopy_bandwidth=rate)
    target.prepare(method=method, postcopy_ram=True)
    target.monitor.command("cont")  # it does once the guest has come


def switch(work: Path, source: Qemu, target: Qemu) -> None:
    """Migrate, and let the guest go on there when some of its pages have gone over the channels."""
    source.monitor.command("migrate", uri=f"unix:{work}/to-{target.log.stem}")
    assert eventually(lambda: ram(source, "normal") > 1500)
    source.monitor.command("migrate-start-postcopy")
    source.wait("postcopy-active")
    assert eventually(lambda: target.monitor.command("query-status")["running"])


def completed(*qemus: Qemu) -> None:
    for qemu in qemus:
        qemu.wait("completed")


@pytest.mark.timeout(300)
def test_a_guest_goes_on_while_its_memory_follows(start: Start, work: Path) -> None:
    """As it came, and for longer than a timeout; compressed anew; and with postcopy that is on and not used."""
    linux = Guest(start, work, RELEASE, RELEASE, shared=False)
    source, target = linux.qemu, linux.new("second")
    prepare(source, target, rate=20_000_000)
    with relay(work, target, "--timeout", 3, "--migrations", 1) as command:
        switch(work, source, target)
        target.process.send_signal(signal.SIGSTOP)
        time.sleep(4)  # for longer than the timeout nothing moves
        target.process.send_signal(signal.SIGCONT)
        completed(source, target)
        assert command.ends() == 0
    assert ram(source, "postcopy-requests") > 0
    assert command.log.read_text().rstrip().endswith(PASSED_ON)
    linux.beats(3)

    source, target = target, linux.new("third")
    prepare(source, target, method="zlib", rate=100_000_000)
    with relay(work, target, "--to", "zlib", "--migrations", 1) as command:
        switch(work, source, target)
        completed(source, target)
        assert command.ends() == 0
    assert command.log.read_text().rstrip().endswith(PASSED_ON)
    linux.beats(3)

    source, target = target, linux.new("fourth")
    prepare(source, target, method="zlib", rate=0)
    source.monitor.command("migrate-set-parameters", max_bandwidth=1 << 30, downtime_limit=2000)
    with relay(work, target, "--to", "zlib", "--migrations", 1) as command:
        source.monitor.command("migrate", uri=f"unix:{work}/to-fourth")
        completed(source, target)
        assert command.ends() == 0
    assert "relayed" in command.log.read_text()
    assert "not checked" not in command.log.read_text()
    linux.beats(3)


@pytest.mark.timeout(300)
def test_a_signal_waits_for_a_guest_in_two_places(start: Start, work: Path) -> None:
    """A second one does not, and the guest's QEMUs can be brought together again without the relay."""
    linux = Guest(start, work, RELEASE, RELEASE, shared=False)
    source, target = linux.qemu, linux.new("second")
    prepare(source, target, rate=15_000_000)
    with relay(work, target) as command:
        switch(work, source, target)
        command.send(signal.SIGTERM)
        assert eventually(lambda: b"a second signal ends it" in command.log.read_bytes())
        completed(source, target)
        assert command.ends() == 0
    assert command.log.read_text().rstrip().endswith(PASSED_ON)
    linux.beats(2)

    source, target = target, linux.new("third")
    prepare(source, target, rate=5_000_000)
    with relay(work, target) as command:
        switch(work, source, target)
        command.send(signal.SIGTERM)
        assert eventually(lambda: b"a second signal ends it" in command.log.read_bytes())
        command.send(signal.SIGTERM)
        assert command.ends(5) == 128 + signal.SIGTERM
    source.wait("postcopy-paused")
    target.wait("postcopy-paused")
    source.monitor.command("migrate-set-parameters", max_postcopy_bandwidth=0)
    with relay(work, fourth := linux.new("fourth")) as command:
        source.monitor.command("migrate", uri=f"unix:{work}/to-fourth", resume=True)
        assert eventually(lambda: b"goes on with a postcopy that was cut" in command.log.read_bytes())
        assert eventually(lambda: source.status() == "postcopy-paused")
        assert fourth.monitor.command("query-status")["status"] == "inmigrate"
    target.monitor.command("migrate-recover", uri=f"unix:{work}/again")
    source.monitor.command("migrate", uri=f"unix:{work}/again", resume=True)
    completed(source, target)
    linux.beats(2)


@pytest.mark.may_warn("passes unread, and rounds are not checked")
def test_every_byte_arrives_over_tls(start: Start, work: Path, creds: Path) -> None:
    """Of a guest that is paused, whose memory is in a file at both sides."""
    ends = [
        ["-object", f"tls-creds-x509,id=tls0,dir={creds},endpoint={endpoint},verify-peer=on"]
        for endpoint in ("client", "server")
    ]
    source, target = start(RELEASE, "source", more=ends[0]), start(RELEASE, "target", incoming=True, more=ends[1])
    source.fill(content())
    source.prepare(return_path=True, postcopy_ram=True, tls_creds="tls0", max_bandwidth=4_000_000)
    target.prepare(method="zlib", postcopy_ram=True, tls_creds="tls0")
    where = target.listen("tcp:127.0.0.1:0")
    with closing(Relaying(where, to="zlib", listen_tls_creds=creds, connect_tls_creds=creds)) as relaying:
        source.monitor.command("migrate", uri=relaying.uri)
        assert eventually(lambda: ram(source, "normal") > 200)
        source.monitor.command("migrate-start-postcopy")
        completed(source, target)
        result = relaying.result()
    assert target.ram.read_bytes() == content()
    assert (result.confirmed, result.rounds_checked) == (True, False)


def test_a_relay_names_a_source_that_went(start: Start, work: Path) -> None:
    source, target = start(RELEASE, "source", shared=False), start(RELEASE, "target", shared=False, incoming=True)
    source.monitor.command("cont")
    prepare(source, target, rate=1_000_000)
    source.monitor.command("migrate-set-parameters", max_bandwidth=1_000_000)
    with relay(work, target, "--migrations", 1) as command:
        source.monitor.command("migrate", uri=f"unix:{work}/to-target")
        assert eventually(lambda: ram(source, "dirty-sync-count") > 1)
        source.monitor.command("migrate-start-postcopy")
        source.wait("postcopy-active")
        source.process.kill()
        assert command.ends() == 1
    target.wait("postcopy-paused")
    said = command.log.read_text()
    assert "the source ended early: cancelled, or gone; the guest's memory is in two places (postcopy): say" in said


def test_one_more_connection_of_a_source_is_named(start: Start, work: Path) -> None:
    """postcopy-preempt: nothing tells whose it is.  The guest goes on at its source."""
    source, target = start(RELEASE, "source", shared=False), start(RELEASE, "target", shared=False, incoming=True)
    source.monitor.command("cont")
    for qemu in (source, target):
        qemu.prepare(return_path=True, postcopy_ram=True, postcopy_preempt=True, max_bandwidth=1_000_000)
    with relay(work, target, "--timeout", 2, "--migrations", 1) as command:
        source.monitor.command("migrate", uri=f"unix:{work}/to-target")
        assert eventually(lambda: ram(source, "dirty-sync-count") > 1)
        source.monitor.command("migrate-start-postcopy")
        source.wait("failed")
        assert command.ends() == 1
    assert "turn postcopy-preempt off on both sides" in command.log.read_text()
    assert source.monitor.command("query-status")["running"]


def test_receive_says_how_to_turn_it_off(start: Start, work: Path) -> None:
    source = start(RELEASE, "source")
    source.fill(content())
    source.monitor.command("cont")
    source.prepare(postcopy_ram=True, return_path=True)
    receive = Command(work / "receive.log", "receive", f"unix:{work}/here", "-o", work / "snap")
    try:
        receive.listens()
        source.monitor.command("migrate", uri=f"unix:{work}/here")
        source.wait("failed")
        assert receive.ends() == 1
    finally:
        receive.close()
    said = receive.log.read_text().splitlines()[-1]
    assert said.endswith(
        "belongs to postcopy: turn postcopy-ram off on the source (receive --qmp does), this side cannot take it"
    )
    assert source.monitor.command("query-status")["running"]
