"""What the checks are made of: hooks called as core calls them, pages of all kinds, what a process holds."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import re
import resource
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

from multifd.codec.compressor import Compressor
from multifd.codec.hooks import HOOK_ERRORS
from multifd.codec.selection import load
from multifd.codec.settings import Spec
from multifd.errors import CompressorError, MultifdError, PeerError
from multifd.hookspecs import Channel, Probe
from multifd.wire.flags import PACKET_SIZE
from multifd.wire.packet import Buffer, pages_per_packet

PAGE = 4096
#: Around the pages that `multifd_recv` fills: it may write nothing there.
GUARD = 4096


class Broken(Exception):
    """A check failed: what was called, and what came back."""

    def __init__(self, called: str, came: str) -> None:
        super().__init__(called, came)
        self.called = called
        self.came = " ".join(came.split())


class NotAsked(Exception):
    """What the compressor does not claim is not asked."""


class NotRun(Exception):
    """It cannot be asked: it does not load, or does not work here."""


def describe(error: BaseException) -> str:
    """An exception, as what came back."""
    text = " ".join(str(error).split())
    return f"raised {type(error).__name__}" + (f": {text[:200]}" if text else "")


class Subject:
    """The compressor that is asked; loaded in the process of the check, not before."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @cached_property
    def compressor(self) -> Compressor:
        """The compressor, for those checks that are about something else than loading.

        Raises NotRun where the checks `facts` and `hooks` say what is wrong.
        """
        try:
            return load(self.spec.name)
        except MultifdError as error:
            raise NotRun(f"it does not load: {error}") from error

    @cached_property
    def ready(self) -> Compressor:
        """The same; raises NotRun where it says that it does not work here."""
        options = self.compressor.settings(self.spec.settings, sending=True).options
        probe = call(self.compressor, "multifd_probe", "", options=options)
        if isinstance(probe, Probe) and not probe.available:
            raise NotRun(f"it is not available here: {probe.reason or 'it does not say why'}")
        return self.compressor

    def ends(
        self, settings: Mapping[str, str] = {}, *, page_size: int = PAGE, number: int = 0
    ) -> tuple[Sender, Receiver]:
        """A sending and a receiving channel, not set up."""
        compressor = self.compressor
        given = {**self.spec.settings, **settings}
        return Sender(
            compressor, compressor.channel(number, page_size, compressor.settings(given, sending=True))
        ), Receiver(compressor, compressor.channel(number, page_size, compressor.settings(given, sending=False)))

    def pair(
        self, settings: Mapping[str, str] = {}, *, page_size: int = PAGE, number: int = 0
    ) -> tuple[Sender, Receiver]:
        """A sending and a receiving channel, set up.  Raises NotRun where it does not work here."""
        assert self.ready
        ends = self.ends(settings, page_size=page_size, number=number)
        for end in ends:
            end.set_up()
        return ends

    def sender(self, settings: Mapping[str, str] = {}) -> Sender:
        """A sending channel, set up."""
        assert self.ready
        sender, _ = self.ends(settings)
        sender.set_up()
        return sender

    def receiver(self) -> Receiver:
        """A receiving channel, set up."""
        assert self.ready
        _, receiver = self.ends()
        receiver.set_up()
        return receiver


def call_raising(compressor: Compressor, hook: str, **arguments: object) -> Any:
    """Call a hook as core does; raises what the compressor raised, without core's words around it."""
    try:
        return compressor.call(hook, **arguments)  # type: ignore[arg-type] # none of a hook's is called `doing`
    except CompressorError as error:
        raise error.__cause__ or error from None


def call(compressor: Compressor, hook: str, text: str, **arguments: object) -> Any:
    """Call a hook that may not raise here; `text` says with what."""
    try:
        return call_raising(compressor, hook, **arguments)
    except HOOK_ERRORS as error:
        raise Broken(f"{hook}({text})", describe(error)) from error


