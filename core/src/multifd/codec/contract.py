"""What a compressor is, says and returns, held against the contract: a mistake is one line with the sentence it breaks.

Every function returns the first mistake, or an empty text.  What a plugin returned may be anything.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from types import ModuleType
from typing import Any

from multifd import hookspecs
from multifd.errors import CompressorError
from multifd.hookspecs import API_VERSION, PROJECT, Facts, Option, Probe
from multifd.wire.flags import MAX_PAYLOAD, METHODS, THIRD_PARTY_FLAGS
from multifd.wire.packet import Buffer

#: The hooks that must be there.
REQUIRED = ("multifd_compressor", "multifd_probe", "multifd_send_prepare", "multifd_recv")
#: What a name on the command line is made of: `NAME,key=value` and METHOD+METHOD come apart again.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: Ways that a channel may count its packets by, and a way's characters.
MAX_WAYS = 64
LONGEST_WAY = 64
#: How like a hook's name another one has to be for a misspelt one.
ALIKE = 0.8

#: (whether it holds, what is wrong, the sentence that it breaks)
Question = tuple[bool, str, str]

MUST_BE_THERE = "`multifd_compressor`, `multifd_probe`, `multifd_send_prepare` and `multifd_recv` must be there"
MARKED = "A compressor is a module (or any object) whose functions are marked with `hookimpl`"
ARGUMENTS = "A function takes those of its hook's arguments that it names."
ONE_LINE = "`summary` is one line for people."
LEVELS = "`levels` is the range of levels the sending side takes, every one of them, and `default_level` one of it"
OPTIONS = "The type is the default's: bool (on or off), int, or str."
PAYLOAD = "Returns the payload as a sequence of bytes, bytearray or memoryview (of bytes)"
COUNTS = "A way is one short line, and there are 64 at most"


class WrongHooks(CompressorError):
    """The functions of a plugin are not those of a compressor."""


class WrongFacts(CompressorError):
    """What a compressor says of itself cannot be."""


def breaks(what: str, sentence: str) -> str:
    """A mistake, and the sentence of the contract that it breaks."""
    return f'{what}; the contract: "{sentence}"' if sentence else what


def shown(value: object) -> str:
    """A value that may be anything, and its type, in a few words."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 - it may be anything
        text = "something"
    return f"{text[:57] + '...' if len(text) > 60 else text} ({type(value).__name__})"


def one_line(text: object) -> bool:
    """Whether it is a line of text, and says something."""
    return isinstance(text, str) and bool(text.strip()) and len(text.splitlines()) == 1


def _first(questions: Iterable[Question]) -> str:
    return next((breaks(what, sentence) for holds, what, sentence in questions if not holds), "")


def _number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# --- its functions ---


def hooks_fault(plugin: object) -> str:
    """What is wrong with the functions of a plugin.  Raises what reading its attributes does."""
    return _first(_about_hooks(plugin))


def _about_hooks(plugin: object) -> Iterator[Question]:
    specs = {name: getattr(hookspecs, name) for name in vars(hookspecs) if name.startswith("multifd_")}
    marked: dict[str, tuple[object, dict[str, Any]]] = {}
    unmarked: list[str] = []
    odd: dict[str, str] = {}
    for name in dir(plugin):
        there = inspect.getattr_static(plugin, name, None)
        plain = inspect.isfunction(there) or inspect.ismethod(there) or inspect.isbuiltin(there)
        if plain or isinstance(there, staticmethod | classmethod):  # a property may load the library
            function = getattr(plugin, name)
            mark = getattr(function, f"{PROJECT}_impl", None)
            if isinstance(mark, dict):
                marked[mark.get("specname") or name] = function, mark
            elif name.startswith("m"):
                unmarked.append(name)
        elif name in specs:
            odd[name] = type(there).__name__
    what = "module" if isinstance(plugin, ModuleType) else type(plugin).__name__
    for name, kind in odd.items():
        yield False, f"{name} is a {kind} and no function: put it into a def that is marked with @hookimpl", MARKED
    yield not isinstance(plugin, type), f"its entry point is the class {plugin!r}: make an object of it", MARKED
    bare = [name for name in unmarked if name in specs]
    hint = f": put @hookimpl above {', '.join(bare)}" if bare else ""
    yield bool(marked), f"its {what} has no function that is marked with @hookimpl{hint}", MARKED
    missing = [name for name in specs if name not in marked]
    unknown = [name for name, (_, mark) in marked.items() if name not in specs and not mark.get("optionalhook")]
    for name in [*unknown, *unmarked]:
        yield name not in missing, f"{name} is not marked with @hookimpl", MARKED
        # A helper may be called much like a hook that need not be there.
        near = _alike(name, [hook for hook in missing if name in unknown or hook in REQUIRED])
        yield name not in marked and not near, f"{name} is no hook{near}", MUST_BE_THERE
    for name in REQUIRED:
        yield name in marked, f"it has no {name}", MUST_BE_THERE
    for hook, spec in specs.items():
        if hook in marked:
            yield from _about_function(hook, *marked[hook], spec)


