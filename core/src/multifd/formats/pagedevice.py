"""A compressor of methods qpl or uadk on a device: a vendor's library in front, software behind.

A plugin brings a `Vendor`: how its library is loaded, and a `Codec` that has the device do the
pages.  What does not depend on the device is here: the hooks, the option `sw-fallback`, what is
counted, and `prove`, which has the device work for and against the software codec.

Of a plugin for another format, as qatzip is, the library is loaded here too, and its option and ways have these names.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, Protocol, TypeVar

from multifd.errors import CompressorError, HostError
from multifd.formats.deflate import PROVIDER, VERSION
from multifd.formats.pagelist import LEVELS, Codec, Job, Software, decode, encode, receive_buffer
from multifd.hookspecs import Channel, Facts, Option, OptionValue, Probe, hookimpl
from multifd.log import log
from multifd.wire.flags import DEFAULT_PAGE_SIZE
from multifd.wire.packet import Buffer

T = TypeVar("T")

FALLBACK = "sw-fallback"
FALLBACK_OPTION = Option(FALLBACK, True, "off: an error where the device cannot do it, instead of software")
#: Packets, or jobs of one, in a row that a device may fail before its channel stops asking it.
PATIENCE = 8
#: The ways of a packet, as counted.
HARDWARE, SOFTWARE, FAILED, NEITHER = "hardware", "software", "software (device failed)", "raw pages"
#: What `check` tries: how many pages of which size.
CHECKS = ((280, 4096), (35, 65536))


class LibraryError(HostError):
    """A vendor's library is not here, or is not one that its plugin knows."""


class DeviceError(CompressorError):
    """The device, or the library on its way to it, did not do a job."""


class Vendor(Protocol):
    """A vendor's library and its device, as a plugin binds them."""

    #: The library's name, and what to do where it is missing, or has no device.
    name: str
    install: str
    advice: str

    def load(self) -> str:
        """Load the library and return its version.  Raises LibraryError."""

    def open(self, page_size: int, *, compressing: bool) -> Codec:
        """Get the device ready for one channel in one direction; the codec raises DeviceError, and so may this."""


def open_library(
    bindings: str, setting: str, soname: str, functions: Iterable[str], missing: str = "an older one, or not whole"
) -> tuple[Any, Any, str]:
    """Load a library by its soname, or by the absolute path in the environment's `setting`, for good.

    `bindings` is the module that cffi generated; `missing` says what a library is that lacks one of the functions.
    Returns the library, cffi's `ffi`, and the real file.  Raises LibraryError with the loader's own words, for another
    soname, and for a missing function.
    """
    try:
        ffi = import_module(bindings).ffi  # cffi's backend is a library too
    except ImportError as error:
        raise LibraryError(f"{bindings}: {error}") from None
    wanted = os.environ.get(setting) or soname
    if wanted != soname and not os.path.isabs(wanted):
        raise LibraryError(f"{setting}={wanted} is not an absolute path")
    try:
        library = ffi.dlopen(wanted, ffi.RTLD_NOW)
    except (OSError, UnicodeError) as error:
        text = str(error).removeprefix(f"cannot load library '{wanted}': ")
        raise LibraryError(" ".join(text.split())) from None
    _kept.append(library)
    path = os.path.realpath(wanted) if wanted != soname else _mapped(soname)
    try:
        # Finds what is loaded by its soname.  Not with cffi: where the loader gives no reason, as for this, it
        # crashes (2.1.1).
        ctypes.CDLL(soname, os.RTLD_NOW | os.RTLD_NOLOAD)
    except OSError:
        raise LibraryError(f"{path}: its soname is not {soname}, the one this plugin knows") from None
    for name in functions:
        try:
            getattr(library, name)
        except (AttributeError, ffi.error):
            raise LibraryError(f"{path} has no {name}: {missing}") from None
    return library, ffi, path


#: Never unloaded: threads of theirs may still run, and a destructor may stop the device under whoever uses it.
_kept: list[Any] = []


