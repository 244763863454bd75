"""`--rate`: what `send` and `relay` write in a second, over real connections."""

from __future__ import annotations

import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import images
import multifd
import peers
from commands import fails
from multifd.crew import Crew
from multifd.errors import Cancelled, MultifdError
from relaying import Relaying, closing

MIB = 1 << 20


def image(work: Path, mib: int) -> bytes:
    """Pages that do not shrink."""
    content = random.Random(1).randbytes(mib * MIB)
    (work / "image.raw").write_bytes(content)
    return content


def takes(rate: float, wire_bytes: int, seconds: float) -> None:
    """So long as the rate allows; longer where the machine is busy."""
    assert wire_bytes / rate * 0.95 - 0.3 <= seconds <= wire_bytes / rate * 1.5 + 3


@pytest.mark.parametrize("channels", [1, 5])
def test_send(work: Path, either: Path | None, channels: int) -> None:
    content = image(work, 12)
    there = peers.Receiving(work / "snap", channels=channels, tls_creds=either)
    began = time.monotonic()
    sent = multifd.send(work / "image.raw", there.uri, channels=channels, rate=6 * MIB, tls_creds=either)
    takes(6 * MIB, sent.wire_bytes, time.monotonic() - began)
    there.join()
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content


@pytest.mark.parametrize("to", [None, "zlib"])
def test_relay(work: Path, either: Path | None, to: str | None) -> None:
    """Its payloads pass within the kernel, or encrypted, or encoded anew; and a second migration is as slow."""
    content = image(work, 12)
    for number in range(2):
        there = peers.Receiving(work / f"snap{number}", tls_creds=either)
        name = "localhost" if either else None
        options: dict[str, Any] = {"to": to, "rate": 6 * MIB, "connect_tls_creds": either, "connect_tls_hostname": name}
        with closing(Relaying(there.uri, **options)) as relaying:
            began = time.monotonic()
            multifd.send(work / "image.raw", relaying.uri)
            takes(6 * MIB, relaying.result().bytes_out, time.monotonic() - began)
            there.join()
        assert (work / f"snap{number}" / "0-pc.ram.raw").read_bytes() == content


@pytest.mark.parametrize("way", ["send", "relay"])
def test_a_packet_that_takes_longer_than_the_timeout(work: Path, way: str) -> None:
    """Some 5 s for a packet of two that go at once, and nobody hears nothing for so long."""
    image(work, 1)
    there = peers.Receiving(work / "snap", timeout=2, idle_timeout=2)
    began = time.monotonic()
    if way == "send":
        multifd.send(work / "image.raw", there.uri, rate=200 << 10, timeout=2)
    else:
        with closing(Relaying(there.uri, rate=200 << 10, timeout=2)) as relaying:
            multifd.send(work / "image.raw", relaying.uri)
            assert relaying.result().confirmed
    assert time.monotonic() - began > 4
    there.join()


@pytest.mark.parametrize("way", ["send", "relay"])
def test_a_cancel_does_not_wait_for_the_rate(work: Path, way: str) -> None:
    image(work, 4)
    there = peers.Receiving(work / "snap")
    crew = Crew()
    with ThreadPoolExecutor() as beside:
        if way == "send":
            sending = beside.submit(lambda: multifd.send(work / "image.raw", there.uri, rate=64 << 10, crew=crew))
        else:
            relaying = Relaying(there.uri, rate=64 << 10, crew=crew)
            sending = beside.submit(lambda: multifd.send(work / "image.raw", relaying.uri))
        time.sleep(1.5)
        began = time.monotonic()
        crew.cancel()
        error = sending.exception(peers.TIMEOUT)
        took = time.monotonic() - began
    assert isinstance(error, Cancelled) is (way == "send")
    assert took < 5, "the packets under way would take 16 s"
    if way == "relay":
        assert relaying.join() == []
    with pytest.raises(MultifdError):
        there.join()


def test_adaptive_takes_it_for_a_slow_link(work: Path) -> None:
    """It compresses harder and harder; as fast as it goes it stores, or takes the lightest level."""
    (work / "image.raw").write_bytes(images.memory() * 4)
    there = peers.Receiving(work / "snap")
    sent = multifd.send(work / "image.raw", there.uri, "zlib,level=adaptive", rate=3 * MIB)
    there.join()
    hard = [name for name in sent.statistics if re.fullmatch("zlib level [2-9]", name)]
    assert hard, sent.statistics


@pytest.mark.parametrize("rate", ["0", "-1M", "fast", "1.5M", ""])
def test_what_is_no_rate(work: Path, rate: str) -> None:
    (work / "image.raw").write_bytes(bytes(4096))
    fails(2, "rate", "send", work / "image.raw", f"unix:{work}/nobody", f"--rate={rate}")
    fails(2, "rate", "relay", "--listen", f"unix:{work}/here", "--connect", f"unix:{work}/nobody", f"--rate={rate}")
