"""What is logged, as lines for people or for machines."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from multifd.cli.lines import Lines
from multifd.errors import counted
from multifd.log import ABOUT, escaped, log

#: Bytes of a line: with what is said of lines that were dropped, less than PIPE_BUF, which is written in one piece.
MOST = 3800
#: Warnings that are remembered.
REMEMBERED = 1000


class Records(logging.Handler):
    """Each record is a line; a warning that was told of the same migration before is not told again."""

    def __init__(self, lines: Lines, *, as_json: bool) -> None:
        super().__init__()
        self._lines = lines
        self._as_json = as_json
        self._told: dict[tuple[str, ...], None] = {}
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        message = escaped(" ".join(record.getMessage().split("\n")))
        about = {name: escaped(getattr(record, name, "")) for name in ABOUT}
        if record.levelno == logging.WARNING and self._known((*about.values(), message)):
            return
        line = self._shown(record, about, message)
        while len(line.encode(errors="backslashreplace")) > MOST:
            message = message[: len(message) * 3 // 4]
            line = self._shown(record, about, f"{message}...")
        if self._dropped:
            told = f"{counted(self._dropped, 'line')} could not be written here"
            dropped = log.makeRecord(log.name, logging.WARNING, "", 0, told, (), None)
            line = f"{self._shown(dropped, dict.fromkeys(ABOUT, ''), told)}\n{line}"
        try:
            self._lines.offer(line)
            self._dropped = 0
        except OSError:  # nothing ends for want of somebody who reads this
            self._dropped += 1

    def _shown(self, record: logging.LogRecord, about: dict[str, str], message: str) -> str:
        return _object(record, about, message) if self._as_json else _line(record, about, message)

    def _known(self, key: tuple[str, ...]) -> bool:
        if key in self._told:
            return True
        if len(self._told) >= REMEMBERED:
            del self._told[next(iter(self._told))]
        self._told[key] = None
        return False


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
