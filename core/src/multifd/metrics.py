"""A relay's counters over HTTP, as Prometheus reads them (text format 0.0.4)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

from multifd.errors import CallerError, UsageError
from multifd.relay import Sample
from multifd.transport import Uri

PREFIX = "multifd_relay"
#: Per name: its type, its name there, and what it says.
NAMES = {
    "active": ("gauge", "active", "1 while a migration is under way"),
    "migrations": ("counter", "migrations_total", "Migrations that have ended"),
    "bytes": ("counter", "bytes_total", "Bytes of the connections, in from the source and out to the destination"),
    "memory_bytes": ("counter", "memory_bytes_total", "Bytes of the guest's pages, zero pages with them"),
    "packets": ("counter", "packets_total", "Packets"),
    "pages": ("counter", "pages_total", "Pages in the packets that left"),
    "stage_seconds": ("counter", "stage_seconds_total", "Seconds per stage: wait, decode, encode, write"),
    "ratio": ("gauge", "ratio", "Bytes of pages per byte to the destination"),
}


def text(counters: Mapping[Sample, float]) -> str:
    """The counters of `Relay.counters`, with the ratio of each channel."""
    samples = dict(counters)
    for (name, labels), memory in counters.items():
        if name == "memory_bytes":
            out = counters.get(Sample("bytes", (("direction", "out"), *labels)))
            if out:
                samples[Sample("ratio", labels)] = memory / out
    lines = []
    for name, (kind, full, meaning) in NAMES.items():
        lines += [f"# HELP {PREFIX}_{full} {meaning}", f"# TYPE {PREFIX}_{full} {kind}"]
        for (own, labels), value in sorted(samples.items()):
            if own == name:
                inside = ",".join(f'{label}="{said}"' for label, said in labels)
                lines.append(f"{PREFIX}_{full}{f'{{{inside}}}' if inside else ''} {value:.15g}")
    return "\n".join(lines) + "\n"


@contextmanager
def serving(uri: str, counters: Callable[[], Mapping[Sample, float]]) -> Iterator[str]:
    """Answer GET /metrics at `tcp:HOST:PORT` while the context lasts; gives the URI with its port.

    Raises UsageError for another scheme, CallerError where the address cannot be taken.
    """
    where = Uri.parse(uri)
    if where.scheme != "tcp":
        raise UsageError(f"{uri}: metrics are served on tcp:HOST:PORT")

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            known = self.path.partition("?")[0] == "/metrics"
            body = text(counters()).encode() if known else b"see /metrics\n"
            self.send_response(200 if known else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Scrapes are nothing to tell."""

    # Not HTTPServer: it asks the resolver for its own name, which can take long.
    class Server(ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    try:
        server = Server((where.host, where.port), Handler)
    except OSError as error:
        raise CallerError(f"cannot listen on {uri}: {error.strerror}") from error
    thread = threading.Thread(target=server.serve_forever, name="multifd-metrics", daemon=True)
    thread.start()
    try:
        yield str(Uri("tcp", host=where.host, port=server.server_address[1]))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
