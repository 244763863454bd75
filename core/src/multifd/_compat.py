"""Where names are: the package's own promised ones, and those of 0.1, which import until 0.3.

    multifd.plugins.Spec    DeprecationWarning: multifd.plugins.Spec is multifd.codec.settings.Spec now; ...

Loaded with the package itself, so it imports nothing: the import system asks a finder while it holds a lock that every
other thread's import needs.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any
else:
    ModuleSpec = type(__spec__)
    ModuleType = type(sys)

#: Names of the package itself -> where each is.
PROMISED = {
    "Crew": "multifd.crew",
    "Relay": "multifd.jobs.relay.server",
    "compressors": "multifd.codec.probing",
    "inspect": "multifd.jobs.inspect",
    "open_snapshot": "multifd.snapshot.reader",
    "receive": "multifd.jobs.destination.receive",
    "send": "multifd.jobs.source.send",
}
#: Its promised modules.
MODULES = ("errors", "formats", "hookspecs")
#: A module of 0.1 -> where its names are now: looked for in this order, `old=module:new` renames one.
MOVED: dict[str, tuple[str, ...]] = {
    "multifd.bench": ("multifd.jobs.bench.measure", "multifd.jobs.bench.model", "multifd.jobs.bench.picture"),
    "multifd.deflate": ("multifd.formats.deflate",),
    "multifd.doctor": ("multifd.jobs.doctor.compare", "multifd.jobs.doctor.side", "multifd.jobs.doctor.trouble"),
    "multifd.flags": ("multifd.hookspecs", "multifd.wire.flags"),
    "multifd.inspect": ("multifd.jobs.inspect",),
    "multifd.migrate": (
        "multifd.jobs.report",
        "multifd.net.deadline",
        "multifd.jobs.source.send",
        "multifd.jobs.destination.receive",
    ),
    "multifd.observers": ("multifd.observe.hooks", "multifd.observe.observers"),
    "multifd.pagedevice": ("multifd.formats.pagedevice",),
    "multifd.pagelist": ("multifd.formats.pagelist",),
    "multifd.plugins": (
        "rows=multifd.codec.probing:compressors",
        "multifd.codec.settings",
        "multifd.codec.selection",
        "multifd.codec.compressor",
        "multifd.codec.hooks",
        "multifd.codec.discovery",
        "multifd.codec.probing",
        "multifd.codec.readers",
        "multifd.effort.choice",
    ),
    "multifd.qmp": ("multifd.qemu.monitor", "multifd.qemu.settings", "multifd.qemu.driver"),
    "multifd.relay": ("multifd.jobs.relay.server", "multifd.jobs.relay.outcome", "multifd.jobs.relay.counters"),
    "multifd.snapshot": (
        "open_source=multifd.snapshot.reader:open_snapshot",
        "Source=multifd.snapshot.reader:Snapshot",
        "SourceBlock=multifd.snapshot.reader:SnapshotBlock",
        "multifd.snapshot.format",
        "multifd.snapshot.writer",
    ),
    "multifd.stored": ("multifd.formats.stored",),
    "multifd.wire": ("multifd.hookspecs", "multifd.wire.packet"),
}


class Finder:
    """For the import system, which asks it for what is found nowhere else: a module of 0.1 that is none any more."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG004
        """Its spec, or None."""
        return ModuleSpec(name, _Loader) if name in MOVED else None  # type: ignore[arg-type]


class _Loader:
    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return (_OldInspect if spec.name == "multifd.inspect" else ModuleType)(spec.name, __doc__)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        module.__dict__["__getattr__"] = older(module.__name__)


class _OldInspect(ModuleType):
    """`multifd.inspect` was a module and is a function: whichever is imported first, it is both."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from multifd.jobs.inspect import inspect

        return inspect(*arguments, **options)


def older(module: str) -> Callable[[str], Any]:
    """`__getattr__` of a module that has moved, or is a package now: gives its old names, with a warning each."""

    def get(name: str) -> Any:
        from importlib import import_module
        from warnings import warn

        for place in () if name.startswith("__") else MOVED[module]:
            old, renamed, home = place.rpartition("=")
            home, _, new = home.partition(":")
            new = new or name
            if (renamed and old != name) or not hasattr(found_in := import_module(home), new):
                continue
            found = getattr(found_in, new)
            defined = str(getattr(found, "__module__", home))
            if callable(found) and defined.startswith("multifd.") and home not in (defined, "multifd.hookspecs"):
                continue  # one that is imported there, too
            now = f"multifd.{new}" if PROMISED.get(new) == home else f"{home}.{new}"
            warn(f"{module}.{name} is {now} now; the old name goes with multifd 0.3", DeprecationWarning, stacklevel=2)
            return found
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return get
