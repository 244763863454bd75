"""The disks of a real QEMU's guest, which are not in its snapshot: they are named wherever they count."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

import multifd
import peers
from commands import run
from qemus import Qemu, Start, content
from told import warns

RELEASES = ("7.2", "10.0", "11.1")
CLUSTER = 1 << 16


def qcow2(path: Path) -> Path:
    """An empty one of 1 MiB: header, the table of tables, and the count of these clusters."""
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, 16, 1 << 20, 0, 1, CLUSTER, 2 * CLUSTER, 1, 0, 0)
    counts = struct.pack(">4H", 1, 1, 1, 1)
    clusters = (head, b"", struct.pack(">Q", 3 * CLUSTER), counts)
    path.write_bytes(b"".join(cluster.ljust(CLUSTER, b"\0") for cluster in clusters))
    return path


def disks(work: Path) -> list[str]:
    """Options for all kinds: qcow2, raw behind a throttle, a CD, a flash, an empty drive, one that no device has."""
    for name, size in (("data.raw", 1 << 20), ("cd.iso", 1 << 20), ("vars.fd", 4 << 20), ("spare.raw", 4096)):
        if not (work / name).exists():
            (work / name).write_bytes(bytes(size))
    root = work / "root.qcow2"
    if not root.exists():
        qcow2(root)
    nodes: list[dict[str, object]] = [
        {"driver": "qcow2", "node-name": "root", "file": {"driver": "file", "filename": str(root)}},
        {"driver": "raw", "node-name": "data", "file": {"driver": "file", "filename": str(work / "data.raw")}},
        {"driver": "throttle", "node-name": "slow", "throttle-group": "limits", "file": "data"},
        {"driver": "file", "node-name": "spare", "filename": str(work / "spare.raw")},
    ]
    return [
        *("-object", "throttle-group,id=limits"),
        *(word for node in nodes for word in ("-blockdev", json.dumps(node))),
        *("-device", "virtio-blk-pci,drive=root,id=first", "-device", "virtio-blk-pci,drive=slow"),
        *("-drive", f"if=none,id=cd,media=cdrom,readonly=on,format=raw,file={work}/cd.iso"),
        *("-device", "ide-cd,drive=cd,id=cdrom", "-device", "ide-cd,bus=ide.3"),
        *("-drive", f"if=pflash,unit=0,format=raw,file={work}/vars.fd"),
    ]


def source(start: Start, work: Path, release: str) -> Qemu:
    # 10.0 makes queues of virtio longer than 11.1 takes: each restores its own.
    qemu = start(release, "source", more=disks(work))
    qemu.fill(content())
    return qemu


@pytest.mark.parametrize("release", RELEASES)
def test_they_are_named_wherever_they_count(start: Start, work: Path, release: str) -> None:
    qemu = source(start, work, release)
    qemu.monitor.close()
    command = ("receive", f"unix:{work}/here", "-o", work / "snap", "--qmp", work / "source.qmp", "--then", "quit")
    taken = run(*command)
    assert taken.returncode == 0, taken.stderr
    (said,) = [line for line in taken.stderr.splitlines() if "disk" in line]
    assert said.startswith("multifd: the guest's disks are not in the snapshot: keep them with it as they are now: ")
    assert sorted(said.removesuffix(")").partition("now: ")[2].split("), ")) == [
        f"{work}/data.raw (raw, node slow",
        f"{work}/root.qcow2 (qcow2, node root",
        f"{work}/vars.fd (raw",
    ]
    found = {disk["file"].rpartition("/")[2]: disk for disk in multifd.inspect(work / "snap")["disks"]}
    assert found.keys() == {"root.qcow2", "data.raw", "cd.iso", "vars.fd"}
    assert found["root.qcow2"] == {
        "file": f"{work}/root.qcow2",
        "format": "qcow2",
        "node": "root",
        "device": "/machine/peripheral/first/virtio-backend",
        "read_only": False,
    }
    assert (found["cd.iso"]["device"], found["cd.iso"]["read_only"]) == ("cdrom", True)
    assert found["vars.fd"]["device"] == "/machine/system.flash0"
    shown = run("inspect", work / "snap").stdout
    assert f"disk               {work}/data.raw: raw, node slow, /machine/peripheral-anon/" in shown

    assert qemu.process.wait(peers.TIMEOUT) == 0
    target = start(release, "target", incoming=True, more=disks(work))
    target.monitor.close()
    sent = run("send", work / "snap", f"unix:{work}/there", "--qmp", work / "target.qmp")
    assert sent.returncode == 0, sent.stderr
    (said,) = sent.stderr.splitlines()
    assert said.startswith("multifd: the destination is to have the guest's disks as they were then: ")
    assert f"{work}/cd.iso (raw, read-only)" in said
    assert f"{work}/root.qcow2 (qcow2, node root)" in said
    assert target.ram.read_bytes() == content()


@pytest.mark.parametrize("release", RELEASES)
def test_a_guest_that_goes_on_writes_to_them(start: Start, work: Path, release: str) -> None:
    """Another medium is in the drive by the time its memory has come."""
    qemu = source(start, work, release)
    (work / "other.iso").write_bytes(bytes(4096))
    qemu.monitor.command("blockdev-change-medium", id="cdrom", filename=str(work / "other.iso"), format="raw")
    qemu.monitor.command("cont")
    qemu.monitor.close()
    with warns(r"the guest goes on and writes to its disks, .*root.qcow2 .*: to have both as of .*--then stop, copy"):
        multifd.receive(
            f"unix:{work}/here", work / "snap", qmp=str(work / "source.qmp"), then="resume", timeout=peers.TIMEOUT
        )
    qemu.reconnect()
    assert qemu.monitor.command("query-status")["running"]
    assert f"{work}/other.iso" in {disk["file"] for disk in multifd.inspect(work / "snap")["disks"]}


@pytest.mark.parametrize("release", RELEASES)
def test_a_guest_without_disks_has_none(start: Start, work: Path, release: str) -> None:
    start(release, "source").monitor.close()
    taken = run("receive", f"unix:{work}/here", "-o", work / "snap", "--qmp", work / "source.qmp")
    assert taken.stderr == f"multifd: listening on unix:{work}/here\n"
    assert multifd.inspect(work / "snap")["disks"] == []
    assert "disk " not in run("inspect", work / "snap").stdout
