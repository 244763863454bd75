"""TLS around a connection, with the certificates that QEMU has.

`server` and `client` are given a directory, and make what `Listener` and `connect` take as `wrap`.  The directory is
that of QEMU's `tls-creds-x509` object.  Both sides show a certificate of the same authority, as QEMU's `verify-peer=on`
has it; a client also checks the server's name.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from multifd.errors import CallerError, MultifdError, PeerError, UsageError, os_errors
from multifd.net.connection import Lost, Stalled
from multifd.net.deadline import Silence
from multifd.net.socket import SocketConnection, Wrap
from multifd.net.wake import Wake
from multifd.wire.packet import Buffer

T = TypeVar("T")

AUTHORITY = "ca-cert.pem"
#: Certificates taken back; looked at where it is there, as QEMU does.
REVOKED = "ca-crl.pem"
#: Encrypted bytes taken from the socket at once, of one whom nobody knows yet and later.
READ_FIRST = 16 * 1024
READ = 256 * 1024


def server(directory: str | Path) -> Wrap:
    """For a listener: `ca-cert.pem`, `server-cert.pem` and `server-key.pem` in `directory`.

    A client without a certificate of the authority is refused.  Raises CallerError for a file
    that is missing or unusable.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, Path(directory), "server")
    context.verify_mode = ssl.CERT_REQUIRED
    # A QEMU without return path never reads: closing over unread tickets it would reset the connection, and
    # what is still on its way to us would be gone.
    context.num_tickets = 0
    return partial(TlsConnection, context=context, host=None)


def client(directory: str | Path, host: str) -> Wrap:
    """For `connect`: `ca-cert.pem`, `client-cert.pem` and `client-key.pem` in `directory`.

    `host`, a name or an address, has to be in the server's certificate.  Raises CallerError,
    UsageError where there is no name to check.
    """
    if not host:
        raise UsageError(
            "a Unix socket has no host name to check: say which name the certificate has (--tls-hostname, "
            "--connect-tls-hostname)"
        )
    context = _context(ssl.PROTOCOL_TLS_CLIENT, Path(directory), "client")
    return partial(TlsConnection, context=context, host=host)


