"""Real QEMUs whose devices send sections before RAM is complete: a snapshot's round trip, and a relay between two."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import multifd
import peers
from qemus import MIB, Qemu, Start, content
from relaying import Relaying, closing

RELEASE = "10.0"
POOL = 64 << 20
GRANULARITY = 65536


def virtio_mem(folder: Path, name: str, plugged: str = "0") -> Sequence[str]:
    """A guest's options with a region that is plugged piece by piece, kept in a file."""
    pool = folder / f"{name}.pool"
    return (
        *("-m", f"{MIB}M,maxmem=1G,slots=2"),
        *("-object", f"memory-backend-file,id=pool,size={POOL},mem-path={pool},share=on"),
        *("-device", f"virtio-mem-pci,id=vm0,memdev=pool,requested-size={plugged}"),
    )


def disk(folder: Path, name: str) -> Sequence[str]:
    path = folder / f"{name}.qcow2"
    subprocess.run(["truncate", "-s", "64M", path], check=True)
    return (
        *("-blockdev", f"driver=file,node-name=file0,filename={path}"),
        *("-blockdev", "driver=raw,node-name=disk0,file=file0"),
        *("-device", "virtio-blk-pci,drive=disk0,share-rw=on"),
    )


def bitmaps(qemu: Qemu) -> list[dict[str, Any]]:
    """Of `disk0`, as the monitor tells them."""
    (node,) = (node for node in qemu.monitor.command("query-named-block-nodes") if node["node-name"] == "disk0")
    return [
        {key: found[key] for key in ("name", "granularity", "recording", "count")} for found in node["dirty-bitmaps"]
    ]


def received(source: Qemu, snapshot: Path, **options: Any) -> None:
    job = peers.Receiving(snapshot, **options)
    source.monitor.command("migrate", uri=job.uri)
    job.join()
    source.wait("completed")


def test_virtio_mem_makes_the_round_trip(start: Start, work: Path) -> None:
    source = start(RELEASE, "source", more=virtio_mem(work, "source"))
    source.fill(content())
    source.prepare(return_path=True)
    received(source, work / "snap", missing_allowed=True)
    assert multifd.inspect(work / "snap")["early_state_bytes"] > 0
    target = start(RELEASE, "target", incoming=True, more=virtio_mem(work, "target"))
    target.prepare()
    uri = target.listen(f"unix:{work}/incoming")
    multifd.send(work / "snap", uri, timeout=peers.TIMEOUT)
    target.wait("completed")
    assert target.ram.read_bytes() == content()
    (device,) = target.monitor.command("query-memory-devices")
    assert (device["data"]["size"], device["data"]["max-size"]) == (0, POOL)


@pytest.mark.parametrize("to", [None, "zlib"])
def test_a_relay_between_two(start: Start, work: Path, to: str | None) -> None:
    source = start(RELEASE, "source", more=virtio_mem(work, "source"))
    source.fill(content())
    source.prepare(return_path=True)
    target = start(RELEASE, "target", incoming=True, more=virtio_mem(work, "target"))
    target.prepare(method=to or "none")
    with closing(Relaying(target.listen(f"unix:{work}/incoming"), to=to)) as relaying:
        source.monitor.command("migrate", uri=relaying.uri)
        outcome = relaying.result()
    assert outcome.confirmed
    assert outcome.rounds_checked
    target.wait("completed")
    assert target.ram.read_bytes() == content()


def test_dirty_bitmaps_make_the_round_trip(start: Start, work: Path) -> None:
    source = start(RELEASE, "source", more=disk(work, "source"))
    source.fill(content())
    source.monitor.command("block-dirty-bitmap-add", node="disk0", name="since-monday", granularity=GRANULARITY)
    source.monitor.command("human-monitor-command", command_line='qemu-io disk0 "write 1M 192k"')
    there = bitmaps(source)
    assert there == [{"name": "since-monday", "granularity": GRANULARITY, "recording": True, "count": 3 * GRANULARITY}]
    source.prepare(return_path=True, dirty_bitmaps=True)
    received(source, work / "snap")
    target = start(RELEASE, "target", incoming=True, more=disk(work, "target"))
    target.prepare(dirty_bitmaps=True)
    uri = target.listen(f"unix:{work}/incoming")
    multifd.send(work / "snap", uri, timeout=peers.TIMEOUT)
    target.wait("completed")
    assert bitmaps(target) == there