def _mapped(soname: str) -> str:
    """The file that was loaded by this soname; the soname where none has its name."""
    stem = "/" + soname.partition(".so")[0] + ".so"
    with open("/proc/self/maps") as maps:
        return next((line.split(maxsplit=5)[5].rstrip("\n") for line in maps if stem in line), soname)


def file_version(path: str) -> str:
    """The version in the name of a library's file."""
    return os.path.basename(path).partition(".so.")[2] or "of unknown version"


def sample_pages(count: int, size: int) -> Iterator[bytes]:
    """Pages of every kind: text, noise, both, repeats near and far, one byte."""
    mix = random.Random(size)
    kinds: list[Callable[[], bytes]] = [
        lambda: bytes([mix.randrange(256)]) * size,
        lambda: "".join(f"{mix.randrange(9999)} entry\n" for _ in range(size // 8)).encode()[:size].ljust(size),
        lambda: mix.randbytes(64) * (size // 64),
        lambda: mix.randbytes(size // 4) * 4,
        lambda: mix.randbytes(size // 2).ljust(size, b"\0"),
        lambda: bytes(mix.choices(range(16), k=size)),
        lambda: mix.randbytes(size),
    ]
    for number in range(count):
        yield kinds[number % len(kinds)]()


def prove(
    vendor: Vendor, software: Software, count: int, *, levels: Sequence[int] = (1,), size: int = DEFAULT_PAGE_SIZE
) -> tuple[int, int]:
    """Have the device read what software made, and software what the device made, of `count` sample pages.

    Returns how many pages each compressed to less than a page: device, software at all levels.
    Raises DeviceError where the device fails or any page comes back changed.
    """
    pages = [memoryview(page) for page in sample_pages(count, size)]
    device = vendor.open(size, compressing=True)
    try:
        by_device = _read_back(pages, device.compress(pages), software, "the device compressed, software read")
    finally:
        device.close()
    if not by_device:
        raise DeviceError(f"the device compressed none of {count} pages")
    device = vendor.open(size, compressing=False)
    try:
        made = [Software(software.wrapped, level).compress(pages) for level in levels]
        counts = [_read_back(pages, data, device, "software compressed, the device read") for data in made]
    finally:
        device.close()
    return by_device, sum(counts)


def _read_back(pages: Sequence[memoryview], made: Sequence[Buffer], reader: Codec, what: str) -> int:
    jobs = [
        Job(number, memoryview(data), memoryview(bytearray(len(page))))
        for number, (data, page) in enumerate(zip(made, pages, strict=True))
        if len(data) < len(page)
    ]
    try:
        reader.decompress(jobs)
    except CompressorError as error:
        raise DeviceError(f"{what}: {error}") from error
    for number, _, page in jobs:
        if page != pages[number]:
            raise DeviceError(f"{what}: page {number} came back changed")
    return len(jobs)


def check(vendor: Vendor, *, wrapped: bool) -> None:
    """Prove or disprove on this machine that a vendor's device and the software codec understand each other.

    Prints one line, and exits with 1 where they do not, or there is no device.
    """
    software = Software(wrapped)
    name = vendor.name
    try:
        name = f"{vendor.name} {vendor.load()}"
        counts = [prove(vendor, software, count, levels=LEVELS, size=size) for count, size in CHECKS]
    except LibraryError as error:
        sys.exit(f"{name}: no answer: {error}; {vendor.install}")
    except DeviceError as error:
        sys.exit(f"{name}: does NOT work: {error}; {vendor.advice}")
    by_device, by_software = (sum(column) for column in zip(*counts, strict=True))
    sizes = " and ".join(str(size) for _, size in CHECKS)
    print(
        f"{name}: works: {by_device} pages of {sizes} bytes that the device compressed read in software, "
        f"{by_software} that software compressed read by the device, every byte the same"
    )


@dataclass(slots=True)
class _DeviceCodec:
    """One channel in one direction: its session, None where software does it all."""

    name: str
    software: Software
    session: Codec | None
    fallback: bool
    counts: dict[str, int]
    buffer: memoryview
    failures: int = 0

    def compress(self, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        return self._do(lambda codec: codec.compress(pages))

    def decompress(self, jobs: Sequence[Job]) -> None:
        if jobs:
            self._do(lambda codec: codec.decompress(jobs))
        else:
            self._count(NEITHER)

    def close(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            session.close()

    def _do(self, work: Callable[[Codec], T]) -> T:
        """A packet by the device or, where that fails and it is allowed, by software."""
        way = SOFTWARE
        if self.session is not None:
            try:
                done = work(self.session)
            except DeviceError as error:
                done = work(self.software)  # first, since it raises where the payload is to blame
                way = FAILED
                self._failed(error)
            else:
                way = HARDWARE
                self.failures = 0
        else:
            done = work(self.software)
        self._count(way)
        return done

    def _count(self, way: str) -> None:
        self.counts[way] = self.counts.get(way, 0) + 1

    def _failed(self, error: DeviceError) -> None:
        if not self.fallback:
            raise CompressorError(f"the device failed: {error}; {FALLBACK}=off forbids software") from error
        self.failures += 1
        if self.failures == PATIENCE:
            self.close()
            log.warning(
                f"{self.name}: the device failed {PATIENCE} packets in a row, the last with {error}: "
                "the channel goes on in software"
            )


class DeviceCompressor:
    """The hooks of a compressor with a device."""

    def __init__(self, facts: Facts, vendor: Vendor, *, wrapped: bool) -> None:
        self._facts = facts
        self._vendor = vendor
        self._software = Software(wrapped)

    @hookimpl
    def multifd_compressor(self) -> Facts:
        return self._facts

    @hookimpl
    def multifd_probe(self, options: Mapping[str, OptionValue]) -> Probe:
        try:
            version = self._vendor.load()
        except LibraryError as error:
            return Probe(False, self._vendor.name, reason=str(error), install=self._vendor.install)
        if self._why_not:
            return Probe(bool(options[FALLBACK]), PROVIDER, VERSION, reason=self._why_not, install=self._vendor.advice)
        return Probe(True, self._vendor.name, version, hardware=True)

    @cached_property
    def _why_not(self) -> str:
        """Why the device cannot be used, in words; empty where it proved that it works.

        Kept for the process.  Channels of which no probe was asked may each try, from Python 3.12 on at the same
        time: that proves the same.
        """
        try:
            prove(self._vendor, self._software, 14)
        except DeviceError as error:
            return f"{self._vendor.name} {self._vendor.load()} has no device to use: {error}"
        return ""

    def _open(self, channel: Channel, *, compressing: bool) -> None:
        fallback = bool(channel.options.get(FALLBACK, True))
        session = None
        self._vendor.load()
        try:
            if self._why_not:
                raise DeviceError(self._why_not)
            session = self._vendor.open(channel.page_size, compressing=compressing)
        except DeviceError as error:
            if not fallback:
                raise CompressorError(f"{error}; {FALLBACK}=off forbids software") from error
            told = f"{self._facts.name} works in software: {error}; {self._vendor.advice}"
            log.warning(told)
        buffer = memoryview(b"") if compressing else receive_buffer()
        channel.compress_data = _DeviceCodec(
            self._facts.name, self._software, session, fallback, channel.counts, buffer
        )

    @hookimpl
    def multifd_send_setup(self, channel: Channel) -> None:
        self._open(channel, compressing=True)

    @hookimpl
    def multifd_send_prepare(self, channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        return encode(channel, pages, channel.compress_data)

    @hookimpl
    def multifd_send_cleanup(self, channel: Channel) -> None:
        self._close(channel)

    @hookimpl
    def multifd_recv_setup(self, channel: Channel) -> None:
        self._open(channel, compressing=False)

    @hookimpl
    def multifd_recv(self, channel: Channel, pages: memoryview) -> None:
        codec: _DeviceCodec = channel.compress_data
        decode(channel, pages, codec, codec.buffer)

    @hookimpl
    def multifd_recv_cleanup(self, channel: Channel) -> None:
        self._close(channel)

    @staticmethod
    def _close(channel: Channel) -> None:
        codec, channel.compress_data = channel.compress_data, None
        if codec is not None:
            codec.close()
