"""Which compressor, or which several: by name, the best that works here, or all that may change while it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from multifd.codec.compressor import Compressor
from multifd.codec.probing import preference, probe_all, taken_twice
from multifd.codec.selection import names, names_of_method, select
from multifd.codec.settings import ADAPTIVE, AUTO, RESERVED, Settings, Spec
from multifd.effort.sampling import own_sample
from multifd.errors import HostError, UsageError
from multifd.log import log
from multifd.wire.flags import DEFAULT_PAGE_SIZE, DEVICE_METHODS, METHODS

#: Compressors whose times differ by less are as fast, on a machine that others use too.
SAME_SPEED = 1.3


def _accepted(spec: Spec) -> Collection[str] | None:
    """The methods of `auto` and `adaptive` that the peer accepts; None for all.  Raises UsageError."""
    settings = dict(spec.settings)
    methods = settings.pop("accepts", None)
    if settings:
        raise UsageError(f"{spec.name} has no option {next(iter(settings))!r}; it has: accepts=METHOD+METHOD...")
    return methods.split("+") if methods is not None else None


def _names_accepted(methods: Collection[str] | None) -> list[str]:
    """The installed compressors of these methods, or all.  Raises UsageError for a method nobody has."""
    if methods is None:
        return names()
    by_method = {method: names_of_method(method) for method in methods}
    for method, of_method in by_method.items():
        if method not in METHODS and not of_method:
            raise UsageError(f"there is no method {method!r}; installed: {', '.join(names())}")
    return sorted(set().union(*by_method.values()))


def best(sample: bytes, page_size: int = DEFAULT_PAGE_SIZE, methods: Collection[str] | None = None) -> str:
    """The name of the best available compressor: the fastest on a sample of memory, a device or not.

    Of those about as fast, it is one that works as its name promises, and of these the one that makes the fewest bytes.
    One that does not make the sample smaller comes last, so `none` is chosen where nothing does.
    `methods` are those that the peer accepts, None for all.  An empty sample stands for some
    memory or other.  Raises HostError where none works here, UsageError for a method nobody has.
    """
    rows = probe_all(_names_accepted(methods), sample=sample or own_sample(), page_size=page_size)
    rows = [row for row in rows if methods is None or row["method"] in methods]
    working = [row for row in rows if row["available"]]
    if not working:
        reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in rows) or "none is installed"
        raise HostError(f"{AUTO}: no compressor that the peer accepts works here: {reasons}")

    smaller = [row for row in working if row["ratio"] > 1]
    smaller = smaller or [row for row in working if row["method"] == "none"] or working
    fastest = min(row["seconds"] for row in smaller)
    as_fast = [row for row in smaller if row["seconds"] <= SAME_SPEED * fastest]
    found = max(as_fast, key=lambda row: (row["reason"] == "", row["ratio"]))
    log.debug(f"{AUTO}: {found['name']} of {'; '.join(map(_measured, working))}")
    return str(found["name"])


def _measured(row: Mapping[str, Any]) -> str:
    return f"{row['name']} {1e-6 / max(row['seconds'], 1e-12):.0f} MB/s, ratio {row['ratio']:.2f}"


@dataclass(frozen=True, slots=True)
class Choice:
    """What may compress, by its name on the command line; more than one is a ladder."""

    name: str
    ways: Sequence[tuple[Compressor, Settings]]
    once: bool = False

    @classmethod
    def of(cls, compressor: Compressor, settings: Settings) -> Choice:
        """One compressor, with the level that it was given or with all that it can change between."""
        if not settings.effort:
            return cls(compressor.name, [(compressor, settings)])
        ladder = [(compressor, replace(settings, level=level, effort="")) for level in compressor.facts.ladder]
        return cls(compressor.name, ladder, once=settings.effort == "auto")

    @classmethod
    def parse(cls, text: str, sample: Callable[[], bytes], page_size: int = DEFAULT_PAGE_SIZE) -> Choice:
        """`NAME[,key=value...]`, `auto` or `adaptive`, the last two with `accepts=METHOD+METHOD...`.

        `sample` is called for `auto`, and gives memory that is to be sent, or nothing.  Raises UsageError,
        HostError, CompressorError.
        """
        spec = Spec.parse(text)
        if spec.name not in RESERVED:
            return cls.of(*select(spec, sending=True))
        methods = _accepted(spec)
        if spec.name == AUTO:
            compressor, settings = select(Spec(best(sample(), page_size, methods)), sending=True)
            return cls.of(compressor, replace(settings, effort="auto") if compressor.facts.ladder else settings)
        rows = probe_all(_names_accepted(methods))
        found = [cls.of(*select(_adaptive(row), sending=True)) for row in _one_each(rows, methods)]
        found.sort(key=lambda choice: choice.method != "none")
        # One way to store is enough.
        ways = [way for choice in found for way in choice.ways[choice is not found[0] and len(choice.ways) > 1 :]]
        if not ways:
            raise HostError(f"{ADAPTIVE}: no compressor that the peer accepts works here")
        return cls(ADAPTIVE, ways)

    def __str__(self) -> str:
        """All of them, with whom they are from."""
        found: dict[str, list[str]] = {}
        for compressor, settings in self.ways:
            found.setdefault(str(compressor), []).extend([] if settings.level is None else [str(settings.level)])
        return "; ".join(f"{who}, level {' or '.join(levels)}" if levels else who for who, levels in found.items())

    @property
    def method(self) -> str:
        """The method that packets have, or this choice's name where they have several."""
        methods = {compressor.facts.method for compressor, _ in self.ways}
        return methods.pop() if len(methods) == 1 else self.name

    @property
    def flags(self) -> set[int]:
        """The methods' numbers that packets may have."""
        return {compressor.facts.flag for compressor, _ in self.ways}


def _one_each(rows: Sequence[dict[str, Any]], methods: Collection[str] | None) -> list[dict[str, Any]]:
    """The compressor for each flag whose packets the peer can tell: one of them reads what another began.

    One that stands in for a device is slower than zlib or zstd, or as good: only where there is nothing else.
    """
    by_flag: dict[int, dict[str, Any]] = {}
    for row in sorted(rows, key=preference):
        if row["available"] and not row["reason"] and (methods is None or row["method"] in methods):
            by_flag.setdefault(row["flag"], row)
    found = [row for flag, row in by_flag.items() if not taken_twice(flag, rows)]
    own = [row for row in found if row["hardware"] or row["method"] not in DEVICE_METHODS]
    return own if any(row["flag"] for row in own) else found


def _adaptive(row: Mapping[str, Any]) -> Spec:
    return Spec(row["name"], {"level": "adaptive"} if row["ladder"] else {})
