"""TLS on our own ends: what is encrypted arrives, and who is not known does not."""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import images
import multifd
import peers
import streams
from certificates import Authority
from multifd import open_snapshot
from multifd.crew import Crew
from multifd.errors import CallerError, Cancelled, MultifdError, PeerError, UsageError
from multifd.net.deadline import Silence
from multifd.net.security import warn_exposed
from multifd.net.socket import SocketConnection
from multifd.net.tls import server
from relaying import Relaying, closing
from told import warns

pytestmark = pytest.mark.may_warn(".*ignored")


@pytest.mark.parametrize("method", ["none", "zlib"])
def test_send_to_receive(work: Path, creds: Path, method: str) -> None:
    content = images.write_memory(work)
    there = peers.Receiving(work / "snap", channels=4, tls_creds=creds)
    sent = multifd.send(open_snapshot(work / "image.raw"), there.uri, method, channels=4, tls_creds=creds)
    arrived = there.join()
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content
    assert sent.normal_pages == arrived.normal_pages
    if method == "none":
        assert arrived.wire_bytes > arrived.normal_pages * 4096, "records around the pages"


@pytest.mark.parametrize("legs", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("to", [None, "zstd"])
def test_relay_on_either_leg(work: Path, creds: Path, legs: tuple[bool, bool], to: str | None) -> None:
    """One host's QEMU has no TLS, or neither; over a Unix socket the name is given."""
    content = images.write_memory(work)
    listening, connecting = (creds if leg else None for leg in legs)
    there = peers.Receiving(work / "snap", f"unix:{work}/there", tls_creds=connecting)
    name = "localhost" if connecting else None
    relaying = Relaying(
        there.uri, to=to, listen_tls_creds=listening, connect_tls_creds=connecting, connect_tls_hostname=name
    )
    with closing(relaying):
        multifd.send(open_snapshot(work / "image.raw"), relaying.uri, tls_creds=listening)
        there.join()
        assert relaying.result().confirmed
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == content


def refused(work: Path, here: Path | None, there: Path | None, **options: Any) -> tuple[str, str]:
    """What the source and the destination say of a migration that must not come through; the latter waits on."""
    (work / "image.raw").write_bytes(images.memory()[: 1 << 20])
    crew = Crew()
    job = peers.Receiving(work / "snap", tls_creds=there, crew=crew)
    with warns(": ignored$") as answer:
        with pytest.raises(MultifdError) as told:
            multifd.send(open_snapshot(work / "image.raw"), job.uri, tls_creds=here, **options)
        assert peers.eventually(lambda: len(answer) > 0)
    crew.cancel()
    with pytest.raises(Cancelled):
        job.join()
    assert not (work / "snap").exists()
    return str(told.value), answer[0]


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


@pytest.mark.parametrize("goodbye", [True, False])
def test_a_source_that_dies_reads_the_same(work: Path, creds: Path, goodbye: bool) -> None:
    """QEMU closes its main channel without a goodbye, and is waiting for an answer."""
    stream = streams.small(return_path=True)
    job = peers.Receiving(work / "snap", tls_creds=creds, channels=1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(creds / "ca-cert.pem")
    context.load_cert_chain(creds / "client-cert.pem", creds / "client-key.pem")
    with context.wrap_socket(peers.dial(job.uri), server_hostname="localhost", suppress_ragged_eofs=True) as main:
        main.sendall(stream.main[: stream.main.index(streams.RETURN_PATH) + len(streams.RETURN_PATH)])
        if goodbye:
            main.settimeout(1)
            with suppress(OSError):
                main.unwrap()
    with pytest.raises(PeerError, match=r"^the source ended early: cancelled, or gone$"):
        job.join()


def test_what_says_nothing_is_no_handshake(creds: Path) -> None:
    ours, theirs = socket.socketpair()
    connection = server(creds)(ours, "a connection", Silence(1))
    with theirs, pytest.raises(PeerError, match="a connection did not finish its TLS handshake: does it speak TLS?"):
        connection.begin(time.monotonic() + 0.1)
    connection.close()


def test_files_that_are_missing_or_wrong(work: Path, creds: Path) -> None:
    with pytest.raises(CallerError, match=r"server-key.pem: No such file or directory: TLS takes ca-cert.pem"):
        (creds / "server-key.pem").unlink()
        multifd.receive("tcp:127.0.0.1:0", work / "snap", tls_creds=creds)
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
            with warns(f"passes unencrypted between this machine and {theirs}: use TLS"):
                warn_exposed(connection)
        else:
            warn_exposed(connection)  # a warning is an error here
    finally:
        connection.close()
