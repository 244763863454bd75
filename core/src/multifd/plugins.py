"""Find, probe and load one compressor by its name."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pluggy

from multifd import hookspecs
from multifd.errors import CallerError, CompressorError, HostError, MultifdError, UsageError
from multifd.flags import DEFAULT_PAGE_SIZE, METHODS, PACKET_SIZE, THIRD_PARTY_FLAGS, method_name
from multifd.hookspecs import API_VERSION, ENTRY_POINT_GROUP, OBSERVER_GROUP, Channel, Facts, OptionValue, Probe

#: Compressors of this project: what to say when one is asked for and not installed.
OURS = {
    "none": "multifd-core",
    "zlib": "multifd-zlib",
    "zstd": "multifd-zstd",
    "qatzip": "multifd-qatzip",
    "qatzip-sw": "multifd-qatzip",
    "qpl": "multifd-qpl",
    "qpl-sw": "multifd-qpl",
    "uadk": "multifd-uadk",
    "uadk-sw": "multifd-uadk",
}
#: Chooses the best available compressor where memory is sent; takes whatever comes where it is received.
AUTO = "auto"
#: Chooses among all of them, packet by packet; likewise.
ADAPTIVE = "adaptive"
RESERVED = {
    AUTO: "choosing the compressor, where memory is sent",
    ADAPTIVE: "choosing the compressor packet by packet, where memory is sent",
}
#: What a level may be instead of a number: found out while it runs, again and again or once.
EFFORTS = ("adaptive", "auto")
#: Names what is to be left out, parted by commas: a distribution, or else a plugin.  Children inherit it.
DISABLE = "MULTIFD_DISABLE"
#: Seconds a probe in a child process may take before it counts as hanging.
PROBE_TIMEOUT = 10.0

#: Compressors whose times differ by less are as fast, on a machine that others use too.
SAME_SPEED = 1.3

#: What a plugin may raise instead of returning; Ctrl-C is not its own.
HOOK_ERRORS = (Exception, SystemExit)


@dataclass(frozen=True, slots=True)
class Spec:
    """`NAME[,key=value...]` of a command line: a compressor's name and its settings, unchecked."""

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Raises UsageError for a setting without `=` or given twice."""
        name, *pairs = text.split(",")
        settings: dict[str, str] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not key or not equals:
                raise UsageError(f"compressor {text!r}: {pair!r} is not key=value")
            if key in settings:
                raise UsageError(f"compressor {text!r}: {key} is given twice")
            settings[key] = value
        if not name:
            raise UsageError(f"compressor {text!r} has no name")
        return cls(name, settings)

    def __str__(self) -> str:
        return ",".join((self.name, *(f"{key}={value}" for key, value in self.settings.items())))


@dataclass(frozen=True, slots=True)
class Provider:
    """Who provides a plugin: a distribution, or a `--plugin` file by its path.  `load` imports it."""

    name: str
    load: Callable[[], object]
    dist: metadata.Distribution | None = None
    path: str = ""

    def __str__(self) -> str:
        return f"{self.dist.name} {self.dist.version}" if self.dist else self.path

    @property
    def off(self) -> str:
        """What turns it off."""
        return f"--disable {self.dist.name}" if self.dist else f"no --plugin {self.path}"


_files: list[Provider] = []


@cache
def _entry_points(group: str) -> tuple[Provider, ...]:
    return tuple(Provider(entry.name, entry.load, entry.dist) for entry in metadata.entry_points(group=group))


def _installed(group: str) -> list[Provider]:
    """Everything of a group, turned off or not."""
    return [*_entry_points(group), *(_files if group == ENTRY_POINT_GROUP else ())]


def _normal(name: str) -> str:
    """A name as pip compares it."""
    return re.sub("[-_.]+", "-", name).lower()


def providers(group: str) -> dict[str, list[Provider]]:
    """Who provides each plugin of an entry-point group, without those turned off; imports none."""
    found = _installed(group)
    off = {_normal(name.strip()) for name in os.environ.get(DISABLE, "").split(",") if name.strip()}
    if off:
        owners = [_normal(provider.dist.name) if provider.dist else "" for provider in found]
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
        raise CompressorError(f"the {kind} {name!r} is provided by {_choose(found)}")
    if not found and any(other.name == name for other in _installed(group)):
        raise UsageError(f"the {kind} {name!r} is turned off, by --disable or {DISABLE}")
    return found[0] if found else None


def _choose(found: Iterable[Provider]) -> str:
    """Who they are, and how to keep one."""
    found = sorted(found, key=str)
    return f"{' and '.join(map(str, found))}: keep one, with {' or '.join(each.off for each in found)} (or {DISABLE})"


def disable(given: Sequence[str]) -> None:
    """Turn plugins off before any is loaded, here and in child processes: as `MULTIFD_DISABLE` does.

    Each name is a distribution's (all that it provides), or else a plugin's (whoever provides it).
    Warns of one that nothing has.
    """
    found = [*_installed(ENTRY_POINT_GROUP), *_installed(OBSERVER_GROUP)]
    known = {_normal(each.name) for each in found} | {_normal(each.dist.name) for each in found if each.dist}
    for name in given:
        if _normal(name) not in known:
            warnings.warn(f"--disable {name}: nothing that is installed has this name", RuntimeWarning, stacklevel=2)
    os.environ[DISABLE] = ",".join(filter(None, (os.environ.get(DISABLE, ""), *given)))


def add_file(path: str) -> None:
    """Load a compressor from a single file during its development; its facts say its name.

    Raises CallerError where there is no such file, CompressorError where it is broken.
    """
    from importlib import util

    path = os.path.abspath(path)
    # The prefix keeps a file called zlib.py from being everybody's zlib.
    spec = util.spec_from_file_location(f"multifd_plugin_file_{len(_files)}_{Path(path).stem}", path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise CallerError(f"{path} is not a Python file: --plugin takes FILE.py")
    module = sys.modules[spec.name] = util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except HOOK_ERRORS as error:
        raise CompressorError(f"{path}: import failed: {describe(error)}") from error
    _files.append(Provider(Compressor(None, module, path).name, lambda: module, path=path))


def names() -> list[str]:
    """The names of all installed compressors that are not turned off; imports none of them."""
    return sorted(providers(ENTRY_POINT_GROUP))


def names_of_method(method: str) -> list[str]:
    """The installed compressors of one method: METHOD and METHOD-suffix; imports none."""
    return [name for name in names() if name == method or name.startswith(method + "-")]


class Compressor:
    """One loaded compressor with a PluginManager of its own, so no hook reaches another."""

    def __init__(self, name: str | None, plugin: object, distribution: str) -> None:
        """`name` is None where only its facts say it.  Raises CompressorError where it is broken."""
        self.name = name or "the compressor"
        self.distribution = distribution
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        try:
            self._manager.register(plugin)
            self._manager.check_pending()
        except Exception as error:
            raise CompressorError(f"{self}: its hooks do not fit this multifd: {error}") from error
        self.hook = self._manager.hook
        facts = self._call("multifd_compressor")
        if name is None and isinstance(facts, Facts):
            self.name = facts.name
        try:
            self.facts = self._check_facts(facts)
        except (TypeError, AttributeError) as error:
            raise CompressorError(f"{self}: its facts make no sense: {error}") from error

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution})"

    def failed(self, doing: str, error: BaseException) -> MultifdError:
        """What a hook raised, as an error that says in which compressor."""
        if isinstance(error, CompressorError):
            return CompressorError(f"{doing}: {self.name}: {error}")
        if isinstance(error, MultifdError):
            return error
        return CompressorError(f"{doing}: {self} failed: {describe(error)}")

    def cleanup(self, direction: str, channel: Channel) -> None:
        """Call a cleanup hook; one that raises all the same is told on standard error."""
        try:
            getattr(self.hook, f"multifd_{direction}_cleanup")(channel=channel)
        except HOOK_ERRORS as error:
            warnings.warn(f"{self}: multifd_{direction}_cleanup raised {describe(error)}", RuntimeWarning, stacklevel=1)

    def _call(self, hook: str, **arguments: object) -> Any:
        try:
            return getattr(self.hook, hook)(**arguments)
        except HOOK_ERRORS as error:
            raise self.failed(hook, error) from error

    def _check_facts(self, facts: object) -> Facts:
        if not isinstance(facts, Facts):
            raise CompressorError(f"{self}: multifd_compressor returned {type(facts).__name__}, not Facts")
        if facts.api_version != API_VERSION:
            older = facts.api_version < API_VERSION
            raise CompressorError(
                f"{self}: written for API version {facts.api_version}, this core has {API_VERSION}: "
                f"upgrade {self.distribution.split()[0] if older else 'multifd-core'}"
            )
        if facts.name != self.name:
            raise CompressorError(f"{self}: calls itself {facts.name!r}")
        if facts.name != facts.method and not facts.name.startswith(facts.method + "-"):
            raise CompressorError(
                f"{self}: a compressor of method {facts.method} is named so, or {facts.method}-suffix"
            )
        known = METHODS.get(facts.method)
        if known is not None and facts.flag != known:
            raise CompressorError(f"{self}: flag {facts.flag}, but QEMU's {facts.method} has {known}")
        if known is None and facts.flag not in THIRD_PARTY_FLAGS:
            raise CompressorError(
                f"{self}: flag {facts.flag} is not free, a method of its own takes "
                f"{THIRD_PARTY_FLAGS.start}..{THIRD_PARTY_FLAGS.stop - 1}"
            )
        if facts.levels is not None and facts.default_level not in facts.levels:
            raise CompressorError(f"{self}: default level {facts.default_level} is not one of its levels")
        if len(facts.ladder) == 1 or (facts.ladder and facts.levels is None):
            raise CompressorError(f"{self}: a ladder of {facts.ladder} is no choice of levels")
        return facts

    def probe(self, settings: Settings) -> Probe:
        """Ask whether it works here, in this process.  Raises CompressorError where it breaks."""
        probe = self._call("multifd_probe", options=settings.options)
        if not isinstance(probe, Probe):
            raise CompressorError(f"{self}: multifd_probe returned {type(probe).__name__}, not Probe")
        return probe

    def measure(
        self,
        settings: Settings,
        sample: memoryview,
        page_size: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> tuple[float, float]:
        """Compress a sample of memory: seconds and payload bytes, each per byte of pages.  Raises CompressorError.

        The second half counts, where there are two: the first gets the library going.  `clock` says which seconds: by
        default those that pass, which a device's are too.
        """
        half = len(sample) // 2 // page_size * page_size

        def compress(pages: memoryview) -> tuple[float, float]:
            size = 0
            started = clock()
            for at in range(0, len(pages), PACKET_SIZE):
                packet = [pages[at : at + PACKET_SIZE]]
                size += sum(map(len, self._call("multifd_send_prepare", channel=channel, pages=packet)))
            return (clock() - started) / len(pages), size / len(pages)

        channel = self.channel(0, page_size, settings)
        try:
            self._call("multifd_send_setup", channel=channel)
            if half:
                compress(sample[:half])
            return compress(sample[half:])
        finally:
            self.cleanup("send", channel)

    def channel(self, number: int, page_size: int, settings: Settings, *, live: bool = False) -> Channel:
        """A fresh channel for this compressor's hooks; `live` where its level may change."""
        return Channel(number, page_size, settings.level, settings.options, live=live)

    def settings(self, given: Mapping[str, str], *, sending: bool) -> Settings:
        """Check settings against the facts.

        Raises UsageError for a key, level or value that this compressor does not have.
        """
        options: dict[str, OptionValue] = {option.name: option.default for option in self.facts.options}
        level = self.facts.default_level if sending else None
        effort = ""
        for key, text in given.items():
            if key == "level" and text in EFFORTS and self.facts.ladder:
                effort = text if sending else ""
                continue
            if key == "level":
                wanted = self._level(text)
                level = wanted if sending else None
                continue
            if key not in options:
                known = ", ".join([*(["level"] if self.facts.levels else []), *options]) or "none"
                raise UsageError(f"{self.name} has no option {key!r}; it has: {known}")
            options[key] = self._option(key, options[key], text)
        return Settings(level, options, effort)

    def _level(self, text: str) -> int:
        levels = self.facts.levels
        if levels is None:
            raise UsageError(f"{self.name} has no level: leave level={text} out")
        try:
            level = int(text)
        except ValueError:
            words = f", {' or '.join(EFFORTS)}" if self.facts.ladder else ""
            raise UsageError(f"{self.name}: level {text!r} is not a number{words}") from None
        if level not in levels:
            raise UsageError(f"{self.name}: level {level} is outside {levels.start}..{levels.stop - 1}")
        return level

    def _option(self, key: str, default: OptionValue, text: str) -> OptionValue:
        try:
            if isinstance(default, bool):
                return {"on": True, "off": False}[text]
            if isinstance(default, int):
                return int(text)
        except (KeyError, ValueError):
            kind = "on or off" if isinstance(default, bool) else "a number"
            raise UsageError(f"{self.name}: {key}={text} is not {kind}") from None
        return text


