"""Every error multifd raises on purpose, by who is at fault, and the system's errors told as one of them.

A message is one line: where (which channel), what came, what was expected, and what to do.
"""

from __future__ import annotations

import errno
import os
from types import TracebackType


class MultifdError(Exception):
    """The parent of all: catch this one to catch them all."""

    def at(self, where: str) -> MultifdError:
        """The same error with its place in front, said once: `channel 1: ...`."""
        if self.args and str(self.args[0]).startswith(f"{where}: "):
            return self
        return type(self)(f"{where}: {self}")


class CallerError(MultifdError):
    """The caller's mistake: an image of an odd size, a directory that exists already."""


class Cancelled(MultifdError):
    """Whoever ran the job has ended it: `Crew.cancel`, or a signal to the command line."""


class UsageError(CallerError):
    """A wrong option or argument; the command line exits with 2."""


class PeerError(MultifdError):
    """The other side broke the protocol, or its settings differ from ours."""


class CompressorError(MultifdError):
    """A compressor failed: its library, its plugin, or a payload it cannot decode."""


class HostError(MultifdError):
    """The machine: a missing library, a full disk, a lost connection."""


NO_MEMORY = "there is not enough memory"
#: What to do about an error of the system, where there is more to say than its own words.
_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space or choose another directory",
    errno.EDQUOT: "the disk is full: free some space or choose another directory",
    errno.EFBIG: "it is larger than this file system's largest file",
    errno.EMFILE: "no descriptor is left: raise `ulimit -n` (systemd: LimitNOFILE)",
    errno.ENFILE: "no descriptor is left on this machine: raise the sysctl fs.file-max",
    errno.ENOMEM: NO_MEMORY,
    errno.ENOBUFS: NO_MEMORY,
}


def reason(error: OSError) -> str:
    """Why the system refused, in words."""
    return _ADVICE.get(error.errno or 0) or error.strerror or str(error)


def system_error(number: int) -> OSError:
    """The system's error of this number (errno)."""
    return OSError(number, os.strerror(number))


def shortage(error: BaseException) -> BaseException:
    """An error that nobody expected here as one of ours, where it says what the machine is short of."""
    if isinstance(error, MemoryError):
        found: MultifdError = HostError(NO_MEMORY)
    elif isinstance(error, OSError):
        found = HostError(reason(error))
    else:
        return error
    found.__cause__ = error
    return found


class os_errors:  # noqa: N801 - read as a verb: `with os_errors(path):`
    """A context in which an OSError becomes one of ours: `WHERE: why`.

    A class, since it stands around each read and write: a generator's context takes ten times as long.
    """

    __slots__ = ("_kind", "_where")

    def __init__(self, where: object, kind: type[MultifdError] = HostError) -> None:
        """`where` is what was worked on, or tried; `kind` says whose fault an error is."""
        self._where = where
        self._kind = kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if isinstance(error, OSError):
            raise self._kind(f"{self._where}: {reason(error)}") from error


def describe(error: BaseException) -> str:
    """An exception in one line; a plugin's may have no text that can be read."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - it is somebody else's
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def counted(count: int, what: str) -> str:
    """So many of something, in a message: `1 channel`, `2 channels`."""
    return f"{count} {what}{'s' * (count != 1)}"
