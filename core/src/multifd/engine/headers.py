"""First bytes: of a connection, which say what it is, and of each packet."""

from __future__ import annotations

from multifd.errors import PeerError
from multifd.net.connection import Ended, Readable
from multifd.net.recording import RecordedConnection
from multifd.net.strangers import foreign
from multifd.wire.flags import MULTIFD_MAGIC, VM_FILE_MAGIC
from multifd.wire.packet import INIT, MAGIC, PREFIX, InitPacket, RamPacket, is_device_state


def identify(connection: RecordedConnection) -> InitPacket | None:
    """What a recorded connection is, by its first bytes: a multifd channel, or None for a main channel.

    Raises PeerError where it is neither.
    """
    first = bytearray(INIT.size)
    view = memoryview(first)
    got = 0
    try:
        got += connection.read_into(view[: MAGIC.size])
        (magic,) = MAGIC.unpack(view[: MAGIC.size])
        if magic == VM_FILE_MAGIC:
            return None
        if magic != MULTIFD_MAGIC:
            raise PeerError(f"{connection.name} {foreign(view)}")
        connection.read_into(view[got:])
    except Ended as ended:
        got += ended.got
        what = f"of the {INIT.size} bytes of its init packet" if got >= MAGIC.size else "bytes: is it a migration?"
        raise PeerError(f"{connection.name} ended after {got} {what}") from None
    return InitPacket.unpack(first)


def read_packet(connection: Readable, head: memoryview, page_size: int) -> RamPacket:
    """Read one packet's header into `head`, `header_length(page_size)` bytes long.

    Raises Ended at the end of the stream, with how much of the header had come, PeerError for what is no packet of RAM.
    """
    got = 0
    try:
        got = connection.read_into(head, at_least=PREFIX.size)
        if is_device_state(head[: PREFIX.size], page_size):
            raise PeerError(
                "a device-state packet: state of VFIO devices cannot be taken, detach them before a migration"
            )
        if got < len(head):
            connection.read_into(head[got:], due=True)
    except Ended as ended:
        got += ended.got
        raise Ended(f"it ended after {got} of {len(head)} bytes of a packet's header", got) from None
    return RamPacket.unpack(head, page_size)
