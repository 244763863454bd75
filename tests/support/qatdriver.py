"""What a test has done in a process of its own: a vendor's library stays loaded until a process ends.

`in_child` runs one of the functions, `python qatdriver.py NAME KEY=VALUE...`, which prints its
result as a line of JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import images
from multifd.codec.selection import load
from multifd.errors import CompressorError, MultifdError
from multifd.testing.harness import Footprint
from multifd_qatzip import library, members, software
from pairs import PAGE, Pair
from told import keeping


def packets(count: int, seed: int, pages: int = 128) -> Iterator[bytes]:
    memory = images.memory()
    mix = random.Random(seed)
    for _ in range(count):
        length = mix.randrange(1, pages + 1) * PAGE
        at = mix.randrange((len(memory) - length) // PAGE + 1) * PAGE
        yield memory[at : at + length]


def halves(data: bytes) -> list[bytes]:
    """One packet's pages in two runs."""
    cut = len(data) // PAGE // 2 * PAGE
    return [part for part in (data[:cut], data[cut:]) if part]


class Raw:
    """libqatzip as QEMU uses it, its own software path allowed: for at most 1000 calls a process."""

    def __init__(self, level: int = 1) -> None:
        found = library.load()
        self.lib, self.ffi = found.lib, found.ffi
        self.session = self.ffi.new("QzSession_T *")
        self.output = self.ffi.new("unsigned char[]", 2 << 20)
        params = self.ffi.new("QzSessionParamsDeflate_T *")
        self.lib.qzInit(self.session, 1)
        self.lib.qzGetDefaultsDeflate(params)
        params.common_params.comp_lvl = level
        assert self.lib.qzSetupSessionDeflate(self.session, params) == 0

    def _call(self, function: str, source: bytes, room: int, *last: int) -> bytes:
        given, made = self.ffi.new("unsigned int *", len(source)), self.ffi.new("unsigned int *", room)
        data = self.ffi.from_buffer("unsigned char[]", source)
        code = getattr(self.lib, function)(self.session, data, given, self.output, made, *last)
        assert (code, given[0]) == (0, len(source))
        return bytes(self.ffi.buffer(self.output, made[0]))

    def compress(self, data: bytes) -> bytes:
        return self._call("qzCompress", data, 2 * len(data) + 4096, 1)

    def decompress(self, payload: bytes, length: int) -> bytes:
        return self._call("qzDecompress", payload, length)

    def close(self) -> None:
        self.lib.qzTeardownSession(self.session)


def traffic(
    compressor: str = "qatzip",
    channels: int = 1,
    count: int = 100,
    later: str = "",
    fork: bool = False,
    **settings: str,
) -> dict[str, Any]:
    """Packets there and back on all channels at once; `later` changes the stand-in after set-up."""
    total: Counter[str] = Counter()
    failures: list[str] = []
    stop = threading.Event()

    def run(number: int) -> None:
        pair = Pair(compressor, settings, number=number)
        ready.wait(20)
        try:
            for data in packets(count, number):
                assert pair.decode(pair.encode(halves(data)), len(data)) == data, "another page came back"
        except (MultifdError, AssertionError) as error:
            failures.append(str(error))
        pair.close()
        total.update(pair.counts)

    def now_fork() -> None:
        while not stop.is_set():
            pid = os.fork()
            if not pid:
                os._exit(0)
            os.waitpid(pid, 0)
            subprocess.run(["true"], check=True)

    def change() -> None:
        if later:
            name, _, value = later.partition(":")
            os.environ[name] = value

    ready = threading.Barrier(channels, action=change)
    with keeping() as kept:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(channels)]
        forking = threading.Thread(target=now_fork)
        for thread in threads:
            thread.start()
        if fork:
            forking.start()
        for thread in threads:
            thread.join()
        stop.set()
        if fork:
            forking.join()
    return {"counts": total, "failures": failures, "told": list(dict.fromkeys(kept.messages))}


