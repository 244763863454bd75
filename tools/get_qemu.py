"""Get a QEMU of another release on a Debian machine, without installing anything.

python3 tools/get_qemu.py DIR 7.2|10.0|11.1 [SYSTEM...]
python3 tools/get_qemu.py DIR guest

Prints the path of each qemu-system-SYSTEM (x86_64 where none is named; aarch64, s390x, ppc64 ...):
the machine's own where it is of that release, or a script under DIR that starts one unpacked there
with all its libraries.  `guest`: the directory of a small Linux to run in it, `vmlinuz` and `busybox`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from apt import Apt

#: QEMU -> the Debian suite that has it.
SUITES = {"7.2": "bookworm", "10.0": "trixie", "11.1": "trixie-backports"}
#: What a system's machines do not start without, beside what its package depends on.
FIRMWARE = {"qemu-system-riscv64": ["opensbi"]}
SCRIPT = """#!/bin/sh
# Its own loader and libraries: they need not fit this machine's.
root={root}
export QEMU_MODULE_DIR="$root/usr/lib/x86_64-linux-gnu/qemu"
libraries=$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu
exec "$root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$libraries" \\
    "$root/usr/bin/{name}" -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" "$@"
"""


def version(program: str | Path) -> str:
    """`7.2` of QEMU 7.2.22; empty where it does not start."""
    try:
        result = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    found = re.search(r"version (\d+\.\d+)", result.stdout)
    return found[1] if found else ""


def get_guest(top: Path) -> Path:
    """Debian 13's kernel for virtual machines, and a busybox that needs no library."""
    if not (top / "busybox").exists():
        shutil.rmtree(top, ignore_errors=True)
        apt = Apt(top / "apt", "trixie")
        apt.unpack_with_all_it_needs(top / "root", "linux-image-cloud-amd64", "busybox-static")
        apt.close()
        (kernel,) = (top / "root/boot").glob("vmlinuz-*")
        kernel.rename(top / "vmlinuz")
        (top / "root/usr/bin/busybox").rename(top / "busybox")
        shutil.rmtree(top / "root")
    return top


def own(release: str, name: str) -> str | None:
    """The machine's, where it is of that release."""
    found = shutil.which(name)
    return found if found and version(found) == release else None


def get_qemus(top: Path, release: str, names: list[str]) -> None:
    """Scripts that start them, in `top`; what is there is left.  Exits where there is none."""
    names = [name for name in names if version(top / name) != release]
    if not names:
        return
    root = top / "root"
    apt = Apt(top / "apt", SUITES[release])
    packages = [name.replace("_", "-") for name in names]
    apt.unpack_with_all_it_needs(root, *packages, *(package for name in names for package in FIRMWARE.get(name, ())))
    apt.close()
    loader = root / "usr/lib64/ld-linux-x86-64.so.2"
    if not loader.exists():  # before usrmerge in the packages themselves
        loader.parent.mkdir(parents=True, exist_ok=True)
        loader.symlink_to(root / "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
    for name in names:
        script = top / name
        script.write_text(SCRIPT.format(root=root, name=name))
        script.chmod(0o755)
        if version(script) != release:
            sys.exit(f"get_qemu: {script} does not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("release", choices=(*SUITES, "guest"))
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", default=["x86_64"])
    arguments = parser.parse_args()
    directory, release = arguments.directory.absolute(), arguments.release
    if release == "guest":
        print(get_guest(directory / "guest"))
        return
    names = [f"qemu-system-{system}" for system in arguments.systems]
    top = directory / f"qemu-{release}"
    get_qemus(top, release, [name for name in names if not own(release, name)])
    for name in names:
        print(own(release, name) or top / name)


if __name__ == "__main__":
    main()
