"""TLS on our own ends: what is encrypted arrives, and who is not known does not."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

import peers
import qatdriver
from certificates import Authority
from multifd import migrate
from multifd.errors import CallerError, MultifdError, PeerError, UsageError
from multifd.migrate import warn_exposed
from multifd.snapshot import open_source
from multifd.tls import server
from multifd.transport import Silence, SocketConnection
from qemus import RELEASES
from test_qemu import FAILING_CHANNELS, Start, content, start
from test_relay import Relaying, closing, image

__all__ = ["start"]

pytestmark = pytest.mark.filterwarnings("ignore:.*ignored")


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def creds(authority: Authority, work: Path) -> Path:
    return authority.directory(work / "pki")


@pytest.mark.parametrize("method", ["none", "zlib"])
def test_send_to_receive(work: Path, creds: Path, method: str) -> None:
    content = image(work)
    there = peers.Receiving(work / "snap", channels=4, tls_creds=creds)
    sent = migrate.send(open_source(work / "image.raw"), there.uri, method, channels=4, tls_creds=creds)
    arrived = there.join()
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content
    assert sent.normal_pages == arrived.normal_pages
    if method == "none":
        assert arrived.wire_bytes > arrived.normal_pages * 4096, "records around the pages"


@pytest.mark.parametrize("legs", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("to", [None, "zstd"])
def test_relay_on_either_leg(work: Path, creds: Path, legs: tuple[bool, bool], to: str | None) -> None:
    """One host's QEMU has no TLS, or neither; over a Unix socket the name is given."""
    content = image(work)
    listening, connecting = (creds if leg else None for leg in legs)
    there = peers.Receiving(work / "snap", f"unix:{work}/there", tls_creds=connecting)
    name = "localhost" if connecting else None
    relaying = Relaying(
        there.uri, to=to, listen_tls_creds=listening, connect_tls_creds=connecting, connect_tls_hostname=name
    )
    with closing(relaying):
        migrate.send(open_source(work / "image.raw"), relaying.uri, tls_creds=listening)
        there.join()
        assert relaying.result().confirmed
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content


def refused(work: Path, here: Path | None, there: Path | None, **options: Any) -> tuple[str, str]:
    """What the source and the destination say of a migration that must not come through."""
    (work / "image.raw").write_bytes(qatdriver.image()[: 1 << 20])
    job = peers.Receiving(work / "snap", tls_creds=there, timeout=3)
    with pytest.raises(MultifdError) as told:
        migrate.send(open_source(work / "image.raw"), job.uri, tls_creds=here, timeout=3, **options)
    with pytest.raises(PeerError) as answer:
        job.join()
    assert not (work / "snap").exists()
    return str(told.value), str(answer.value)


def test_a_stranger_on_either_side(work: Path, creds: Path) -> None:
    source, destination = refused(work, Authority().directory(work / "other"), creds)
    assert "its certificate is refused here: " in source
    assert "the other side refuses: tlsv1 alert unknown ca: does it know the authority" in destination


def test_a_source_that_nobody_vouches_for(work: Path, creds: Path) -> None:
    """It trusts the destination's authority, its own certificate is another's."""
    other = Authority().directory(work / "other")
    (other / "ca-cert.pem").write_bytes((creds / "ca-cert.pem").read_bytes())
    source, destination = refused(work, other, creds)
    assert "its certificate is refused here: " in destination
    assert "this side's certificate" in source or "the destination" in source


def test_a_destination_with_another_name(work: Path, creds: Path) -> None:
    source, _ = refused(work, creds, creds, tls_hostname="elsewhere.example")
    assert "its certificate is refused here: Hostname mismatch" in source


def test_a_certificate_that_is_over(work: Path, authority: Authority, creds: Path) -> None:
    source, _ = refused(work, creds, authority.directory(work / "old", expired=True))
    assert "its certificate is refused here: certificate has expired" in source


def test_a_certificate_that_was_taken_back(work: Path, authority: Authority, creds: Path) -> None:
    authority.revoke(creds, "client")
    _, destination = refused(work, creds, creds)
    assert "its certificate is refused here: certificate revoked" in destination


