"""Build step: writes `multifd_qpl/_libqpl.py`, the bindings for `libqpl.h`.

cffi's ABI mode, out of line: a Python module for every machine, with no compiler, header or libqpl
needed.  The layout is checked on the library that is loaded (`hardware.py`).
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
        ffi.cdef(Path(self.root, "libqpl.h").read_text())
        ffi.set_source("multifd_qpl._libqpl", None)
        ffi.emit_python_code(str(Path(self.root, "src", "multifd_qpl", "_libqpl.py")))
