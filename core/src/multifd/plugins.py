"""Find, probe and load one compressor by its name."""

from __future__ import annotations

import difflib
import json
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any

import pluggy

from multifd import hookspecs
from multifd.errors import CompressorError, HostError, MultifdError, UsageError
from multifd.flags import METHODS, THIRD_PARTY_FLAGS, method_name
from multifd.hookspecs import API_VERSION, ENTRY_POINT_GROUP, Channel, Facts, OptionValue, Probe

#: Compressors of this project: what to say when one is asked for and not installed.
OURS = {
    "none": "multifd-core",
    "zlib": "multifd-zlib",
    "zstd": "multifd-zstd",
    "qatzip": "multifd-qatzip",
    "qatzip-sw": "multifd-qatzip",
}
RESERVED = {
    "auto": "choosing the compressor by itself",
    "adaptive": "choosing the compressor packet by packet",
}
#: Seconds a probe in a child process may take before it counts as hanging.
PROBE_TIMEOUT = 10.0

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


@cache
def _entry_points() -> dict[str, list[metadata.EntryPoint]]:
    found: dict[str, list[metadata.EntryPoint]] = {}
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(entry.name, []).append(entry)
    return found


def _distribution(entry: metadata.EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"


def names() -> list[str]:
    """The names of all installed compressors; imports none of them."""
    return sorted(_entry_points())


def names_of_method(method: str) -> list[str]:
    """The installed compressors of one method: METHOD and METHOD-suffix; imports none."""
    return [name for name in names() if name == method or name.startswith(method + "-")]


class Compressor:
    """One loaded compressor with a PluginManager of its own, so no hook reaches another."""

    def __init__(self, name: str, plugin: object, distribution: str) -> None:
        self.name = name
        self.distribution = distribution
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
        except Exception as error:
            raise CompressorError(f"{self}: its hooks do not fit this multifd: {error}") from error
        self.hook = self._manager.hook
        self.facts = self._check_facts(self._call("multifd_compressor"))

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution})"

    def failed(self, doing: str, error: BaseException) -> MultifdError:
        """What a hook raised, as an error that says in which compressor."""
        if isinstance(error, CompressorError):
            return CompressorError(f"{doing}: {self.name}: {error}")
        if isinstance(error, MultifdError):
            return error
        return CompressorError(f"{doing}: {self} failed: {_describe(error)}")

    def cleanup(self, direction: str, channel: Channel) -> None:
        """Call a cleanup hook; one that raises all the same is told on standard error."""
        try:
            getattr(self.hook, f"multifd_{direction}_cleanup")(channel=channel)
        except HOOK_ERRORS as error:
            warnings.warn(
                f"{self}: multifd_{direction}_cleanup raised {_describe(error)}", RuntimeWarning, stacklevel=1
            )

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
        return facts

    def probe(self, settings: Settings) -> Probe:
        """Ask whether it works here, in this process.  Raises CompressorError where it breaks."""
        probe = self._call("multifd_probe", options=settings.options)
        if not isinstance(probe, Probe):
            raise CompressorError(f"{self}: multifd_probe returned {type(probe).__name__}, not Probe")
        return probe

    def channel(self, number: int, page_size: int, settings: Settings) -> Channel:
        """A fresh channel for this compressor's hooks."""
        return Channel(number, page_size, settings.level, settings.options)

    def settings(self, given: Mapping[str, str], *, sending: bool) -> Settings:
        """Check settings against the facts.

        Raises UsageError for a key, level or value that this compressor does not have.
        """
        options: dict[str, OptionValue] = {option.name: option.default for option in self.facts.options}
        level = self.facts.default_level if sending else None
        for key, text in given.items():
            if key == "level":
                wanted = self._level(text)
                level = wanted if sending else None
                continue
            if key not in options:
                known = ", ".join([*(["level"] if self.facts.levels else []), *options]) or "none"
                raise UsageError(f"{self.name} has no option {key!r}; it has: {known}")
            options[key] = self._option(key, options[key], text)
        return Settings(level, options)

    def _level(self, text: str) -> int:
        levels = self.facts.levels
        if levels is None:
            raise UsageError(f"{self.name} has no level: leave level={text} out")
        try:
            level = int(text)
        except ValueError:
            raise UsageError(f"{self.name}: level {text!r} is not a number") from None
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
    """A compressor's settings, checked: the level (None where there is none) and all options."""

    level: int | None
    options: Mapping[str, OptionValue]


