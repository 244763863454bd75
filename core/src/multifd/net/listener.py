"""Connections that come."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import ExitStack, suppress
from functools import partial

from multifd.crew import undone
from multifd.errors import CallerError, os_errors, reason
from multifd.log import log
from multifd.net.deadline import Silence
from multifd.net.lookup import look_up
from multifd.net.socket import SocketConnection, Wrap
from multifd.net.uri import Uri


class Listener:
    """A listening socket; `wrap` makes its connections.

    Raises CallerError where the address cannot be taken, or is not found within `silence.timeout` seconds, Cancelled.
    """

    def __init__(self, uri: Uri, silence: Silence, wrap: Wrap = SocketConnection) -> None:
        self._wrap = wrap
        self._warned = False
        self._undoing = ExitStack()
        try:
            with os_errors(f"cannot listen on {uri}", CallerError):
                self._listen(uri, silence)
        except BaseException:
            self.close()
            raise

    def _listen(self, uri: Uri, silence: Silence) -> None:
        if uri.scheme == "unix":
            _remove_dead_socket(uri.path)
            self._socket = self._undoing.enter_context(socket.socket(socket.AF_UNIX))
            self._socket.bind(uri.path)
            self._undoing.enter_context(undone(partial(_remove, uri.path)))
            self.uri = uri
        else:
            family, address = look_up(uri, silence, socket.AI_PASSIVE)[0]
            self._socket = self._undoing.enter_context(socket.socket(family))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
            host, port = self._socket.getsockname()[:2]
            self.uri = Uri("tcp", host=host, port=port)
        self._socket.setblocking(False)
        self._socket.listen(256)

    def fileno(self) -> int:
        """What can be polled: readable where somebody connects."""
        return self._socket.fileno()

    def accept(self, silence: Silence) -> SocketConnection | None:
        """Whoever waits to be met; None where nobody does, or the machine is short of something: try again later."""
        try:
            sock, address = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            if not self._warned:
                self._warned = True
                text = f"{self.uri} cannot take a connection and goes on trying: {reason(error)}"
                log.warning(text)
            return None
        if self.uri.scheme == "unix":
            connection = self._wrap(sock, "a connection", silence)
            connection.address = str(self.uri)
        else:
            peer = str(Uri("tcp", host=address[0], port=address[1]))
            connection = self._wrap(sock, f"the connection from {peer.removeprefix('tcp:')}", silence)
            connection.address = peer
        return connection

    def close(self) -> None:
        """Safe to call twice; removes a Unix socket's file."""
        self._undoing.close()


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


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
