"""apt as a downloader: the machine's own sources, with lists, status and cache of its own.

Installs nothing and needs no rights.  The machine's mirrors serve other suites too: the name is
all that differs.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

#: What is unpacked in a root, where dpkg would note it.
STATUS = "var/lib/dpkg/status"


def own_suite() -> str:
    """This machine's release.  Exits where there is no apt, or no name."""
    for tool in ("apt-get", "dpkg-deb", "ldd"):
        if not shutil.which(tool):
            sys.exit(f"{Path(sys.argv[0]).name}: {tool} is missing: this needs a Debian-like machine")
    own = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    if not own:
        sys.exit(f"{Path(sys.argv[0]).name}: /etc/os-release names no VERSION_CODENAME")
    return own


class Apt:
    """Packages of one suite, downloaded and unpacked; `folder` is worked in, and removed by `close`."""

    def __init__(self, folder: Path, suite: str) -> None:
        own = own_suite()
        self.suite = suite
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        parts = folder / "sources.list.d"
        for path in (parts, folder / "lists/partial", folder / "archives/partial", folder / "debs"):
            path.mkdir(parents=True)
        for path in (Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")):
            if path.suffix in (".list", ".sources") and path.is_file():
                text = path.read_text()
                # Backports lack what has not changed: that comes from the suite itself.
                for name in {suite, suite.removesuffix("-backports")}:
                    (parts / f"{name}-{path.name}").write_text(re.sub(rf"\b{own}\b(?!-)", name, text))
        self._said = ""
        self._run("update")

    def _run(self, *arguments: str, installed: Path = Path("/dev/null")) -> bool:
        options = {
            "Dir::Etc::SourceList": "/dev/null",
            "Dir::Etc::SourceParts": self._folder / "sources.list.d",
            "Dir::State::Lists": self._folder / "lists",
            "Dir::State::status": installed,
            "Dir::Cache": self._folder,
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Acquire::Check-Valid-Until": "false",  # a mirror may stand still; it is signed all the same
        }
        command = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in options.items()), *arguments]
        result = subprocess.run(
            command, cwd=self._folder / "debs", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        self._said += result.stdout
        return result.returncode == 0

    def unpack(self, root: Path, *names: str) -> None:
        """One package: the first of these that there is."""
        if not any(self._run("download", f"{name}/{self.suite}") for name in names):
            self._fail(names)
        self._unpack(self._folder / "debs", root)

    def unpack_with_all_it_needs(self, root: Path, *names: str) -> None:
        """Packages and everything they depend on, down to the C library; what is in `root` already is not got again."""
        status = root / STATUS
        status.parent.mkdir(parents=True, exist_ok=True)
        status.touch()
        options = ("--download-only", "--no-install-recommends", f"-t{self.suite}")
        if not self._run("install", "-y", *options, *names, installed=status):
            self._fail(names)
        self._unpack(self._folder / "archives", root)

    def _unpack(self, debs: Path, root: Path) -> None:
        for package in debs.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, root], check=True, stdout=sys.stderr)
            if (root / STATUS).exists():
                fields = subprocess.run(["dpkg-deb", "-f", package], check=True, capture_output=True, text=True).stdout
                with open(root / STATUS, "a") as file:
                    file.write(f"{fields}Status: install ok installed\n\n")
            package.unlink()

    def _fail(self, names: Sequence[str]) -> None:
        script = Path(sys.argv[0]).name
        sys.exit(f"{self._said}{script}: {self.suite} has no {' or '.join(names)}, or it could not be downloaded")

    def close(self) -> None:
        shutil.rmtree(self._folder)
