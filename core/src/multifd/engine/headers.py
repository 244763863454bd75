"""First bytes: of a connection, which say what it is, and of each packet."""

from __future__ import annotations

import time

from multifd.errors import PeerError
from multifd.net.connection import Connection, Ended, Readable
from multifd.net.recording import RecordedConnection
from multifd.wire.flags import MULTIFD_MAGIC, VM_FILE_MAGIC
from multifd.wire.packet import INIT, MAGIC, PREFIX, InitPacket, RamPacket, is_device_state


def identify(connection: Connection, timeout: float) -> InitPacket | None:
    """What a new connection is, by its first bytes: a multifd channel, or None for a main channel.

    Raises Ended where it closed without a byte, PeerError where it is neither, or says nothing
    for `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    first = bytearray(INIT.size)
    view = memoryview(first)
    got = connection.read_first(view[: MAGIC.size], deadline)
    if got < MAGIC.size:
        if not got and not isinstance(connection, RecordedConnection):
            raise Ended(f"{connection.name} closed without a byte")
        raise PeerError(f"{connection.name} ended after {got} bytes: is it a migration?")
    (magic,) = MAGIC.unpack(view[: MAGIC.size])
    if magic == VM_FILE_MAGIC:
        return None
    if magic != MULTIFD_MAGIC:
        tls = ": it speaks TLS, this side does not" if first[:2] == b"\x16\x03" else ""
        raise PeerError(
            f"{connection.name} begins with {magic:#010x}, neither a migration ({VM_FILE_MAGIC:#010x}) nor a "
            f"multifd channel ({MULTIFD_MAGIC:#010x}){tls}"
        )
    got += connection.read_first(view[MAGIC.size :], deadline)
    if got < INIT.size:
        raise PeerError(f"{connection.name} ended after {got} of the {INIT.size} bytes of its init packet")
    return InitPacket.unpack(first)


def read_packet(connection: Readable, head: memoryview, page_size: int) -> RamPacket:
    """Read one packet's header into `head`, `header_length(page_size)` bytes long.

    Raises Ended at the end of the stream, with how much of the header had come, PeerError for what is no packet of RAM.
    """
    got = 0
    try:
        got = connection.read_into(head, at_least=PREFIX.size)
        if is_device_state(head[: PREFIX.size]):
            raise PeerError(
                "a device-state packet: state of VFIO devices cannot be taken, detach them before a migration"
            )
        if got < len(head):
            connection.read_into(head[got:], due=True)
    except Ended as ended:
        got += ended.got
        raise Ended(f"it ended after {got} of {len(head)} bytes of a packet's header", got) from None
    return RamPacket.unpack(head, page_size)
