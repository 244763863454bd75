"""A migration that is cancelled in its middle, again and again: whoever stands at the other end says the same."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

import peers
from multifd.errors import PeerError
from qemus import FAILING_CHANNELS, RELEASES, Qemu, Start, content
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
    source.prepare(channels=channels, return_path=True, max_bandwidth=2_000_000)
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


def ends(qemu: Qemu, seconds: float) -> bool:
    """Whether its process does, within that time."""
    return peers.eventually(lambda: qemu.process.poll() is not None, seconds)


def called(relaying: Relaying, served: int) -> bool:
    """Whether the relay has told of more than those migrations, so that it had called its destination."""
    return len(relaying.outcomes) > served


@pytest.mark.timeout(120)
@pytest.mark.parametrize("release", RELEASES)
def test_a_cancel_in_the_set_up_reaches_the_destination(start: Start, work: Path, release: str) -> None:
    """A QEMU that waits for channels which never come does so for ever; it ends here, as without a relay.

    Unless the source had not connected two of them: then the relay has not called it.
    """
    source = start(release, "source")
    source.prepare(channels=4)
    with closing(Relaying(f"unix:{work}/there", migrations=100)) as relaying:
        for number in range(12):
            target = start(release, f"target{number}", incoming=True)
            target.prepare(channels=4)
            target.listen(f"unix:{work}/there")
            served = len(relaying.outcomes)
            source.monitor.command("migrate", uri=relaying.uri)
            time.sleep(number * 0.0005)
            source.monitor.command("migrate_cancel")
            source.wait("cancelled", "completed")
            exited = ends(target, 5)
            if not exited and target.status() == "completed":
                break  # too late
            if exited:
                assert peers.eventually(partial(called, relaying, served), 5)
            else:
                assert not called(relaying, served), (number, relaying.outcomes, target.log.read_text())
            target.close()