def against_itself() -> dict[str, Any]:
    """Both directions between libqatzip as QEMU calls it and both compressors, all levels."""
    done = 0
    noise = random.Random(7).randbytes(128 * PAGE)
    for level in range(1, 10):
        raw = Raw(level)
        pairs = [Pair("qatzip", {"level": str(level)}), Pair("qatzip-sw", {"level": str(level)})]
        for data in (
            *packets(6, level),
            noise,
            noise[:PAGE],
            images.memory()[: 128 * PAGE],
            images.memory()[:PAGE],
            images.memory()[: 17 * PAGE],
        ):
            theirs = raw.compress(data)
            for pair in pairs:
                assert raw.decompress(pair.encode(halves(data)), len(data)) == data
                assert pair.decode(theirs, len(data)) == data
                done += 1
        for pair in pairs:
            pair.close()
        raw.close()
    return {"done": done, "keys": free_keys()}


def corruptions(name: str = "qatzip", count: int = 3000) -> dict[str, Any]:
    """Damaged payloads: refused with one line, or right; then a good one is right."""
    mix = random.Random(3)
    pair = Pair(name)
    other = Pair("qatzip-sw")
    goods = []
    for data in packets(12, 5, pages=40):
        one_member = software.compress_member(memoryview(data), 6)
        goods += [(pair.encode(halves(data)), data), (other.encode(halves(data)), data), (b"".join(one_member), data)]
    refused, messages = 0, set()
    for number in range(count):
        payload, data = goods[number % len(goods)]
        bad = damage(mix, payload)
        try:
            assert pair.decode(bad, len(data)) == data, "wrong data taken"
        except CompressorError as error:
            refused += 1
            assert "\n" not in str(error)
            messages.add(re.sub(r"\d+|[0-9a-f]{8,}", "#", str(error)))
        if number % 10 == 0:
            payload, data = goods[mix.randrange(len(goods))]
            assert pair.decode(payload, len(data)) == data, "a good packet after a bad one"
    counts = pair.counts
    pair.close()
    other.close()
    return {"refused": refused, "messages": sorted(messages), "counts": counts}


def damage(mix: random.Random, payload: bytes) -> bytes:
    bad = bytearray(payload)
    at = mix.randrange(len(bad))
    match mix.randrange(7):
        case 0:
            bad[at] ^= 1 << mix.randrange(8)
        case 1:
            del bad[at:]
        case 2:
            del bad[at : at + mix.randrange(1, 40)]
        case 3:
            bad[at:at] = mix.randbytes(mix.randrange(1, 40))
        case 4:
            bad += mix.randbytes(mix.randrange(1, 40))
        case 5:
            bad[at : at + 20] = mix.randbytes(20)
        case _:  # the lengths and the trailer of the first member
            where = mix.choice([16, 17, 18, 20, 21, 22, len(bad) - 8, len(bad) - 4])
            bad[where] ^= mix.randrange(1, 256)
    return bytes(bad)


def free_keys() -> int:
    """How many pthread keys the process has left."""
    libc = ctypes.CDLL(None)
    keys = []
    key = ctypes.c_uint()
    while not libc.pthread_key_create(ctypes.byref(key), None):
        keys.append(key.value)
    for one in keys:
        libc.pthread_key_delete(one)
    return len(keys)


def footprint() -> dict[str, int]:
    holds = Footprint.now()
    return {
        "keys": free_keys(),
        "KiB": holds.memory >> 10,
        "descriptors": len(holds.descriptors),
        "threads": holds.threads,
    }


