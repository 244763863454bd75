"""What is asked of a compressor: `NAME[,key=value...]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from multifd.errors import UsageError
from multifd.hookspecs import OptionValue

#: Chooses the best available compressor where memory is sent; takes whatever comes where it is received.
AUTO = "auto"
#: Chooses among all of them, packet by packet; likewise.
ADAPTIVE = "adaptive"
RESERVED = {
    AUTO: "choosing the compressor, where memory is sent",
    ADAPTIVE: "choosing the compressor packet by packet, where memory is sent",
}
#: What a level may be instead of a number: found out while it runs, again and again or once.
EFFORTS = ("adaptive", "auto")


@dataclass(frozen=True, slots=True)
class Spec:
    """`NAME[,key=value...]` of a command line: a compressor's name and its settings, unchecked."""

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Raises UsageError for a setting without `=` or given twice."""
        name, *pairs = text.split(",")
        settings: dict[str, str] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not key or not equals:
                raise UsageError(f"compressor {text!r}: {pair!r} is not key=value")
            if key in settings:
                raise UsageError(f"compressor {text!r}: {key} is given twice")
            settings[key] = value
        if not name:
            raise UsageError(f"compressor {text!r} has no name")
        return cls(name, settings)

    def __str__(self) -> str:
        return ",".join((self.name, *(f"{key}={value}" for key, value in self.settings.items())))


@dataclass(frozen=True, slots=True)
class Settings:
    """A compressor's settings, checked: the level (None where there is none) and all options.

    `effort` says who chooses the level while it runs: one of EFFORTS, empty for nobody.
    """

    level: int | None
    options: Mapping[str, OptionValue]
    effort: str = ""
