"""The hooks of a compressor, and what they receive and return: the contract.

A compressor is a module (or any object) whose functions are marked with `hookimpl`, named by an
entry point of group `multifd.compressors`; the entry point's name is the compressor's.
`multifd_compressor`, `multifd_probe`, `multifd_send_prepare` and `multifd_recv` must be there;
set-up and cleanup may be left out where there is nothing to do.  A function takes those of its
hook's arguments that it names.

Importing the module and asking it for its facts must work where no library can be loaded: a
library, and a Python package that brings one along, is touched in the probe and in set-up.  The import takes less
than a second: whoever names the compressor waits for it.  Standard output is the command's: what a compressor or its
library prints comes on standard error, with its name where Python prints it.

One channel in one direction belongs to one thread, from set-up to cleanup: its hooks are never
called by two at once, and different channels run at the same time.  The facts and the probe may
be asked for in any thread.  A channel's hooks come in this order: set-up once, then
`multifd_send_prepare` or `multifd_recv` once for each packet with normal pages, as long as the
migration lasts, then cleanup.  After one has raised, only cleanup follows.

What a channel needs is kept in its `compress_data`, so that channels share nothing that one of
them changes.  A session leaves nothing behind: after cleanup its memory, descriptors and threads
are released, and no view of a buffer that it was given is kept.  It does not grow with the packets that
it carries.  What a library starts once for the whole process, at the first set-up, may stay.

An error is a `multifd.errors.CompressorError` with one line of text: what came, and what was
expected.  Core adds the channel and the compressor's name.  Whatever else is raised ends the
migration too, but is reported as a fault in the plugin.

What goes on all the same but should be known (a device that gave up) a compressor tells with
`logging.getLogger("multifd").warning(text)`; the command line shows each text once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pluggy

from multifd.wire.flags import DEFAULT_PAGE_SIZE, MAX_PAYLOAD, METHODS, PACKET_SIZE
from multifd.wire.packet import Buffer

#: What the contract speaks of: everything that a compressor has to import, with `multifd.errors`.
__all__ = [
    "API_VERSION",
    "COMMAND_GROUP",
    "DEFAULT_PAGE_SIZE",
    "ENTRY_POINT_GROUP",
    "MAX_PAYLOAD",
    "METHODS",
    "OBSERVER_GROUP",
    "PACKET_SIZE",
    "PROJECT",
    "Buffer",
    "Channel",
    "Facts",
    "Option",
    "OptionValue",
    "Probe",
    "hookimpl",
    "hookspec",
]

PROJECT = "multifd"
ENTRY_POINT_GROUP = "multifd.compressors"
OBSERVER_GROUP = "multifd.observers"
COMMAND_GROUP = "multifd.commands"
#: Version of this contract; a compressor states the one it was written for.
API_VERSION = 1

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

OptionValue = bool | int | str


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a compressor, `--compressor NAME,key=value`.

    The type is the default's: bool (on or off), int, or str.  Core checks the name and the type;
    a value that the compressor cannot take is refused at set-up with CompressorError.
    """

    name: str
    default: OptionValue
    help: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What a compressor says of itself without touching its library.

    `name` is the entry point's name: the method's, or METHOD-suffix, of up to 64 ASCII letters and digits, `.`, `_`
    and `-`.  `flag` is the method's number in the compression field: QEMU's for its methods, 27..31
    for third parties.  A flag of QEMU's promises QEMU's payloads.  `summary` is one line for people.
    `levels` is the range of levels the sending side takes, every one of them, and `default_level` one of it;
    both are None where there is no level.  `ladder` are levels that may follow each other on one channel while it
    runs, for `level=adaptive`, the fastest first, which stores and need not be one of `levels`;
    empty where there can be none.
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
    """What a compressor found on this machine; every text is one line.

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

    `id` is the channel's number from 0, `page_size` a power of two from 1 to 64 KiB.  `level` and
    `options` are the sender's settings, checked against the facts; receiving, `level` is None and
    `options` hold their defaults unless given.  Where `live`, core may set another level of the
    ladder before any packet, and the compressor leaves the level there that it used, if its stream
    cannot change at once.  `compress_data` is the compressor's own, None at
    set-up.  `next_packet_size` is the length in bytes of the payload `recv` has to read.  `counts`
    is the compressor's to fill: the way that a packet took -> how many did.  A way is one short line,
    and there are 64 at most; core adds up the channels' for the result.
    """

    id: int
    page_size: int
    level: int | None = None
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    compress_data: Any = None
    next_packet_size: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    live: bool = False
    _read_into: Callable[[memoryview], None] | None = field(default=None, init=False, repr=False)

    def bind(self, read_into: Callable[[memoryview], None]) -> None:
        """Core's: where the payload comes from."""
        self._read_into = read_into

    def read_into(self, buffer: memoryview | bytearray) -> None:
        """Fill `buffer` with the next bytes of this packet's payload; as many calls as one likes.

        Raises ValueError for more than `next_packet_size` bytes in all, PeerError where the
        connection ends first.
        """
        view = memoryview(buffer)
        if self._read_into is None:
            raise ValueError("there is no payload to read: this channel is not receiving a packet")
        self._read_into(view)


