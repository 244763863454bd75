"""Two real QEMUs that do not fit, told before anything moves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from commands import run
from examples import examples
from multifd.jobs.doctor import compare, examine
from multifd.qemu.monitor import Monitor
from qemus import Start


def differences(start: Start, source: dict[str, Any], destination: dict[str, Any]) -> list[str]:
    """What is found between two, each given by `release`, what it starts with and what is set (`set`)."""
    sides = []
    for name, options in (("source", source), ("destination", destination)):
        settings = options.pop("set", {})
        qemu = start(options.pop("release", "10.0"), name, incoming=name == "destination", **options)
        if settings is not None:
            qemu.prepare(**settings)
        sides.append(examine(qemu.monitor))
    return [f"{trouble.what}: {trouble.remedy}" for trouble in compare(*sides)]


MISTAKES = [
    ({}, {}, []),
    ({"set": {"method": "zlib"}}, {"release": "7.2", "machine": "pc-q35-7.2", "set": {"method": "zlib"}}, None),
    ({"set": None}, {}, ["multifd is off on the source: on the source's monitor: migrate_set_capability multifd on"]),
    (
        {},
        {"set": None},
        ["multifd is off on the destination: on the destination's monitor: migrate_set_capability multifd on"],
    ),
    (
        {"set": {"channels": 4}},
        {"set": {"channels": 2}},
        ["multifd-channels differ: 4 and 2: on the destination's monitor: migrate_set_parameter multifd-channels 4"],
    ),
    (
        {"set": {"method": "zlib"}},
        {"set": {"method": "zstd"}},
        [
            (
                "multifd-compression differs: zlib and zstd: set multifd-compression to zlib on the destination, or "
                "set multifd-compression to zstd on the source, or put a relay between them, with --from zlib "
                "--to zstd"
            )
        ],
    ),
    (
        {"mib": 32},
        {},
        ["memory sizes differ: 32M and 24M: start the destination with -m 32M"],
    ),
    (
        {"machine": "pc-q35-9.0"},
        {"machine": "pc-q35-9.1"},
        ["machine types differ: pc-q35-9.0 and pc-q35-9.1: start the destination with -machine pc-q35-9.0"],
    ),
    (
        {"set": {"multifd": False, "postcopy_ram": True}},
        {},
        [
            "multifd is off on the source: on the source's monitor: migrate_set_capability multifd on",
            "postcopy-ram is on on the source: on the source's monitor: migrate_set_capability postcopy-ram off",
        ],
    ),
    (
        {"set": {"tls_creds": "tls0"}},
        {},
        [
            (
                "TLS is on on the source (tls0), not on the destination: set tls-creds on the destination, or put a "
                "relay beside it, with --listen-tls-creds"
            )
        ],
    ),
]


@pytest.mark.parametrize(("source", "destination", "expected"), MISTAKES, ids=lambda value: str(value)[:40])
def test_what_would_fail(
    start: Start, source: dict[str, Any], destination: dict[str, Any], expected: list[str] | None
) -> None:
    found = differences(start, dict(source), dict(destination))
    if expected is None:
        assert [line.partition(":")[0] for line in found] == [
            "machine types differ",
            "the source may send switchover-start, which a destination before 10.0 refuses",
            "the source puts zero pages into packets, which a destination before 9.0 does not read",
        ]
    else:
        assert found == expected


def test_a_good_pair_of_different_releases(start: Start) -> None:
    old = {"machine": "pc-q35-7.2"}
    assert differences(start, old | {"release": "7.2"}, dict(old)) == []


def test_a_good_pair_the_other_way(start: Start) -> None:
    """A new QEMU with an old machine type sends what the old one reads."""
    old = {"machine": "pc-q35-7.2"}
    assert differences(start, dict(old), old | {"release": "7.2"}) == []


def test_a_destination_that_does_not_wait(start: Start) -> None:
    source, destination = start("10.0", "source"), start("10.0", "destination")
    found = compare(examine(source.monitor), examine(destination.monitor))
    assert "the destination is prelaunch, it does not wait" in [trouble.what for trouble in found]


def test_another_uuid_and_a_release_too_old(start: Start) -> None:
    side = examine(start("7.2", "source").monitor)
    other = replace(side, version=(6, 0, 0), uuid="11111111-2222-3333-4444-555555555555")
    told = {trouble.what for trouble in compare(side, other)}
    assert f"uuids differ: {side.uuid} and {other.uuid}" in told
    assert "the destination is QEMU 6.0.0: older than 7.2, the oldest tried" in told
    assert set(side.methods) >= {"none", "zlib", "zstd"}


def test_on_the_command_line(start: Start, work: Path) -> None:
    source, destination = start("10.0", "source"), start("10.0", "destination", incoming=True)
    source.prepare(method="zstd", channels=3)
    destination.prepare(method="zstd", channels=3)
    for qemu in (source, destination):
        qemu.monitor.close()
    where = ("--source-qmp", f"{work}/source.qmp", "--destination-qmp", f"{work}/destination.qmp")
    good = run("doctor", *where)
    assert (good.returncode, good.stderr) == (0, "")
    assert "multifd zstd, 3 channels" in good.stdout
    assert "return-path is off on the source" in good.stdout
    assert "migrate_set_capability return-path on\n" in good.stdout
    assert good.stdout.endswith("nothing is seen that would fail\n")
    source.reconnect()
    source.prepare(method="zstd", channels=3, return_path=True)
    source.monitor.close()
    assert "return-path" not in run("doctor", *where).stdout
    destination.reconnect()
    destination.prepare(method="none", channels=3)
    destination.monitor.close()
    bad = run("doctor", *where, "--json")
    assert bad.returncode == 1
    (trouble,) = json.loads(bad.stdout)["troubles"]
    assert trouble["what"] == "multifd-compression differs: zstd and none"
    nobody = run("doctor", "--source-qmp", f"{work}/nobody", "--destination-qmp", f"{work}/destination.qmp")
    assert (nobody.returncode, len(nobody.stderr.splitlines())) == (1, 1)
    assert "is QEMU's monitor listening there?" in nobody.stderr


@pytest.mark.parametrize("where", ["multifd.jobs.doctor", "multifd.qemu.monitor"])
def test_the_examples_run(
    start: Start, work: Path, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("here", "there"):
        start("10.0", name, incoming=name == "there").monitor.close()
    monkeypatch.chdir(work)
    exec(examples()[where], {"Monitor": Monitor})
    assert capsys.readouterr().out
