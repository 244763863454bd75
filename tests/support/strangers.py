"""Those who connect and are no migration, or another's; and the migration that they must not disturb, by hand."""

from __future__ import annotations

import os
import re
import resource
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import commands
import peers
import streams
from multifd.errors import MultifdError

#: Of another VM.
FOREIGN = bytes(range(100, 116))
#: Makes TLS of a connection, as one who has a certificate; None where the port is plain.
Wrap = Callable[[socket.socket], socket.socket] | None
#: Gets the address, and comes; what it keeps open is the caller's to close.
Stranger = Callable[[str, Wrap], list[socket.socket]]

PING = b"\x08\x00\x02\x00\x04" + struct.pack(">I", 2)
PONG = struct.pack(">HHI", 2, 4, 2)
#: Seconds within which a stranger has to have been dropped, on a busy machine, too.
SOON = 10


def tls(creds: Path) -> Wrap:
    """One that shows this directory's client certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(creds / "ca-cert.pem")
    context.load_cert_chain(creds / "client-cert.pem", creds / "client-key.pem")
    return lambda sock: context.wrap_socket(sock, server_hostname="localhost")


def dial(uri: str, wrap: Wrap = None) -> socket.socket:
    """A connection, the handshake done where there is one."""
    sock = peers.dial(uri)
    try:
        return sock if wrap is None else wrap(sock)
    except BaseException:
        sock.close()
        raise


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    sock.close()


def is_gone(sock: socket.socket, seconds: float = SOON) -> bool:
    """Whether the other side has closed it within that time, whatever it said before."""
    deadline = time.monotonic() + seconds
    with suppress(OSError):
        while (left := deadline - time.monotonic()) > 0:
            sock.settimeout(left)
            if not sock.recv(1 << 16):
                return True
    return time.monotonic() < deadline


# --- the strangers ---


def says(data: bytes, *, stays: bool, encrypted: bool = False) -> Stranger:
    """One that sends that; where the port wants TLS, within it only if `encrypted`."""

    def come(uri: str, wrap: Wrap = None) -> list[socket.socket]:
        sock = dial(uri, wrap if encrypted else None)
        with suppress(ConnectionError):  # dropped before it had said all
            sock.sendall(data)
        if stays:
            return [sock]
        sock.close()
        return []

    return come


def scan(uri: str, wrap: Wrap = None) -> list[socket.socket]:
    """Connects and resets, as a port scan."""
    reset(dial(uri))
    return []


def half_closed(uri: str, wrap: Wrap = None) -> list[socket.socket]:
    """Says that it will say nothing more, and waits."""
    sock = dial(uri)
    sock.shutdown(socket.SHUT_WR)
    return [sock]


def client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        _anybody().wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


def hello_and_reset(uri: str, wrap: Wrap = None) -> list[socket.socket]:
    """Begins a TLS handshake, and resets."""
    sock = dial(uri)
    sock.sendall(client_hello())
    reset(sock)
    return []


def unknown_client(uri: str, wrap: Wrap = None) -> list[socket.socket]:
    """Tries a whole TLS handshake without a certificate."""
    sock = dial(uri)
    sock.settimeout(SOON)
    try:
        return [_anybody().wrap_socket(sock)]
    except OSError:  # as it should be, where the port is plain
        sock.close()
        return []


def _anybody() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def endless_main(uri: str, wrap: Wrap = None) -> list[socket.socket]:
    """A main channel that is right and never comes to its block list: as much as is taken, up to 4 MiB."""
    sock = dial(uri, wrap)
    pour(sock, MAIN_HEAD, PING, 4 << 20)
    return [sock]


def pour(sock: socket.socket, head: bytes, again: bytes, most: int, seconds: float = 0.2) -> None:
    """Send that and then the other again and again, as long as it is taken."""
    piece = again * (65536 // len(again))
    sock.settimeout(seconds)
    deadline = time.monotonic() + seconds
    with suppress(OSError):
        sock.sendall(head)
        while most > 0 and time.monotonic() < deadline:
            most -= sock.send(piece)
    sock.settimeout(peers.TIMEOUT)


def channel(number: int, uuid: bytes = FOREIGN) -> Stranger:
    return says(streams.init(number, uuid), stays=True, encrypted=True)


def foreign_stream(*, tells: bool = True) -> streams.Stream:
    """Another VM's whole migration; its main channel `tells` its uuid (capability `x-validate-uuid`)."""
    stream = streams.small(return_path=True, channels=2)
    ours = streams.configuration(page_bits=16)
    theirs = streams.configuration("pc-i440fx-7.2", page_bits=16, uuid=FOREIGN if tells else None)
    main = stream.main.replace(ours, theirs).replace(b"pc.ram", b"qq.ram")
    channels = [
        data.replace(streams.UUID, FOREIGN, 1).replace(b"pc.ram", b"qq.ram").replace(b"page", b"gape")
        for data in stream.channels
    ]
    return streams.Stream(main, channels)


