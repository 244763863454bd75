"""The hooks of a compressor, and what they receive and return.

A compressor is a module (or any object) whose functions are marked with `hookimpl`, named by
an entry point of group `multifd.compressors`; the entry point's name is the compressor's.
Importing the module must work where its library is missing.

One channel in one direction belongs to one thread: its hooks are never called by two at once,
and different channels run at the same time.

What goes on all the same but should be known (a device that gave up) a compressor tells with
`warnings.warn(text, RuntimeWarning)`; the command line shows each text once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pluggy

from multifd.wire import Buffer

PROJECT = "multifd"
ENTRY_POINT_GROUP = "multifd.compressors"
OBSERVER_GROUP = "multifd.observers"
#: Version of this contract; a compressor states the one it was written for.
API_VERSION = 1

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

OptionValue = bool | int | str


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a compressor, `--compressor NAME,key=value`.

    The type is the default's: bool (on or off), int, or str.
    """

    name: str
    default: OptionValue
    help: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What a compressor says of itself without touching its library.

    `name` is the entry point's name: the method's, or METHOD-suffix.  `flag` is the method's
    number in the compression field: QEMU's for its methods, 27..31 for third parties.
    `levels` is the range of levels the sending side takes, None where there is no level.
    `ladder` are levels that may follow each other on one channel while it runs, for `level=adaptive`,
    the fastest first, which stores and need not be one of `levels`; empty where there can be none.
    """

    name: str
    method: str
    flag: int
    summary: str
    levels: range | None = None
    default_level: int | None = None
    options: tuple[Option, ...] = ()
    api_version: int = API_VERSION
    ladder: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """What a compressor found on this machine.

    `provider` names the library (`zlib, ISA-L`), `version` its version or versions, `hardware`
    says whether a device does the work, and `devices` which ones, for people.  Where it is not
    available, `reason` is the loader's own text or the missing piece, and `install` what to do
    about it; one that is available with a `reason` works, but not as well as its name promises.
    """

    available: bool
    provider: str = ""
    version: str = ""
    hardware: bool = False
    reason: str = ""
    install: str = ""
    devices: tuple[str, ...] = ()


@dataclass(slots=True)
class Channel:
    """One channel in one direction, as its compressor sees it.

    `id` is the channel's number from 0, `page_size` in bytes.  `level` and `options` are the
    sender's settings, checked against the facts; receiving, `level` is None and `options` hold
    their defaults unless given.  Where `live`, core may set another level of the ladder before any
    packet, and the compressor leaves the level there that it used, if its stream cannot change
    at once.  `compress_data` is the compressor's own, None at set-up.
    `next_packet_size` is the length in bytes of the payload `recv` has to read.  `counts` is the
    compressor's to fill: packets by the way they took; core adds up the channels' for the result.
    """

    id: int
    page_size: int
    level: int | None = None
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    compress_data: Any = None
    next_packet_size: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    live: bool = False
    _read_into: Callable[[memoryview], None] | None = None

    def bind(self, read_into: Callable[[memoryview], None]) -> None:
        """Core's: where the payload comes from."""
        self._read_into = read_into

    def read_into(self, buffer: memoryview | bytearray) -> None:
        """Fill `buffer` with the next bytes of this packet's payload.

        Raises ValueError for more than `next_packet_size` bytes in all, PeerError where the
        connection ends first.
        """
        view = memoryview(buffer)
        if self._read_into is None:
            raise ValueError("there is no payload to read: this channel is not receiving a packet")
        self._read_into(view)


@hookspec(firstresult=True)
def multifd_compressor() -> Facts:  # type: ignore[empty-body]
    """Return the facts.  Called when the compressor is loaded; touches no library."""


@hookspec(firstresult=True)
def multifd_probe(options: Mapping[str, OptionValue]) -> Probe:  # type: ignore[empty-body]
    """Say whether the compressor works here with these options.  Called to list and to select it.

    May load the library; leaves nothing running.  `options` holds all of the compressor's, the
    defaults when it is listed.
    """


@hookspec(firstresult=True)
def multifd_send_setup(channel: Channel) -> None:
    """Get one sending channel ready.  Called once, before its first packet with normal pages.

    Keeps its state in `channel.compress_data`.  One that raises leaves nothing behind;
    `multifd_send_cleanup` is called all the same.
    """


@hookspec(firstresult=True)
def multifd_send_prepare(channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:  # type: ignore[empty-body]
    """Turn one packet's normal pages into its payload.

    `pages` are read-only views in packet order, neighbours joined into runs: 1 to
    PACKET_SIZE bytes in all, a multiple of the page size; they are not valid after the call.
    Returns the payload as buffers, at most MAX_PAYLOAD bytes together, which stay valid until
    the next call on this channel or its cleanup; `pages` themselves may be returned.
    """


@hookspec(firstresult=True)
def multifd_send_cleanup(channel: Channel) -> None:
    """Release everything.  Safe after a failed or absent set-up, and twice; never raises."""


@hookspec(firstresult=True)
def multifd_recv_setup(channel: Channel) -> None:
    """Get one receiving channel ready.  Called once, before its first packet with normal pages.

    One that raises leaves nothing behind; `multifd_recv_cleanup` is called all the same.
    """


@hookspec(firstresult=True)
def multifd_recv(channel: Channel, pages: memoryview) -> None:
    """Fill `pages` from one packet's payload.

    `pages` is one writable contiguous buffer of exactly the packet's normal pages, 1 to
    PACKET_SIZE bytes.  Reads `channel.next_packet_size` bytes with `channel.read_into`; bytes
    left unread are an error.  Fills all of `pages` or raises CompressorError, in bounded memory
    whatever the payload claims.
    """


@hookspec(firstresult=True)
def multifd_recv_cleanup(channel: Channel) -> None:
    """Release everything.  Safe after a failed or absent set-up, and twice; never raises."""
