"""The return path: what a destination answers on the main channel; no I/O."""

from __future__ import annotations

import struct

from multifd.errors import PeerError
from multifd.wire.flags import ReturnPath
from multifd.wire.layout import COMMAND_HEAD, U32

RETURN_MESSAGE = struct.Struct(">HHI")
ASKING = (ReturnPath.REQUEST_PAGES_OF, ReturnPath.REQUEST_PAGES)
#: The ping that ends the package of postcopy (QEMU 10.2 and newer), behind which the guest runs.
PACKAGE_LOADED = 0x42


def shut(code: int) -> bytes:
    """The destination's last word on the return path: 0 is good."""
    return RETURN_MESSAGE.pack(ReturnPath.SHUT, 4, code)


def pong(value: int) -> bytes:
    """The answer to a ping."""
    return RETURN_MESSAGE.pack(ReturnPath.PONG, 4, value)


def switchover_ack() -> bytes:
    """The destination is ready for the last round; see `machine.takes_unasked_ack`."""
    return COMMAND_HEAD.pack(ReturnPath.SWITCHOVER_ACK, 0)


class ReturnPathParser:
    """Reads the return path; `shut` is the code of SHUT once it came.

    `runs` says that the guest runs at the destination, which fetches its pages (postcopy).
    """

    def __init__(self) -> None:
        self.shut: int | None = None
        self.runs = False
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Raises PeerError for a SHUT without its code."""
        self._buffer += data
        while len(self._buffer) >= COMMAND_HEAD.size:
            kind, length = COMMAND_HEAD.unpack_from(self._buffer)
            end = COMMAND_HEAD.size + length
            if len(self._buffer) < end:
                return
            if kind == ReturnPath.SHUT:
                if length != U32.size:
                    raise PeerError(f"return path: SHUT with {length} bytes, not 4")
                self.shut = U32.unpack_from(self._buffer, COMMAND_HEAD.size)[0]
            elif kind in ASKING or self._buffer[:end] == pong(PACKAGE_LOADED):
                self.runs = True
            del self._buffer[:end]
