"""File systems that are soon full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(where: Path, kib: int) -> Iterator[Path]:
    """`where`, an empty directory, holds so much meanwhile."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(where)], check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True)