def _alike(name: str, missing: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, missing, n=1, cutoff=ALIKE)
    return f": did you mean {near[0]}?" if near else ""


def _about_function(hook: str, function: object, mark: dict[str, Any], spec: object) -> Iterator[Question]:
    assert callable(function)
    assert callable(spec)
    wraps = mark.get("wrapper") or mark.get("hookwrapper")
    yields = inspect.isgeneratorfunction(function) and not wraps
    runs_later = yields or inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
    yield not runs_later, f"{hook} is a generator or async: calling it does nothing", ARGUMENTS
    known = inspect.signature(spec).parameters
    try:
        takes = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a library's own function does not always say
        return
    for one in takes:
        wanted = one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        text = f"{hook} takes {one.name!r}, which is none of its arguments: {hook}({', '.join(known)})"
        yield not wanted or one.name in known, text, ARGUMENTS
        yield not wanted or one.kind != one.KEYWORD_ONLY, f"{hook} takes {one.name!r} by keyword only", ARGUMENTS


# --- its facts ---


def facts_fault(facts: object, name: str, distribution: str) -> str:
    """What is wrong with the facts of the compressor that an entry point calls `name`."""
    if not isinstance(facts, Facts):
        return breaks(f"multifd_compressor returned {shown(facts)}, not Facts", "Return the facts, the same each time.")
    return _first(_about_facts(facts, name, distribution))


def _about_facts(facts: Facts, name: str, distribution: str) -> Iterator[Question]:
    version: object = facts.api_version
    yield _number(version), f"api_version is {shown(version)}, not an int", ""
    older = facts.api_version < API_VERSION
    upgrade = distribution.split(maxsplit=1)[0] if older else "multifd-core"
    text = f"written for API version {version}, this core has {API_VERSION}: upgrade {upgrade}"
    yield facts.api_version == API_VERSION, text, ""
    sentence = "`name` is the entry point's name: the method's, or METHOD-suffix"
    yield isinstance(facts.name, str), f"name is {shown(facts.name)}, not a str", sentence
    yield facts.name == name, f"calls itself {facts.name!r}, its entry point {name!r}", sentence
    text = f"the name {facts.name[:70]!r} cannot be written on a command line"
    yield bool(NAME.fullmatch(facts.name)), text, "of up to 64 ASCII letters and digits, `.`, `_` and `-`"
    yield isinstance(facts.method, str), f"method is {shown(facts.method)}, not a str", sentence
    text = f"a compressor of method {facts.method} is named so, or {facts.method}-suffix"
    own = facts.name == facts.method or bool(facts.method and facts.name.startswith(f"{facts.method}-"))
    yield own, text, sentence
    sentence = (
        "`flag` is the method's number in the compression field: QEMU's for its methods, 27..31 for third parties."
    )
    yield _number(facts.flag), f"flag is {shown(facts.flag)}, not an int", sentence
    known = METHODS.get(facts.method)
    yield known in (None, facts.flag), f"flag {facts.flag}, but QEMU's {facts.method} has {known}", sentence
    free = f"{THIRD_PARTY_FLAGS.start}..{THIRD_PARTY_FLAGS.stop - 1}"
    text = f"flag {facts.flag} is not free, a method of its own takes {free}"
    yield known is not None or facts.flag in THIRD_PARTY_FLAGS, text, sentence
    yield one_line(facts.summary), f"summary is {shown(facts.summary)}, not one line of text", ONE_LINE
    yield from _about_levels(facts.levels, facts.default_level, facts.ladder)
    yield from _about_options(facts.options)


def _about_levels(levels: object, default: object, ladder: object) -> Iterator[Question]:
    steps = isinstance(levels, range) and levels.step == 1 and len(levels) > 0
    yield levels is None or steps, f"levels is {shown(levels)}, neither a range in steps of 1 nor None", LEVELS
    if not isinstance(levels, range):
        yield default is None, f"default_level is {shown(default)} where there are no levels", LEVELS
    else:
        yield _number(default), f"default_level is {shown(default)}, not an int", LEVELS
        yield default in levels, f"default level {default} is not one of its levels", LEVELS
    sentence = "`ladder` are levels that may follow each other on one channel while it runs"
    right = isinstance(ladder, tuple | list) and all(map(_number, ladder)) and len(set(ladder)) == len(ladder)
    yield right, f"ladder is {shown(ladder)}, not a tuple of different levels", sentence
    assert isinstance(ladder, tuple | list)
    text = f"a ladder of {shown(ladder)} is no choice of levels"
    yield not ladder or (len(ladder) > 1 and levels is not None), text, sentence


