"""The compressor "qpl": Intel IAA through libqpl, through bindings that were built without it.

Jobs as QEMU makes them: a page each, one final block of fixed codes.  A channel keeps eight under
way, since a single one leaves the device idle between two pages.  libqpl says itself when there
is no device; it then has a path in software, of the same format, which is not used for
migrations: ISA-L is faster (`multifd.formats.pagelist`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from multifd.formats.pagedevice import FALLBACK_OPTION, DeviceCompressor, DeviceError, LibraryError, open_library
from multifd.formats.pagelist import Job
from multifd.hookspecs import METHODS, Buffer, Facts

SONAME = "libqpl.so.1"
#: An absolute path to load instead.
SETTING = "MULTIFD_LIBQPL"
FUNCTIONS = (
    "qpl_get_library_version",
    "qpl_get_job_size",
    "qpl_init_job",
    "qpl_submit_job",
    "qpl_wait_job",
    "qpl_fini_job",
)

HARDWARE, SOFTWARE = 1, 2
DECOMPRESS, COMPRESS = 0, 1
FIRST, LAST, OMIT_VERIFY = 0x1, 0x2, 0x4000
LEVEL = 1
#: Jobs of one channel that the device has at a time.
JOBS = 8
#: Seconds to wait for a full queue, which other channels and processes share, and between two looks.
BUSY_SECONDS, BUSY_PAUSE = 1.0, 20e-6
CANARY = 0xA5

OK, MORE_OUTPUT, BUSY = 0, 2, 5
CODES = {
    BUSY: "the work queues are full",
    500: "this library or machine has no hardware path",
    501: "libaccel-config.so.1 is missing",
    502: "libaccel-config failed",
    503: "no work queue that is enabled and that this user may open",
}


def describe(code: int) -> str:
    """A status in words."""
    return f"status {code}" + (f": {CODES[code]}" if code in CODES else "")


class Libqpl:
    """libqpl and one of its paths."""

    name = "libqpl"
    install = "install libqpl1 (Debian unstable, 1.9.0), or build QPL as a shared library; or qpl-sw"
    advice = (
        "IAA needs a 4th generation Xeon or later, Linux 5.18, intel_iommu=on,sm_on, libaccel-config1, and shared "
        "work queues enabled with accel-config, with /dev/iax/* writable; the same format without a device: qpl-sw"
    )

    def __init__(self, path: int = HARDWARE) -> None:
        self._path = path
        self._lib: Any = None
        self._ffi: Any = None

    def load(self) -> str:
        """Load libqpl, check it once, and return its version.  Starts no device."""
        if self._lib is None:
            lib, ffi, _ = open_library("multifd_qpl._libqpl", SETTING, SONAME, FUNCTIONS)
            _check_layout(lib, ffi)
            self._ffi, self._lib = ffi, lib
        return str(self._ffi.string(self._lib.qpl_get_library_version()).decode())

    def open(self, page_size: int, *, compressing: bool) -> Session:
        """Jobs for one channel in one direction.  Raises DeviceError where there is no device."""
        self.load()
        return Session(self._lib, self._ffi, self._path, page_size, compressing=compressing)


def _check_layout(lib: Any, ffi: Any) -> None:
    """An initialised job is zero where this plugin writes; what it makes there `prove` tells."""
    size = ffi.new("uint32_t *")
    code = lib.qpl_get_job_size(SOFTWARE, size)
    if code != OK or size[0] < ffi.sizeof("qpl_job"):
        raise LibraryError(f"libqpl: a job of {size[0]} bytes ({describe(code)}): its layout is not the one known here")
    memory = ffi.new("uint8_t[]", bytes([CANARY]) * size[0])
    code = lib.qpl_init_job(SOFTWARE, ffi.cast("qpl_job *", memory))
    if code != OK or any(bytes(ffi.buffer(memory, ffi.sizeof("qpl_job")))):
        raise LibraryError(f"libqpl: a new job is not empty ({describe(code)}): its layout is not the one known here")


class _Slot:
    """One job: its memory, which cffi owns, room for what it makes, and the page that it is for."""

    def __init__(self, lib: Any, ffi: Any, path: int, size: int, room: int) -> None:
        self.memory = ffi.new("uint8_t[]", size)
        self.job = ffi.cast("qpl_job *", self.memory)
        self.room = ffi.new("uint8_t[]", room)
        self.given: Any = None
        self.number = 0
        code = lib.qpl_init_job(path, self.job)
        if code != OK:
            raise DeviceError(f"qpl_init_job: {describe(code)}")


class Session:
    """Jobs of one channel in one direction; belongs to one thread."""

    def __init__(self, lib: Any, ffi: Any, path: int, page_size: int, *, compressing: bool) -> None:
        self._lib = lib
        self._ffi = ffi
        self._op = COMPRESS if compressing else DECOMPRESS
        # What is not smaller than a page goes raw, so libqpl need not make it; QEMU gives as much.
        self._room = page_size - 1 if compressing else page_size
        self._slots: list[_Slot] = []
        size = ffi.new("uint32_t *")
        code = lib.qpl_get_job_size(path, size)
        if code != OK:
            raise DeviceError(f"qpl_get_job_size: {describe(code)}")
        try:
            for _ in range(JOBS):
                self._slots.append(_Slot(lib, ffi, path, size[0], page_size))
        except DeviceError:
            self.close()
            raise

    def compress(self, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        """Each page's data, or the page itself where that did not get smaller.  Raises DeviceError."""
        made: list[Buffer] = list(pages)

        def take(slot: _Slot, code: int) -> None:
            if code != MORE_OUTPUT:
                self._check(slot, code, len(pages[slot.number]))
                made[slot.number] = bytes(self._ffi.buffer(slot.room, slot.job.total_out))

        self._run(pages, take)
        return made

    def decompress(self, jobs: Sequence[Job]) -> None:
        """Fill every job's page.  Raises DeviceError, also for damaged data.

        libqpl does not tell what lies behind the end of a page's data, nor a cut that left the page whole.
        """

        def take(slot: _Slot, code: int) -> None:
            number, data, page = jobs[slot.number]
            self._check(slot, code, len(data))
            if slot.job.total_out != len(page):
                raise DeviceError(f"page {number}: made {slot.job.total_out} of {len(page)} bytes")
            page[:] = self._ffi.buffer(slot.room, len(page))

        self._run([job.data for job in jobs], take)

    def _check(self, slot: _Slot, code: int, length: int) -> None:
        if code != OK or slot.job.total_in != length:
            raise DeviceError(f"job {slot.number}: {describe(code)}, took {slot.job.total_in} of {length} bytes")

    def _run(self, sources: Sequence[memoryview], take: Callable[[_Slot, int], None]) -> None:
        """Give every source to a job of its own, and each job that is done, with its status, to `take`."""
        free = deque(self._slots)
        busy: deque[_Slot] = deque()

        def settle() -> None:
            slot = busy.popleft()
            free.append(slot)
            take(slot, self._wait(slot))

        try:
            for number, source in enumerate(sources):
                if not free:
                    settle()
                deadline = time.monotonic() + BUSY_SECONDS
                while (code := self._submit(free[0], number, source)) == BUSY:
                    if busy:
                        settle()
                    elif time.monotonic() > deadline:
                        break
                    else:  # the queue is full of others' jobs; nobody tells when it is not
                        time.sleep(BUSY_PAUSE)
                if code == OK:
                    busy.append(free.popleft())
                else:
                    take(free[0], code)
            while busy:
                settle()
        finally:
            for slot in busy:  # after an error: the device still writes
                self._wait(slot)

    def _submit(self, slot: _Slot, number: int, source: memoryview) -> int:
        slot.number = number
        slot.given = self._ffi.from_buffer("uint8_t[]", source)
        job = slot.job
        job.op = self._op
        job.flags = FIRST | LAST | OMIT_VERIFY
        job.level = LEVEL
        job.next_in_ptr = slot.given
        job.available_in = len(source)
        job.next_out_ptr = slot.room
        job.available_out = self._room
        job.total_in = job.total_out = 0
        code: int = self._lib.qpl_submit_job(job)
        if code != OK:
            slot.given = None
        return code

    def _wait(self, slot: _Slot) -> int:
        code: int = self._lib.qpl_wait_job(slot.job)
        slot.given = None  # it would keep the pages' memory from being given back
        return code

    def close(self) -> None:
        """Give the jobs back.  Safe twice."""
        slots, self._slots = self._slots, []
        for slot in slots:
            self._lib.qpl_fini_job(slot.job)


plugin = DeviceCompressor(
    Facts(
        "qpl", "qpl", METHODS["qpl"], "QEMU's qpl on Intel In-Memory Analytics Accelerators", options=(FALLBACK_OPTION,)
    ),
    Libqpl(),
    wrapped=False,
)
