"""Standard output is the command's: what a plugin prints, or its library, reaches standard error.

`print` of a plugin's code comes there with the plugin's name; what a library writes to descriptor 1 comes as it is.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

from multifd.cli import lines
from multifd.errors import HostError, reason
from multifd.log import log

#: Where plugins' code is called: module, function -> the name there of whom it belongs to.
CALLS = {
    ("multifd.codec.hooks", "call"): "self",
    ("multifd.codec.discovery", "load_plugin"): "found",
    ("multifd.codec.discovery", "add_file"): "path",
}
#: Where commands of other packages are loaded.
COMMANDS = "multifd.cli.commands"


def protect() -> None:
    """Make standard output the command's own, as long as the process lives.  Once, before any plugin is imported."""
    own = lines.stdout.fd = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = _Parted(open(own, "w", errors="backslashreplace", closefd=False))  # noqa: SIM115 - until it ends


def is_of_another_package() -> None:
    """The command is: it prints what it is for, where multifd's own do not."""
    if isinstance(sys.stdout, _Parted):
        sys.stdout.own_words = True


class _Parted:
    """`sys.stdout`: the command's text goes on, a plugin's is turned to standard error."""

    def __init__(self, own: TextIO) -> None:
        self._own = own
        #: Whether words that no plugin is seen to print are the command's.
        self.own_words = False
        #: By thread: what it printed of a line, and whose it is.
        self._begun: dict[int, tuple[str, str]] = {}

    def write(self, text: str) -> int:
        who = _plugin(sys._getframe(1))
        if who is None or (not who and self.own_words):
            if lines.stdout.closed:
                raise HostError(f"{lines.stdout.name} is closed")
            with self._told():
                return self._own.write(text)
        thread = threading.get_ident()
        *whole, rest = (self._begun.pop(thread, ("", ""))[1] + text).split("\n")
        if rest:
            self._begun[thread] = who, rest
        for line in whole:
            _tell(who, line)
        return len(text)

    def flush(self) -> None:
        for thread in list(self._begun):
            _tell(*self._begun.pop(thread))
        with self._told():
            self._own.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raises HostError where it cannot be written; what comes then is lost, also what Python writes at exit."""
        try:
            yield
        except OSError as error:
            self._own = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
            raise HostError(f"{lines.stdout.name}: {reason(error)}") from error

    @property
    def buffer(self) -> Any:
        """Below the text: a plugin's bytes go to standard error as they are."""
        own = not _plugin(sys._getframe(1)) and self.own_words
        return (self._own if own else sys.stderr).buffer

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def _tell(who: str, line: str) -> None:
    log.info(f"{who or 'a plugin'} printed: {line}")


def _plugin(frame: FrameType | None) -> str | None:
    """The plugin whose code prints, by the calls that it is in, or empty; None for a command's own import."""
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        caller = frame.f_back
        if found := CALLS.get((module, frame.f_code.co_name)):
            for_command = caller is not None and caller.f_globals.get("__name__") == COMMANDS
            return None if for_command else str(frame.f_locals.get(found))
        frame = caller
    return ""
