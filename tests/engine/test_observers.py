"""Observers see every byte, and can neither change nor break what they see."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import images
import multifd
import peers
import streams
from captures import Capture
from commands import fails, run
from multifd import hookspecs, open_snapshot
from multifd.codec import discovery
from multifd.codec.discovery import Provider
from multifd.errors import CallerError, HostError, PeerError, UsageError, describe
from multifd.jobs.report import Result
from multifd.observe import hooks
from multifd.observe.hooks import BACK, IN, OUT, ObservedChannel, Times
from multifd.observe.observers import Observers
from multifd.observe.watch import Watch
from multifd.wire.packet import INIT, InitPacket, RamPacket, header_length
from relaying import Relaying, closing
from told import warns

PAGE = 4096
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make these names observers, beside those installed."""
    installed = discovery._entry_points

    def entry_points(group: str) -> tuple[Provider, ...]:
        return (*installed(group), *(added if group == hookspecs.OBSERVER_GROUP else ()))

    added: list[Provider] = []
    monkeypatch.setattr(discovery, "_entry_points", entry_points)

    def add(**factories: Callable[[str], object]) -> None:
        for name, factory in factories.items():
            added.append(Provider(name, lambda factory=factory: factory, path="test"))  # type: ignore[misc]

    return add


def recorded(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def through_a_relay(work: Path, method: str, to: str | None, **observe: Sequence[str]) -> Result:
    """Image to snapshot; `observe` for sending, relaying and receiving."""
    there = peers.Receiving(work / "snap", observe=observe.get("receiving", ()))
    with closing(Relaying(there.uri, to=to, observe=observe.get("relaying", ()))) as relaying:
        result = multifd.send(
            open_snapshot(work / "image.raw"), relaying.uri, method, observe=observe.get("sending", ())
        )
        there.join()
        relaying.result()
    return result


@pytest.mark.parametrize("to", [None, "zstd", "none"])
def test_record_has_every_byte_of_every_side(work: Path, to: str | None) -> None:
    content = images.write_memory(work)
    sent = through_a_relay(
        work,
        "zlib",
        to,
        sending=[f"record={work}/sent"],
        relaying=[f"record={work}/relayed"],
        receiving=[f"record={work}/received"],
    )
    assert recorded(work / "sent") == recorded(work / "relayed" / "in")
    assert recorded(work / "received") == recorded(work / "relayed" / "out")
    assert (recorded(work / "sent") == recorded(work / "received")) == (to is None)
    assert sum(map(len, recorded(work / "sent").values())) == sent.wire_bytes
    assert sorted(recorded(work / "sent")) == ["ch0.bin", "ch1.bin", "main.bin"]
    for folder, method in ((work / "sent", "zlib"), (work / "received", to or "zlib")):
        found = multifd.inspect(folder)
        assert (found["method"], found["ended"], found["packets"]) == (method, "complete", sent.packets)
        multifd.receive(f"recording:{folder}", work / f"from-{folder.name}")
        assert (work / f"from-{folder.name}" / "0-pc.ram.raw").read_bytes() == content


def test_what_a_real_qemu_sent_is_recorded_as_it_is(work: Path, own_capture: dict[str, Capture]) -> None:
    """Also what QEMU 7.2 leaves in its headers from the packet before."""
    assert own_capture
    for capture in own_capture.values():
        folder = work / capture.name
        multifd.receive(f"recording:{capture.directory}", work / f"snap-{capture.name}", observe=[f"record={folder}"])
        again = recorded(folder)
        for name, original in zip(["main.bin", *sorted(again)[:-1]], capture.files(), strict=True):
            lost = len(original) - len(again[name])
            assert original.startswith(again[name])
            # What comes after the last SYNC is an end, or an empty packet that was cut.
            assert 0 <= lost < header_length(PAGE), (capture.name, name)
            assert not lost or name != "main.bin"


class Seeing:
    """Keeps copies of all that it is shown."""

    def __init__(self, argument: str = "") -> None:
        self.argument = argument
        self.main: dict[str, bytes] = {IN: b"", OUT: b"", BACK: b""}
        self.packets: list[tuple[ObservedChannel, RamPacket, bytes, bytes, Times]] = []
        self.calls: list[object] = []

    @hookspecs.hookimpl
    def multifd_observe_start(self, directions: Sequence[str]) -> None:
        self.calls.append(tuple(directions))

    @hookspecs.hookimpl
    def multifd_observe_main(self, direction: str, data: memoryview) -> None:
        assert data.readonly
        self.main[direction] += data

    @hookspecs.hookimpl
    def multifd_observe_packet(
        self,
        channel: ObservedChannel,
        packet: RamPacket,
        header: memoryview,
        payload: Sequence[memoryview],
        times: Times,
    ) -> None:
        assert header.readonly
        assert isinstance(payload, tuple)
        assert all(piece.readonly for piece in payload)
        self.packets.append((channel, packet, bytes(header), b"".join(payload), times))

    @hookspecs.hookimpl
    def multifd_observe_finish(self, complete: bool) -> None:
        self.calls.append(complete)


def test_all_is_shown_with_its_times(work: Path, install: Install) -> None:
    images.write_memory(work)
    seen: dict[str, Seeing] = {}

    def factory(argument: str) -> Seeing:
        seen[argument] = Seeing(argument)
        return seen[argument]

    install(seeing=factory)
    result = through_a_relay(
        work, "zlib", "zstd", sending=["seeing=a"], relaying=["seeing=b"], receiving=["seeing=c=d"]
    )
    assert [seen[name].calls for name in ("a", "b", "c=d")] == [[(OUT,), True], [(IN, OUT), True], [(IN,), True]]
    assert seen["a"].main[OUT] == seen["b"].main[IN] == seen["b"].main[OUT] == seen["c=d"].main[IN]
    assert seen["a"].main[BACK] == seen["b"].main[BACK] == seen["c=d"].main[BACK] != b""
    came = [entry for entry in seen["b"].packets if entry[0].direction == IN]
    went = [entry for entry in seen["b"].packets if entry[0].direction == OUT]
    for packets, method in ((seen["a"].packets, 1), (came, 1), (went, 2), (seen["c=d"].packets, 2)):
        assert len(packets) == result.packets
        assert sum(packet.sync for _, packet, *_ in packets) == 4
        for channel, packet, header, payload, times in packets:
            assert INIT.unpack(channel.init)[-1] == channel.id
            assert channel.page_size == PAGE
            assert RamPacket.unpack(header, PAGE) == packet
            assert len(payload) == packet.next_packet_size
            assert packet.method == (method if packet.normal or packet.zero else 0)
            assert min(times) >= 0
            coding = times.decode if channel.direction == IN else times.encode
            assert coding > 0 or not packet.normal
            assert (times.read > 0) == (channel.direction == IN and bool(packet.normal))
            assert (times.write > 0) == (channel.direction == OUT)
    assert sum(len(packet.zero) for _, packet, *_ in came) == result.zero_pages


def test_a_payloads_reading_is_not_the_codecs_time(install: Install) -> None:
    seen = Seeing()
    install(seeing=lambda _: seen)

    class Slow:
        def read_into(self, view: memoryview, *, at_least: int | None = None, due: bool = False) -> int:  # noqa: ARG002
            until = time.perf_counter() + 0.01
            while time.perf_counter() < until:
                pass
            return len(view)

    for stage in ("decode", "wait"):  # where payloads pass as they are, they are read while the packet is waited for
        watch = Observers(["seeing"]).watch(IN, InitPacket(bytes(16), 0), ("wait", "decode"))
        watch.begin(PAGE)
        started = time.perf_counter()
        watch.tee(Slow()).read_into(memoryview(bytearray(PAGE)))
        watch.clock.lap(stage)
        watch.packet(RamPacket(), bytes(header_length(PAGE)))
        elapsed = time.perf_counter() - started
        *_, payload, times = seen.packets.pop()
        assert times.read >= 0.01
        assert sum(times) <= elapsed
        assert len(payload) == PAGE


@pytest.mark.parametrize("error", [RuntimeError("no\nmore"), SystemExit(3)])
@pytest.mark.parametrize("hook", ["start", "main", "packet", "finish"])
def test_one_that_raises_is_dropped_with_one_line(
    work: Path, install: Install, hook: str, error: BaseException
) -> None:
    content = images.write_memory(work)
    called: list[str] = []

    class Raising:
        pass

    def make(name: str) -> Callable[..., None]:
        def raising(self: Raising) -> None:
            called.append(name)
            if name == hook:
                raise error

        raising.__name__ = f"multifd_observe_{name}"
        return hookspecs.hookimpl(raising)

    for name in ("start", "main", "packet", "finish"):
        setattr(Raising, f"multifd_observe_{name}", make(name))
    other = Seeing()
    install(raising=lambda _: Raising(), other=lambda _: other)
    there = peers.Receiving(work / "snap", channels=1)
    with warns("is dropped") as warned:
        result = multifd.send(
            open_snapshot(work / "image.raw"), there.uri, "zlib", channels=1, observe=["raising", "other"]
        )
        there.join()
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content
    assert warned == [f"observer raising (test) is dropped: multifd_observe_{hook} raised {describe(error)}"]
    assert called.count(hook) == 1 or hook == "finish"
    assert called[-1] == "finish"
    assert called.count("finish") == 1
    assert (other.calls, len(other.packets)) == ([(OUT,), True], result.packets), "the other one goes on"


def test_what_it_is_shown_cannot_be_changed(work: Path, install: Install) -> None:
    content = images.write_memory(work)

    class Writing:
        @hookspecs.hookimpl
        def multifd_observe_packet(self, header: memoryview, payload: Sequence[memoryview]) -> None:
            if payload:
                payload[0][0] ^= 1
            else:
                header[0] ^= 1

    install(writing=lambda _: Writing())
    with warns(r"writing \(test\) is dropped: .* cannot modify read-only memory"):
        through_a_relay(work, "none", "none", relaying=["writing"], sending=["writing"], receiving=["writing"])
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content


def test_one_that_is_dropped_stays_dropped_on_a_relay(work: Path, install: Install) -> None:
    images.write_memory(work)

    class Dropped(Seeing):
        @hookspecs.hookimpl
        def multifd_observe_main(self, direction: str, data: memoryview) -> None:  # noqa: ARG002
            raise RuntimeError("no")

    dropped, other = Dropped(), Seeing()
    install(dropped=lambda _: dropped, other=lambda _: other)
    with (
        warns(r"dropped \(test\) is dropped"),
        closing(Relaying(f"unix:{work}/there", migrations=2, observe=["dropped", "other"])) as relaying,
    ):
        for number in range(2):
            there = peers.Receiving(work / f"snap{number}", f"unix:{work}/there")
            multifd.send(open_snapshot(work / "image.raw"), relaying.uri, "zlib")
            there.join()
        relaying.join()
    assert (dropped.calls, dropped.packets) == ([(IN, OUT), False], [])
    assert other.calls == [(IN, OUT), True] * 2


def test_an_observer_that_cannot_be_made(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    class Misspelt:
        @hookspecs.hookimpl
        def multifd_observe_pakcet(self) -> None: ...

    class Asking:
        @hookspecs.hookimpl
        def multifd_observe_packet(self, pages: object) -> None: ...

    install(misspelt=lambda _: Misspelt(), asking=lambda _: Asking(), broken=lambda _: 1 / 0)
    for name, says in (("misspelt", "multifd_observe_pakcet"), ("asking", "pages"), ("broken", "ZeroDivisionError")):
        with pytest.raises(HostError, match=rf"observer {name} \(test\): .*{says}"):
            Observers([name])
    with pytest.raises(UsageError, match="no observer is named 'nobody'; installed: asking, broken, misspelt, record"):
        Observers(["nobody"])
    monkeypatch.setenv("MULTIFD_DISABLE", "trace")
    with pytest.raises(UsageError, match="the observer 'trace' is turned off"):
        Observers(["trace"])


def test_with_nobody_looking_on_nothing_is_copied() -> None:
    nobody = Observers()
    watch = nobody.watch(IN, InitPacket(bytes(16), 0), ())
    connection = object()
    assert type(watch) is Watch
    assert watch.tee(connection) is connection  # type: ignore[arg-type]
    assert nobody.watch_main(connection, read=IN, written=BACK) is connection  # type: ignore[arg-type]


def rows(line: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    found = json.loads(line)
    return found, found["channels"]


def test_stats_add_up_to_the_result(work: Path) -> None:
    images.write_memory(work)
    path = work / "stats.json"
    path.write_text('{"before": 1}\n')
    sent = through_a_relay(work, "zlib", "zstd", relaying=[f"stats={path}"])
    before, line = path.read_text().splitlines()
    assert before == '{"before": 1}', "a line is added"
    found, channels = rows(line)
    assert found["complete"]
    assert {(row["direction"], row["channel"], row["method"]) for row in channels} == {
        (direction, channel, method)
        for direction, method_there in ((IN, "zlib"), (OUT, "zstd"))
        for channel in (0, 1)
        for method in (method_there, None)
    }
    for direction in (IN, OUT):
        mine = [row for row in channels if row["direction"] == direction]
        total = {
            key: sum(row[key] for row in mine) for key in ("packets", "normal_pages", "zero_pages", "memory_bytes")
        }
        assert total == {
            "packets": sent.packets,
            "normal_pages": sent.normal_pages,
            "zero_pages": sent.zero_pages,
            "memory_bytes": sent.memory_bytes,
        }
        for row in mine:
            assert 0 <= sum(row["seconds"].values()) <= found["seconds"]
            assert (row["seconds"]["codec"] > 0) == (row["method"] is not None), "it works where there are pages"
            assert row["ratio"] == pytest.approx(row["memory_bytes"] / row["wire_bytes"], abs=1e-3)
    came = sum(row["wire_bytes"] for row in channels if row["direction"] == IN)
    assert came + 2 * INIT.size + found["main_bytes"][IN] == sent.wire_bytes
    assert found["main_bytes"][BACK] > 0


def test_trace_has_a_line_per_packet(work: Path) -> None:
    images.write_memory(work)
    sent = through_a_relay(work, "zlib", None, sending=[f"trace={work}/sent"], receiving=[f"trace={work}/received"])
    us = r"\d+us"
    for name, coding in (("sent", f"( encode={us})? write={us}"), ("received", f"( read={us} decode={us})?")):
        lines = (work / name).read_text().splitlines()
        assert len(lines) == sent.packets
        direction = OUT if name == "sent" else IN
        pages = r"zlib pc\.ram\+0x\w+ normal=\d+ zero=\d+ payload=\d+"
        for line in lines:
            assert re.fullmatch(
                rf"\d+\.\d{{6}} {direction} channel=[01] packet=\d+ ({pages}|SYNC) wait={us}{coding}", line
            )
        normal = sum(map(int, re.findall(r"normal=(\d+)", "\n".join(lines))))
        assert normal == sent.normal_pages
        assert sum("SYNC" in line for line in lines) == 4


def test_where_it_cannot_write_nobody_connects(work: Path) -> None:
    (work / "image.raw").write_bytes(bytes(PAGE))
    (work / "there").mkdir()
    (work / "cut.incomplete").mkdir()
    for observer, says in (
        (f"record={work}/there", "there exists already: choose another, or remove it"),
        (f"record={work}/cut", "cut.incomplete exists already"),
        (f"record={work}/no/rec", "no is no directory that can be written to"),
        (f"stats={work}/no/stats", r"--observe stats=.*: No such file or directory"),
        (f"trace={work}", r"--observe trace=.*: Is a directory"),
    ):
        with pytest.raises(CallerError, match=says):
            multifd.send(open_snapshot(work / "image.raw"), f"unix:{work}/nobody", observe=[observer])
        with pytest.raises(CallerError, match=says):
            multifd.receive(f"unix:{work}/here", work / "snap", observe=[observer])
        with pytest.raises(CallerError, match=says):
            Relaying(f"unix:{work}/nobody", observe=[observer])
    fails(2, "record: say where to, record=DIR", "send", work / "image.raw", f"unix:{work}/x", "--observe", "record")
    assert sorted(path.name for path in work.iterdir()) == ["cut.incomplete", "image.raw", "there"]


def test_a_migration_that_fails_leaves_nothing_that_looks_whole(work: Path) -> None:
    stream = streams.small("zlib", channels=2, return_path=True)
    last = header_length(65536)  # the last SYNC
    stream.channels[1] = stream.channels[1][:-last] + bytes(last)
    here = peers.Receiving(work / "snap", observe=[f"record={work}/rec", f"stats={work}/stats"])
    peers.play(here.uri, [stream.main, *stream.channels], 1 << 20)
    with pytest.raises(PeerError, match="channel 1: magic 0x00000000"):
        here.join()
    assert not (work / "rec").exists()
    assert multifd.inspect(work / "rec.incomplete")["ended"] != "complete"
    assert not json.loads((work / "stats").read_text())["complete"]


def test_a_relays_second_migration_is_recorded_beside_the_first(work: Path) -> None:
    images.write_memory(work)
    with closing(Relaying(f"unix:{work}/there", migrations=2, observe=[f"record={work}/rec"])) as relaying:
        for number in range(2):
            there = peers.Receiving(work / f"snap{number}", f"unix:{work}/there", observe=[f"record={work}/r{number}"])
            multifd.send(open_snapshot(work / "image.raw"), relaying.uri, ("zlib", "zstd")[number])
            there.join()
        relaying.join()
    assert recorded(work / "rec" / "out") == recorded(work / "r0")
    assert recorded(work / "rec-2" / "out") == recorded(work / "r1") != recorded(work / "r0")


def test_a_full_disk_ends_the_recording_not_the_migration(work: Path) -> None:
    content = images.write_memory(work)
    there = peers.Receiving(work / "snap")
    command = [sys.executable, "-m", "multifd", "send", str(work / "image.raw"), there.uri]
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "-", *command, "--observe", f"record={work}/rec"]
    sent = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
    there.join()
    assert sent.returncode == 0, sent.stderr
    (line,) = sent.stderr.splitlines()
    assert re.fullmatch(r"multifd: warning: observer record \(multifd-core .*\) is dropped: .* File too large", line)
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content
    assert not (work / "rec").exists()
    assert (work / "rec.incomplete").exists()


def test_on_the_command_line(work: Path) -> None:
    stream = streams.small("zlib", channels=2)
    stream.write(work / "recording")
    result = run(
        *("receive", f"recording:{work}/recording", "-o", work / "snap", "--json", "--observe", "stats"),
        *("--observe", f"trace={work}/trace", "--observe", f"record={work}/again"),
    )
    assert result.returncode == 0, result.stderr
    packets = json.loads(result.stdout)["packets"]
    found, channels = rows(result.stderr)
    assert found["complete"]
    assert sum(row["packets"] for row in channels) == len((work / "trace").read_text().splitlines()) == packets
    assert recorded(work / "again") == recorded(work / "recording")
    assert os.stat(work / "again" / "ch0.bin").st_mode & 0o077 == 0, "guest memory is nobody else's business"


def test_every_hook_is_documented() -> None:
    names = [name for name in dir(hooks) if name.startswith("multifd_")]
    assert len(names) == 4
    for name in names:
        assert getattr(hooks, name).__doc__, name
