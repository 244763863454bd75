"""A migration that is cancelled in its middle, again and again: whoever stands at the other end says the same."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

import peers
from multifd.errors import PeerError
from qemus import FAILING_CHANNELS, RELEASES, Start, content
from relaying import Relaying, closing

CANCELS = 15
EARLY = "the source ended early: cancelled, or gone"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("relayed", [False, True])
def test_cancels_read_the_same(start: Start, work: Path, release: str, relayed: bool) -> None:
    """60 in all; and QEMU itself calls each cancelled, not failed: nobody took its connections from it before."""
    mix = random.Random(release)
    source = start(release, "source")
    source.fill(content())
    channels = 2 if release == "7.2" else FAILING_CHANNELS
    source.prepare(channels=channels, return_path=True, max_bandwidth=8_000_000)
    said = []
    for number in range(CANCELS):
        with ExitStack() as stack:
            there = peers.Receiving(work / f"snap{number}", f"unix:{work}/there", channels=channels)
            uri = there.uri
            if relayed:
                relaying = stack.enter_context(closing(Relaying(there.uri, to="zlib", listen=f"unix:{work}/here")))
                uri = relaying.uri
            source.monitor.command("migrate", uri=uri)
            source.wait("active", "device")
            time.sleep(mix.uniform(0.05, 0.6))
            source.monitor.command("migrate_cancel")
            source.wait("cancelled")
            if relayed:
                said.append(relaying.error())
            with pytest.raises(PeerError) as caught:
                there.join()
            said.append(str(caught.value))
        assert not (work / f"snap{number}").exists()
    assert set(said) == {EARLY}
