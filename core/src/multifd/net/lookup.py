"""The addresses of a name: the resolver cannot be woken, so somebody else waits for it."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

from multifd.crew import start
from multifd.net.deadline import Silence
from multifd.net.uri import Uri

Address = tuple[socket.AddressFamily, Any]


def look_up(uri: Uri, silence: Silence, flags: socket.AddressInfo | None = None) -> list[Address]:
    """A socket's families and addresses for a `tcp` URI, the resolver's favourite first.

    `flags` are getaddrinfo's.  Raises OSError where there are none, or the resolver has not answered within
    `silence.timeout` seconds, Cancelled, HostError.
    """
    found: list[Address] = []
    failed: list[OSError] = []
    done = threading.Event()

    def ask(more: int = 0) -> None:
        try:
            infos = socket.getaddrinfo(uri.host or None, uri.port, type=socket.SOCK_STREAM, flags=(flags or 0) | more)
        except UnicodeError as error:
            raise OSError(f"{uri.host!r} can be no host's name") from error
        found.extend((family, address) for family, _, _, _, address in infos)

    def wait() -> None:
        try:
            ask()
        except OSError as error:
            failed.append(error)
        finally:
            done.set()

    try:
        ask(socket.AI_NUMERICHOST)  # nobody has to be asked
        return found
    except socket.gaierror:
        pass
    start(threading.Thread(target=wait, name=f"looking up {uri.host}", daemon=True))
    deadline = time.monotonic() + silence.timeout
    while not done.wait(silence.interval):
        silence.check(f"looking up {uri.host}", awaited=False)
        if time.monotonic() > deadline:
            raise OSError(f"the name server has not answered within {silence.timeout:g} s (--timeout)")
    if failed:
        raise failed[0]
    return found
