"""The real libqatzip, and a directory where a stand-in for the device's library lies beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).parents[1]
QAT = TOP / "tests" / "qat"
FETCHED = TOP / ".libqatzip"


class Missing(Exception):
    """What this machine lacks."""


def compiler() -> str:
    found = shutil.which(os.environ.get("CC", "cc"))
    if found is None:
        raise Missing("there is no C compiler (cc)")
    return found


def build(source: Path, output: Path, *options: str) -> Path:
    """Compile a shared library."""
    flags = ["-O2", "-Wall", "-Wextra", "-shared", "-fPIC"]
    subprocess.run([compiler(), *flags, source, "-o", output, *options], check=True)
    return output


def fetch(script: str, *arguments: str | Path) -> Path:
    """The path that a script of tools/ prints.  Raises Missing with its last line."""
    command = [sys.executable, TOP / "tools" / script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if result.returncode:
        raise Missing(result.stderr.splitlines()[-1])
    return Path(result.stdout.strip())


def get_libqatzip(*options: str) -> Path:
    """libqatzip.so.3: the system's, or one fetched into the project's directory."""
    return fetch("get_libqatzip.py", FETCHED, *options)


def make_standin(folder: Path) -> Path:
    """libqatzip.so.3 in `folder`, with the stand-ins for libqat and libusdm beside it."""
    compiler()
    library = get_libqatzip("--headers")
    for path in library.parent.glob("lib*.so*"):
        if path.name.split(".so")[0] in ("libqatzip", "libnuma"):
            shutil.copy(path, folder / path.name, follow_symlinks=False)
    shutil.copy(library.parent / "libusdm.so.0", folder / "real-libusdm.so.0")
    include = FETCHED / "root/usr/include"
    headers = [f"-I{include}", f"-I{include}/x86_64-linux-gnu"]
    build(QAT / "fake_qat.c", folder / "libqat.so.4", "-Wl,-soname,libqat.so.4", *headers, "-l:libz.so.1", "-lpthread")
    build(QAT / "fake_usdm.c", folder / "libusdm.so.0", "-Wl,-soname,libusdm.so.0", "-ldl")
    return folder / "libqatzip.so.3"
