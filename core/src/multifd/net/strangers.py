"""Who was turned away, told: each kind once, others like it counted."""

from __future__ import annotations

from collections import Counter, deque

from multifd.log import log
from multifd.wire.flags import MULTIFD_MAGIC, VM_FILE_MAGIC
from multifd.wire.packet import MAGIC, Buffer

#: Kinds that are remembered: somebody may say something else each time.
MOST_KINDS = 1000
#: How a QEMU's connection begins for `migrate` with `resume=true`: command 10 asks for a RAM block's bitmap.
RESUMED = b"\x08\x00\x0a"


class Strangers:
    """Noted by any thread, one at a time; told by one that holds no lock: whoever reads that may be slow."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()
        self._untold: deque[str] = deque()

    def note(self, name: str, why: str) -> bool:
        """Whether there is something to tell: another one of whom this is said has been told already."""
        self._count[why] += 1
        if self._count[why] > 1:
            return False
        self._untold.append(f"{name}{'' if why.startswith(':') else ' '}{why}: ignored")
        if len(self._count) > MOST_KINDS:
            self._count.clear()
        return True

    def tell(self) -> None:
        """Those of a new kind."""
        while self._untold:
            log.warning(self._untold.popleft())

    def tell_all(self) -> None:
        """And how many others there were."""
        self.tell()
        if again := sum(self._count.values()) - len(self._count):
            log.warning(f"{again} more connections were ignored, of the kinds told before")


def foreign(data: Buffer) -> str:
    """What is wrong with somebody's first bytes."""
    (magic,) = MAGIC.unpack_from(data)
    tls = ": it speaks TLS, this side does not" if bytes(data[:2]) == b"\x16\x03" else ""
    if bytes(data[:3]) == RESUMED:
        return "goes on with a postcopy that was cut: say migrate with resume=true with the destination's own address"
    return (
        f"begins with {magic:#010x}, neither a migration ({VM_FILE_MAGIC:#010x}) nor a multifd channel "
        f"({MULTIFD_MAGIC:#010x}){tls}"
    )