@dataclass(frozen=True, slots=True)
class Settings:
    """A compressor's settings, checked: the level (None where there is none) and all options.

    `effort` says who chooses the level while it runs: one of EFFORTS, empty for nobody.
    """

    level: int | None
    options: Mapping[str, OptionValue]
    effort: str = ""


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip().replace("\n", " ")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def load(name: str) -> Compressor:
    """Import the one compressor of this name, and no other.

    Raises HostError where nobody provides it, CompressorError where its plugin is broken or
    two distributions claim the name, UsageError for a reserved name and one that is turned off.
    """
    if name in RESERVED:
        raise UsageError(f"{name!r} is reserved for {RESERVED[name]}: name a compressor")
    found = provider_of(ENTRY_POINT_GROUP, "compressor", name)
    if found is None:
        raise HostError(_nobody_provides(name, names()))
    return Compressor(name, load_plugin(found), str(found))


def load_plugin(found: Provider) -> Any:
    """Import what somebody provides.  Raises CompressorError where that fails."""
    try:
        return found.load()
    except HOOK_ERRORS as error:
        ours = isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "multifd"
        hint = ": it is written for another multifd-core, upgrade the older of the two" if ours else ""
        raise CompressorError(f"{found.name} ({found}): import failed: {describe(error)}{hint}") from error


