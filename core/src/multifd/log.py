"""What multifd says while it works: the logger `multifd`, one record one line.

Warnings are what goes on all the same but should be known; DEBUG says what was decided, and why.  Each record has
`uuid`, `source` and `destination`, the migration that it is of, empty where only one can be meant: a relay serves many.
So a formatter may say `%(uuid)s %(message)s`.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

#: Tells of what a record is: the values of ABOUT, as far as they are known.
About = Callable[[], Mapping[str, str]]

ABOUT = ("uuid", "source", "destination")

log = logging.getLogger("multifd")
_here = threading.local()


@contextmanager
def about(migration: About | None) -> Iterator[None]:
    """What this thread logs in the body is of that migration; None leaves it as it is."""
    before = getattr(_here, "about", None)
    _here.about = migration or before
    try:
        yield
    finally:
        _here.about = before


def _name(record: logging.LogRecord) -> bool:
    migration: About | None = getattr(_here, "about", None)
    known = migration() if migration is not None else {}
    for name in ABOUT:
        setattr(record, name, known.get(name, ""))
    return True


log.addFilter(_name)


def take_warnings() -> None:
    """Log Python's warnings in this process: a plugin written for 0.1 tells so what goes on all the same."""
    warnings.showwarning = lambda message, *_, **__: log.warning(str(message))
    warnings.simplefilter("always", RuntimeWarning)


def escaped(text: str) -> str:
    """Text from anywhere as one line that does nothing to a terminal: what cannot be printed is shown as `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode() for one in text)