@dataclass
class _End:
    """One channel in one direction."""

    compressor: Compressor
    channel: Channel
    direction: ClassVar[str]

    def text(self, more: str = "") -> str:
        """The channel's settings, for messages."""
        channel, given = self.channel, []
        if channel.level is not None:
            given.append(f"level {channel.level}")
        given += [f"{key}={value!r}" for key, value in channel.options.items()]
        return ", ".join(
            [f"channel {channel.id}", f"pages of {channel.page_size} bytes", *given, *([more] * bool(more))]
        )

    def set_up(self) -> None:
        """The set-up hook, which has to work."""
        call(self.compressor, f"multifd_{self.direction}_setup", self.text(), channel=self.channel)

    def clean_up(self, when: str = "") -> None:
        """The cleanup hook."""
        call(self.compressor, f"multifd_{self.direction}_cleanup", self.text(when), channel=self.channel)


@dataclass
class Sender(_End):
    """A sending channel."""

    direction = "send"
    packets: int = 0

    def prepare(self, pages: Sequence[memoryview], text: str = "") -> Sequence[Buffer]:
        """A packet's payload as the compressor returns it."""
        self.packets += 1
        text = self.text(text or f"packet {self.packets}, runs of {_lengths(pages)} bytes")
        payload = call(self.compressor, "multifd_send_prepare", text, channel=self.channel, pages=pages)
        if not isinstance(payload, Sequence) or isinstance(payload, bytes | bytearray | memoryview | str):
            raise Broken(
                f"multifd_send_prepare({text})", f"returned {type(payload).__name__}, not a sequence of buffers"
            )
        return payload

    def encode(self, *runs: Buffer, text: str = "") -> bytes:
        """A packet's payload, copied."""
        return join(self.prepare([memoryview(run).toreadonly() for run in runs], text))


@dataclass
class Receiver(_End):
    """A receiving channel."""

    direction = "recv"
    #: The text of the CompressorError that the last payload met; the error itself would keep its frames.
    refused: str | None = None

    def recv(self, payload: Buffer, pages: memoryview, lost_after: int | None = None) -> int:
        """Call `multifd_recv` and let it raise; says how many bytes it left unread.

        `lost_after` is how many bytes come before the connection is lost.
        """
        left = memoryview(payload)
        lost = None if lost_after is None else Lost("the connection ended inside a payload")

        def read_into(wanted: memoryview) -> None:
            nonlocal left
            if len(wanted) > len(left):
                raise ValueError(f"read_into of {len(wanted)} bytes, {len(left)} are left of this payload")
            if lost is not None and len(payload) - len(left) + len(wanted) > (lost_after or 0):
                raise lost
            wanted[:] = left[: len(wanted)]
            left = left[len(wanted) :]

        self.channel.next_packet_size = len(payload)
        self.channel.bind(read_into)
        call_raising(self.compressor, "multifd_recv", channel=self.channel, pages=pages)
        return len(left)

    def decode(self, payload: Buffer, pages: bytes, text: str = "") -> None:
        """Decode a good payload: all of it is read, and the pages are the sender's."""
        called = f"multifd_recv({self.text(text or f'{len(payload)} bytes of payload for {len(pages)} of pages')})"
        buffer = memoryview(bytearray(b"\xa5" * len(pages)))
        try:
            left = self.recv(payload, buffer)
        except HOOK_ERRORS as error:
            raise Broken(called, describe(error)) from error
        if left:
            raise Broken(called, f"left {left} bytes of the payload unread")
        if buffer != pages:
            raise Broken(called, difference(bytes(buffer), pages, self.channel.page_size))

    def takes(self, payload: Buffer, length: int, text: str, fill: int = 0xA5) -> bytes | None:
        """Decode a payload that may be anything: the pages, or None where it was refused.

        Raises Broken where it neither filled the pages nor raised CompressorError.
        """
        called = f"multifd_recv({self.text(text)})"
        buffer = bytearray([fill]) * (length + 2 * GUARD)
        left = 0
        self.refused = None
        try:
            left = self.recv(payload, memoryview(buffer)[GUARD : GUARD + length])
        except CompressorError as error:
            self.refused = str(error)
        except HOOK_ERRORS as error:
            raise Broken(called, describe(error)) from error
        if buffer[:GUARD].count(fill) != GUARD or buffer[GUARD + length :].count(fill) != GUARD:
            raise Broken(called, "wrote beside its pages")
        return None if self.refused is not None or left else bytes(buffer[GUARD : GUARD + length])


class Lost(PeerError):
    """The connection is lost; of its own type, so that it is known again."""


def join(payload: Sequence[Buffer]) -> bytes:
    """A payload's bytes, whatever its buffers' shape."""
    return b"".join(bytes(buffer) for buffer in payload)