def _nobody_provides(name: str, installed: list[str]) -> str:
    text = f"no compressor is named {name!r}; installed: {', '.join(installed) or 'none'}"
    if name in OURS:
        return f"{text}: pip install {OURS[name]}"
    near = difflib.get_close_matches(name, [*installed, *OURS], n=1)
    if not near:
        return text
    return f"{text}: did you mean {near[0]}?" + ("" if near[0] in installed else f" pip install {OURS[near[0]]}")


def select(spec: Spec, *, sending: bool) -> tuple[Compressor, Settings]:
    """Load a compressor, check its settings and make sure it works here with them, in this process.

    Warns of one that works, but not as its name promises.  Raises as `load`, UsageError for wrong
    settings, HostError where it does not work.
    """
    compressor = load(spec.name)
    settings = compressor.settings(spec.settings, sending=sending)
    probe = compressor.probe(settings)
    if not probe.available:
        raise HostError(f"{compressor} is not available: {_why_not(probe)}")
    if probe.reason:
        warnings.warn(f"{spec.name} works in software: {_why_not(probe)}", RuntimeWarning, stacklevel=2)
    return compressor, settings


def settle(spec: Spec, sample: Callable[[], bytes], page_size: int = DEFAULT_PAGE_SIZE) -> Spec:
    """What `auto[,accepts=METHOD+METHOD...]` comes to for this memory; any other as it is.

    Raises as `best`, UsageError for another setting.
    """
    return Spec(best(sample(), page_size, accepted(spec))) if spec.name == AUTO else spec