def test_one_side_without_tls(work: Path, creds: Path) -> None:
    _, destination = refused(work, None, creds)
    assert "the other side does not speak TLS: turn it on over there (QEMU's tls-creds)" in destination
    source, destination = refused(work, creds, None)
    assert "it speaks TLS, this side does not" in destination
    assert "in the TLS handshake: does it speak TLS" in source


def test_what_says_nothing_is_no_handshake(creds: Path) -> None:
    ours, theirs = socket.socketpair()
    connection = server(creds)(ours, "a connection", Silence(1))
    with theirs, pytest.raises(PeerError, match="a connection did not finish its TLS handshake: does it speak TLS?"):
        connection.begin(time.monotonic() + 0.1)
    connection.close()


def test_files_that_are_missing_or_wrong(work: Path, creds: Path) -> None:
    with pytest.raises(CallerError, match=r"server-key.pem: No such file or directory: TLS takes ca-cert.pem"):
        (creds / "server-key.pem").unlink()
        migrate.receive("tcp:127.0.0.1:0", work / "snap", tls_creds=creds)
    with pytest.raises(CallerError, match=r"client-key.pem are no certificate and its key"):
        (creds / "client-key.pem").write_text("no key")
        Relaying("tcp:127.0.0.1:1", connect_tls_creds=creds)
    with pytest.raises(CallerError, match=r"ca-cert.pem or ca-crl.pem is no certificate list"):
        (creds / "ca-cert.pem").write_text("no certificate")
        Relaying("tcp:127.0.0.1:1", connect_tls_creds=creds)
    with pytest.raises(UsageError, match="a Unix socket has no host name to check"):
        Relaying("unix:there", connect_tls_creds=creds)
    with pytest.raises(UsageError, match="a TLS host name without TLS"):
        Relaying("unix:there", connect_tls_hostname="there")


@pytest.mark.parametrize(
    ("ours", "theirs", "exposed"),
    [
        ("10.0.0.1", "10.0.0.2", True),
        ("fd00::1", "fd00::2", True),
        ("10.0.0.1", "10.0.0.1", False),
        ("127.0.0.1", "127.0.0.2", False),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.5", False),
    ],
)
def test_a_plain_connection_that_leaves_the_machine(ours: str, theirs: str, exposed: bool) -> None:
    """Two hosts are not at hand: a real connection, which is told other addresses."""

    class Elsewhere(socket.socket):
        def getsockname(self) -> Any:
            return ours, 4444

        def getpeername(self) -> Any:
            return theirs, 5555

    connection = SocketConnection(Elsewhere(), f"tcp:{theirs}:5555", Silence(1))
    try:
        if exposed:
            with pytest.warns(RuntimeWarning, match=f"passes unencrypted between this machine and {theirs}: use TLS"):
                warn_exposed(connection)
        else:
            warn_exposed(connection)  # a warning is an error here
    finally:
        connection.close()


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
    machine = "q35" if source_release == target_release else "pc-q35-7.2"
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
        assert relaying.result().confirmed == (True if return_path else None)
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
    where = open_source(work / "snap")
    migrate.send(where, f"unix:{work}/incoming", "zstd", channels=3, tls_creds=creds, tls_hostname="localhost")
    target.wait("completed")
    assert target.ram.read_bytes() == content()


@pytest.mark.parametrize("release", RELEASES)
def test_a_qemu_with_tls_and_a_relay_without(start: Start, work: Path, creds: Path, release: str) -> None:
    source = start(release, "source", more=secured(creds, "client"))
    source.prepare(channels=FAILING_CHANNELS, tls_creds="tls0")
    warned = pytest.warns(RuntimeWarning, match="it speaks TLS, this side does not: ignored")
    with closing(Relaying(f"unix:{work}/nobody")) as relaying, warned:
        source.monitor.command("migrate", uri=relaying.uri)
        source.wait("failed")


@pytest.mark.parametrize("release", RELEASES)
def test_a_qemu_without_tls_and_a_relay_with(start: Start, work: Path, creds: Path, release: str) -> None:
    source = start(release, "source")
    source.prepare(channels=FAILING_CHANNELS)
    warned = pytest.warns(RuntimeWarning, match="the other side does not speak TLS: turn it on over there")
    with closing(Relaying(f"unix:{work}/nobody", listen_tls_creds=creds)) as relaying, warned:
        source.monitor.command("migrate", uri=relaying.uri)
        source.wait("failed")
