"""The names of third parties' methods: a packet has only their number."""

from __future__ import annotations

import threading
from contextlib import suppress
from functools import cache

from multifd.codec.probing import probe_all
from multifd.codec.selection import names
from multifd.wire.flags import METHODS, THIRD_PARTY_FLAGS, method_name, name_method

#: Seconds for an installed compressor to say its flag: a channel waits for it, once.
LIMIT = 3.0

_lock = threading.Lock()


def learn(flag: int) -> None:
    """Have the name of a packet's method known to `method_name`, if an installed compressor is of that method.

    At the first number that nobody knows all that may have it are asked, in child processes; those that have been
    loaded are known.  One of two methods with this number stays nameless, and so do all where the machine is short of
    something: a name is worth no migration.
    """
    if flag in THIRD_PARTY_FLAGS and method_name(flag) == f"method {flag}":
        with _lock:  # whoever comes second waits for the answers
            _ask()


@cache
def _ask() -> None:
    with suppress(Exception):
        rows = probe_all([name for name in names() if name.partition("-")[0] not in METHODS], LIMIT)
        for number in THIRD_PARTY_FLAGS:
            methods = {row["method"] for row in rows if row["flag"] == number}
            if len(methods) == 1:
                name_method(number, methods.pop())
