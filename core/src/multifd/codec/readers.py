"""Who reads packets: the compressor that was named, or the best one for a packet's own flag."""

from __future__ import annotations

import threading
from functools import cache

from multifd.codec.compressor import Compressor
from multifd.codec.discovery import DISABLE, installed
from multifd.codec.naming import learn
from multifd.codec.probing import preference, probe_all, taken_twice
from multifd.codec.selection import distributions, how_to_install, load, names, names_of_method, select
from multifd.codec.settings import RESERVED, Settings, Spec
from multifd.errors import CompressorError, HostError, PeerError
from multifd.hookspecs import ENTRY_POINT_GROUP
from multifd.log import log
from multifd.wire.flags import METHODS, method_name


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
        method = rows[0]["method"]
        reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in rows)
        raise HostError(f"the packets are {method}, and nothing here can read them: {reasons}")
    if any(each.name.partition("-")[0] == method for each in installed(ENTRY_POINT_GROUP)):
        raise HostError(f"the packets are {method}, whose compressors are turned off, by --disable or {DISABLE}")
    ours = distributions()
    hint = how_to_install(ours[method]) if method in ours else "install a compressor of that method"
    raise HostError(f"the packets are {method}, and no compressor for it is installed: {hint}")


class Readers:
    """Finds the compressor for a packet: the one named, or the best for the packet's own flag."""

    def __init__(self, expected: tuple[Compressor, Settings] | None = None) -> None:
        """`expected` reads all packets, and those of another method are refused."""
        self._lock = threading.Lock()
        self._expected = None if expected is None else expected[0]
        self._loaded = {} if expected is None else {expected[0].facts.flag: expected}

    @classmethod
    def parse(cls, text: str | None) -> Readers:
        """Loads the compressor named, `NAME[,key=value...]`, so that a wrong name is known before anybody connects.

        Raises UsageError, HostError, CompressorError.
        """
        spec = Spec.parse(text) if text else None
        if spec is None or spec.name in RESERVED:
            names()  # read what is installed now, while nobody waits
            return cls()
        return cls(select(spec, sending=False))

    @property
    def method(self) -> str | None:
        """The method of the compressor named; None where each packet says its own."""
        return None if self._expected is None else self._expected.facts.method

    def check(self, flag: int) -> None:
        """Raises PeerError where the peer uses another method than the one named here."""
        if self._expected is not None and flag != self._expected.facts.flag:
            learn(flag)
            mine, theirs = self._expected.facts.method, method_name(flag)
            raise PeerError(
                f"the sender uses {theirs}, this side expects {mine}: start both with the same --compressor"
            )

    def get(self, flag: int) -> tuple[Compressor, Settings]:
        """The compressor for a method number, loaded at its first packet."""
        with self._lock:
            if flag not in self._loaded:
                self._loaded[flag] = select_for_flag(flag)
                log.debug(f"packets of {method_name(flag)} are read by {self._loaded[flag][0]}, the best for it here")
            return self._loaded[flag]

    @property
    def used(self) -> str:
        """The compressors' names, for people: the packets' methods, in the order of coming."""
        return "+".join(compressor.name for compressor, _ in self._loaded.values()) or "none"
