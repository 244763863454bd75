"""QAT devices of this machine, and why none of them can be used.

Read from sysfs: what qatlib drives, release 24.02 unless said otherwise.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from multifd_qatzip import library
from multifd_qatzip.trial import Trial

VENDOR = 0x8086
#: Device number of the physical function (its virtual functions have the next) -> generation,
#: kernel module.
DRIVEN = {
    0x4940: ("4xxx", "qat_4xxx"),
    0x4942: ("401xx", "qat_4xxx"),
    0x4944: ("402xx", "qat_4xxx"),
    0x4946: ("420xx", "qat_420xx"),
    0x4948: ("6xxx", "qat_6xxx"),  # qatlib 26.08
}
VIRTUAL = {number + 1: names for number, names in DRIVEN.items()}
#: These need Intel's out-of-tree driver and a libqatzip built against it.
OLDER = {
    0x0435: "DH895xCC",
    0x0443: "DH895xCC",
    0x19E2: "C3xxx",
    0x19E3: "C3xxx",
    0x37C8: "C62x",
    0x37C9: "C62x",
    0x6F54: "D15xx",
    0x6F55: "D15xx",
    0x18A0: "C4xxx",
    0x18A1: "C4xxx",
    0x18EE: "200xx",
    0x18EF: "200xx",
}
#: Bytes of locked memory that a process needs for each virtual function (qatlib's documentation).
LOCKED_PER_FUNCTION = 16 << 20
#: Bytes of pinned memory that libqatzip takes for each compression instance: 32 pairs of 64 and
#: 73 KiB (counted with 1.3.1).
PINNED_PER_INSTANCE = 4_500_000
RESTART = "then restart the service (systemctl restart qat)"


@dataclass(frozen=True, slots=True)
class Device:
    """A physical or virtual function on the PCI bus."""

    path: Path
    number: int

    @property
    def address(self) -> str:
        return self.path.name

    @property
    def driver(self) -> str:
        """The kernel driver's name; empty where none is bound."""
        link = self.path / "driver"
        return link.resolve().name if link.exists() else ""

    @property
    def services(self) -> str:
        """`dc`, `sym;asym` and so on; empty where the kernel does not say (before 6.0)."""
        return _text(self.path / "qat" / "cfg_services")

    @property
    def group(self) -> str:
        link = self.path / "iommu_group"
        return link.resolve().name if link.exists() else ""


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _bus(root: Path) -> Iterator[Device]:
    for path in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            if int(_text(path / "vendor"), 16) == VENDOR:
                yield Device(path, int(_text(path / "device"), 16))
        except ValueError:
            continue


def names(root: Path = Path("/")) -> tuple[str, ...]:
    """The devices that qatlib drives, `4xxx 0000:6b:00.0`; virtual ones where those are all."""
    found = list(_bus(root))
    for table in (DRIVEN, VIRTUAL):
        listed = tuple(f"{table[device.number][0]} {device.address}" for device in found if device.number in table)
        if listed:
            return listed
    return ()


def why_not(trial: Trial, root: Path = Path("/")) -> tuple[str, str]:
    """Why the device did not work: the reason, and what to do about it.

    The cheapest check that explains it; the trial's own words where none does.
    """
    found = list(_bus(root))
    physical = [device for device in found if device.number in DRIVEN]
    virtual = [device for device in found if device.number in VIRTUAL]
    if trial.code == library.NO_INSTANCE:
        return _no_instance(trial, physical)
    if trial.code == library.LOW_MEMORY:
        return _low_memory(trial, len(virtual))
    explained = None
    if trial.code in library.NO_DEVICE:  # with any other code libqatzip has found one
        explained = _missing(found, physical, virtual) or _not_reachable(root, physical, virtual)
    return explained or (trial.why_not, "see what the kernel says (dmesg) and the service (systemctl status qat)")


def _missing(found: list[Device], physical: list[Device], virtual: list[Device]) -> tuple[str, str] | None:
    if not physical and not virtual:
        for device in found:
            if device.number in OLDER:
                return (
                    f"the QAT device {device.address} ({OLDER[device.number]}) is not one that qatlib drives",
                    "it needs Intel's out-of-tree driver and a libqatzip built against it",
                )
        return "no QAT device here that qatlib drives", "the same format without a device: qatzip-sw"
    if physical and not any(device.driver for device in physical):
        name, module = DRIVEN[physical[0].number]
        return (
            f"the QAT device {physical[0].address} ({name}) has no driver",
            f"modprobe {module}; dmesg says whether its firmware is missing",
        )
    if not virtual:
        return (
            f"the QAT device {physical[0].address} has no virtual functions",
            "systemctl enable --now qat; needs SR-IOV in the firmware's set-up and intel_iommu=on",
        )
    return None


def _not_reachable(root: Path, physical: list[Device], virtual: list[Device]) -> tuple[str, str] | None:
    if not (root / "dev/vfio").is_dir():
        return "/dev/vfio is missing", "turn the IOMMU on (VT-d, intel_iommu=on) and modprobe vfio-pci"
    nodes = [root / "dev/vfio" / device.group for device in virtual if device.group]
    if nodes and not any(os.access(node, os.R_OK | os.W_OK) for node in nodes):
        return (
            f"{nodes[0]} is not readable and writable for this user",
            "join the group qat and log in again; on Fedora see SELinux's denials too",
        )
    if (services := _services(physical)) is not None:
        return services
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    needed = LOCKED_PER_FUNCTION * len(virtual)
    if limit != resource.RLIM_INFINITY and limit < needed:
        return _locked_limit(limit, len(virtual))
    if not (root / "run/qat/qatmgr.sock").exists() and not os.environ.get("QAT_POLICY"):
        return (
            "the qat service does not run (no /run/qat/qatmgr.sock)",
            "systemctl enable --now qat; in a container set QAT_POLICY=1 instead",
        )
    return None


def _services(physical: list[Device]) -> tuple[str, str] | None:
    services = [device.services for device in physical]
    if services and all(services) and not any("dc" in service.split(";") for service in services):
        return (
            f"no QAT device offers compression: {physical[0].address} has the services {services[0]}",
            f"ServicesEnabled=dc in /etc/sysconfig/qat, {RESTART}",
        )
    return None


def _no_instance(trial: Trial, physical: list[Device]) -> tuple[str, str]:
    return _services(physical) or (
        trial.why_not,
        (
            f"give devices the compression service: ServicesEnabled=dc in /etc/sysconfig/qat, {RESTART}; "
            "or end the other processes that use them"
        ),
    )


def _low_memory(trial: Trial, functions: int) -> tuple[str, str]:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    functions = max(functions, 1)
    if limit != resource.RLIM_INFINITY and limit < LOCKED_PER_FUNCTION * functions:
        reason, advice = _locked_limit(limit, functions)
        return f"{trial.why_not}; {reason}", advice
    return (
        trial.why_not,
        (
            f"each compression instance pins {PINNED_PER_INSTANCE / 1e6:.1f} MB: free memory, and make sure that "
            "/sys is mounted (libqatzip 1.3 and newer asks there for the NUMA node)"
        ),
    )


def _locked_limit(limit: int, functions: int) -> tuple[str, str]:
    return (
        (
            f"this process may lock {limit >> 10} KiB of memory, "
            f"{functions} virtual function{' needs' if functions == 1 else 's need'} "
            f"{(LOCKED_PER_FUNCTION * functions) >> 10} KiB"
        ),
        (
            "raise the limit (ulimit -l, memlock in /etc/security/limits.conf, LimitMEMLOCK= of a service); "
            "500 MB is the usual advice"
        ),
    )
