"""TLS between real QEMUs and our own ends."""

from __future__ import annotations

from pathlib import Path

import pytest

import multifd
import peers
from multifd import open_snapshot
from qemus import FAILING_CHANNELS, RELEASES, Start, common, content
from relaying import Relaying, closing
from told import warns

pytestmark = pytest.mark.may_warn(".*ignored")


def secured(pki: Path, endpoint: str) -> list[str]:
    """QEMU's options for its end."""
    return ["-object", f"tls-creds-x509,id=tls0,dir={pki},endpoint={endpoint},verify-peer=on"]


@pytest.mark.parametrize(
    ("source_release", "target_release", "legs"),
    [
        ("7.2", "7.2", (True, True)),
        ("10.0", "10.0", (True, True)),
        ("7.2", "10.0", (True, False)),
        ("10.0", "7.2", (False, True)),
        ("11.1", "11.1", (True, True)),
        ("11.1", "7.2", (True, False)),
        ("10.0", "11.1", (False, True)),
    ],
)
@pytest.mark.parametrize("return_path", [True, False])
def test_qemus_through_a_relay(
    start: Start,
    work: Path,
    creds: Path,
    source_release: str,
    target_release: str,
    legs: tuple[bool, bool],
    return_path: bool,
) -> None:
    machine = common(source_release, target_release)
    source = start(source_release, "source", machine=machine, more=secured(creds, "client"))
    target = start(target_release, "target", machine=machine, incoming=True, more=secured(creds, "server"))
    source.fill(content())
    listening, connecting = ({"tls_creds": "tls0"} if leg else {} for leg in legs)
    source.prepare(channels=3, return_path=return_path, **listening)
    target.prepare(channels=3, method="zlib", **connecting)
    relaying = Relaying(
        target.listen("tcp:127.0.0.1:0"),
        to="zlib",
        listen_tls_creds=creds if listening else None,
        connect_tls_creds=creds if connecting else None,
    )
    with closing(relaying):
        source.monitor.command("migrate", uri=relaying.uri)
        source.wait("completed")
        target.wait("completed")
        assert relaying.result().confirmed == return_path
    assert target.ram.read_bytes() == content()


@pytest.mark.parametrize("release", RELEASES)
def test_receive_and_send(start: Start, work: Path, creds: Path, release: str) -> None:
    source = start(release, "source", more=secured(creds, "client"))
    source.fill(content())
    source.prepare(channels=4, return_path=True, tls_creds="tls0")
    job = peers.Receiving(work / "snap", channels=4, tls_creds=creds)
    source.monitor.command("migrate", uri=job.uri)
    job.join()
    target = start(release, "target", incoming=True, more=secured(creds, "server"))
    target.prepare(channels=3, method="zstd", tls_creds="tls0")
    target.monitor.command("migrate-incoming", uri=f"unix:{work}/incoming")
    where = open_snapshot(work / "snap")
    multifd.send(where, f"unix:{work}/incoming", "zstd", channels=3, tls_creds=creds, tls_hostname="localhost")
    target.wait("completed")
    assert target.ram.read_bytes() == content()


@pytest.mark.parametrize("release", RELEASES)
def test_a_qemu_with_tls_and_a_relay_without(start: Start, work: Path, creds: Path, release: str) -> None:
    source = start(release, "source", more=secured(creds, "client"))
    source.prepare(channels=FAILING_CHANNELS, tls_creds="tls0")
    warned = warns("it speaks TLS, this side does not: ignored")
    with closing(Relaying(f"unix:{work}/nobody")) as relaying, warned:
        source.monitor.command("migrate", uri=relaying.uri)
        source.wait("failed")


@pytest.mark.parametrize("release", RELEASES)
def test_a_qemu_without_tls_and_a_relay_with(start: Start, work: Path, creds: Path, release: str) -> None:
    source = start(release, "source")
    source.prepare(channels=FAILING_CHANNELS)
    warned = warns("the other side does not speak TLS: turn it on over there")
    with closing(Relaying(f"unix:{work}/nobody", listen_tls_creds=creds)) as relaying, warned:
        source.monitor.command("migrate", uri=relaying.uri)
        source.wait("failed")
