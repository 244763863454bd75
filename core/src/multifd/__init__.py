"""multifd: QEMU's parallel migration channels in Python, with compressors as plugins.

    import multifd

    result = multifd.receive("recording:tests/captures/q72-none-2ch", "snap")
    print(multifd.inspect("snap")["machine"], result.normal_pages, result.zero_pages)

The names here, and all that they return and raise, are promised, as docs/plugins.md says; each is imported when it is
first used, so that `multifd --version` costs nothing.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's own takes longer to import than all of this
if TYPE_CHECKING:
    from typing import Any

    from multifd.codec.probing import compressors
    from multifd.jobs.destination import receive
    from multifd.jobs.inspect import inspect
    from multifd.jobs.relay.server import Relay
    from multifd.jobs.source import send
    from multifd.snapshot.reader import open_snapshot

__all__ = ["Relay", "compressors", "inspect", "open_snapshot", "receive", "send"]

__version__ = "0.2.0"

_HOMES = {
    "Relay": "multifd.jobs.relay.server",
    "compressors": "multifd.codec.probing",
    "inspect": "multifd.jobs.inspect",
    "open_snapshot": "multifd.snapshot.reader",
    "receive": "multifd.jobs.destination",
    "send": "multifd.jobs.source",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if f"multifd.{name}" in import_module("multifd._compat").MOVED:
        return import_module(f"multifd.{name}")
    raise AttributeError(f"module 'multifd' has no attribute {name!r}")


class _OldModules:
    """Finds modules by the names that they had in 0.1; asked only for what is found nowhere else."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> Any:  # noqa: ARG004
        if not name.startswith("multifd.") or name == "multifd._compat":
            return None
        from multifd._compat import find_spec

        return find_spec(name)


sys.meta_path.append(_OldModules)
