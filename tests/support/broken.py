"""A compressor that keeps the contract, and ones that break it in one place each.

`BROKEN` says for each which checks of the conformance suite have to fail.  A compressor's name is
`toy-` and its class's name; `install` makes all of them installed compressors for child processes.
"""

from __future__ import annotations

import array
import ctypes
import os
import re
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from multifd.errors import CompressorError, PeerError
from multifd.hookspecs import Channel, Facts, Option, Probe, hookimpl
from multifd.wire.flags import MAX_PAYLOAD, PACKET_SIZE
from multifd.wire.packet import Buffer

PAGE = 4096
HEAD = struct.Struct(">I")
#: What is never released.
kept: list[object] = []


def poke(view: memoryview, at: int) -> None:
    """Write where Python would not let one, as a library does."""
    from cffi import FFI

    ffi = FFI()
    ffi.memmove(ffi.cast("char *", ffi.from_buffer(view)) + at, b"?", 1)


def words(cls: type) -> str:
    """A class's name as part of a compressor's."""
    return re.sub(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z])(?=[A-Z])", "-", cls.__name__).lower()


class Good:
    """Each payload: the pages' length, and a zlib stream of its own; stored, since all of this is run often."""

    method, flag = "toy", 31
    default_level = 0
    ladder = (0, 1, 6)
    summary = "for tests"

    @property
    def name(self) -> str:
        return f"{self.method}-{words(type(self))}"

    @hookimpl
    def multifd_compressor(self) -> Facts:
        options = (Option("window", 15, "9 to 15"), Option("fast", False, "or not"), Option("note", "", "any text"))
        levels = range(10)
        return Facts(
            self.name, self.method, self.flag, self.summary, levels, self.default_level, options, ladder=self.ladder
        )

    @hookimpl
    def multifd_probe(self) -> Probe:
        return Probe(True, "zlib", zlib.ZLIB_RUNTIME_VERSION)

    @hookimpl
    def multifd_send_setup(self, channel: Channel) -> None:
        self.set_up(channel)

    @hookimpl
    def multifd_recv_setup(self, channel: Channel) -> None:
        self.set_up(channel)

    def set_up(self, channel: Channel) -> None:
        channel.compress_data = {"packets": 0}
        if not 9 <= int(channel.options["window"]) <= 15:
            raise CompressorError(f"window={channel.options['window']} is not 9 to 15")

    @hookimpl
    def multifd_send_prepare(self, channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        channel.compress_data["packets"] += 1
        return [self.encode(channel, b"".join(pages))]

    def encode(self, channel: Channel, data: bytes) -> bytes:
        stream = zlib.compressobj(channel.level or 0, zlib.DEFLATED, int(channel.options["window"]))
        return HEAD.pack(len(data)) + stream.compress(data) + stream.flush()

    @hookimpl
    def multifd_recv(self, channel: Channel, pages: memoryview) -> None:
        payload = bytearray(channel.next_packet_size)
        channel.read_into(payload)
        channel.compress_data["packets"] += 1
        pages[:] = self.decode(channel, bytes(payload), len(pages))

    def decode(self, channel: Channel, payload: bytes, length: int) -> bytes:  # noqa: ARG002
        if len(payload) < HEAD.size or HEAD.unpack_from(payload)[0] != length:
            raise CompressorError(f"not a payload of {length} bytes of pages")
        return self.inflate(payload, length)

    def inflate(self, payload: bytes, length: int) -> bytes:
        stream = zlib.decompressobj()
        try:
            data = stream.decompress(payload[HEAD.size :], length + 1)
        except zlib.error as error:
            raise CompressorError(f"a damaged payload: {error}") from error
        return self.checked(data, stream, length)

    def checked(self, data: bytes, stream: Any, length: int) -> bytes:
        if len(data) != length or not stream.eof or stream.unused_data:
            raise CompressorError(
                f"the payload holds {len(data)} bytes of pages instead of {length}, or more behind them"
            )
        return data

    @hookimpl
    def multifd_send_cleanup(self, channel: Channel) -> None:
        self.clean_up(channel)

    @hookimpl
    def multifd_recv_cleanup(self, channel: Channel) -> None:
        self.clean_up(channel)

    def clean_up(self, channel: Channel) -> None:
        channel.compress_data = None


BROKEN: dict[str, tuple[str, ...]] = {}


def breaks(*checks: str) -> Any:
    """Note which checks a class has to fail."""

    def note(cls: type[Good]) -> type[Good]:
        BROKEN[cls().name] = checks
        return cls

    return note


# --- what it says of itself ---


@breaks("facts")
class TwoLines(Good):
    summary = "for\ntests"


@breaks("facts")
class Wavers(Good):
    @hookimpl
    def multifd_compressor(self) -> Facts:
        kept.append(None)
        self.summary = f"asked {len(kept)} times"
        return super().multifd_compressor()


@breaks("facts")
class OptionWithoutHelp(Good):
    @hookimpl
    def multifd_compressor(self) -> Facts:
        return Facts(self.name, "toy", 31, "for tests", options=(Option("window", 15, ""),))

    def set_up(self, channel: Channel) -> None:
        channel.compress_data = {"packets": 0}
        if channel.options["window"] not in range(9, 16):
            raise CompressorError("no such window")


@breaks("hooks")
class HasNoRecv(Good):
    multifd_recv = None  # type: ignore[assignment]


@breaks("without-library")
class FactsOfTheLibrary(Good):
    @property
    def summary(self) -> str:  # type: ignore[override]
        return f"for tests, with {ctypes.CDLL('libz.so.1')._name}"


@breaks("probe-without-library")
class ProbeRaises(Good):
    @hookimpl
    def multifd_probe(self) -> Probe:
        return Probe(True, ctypes.CDLL("libz.so.1")._name)


@breaks("probe-without-library")
class DoesNotSayWhyNot(Good):
    @hookimpl
    def multifd_probe(self) -> Probe:
        try:
            return Probe(True, ctypes.CDLL("libz.so.1")._name)
        except OSError:
            return Probe(False)


@breaks("probe")
class AnswersOnce(Good):
    @hookimpl
    def multifd_probe(self) -> Probe:
        kept.append(None)
        return Probe(True, "zlib", f"for the {len(kept)}th time")


@breaks("probe-leaves-nothing")
class ProbeLeavesAThread(Good):
    @hookimpl
    def multifd_probe(self) -> Probe:
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        return Probe(True, "zlib")


@breaks("probe-leaves-nothing")
class ProbeLeavesADescriptor(Good):
    @hookimpl
    def multifd_probe(self) -> Probe:
        os.open("/dev/null", os.O_RDONLY)
        return Probe(True, "zlib")


@breaks("probe-leaves-nothing")
class ProbeLeavesAProcess(Good):
    @hookimpl
    def multifd_probe(self) -> Probe:
        kept.append(subprocess.Popen(["sleep", "3"]))
        return Probe(True, "zlib")


@breaks("probe-leaves-nothing")
class ProbeSetsTheEnvironment(Good):
    @hookimpl
    def multifd_probe(self) -> Probe:
        os.environ["TOY_PROBED"] = "yes"
        return Probe(True, "zlib")


# --- pages there and back ---


@breaks("contents")
class ForgetsZeros(Good):
    def encode(self, channel: Channel, data: bytes) -> bytes:
        return super().encode(channel, data) if len(data) != 17 * PAGE or data.strip(b"\0") else HEAD.pack(0)

    @hookimpl
    def multifd_recv(self, channel: Channel, pages: memoryview) -> None:
        payload = bytearray(channel.next_packet_size)
        channel.read_into(payload)
        if payload != HEAD.pack(0) or len(pages) != 17 * PAGE:
            pages[:] = self.decode(channel, bytes(payload), len(pages))


@breaks("packet-sizes")
class Cannot77(Good):
    def encode(self, channel: Channel, data: bytes) -> bytes:
        return super().encode(channel, data if len(data) != 77 * PAGE else bytes(len(data)))


@breaks("page-sizes")
class KnowsSmallPages(Good):
    def encode(self, channel: Channel, data: bytes) -> bytes:
        if channel.page_size == 65536:
            data = b"".join(data[at : at + PAGE] * 16 for at in range(0, len(data), 65536))
        return super().encode(channel, data)


@breaks("scattered")
class LosesRuns(Good):
    @hookimpl
    def multifd_send_prepare(self, channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        return [self.encode(channel, b"".join(sorted(map(bytes, pages))))]


@breaks("long-stream")
class CountsTo1000(Good):
    def encode(self, channel: Channel, data: bytes) -> bytes:
        tired = channel.compress_data["packets"] > 1000 and len(data) == PACKET_SIZE
        return super().encode(channel, bytes(len(data)) if tired else data)


# --- sessions and memory ---


@breaks("many-sessions")
class KeepsMemory(Good):
    def set_up(self, channel: Channel) -> None:
        super().set_up(channel)
        kept.append(bytes(range(256)) * 20)


@breaks("many-sessions")
class KeepsDescriptors(Good):
    def set_up(self, channel: Channel) -> None:
        super().set_up(channel)
        kept.append(None)
        if len(kept) % 100 == 0:
            os.open("/dev/null", os.O_RDONLY)


@breaks("many-sessions")
class KeepsThreads(Good):
    def set_up(self, channel: Channel) -> None:
        super().set_up(channel)
        kept.append(None)
        if len(kept) % 100 == 0:
            threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()


@breaks("many-packets")
class KeepsPackets(Good):
    def decode(self, channel: Channel, payload: bytes, length: int) -> bytes:
        data = super().decode(channel, payload, length)
        if channel.compress_data["packets"] > 100:
            kept.append(data)
        return data


# --- buffers ---


@breaks("payload")
class ReturnsAnArray(Good):
    @hookimpl
    def multifd_send_prepare(self, channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        channel.compress_data["packets"] += 1
        return [array.array("B", self.encode(channel, b"".join(pages)))]  # type: ignore[list-item]


@breaks("expansion")
class Expands(Good):
    def encode(self, channel: Channel, data: bytes) -> bytes:
        payload = super().encode(channel, data)
        return payload * 3 if len(payload) > PACKET_SIZE else payload

    def decode(self, channel: Channel, payload: bytes, length: int) -> bytes:
        return super().decode(channel, payload[: len(payload) // 3] if len(payload) > MAX_PAYLOAD else payload, length)


@breaks("payload-stays")
class ClearsOthersBuffers(Good):
    made = threading.local()

    @hookimpl
    def multifd_send_prepare(self, channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        channel.compress_data["packets"] += 1
        payload = bytearray(self.encode(channel, b"".join(pages)))
        self.made.__dict__.setdefault("payloads", []).append(payload)
        return [memoryview(payload)]

    def decode(self, channel: Channel, payload: bytes, length: int) -> bytes:
        for one in self.made.__dict__.pop("payloads", []):
            one[:] = bytes(len(one))
        return super().decode(channel, payload, length)


@breaks("pages-change")
class LooksBack(Good):
    @hookimpl
    def multifd_send_prepare(self, channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        last, channel.compress_data["last"] = channel.compress_data.get("last"), list(pages)
        data = b"".join(pages)
        if last is not None and b"".join(last) == data:
            return [HEAD.pack(0)]
        return [self.encode(channel, data)]

    def decode(self, channel: Channel, payload: bytes, length: int) -> bytes:
        last: bytes = channel.compress_data.get("data", b"")
        data = last if payload == HEAD.pack(0) and len(last) == length else super().decode(channel, payload, length)
        channel.compress_data["data"] = data
        return data


@breaks("buffers-released")
class KeepsViews(Good):
    @hookimpl
    def multifd_send_prepare(self, channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        channel.compress_data["packets"] += 1
        kept[:] = pages
        return [self.encode(channel, b"".join(pages))]


@breaks("pages-untouched")
class WritesIntoItsSource(Good):
    @hookimpl
    def multifd_send_prepare(self, channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        channel.compress_data["packets"] += 1
        payload = [self.encode(channel, b"".join(pages))]
        if len(pages[0]) == 19 * PAGE and isinstance(pages[0].obj, bytearray):
            poke(pages[0], 5000)
        return payload


@breaks("pages-only")
class WritesBehindItsPages(Good):
    @hookimpl
    def multifd_recv(self, channel: Channel, pages: memoryview) -> None:
        super().multifd_recv(channel, pages)
        if len(pages) == 3 * PAGE:
            poke(pages, len(pages))


# --- payloads that are not good ---


@breaks("flipped")
class FallsOverAFlip(Good):
    def decode(self, channel: Channel, payload: bytes, length: int) -> bytes:
        if payload[4:5] == b"\xf8":
            raise IndexError("list index out of range")
        return super().decode(channel, payload, length)


@breaks("flipped")
class LeavesPagesAlone(Good):
    @hookimpl
    def multifd_recv(self, channel: Channel, pages: memoryview) -> None:
        payload = bytearray(channel.next_packet_size)
        channel.read_into(payload)
        if payload[4:5] != b"\xf8":
            pages[:] = self.decode(channel, bytes(payload), len(pages))


@breaks("anything")
class Crashes(Good):
    def decode(self, channel: Channel, payload: bytes, length: int) -> bytes:
        if len(payload) == 1000:
            os.abort()
        return super().decode(channel, payload, length)


@breaks("swapped")
class CountsPackets(Good):
    def encode(self, channel: Channel, data: bytes) -> bytes:
        return HEAD.pack(channel.compress_data["packets"]) + super().encode(channel, data)

    def decode(self, channel: Channel, payload: bytes, length: int) -> bytes:
        data = super().decode(channel, payload[HEAD.size :], length)
        if payload[: HEAD.size] == HEAD.pack(channel.compress_data["packets"] + 1):
            raise KeyError("another packet")
        return data


@breaks("truncated")
class FillsUp(Good):
    def checked(self, data: bytes, stream: Any, length: int) -> bytes:
        return data.ljust(length, b"\0") if len(data) < length else super().checked(data, stream, length)


@breaks("another-size")
class TakesAnySize(Good):
    def decode(self, channel: Channel, payload: bytes, length: int) -> bytes:  # noqa: ARG002
        try:
            return self.inflate(payload, HEAD.unpack_from(payload)[0])[:length].ljust(length, b"\0")
        except struct.error as error:
            raise CompressorError("not a payload") from error


@breaks("padded")
class LooksAwayAtTheEnd(Good):
    def checked(self, data: bytes, stream: Any, length: int) -> bytes:
        if len(data) != length or not stream.eof:
            raise CompressorError("not a payload")
        return data


@breaks("messages")
class SaysNothing(Good):
    def decode(self, channel: Channel, payload: bytes, length: int) -> bytes:
        try:
            return super().decode(channel, payload, length)
        except CompressorError:
            raise CompressorError from None


@breaks("connection-lost")
class BlamesItself(Good):
    @hookimpl
    def multifd_recv(self, channel: Channel, pages: memoryview) -> None:
        try:
            super().multifd_recv(channel, pages)
        except PeerError as error:
            raise CompressorError(f"failed: {error}") from error


@breaks("connection-lost")
class NoticesNoLoss(Good):
    @hookimpl
    def multifd_recv(self, channel: Channel, pages: memoryview) -> None:
        try:
            super().multifd_recv(channel, pages)
        except PeerError:
            pages[:] = bytes(len(pages))


@breaks("bomb")
class DecodesItAll(Good):
    default_level = 1

    def inflate(self, payload: bytes, length: int) -> bytes:
        stream = zlib.decompressobj()
        try:
            return self.checked(stream.decompress(payload[HEAD.size :]), stream, length)
        except zlib.error as error:
            raise CompressorError(f"a damaged payload: {error}") from error

    def decode(self, channel: Channel, payload: bytes, length: int) -> bytes:  # noqa: ARG002
        if len(payload) < HEAD.size:
            raise CompressorError("not a payload")
        return self.inflate(payload, length)


@breaks("claims")
class BelievesLengths(Good):
    def decode(self, channel: Channel, payload: bytes, length: int) -> bytes:
        if len(payload) > HEAD.size:
            claimed = HEAD.unpack_from(payload)[0]
            if claimed >> 24 == 0x3F and len(bytearray(claimed)) != length:
                raise CompressorError("another length")
        return super().decode(channel, payload, length)


# --- set-up and cleanup ---


@breaks("cleanup")
class CleansUpOnce(Good):
    def clean_up(self, channel: Channel) -> None:
        if channel.compress_data is not None:
            del channel.compress_data["packets"]


@breaks("cleanup")
class CleansUpWhatIsThere(Good):
    def clean_up(self, channel: Channel) -> None:
        channel.compress_data.clear()


class NeedsADescriptor(Good):
    def clean_up(self, channel: Channel) -> None:
        if channel.compress_data is not None:
            if "thread" in channel.compress_data:
                channel.compress_data.pop("end").set()
                channel.compress_data.pop("thread").join()
            if "descriptor" in channel.compress_data:
                os.close(channel.compress_data.pop("descriptor"))


@breaks("set-up-fails")
class LeavesAThread(NeedsADescriptor):
    def set_up(self, channel: Channel) -> None:
        end = threading.Event()
        thread = threading.Thread(target=end.wait, daemon=True)
        thread.start()
        descriptor = os.open("/dev/null", os.O_RDONLY)
        super().set_up(channel)
        channel.compress_data |= {"descriptor": descriptor, "end": end, "thread": thread}


@breaks("set-up-without-library")
class LeavesADescriptor(NeedsADescriptor):
    def set_up(self, channel: Channel) -> None:
        super().set_up(channel)
        descriptor = os.open("/dev/null", os.O_RDONLY)
        ctypes.CDLL("libz.so.1")
        channel.compress_data["descriptor"] = descriptor


@breaks("channels-apart")
class ElevenStates(Good):
    """The state of channel 11 is channel 0's."""

    states: Mapping[str, dict[int, bytes]] = {"send": {}, "recv": {}}

    def set_up(self, channel: Channel) -> None:
        super().set_up(channel)
        for states in self.states.values():
            states[channel.id % 11] = b""

    def encode(self, channel: Channel, data: bytes) -> bytes:
        last = self.states["send"].get(channel.id % 11, b"")
        self.states["send"][channel.id % 11] = data
        return super().encode(channel, xor(data, last))

    def decode(self, channel: Channel, payload: bytes, length: int) -> bytes:
        data = xor(super().decode(channel, payload, length), self.states["recv"].get(channel.id % 11, b""))
        self.states["recv"][channel.id % 11] = data
        return data


def xor(data: bytes, first: bytes) -> bytes:
    """The first page with the other's."""
    head = int.from_bytes(data[:PAGE].ljust(PAGE, b"\0")) ^ int.from_bytes(first[:PAGE].ljust(PAGE, b"\0"))
    return head.to_bytes(PAGE)[: len(data)] + data[PAGE:]


@breaks("threads")
class OneScratchForAllThreads(Good):
    scratch = b""

    def encode(self, channel: Channel, data: bytes) -> bytes:
        OneScratchForAllThreads.scratch = data
        time.sleep(0)
        return super().encode(channel, self.scratch)


# --- settings ---


@breaks("levels")
class CannotLevel7(Good):
    def set_up(self, channel: Channel) -> None:
        super().set_up(channel)
        if channel.level == 7:
            raise CompressorError("level 7 is not implemented")


@breaks("ladder")
class CannotClimb(Good):
    def encode(self, channel: Channel, data: bytes) -> bytes:
        level = channel.compress_data.setdefault("level", channel.level)
        if channel.live and channel.level > level:
            raise CompressorError(f"level {channel.level} after {level}")
        return super().encode(channel, data)


@breaks("options")
class ChecksNoOption(Good):
    def set_up(self, channel: Channel) -> None:
        channel.compress_data = {
            "packets": 0,
            "stream": zlib.compressobj(1, zlib.DEFLATED, int(channel.options["window"])),
        }


@breaks("counts")
class CountsWords(Good):
    def set_up(self, channel: Channel) -> None:
        super().set_up(channel)
        channel.counts["fast"] = "many"  # type: ignore[assignment]


@breaks("captures")
class Own(Good):
    method, flag = "zlib", 1


# --- others ---


class Unavailable(Good):
    @hookimpl
    def multifd_probe(self) -> Probe:
        return Probe(False, reason="there is no device", install="plug one in")


class Hangs(Good):
    def decode(self, channel: Channel, payload: bytes, length: int) -> bytes:
        time.sleep(1000)
        return super().decode(channel, payload, length)


def _all(cls: type[Good]) -> list[type[Good]]:
    return [cls, *(each for sub in cls.__subclasses__() for each in _all(sub))]


def __getattr__(name: str) -> Good:
    """What the entry points name."""
    for cls in _all(Good):
        if cls.__name__ == name.removeprefix("plugin_"):
            return cls()
    raise AttributeError(name)


def install(folder: Path) -> dict[str, str]:
    """All of them as one installed distribution; returns the environment that a child process needs."""
    info = folder / "toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    entries = [f"{cls().name} = broken:plugin_{cls.__name__}" for cls in _all(Good)]
    (info / "entry_points.txt").write_text("\n".join(["[multifd.compressors]", *entries, ""]))
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parent)])}
