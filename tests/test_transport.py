"""Connections on real sockets, where no migration is needed to see what they do."""

from __future__ import annotations

import threading

import pytest

import peers
from multifd.transport import Listener, Silence, Uri


def test_a_writer_hears_of_a_reset_at_once() -> None:
    """It had filled our buffers, they were drained after the end: nothing else would tell it."""
    silence = Silence(peers.TIMEOUT)
    listener = Listener(Uri.parse("tcp:127.0.0.1:0"))
    sock = peers.dial(str(listener.uri))
    connection = listener.accept(silence)
    assert connection is not None
    sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        while True:
            sock.send(bytes(1 << 20))
    connection.interrupt()
    while connection.read_some(1 << 20):
        pass
    connection.reset()
    threading.Timer(0.1, connection.close).start()
    sock.settimeout(5)
    with pytest.raises(ConnectionError):
        sock.sendall(bytes(1 << 20))
    sock.close()
    listener.close()
