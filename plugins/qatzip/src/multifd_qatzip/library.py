"""libqatzip: found, checked and driven, through bindings that were built without it.

A `Session` never lets libqatzip fall back to its own software path: that path searches for a
device on every call, and from 1.3.0 on each search leaks a pthread key, so that after about 1000
calls the process has none left.  What the device cannot do raises DeviceError instead, and the
session is set up anew, because after any error libqatzip's next answer may be the rest of the
old one (1.1.2 to 2.0.0).

Each call is one member, and so one job of the device.  With more of them in a call, libqatzip
without its software path leaves at the first that fails, forgets those still in flight, and mixes
up the instance's buffers of 64 and 73 KiB: a later, larger member then crashes the process, also
in another thread (1.3.1).
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from multifd.errors import CompressorError
from multifd.formats.pagedevice import LibraryError, file_version, open_library
from multifd.hookspecs import Buffer
from multifd_qatzip.members import DEVICE_LEAST, MEMBER_SIZE, parse

SONAME = "libqatzip.so.3"
#: An absolute path to load instead.
SETTING = "MULTIFD_LIBQATZIP"
PACKAGES = "libqatzip3 on Debian 13 and Ubuntu 24.04 or newer, qatzip-libs on Fedora"
#: The loader does not look beside a library for what it needs, so these are opened first.
NEIGHBOURS = ("libnuma.so.1", "libcrypto.so.3", "libzstd.so.1", "libusdm.so.0", "libqat.so.4")
#: File behind the soname -> releases of QATzip; there is no call that tells.
RELEASES = {
    "3.0.0": "1.0.9 or 1.1.0",
    "3.0.1": "1.1.1",
    "3.0.2": "1.1.2",
    "3.0.3": "1.2",
    "3.2.0": "1.3",
    "3.3.0": "2.0",
}
FUNCTIONS = (
    "qzSetupSessionDeflate",  # first: it tells 1.0.9 and newer from what came before
    "qzGetDefaultsDeflate",
    "qzInit",
    "qzCompress",
    "qzDecompress",
    "qzTeardownSession",
)

OK, DUPLICATE = 0, 1
NO_DEVICE = (-101, -102)
NO_INSTANCE, LOW_MEMORY = -103, -104
CODES = {
    2: "QZ_FORCE_SW: too large for the device",
    -1: "QZ_PARAMS: an argument that this libqatzip does not take",
    -2: "QZ_FAIL: the job failed on the device",
    -3: "QZ_BUF_ERROR: the destination is too small",
    -4: "QZ_DATA_ERROR: damaged data",
    -5: "QZ_TIMEOUT: the device did not answer",
    11: "QZ_NO_HW: no QAT device that this process can use",
    12: "QZ_NO_MDRV: no memory driver",
    13: "QZ_NO_INST_ATTACH: no compression instance is free",
    14: "QZ_LOW_MEM: not enough pinned memory",
    15: "QZ_LOW_DEST_MEM: not enough pinned memory for the destination",
    16: "QZ_UNSUPPORTED_FMT: a format that the device does not have",
    -101: "QZ_NOSW_NO_HW: no QAT device that this process can use",
    -102: "QZ_NOSW_NO_MDRV: no memory driver",
    NO_INSTANCE: "QZ_NOSW_NO_INST_ATTACH: no compression instance is free, or none offers compression",
    LOW_MEMORY: "QZ_NOSW_LOW_MEM: not enough pinned memory",
    -105: "QZ_NO_SW_AVAIL: no software fallback",
    -116: "QZ_NOSW_UNSUPPORTED_FMT: a format that the device does not have",
    100: "QZ_NONE: not initialised",
}

COMPRESS, DECOMPRESS = 0, 1
#: What qzGetDefaultsDeflate fills in, field by field, in every release from 1.0.9 to 2.0.0.
DEFAULTS = {
    "direction": 2,
    "comp_lvl": 1,
    "comp_algorithm": 8,
    "max_forks": 3,
    "sw_backup": 1,
    "hw_buff_sz": MEMBER_SIZE,
    "strm_buff_sz": 65536,
    "input_sz_thrshold": 1024,
    "req_cnt_thrshold": 32,
    "wait_cnt_thrshold": 8,
    "polling_mode": 0,
    "is_sensitive_mode": 0,
    "huffman_hdr": 0,
    "data_fmt": 2,
}
CANARY = 0xA5
CANARY_SIZE = 256


class DeviceError(CompressorError):
    """The device, or libqatzip on its way to it, did not do a job; `code` is libqatzip's."""

    code = OK
    brief = ""