def growth(count: int = 20000, pages: int = 16) -> dict[str, Any]:
    """Many packets, and sessions set up anew in between; footprints after 2000 and after all."""
    sizes = [PAGE, 2 * PAGE, pages * PAGE]
    memory = images.memory()
    first = None
    for number in range(count // 100):
        pair = Pair("qatzip")
        for step in range(50):
            length = sizes[step % 3]
            data = memory[step * 16 * PAGE : step * 16 * PAGE + length]
            assert pair.decode(pair.encode(halves(data)), length) == data
        pair.close()
        if number == 19:
            first = footprint()
    return {"first": first, "last": footprint(), "counts": pair.counts}


class Proxy:
    """libqatzip's functions, one of them replaced."""

    def __init__(self, real: Any, **replaced: Callable[..., int]) -> None:
        self._real = real
        self._replaced = replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced.get(name) or getattr(self._real, name)


def levels() -> dict[str, Any]:
    """Direction, level and software permission of each session that is set up."""
    found = library.load()
    real, seen = found.lib, []

    def setup(session: Any, params: Any) -> int:
        common = params.common_params
        seen.append([common.direction, common.comp_lvl, common.sw_backup])
        return int(real.qzSetupSessionDeflate(session, params))

    found.lib = Proxy(real, qzSetupSessionDeflate=setup)
    Pair("qatzip", {"level": "7"}).close()
    return {"seen": seen}


def set_up_that_fails() -> dict[str, Any]:
    """Set-up fails half-way, with and without leave to go on; then teardown fails."""
    found = library.load()
    real, torn = found.lib, []

    def teardown(session: Any) -> int:
        torn.append(1)
        real.qzTeardownSession(session)
        return -2

    Pair("qatzip").close()  # the trial is behind us
    found.lib = Proxy(real, qzSetupSessionDeflate=lambda *_: -104, qzTeardownSession=teardown)
    compressor = load("qatzip")
    result: dict[str, Any] = {"errors": []}
    for hook in (compressor.hook.multifd_send_setup, compressor.hook.multifd_recv_setup):
        channel = compressor.channel(0, PAGE, compressor.settings({"sw-fallback": "off"}, sending=True))
        try:
            hook(channel=channel)
        except CompressorError as error:
            result["errors"].append(str(error))
        assert channel.compress_data is None
        for direction in ("send", "recv") * 2:
            compressor.cleanup(direction, channel)
    result["torn after failed set-ups"] = len(torn)
    found.lib = Proxy(real, qzTeardownSession=teardown)
    pair = Pair("qatzip")
    pair.close()
    assert pair.sender.compress_data is pair.receiver.compress_data is None
    result["torn"] = len(torn)
    return result


def lies(what: int) -> dict[str, Any]:
    """libqatzip says OK, and took or made another number of bytes than it should have."""
    found = library.load()
    real, sessions = found.lib, []

    def lying(function: str) -> Callable[..., int]:
        def call(session: Any, source: Any, given: Any, output: Any, made: Any, *last: int) -> int:
            sessions.append(session)
            code = int(getattr(real, function)(session, source, given, output, made, *last))
            if len(sessions) in (1, 3):
                (given, made)[what][0] -= 1
                if function == "qzDecompress":
                    output[0] = b"?"[0]
            return code

        return call

    found.lib = Proxy(real, qzCompress=lying("qzCompress"), qzDecompress=lying("qzDecompress"))
    pair = Pair("qatzip")
    data = images.memory()[: 16 * PAGE]
    for _ in range(2):
        payload = pair.encode(halves(data))
    for _ in range(2):
        assert pair.decode(payload, len(data)) == data
    assert len({int(found.ffi.cast("uintptr_t", session)) for session in sessions}) == 4, "set up anew after each lie"
    pair.close()
    return {"counts": pair.counts}


def reopens() -> dict[str, Any]:
    """A job fails, and so does the first attempt to set the session up anew; a closed one stays closed."""
    found = library.load()
    real = found.lib
    pair = Pair("qatzip")
    fail = {"qzCompress": 1, "qzInit": 1}

    def failing(function: str, code: int) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            if fail[function]:
                fail[function] -= 1
                return code
            return int(getattr(real, function)(*arguments))

        return call

    found.lib = Proxy(real, qzCompress=failing("qzCompress", -2), qzInit=failing("qzInit", -101))
    data = images.memory()[: 16 * PAGE]
    for _ in range(5):
        assert pair.decode(pair.encode(halves(data)), len(data)) == data
    session = pair.sender.compress_data.session
    pair.close()
    said = ""
    try:
        session.compress(data, memoryview(bytearray(members.MEMBER_MOST)))
    except library.DeviceError as error:
        said = str(error)
    return {"counts": pair.sender.counts, "said": said}


def forks_that_ask(count: int = 60) -> dict[str, Any]:
    """Children forked while threads are inside libqatzip, or set it up: each is answered, none hangs."""
    pair = Pair("qatzip")
    data = images.memory()[: 2 * PAGE]
    stop = threading.Event()

    def open_and_close(number: int) -> None:
        while not stop.is_set():
            other = Pair("qatzip", {"sw-fallback": "off"}, number=number)
            other.encode(halves(data))
            other.close()

    threads = [threading.Thread(target=open_and_close, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    statuses: Counter[str] = Counter()
    for _ in range(count):
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)
            for action in (lambda: pair.encode(halves(data)), lambda: Pair("qatzip")):
                try:
                    action()
                except CompressorError as error:
                    assert "does not follow a fork" in str(error)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        statuses[str(status)] += 1
    stop.set()
    for thread in threads:
        thread.join()
    return {"statuses": statuses}


def in_a_child() -> dict[str, Any]:
    """A process that was forked after the device was started, and the parent afterwards."""
    pair = Pair("qatzip")
    data = images.memory()[: 4 * PAGE]
    payload = pair.encode(halves(data))
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        said = []
        for action in (
            lambda: pair.encode(halves(data)),
            lambda: pair.decode(payload, len(data)),
            lambda: Pair("qatzip"),
        ):
            try:
                action()
            except MultifdError as error:
                said.append(str(error))
        torn: list[Any] = []
        found = library.load()

        def tear(session: Any) -> int:
            torn.append(session)
            return 0

        found.lib = Proxy(found.lib, qzTeardownSession=tear)
        pair.close()
        said.append(f"{len(torn)} sessions of the parent torn down")
        os.write(write_end, json.dumps(said).encode())
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    said = json.loads(os.read(read_end, 10000))
    assert pair.decode(pair.encode(halves(data)), len(data)) == data
    pair.close()
    return {"status": status, "said": said}


def sizes() -> dict[str, Any]:
    """What the device does not get: the ways of packets of small, large and ordinary members."""
    pair = Pair("qatzip")
    data = images.memory()[: 40 * PAGE]
    small = b"".join(
        b"".join(software.compress_member(memoryview(data)[at : at + 512], 1)) for at in range(0, PAGE, 512)
    )
    large = b"".join(software.compress_member(memoryview(data), 1))
    assert pair.decode(small, PAGE) == data[:PAGE]
    assert pair.decode(large, len(data)) == data
    result: dict[str, Any] = {"software": dict(pair.receiver.counts)}
    assert pair.decode(b"".join(software.compress(data, 1)), len(data)) == data
    result["all"] = dict(pair.receiver.counts)
    made = members.parse(memoryview(pair.encode(halves(data))), len(data))
    result["made"] = [member.size for member in made]
    try:
        pair.encode(halves(images.memory()[: 129 * PAGE]))
    except CompressorError as error:
        result["error"] = str(error)
    pair.close()
    return result


def loads_nothing() -> dict[str, Any]:
    """Import all of the plugin; which libraries of QAT came with it?"""
    from multifd_qatzip import devices, hardware, trial

    assert {devices, hardware, trial} <= set(sys.modules.values())
    return {"maps": re.findall(r"\S*(?:qat|usdm)\S*\.so\S*", Path("/proc/self/maps").read_text())}


def in_child(
    name: str,
    path: Path | None = None,
    *,
    env: Mapping[str, str] = {},
    python: str | Path = sys.executable,
    **settings: object,
) -> dict[str, Any]:
    """Run a function of this module in a process of its own, with this libqatzip."""
    given = {key.replace("_", "-") if key == "sw_fallback" else key: value for key, value in settings.items()}
    result = subprocess.run(
        [python, __file__, name, *(f"{key}={value}" for key, value in given.items())],
        env=os.environ | ({library.SETTING: str(path)} if path else {}) | dict(env),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def main() -> None:
    name, *pairs = sys.argv[1:]
    arguments = {
        key: int(value) if value.isdigit() else value for key, _, value in (pair.partition("=") for pair in pairs)
    }
    started = time.monotonic()
    result = globals()[name](**arguments)
    print(json.dumps({**result, "seconds": round(time.monotonic() - started, 2)}))


if __name__ == "__main__":
    main()
