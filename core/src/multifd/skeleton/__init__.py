"""`multifd new-plugin`: writes the package of a new compressor, which works at once."""

from __future__ import annotations

import re
import shutil
import tempfile
from importlib import resources
from pathlib import Path

from multifd.codec.selection import distributions
from multifd.codec.settings import RESERVED
from multifd.errors import CallerError, UsageError, os_errors
from multifd.wire.flags import METHODS, THIRD_PARTY_FLAGS

#: METHOD, or METHOD-suffix.
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
#: File of the package -> template; `@name@` and its like are filled in.
FILES = {
    "pyproject.toml": "pyproject.toml.in",
    "README.md": "README.md.in",
    "src/@module@/__init__.py": "plain.py.in",
    "src/@module@/py.typed": "py.typed.in",
    "tests/test_@module@.py": "test.py.in",
}
CFFI = {"src/@module@/__init__.py": "cffi.py.in"}


def write(name: str, into: str | Path = ".", *, cffi: bool = False) -> Path:
    """Write the package of a compressor `name` into a new directory of `into`; returns its path.

    With `cffi` it binds a C library instead of using one of Python's.  Raises UsageError for a
    name that a compressor cannot have, CallerError where the directory is there already, HostError
    where it cannot be written; then nothing is left.
    """
    method = _check(name)
    module = f"multifd_{name.replace('-', '_')}"
    target = Path(into) / f"multifd-{name}"
    if target.exists():
        raise CallerError(f"{target} is there already: remove it, or write --into another directory")
    words = {
        "name": name,
        "method": method,
        "module": module,
        "flag": str(THIRD_PARTY_FLAGS[-1]),
        "dependencies": '"multifd-core>=0.2", "cffi>=1.16"' if cffi else '"multifd-core>=0.2"',
        "with": "libz.so.1 through cffi" if cffi else "Python's zlib",
    }
    with os_errors(f"{target} cannot be written"):
        Path(into).mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".multifd-{name}-", dir=into))
        try:
            for path, template in {**FILES, **(CFFI if cffi else {})}.items():
                file = unfinished / _fill(path, words)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(_fill((resources.files("multifd.skeleton") / template).read_text(), words))
            unfinished.chmod(0o755)
            unfinished.rename(target)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return target


def _check(name: str) -> str:
    """The method of a name.  Raises UsageError."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be a compressor's name: METHOD or METHOD-suffix, of small letters and digits, "
            "such as lz4 or lz4-fpga"
        )
    method = name.partition("-")[0]
    if name in RESERVED:
        raise UsageError(f"{name!r} is reserved for {RESERVED[name]}: choose another name")
    if method in METHODS:
        raise UsageError(
            f"{method} is a method of QEMU's, with a payload of its own: the skeleton's is another; choose another "
            "method's name"
        )
    if f"multifd-{name}" in distributions().values():
        raise UsageError(
            f"multifd-{name} is a distribution of multifd's own, which it would replace: choose another name"
        )
    return method


def _fill(text: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(f"@{word}@", value)
    return text
