"""A thousand migrations through one relay, a stranger beside every tenth: all arrive, and it does not grow."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

import images
import multifd
import peers
import prove
import streams
from commands import MULTIFD
from multifd.errors import MultifdError
from peers import dial, eventually

COUNT = len(prove.sample(range(1000), 100))
METHODS = ("none", "zlib", "zstd", "qatzip-sw", "qpl-sw", "uadk-sw", "zlib,level=6", "adaptive")
PAGES = 256
#: After so many it is as large as it will be; then it is looked at after each so many.
WARM = 50
MORE_KIB = 4 << 10
#: Seconds after which a migration has failed that a stranger holds up.
PATIENCE = 5.0

#: Who is no source: what it says; then it is silent, or where it `goes` it hangs up.
STRANGERS: dict[str, tuple[bytes, bool]] = {
    "connects and goes": (b"", True),
    "one byte": (b"Q", True),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n", False),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(32)), False),
    "silence": (b"", False),
    "another magic": (b"\xde\xad\xbe\xef" * 16, False),
    "half a channel": (streams.init(0)[:20], False),
    "channel 255": (streams.init(255), False),
    "QEVM and silence": (b"QEVM", False),
    "QEVM and goes": (streams.FILE_HEADER, True),
}

pytestmark = [pytest.mark.timeout(900)]


@contextmanager
def beside(uri: str, stranger: str | None) -> Iterator[None]:
    """It has connected before, and hangs up afterwards if it has not yet."""
    if stranger is None:
        yield
        return
    says, goes = STRANGERS[stranger]
    with closing(dial(uri)) as sock:
        sock.sendall(says)
        if goes:
            sock.close()
        time.sleep(0.02)  # it is the first that the relay meets
        yield


def migrate(work: Path, number: int, content: bytes, stranger: str | None) -> None:
    """One that arrives as it was sent, though somebody else calls before.  Raises MultifdError."""
    times: dict[str, Any] = {"timeout": PATIENCE, "first_timeout": 2 * PATIENCE, "idle_timeout": 2 * PATIENCE}
    snapshot = work / f"snap{number}"
    there = peers.Receiving(snapshot, f"unix:{work}/there", digests=False, **times)
    here, method = f"unix:{work}/here", METHODS[number % len(METHODS)]
    try:
        with beside(here, stranger):
            multifd.send(work / "image.raw", here, method, timeout=PATIENCE)
    finally:
        there.join()
    assert (snapshot / "0-pc.ram.raw").read_bytes() == content
    shutil.rmtree(snapshot)


class Watched:
    """The relay's process."""

    def __init__(self, work: Path) -> None:
        self.said, self.complained = work / "said", work / "complained"
        command = ["relay", "--listen", f"unix:{work}/here", "--connect", f"unix:{work}/there", "--to", "zlib"]
        with open(self.said, "wb") as said, open(self.complained, "wb") as complained:
            self.process = subprocess.Popen([*MULTIFD, *command, "--json"], stdout=said, stderr=complained)
        assert eventually((work / "here").exists)

    def told(self) -> int:
        """Of how many migrations it has said how they ended well."""
        return self.said.read_bytes().count(b"\n")

    def outcomes(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.said.read_text().splitlines()]

    def holds(self) -> tuple[int, int]:
        """Its descriptors and threads."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir())), self._status("Threads")

    def idles(self) -> tuple[int, int]:
        """What it holds when nobody is there: soon after a migration."""
        found = []
        for _ in range(20):
            time.sleep(0.05)
            found.append(self.holds())
        return min(found)

    def comes_to(self, idle: tuple[int, int]) -> bool:
        """Whether it holds that again, once the last migration's threads have ended."""
        return eventually(lambda: self.holds() == idle, 10)

    def kib(self) -> int:
        """Of memory that is its own."""
        return self._status("RssAnon")

    def _status(self, name: str) -> int:
        (found,) = re.findall(rf"^{name}:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text(), re.MULTILINE)
        return int(found)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def test_many(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mix = random.Random(prove.SEED)
    kinds = itertools.cycle(mix.sample(list(STRANGERS), len(STRANGERS)))
    content = images.write_pages(work / "image.raw", PAGES, 4096, seed=prove.SEED)
    failed: dict[int, str] = {}
    met: Counter[str] = Counter()
    sizes: list[int] = []
    idle = (0, 0)
    began = time.monotonic()
    with closing(Watched(work)) as relay:
        idle = relay.holds()
        for number in range(COUNT):
            stranger = next(kinds) if number % 10 == 5 else None
            met[stranger or "nobody"] += 1
            try:
                migrate(work, number, content, stranger)
            except MultifdError as error:
                failed[number] = f"beside {stranger or 'nobody'}: {error}"
            if number + 1 == WARM:
                idle = relay.idles()
            if (number + 1) % (WARM // 5) == 0 and number + 1 >= WARM:
                assert relay.comes_to(idle), f"{number}: {relay.holds()}, idle {idle}"
                sizes.append(relay.kib())
        assert failed or eventually(lambda: relay.told() == COUNT, 10), f"it tells of {relay.told()} migrations"
        relay.process.send_signal(signal.SIGTERM)
        assert relay.process.wait(peers.TIMEOUT) == 0
    with capsys.disabled():
        print(f"\n{COUNT} migrations through one relay in {time.monotonic() - began:.0f} s, {dict(met)}")
        print(f"idle: {idle[0]} descriptors, {idle[1]} threads; ", end="")
        print(f"KiB after {WARM}, at most, at the end: {sizes[0]}, {max(sizes)}, {sizes[-1]}")
    assert not failed, f"{len(failed)} of {COUNT} failed: {failed}"
    for outcome in relay.outcomes():
        assert outcome["confirmed"]
        assert outcome["normal_pages"] + outcome["zero_pages"] == PAGES  # type: ignore[operator]
    assert max(sizes) - sizes[0] <= MORE_KIB
    assert "Traceback" not in relay.complained.read_text()
