"""What a user is told when a real QEMU does not take a snapshot, or does not give its guest away."""

from __future__ import annotations

from pathlib import Path

import pytest

import multifd
import peers
from commands import fails
from multifd.errors import CallerError, PeerError, UsageError
from qemus import Qemu, Start, content

RELEASES = ("7.2", "10.0", "11.1")
#: A machine type that all of them have, and an older one.
MACHINE, OTHER = "pc-q35-7.2", "pc-q35-7.1"
RNG = ("-device", "virtio-rng-pci,bus=pcie.0,addr=05")
BLOCKS = "RAM blocks pc.ram 24 MiB, pc.bios 256 KiB, "


def captured(start: Start, work: Path, release: str) -> None:
    """A snapshot of a guest with a device that not every destination has."""
    source = start(release, "source", machine=MACHINE, more=RNG)
    source.fill(content())
    source.monitor.close()
    multifd.receive(f"unix:{work}/here", work / "snap", qmp=str(work / "source.qmp"), timeout=peers.TIMEOUT)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(
    ("differs", "reason"),
    [
        ("memory", "error while loading state for instance 0x0 of device 'ram'"),
        ("firmware", "error while loading state for instance 0x0 of device 'ram'"),
        ("device", "Unknown section or instance '0000:00:05.0/virtio-rng'"),
        ("machine", f"Machine type received is '{MACHINE}' and local is '{OTHER}'"),
    ],
)
def test_a_destination_that_refuses_says_why(start: Start, work: Path, release: str, differs: str, reason: str) -> None:
    """And what it was shown is beside that.  10.0 tells its log alone, and 7.2 has gone."""
    captured(start, work, release)
    (work / "small.rom").write_bytes(bytes(128 << 10))
    target = start(
        release,
        "target",
        incoming=True,
        machine=OTHER if differs == "machine" else MACHINE,
        mib=32 if differs == "memory" else 24,
        more=(
            (*RNG, "-bios", str(work / "small.rom")) if differs == "firmware" else () if differs == "device" else RNG
        ),
    )
    target.monitor.close()
    with pytest.raises(PeerError) as caught:
        multifd.send(work / "snap", f"unix:{work}/there", qmp=str(work / "target.qmp"), timeout=peers.TIMEOUT)
    told = str(caught.value)
    assert f"Here: machine {MACHINE}, compressor none, 2 channels, page size 4096, {BLOCKS}" in told
    if release == "7.2":
        assert "its QEMU has ended: the last lines of its standard error, or its log, say why" in told
        assert target.process.wait(peers.TIMEOUT) == 1
        return
    assert "QEMU says: load of migration failed: Invalid argument" in told
    assert "(its log may say more); start it again, with -incoming defer." in told
    assert release == "10.0" or reason in told
    assert target.process.poll() is None
    # It takes no other, and the next one is told so.
    command = ("send", work / "snap", f"unix:{work}/there", "--qmp", work / "target.qmp")
    fails(1, "has had its migration, which is failed; QEMU says: .*: start it again, with -incoming defer", *command)


@pytest.mark.parametrize("release", RELEASES)
def test_a_guest_that_cannot_be_migrated(start: Start, work: Path, release: str) -> None:
    shared = ("-object", "memory-backend-ram,id=shared,size=1M,share=on", "-device", "ivshmem-plain,memdev=shared")
    source = start(release, "source", more=shared)
    source.monitor.close()
    with pytest.raises(
        PeerError,
        match="does not migrate its guest: QEMU says: Migration is disabled when using feature 'peer mode'",
    ):
        multifd.receive(f"unix:{work}/here", work / "snap", qmp=str(work / "source.qmp"), timeout=peers.TIMEOUT)


@pytest.mark.parametrize("release", RELEASES)
def test_a_source_that_is_killed(start: Start, work: Path, release: str) -> None:
    source = start(release, "source", more=("-qmp", f"unix:{work}/second.qmp,server=on,wait=off"))
    source.fill(content())
    source.prepare(downtime_limit=1)
    where = str(work / "second.qmp")
    there = peers.Receiving(work / "snap", f"unix:{work}/here", qmp=where, max_bandwidth=10_000)
    source.wait("active")
    source.process.kill()
    says = "the source ended early: cancelled, or gone; its QEMU has ended: the last lines of its standard error"
    with pytest.raises(PeerError, match=says):
        there.join()


def migrated(source: Qemu, uri: str, **capabilities: bool) -> None:
    """The guest to a file, and stopped on this side again."""
    states = [{"capability": name.replace("_", "-"), "state": state} for name, state in capabilities.items()]
    if states:
        source.monitor.command("migrate-set-capabilities", capabilities=states)
    source.monitor.command("migrate", uri=uri)
    source.wait("completed")
    source.monitor.command("cont")
    source.monitor.command("stop")


@pytest.mark.parametrize("release", RELEASES)
def test_files_that_a_qemu_writes_are_named(start: Start, work: Path, release: str) -> None:
    source = start(release, "source")
    source.fill(content())
    kinds = {"stream": "a migration stream", "elf": "an ELF core", "kdump-zlib": "a kdump-compressed dump, flattened"}
    migrated(source, f"exec:cat > {work}/stream")
    if release != "7.2":
        migrated(source, f"file:{work}/file")
        migrated(source, f"file:{work}/mapped", mapped_ram=True)
        migrated(source, f"file:{work}/channels", mapped_ram=True, multifd=True)
        kinds |= {"file": "a migration stream", "mapped": "a mapped-ram file", "channels": "a mapped-ram file"}
        kinds["kdump-raw-zlib"] = "a kdump-compressed dump: "
    for kind in kinds:
        if kind.startswith(("elf", "kdump")):
            source.monitor.command("dump-guest-memory", paging=False, protocol=f"file:{work}/{kind}", format=kind)
    source.monitor.command("pmemsave", val=0, size=24 << 20, filename=f"{work}/pmemsave")
    for kind, says in kinds.items():
        for look in (multifd.open_snapshot, multifd.inspect):
            with pytest.raises(CallerError, match=f"{kind} is {says}"):
                look(work / kind)
    assert multifd.open_snapshot(work / "pmemsave").memory_bytes == 24 << 20, "as is said to do"


def test_a_destination_that_expects_tls(start: Start, work: Path) -> None:
    target = start("10.0", "target", incoming=True)
    target.monitor.command("migrate-set-parameters", **{"tls-creds": "tls0"})
    target.monitor.close()
    (work / "image.raw").write_bytes(bytes(4096))
    with pytest.raises(UsageError, match=r"this QEMU expects TLS \(tls-creds tls0\): .* \(--tls-creds\)"):
        multifd.send(work / "image.raw", f"unix:{work}/there", qmp=str(work / "target.qmp"))
