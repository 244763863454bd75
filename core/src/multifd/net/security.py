"""Plain or TLS, and what to say where it is plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multifd.errors import UsageError
from multifd.log import log
from multifd.net.deadline import Silence
from multifd.net.rate import Pace, Rate
from multifd.net.socket import SocketConnection, Wrap
from multifd.net.uri import Uri


def listening_wrap(tls_creds: str | Path | None) -> Wrap:
    """What makes connections of those that come: plain, or with TLS.  Raises CallerError."""
    if tls_creds is None:
        return SocketConnection
    from multifd.net import tls

    return tls.server(tls_creds)


def connecting_wrap(tls_creds: str | Path | None, hostname: str | None, uri: Uri, rate: int | None = None) -> Wrap:
    """Likewise for those that we make; the other side's name is the URI's unless given.

    To all of them together no more than `rate` bytes a second are written, encrypted ones where they are.
    Raises UsageError, too.
    """
    wrap = _connecting(tls_creds, hostname, uri)
    if rate is None:
        return wrap
    limit = Rate(rate)

    def paced(sock: Any, name: str, silence: Silence) -> SocketConnection:
        connection = wrap(sock, name, silence)
        connection.pace = Pace(limit)
        return connection

    return paced


def _connecting(tls_creds: str | Path | None, hostname: str | None, uri: Uri) -> Wrap:
    if tls_creds is None:
        if hostname is not None:
            raise UsageError("a TLS host name without TLS: give the directory with its certificates, too")
        return SocketConnection
    from multifd.net import tls

    return tls.client(tls_creds, hostname or uri.host)


def warn_exposed(connection: SocketConnection) -> None:
    """Guest memory on the network for everybody to read: say so."""
    if connection.exposed():
        host = connection.name.removeprefix("the connection from ").removeprefix("tcp:").rpartition(":")[0]
        log.warning(
            f"the guest's memory passes unencrypted between this machine and {host}: use TLS, or trust the network"
        )
