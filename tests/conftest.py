"""Shared by all tests: nothing is left behind, and in CI nothing is left out."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

import standin as standin_module
from multifd.testing.harness import descriptors

T = TypeVar("T")

OWN_CAPTURES = Path(__file__).with_name("captures")
SHARED_CAPTURES = Path(__file__).parents[2] / "shared" / "captures"
READABLE = ("none", "zlib", "zstd", "qatzip", "qpl", "uadk")


@dataclass(frozen=True)
class Capture:
    """One recorded migration of a real QEMU and what its manifest says of it."""

    name: str
    directory: Path
    facts: dict[str, Any]

    def files(self) -> list[bytes]:
        """main, channel 0, channel 1, ...: unpacked."""
        from streams import other_zstd

        zstd = other_zstd()
        paths = [self.directory / "main.bin.zst"]
        paths += [self.directory / f"ch{number}.bin.zst" for number in range(self.facts["channels"])]
        return [zstd.decompress(path.read_bytes()) for path in paths]


def load_captures(folder: Path) -> dict[str, Capture]:
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return {}
    entries = json.loads(manifest.read_text())["captures"]
    return {
        entry["name"]: Capture(entry["name"], folder / entry["name"], entry)
        for entry in entries
        if entry["compression"] in READABLE
    }


CAPTURES = {**load_captures(SHARED_CAPTURES), **load_captures(OWN_CAPTURES)}


@pytest.fixture
def own_capture() -> dict[str, Capture]:
    return load_captures(OWN_CAPTURES)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """No test may leave a thread or a descriptor."""
    threads = set(threading.enumerate())
    before = set(descriptors())
    yield
    assert set(threading.enumerate()) <= threads
    assert set(descriptors()) <= before


@pytest.fixture
def work() -> Iterator[Path]:
    """A directory in memory: thousands of small snapshots are synced to it."""
    import tempfile

    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="multifd-test-", dir=base))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def cc() -> str:
    """The C compiler."""
    return _or_skip(standin_module.compiler)


@pytest.fixture(scope="session")
def libqatzip() -> Path:
    """The real libqatzip.so.3."""
    return _or_skip(standin_module.get_libqatzip)


@pytest.fixture(scope="session")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real libqatzip.so.3 over a device that is a stand-in."""
    return _or_skip(lambda: standin_module.make_standin(tmp_path_factory.mktemp("standin")))


@pytest.fixture(scope="session")
def libqpl() -> standin_module.Machine:
    """The real libqpl without a device."""
    return _or_skip(standin_module.get_libqpl)


@pytest.fixture(scope="session", params=["qpl", "uadk"])
def page_device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> standin_module.Machine:
    """A device of either method that sends a list of pages; a stand-in."""
    folder = tmp_path_factory.mktemp(request.param)
    return _or_skip(lambda: standin_module.make_page_device(request.param, folder))


def _or_skip(make: Callable[[], T]) -> T:
    try:
        return make()
    except standin_module.Missing as missing:
        pytest.skip(str(missing))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skip is a failure: nothing may be left out."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("MULTIFD_LEAVE_NOTHING_OUT") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if os.environ.get("MULTIFD_LEAVE_NOTHING_OUT") and terminalreporter.stats.get("skipped"):
        terminalreporter.write_line("FAILED: tests were left out, and MULTIFD_LEAVE_NOTHING_OUT is set", red=True)