def accepted(spec: Spec) -> Collection[str] | None:
    """The methods of `auto` and `adaptive` that the peer accepts; None for all.  Raises UsageError."""
    settings = dict(spec.settings)
    methods = settings.pop("accepts", None)
    if settings:
        raise UsageError(f"{spec.name} has no option {next(iter(settings))!r}; it has: accepts=METHOD+METHOD...")
    return methods.split("+") if methods is not None else None


def names_accepted(methods: Collection[str] | None) -> list[str]:
    """The installed compressors of these methods, or all.  Raises UsageError for a method nobody has."""
    if methods is None:
        return names()
    by_method = {method: names_of_method(method) for method in methods}
    for method, of_method in by_method.items():
        if method not in METHODS and not of_method:
            raise UsageError(f"there is no method {method!r}; installed: {', '.join(names())}")
    return sorted(set().union(*by_method.values()))


def best(sample: bytes, page_size: int = DEFAULT_PAGE_SIZE, methods: Collection[str] | None = None) -> str:
    """The name of the best available compressor: hardware first, then the fastest on a sample of memory.

    Of those about as fast, it is the one that makes the fewest bytes.
    One that does not make the sample smaller comes last, so `none` is chosen where nothing does.
    `methods` are those that the peer accepts, None for all.  An empty sample stands for some
    memory or other.  Raises HostError where none works here, UsageError for a method nobody has.
    """
    rows = probe_all(names_accepted(methods), sample=sample or _own_sample(), page_size=page_size)
    rows = [row for row in rows if methods is None or row["method"] in methods]
    working = [row for row in rows if row["available"]]
    if not working:
        reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in rows) or "none is installed"
        raise HostError(f"{AUTO}: no compressor that the peer accepts works here: {reasons}")

    def rank(row: Mapping[str, Any]) -> tuple[bool, bool, bool]:
        if row["ratio"] <= 1:
            return True, False, False
        return False, not row["hardware"], row["reason"] != ""

    first = min(map(rank, working))
    equals = [row for row in working if rank(row) == first]
    fastest = min(row["seconds"] for row in equals)
    # Of those about as fast, the one that makes the fewest bytes.
    return str(
        max((row for row in equals if row["seconds"] <= SAME_SPEED * fastest), key=lambda row: row["ratio"])["name"]
    )


