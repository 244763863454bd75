"""The compressor "uadk": the Kunpeng's compression engine through libwd_comp, of UADK.

libwd_comp is for arm64 servers and in no package index, so nothing here has met a device:
`python -m multifd_uadk.check` tells whether it works on one.  The calls are those that QEMU makes:
algorithm zlib, round-robin over the queues, hardware only, one synchronous job for each page.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from typing import Any

from multifd.formats.pagedevice import FALLBACK_OPTION, DeviceCompressor, DeviceError, file_version, open_library
from multifd.formats.pagelist import Job
from multifd.hookspecs import METHODS, Buffer, Facts

SONAME = "libwd_comp.so.2"
#: An absolute path to load instead.
SETTING = "MULTIFD_LIBWD_COMP"
FUNCTIONS = ("wd_comp_init2_", "wd_comp_alloc_sess", "wd_comp_free_sess", "wd_do_comp_sync")

ROUND_ROBIN, HARDWARE_ONLY = 0, 1
ZLIB = 1
COMPRESS, DECOMPRESS = 0, 1
#: The node of the calling thread, or the nearest one that has a device.
ANY_NODE = -1
OK, STREAM_END = 0, 1
CODES = {61: "the device is being reset", 62: "the device does not answer", 67: "damaged data, or too long"}


def describe(code: int) -> str:
    """A return code in words."""
    number = abs(code)
    text = CODES.get(number) or (os.strerror(number) if number in errno.errorcode else "")
    return f"status {code}" + (f": {text}" if text else "")


class Libwd:
    """libwd_comp, which is set up once in a process, for good."""

    name = "libwd_comp"
    install = "build UADK (github.com/Linaro/uadk), or take it from openEuler; or uadk-sw"
    advice = (
        "the Kunpeng's compression engine needs Linux 5.9 with uacce, hisi_zip loaded with uacce_mode=1, an SMMU with "
        "shared virtual addresses, and /dev/hisi_zip-* writable; the same format without a device: uadk-sw"
    )

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._lib: Any = None
        self._ffi: Any = None
        self._path = ""
        self._started = False

    def load(self) -> str:
        """Load libwd_comp and return its version, as far as its file's name tells.  Starts no device."""
        with self._lock:
            self._load()
        return file_version(self._path)

    def _load(self) -> None:
        if self._lib is None:
            self._lib, self._ffi, self._path = open_library("multifd_uadk._libwd_comp", SETTING, SONAME, FUNCTIONS)

    def open(self, page_size: int, *, compressing: bool) -> Session:
        """A session for one channel in one direction.  Raises DeviceError where there is no device."""
        with self._lock:
            self._load()
            if not self._started:
                algorithm = self._ffi.new("char[]", b"zlib")
                code = self._lib.wd_comp_init2_(algorithm, ROUND_ROBIN, HARDWARE_ONLY, self._ffi.NULL)
                if code not in (OK, -errno.EEXIST):
                    raise DeviceError(f"wd_comp_init2: {describe(code)}")
                self._started = True
        return Session(self._lib, self._ffi, page_size, compressing=compressing)


class Session:
    """A session of libwd_comp; belongs to one thread."""

    def __init__(self, lib: Any, ffi: Any, page_size: int, *, compressing: bool) -> None:
        self._lib = lib
        self._ffi = ffi
        self._page_size = page_size
        direction = COMPRESS if compressing else DECOMPRESS
        # Twice a page: what does not get smaller has to go somewhere.
        self._room = ffi.new("uint8_t[]", 2 * page_size)
        self._request = ffi.new("wd_comp_req *", {"op_type": direction})
        scheduling = ffi.new("sched_params *", {"numa_id": ANY_NODE, "type": direction})
        setup = ffi.new(
            "wd_comp_sess_setup *",
            {"alg_type": ZLIB, "op_type": direction, "sched_param": ffi.cast("void *", scheduling)},
        )
        self._handle = lib.wd_comp_alloc_sess(setup)
        if not self._handle:
            raise DeviceError("wd_comp_alloc_sess gave no session: UADK's own log says why")

    def compress(self, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        """Each page's data.  Raises DeviceError."""
        return [bytes(self._ffi.buffer(self._room, self._do(number, page))) for number, page in enumerate(pages)]

    def decompress(self, jobs: Sequence[Job]) -> None:
        """Fill every job's page.  Raises DeviceError, also for damaged data."""
        for number, data, page in jobs:
            made = self._do(number, data)
            if made != len(page):
                raise DeviceError(f"page {number}: made {made} of {len(page)} bytes")
            page[:] = self._ffi.buffer(self._room, made)

    def _do(self, number: int, source: memoryview) -> int:
        """One job; returns how much it made."""
        request = self._request
        with self._ffi.from_buffer("uint8_t[]", source) as given:
            request.src, request.src_len = given, len(source)
            request.dst, request.dst_len = self._room, len(self._room)
            request.status = OK
            code = self._lib.wd_do_comp_sync(self._handle, request)
        if code != OK or request.status not in (OK, STREAM_END):
            raise DeviceError(f"page {number}: wd_do_comp_sync: {describe(code or request.status)}")
        if request.src_len != len(source) or request.dst_len > len(self._room):
            raise DeviceError(
                f"page {number}: took {request.src_len} of {len(source)} bytes and made {request.dst_len}"
            )
        return int(request.dst_len)

    def close(self) -> None:
        """Give the session back.  Safe twice."""
        handle, self._handle = self._handle, 0
        if handle:
            self._lib.wd_comp_free_sess(handle)


plugin = DeviceCompressor(
    Facts(
        "uadk", "uadk", METHODS["uadk"], "QEMU's uadk on the compression engine of Kunpeng", options=(FALLBACK_OPTION,)
    ),
    Libwd(),
    wrapped=True,
)
