"""The compressor "qatzip": QuickAssist devices through libqatzip.

One session per channel and direction.  A packet that the device cannot do (all instances busy,
a reset, a time-out), and what libqatzip would not give to it (members of less than 1 KiB or more
than 64 KiB), is done by `software`, whose bytes are of the same format; `sw-fallback=off` makes an
error of the first kind.  `channel.counts` says how many packets took which way.

Memory of a channel: sending, 584 KiB for the eight largest members that a device makes of a
packet; receiving, 1 MiB for the largest payload that QEMU sends.  Both are ordinary memory:
libqatzip copies to and from pinned memory of its own, 4.5 MB for each compression instance.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from multifd.errors import CompressorError
from multifd.formats.deflate import PROVIDER, VERSION
from multifd.formats.pagedevice import FAILED, FALLBACK, FALLBACK_OPTION, HARDWARE, PATIENCE, SOFTWARE, LibraryError
from multifd.hookspecs import MAX_PAYLOAD, METHODS, PACKET_SIZE, Buffer, Channel, Facts, OptionValue, Probe, hookimpl
from multifd_qatzip import devices, library, software
from multifd_qatzip.library import DeviceError, Library, Session
from multifd_qatzip.members import MEMBER_MOST, MEMBER_SIZE, device_takes
from multifd_qatzip.trial import Trial, trial

log = logging.getLogger("multifd")

T = TypeVar("T")

#: Seconds to wait for another channel's job to free an instance.
BUSY_SECONDS = 30.0

#: Room for all that a device makes of a packet.
SEND_BUFFER = PACKET_SIZE // MEMBER_SIZE * MEMBER_MOST

#: The way of a packet, as counted, beside those of `pagedevice`.
BUSY = "software (device busy)"


class _Instances:
    """Waits for a compression instance: a job takes a whole one, and a process has few."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        # Guarded by the condition:
        self._inside = 0
        self._freed = 0

    def run(self, job: Callable[[], T], *, wait: bool) -> T:
        """Do a job; where all instances are busy, wait until one is free, or raise DeviceError."""
        while True:
            with self._changed:
                self._inside += 1
                freed = self._freed
            busy = None
            try:
                return job()
            except DeviceError as error:
                if error.code != library.NO_INSTANCE or not wait:
                    raise
                busy = error
            finally:
                with self._changed:
                    self._inside -= 1
                    self._freed += busy is None
                    self._changed.notify_all()
            with self._changed:
                self._changed.wait_for(lambda: self._freed != freed or not self._inside, BUSY_SECONDS)  # noqa: B023
                if self._freed == freed:
                    raise busy  # nobody had one either


_instances = _Instances()


def _after_fork() -> None:
    """A thread of the parent may have been inside."""
    global _instances  # noqa: PLW0603
    _instances = _Instances()


os.register_at_fork(after_in_child=_after_fork)


