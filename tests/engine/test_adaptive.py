"""Levels that follow the link, in real migrations."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

import images
import multifd
import peers
from multifd import open_snapshot


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


@pytest.mark.parametrize(
    "how", ["zlib,level=adaptive", "zstd,level=auto", "qatzip-sw,level=adaptive", "adaptive", "auto"]
)
def test_memory_arrives_whole_over_a_slow_link(work: Path, how: str) -> None:
    # More than the sockets take before the link is known.
    content = images.memory() * 4 + random.Random(5).randbytes(2 << 20)
    (work / "image.raw").write_bytes(content)
    there = peers.Receiving(work / "snap", channels=2)
    link = peers.SlowLink(there.uri, 8 << 20)
    try:
        sent = multifd.send(open_snapshot(work / "image.raw"), link.uri, how)
        there.join()
    finally:
        link.close()
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content
    assert sent.statistics, "it says what was chosen"
    assert sent.wire_bytes < len(content) * 0.8