def _describe(error: BaseException) -> str:
    text = str(error).strip().replace("\n", " ")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def load(name: str) -> Compressor:
    """Import the one compressor of this name, and no other.

    Raises HostError where nobody provides it, CompressorError where its plugin is broken or
    two distributions claim the name, UsageError for a reserved name.
    """
    if name in RESERVED:
        raise UsageError(f"{name!r} is reserved for {RESERVED[name]}, which this version cannot do: name one")
    installed = _entry_points()
    entries = installed.get(name)
    if not entries:
        raise HostError(_nobody_provides(name, sorted(installed)))
    if len(entries) > 1:
        both = " and ".join(sorted(_distribution(entry) for entry in entries))
        raise CompressorError(f"the compressor {name!r} is provided by {both}: uninstall one of them")
    distribution = _distribution(entries[0])
    try:
        plugin = entries[0].load()
    except HOOK_ERRORS as error:
        raise CompressorError(f"{name} ({distribution}): import failed: {_describe(error)}") from error
    return Compressor(name, plugin, distribution)


def _nobody_provides(name: str, installed: list[str]) -> str:
    text = f"no compressor is named {name!r}; installed: {', '.join(installed) or 'none'}"
    if name in OURS:
        return f"{text}: pip install {OURS[name]}"
    near = difflib.get_close_matches(name, [*installed, *OURS], n=1)
    if not near:
        return text
    return f"{text}: did you mean {near[0]}?" + ("" if near[0] in installed else f" pip install {OURS[near[0]]}")


def select(spec: Spec, *, sending: bool) -> tuple[Compressor, Settings]:
    """Load a compressor, check its settings and make sure it works here with them.

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


def _why_not(probe: Probe) -> str:
    return "; ".join(filter(None, (probe.reason, probe.install))) or "it does not say why"


def select_for_flag(flag: int) -> tuple[Compressor, Settings]:
    """The best available compressor to receive a method number: hardware first.

    Raises HostError where none is installed or none works here.
    """
    method = method_name(flag)
    candidates = names_of_method(method) if method in METHODS else names()
    if method in METHODS and len(candidates) == 1:
        return select(Spec(candidates[0]), sending=False)
    compressor = load(_best(flag, tuple(candidates)))
    return compressor, compressor.settings({}, sending=False)


@cache
def _best(flag: int, candidates: tuple[str, ...]) -> str:
    method = method_name(flag)
    rows = [row for row in probe_all(list(candidates)) if row["flag"] == flag]
    working = [row for row in rows if row["available"]]
    if working:
        best = min(working, key=lambda row: (not row["hardware"], row["reason"] != "", row["name"]))
        return str(best["name"])
    if rows:
        reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in rows)
        raise HostError(f"the packets are {method}, and nothing here can read them: {reasons}")
    hint = f"pip install {OURS[method]}" if method in OURS else "install a compressor of that method"
    raise HostError(f"the packets are {method}, and no compressor for it is installed: {hint}")


def rows() -> list[dict[str, Any]]:
    """Every installed compressor with its facts and probe, as `multifd compressors` shows them.

    Each is loaded and probed in a child process, so that one that is broken, hangs, prints or
    crashes is a row with its reason.
    """
    return probe_all(names())


def probe_all(compressors: list[str], timeout: float = PROBE_TIMEOUT) -> list[dict[str, Any]]:
    """The rows of these compressors, by name; children run at the same time."""
    if not compressors:
        return []
    from concurrent.futures import ThreadPoolExecutor  # not for those who only send or receive

    installed = _entry_points()
    with ThreadPoolExecutor(max_workers=2 * (os.cpu_count() or 1)) as pool:
        probed = pool.map(lambda name: _probe_in_child(name, timeout), compressors)
        return [_empty_row(name, installed[name]) | row for name, row in zip(compressors, probed, strict=True)]


def _empty_row(name: str, entries: list[metadata.EntryPoint]) -> dict[str, Any]:
    method = name.partition("-")[0]
    return {
        "name": name,
        "method": method,
        "flag": METHODS.get(method),
        "available": False,
        "hardware": False,
        "provider": "",
        "version": "",
        "distribution": " and ".join(sorted(_distribution(entry) for entry in entries)),
        "reason": "",
        "install": "",
        "devices": [],
        "summary": "",
        "levels": None,
        "default_level": None,
    }


def _probe_in_child(name: str, timeout: float) -> dict[str, Any]:
    import signal
    import subprocess

    read_end, write_end = os.pipe()
    with open(read_end, "rb") as answer:
        try:
            # The answer has a pipe of its own: a vendor's library may print what it likes.
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", "from multifd.plugins import _child; _child()", name, str(write_end)],
                stdin=subprocess.DEVNULL,
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


def _child() -> None:
    name, write_end = sys.argv[1:]
    row = _row(name)
    with open(int(write_end), "w") as answer:
        json.dump(row, answer)


def _row(name: str) -> dict[str, Any]:
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
        }
        probe = compressor.probe(compressor.settings({}, sending=True))
    except MultifdError as error:
        return row | {"reason": str(error)}
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