@hookspec(firstresult=True)
def multifd_compressor() -> Facts:  # type: ignore[empty-body]
    """Return the facts, the same each time.

    Called when the compressor is loaded; touches no library.
    """


@hookspec(firstresult=True)
def multifd_probe(options: Mapping[str, OptionValue]) -> Probe:  # type: ignore[empty-body]
    """Say whether the compressor works here with these options.

    Called to list the compressors, in a child process, and to select this one by name, in the
    process that will use it.  `options` holds all of the compressor's, their defaults when it is listed.

    May load the library; leaves nothing running or open, and nothing of the process changed.  The
    answer is the same until the machine changes.  A library that is missing is an answer with its
    `reason`, not an error.  Where it says that the compressor is available, set-up works.
    """


@hookspec(firstresult=True)
def multifd_send_setup(channel: Channel) -> None:
    """Get one sending channel ready, in its thread, before its first packet.

    Keeps its state in `channel.compress_data`.  One that raises leaves nothing behind;
    `multifd_send_cleanup` is called all the same.
    """


@hookspec(firstresult=True)
def multifd_send_prepare(channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:  # type: ignore[empty-body]
    """Turn one packet's normal pages into its payload.

    `pages` are read-only views in packet order, neighbours joined into runs: 1 to PACKET_SIZE
    (512 KiB) bytes in all, each a multiple of the page size.  Their bytes may not be changed.
    They stay as they are until the next call on this channel or its cleanup, and hold other pages
    after it: what is needed longer is copied.

    Returns the payload as a sequence of bytes, bytearray or memoryview (of bytes): 1 to
    MAX_PAYLOAD (1 MiB) bytes together, whatever the pages hold.  They stay valid until the next
    call on this channel or its cleanup, whatever other channels do; `pages` themselves may be
    returned.
    """


@hookspec(firstresult=True)
def multifd_send_cleanup(channel: Channel) -> None:
    """Release everything.  Safe after a failed or absent set-up, and twice; never raises."""


@hookspec(firstresult=True)
def multifd_recv_setup(channel: Channel) -> None:
    """Get one receiving channel ready, in its thread, before its first packet.

    One that raises leaves nothing behind; `multifd_recv_cleanup` is called all the same.
    """


@hookspec(firstresult=True)
def multifd_recv(channel: Channel, pages: memoryview) -> None:
    """Fill `pages` from one packet's payload.

    `pages` is one writable contiguous buffer of exactly the packet's normal pages, 1 to
    PACKET_SIZE (512 KiB) bytes, with other bytes in it before; nothing in front of it or behind it
    is written.  Gives back the sender's pages, byte for byte.

    Reads the `channel.next_packet_size` (1 to 1 MiB) bytes of the payload with
    `channel.read_into`; bytes of a payload that are left over are an error, whether they were read
    or not.  A PeerError of `read_into` passes through unchanged.

    A payload can be anything: fills all of `pages` or raises CompressorError.  A payload that
    holds less than `pages`, or more, is an error.  Takes bounded memory, whatever the payload
    claims or decodes to.
    """


@hookspec(firstresult=True)
def multifd_recv_cleanup(channel: Channel) -> None:
    """Release everything.  Safe after a failed or absent set-up, and twice; never raises."""
