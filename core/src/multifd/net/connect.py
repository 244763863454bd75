"""Connections that we make."""

from __future__ import annotations

import errno
import select
import socket
import time
from typing import Any

from multifd.errors import HostError, reason, system_error
from multifd.net.deadline import Silence
from multifd.net.lookup import Address, look_up
from multifd.net.socket import SocketConnection, Wrap
from multifd.net.uri import Uri

#: Seconds until a Unix socket's full queue is tried again.
AGAIN = 0.05


def connect(
    uri: Uri, silence: Silence, who: str = "the destination", wrap: Wrap = SocketConnection
) -> SocketConnection:
    """Connect to somebody within `silence.timeout` seconds.  Raises HostError, PeerError, Cancelled."""
    error: OSError | None = None
    try:
        if uri.scheme == "unix":
            found: list[Address] = [(socket.AF_UNIX, uri.path)]
        else:
            found = look_up(uri, silence)
        deadline = time.monotonic() + silence.timeout
        for family, address in found:
            sock = socket.socket(family)
            try:
                _connect(sock, address, deadline, silence)
            except OSError as failed:
                error = failed
                sock.close()
                continue
            except BaseException:
                sock.close()
                raise
            connection = wrap(sock, str(uri), silence)
            try:
                connection.begin(deadline)
                connection.keep_to(silence)
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


def _connect(sock: socket.socket, address: Any, deadline: float, silence: Silence) -> None:
    """In looks, so that it can be given up.  Raises OSError, Cancelled."""
    sock.setblocking(False)
    error = sock.connect_ex(address)
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    while error in (errno.EINPROGRESS, errno.EAGAIN):
        silence.check("connecting", awaited=False)
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if error == errno.EAGAIN:  # a Unix socket's queue is full, and nothing tells when it no longer is
            time.sleep(min(left, AGAIN))
            error = sock.connect_ex(address)
        elif poll.poll(min(left, silence.interval) * 1000):
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if error:
        raise system_error(error)
