"""Names of 0.1, which import until 0.3: one table of what is where now.

    multifd.plugins.Spec    DeprecationWarning: multifd.plugins.Spec is multifd.codec.settings.Spec now; ...

For plugins and scripts that were written for 0.1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

#: A module of 0.1 -> where its names are now: looked for in this order, `old=module:new` renames one.
MOVED: dict[str, tuple[str, ...]] = {
    "multifd.bench": ("multifd.jobs.bench.measure", "multifd.jobs.bench.model", "multifd.jobs.bench.picture"),
    "multifd.deflate": ("multifd.formats.deflate",),
    "multifd.doctor": ("multifd.jobs.doctor",),
    "multifd.flags": ("multifd.hookspecs", "multifd.wire.flags"),
    "multifd.inspect": ("multifd",),
    "multifd.migrate": ("multifd", "multifd.jobs.report", "multifd.net.deadline"),
    "multifd.observers": ("multifd.observe.hooks", "multifd.observe.observers"),
    "multifd.pagedevice": ("multifd.formats.pagedevice",),
    "multifd.pagelist": ("multifd.formats.pagelist",),
    "multifd.plugins": (
        "rows=multifd:compressors",
        "multifd.codec.settings",
        "multifd.codec.selection",
        "multifd.codec.compressor",
        "multifd.codec.discovery",
        "multifd.codec.probing",
        "multifd.codec.readers",
        "multifd.effort.choice",
    ),
    "multifd.qmp": ("multifd.qemu.monitor", "multifd.qemu.settings", "multifd.qemu.driver"),
    "multifd.relay": ("multifd", "multifd.jobs.relay.migration", "multifd.jobs.relay.counters"),
    "multifd.snapshot": (
        "open_source=multifd:open_snapshot",
        "Source=multifd.snapshot.reader:Snapshot",
        "SourceBlock=multifd.snapshot.reader:SnapshotBlock",
        "multifd.snapshot.writer",
        "multifd.snapshot.format",
    ),
    "multifd.stored": ("multifd.formats.stored",),
    "multifd.wire": ("multifd.hookspecs", "multifd.wire.packet"),
}


#: Modules that show what others define.
PROMISED = ("multifd", "multifd.hookspecs")


def find_spec(name: str) -> ModuleSpec | None:
    """For the import system: a module of 0.1 that is none any more."""
    return ModuleSpec(name, _Loader()) if name in MOVED else None  # type: ignore[arg-type]


class _OldInspect(ModuleType):
    """`multifd.inspect` was a module and is a function: whichever is imported first, it is both."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return import_module("multifd.jobs.inspect").inspect(*arguments, **options)


class _Loader:
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return (_OldInspect if spec.name == "multifd.inspect" else ModuleType)(spec.name, __doc__)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = older(module.__name__)


def older(module: str) -> Callable[[str], Any]:
    """`__getattr__` of a module that has moved, or is a package now: gives its old names, with a warning each."""

    def get(name: str) -> Any:
        for place in () if name.startswith("__") else MOVED[module]:
            old, renamed, home = place.rpartition("=")
            home, _, new = home.partition(":")
            if (renamed and old != name) or home == module:
                continue
            found = getattr(import_module(home), new or name, None)
            defined = found.__module__ if isinstance(found, (type, FunctionType)) else home
            if found is not None and (defined == home or home in PROMISED):
                warnings.warn(
                    f"{module}.{name} is {home}.{new or name} now; the old name goes with multifd 0.3",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return found
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return get
