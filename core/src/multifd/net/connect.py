"""Connections that we make."""

from __future__ import annotations

import socket
import time

from multifd.errors import HostError, reason
from multifd.net.deadline import Silence
from multifd.net.socket import SocketConnection, Wrap
from multifd.net.uri import Uri


def connect(
    uri: Uri, silence: Silence, who: str = "the destination", wrap: Wrap = SocketConnection
) -> SocketConnection:
    """Connect to somebody within `silence.timeout` seconds.  Raises HostError, PeerError."""
    error: OSError | None = None
    try:
        if uri.scheme == "unix":
            found = [(socket.AF_UNIX, uri.path)]
        else:
            infos = socket.getaddrinfo(uri.host or "localhost", uri.port, type=socket.SOCK_STREAM)
            found = [(info[0], info[4]) for info in infos]  # type: ignore[misc]
        deadline = time.monotonic() + silence.timeout
        for family, address in found:
            sock = socket.socket(family)
            try:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                sock.connect(address)
            except OSError as failed:
                error = failed
                sock.close()
                continue
            connection = wrap(sock, str(uri), silence)
            try:
                connection.begin(deadline)
            except BaseException:
                connection.close()
                raise
            return connection
    except OSError as failed:
        error = failed
    if isinstance(error, TimeoutError):
        raise HostError(f"{uri} does not answer within {silence.timeout:g} s (--timeout)") from error
    refused = isinstance(error, (ConnectionRefusedError, FileNotFoundError))
    hint = f": is {who} listening there?" if refused else ""
    raise HostError(f"cannot connect to {uri}: {reason(error) if error else 'no address'}{hint}") from error
