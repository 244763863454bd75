"""Get libqatzip on a Debian-like machine, without installing anything.

python3 tools/get_libqatzip.py DIR [--headers]

Prints the path of libqatzip.so.3: the system's own, or one unpacked under DIR with what it needs
to load; `export MULTIFD_LIBQATZIP=` that path.  apt downloads the packages from the machine's
own sources, with lists and a cache of its own, so that it needs no rights; Debian 12, which has
no libqatzip, takes it from the sources of Debian 13.  --headers adds what a program that
replaces libqat is compiled with: unpacked under DIR/root/usr/include, where the system has none.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from apt import Apt, own_suite

SONAME = "libqatzip.so.3"
PACKAGES = ("libqatzip3", "libqat4", "libusdm0")
HEADERS = {"qat/cpa_dc.h": "libqat-dev", "zlib.h": "zlib1g-dev"}
#: Of the machine's own release, so that they fit its libc: what libqatzip may still miss.
NEEDS = {
    "libnuma.so.1": ("libnuma1",),
    "liblz4.so.1": ("liblz4-1",),
    "libcrypto.so.3": ("libssl3", "libssl3t64"),
    "libzstd.so.1": ("libzstd1",),
    "libz.so.1": ("zlib1g",),
}


def missing(library: Path) -> list[str]:
    env = os.environ | {"LD_LIBRARY_PATH": str(library.parent)}
    result = subprocess.run(["ldd", library], env=env, capture_output=True, text=True, check=False)
    return re.findall(r"^\s*(\S+) => not found", result.stdout, re.MULTILINE)


def system_library() -> str | None:
    code = f"import ctypes; ctypes.CDLL({SONAME!r}); print(open('/proc/self/maps').read())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    found = re.search(r"(/\S+)/libqatzip\.so\S*$", result.stdout, re.MULTILINE)
    return f"{found[1]}/{SONAME}" if found else None


def header_packages(root: Path) -> list[str]:
    """What is to be unpacked so that all headers are there."""
    places = [Path("/usr/include"), root / "usr/include"]
    return [package for name, package in HEADERS.items() if not any((place / name).exists() for place in places)]


def suite_with_libqatzip() -> str:
    """This machine's own suite, or Debian 13's."""
    own = own_suite()
    facts = platform.freedesktop_os_release()
    old = facts.get("ID") == "debian" and int(facts.get("VERSION_ID", "99")) < 13
    return "trixie" if old else own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--headers", action="store_true", help="libqat's and zlib's headers too")
    arguments = parser.parse_args()
    top = arguments.directory.absolute()
    root = top / "root"
    library = root / "usr/lib/x86_64-linux-gnu" / SONAME
    if platform.machine() != "x86_64":
        sys.exit(f"get_libqatzip: libqatzip exists for x86-64 only, this machine is {platform.machine()}")
    system = system_library()
    headers = header_packages(root) if arguments.headers else []
    if not headers and (system or (library.exists() and not missing(library))):
        print(system or library)
        return
    apt = Apt(top / "apt", suite_with_libqatzip())
    if not system:
        for name in PACKAGES:
            apt.unpack(root, name)
    if "libqat-dev" in headers:
        apt.unpack(root, "libqat-dev")
    apt.close()
    needs = [NEEDS[soname] for soname in (missing(library) if not system else ()) if soname in NEEDS]
    if needs or "zlib1g-dev" in headers:
        apt = Apt(top / "apt", own_suite())
        for names in (*needs, *([("zlib1g-dev",)] if "zlib1g-dev" in headers else [])):
            apt.unpack(root, *names)
        apt.close()
        for path in root.glob("lib/x86_64-linux-gnu/*"):
            shutil.copy2(path, library.parent, follow_symlinks=False)
    if not system and (left := missing(library)):
        sys.exit(f"get_libqatzip: {library} does not load here, missing: {', '.join(left)}")
    print(system or library)


if __name__ == "__main__":
    main()
