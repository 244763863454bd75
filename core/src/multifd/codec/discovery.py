"""Who provides a plugin: found by its name, turned off, and loaded alone."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from multifd.codec.compressor import Compressor
from multifd.codec.contract import breaks
from multifd.codec.hooks import check_own
from multifd.errors import CallerError, CompressorError, UsageError, describe
from multifd.hookspecs import COMMAND_GROUP, ENTRY_POINT_GROUP, OBSERVER_GROUP
from multifd.log import log

#: Names what is to be left out, parted by commas: a distribution, or else a plugin.  Children inherit it.
DISABLE = "MULTIFD_DISABLE"


#: Seconds after which an import is too long: every command that uses the plugin waits for it.
SLOW_IMPORT = 1.0
#: Groups of other packages that are like ours by their names, and right.
OTHER_GROUPS = {"multifd.exporters"}


@dataclass(frozen=True, slots=True)
class Provider:
    """Who provides a plugin: a distribution, or a `--plugin` file by its path.  `load` imports it."""

    name: str
    load: Callable[[], object]
    dist: metadata.Distribution | None = None
    path: str = ""
    #: `module:attribute` of an entry point.
    target: str = ""

    def __str__(self) -> str:
        return " ".join(_owner(self.dist)[:2]).strip() if self.dist else self.path

    @property
    def owner(self) -> str:
        """The distribution's name; empty for a file."""
        return _owner(self.dist)[0] if self.dist else ""

    @property
    def flaw(self) -> str:
        """What is wrong with the distribution itself, or empty."""
        return _owner(self.dist)[2] if self.dist else ""

    @property
    def off(self) -> str:
        """What turns it off."""
        return f"--disable {self.owner}" if self.owner else f"no --plugin {self.path}"


@cache
def _owner(dist: metadata.Distribution) -> tuple[str, str, str]:
    """A distribution's name, its version, and what is wrong with it; reads a file."""
    try:
        if dist.name and dist.version:
            return dist.name, dist.version, ""
    except Exception:  # noqa: BLE001 - what a missing one raises depends on the version of Python
        pass
    folder = Path(str(getattr(dist, "_path", "nameless-0.dist-info")))  # what pip left: NAME-VERSION.dist-info
    name, _, version = folder.stem.partition("-")
    return name, version, f"{folder} has no METADATA: install it again, or remove that directory"


#: Of `--plugin`.
files: list[Provider] = []
#: Plugins whose import took long, and what is to be said of that.
slow: dict[str, str] = {}


def _provider(entry: metadata.EntryPoint) -> Provider:
    return Provider(entry.name, entry.load, entry.dist, target=entry.value)


@cache
def _entry_points(group: str) -> tuple[Provider, ...]:
    return tuple(map(_provider, metadata.entry_points(group=group)))


@cache
def misplaced() -> Mapping[str, tuple[Provider, str]]:
    """Plugins whose group is like `multifd.compressors`, and none that anybody looks into: name -> who, group."""
    known = {ENTRY_POINT_GROUP, OBSERVER_GROUP, COMMAND_GROUP, *OTHER_GROUPS}
    return {
        entry.name: (_provider(entry), entry.group)
        for dist in metadata.distributions()
        for entry in dist.entry_points
        if entry.group not in known and re.match("multifd([-_. ]|$)", entry.group, re.IGNORECASE)
    }


def misplaced_text(found: Provider, group: str) -> str:
    """What to say of one."""
    sentence = "named by an entry point of group `multifd.compressors`"
    return breaks(f"{found} has an entry point {found.name!r} in the group {group!r}, which nobody reads", sentence)


def installed(group: str) -> list[Provider]:
    """Everything of a group, turned off or not."""
    return [*_entry_points(group), *(files if group == ENTRY_POINT_GROUP else ())]


def _normal(name: str) -> str:
    """A name as pip compares it."""
    return re.sub("[-_.]+", "-", name).lower()


def providers(group: str) -> dict[str, list[Provider]]:
    """Who provides each plugin of an entry-point group, without those turned off; imports none."""
    found = installed(group)
    off = {_normal(name.strip()) for name in os.environ.get(DISABLE, "").split(",") if name.strip()}
    if off:
        owners = [_normal(provider.owner) for provider in found]
        # A distribution's name means only what it provides, so that of two with one plugin one can be chosen.
        off_plugins = off - set(owners)
        found = [
            each
            for each, owner in zip(found, owners, strict=True)
            if owner not in off and _normal(each.name) not in off_plugins
        ]
    by_name: dict[str, list[Provider]] = {}
    for each in found:
        by_name.setdefault(each.name, []).append(each)
    return by_name


