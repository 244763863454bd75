"""Connections that come."""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
import warnings
from contextlib import suppress

from multifd.errors import CallerError, os_errors, reason
from multifd.net.deadline import Silence
from multifd.net.socket import SocketConnection, Wrap
from multifd.net.uri import Uri

#: Seconds until a connection that could not be taken is tried again.
ACCEPT_AGAIN = 0.1


class Listener:
    """A listening socket; `wrap` makes its connections.  Raises CallerError where the address cannot be taken."""

    def __init__(self, uri: Uri, wrap: Wrap = SocketConnection) -> None:
        self._wrap = wrap
        self._path = ""
        self._over = False
        self._warned = False
        try:
            with os_errors(f"cannot listen on {uri}", CallerError):
                self._listen(uri)
        except BaseException:
            self.close()
            raise

    def _listen(self, uri: Uri) -> None:
        if uri.scheme == "unix":
            _remove_dead_socket(uri.path)
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.bind(uri.path)
            self._path = uri.path
            self.uri = uri
        else:
            found = socket.getaddrinfo(uri.host or None, uri.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, address = found[0]
            self._socket = socket.socket(family)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
            host, port = self._socket.getsockname()[:2]
            self.uri = Uri("tcp", host=host, port=port)
        self._socket.listen(256)

    def accept(self, silence: Silence) -> SocketConnection | None:
        """The next connection; None once the listener is interrupted or closed."""
        while True:
            try:
                sock, address = self._socket.accept()
            except OSError as error:
                # Not by errno: without a free descriptor the kernel says that first, and always.
                if self._over:
                    return None
                self._wait_out(error)
                continue
            peer = f"the connection from {address[0]}:{address[1]}" if isinstance(address, tuple) else "a connection"
            return self._wrap(sock, peer, silence)

    def _wait_out(self, error: OSError) -> None:
        """A connection that went before it was taken, or something that this machine is short of for now."""
        if isinstance(error, ConnectionAbortedError):
            return
        if not self._warned:
            self._warned = True
            hint = ": raise `ulimit -n` (systemd: LimitNOFILE)" if error.errno == errno.EMFILE else ""
            warnings.warn(
                f"{self.uri} cannot take a connection and goes on trying: {reason(error)}{hint}",
                RuntimeWarning,
                stacklevel=3,
            )
        time.sleep(ACCEPT_AGAIN)

    def interrupt(self) -> None:
        """Wake a blocked `accept`, for good."""
        self._over = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Safe to call twice; removes a Unix socket's file."""
        self._over = True
        if hasattr(self, "_socket"):
            self._socket.close()
        if self._path:
            with suppress(OSError):
                os.unlink(self._path)
            self._path = ""


def _remove_dead_socket(path: str) -> None:
    """A socket file that nobody listens on is left over from a process that died."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        return
