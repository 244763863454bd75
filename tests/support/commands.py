"""The commands as a user runs them."""

from __future__ import annotations

import re
import subprocess
import sys

MULTIFD = [sys.executable, "-m", "multifd"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*MULTIFD, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def fails(code: int, says: str, *arguments: object) -> None:
    result = run(*arguments)
    assert result.returncode == code, result.stderr
    last = result.stderr.splitlines()[-1]
    assert re.search(says, last), last
    if code == 1:
        assert len(result.stderr.splitlines()) == 1
        assert last.startswith("multifd: ")
    assert "Traceback" not in result.stderr