def _own_sample() -> bytes:
    """Machine code, tables and text of this process, as they are in a guest's memory: up to four packets."""
    with open("/proc/self/maps") as maps:
        mapped = {line.split(maxsplit=5)[5].strip() for line in maps if " r-xp " in line and "/" in line}
    data = b""
    for path in [os.__file__, *sorted(filter(os.path.isfile, mapped))]:
        with open(path, "rb") as file:
            data += file.read(PACKET_SIZE)
    return data[: min(len(data) // 65536, 32) * 65536]  # pages of any size


def _why_not(probe: Probe) -> str:
    return "; ".join(filter(None, (probe.reason, probe.install))) or "it does not say why"


def select_for_flag(flag: int) -> tuple[Compressor, Settings]:
    """The best available compressor to receive a method number: hardware first.

    Raises HostError where none is installed or none works here, CompressorError where two methods
    have this number.
    """
    method = method_name(flag)
    candidates = names_of_method(method) if method in METHODS else names()
    if method in METHODS and len(candidates) == 1:
        return select(Spec(candidates[0]), sending=False)
    compressor = load(_reader(flag, tuple(candidates)))
    return compressor, compressor.settings({}, sending=False)


@cache
def _reader(flag: int, candidates: tuple[str, ...]) -> str:
    method = method_name(flag)
    rows = [row for row in probe_all(candidates) if row["flag"] == flag]
    if taken := taken_twice(flag, rows):
        raise CompressorError(taken)
    working = [row for row in rows if row["available"]]
    if working:
        return str(min(working, key=preference)["name"])
    if rows:
        reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in rows)
        raise HostError(f"the packets are {method}, and nothing here can read them: {reasons}")
    if any(each.name.partition("-")[0] == method for each in _installed(ENTRY_POINT_GROUP)):
        raise HostError(f"the packets are {method}, whose compressors are turned off, by --disable or {DISABLE}")
    hint = f"pip install {OURS[method]}" if method in OURS else "install a compressor of that method"
    raise HostError(f"the packets are {method}, and no compressor for it is installed: {hint}")


def preference(row: Mapping[str, Any]) -> tuple[bool, bool, str]:
    """The order of compressors that make the same bytes: hardware first, one that has nothing to say against itself."""
    return not row["hardware"], row["reason"] != "", row["name"]


def taken_twice(flag: int, rows: Sequence[Mapping[str, Any]]) -> str:
    """Why a packet with this flag cannot be read by any of these, where their methods differ; or empty."""
    mine = [row for row in rows if row["flag"] == flag]
    if len({row["method"] for row in mine}) < 2:
        return ""
    found = providers(ENTRY_POINT_GROUP)
    methods = " and ".join(sorted({row["method"] for row in mine}))
    owners = _choose(each for row in mine for each in found[row["name"]])
    return f"flag {flag} is taken by the methods {methods}, of {owners}"


def rows() -> list[dict[str, Any]]:
    """Every installed compressor with its facts and probe, as `multifd compressors` shows them.

    Each is loaded and probed in a child process, so that one that is broken, hangs, prints or
    crashes is a row with its reason.  One that is turned off is a row, and not loaded.
    """
    found = probe_all(sorted({each.name for each in _installed(ENTRY_POINT_GROUP)}))
    for row in found:
        if row["flag"] in THIRD_PARTY_FLAGS and (taken := taken_twice(row["flag"], found)):
            row["reason"] = "; ".join(filter(None, (row["reason"], taken)))
    return found


def probe_all(
    compressors: Sequence[str],
    timeout: float = PROBE_TIMEOUT,
    *,
    sample: bytes = b"",
    page_size: int = DEFAULT_PAGE_SIZE,
) -> list[dict[str, Any]]:
    """The rows of these compressors, by name, each from a child process.

    With a sample of memory, `seconds` is what each takes to compress it and `ratio` what that
    gives; then children run one by one, so as not to disturb each other, otherwise at the same time.
    """
    if not compressors:
        return []
    from concurrent.futures import ThreadPoolExecutor  # not for those who only send or receive

    enabled = providers(ENTRY_POINT_GROUP)
    installed = _installed(ENTRY_POINT_GROUP)
    with ThreadPoolExecutor(max_workers=1 if sample else 2 * (os.cpu_count() or 1)) as pool:
        probed = pool.map(lambda name: _probe_in_child(name, timeout, sample, page_size), compressors)
        return [
            _empty_row(name, enabled.get(name) or [each for each in installed if each.name == name]) | row
            for name, row in zip(compressors, probed, strict=True)
        ]


def _empty_row(name: str, found: Iterable[Provider]) -> dict[str, Any]:
    method = name.partition("-")[0]
    return {
        "name": name,
        "method": method,
        "flag": METHODS.get(method),
        "available": False,
        "hardware": False,
        "provider": "",
        "version": "",
        "distribution": " and ".join(sorted(map(str, found))),
        "reason": "",
        "install": "",
        "devices": [],
        "summary": "",
        "levels": None,
        "default_level": None,
        "ladder": [],
    }


def _probe_in_child(name: str, timeout: float, sample: bytes, page_size: int) -> dict[str, Any]:
    import signal
    import subprocess

    read_end, write_end = os.pipe()
    files = [each.path for each in _files]
    with open(read_end, "rb") as answer, open(os.memfd_create("sample"), "wb") as memory:
        memory.write(sample)
        memory.flush()
        try:
            # The answer has a pipe of its own: a vendor's library may print what it likes.
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", CHILD, name, str(write_end), str(page_size), *files],
                stdin=memory,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[write_end],
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        try:
            child.wait(timeout)
        except subprocess.TimeoutExpired:
            return {"reason": f"did not answer within {timeout:g} s", "install": "see what its library waits for"}
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        text = answer.read()
    try:
        row = json.loads(text)
        assert isinstance(row, dict)
        return row
    except (ValueError, AssertionError):
        status = child.returncode
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return {"reason": f"its process died while it was probed ({how})"}


CHILD = "from multifd.plugins import _child; _child()"


def _child() -> None:
    name, write_end, page_size, *files = sys.argv[1:]
    sample = os.pread(0, os.fstat(0).st_size, 0)
    for path in files:
        add_file(path)
    row = _row(name, sample, int(page_size))
    with open(int(write_end), "w") as answer:
        json.dump(row, answer)


def _row(name: str, sample: bytes, page_size: int) -> dict[str, Any]:
    row: dict[str, Any] = {}
    try:
        compressor = load(name)
        facts = compressor.facts
        row = {
            "method": facts.method,
            "flag": facts.flag,
            "summary": facts.summary,
            "levels": [facts.levels.start, facts.levels.stop - 1] if facts.levels is not None else None,
            "default_level": facts.default_level,
            "ladder": list(facts.ladder),
        }
        settings = compressor.settings({}, sending=True)
        probe = compressor.probe(settings)
        if sample and probe.available:
            seconds, left = compressor.measure(settings, memoryview(sample), page_size)
            row |= {"seconds": seconds, "ratio": 1 / left}
    except HOOK_ERRORS as error:
        return row | {"reason": str(error) if isinstance(error, MultifdError) else f"{name}: {describe(error)}"}
    reason = probe.reason or ("" if probe.available else _why_not(probe))
    return row | {
        "available": probe.available,
        "hardware": probe.hardware,
        "provider": probe.provider,
        "version": probe.version,
        "reason": reason,
        "install": probe.install,
        "devices": list(probe.devices),
    }