def _context(protocol: int, directory: Path, who: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # whoever reads does not write
    authority, certificate, key = (directory / name for name in (AUTHORITY, f"{who}-cert.pem", f"{who}-key.pem"))
    revoked = directory / REVOKED
    for path in (authority, certificate, key):
        _readable(path)
    try:
        context.load_verify_locations(authority)
        if revoked.exists():
            _readable(revoked)
            context.load_verify_locations(revoked)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    except ssl.SSLError as error:
        raise CallerError(
            f"{directory}: {AUTHORITY} or {REVOKED} is no certificate list in PEM: {error.reason}"
        ) from error
    try:
        # A key with a password would ask the terminal for it.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError as error:
        raise CallerError(
            f"{certificate} and {key.name} are no certificate and its key, in PEM and without password: {error.reason}"
        ) from error
    return context


def _readable(path: Path) -> None:
    try:
        with os_errors(path, CallerError):
            path.read_bytes()
    except CallerError as error:
        raise CallerError(
            f"{error}: TLS takes {AUTHORITY}, server-cert.pem and server-key.pem where it listens, client-cert.pem and "
            "client-key.pem where it connects"
        ) from error


class _Nothing(Exception):
    """Not even a byte is here."""


class TlsConnection(SocketConnection):
    """A connection whose bytes are encrypted; `bytes_read` and `bytes_written` count them so.

    One thread reads and another writes, but OpenSSL's session is one: it works in memory, under a
    lock, and nobody waits for the socket while holding it.  It closes without a goodbye
    (close_notify), which a QEMU 10.0 wants on multifd channels before it has finished, not after:
    senders here wait until the destination has.
    """

    def __init__(self, sock: Any, name: str, silence: Silence, *, context: ssl.SSLContext, host: str | None) -> None:
        """A client's `host` is the name it expects; None makes it a server."""
        super().__init__(sock, name, silence)
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._came = ssl.MemoryBIO()
        self._goes = ssl.MemoryBIO()
        self._session = context.wrap_bio(self._came, self._goes, server_side=host is None, server_hostname=host)
        self._begun = False
        #: A byte that was read to learn whether there is one.
        self._ahead = bytearray()
        self._cipher = memoryview(bytearray(READ_FIRST))

    def begin(self, deadline: float) -> None:
        try:
            self._begin(partial(self._fetch_by, deadline))
        except Stalled:
            raise PeerError(f"{self.name} did not finish its TLS handshake: does it speak TLS?") from None

    def _begin(self, fetch: Callable[[], int]) -> None:
        if self._begun:
            return
        try:
            self._step(self._session.do_handshake, fetch)
        except ssl.SSLEOFError:
            raise PeerError(
                f"{self.name}: the other side closed the connection in the TLS handshake: does it speak TLS, and does "
                "it take this side's certificate?"
            ) from None
        self._push()
        self._begun = True

    def take(self, limit: int) -> bytes | None:
        def fetch() -> int:
            data = super(TlsConnection, self).take(len(self._cipher))
            if data is None:
                raise _Nothing
            self._cipher[: len(data)] = data
            return len(data)

        found = bytearray(limit)
        try:
            self._begin(fetch)
            return bytes(found[: self._decrypt(memoryview(found), fetch)])
        except _Nothing:
            return None

    def keep_to(self, silence: Silence) -> None:
        super().keep_to(silence)
        self._cipher = memoryview(bytearray(READ))

    def exposed(self) -> bool:
        return False

    def ready(self, wake: Wake) -> bool:
        def fetch() -> int:
            if not super(TlsConnection, self).ready(wake):
                raise _Nothing
            return super(TlsConnection, self)._receive(self._cipher, 0, False)

        if not self._ahead:
            # What is on the socket may be less than a record, or none of the peer's words: only decrypting tells.
            first = bytearray(1)
            try:
                self._ahead = first[: self._decrypt(memoryview(first), fetch)]
            except _Nothing:
                return False
        return True

    def _step(self, action: Callable[[], T], fetch: Callable[[], int]) -> T:
        """Do something with the session, which may need more bytes of the other side first."""
        while True:
            try:
                with self._lock:
                    return action()
            except ssl.SSLWantReadError:
                pass
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                raise
            except ssl.SSLError as error:
                with suppress(MultifdError):
                    self._answer()  # the alert that tells the other side why
                raise PeerError(f"{self.name}: TLS: {_words(error)}") from error
            self._answer()
            count = fetch()
            with self._lock:
                if count:
                    self._came.write(self._cipher[:count])
                else:
                    self._came.write_eof()

    def _answer(self) -> None:
        """Write what the handshake has made; later, such things go with the writer's next bytes."""
        if not self._begun:
            self._push()

    def _push(self) -> None:
        """Write what the session has made."""
        with self._lock:
            data = self._goes.read()
        if data:
            super().write([data])

    def _fetch_by(self, deadline: float) -> int:
        return super()._receive_by(self._cipher, deadline)

    def _decrypt(self, view: memoryview, fetch: Callable[[], int]) -> int:
        if self._ahead:
            view[: len(self._ahead)] = self._ahead
            self._ahead = bytearray()
            return 1
        try:
            return self._step(lambda: self._session.read(len(view), view), fetch)  # type: ignore[return-value]
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return 0  # QEMU closes its main channel without a goodbye; what is missing then tells

    def _receive_by(self, view: memoryview, deadline: float) -> int:
        return self._decrypt(view, partial(self._fetch_by, deadline))

    def _receive(self, view: memoryview, flags: int, due: bool) -> int:  # noqa: ARG002 - there is nothing to wait for all of
        receive = super()._receive
        return self._decrypt(view, lambda: receive(self._cipher, 0, due))

    def write(self, buffers: Sequence[Buffer]) -> None:
        # Joined: each write becomes a record of its own.
        data = memoryview(buffers[0] if len(buffers) == 1 else b"".join(buffers))
        while data:
            try:
                with self._lock:
                    count = self._session.write(data)
            except ssl.SSLError as error:  # it ended, without a goodbye or with one
                raise Lost("the other side closed the connection") from error
            data = data[count:]
        self._push()


def _words(error: ssl.SSLError) -> str:
    """OpenSSL's reason, and what to do about it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is refused here: {error.verify_message}"
    reason = (error.reason or "failed").replace("_", " ").lower()
    if "alert" in reason:
        return f"the other side refuses: {reason}: does it know the authority of this side's certificate?"
    if reason in ("wrong version number", "http request", "unknown protocol"):
        return "the other side does not speak TLS: turn it on over there (QEMU's tls-creds)"
    if reason == "peer did not return a certificate":
        return "the other side shows no certificate: give it a client-cert.pem and client-key.pem"
    return reason
