"""A relay's counters over HTTP, as Prometheus reads them (text format 0.0.4)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

from multifd.errors import CallerError, UsageError, os_errors
from multifd.jobs.relay.counters import Sample, text
from multifd.net.uri import Uri


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

    with os_errors(f"cannot listen on {uri}", CallerError):
        server = Server((where.host, where.port), Handler)
    thread = threading.Thread(target=server.serve_forever, name="multifd-metrics", daemon=True)
    thread.start()
    try:
        yield str(Uri("tcp", host=where.host, port=server.server_address[1]))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
