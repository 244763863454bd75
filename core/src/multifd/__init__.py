"""multifd: QEMU's parallel migration channels in Python, with compressors as plugins.

    import multifd

    result = multifd.receive("recording:tests/captures/q72-none-2ch", "snap")
    print(multifd.inspect("snap")["machine"], result.normal_pages, result.zero_pages)

The names here, and all that they return and raise, are promised, as docs/plugins.md says; each is imported when it is
first used, so that `multifd --version` costs nothing.
"""

from __future__ import annotations

import sys

from multifd import _compat

sys.meta_path.append(_compat.Finder)  # first: another thread may be looking for an old name already

TYPE_CHECKING = False  # typing's own takes longer to import than all of this

if TYPE_CHECKING:
    from typing import Any

    from multifd import errors, formats, hookspecs
    from multifd.codec.probing import compressors
    from multifd.crew import Crew
    from multifd.jobs.destination.receive import receive
    from multifd.jobs.inspect import inspect
    from multifd.jobs.relay.server import Relay
    from multifd.jobs.source.send import send
    from multifd.snapshot.reader import open_snapshot

__all__ = [
    "Crew",
    "Relay",
    "compressors",
    "errors",
    "formats",
    "hookspecs",
    "inspect",
    "open_snapshot",
    "receive",
    "send",
]

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _compat.PROMISED:
        return getattr(import_module(_compat.PROMISED[name]), name)
    if name in _compat.MODULES or f"multifd.{name}" in _compat.MOVED:
        return import_module(f"multifd.{name}")
    raise AttributeError(f"module 'multifd' has no attribute {name!r}")
