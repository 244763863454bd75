"""Why no QAT device works: one machine after another, built in a directory, and what is said of it."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from multifd_qatzip import devices
from multifd_qatzip.trial import Trial

NO_DEVICE = Trial(False, -101, "qzInit: QZ_NOSW_NO_HW (-101) [Cannot open /dev/vfio]")
PF, VF = "0000:6b:00.0", "0000:6b:00.1"


class Machine:
    """A machine on which everything is right until a test takes something away."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.device(PF, 0x4940, "4xxx", services="dc")
        self.device(VF, 0x4941, "vfio-pci", group="17")
        self.device("0000:00:1f.6", 0x15FB, "e1000e")
        self.file("dev/vfio/vfio")
        self.node = self.file("dev/vfio/17")
        self.socket = self.file("run/qat/qatmgr.sock")

    def device(self, address: str, number: int, driver: str = "", services: str = "", group: str = "") -> None:
        base = f"sys/bus/pci/devices/{address}"
        self.file(f"{base}/vendor", "0x8086\n")
        self.file(f"{base}/device", f"{number:#06x}\n")
        for name, target in (("driver", f"drivers/{driver}"), ("iommu_group", f"groups/{group}")):
            link = self.root / base / name
            link.unlink(missing_ok=True)
            if not target.endswith("/"):
                (self.root / "sys" / target).mkdir(parents=True, exist_ok=True)
                link.symlink_to(self.root / "sys" / target)
        if services:
            self.file(f"{base}/qat/cfg_services", services + "\n")

    def file(self, name: str, text: str = "") -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def remove(self, address: str) -> None:
        folder = self.root / "sys/bus/pci/devices" / address
        folder.rename(self.root / address)

    def says(self, trial: Trial = NO_DEVICE) -> str:
        return "; ".join(devices.why_not(trial, self.root))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.delenv("QAT_POLICY", raising=False)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return Machine(tmp_path)


def test_where_all_is_right_the_trials_own_words(machine: Machine) -> None:
    assert "qzInit: QZ_NOSW_NO_HW (-101) [Cannot open /dev/vfio]" in machine.says()
    assert devices.names(machine.root) == (f"4xxx {PF}",)
    machine.remove(PF)
    assert devices.names(machine.root) == (f"4xxx {VF}",), "a guest or a container with a virtual function"
    assert "qzInit: QZ_NOSW_NO_HW (-101)" in machine.says()


def test_no_device(machine: Machine) -> None:
    machine.remove(PF)
    machine.remove(VF)
    assert "no QAT device here that qatlib drives" in machine.says()
    assert devices.names(machine.root) == ()
    machine.device("0000:3d:00.0", 0x37C8, "c6xx")
    said = machine.says()
    assert "0000:3d:00.0 (C62x) is not one that qatlib drives" in said
    assert "Intel's out-of-tree driver" in said


@pytest.mark.parametrize(
    ("number", "name", "module"),
    [
        (0x4940, "4xxx", "qat_4xxx"),
        (0x4942, "401xx", "qat_4xxx"),
        (0x4944, "402xx", "qat_4xxx"),
        (0x4946, "420xx", "qat_420xx"),
        (0x4948, "6xxx", "qat_6xxx"),
    ],
)
def test_no_driver(machine: Machine, number: int, name: str, module: str) -> None:
    machine.device(PF, number)
    assert f"{PF} ({name}) has no driver; modprobe {module}; dmesg says whether its firmware" in machine.says()


def test_no_virtual_functions(machine: Machine) -> None:
    machine.remove(VF)
    assert f"{PF} has no virtual functions; systemctl enable --now qat; needs SR-IOV" in machine.says()


def test_no_vfio(machine: Machine) -> None:
    (machine.root / "dev/vfio").rename(machine.root / "gone")
    assert "/dev/vfio is missing; turn the IOMMU on (VT-d, intel_iommu=on) and modprobe vfio-pci" in machine.says()


def test_not_in_the_group(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: path != machine.node)
    assert "dev/vfio/17 is not readable and writable for this user; join the group qat and log in" in machine.says()


@pytest.mark.parametrize("trial", [NO_DEVICE, Trial(False, -103, "qzCompress: (-103)")])
def test_no_compression_service(machine: Machine, trial: Trial) -> None:
    machine.device(PF, 0x4940, "4xxx", services="sym;asym")
    said = machine.says(trial)
    assert f"no QAT device offers compression: {PF} has the services sym;asym" in said
    assert "ServicesEnabled=dc in /etc/sysconfig/qat" in said
    machine.device("0000:70:00.0", 0x4940, "4xxx", services="asym;dc")
    assert "offers compression" not in machine.says(trial), "one of the two does"


def test_too_little_locked_memory(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    said = machine.says()
    assert "this process may lock 8192 KiB of memory, 1 virtual function needs 16384 KiB" in said
    assert "ulimit -l" in said
    said = machine.says(Trial(False, -104, "qzCompress: QZ_NOSW_LOW_MEM (-104)"))
    assert "QZ_NOSW_LOW_MEM (-104); this process may lock 8192 KiB" in said


def test_low_memory_without_a_limit(machine: Machine) -> None:
    said = machine.says(Trial(False, -104, "qzCompress: QZ_NOSW_LOW_MEM (-104)"))
    assert "each compression instance pins 4.5 MB" in said
    assert "/sys is mounted" in said


def test_no_service(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.socket.unlink()
    assert "the qat service does not run" in machine.says()
    monkeypatch.setenv("QAT_POLICY", "1")
    assert "service does not run" not in machine.says()


def test_what_the_checks_do_not_explain(machine: Machine) -> None:
    machine.remove(VF)
    for trial in (Trial(False, 0, "a trial of the device died (SIGSEGV)"), Trial(False, -2, "QZ_FAIL (-2)")):
        assert machine.says(trial).startswith(trial.why_not)