def come_whole(uri: str, stream: streams.Stream) -> list[socket.socket]:
    """A whole source, main channel first, that says all of it and waits."""
    return [sock for data in (stream.main, *stream.channels) for sock in says(data, stays=True)(uri, None)]


#: Up to the block list.
MAIN_HEAD = streams.FILE_HEADER + streams.configuration(page_bits=16) + streams.RETURN_PATH
FOREIGN_HEAD = streams.FILE_HEADER + streams.configuration(page_bits=16, uuid=FOREIGN) + streams.RETURN_PATH

#: They never become a migration.  Each name reads behind "someone who ...".
KINDS: dict[str, Stranger] = {
    "connects and closes": says(b"", stays=False),
    "connects and resets": scan,
    "closes its half": half_closed,
    "sends one byte": says(b"Q", stays=True),
    "sends one byte and closes": says(b"\x11", stays=False),
    "is silent": says(b"", stays=True),
    "is silent behind its handshake": says(b"", stays=True, encrypted=True),
    "speaks HTTP": says(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", stays=True),
    "sends a foreign magic": says(bytes(range(200, 255)) * 9, stays=True, encrypted=True),
    "sends a TLS hello and resets": hello_and_reset,
    "sends a TLS hello": says(client_hello(), stays=True),
    "sends half a TLS hello": says(client_hello()[:60], stays=True),
    "has no certificate": unknown_client,
    "is a main channel in plain text": says(MAIN_HEAD, stays=True),
    "is a foreign channel 0": channel(0),
    "is a foreign channel 1": channel(1),
    "is a foreign channel 255": channel(255),
    "is a foreign channel and closes": says(streams.init(0, FOREIGN), stays=False, encrypted=True),
    "sends half an init packet": says(streams.init(0)[:40], stays=True, encrypted=True),
    "sends an init packet of version 2": says(streams.init(0, version=2), stays=True, encrypted=True),
    "sends QEVM": says(streams.FILE_HEADER, stays=True, encrypted=True),
    "sends QEVM and closes": says(streams.FILE_HEADER, stays=False, encrypted=True),
    "sends QEVM of version 2": says(struct.pack(">II", 0x5145564D, 2), stays=True, encrypted=True),
    "is a second main channel": says(FOREIGN_HEAD, stays=True, encrypted=True),
    "is an endless main channel": endless_main,
}
#: Those that stay and show by their first bytes that they are none, at a plain port and at one that wants TLS.
DROPPED_AT_ONCE = {
    True: ("speaks HTTP", "sends a foreign magic", "is a main channel in plain text"),
    False: ("speaks HTTP", "sends a foreign magic", "sends a TLS hello"),
}
#: Only once the migration has begun.
MEANWHILE: dict[str, Stranger] = {
    "is another VM's whole main channel": says(foreign_stream().main, stays=True, encrypted=True),
    "is a main channel that says nothing of its VM": says(foreign_stream(tells=False).main, stays=True, encrypted=True),
    "has an id that is taken": channel(0, streams.UUID),
}


def trickle(uri: str, heads: dict[str, bytes], wrap: Wrap, wait: float = 0.25) -> set[str]:
    """All at once, a byte from time to time of each; who had to go before all was said.  `TLS` is said in the clear."""
    gone = set()

    def say(who: str, data: bytes) -> None:
        with suppress(OSError), dial(uri, None if who == "TLS" else wrap) as sock:
            for at in range(len(data)):
                try:
                    sock.sendall(data[at : at + 1])
                except OSError:
                    gone.add(who)
                    return
                if is_gone(sock, wait):
                    gone.add(who)
                    return

    threads = [threading.Thread(target=say, args=item) for item in heads.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return gone


def silent(uri: str, count: int, host: str = "") -> list[socket.socket]:
    """So many that say nothing; they do not wait until they are taken.  From `host`, where it is given."""
    scheme, _, rest = uri.partition(":")
    assert scheme == "tcp"
    where, _, port = rest.rpartition(":")
    socks = []
    for _ in range(count):
        sock = socket.socket()
        if host:
            sock.bind((host, 0))
        sock.setblocking(False)
        sock.connect_ex((where, int(port)))
        socks.append(sock)
    return socks


@contextmanager
def closing(socks: list[socket.socket]) -> Iterator[list[socket.socket]]:
    """Strangers go at the end; more may come into the list."""
    try:
        yield socks
    finally:
        for sock in socks:
            sock.close()


@contextmanager
def many_descriptors(count: int) -> Iterator[None]:
    """This process may have so many more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, count + 256)), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- whom they disturb ---


class Source:
    """A source of two channels by hand, which stands still in the middle of its pages until it is told to go on.

    `tells`: its main channel says its uuid, too.
    """

    def __init__(self, wrap: Wrap = None, *, tells: bool = False, patience: float = peers.TIMEOUT) -> None:
        self._wrap = wrap
        self._patience = patience
        self._uri = ""
        self._socks: dict[int, socket.socket] = {}
        self.answer = b""
        stream = streams.small(return_path=True, channels=2)
        self.ram = stream.ram["pc.ram"]
        start = streams.ram_start([("pc.ram", len(self.ram))])
        head, _, rest = stream.main.partition(start)
        if tells:
            plain = streams.configuration(page_bits=16)
            head = head.replace(plain, streams.configuration(page_bits=16, uuid=streams.UUID))
        header = streams.header_length(65536)
        cuts = (64 + 2 * header + 65536, 64 + header)
        self.head = head
        self.blocks = start + PING
        self._first = [head + self.blocks, *(data[:cut] for data, cut in zip(stream.channels, cuts, strict=True))]
        self._rest = [rest, *(data[cut:] for data, cut in zip(stream.channels, cuts, strict=True))]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._socks.values():
            sock.close()

    def connect(self, uri: str, *numbers: int) -> None:
        """The main channel is 0, the others follow."""
        self._uri = uri
        for number in numbers:
            sock = self._socks[number] = dial(uri, self._wrap)
            sock.settimeout(self._patience)

    def begin(self, uri: str, *numbers: int) -> None:
        """Connect these, all unless given, and send of each what comes before the pause."""
        for number in numbers or range(3):
            if number not in self._socks:
                self.connect(uri, number)
            self._socks[number].sendall(self._first[number])

    def say(self, number: int, data: bytes) -> None:
        self._socks[number].sendall(data)

    def moves(self) -> None:
        """Wait until what is behind the block list has been answered: the migration is under way."""
        while PONG not in self.answer:
            self._hear()

    def finish(self) -> None:
        """Go on to the end, which the destination confirms; as QEMU's, it closes when it has its answer."""
        missing = [number for number in range(3) if number not in self._socks]
        if missing:
            self.begin(self._uri, *missing)
        for number in (2, 1, 0):
            self._socks[number].sendall(self._rest[number])
        while self.answer[-8:-4] != streams.SHUT_DONE[:4]:
            self._hear()
        assert self.answer.endswith(streams.SHUT_DONE)
        for sock in self._socks.values():
            sock.close()

    def _hear(self) -> None:
        data = self._socks[0].recv(4096)
        assert data, f"the main channel was closed after the answer {self.answer.hex(' ', 8)}"
        self.answer += data


@contextmanager
def receiving(output: Path, uri: str = "tcp:127.0.0.1:0", **options: Any) -> Iterator[peers.Receiving]:
    """`receive` in a thread; joined, however it ends, once its source has gone."""
    job = peers.Receiving(output, uri, **{"first_timeout": 15.0} | options)
    try:
        yield job
    except BaseException:
        with suppress(OSError, AssertionError), Source(patience=3) as source:  # it may be waiting for one still
            source.begin(job.uri)
            source.finish()
        raise
    finally:
        with suppress(MultifdError, AssertionError):  # the test has joined it, or failed before
            job.join()


def memory(snapshot: Path) -> bytes:
    return (snapshot / "0-pc.ram.raw").read_bytes()


class Serving:
    """A command that listens, in a process of its own; `said` are its lines on standard error."""

    def __init__(self, *arguments: object, descriptors: int | None = None) -> None:
        command = [*commands.MULTIFD, *map(str, arguments)]
        if descriptors is not None:
            command = ["bash", "-c", f'ulimit -n {descriptors}; exec "$@"', "bash", *command]
        self.said: list[str] = []
        self.uri = ""
        self._listening = threading.Event()
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()
        if not self._listening.wait(peers.TIMEOUT) or not self.uri:
            self.__exit__()
            raise AssertionError(f"it does not listen: {self.said}")

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            before, found, uri = line.strip().partition("multifd: listening on ")
            if found and not before:
                self.uri = uri
                self._listening.set()
            else:
                self.said.append(line.strip())
        self._listening.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(peers.TIMEOUT)
        self._thread.join(peers.TIMEOUT)
        assert self._process.stderr is not None
        self._process.stderr.close()

    def peak(self) -> int:
        """The most bytes of memory that it has had so far."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found, status
        return int(found[1]) << 10

    def busy(self) -> float:
        """Seconds of a processor's time so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait(self) -> int:
        """Its exit code."""
        code = self._process.wait(peers.TIMEOUT)
        self._thread.join(peers.TIMEOUT)
        return code
