"""What is found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trouble:
    """What would fail, or could be better, and what to do about it."""

    what: str
    remedy: str


def monitor_says(who: str, command: str) -> str:
    """A remedy, for the monitor of the source or the destination."""
    return f"on the {who}'s monitor: {command}"