def describe(code: int) -> str:
    """A return code in words."""
    return f"{CODES.get(code, 'not a code of this API')} ({code})"


def _failure(call: str, code: int) -> DeviceError:
    error = DeviceError(f"{call}: {describe(code)}")
    error.code, error.brief = code, str(error)
    return error


@dataclass(slots=True)
class Library:
    """libqatzip, loaded and checked; `version` is the real file's, with QATzip's release."""

    version: str
    lib: Any
    ffi: Any
    started_in: int = 0

    def __str__(self) -> str:
        return f"libqatzip {self.version}"


_lock = threading.Lock()


def _after_fork() -> None:
    """A thread of the parent may have held it."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
_loaded: Library | None = None


def load() -> Library:
    """Load and check libqatzip, once.  Starts no device.

    Raises LibraryError with the loader's own words, or with what does not fit.
    """
    global _loaded  # noqa: PLW0603 - the library belongs to the process: it cannot be unloaded
    with _lock:
        if _loaded is None:
            _loaded = _load()
        return _loaded


def _load() -> Library:
    machine = platform.machine()
    if machine != "x86_64":
        raise LibraryError(f"libqatzip exists for x86-64 only, this machine is {machine}")
    wanted = os.environ.get(SETTING, "")
    if os.path.isabs(wanted):
        for neighbour in (os.path.join(os.path.dirname(wanted), name) for name in NEIGHBOURS):
            if os.path.exists(neighbour):
                with suppress(OSError):  # then libqatzip will say what it misses
                    ctypes.CDLL(neighbour)
    missing = "libqatzip before 1.0.9, or not whole"
    lib, ffi, path = open_library("multifd_qatzip._libqatzip", SETTING, SONAME, FUNCTIONS, missing)
    _check_layout(path, lib, ffi)
    with suppress(ffi.error):  # before 1.3.0 there is no switch
        lib.qzSetLogLevel(0)
    version = file_version(path)
    release = f"QATzip {RELEASES[version]}" if version in RELEASES else "newer than tested"
    return Library(f"{version} ({release})" if version[0].isdigit() else version, lib, ffi)


def _check_layout(path: str, lib: Any, ffi: Any) -> None:
    """Ask for the defaults: they must be where this plugin will write, and nothing behind."""
    memory = ffi.new("unsigned char[]", bytes([CANARY]) * CANARY_SIZE)
    params = ffi.cast("QzSessionParamsDeflate_T *", memory)
    code = lib.qzGetDefaultsDeflate(params)
    if code != OK:
        raise LibraryError(f"{path}: qzGetDefaultsDeflate: {describe(code)}")
    for name, expected in DEFAULTS.items():
        value = getattr(params, name) if name in ("huffman_hdr", "data_fmt") else getattr(params.common_params, name)
        if value != expected:
            raise LibraryError(f"{path}: its layout differs: {name} is {value} by default instead of {expected}")
    size = ffi.sizeof("QzSessionParamsDeflate_T")
    if any(byte != CANARY for byte in memory[size:CANARY_SIZE]):
        raise LibraryError(f"{path}: its layout differs: QzSessionParamsDeflate_T has more than {size} bytes")


class Session:
    """One session of libqatzip, in one direction; belongs to one thread and one process."""

    def __init__(self, library: Library, direction: int, level: int | None = None) -> None:
        """Start the device, the first time in this process, and set a session up.

        `level` is for compression only.  Raises DeviceError; then nothing is left to release.
        """
        self._library = library
        self._ffi = library.ffi
        self._direction = direction
        self._level = level
        self._handle: Any = None
        self._closed = False
        self._given = self._ffi.new("unsigned int *")
        self._made = self._ffi.new("unsigned int *")
        self._open()

    def compress(self, source: Buffer, output: memoryview) -> memoryview:
        """Make a member of up to MEMBER_SIZE bytes on the device; returns the used part of `output`.

        Raises DeviceError, also where libqatzip did it in software all the same, as far as the
        bytes show: at levels 1 and 9.
        """
        if len(source) < DEVICE_LEAST:
            raise DeviceError(f"{len(source)} bytes: libqatzip gives the device {DEVICE_LEAST} and more")
        code = self._call("qzCompress", source, output, 1)
        took = f"took {self._given[0]} of {len(source)} bytes"
        if code != OK or self._given[0] != len(source):
            raise self._failed("qzCompress", code, took)
        made = output[: self._made[0]]
        try:
            made_of = parse(made, len(source))
        except CompressorError as error:
            raise self._failed("qzCompress", code, f"{took} and made something else: {error}") from error
        if len(made_of) != 1 or made_of[0].xfl:
            raise self._failed("qzCompress", code, f"{took} and did it in software")
        return made

    def decompress(self, member: Buffer, pages: memoryview) -> None:
        """Decompress on the device a member whose framing was checked, into exactly `pages`.

        Raises DeviceError, also for damaged data.
        """
        code = self._call("qzDecompress", member, pages)
        if code != OK or self._given[0] != len(member) or self._made[0] != len(pages):
            raise self._failed(
                "qzDecompress",
                code,
                f"took {self._given[0]} of {len(member)} bytes and made {self._made[0]} of {len(pages)}",
            )

    def close(self) -> None:
        """Release the session.  Safe at any time, and twice; in another process it does nothing."""
        self._closed = True
        self._release()

    def _release(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None and os.getpid() == self._library.started_in:
            self._library.lib.qzTeardownSession(handle)
        # qzClose does nothing in any release: only the process's end stops the device.

    def _open(self) -> None:
        library, ffi = self._library, self._ffi
        params = ffi.new("QzSessionParamsDeflate_T *")
        with _lock:  # the first one starts the device
            library.started_in = library.started_in or os.getpid()
            self._check_process()
            # A new handle each time: after a failure the old one still says so (1.3.1).
            handle = ffi.new("QzSession_T *")
            code = library.lib.qzInit(handle, 0)
        if code not in (OK, DUPLICATE):
            raise _failure("qzInit", code)
        code = library.lib.qzGetDefaultsDeflate(params)
        if code == OK:
            params.common_params.direction = self._direction
            params.common_params.sw_backup = 0
            if self._level is not None:
                params.common_params.comp_lvl = self._level
            code = library.lib.qzSetupSessionDeflate(handle, params)
        if code != OK:
            library.lib.qzTeardownSession(handle)
            raise _failure("qzSetupSessionDeflate", code)
        self._handle = handle

    def _call(self, function: str, source: Buffer, target: memoryview, *last: int) -> int:
        self._check_process()
        if self._closed:
            # Passed on, libqatzip would set it up anew without a word, in software.
            raise DeviceError(f"{function}: the session is closed")
        if self._handle is None:  # it could not be set up anew after the last failure
            self._open()
        self._given[0] = len(source)
        self._made[0] = len(target)
        room = self._ffi.from_buffer("unsigned char[]", target, require_writable=True)
        data = self._ffi.from_buffer("unsigned char[]", source)
        code: int = getattr(self._library.lib, function)(self._handle, data, self._given, room, self._made, *last)
        return code

    def _failed(self, call: str, code: int, lengths: str) -> DeviceError:
        """The error; the session is set up anew, now or, where that fails, before the next call."""
        error = _failure(call, code) if code != OK else DeviceError(f"{call}: {lengths}")
        error.brief = error.brief or f"{call}: other bytes than it should have taken or made"
        self._release()
        with suppress(DeviceError):
            self._open()
        return error

    def _check_process(self) -> None:
        started_in = self._library.started_in
        if os.getpid() != started_in:
            raise CompressorError(
                f"process {os.getpid()} was forked from {started_in}, which uses the QAT device: pinned memory does "
                "not follow a fork; start a new process instead (multiprocessing's spawn, subprocess)"
            )
