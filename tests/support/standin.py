"""Real vendors' libraries, and stand-ins for their devices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).parents[2]
QAT = TOP / "tests" / "support" / "qat"
FETCHED = TOP / ".libqatzip"
PAGELIST = TOP / "tests" / "support" / "pagelist"


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


@dataclass(frozen=True)
class Machine:
    """Where the library of a method is found: by which Python, in which environment."""

    method: str
    python: str | Path
    env: dict[str, str]


def get_libqpl() -> Machine:
    """One with the real libqpl, and no device."""
    folder = TOP / ".libqpl"
    library = folder / "root/usr/lib/x86_64-linux-gnu/libqpl.so.1"
    return Machine("qpl", fetch("get_libqpl.py", folder, "--python"), {"MULTIFD_LIBQPL": str(library)})


def make_page_device(method: str, folder: Path) -> Machine:
    """One with a device: libqpl's is the real library behind a queue, libwd_comp's is zlib."""
    if method == "uadk":
        options = ["-Wl,-soname,libwd_comp.so.2", "-l:libz.so.1"]
        library = build(PAGELIST / "fake_libwd_comp.c", folder / "libwd_comp.so.2.10.0", *options)
        return Machine("uadk", sys.executable, {"MULTIFD_LIBWD_COMP": str(library)})
    bare = get_libqpl()
    library = build(PAGELIST / "device_libqpl.c", folder / "libqpl.so.1", "-Wl,-soname,libqpl.so.1", "-ldl")
    return Machine("qpl", bare.python, {"MULTIFD_LIBQPL": str(library), "REAL_LIBQPL": bare.env["MULTIFD_LIBQPL"]})


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
