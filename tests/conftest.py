"""Shared by all tests: nothing is left behind, and in CI nothing is left out."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

pytest.register_assert_rewrite("captures", "commands", "guest", "peers", "qemus", "relaying", "strangers", "streams")

import prove
import standin as standin_module
import strangers
import told
from captures import OWN_CAPTURES, Capture, load_captures
from certificates import Authority
from multifd.testing.harness import descriptors
from qemus import MIB, Qemu, Start, binary, qemus
from sites import Site

T = TypeVar("T")

if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    # Under nohup: what the tests start is to be hung up on all the same, and would inherit this.
    signal.signal(signal.SIGHUP, lambda *_: None)

#: Packages with tests of their own, which run in an environment of their own.
collect_ignore_glob = ["packaging/from-0.1/*"]


@pytest.fixture
def own_capture() -> dict[str, Capture]:
    return load_captures(OWN_CAPTURES)


@pytest.fixture(autouse=True)
def _nothing_unexpected(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test may be told a warning that it does not expect."""
    with told.nothing_else(request):
        yield


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


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def creds(authority: Authority, work: Path) -> Path:
    return authority.directory(work / "pki")


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates that no test changes."""
    return Authority().directory(tmp_path_factory.mktemp("keys") / "pki")


@pytest.fixture(params=[None, "tls"], ids=["plain", "tls"])
def either(request: pytest.FixtureRequest, keys: Path) -> Path | None:
    """For a test with TLS and without."""
    return keys if request.param else None


@pytest.fixture
def wrap(either: Path | None) -> strangers.Wrap:
    """A client's side of that."""
    return None if either is None else strangers.tls(either)


@pytest.fixture
def held() -> Iterator[list[socket.socket]]:
    """What strangers keep open; closed at the end."""
    with strangers.closing([]) as socks:
        yield socks


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def start(work: Path) -> Iterator[Start]:
    """Start a QEMU; skips where it cannot be had."""
    with qemus() as running:

        def begin(release: str, name: str, **options: object) -> Qemu:
            _or_skip(lambda: binary(release))
            running.append(Qemu(release, work, name, **{"mib": MIB} | options))  # type: ignore[arg-type]
            return running[-1]

        yield begin


def _or_skip(make: Callable[[], T]) -> T:
    try:
        return make()
    except standin_module.Missing as missing:
        pytest.skip(str(missing))


def pytest_report_header() -> str:
    return f"prove: {prove.SIZE}, MULTIFD_SEED={prove.SEED}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skip is a failure: nothing may be left out."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("MULTIFD_LEAVE_NOTHING_OUT") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if os.environ.get("MULTIFD_LEAVE_NOTHING_OUT") and terminalreporter.stats.get("skipped"):
        terminalreporter.write_line("FAILED: tests were left out, and MULTIFD_LEAVE_NOTHING_OUT is set", red=True)
