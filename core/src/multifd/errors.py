"""Every error multifd raises on purpose, by who is at fault.

A message is one line: where (which channel), what came, what was expected, and what to do.
"""

from __future__ import annotations


class MultifdError(Exception):
    """The parent of all: catch this one to catch them all."""

    def at(self, where: str) -> MultifdError:
        """The same error with its place in front, said once: `channel 1: ...`."""
        if self.args and str(self.args[0]).startswith(f"{where}: "):
            return self
        return type(self)(f"{where}: {self}")


class CallerError(MultifdError):
    """The caller's mistake: an image of an odd size, a directory that exists already."""


class UsageError(CallerError):
    """A wrong option or argument; the command line exits with 2."""


class PeerError(MultifdError):
    """The other side broke the protocol, or its settings differ from ours."""


class CompressorError(MultifdError):
    """A compressor failed: its library, its plugin, or a payload it cannot decode."""


class HostError(MultifdError):
    """The machine: a missing library, a full disk, a lost connection."""


def counted(count: int, what: str) -> str:
    """So many of something, in a message: `1 channel`, `2 channels`."""
    return f"{count} {what}{'s' * (count != 1)}"
