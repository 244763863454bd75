"""Strangers' plugins, outside the workspace: in an environment of their own, with core as pip installs it.

The skeletons of `new-plugin`, those that 0.1's wrote (`from-0.1`), and `thirdparty/lz4`, which was written from 0.1's
docs/plugins.md alone: they pass the conformance suite, carry a migration of a real memory image between processes and
through a relay, are listed, and vanish when they are uninstalled.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
LZ4 = Path(__file__).with_name("thirdparty") / "lz4"
OLD = Path(__file__).with_name("from-0.1")
pytestmark = pytest.mark.timeout(300)
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet")


class Outside:
    """A directory with an environment that knows nothing of the workspace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "venv" / "bin"
        self.env = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MULTIFD", "VIRTUAL"))
        }
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=110)

    def run(self, program: str, *arguments: object, timeout: float = 110) -> subprocess.CompletedProcess[str]:
        command = [str(self.bin / program), *map(str, arguments)]
        return subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=timeout, check=False
        )

    def good(self, program: str, *arguments: object) -> str:
        result = self.run(program, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    @contextmanager
    def serving(self, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
        """A multifd that listens, and where."""
        command = [str(self.bin / "multifd"), *map(str, arguments)]
        with subprocess.Popen(
            command, cwd=self.folder, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as child:
            try:
                assert child.stderr is not None
                line = child.stderr.readline()
                assert line.startswith("multifd: listening on "), line
                yield child, line.split()[-1]
                child.wait(60)
            finally:
                child.kill()


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Outside:
    place = Outside(tmp_path_factory.mktemp("outside"))
    # Once, instead of an environment of its own for each package's build.
    fetched = place.run(
        "python", *PIP, "install", "flit_core>=3.11", "lz4>=4", "cffi>=1.16", "pluggy>=1.5", "pytest>=8"
    )
    if fetched.returncode:
        pytest.skip(f"packages cannot be installed here: {fetched.stderr.splitlines()[-1]}")
    shutil.copytree(OLD, place.folder / "old")
    packages = (f"{TOP}/core[testing]", LZ4, "./old/multifd-plain", "./old/multifd-bound")
    place.good("python", *PIP, "install", "--no-build-isolation", *packages)
    wrote = place.good("multifd", "new-plugin", "acme")
    assert wrote == "wrote multifd-acme: pip install ./multifd-acme, then multifd conformance acme\n"
    place.good("multifd", "new-plugin", "bound-z", "--cffi", "--into", "more")
    place.good("python", *PIP, "install", "--no-build-isolation", "./multifd-acme", "./more/multifd-bound-z")
    place.good("python", TOP / "tools/memory_image.py", place.folder / "image.raw", "--mib", 32)
    return place


@pytest.mark.parametrize("name", ["acme", "bound-z", "lz4", "none", "plain", "bound"])
def test_they_pass_conformance(outside: Outside, name: str) -> None:
    last = outside.good("multifd", "conformance", name).splitlines()[-1]
    assert last.endswith(" not asked: it keeps the contract"), last


def test_the_skeletons_own_tests_pass_with_the_suite_beside_them(outside: Outside) -> None:
    for folder, name, old in (
        ("multifd-acme", "acme", ()),
        ("more/multifd-bound-z", "bound-z", ()),
        # Their names are of 0.1, which is what the warnings say.
        ("old/multifd-plain", "plain", ("-W", "ignore::DeprecationWarning")),
        ("old/multifd-bound", "bound", ("-W", "ignore::DeprecationWarning")),
    ):
        chosen = ("--multifd-compressor", name, "-k", "test or facts or captures", "-p", "no:cacheprovider")
        said = outside.good("python", "-m", "pytest", folder, *chosen, "-W", "error", *old).splitlines()[-1]
        assert "3 passed, 1 skipped" in said, said


def rows(outside: Outside) -> dict[str, tuple[int, bool, str]]:
    found = json.loads(outside.good("multifd", "compressors", "--json"))
    return {row["name"]: (row["flag"], row["available"], row["distribution"]) for row in found}


def test_they_are_listed(outside: Outside) -> None:
    found = rows(outside)
    assert found["acme"] == (31, True, "multifd-acme 0.1.0")
    assert found["lz4"] == (28, True, "multifd-lz4 0.1.0")
    assert set(found) == {"none", "acme", "bound-z", "lz4", "plain", "bound"}, "nothing of the workspace"


def same(outside: Outside, snapshot: str) -> None:
    (raw,) = (outside.folder / snapshot).glob("0-*.raw")
    assert raw.read_bytes() == (outside.folder / "image.raw").read_bytes()


@pytest.mark.parametrize("compressor", ["acme,level=6", "lz4,acceleration=4", "bound-z", "plain,level=6", "bound"])
def test_a_migration_between_two_processes(outside: Outside, compressor: str) -> None:
    name = compressor.partition(",")[0]
    with outside.serving("receive", "tcp:127.0.0.1:0", "-o", f"there-{name}", "--compressor", name) as (_, uri):
        sent = json.loads(outside.good("multifd", "send", "image.raw", uri, "--compressor", compressor, "--json"))
    same(outside, f"there-{name}")
    assert sent["compressor"] == name
    assert sent["wire_bytes"] < sent["memory_bytes"] / 2


@pytest.mark.parametrize(("source", "target"), [("lz4", "acme"), ("acme", "lz4,level=3")])
def test_a_migration_through_a_relay(outside: Outside, source: str, target: str) -> None:
    snapshot = f"relayed-{source}"
    with (
        outside.serving("receive", "tcp:127.0.0.1:0", "-o", snapshot, "--compressor", target.partition(",")[0]) as (
            _,
            there,
        ),
        outside.serving(
            # Both skeletons have flag 31: which of their methods it is has to be said.
            *("relay", "--listen", "tcp:127.0.0.1:0", "--connect", there, "--migrations", 1),
            *("--from", source, "--to", target),
        ) as (relay, here),
    ):
        outside.good("multifd", "send", "image.raw", here, "--compressor", source)
        said = relay.communicate(timeout=60)[0]
    same(outside, snapshot)
    assert "relayed 8192 pages" in said


def test_they_vanish_when_they_are_uninstalled(outside: Outside) -> None:
    outside.good("python", *PIP, "uninstall", "--yes", "multifd-lz4")
    assert "lz4" not in rows(outside)
    gone = outside.run("multifd", "send", "image.raw", "tcp:127.0.0.1:1", "--compressor", "lz4")
    assert gone.returncode == 1
    assert gone.stderr.startswith("multifd: no compressor is named 'lz4'; installed: acme, bound, bound-z, none, plain")