def _about_options(options: object) -> Iterator[Question]:
    sentence = "An option of a compressor, `--compressor NAME,key=value`."
    right = isinstance(options, tuple | list) and all(isinstance(option, Option) for option in options)
    yield right, f"options is {shown(options)}, not a tuple of Option", sentence
    assert isinstance(options, tuple | list)
    names = [option.name for option in options]
    for option in options:
        key = isinstance(option.name, str) and option.name.replace("-", "_").isidentifier()
        yield key and option.name != "level", f"option {shown(option.name)} cannot be written as key=value", sentence
        yield names.count(option.name) == 1, f"option {option.name} is there twice", sentence
        usable = isinstance(option.default, int | str)
        yield usable, f"option {option.name}: the default is {shown(option.default)}", OPTIONS
        yield (
            one_line(option.help),
            f"option {option.name}: help is {shown(option.help)}, not one line of text",
            sentence,
        )


# --- its answers ---


def probe_fault(probe: object) -> str:
    """What is wrong with the answer of a probe."""
    sentence = "Say whether the compressor works here with these options."
    if not isinstance(probe, Probe):
        return breaks(f"multifd_probe returned {shown(probe)}, not Probe", sentence)
    return _first(_about_probe(probe, sentence))


def _about_probe(probe: Probe, sentence: str) -> Iterator[Question]:
    for name in ("available", "hardware"):
        value = getattr(probe, name)
        yield isinstance(value, bool), f"multifd_probe: {name} is {shown(value)}, not a bool", sentence
    for name in ("provider", "version", "reason", "install"):
        value = getattr(probe, name)
        text = f"multifd_probe: {name} is {shown(value)}, not a str"
        yield isinstance(value, str), text, "What a compressor found on this machine; every text is one line."
    devices: object = probe.devices
    right = isinstance(devices, tuple | list) and all(isinstance(device, str) for device in devices)
    text = f"multifd_probe: devices is {shown(devices)}, not a tuple of str"
    yield right, text, "`devices` which ones, for people"


_STRIDES = attrgetter("strides")
#: Of one row of bytes without gaps.
_BYTES = (1,)
_OWN_BYTES = {bytes, bytearray}


def payload_fault(payload: object, pages: tuple[memoryview, ...]) -> str:
    """What is wrong with a packet's payload; it may be the pages themselves.  Raises what looking at it does.

    Called for each packet: it takes 1 us for a few buffers, 10 us for 64 views.
    """
    if payload is not pages and (fault := _shape_fault(payload)):
        return fault
    length = sum(map(len, payload))  # type: ignore[call-overload] # it is a sequence
    if not 0 < length <= MAX_PAYLOAD:
        return breaks(f"multifd_send_prepare made {length} bytes", "1 to MAX_PAYLOAD (1 MiB) bytes together")
    return ""


def _shape_fault(payload: object) -> str:
    if not isinstance(payload, list | tuple) and (
        not isinstance(payload, Sequence) or isinstance(payload, str | bytes | bytearray | memoryview)
    ):
        return breaks(f"multifd_send_prepare returned {shown(payload)}", PAYLOAD)
    if not set(map(type, payload)) <= _OWN_BYTES and (wrong := _wrong_buffer(payload)):
        return breaks(f"multifd_send_prepare returned a sequence with {wrong}", PAYLOAD)
    return ""


def _wrong_buffer(payload: Sequence[Buffer]) -> str:
    if set(map(type, payload)) == {memoryview} and set(map(_STRIDES, payload)) == {_BYTES}:
        return ""
    for one in payload:
        try:
            view = memoryview(one)
        except TypeError:
            return f"{shown(one)} in it"
        if view.strides != _BYTES or view.nbytes != len(one):
            return f"a {type(one).__name__} of {view.format!r} in it, {view.nbytes} bytes that are not one row of bytes"
    return ""


def counts_fault(counts: object) -> str:
    """What is wrong with what a channel counted."""
    if not isinstance(counts, dict):
        return breaks(f"it counted {shown(counts)}", COUNTS)
    if len(counts) > MAX_WAYS:
        return breaks(f"it counted {len(counts)} ways", COUNTS)
    for way, count in list(counts.items()):
        if not (one_line(way) and len(way) <= LONGEST_WAY and way.isprintable() and _number(count) and count >= 0):
            return breaks(f"it counted {shown(way)}: {shown(count)}", COUNTS)
    return ""