def _lengths(pages: Sequence[memoryview]) -> str:
    lengths = [str(len(run)) for run in pages]
    return ", ".join(lengths if len(lengths) < 6 else [*lengths[:4], f"... ({len(lengths)} runs)"])


def difference(found: bytes, expected: bytes, page_size: int) -> str:
    """Which page is the first that differs."""
    at = next(index for index, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other)
    page, byte = divmod(at, page_size)
    return (
        f"page {page} of {len(expected) // page_size} is another: byte {byte} is {found[at]:#04x} "
        f"instead of {expected[at]:#04x}"
    )


# --- pages ---

_WORDS = (b"guest", b"memory", b"page", b"channel", b"packet", b"kernel", b"table", b"entry", b"inode", b"offset")


@cache
def texts() -> tuple[bytes, bytes]:
    """Text, and the same compressed: 256 KiB of each to take pieces of."""
    mix = random.Random(0)
    text = b"".join(b"%s %d\n" % (mix.choice(_WORDS), mix.randrange(1000)) for _ in range(120_000))
    return text[: 256 << 10], zlib.compress(text, 1)[: 256 << 10]


def _piece(which: int) -> Callable[[random.Random, int], bytes]:
    def piece(mix: random.Random, length: int) -> bytes:
        memory = texts()[which]
        at = mix.randrange(len(memory) - length)
        return memory[at : at + length]

    return piece


#: Kind of content -> that many bytes of it.
KINDS: Mapping[str, Callable[[random.Random, int], bytes]] = {
    "zero": lambda _, length: bytes(length),
    "text": _piece(0),
    "repeated": lambda mix, length: mix.randbytes(64) * (length // 64),
    "random": lambda mix, length: mix.randbytes(length),
    "compressed": _piece(1),
    "sparse": lambda mix, length: bytes(length - 1) + bytes([mix.randrange(1, 256)]),
}


def mixed(seed: int, pages: int, page_size: int = PAGE) -> bytes:
    """Pages of every kind, in turn; the same for the same seed."""
    mix = random.Random(f"{seed} {pages} {page_size}")
    kinds = list(KINDS.values())
    return b"".join(kinds[(seed + number) % len(kinds)](mix, page_size) for number in range(pages))


def full(page_size: int = PAGE) -> int:
    """Pages in a full packet."""
    return pages_per_packet(page_size)


ZEROS = memoryview(bytes(PACKET_SIZE)).toreadonly()


# --- the process ---


@dataclass(frozen=True)
class Footprint:
    """What a process holds: memory in bytes, descriptors, threads."""

    memory: int
    descriptors: frozenset[str]
    threads: int

    @classmethod
    def now(cls) -> Footprint:
        """Garbage is collected first, and what the allocator keeps for later given back."""
        gc.collect()
        with suppress(AttributeError):  # glibc's
            ctypes.CDLL(None).malloc_trim(0)
        return cls(_status("VmRSS"), frozenset(descriptors()), threads_now())


def threads_now() -> int:
    """How many threads the process has, a library's too."""
    return len(os.listdir("/proc/self/task"))


def descriptors() -> Iterator[str]:
    """Each open descriptor and what it is."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target != f"/proc/{os.getpid()}/fd":
                yield f"{name} -> {target}"


def _status(what: str) -> int:
    found = re.search(what + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_begins() -> int:
    """Bytes of memory now; from here on `peak` counts."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The most bytes of memory that the process had since `peak_begins`."""
    return _status("VmHWM")


@contextmanager
def address_space(more: int) -> Iterator[None]:
    """Allow so many bytes more, and no others: who wants them gets MemoryError."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Nothing can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def no_libraries() -> None:
    """For good: this process loads no library any more, nor Python's modules that are one.

    Those of the standard library stay, and what is loaded already.
    """
    own = Path(sysconfig.get_path("stdlib"))

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "ctypes.dlopen" and arguments[0] is not None:
            raise OSError(f"{arguments[0]}: cannot open shared object file: this check allows no library")
        if event == "import" and arguments[1] is not None:
            path = Path(arguments[1])
            if not path.is_relative_to(own) or {"site-packages", "dist-packages"} & set(path.parts):
                raise ImportError(f"{arguments[0]}: cannot open shared object file: this check allows no library")

    sys.addaudithook(refuse)
