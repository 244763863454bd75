"""The least that a relay has to do, a rival for bench_qemu.py: read a packet, compress its pages, write it.

    python tools/bare_relay.py --connect tcp:HOST:PORT --to NAME

One migration of two channels, from none, over TCP.  Nothing is checked and no mistake is named.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from multifd.codec.compressor import Compressor
from multifd.codec.selection import select
from multifd.codec.settings import Settings, Spec
from multifd.wire.flags import COMPRESSION_SHIFT, DEFAULT_PAGE_SIZE, PACKET_SIZE
from multifd.wire.packet import INIT, RAM, Buffer, header_length

CHANNELS = 2


def write(connection: socket.socket, parts: Sequence[Buffer]) -> int:
    length = sum(map(len, parts))
    if (done := connection.sendmsg(parts)) < length:
        connection.sendall(b"".join(parts)[done:])
    return length


def pass_on(source: socket.socket, destination: socket.socket) -> None:
    while data := source.recv(1 << 16):
        source.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        destination.sendall(data)
    with suppress(OSError):
        destination.shutdown(socket.SHUT_WR)


def recode(
    source: socket.socket, destination: socket.socket, number: int, compressor: Compressor, settings: Settings
) -> int:
    """One channel; returns the bytes written."""
    view = compressor.channel(number, DEFAULT_PAGE_SIZE, settings)
    compressor.hook.multifd_send_setup(channel=view)
    header = bytearray(header_length(DEFAULT_PAGE_SIZE))
    buffer = memoryview(bytearray(PACKET_SIZE))
    flag = compressor.facts.flag << COMPRESSION_SHIFT
    written = 0
    while source.recv_into(header, len(header), socket.MSG_WAITALL) == len(header):
        fields = list(RAM.unpack_from(header))
        _, _, flags, _, _, size, _, zero, _ = fields
        payload = []
        if size:
            source.recv_into(buffer, size, socket.MSG_WAITALL)
            payload = compressor.hook.multifd_send_prepare(channel=view, pages=[buffer[:size]])
        if size or zero:
            fields[2], fields[5] = flags | flag, sum(map(len, payload))
            RAM.pack_into(header, 0, *fields)
        written += write(destination, [header, *payload])
    destination.close()
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connect", required=True)
    parser.add_argument("--to", required=True)
    arguments = parser.parse_args()
    compressor, settings = select(Spec.parse(arguments.to), sending=True)
    _, host, port = arguments.connect.split(":")
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"listening on tcp:127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    written: list[int] = []

    def serve(source: socket.socket, destination: socket.socket, number: int) -> None:
        for connection in (source, destination):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if number < 0:
            threading.Thread(target=pass_on, args=(destination, source), daemon=True).start()
            pass_on(source, destination)
        else:
            destination.sendall(source.recv(INIT.size, socket.MSG_WAITALL))
            written.append(recode(source, destination, number, compressor, settings))

    threads = []
    for number in range(-1, CHANNELS):  # the main channel comes first
        source, _ = listener.accept()
        destination = socket.create_connection((host, int(port)))
        threads.append(threading.Thread(target=serve, args=(source, destination, number)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    print(json.dumps({"bytes_out": sum(written)}))


if __name__ == "__main__":
    main()
