"""Installed distributions that a test makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

GOOD = """
from multifd.hookspecs import Facts, Option, Probe, hookimpl
@hookimpl
def multifd_compressor():
    return Facts("{name}", "{method}", {flag}, "for a test", range(1, 4), 2, (Option("fast", True, "h"),))
@hookimpl
def multifd_probe():
    return Probe(True, "lib", "1.0", hardware={hardware})
@hookimpl
def multifd_send_prepare(pages):
    return pages
@hookimpl
def multifd_recv(channel, pages):
    channel.read_into(pages)
"""

#: What snippets on compressors begin with.
IMPORTS = """
from multifd.codec.probing import probe_all
from multifd.codec.readers import select_for_flag
from multifd.codec.selection import load, select
from multifd.codec.settings import Spec
from multifd.effort.choice import Choice, best
"""


class Site:
    """A directory of installed distributions, seen by child processes only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(
        self,
        name: str,
        code: str,
        distribution: str | None = None,
        *,
        group: str = "multifd.compressors",
        target: str = "{module}",
    ) -> None:
        distribution = distribution or f"multifd-{name}"
        module = distribution.replace("-", "_")
        info = self.folder / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target.format(module=module)}\n")
        (self.folder / f"{module}.py").write_text(code)

    def good(self, name: str, method: str | None = None, flag: int = 30, *, hardware: bool = False) -> None:
        self.install(name, GOOD.format(name=name, method=method or name, flag=flag, hardware=hardware))

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | {"PYTHONPATH": str(self.folder)} | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def rows(self, *arguments: str, **environment: str) -> dict[str, dict[str, Any]]:
        result = self.run("-m", "multifd", "compressors", "--json", *arguments, **environment)
        assert result.returncode == 0, result.stderr
        return {row["name"]: row for row in json.loads(result.stdout)}

    def error(self, code: str) -> str:
        """What a snippet on compressors raises."""
        result = self.run("-c", f"{IMPORTS}{code}")
        assert result.returncode == 1
        return result.stderr.splitlines()[-1]