def provider_of(group: str, kind: str, name: str) -> Provider | None:
    """The one who provides a plugin; None for nobody.  `kind` is what people call it.

    Raises UsageError where it is turned off, CompressorError where several do.
    """
    found = providers(group).get(name, [])
    if len(found) > 1:
        raise CompressorError(f"the {kind} {name!r} is provided by {choose(found, group)}")
    if not found and any(other.name == name for other in installed(group)):
        raise UsageError(f"the {kind} {name!r} is turned off, by --disable or {DISABLE}")
    return found[0] if found else None


def choose(found: Iterable[Provider], group: str = ENTRY_POINT_GROUP) -> str:
    """Who they are, and how to keep one."""
    found = sorted(found, key=str)
    owners = " and ".join(map(str, found))
    if group == COMMAND_GROUP:  # they are found before options are read
        return f"{owners}: keep one, with {' or '.join(f'{DISABLE}={each.owner}' for each in found)}"
    return f"{owners}: keep one, with {' or '.join(each.off for each in found)} (or {DISABLE})"


def disable(given: Sequence[str]) -> None:
    """Turn plugins off before any is loaded, here and in child processes: as `MULTIFD_DISABLE` does.

    Each name is a distribution's (all that it provides), or else a plugin's (whoever provides it).
    Warns of one that nothing has.
    """
    found = [each for group in (ENTRY_POINT_GROUP, OBSERVER_GROUP, COMMAND_GROUP) for each in installed(group)]
    known = {_normal(each.name) for each in found} | {_normal(each.owner) for each in found if each.owner}
    for name in given:
        if _normal(name) not in known:
            log.warning(f"--disable {name}: nothing that is installed has this name")
    os.environ[DISABLE] = ",".join(filter(None, (os.environ.get(DISABLE, ""), *given)))


def add_file(path: str) -> None:
    """Load a compressor from a single file during its development; its facts say its name.

    Raises CallerError where there is no such file, CompressorError where it is broken.
    """
    from importlib import util

    path = os.path.abspath(path)
    # The prefix keeps a file called zlib.py from being everybody's zlib.
    spec = util.spec_from_file_location(f"multifd_plugin_file_{len(files)}_{Path(path).stem}", path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise CallerError(f"{path} is not a Python file: --plugin takes FILE.py")
    module = sys.modules[spec.name] = util.module_from_spec(spec)
    try:
        with _timed(path):
            spec.loader.exec_module(module)
    except BaseException as error:
        check_own(error)
        raise CompressorError(f"{path}: import failed: {describe(error)}") from error
    name = Compressor(None, module, path).name
    if path in slow:
        slow[name] = slow[path]
    files.append(Provider(name, lambda: module, path=path))


@contextmanager
def _timed(name: str) -> Iterator[None]:
    """Tell of an import that takes long."""
    started = time.perf_counter()
    yield
    if (seconds := time.perf_counter() - started) > SLOW_IMPORT:
        sentence = "The import takes less than a second: whoever names the compressor waits for it."
        slow[name] = breaks(f"importing it took {seconds:.1f} s", sentence)
        log.warning(f"{name}: {slow[name]}")


def load_plugin(found: Provider) -> Any:
    """Import what somebody provides.  Raises CompressorError where that fails."""
    try:
        with _timed(found.name):
            return found.load()
    except BaseException as error:
        check_own(error)
        ours = isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "multifd"
        hint = ": it is written for another multifd-core, upgrade the older of the two" if ours else ""
        hint = hint or f"{': ' * bool(found.flaw)}{found.flaw}"
        raise CompressorError(f"{found.name} ({found}): import failed: {describe(error)}{hint}") from error


def flaw(found: Provider) -> str:
    """Why somebody's plugin cannot be loaded, as far as that can be told without importing any of it; or empty."""
    from importlib import util

    package = found.target.partition(":")[0].partition(".")[0].strip()
    if not package.isidentifier():
        return f"its entry point {found.target!r} is no module:attribute"
    try:
        there = util.find_spec(package) is not None
    except (ValueError, ImportError):  # of a module that is imported, and was not found as others are
        there = False
    return "" if there else f"there is no module {package!r}"
