"""Where somebody listens, or what was recorded."""

from __future__ import annotations

from dataclasses import dataclass

from multifd.errors import UsageError


@dataclass(frozen=True, slots=True)
class Uri:
    """`tcp:HOST:PORT`, `unix:PATH` or `recording:DIR`."""

    scheme: str
    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Uri:
        """Raises UsageError with the forms there are."""
        scheme, _, rest = text.partition(":")
        if scheme in ("unix", "recording") and rest:
            return cls(scheme, path=rest)
        if scheme == "tcp":
            host, colon, port = rest.rpartition(":")
            if colon and port.isdecimal() and len(port) < 6 and int(port) < 65536:
                return cls("tcp", host=host.removeprefix("[").removesuffix("]"), port=int(port))
        raise UsageError(f"{text!r} is no URI: use tcp:HOST:PORT, unix:PATH or recording:DIR")

    def __str__(self) -> str:
        if self.scheme == "tcp":
            return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"
        return f"{self.scheme}:{self.path}"
