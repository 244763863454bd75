"""Get libqpl on a Debian-like machine, without installing anything.

python3 tools/get_libqpl.py DIR [--python]

Prints the path of libqpl.so.1, unpacked under DIR: `export MULTIFD_LIBQPL=` that path.  Only Debian
unstable has it; apt downloads it from the machine's own sources with the suite's name replaced,
so that it needs no rights.  It wants glibc 2.38, and so no machine before Debian 13 loads it.
--python prints instead the path of a script that starts this Python with unstable's C library, and
with MULTIFD_LIBQPL set: a Python that loads it anywhere.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from apt import Apt

SUITE = "sid"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
SCRIPT = """#!/bin/sh
# With $0 in front this Python takes the script for its own name, and starts it for its children.
export MULTIFD_LIBQPL="${{MULTIFD_LIBQPL:-{library}}}"
exec {root}/{libraries}/ld-linux-x86-64.so.2 --library-path {root}/{libraries} --argv0 "$0" {python} "$@"
"""


def make_python(top: Path, root: Path, library: Path) -> Path:
    """The script; its prefix, `top`, has what this Python's environment has."""
    script = top / "bin/python"
    script.parent.mkdir(exist_ok=True)
    python = Path(sys.executable).resolve()
    script.write_text(SCRIPT.format(root=root, libraries=LIBRARIES, library=library, python=python))
    script.chmod(0o755)
    for name in ("pyvenv.cfg", "lib"):
        (top / name).unlink(missing_ok=True)
        if (Path(sys.prefix) / name).exists():
            (top / name).symlink_to(Path(sys.prefix) / name)
    return script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--python", action="store_true", help="the path of a Python that loads it")
    arguments = parser.parse_args()
    top = arguments.directory.absolute()
    root = top / "root"
    library = root / LIBRARIES / "libqpl.so.1"
    if platform.machine() != "x86_64":
        sys.exit(f"get_libqpl: libqpl exists for x86-64 only, this machine is {platform.machine()}")
    if not library.exists():
        shutil.rmtree(root, ignore_errors=True)
        apt = Apt(top / "apt", SUITE)
        apt.unpack_with_all_it_needs(root, "libqpl1")
        apt.close()
    python = make_python(top, root, library) if arguments.python else Path(sys.executable)
    code = f"import ctypes; ctypes.CDLL({str(library)!r})"
    loaded = subprocess.run([python, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    if loaded.returncode:
        hint = "" if arguments.python else " (with --python one that loads it)"
        sys.exit(f"get_libqpl: {loaded.stderr.splitlines()[-1].removeprefix('OSError: ')}{hint}")
    print(python if arguments.python else library)


if __name__ == "__main__":
    main()
