"""What is logged, as lines for people or for machines."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from datetime import UTC, datetime

from multifd.cli.lines import Lines
from multifd.log import ABOUT, escaped, log

#: Letters of a message: with what stands around it, a line of less than PIPE_BUF bytes.
MOST = 1500
#: Warnings that are remembered.
REMEMBERED = 1000


class Records(logging.Handler):
    """Each record is a line; a warning that was told of the same migration before is not told again."""

    def __init__(self, lines: Lines, *, as_json: bool) -> None:
        super().__init__()
        self._lines = lines
        self._as_json = as_json
        self._told: dict[tuple[str, ...], None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        about = {name: getattr(record, name, "") for name in ABOUT}
        message = escaped(" ".join(record.getMessage().split("\n")))
        if len(message) > MOST:
            message = f"{message[:MOST]}..."
        if record.levelno == logging.WARNING and self._known((*about.values(), message)):
            return
        line = self._object(record, about, message) if self._as_json else _line(record, about, message)
        with suppress(OSError):  # nothing ends for want of somebody who reads this
            self._lines.offer(f"{line}\n".encode(errors="backslashreplace"))

    def _known(self, key: tuple[str, ...]) -> bool:
        if key in self._told:
            return True
        if len(self._told) >= REMEMBERED:
            del self._told[next(iter(self._told))]
        self._told[key] = None
        return False

    @staticmethod
    def _object(record: logging.LogRecord, about: dict[str, str], message: str) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        named = {name: value for name, value in about.items() if value}
        more = getattr(record, "progress", {})
        return json.dumps({"time": time, "level": record.levelname.lower(), "message": message} | named | more)


def _line(record: logging.LogRecord, about: dict[str, str], message: str) -> str:
    kind = "warning: " if record.levelno == logging.WARNING else ""
    where = f"VM {about['uuid']}, " if about["uuid"] else ""
    if about["source"]:
        where += f"{about['source']} to {about['destination']}: "
    return f"multifd: {kind}{where}{message}"


def begin(lines: Lines, *, as_json: bool, verbose: bool) -> None:
    """Show what the logger `multifd` is told from now on; `verbose`: also what was decided, and why."""
    log.handlers[:] = [Records(lines, as_json=as_json)]
    log.propagate = False
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
