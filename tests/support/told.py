"""What is logged while a test runs: a warning that nobody expects fails it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from multifd.log import log


class Keeping(logging.Handler):
    """Keeps what is logged as a warning."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.messages.append(record.getMessage())


_running: list[Keeping] = []


@contextmanager
def keeping() -> Iterator[Keeping]:
    """Keep the warnings of the body, in `messages`; of those within each other, the innermost has what is logged."""
    kept = Keeping()
    for outer in _running[-1:]:
        log.removeHandler(outer)
    _running.append(kept)
    log.addHandler(kept)
    try:
        yield kept
    finally:
        log.removeHandler(kept)
        _running.remove(kept)
        for outer in _running[-1:]:
            log.addHandler(outer)


@contextmanager
def warns(match: str) -> Iterator[list[str]]:
    """The warnings of the body, one of which has to be like that."""
    with keeping() as kept:
        yield kept.messages
    assert any(re.search(match, message) for message in kept.messages), f"none is {match!r}: {kept.messages}"


@contextmanager
def nothing_else(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails where there is a warning that no `may_warn(REGEX)` of the test allows, and no `warns` has."""
    allowed = [mark.args[0] for mark in request.node.iter_markers("may_warn")]
    with keeping() as kept:
        yield
    unexpected = [message for message in kept.messages if not any(re.search(like, message) for like in allowed)]
    assert not unexpected
