"""`multifd new-plugin`: names, and a package that the project's own tools find nothing in."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from multifd import skeleton
from multifd.errors import CallerError, HostError, UsageError

TOP = Path(__file__).parents[2]


@pytest.mark.parametrize("cffi", [False, True])
def test_lint_finds_nothing(tmp_path: Path, cffi: bool) -> None:
    path = skeleton.write("acme-card2", tmp_path, cffi=cffi)
    assert path == tmp_path / "multifd-acme-card2"
    assert (path / "src" / "multifd_acme_card2" / "__init__.py").exists()
    for file in path.rglob("*"):
        assert file.is_dir() or not re.search("@[a-z]+@", file.read_text()), "a word was not filled in"
    shutil.copy(TOP / "pyproject.toml", tmp_path)
    for tool in (
        ["ruff", "check", "--config", TOP / "pyproject.toml", "--no-cache", "."],
        ["ruff", "format", "--check", "--config", TOP / "pyproject.toml", "--no-cache", "."],
        ["mypy", "--strict", "--warn-unreachable", "--cache-dir", TOP / ".mypy_cache", "src", "tests"],
    ):
        command = [sys.executable, "-m", *map(str, tool)]
        result = subprocess.run(command, cwd=path, capture_output=True, text=True, timeout=110, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "cannot be a compressor's name"),
        ("Lz4", "cannot be a compressor's name: METHOD or METHOD-suffix, of small letters and digits"),
        ("lz4_fast", "cannot be a compressor's name"),
        ("-lz4", "cannot be a compressor's name"),
        ("lz4-", "cannot be a compressor's name"),
        ("4lz", "cannot be a compressor's name"),
        ("../lz4", "cannot be a compressor's name"),
        ("auto", "'auto' is reserved"),
        ("core", "multifd-core is a distribution of multifd's own"),
        ("zlib", "zlib is a method of QEMU's"),
        ("qatzip-mine", "qatzip is a method of QEMU's"),
    ],
)
def test_names_are_checked_before_anything_is_written(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        skeleton.write(name, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "multifd-acme").mkdir()
    with pytest.raises(CallerError, match="multifd-acme is there already: remove it, or write --into another"):
        skeleton.write("acme", tmp_path)
    assert list((tmp_path / "multifd-acme").iterdir()) == []


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(skeleton.FILES, "zzz", "no such template")
    with pytest.raises(HostError, match="multifd-acme cannot be written: No such file"):
        skeleton.write("acme", tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot be written: Not a directory|cannot be written: File exists"):
        skeleton.write("acme", tmp_path / "file")
