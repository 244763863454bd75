"""File systems that are soon full."""

from __future__ import annotations

import subprocess
import time
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
        for _ in range(50):  # somebody who ends may have a file open still
            if not subprocess.run(["umount", str(where)], check=False).returncode:
                break
            time.sleep(0.1)