@dataclass(slots=True)
class _Codec:
    """One channel in one direction: its session, None where software does it all."""

    fallback: bool
    buffer: memoryview
    session: Session | None = None
    failures: int = 0
    way: str = SOFTWARE

    def do(self, job: Callable[[Session], T], instead: Callable[[], T]) -> T:
        """One member: a job of the device or, where that fails and it is allowed, software's.

        Raises CompressorError for a damaged payload, and where software is not allowed.
        """
        session = self.session
        if session is None:
            return instead()
        try:
            done = _instances.run(lambda: job(session), wait=not self.fallback)
        except DeviceError as error:
            done = instead()  # first, since it raises where the payload is to blame
            self._failed(error)
            return done
        self.failures = 0
        return done

    def _failed(self, error: DeviceError) -> None:
        if not self.fallback:
            raise CompressorError(f"the QAT device failed: {error}; {FALLBACK}=off forbids software") from error
        if error.code == library.NO_INSTANCE:
            self.way = BUSY if self.way == HARDWARE else self.way
            return
        self.way = FAILED
        self.failures += 1
        if self.failures == PATIENCE:
            self.give_up(f"the QAT device failed {PATIENCE} jobs in a row, the last with {error.brief}")

    def give_up(self, why: str) -> None:
        """Ask the device no more: each failure costs time, and without a device a pthread key."""
        self.close()
        log.warning(f"qatzip: {why}: the channel goes on in software")

    def close(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            session.close()


def _count(channel: Channel, way: str) -> None:
    channel.counts[way] = channel.counts.get(way, 0) + 1


@hookimpl
def multifd_compressor() -> Facts:
    return Facts(
        "qatzip",
        "qatzip",
        METHODS["qatzip"],
        "QEMU's qatzip on Intel QuickAssist devices, levels 1-9",
        software.LEVELS,
        software.DEFAULT_LEVEL,
        (FALLBACK_OPTION,),
    )


@hookimpl
def multifd_probe(options: Mapping[str, OptionValue]) -> Probe:
    try:
        found = library.load()
    except LibraryError as error:
        return Probe(False, "libqatzip", reason=str(error), install=f"install {library.PACKAGES}; or qatzip-sw")
    tried = trial()
    if tried.works:
        return Probe(True, "libqatzip", found.version, hardware=True, devices=devices.names())
    reason, advice = _why_not(found, tried)
    return Probe(bool(options[FALLBACK]), PROVIDER, VERSION, reason=reason, install=advice)


def _why_not(found: Library, tried: Trial) -> tuple[str, str]:
    reason, advice = devices.why_not(tried)
    return f"{found} has no device to use: {reason}", advice


def _open(channel: Channel, direction: int, level: int | None, size: int) -> _Codec:
    codec = _Codec(bool(channel.options.get(FALLBACK, True)), memoryview(bytearray(size)))
    found, tried = library.load(), trial()
    try:
        if not tried.works:
            raise DeviceError(tried.why_not)
        codec.session = Session(found, direction, level)
    except DeviceError as error:
        if not codec.fallback:
            raise CompressorError(f"no QAT device: {error}; {FALLBACK}=off forbids software") from error
        if tried.works:
            codec.give_up(f"the QAT device works, but not for this process: {error}")
        else:  # in the words of the probe, whom a receiver that was told no name did not hear
            reason, advice = _why_not(found, tried)
            log.warning(f"qatzip works in software: {reason}; {advice}")
    return codec


@hookimpl
def multifd_send_setup(channel: Channel) -> None:
    channel.compress_data = _open(channel, library.COMPRESS, channel.level, SEND_BUFFER)


@hookimpl
def multifd_send_prepare(channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
    codec: _Codec = channel.compress_data
    level = channel.level or software.DEFAULT_LEVEL
    codec.way = HARDWARE if codec.session is not None else SOFTWARE
    payload: list[Buffer] = []
    for number, source in enumerate(software.sources(software.join(pages))):
        room = codec.buffer[number * MEMBER_MOST : (number + 1) * MEMBER_MOST]
        payload += codec.do(
            lambda session, source=source, room=room: [session.compress(source, room)],  # type: ignore[misc]
            lambda source=source: software.compress_member(source, level),  # type: ignore[misc]
        )
    _count(channel, codec.way)
    return payload


@hookimpl
def multifd_send_cleanup(channel: Channel) -> None:
    _close(channel)


@hookimpl
def multifd_recv_setup(channel: Channel) -> None:
    channel.compress_data = _open(channel, library.DECOMPRESS, None, MAX_PAYLOAD)


@hookimpl
def multifd_recv(channel: Channel, pages: memoryview) -> None:
    codec: _Codec = channel.compress_data
    payload, members = software.read_payload(channel, codec.buffer, len(pages))
    fit = codec.session is not None and all(map(device_takes, members))
    codec.way = HARDWARE if fit else SOFTWARE
    at = 0
    for member in members:
        target = pages[at : at + member.size]
        at += member.size
        if fit:
            codec.do(
                lambda session, member=member, target=target: session.decompress(payload[member.whole], target),  # type: ignore[misc]
                lambda member=member, target=target: software.decompress_member(payload, member, target),  # type: ignore[misc]
            )
        else:
            software.decompress_member(payload, member, target)
    _count(channel, codec.way)


@hookimpl
def multifd_recv_cleanup(channel: Channel) -> None:
    _close(channel)


def _close(channel: Channel) -> None:
    codec, channel.compress_data = channel.compress_data, None
    if codec is not None:
        codec.close()
