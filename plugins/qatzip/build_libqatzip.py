"""Build step: writes `multifd_qatzip/_libqatzip.py`, the bindings for `libqatzip.h`.

cffi's ABI mode, out of line: the result is a Python module, so that the wheel fits every
machine and needs no compiler, no header and no libqatzip to be built or installed.  What the C
compiler would check, the layout of the structures, is checked on the library that is loaded
instead (`library.py`); a header at build time says nothing about that one anyway.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cffi import FFI
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BindingsHook(BuildHookInterface[Any]):
    """hatchling calls this before it makes a wheel or an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        ffi = FFI()
        ffi.cdef(Path(self.root, "libqatzip.h").read_text())
        ffi.set_source("multifd_qatzip._libqatzip", None)
        ffi.emit_python_code(str(Path(self.root, "src", "multifd_qatzip", "_libqatzip.py")))
