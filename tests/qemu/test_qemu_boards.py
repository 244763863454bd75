"""Machines of other architectures, and older types of a release's own: there and back again, and through a relay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from boards import BOARDS, Trial
from qemus import FETCHED, Qemu, qemus
from standin import Missing, fetch

NAMES = {str(board): board for board in BOARDS}
#: Board, type, release, method.
CASES = [
    ("s390x-s390-ccw-virtio", "s390-ccw-virtio-10.0", "10.0", "zstd"),
    ("ppc64-pseries", "pseries-10.0", "10.0", "none"),
    ("aarch64-virt", "virt-10.0", "10.0", "zlib"),
    ("arm-versatilepb", "versatilepb", "10.0", "zstd"),
    ("alpha-clipper", "clipper", "10.0", "zlib"),
    ("x86_64-q35", "pc-q35-9.2", "10.0", "none"),
    ("x86_64-q35", "pc-q35-8.2", "10.0", "zlib"),
    ("x86_64-q35", "pc-q35-7.2", "10.0", "zstd"),
    ("x86_64-q35", "pc-q35-10.0", "11.1", "zlib"),
    ("x86_64-q35", "pc-q35-7.2", "11.1", "none"),
]


pytestmark = pytest.mark.timeout(300)  # what is not there yet is downloaded


@pytest.fixture(scope="module")
def programs() -> None:
    """All that are needed, got in one go: apt reads its lists once."""
    for release in sorted({release for _, _, release, _ in CASES}):
        systems = sorted({NAMES[name].system for name, _, its, _ in CASES if its == release})
        try:
            fetch("get_qemu.py", FETCHED, release, *systems)
        except Missing as missing:
            pytest.skip(str(missing))


@pytest.fixture
def running(programs: None) -> Iterator[list[Qemu]]:
    with qemus() as running:
        yield running


@pytest.mark.parametrize(("name", "kind", "release", "method"), CASES)
def test_there_and_back(work: Path, running: list[Qemu], name: str, kind: str, release: str, method: str) -> None:
    trial = Trial(NAMES[name], kind, work)
    trial.receive(trial.qemu(running, release), method, work / "snap")
    trial.send(work / "snap", trial.qemu(running, release, incoming=True), method)
    trial.relay(trial.qemu(running, release), trial.qemu(running, release, incoming=True), method, "zlib")
