"""`multifd relay`."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict

from multifd.cli.commands import Run
from multifd.cli.options import (
    CONNECTING_CREDS,
    LISTENING_CREDS,
    PAGE_SIZE_HELP,
    URI_HELP,
    observe_option,
    plugin_options,
    progress_option,
    rate_option,
    size,
    timeout_option,
    uuid,
)
from multifd.cli.output import ProgressLine, say, size_text, tell, ways
from multifd.errors import MultifdError, counted
from multifd.log import log

#: Seconds: where a destination has everything, its word is passed on before a signal is obeyed.
PATIENCE = 3.0


def configure(parser: argparse.ArgumentParser) -> Run:
    """Its options."""
    parser.description = "Serve one migration after another until told to stop; re-compress each packet on its way."
    plugin_options(parser)
    observe_option(parser)
    timeout_option(parser)
    progress_option(parser)
    rate_option(parser)
    parser.add_argument("--listen", required=True, metavar="URI", help=f"where the source connects: {URI_HELP}")
    parser.add_argument("--connect", required=True, metavar="URI", help=f"where the destination listens: {URI_HELP}")
    parser.add_argument("--from", dest="source", metavar="NAME", help="refuse packets of any other method")
    parser.add_argument(
        "--to",
        metavar="NAME[,key=value...]",
        help="the compressor to write with (payloads pass as they are), as for `multifd send`",
    )
    parser.add_argument("--page-size", type=size, metavar="SIZE", help=PAGE_SIZE_HELP)
    parser.add_argument("--channels", type=int, metavar="N", help="the most channels that a source may use")
    parser.add_argument("--uuid", type=uuid, metavar="UUID", help="the destination's VM uuid, where it differs")
    parser.add_argument(
        "--drop-switchover-start", action="store_true", help="take out a command that a destination before 10.0 refuses"
    )
    parser.add_argument(
        "--find-zero-pages",
        action="store_true",
        help="look for zero pages that the source did not mark (for a destination of 9.0 or newer with fresh memory)",
    )
    parser.add_argument("--listen-tls-creds", metavar="DIR", help=f"expect TLS of the source: {LISTENING_CREDS}")
    parser.add_argument("--connect-tls-creds", metavar="DIR", help=f"use TLS to the destination: {CONNECTING_CREDS}")
    parser.add_argument(
        "--connect-tls-hostname", metavar="NAME", help="what the destination's certificate names (its URI's host)"
    )
    parser.add_argument("--metrics", metavar="tcp:HOST:PORT", help="answer GET /metrics there, as Prometheus reads it")
    parser.add_argument("--migrations", type=int, metavar="N", help="end after so many (never)")
    return run


def run(arguments: argparse.Namespace) -> int:
    """Do it."""
    from multifd.jobs.relay.outcome import Relayed
    from multifd.jobs.relay.server import Relay
    from multifd.net.deadline import DEFAULT_TIMEOUT

    failed = False
    unconfirmed = "; passed on, not confirmed: return-path is off on the source"
    unread = "; passed on, confirmed by the destination"

    def word(outcome: Relayed) -> str:
        if outcome.rounds_checked:
            return "" if outcome.confirmed else unconfirmed
        return f"{unread if outcome.confirmed else unconfirmed}; rounds not checked"

    def show(outcome: Relayed | MultifdError) -> None:
        nonlocal failed
        failed = isinstance(outcome, MultifdError)
        line.clear()
        if isinstance(outcome, MultifdError):
            log.error(str(outcome))
        elif arguments.json:
            tell(json.dumps(asdict(outcome)))
        else:
            tell(
                f"relayed {outcome.normal_pages + outcome.zero_pages} pages, {outcome.zero_pages} of them zero, in "
                f"{outcome.seconds:.2f} s: {outcome.source} {size_text(outcome.bytes_in)} in, {outcome.destination} "
                f"{size_text(outcome.bytes_out)} out, {counted(outcome.channels, 'channel')}"
                f"{ways(outcome.statistics)}; VM {outcome.uuid}, {outcome.source_address} to "
                f"{outcome.destination_address}{word(outcome)}"
            )

    with (
        Relay(
            arguments.listen,
            arguments.connect,
            source=arguments.source,
            to=arguments.to,
            uuid=arguments.uuid,
            channels=arguments.channels,
            page_size=arguments.page_size,
            drop_switchover_start=arguments.drop_switchover_start,
            find_zero_pages=arguments.find_zero_pages,
            listen_tls_creds=arguments.listen_tls_creds,
            connect_tls_creds=arguments.connect_tls_creds,
            connect_tls_hostname=arguments.connect_tls_hostname,
            rate=arguments.rate,
            observe=arguments.observe,
            timeout=arguments.timeout or DEFAULT_TIMEOUT,
            crew=arguments.crew,
        ) as relay,
        ProgressLine(arguments) as line,
        ExitStack() as stack,
    ):
        if arguments.metrics:
            from multifd.jobs.relay.metrics import serving

            say(f"metrics on {stack.enter_context(serving(arguments.metrics, relay.counters))}")
        say(f"listening on {relay.uri}")
        arguments.crew.patience = PATIENCE
        relay.serve(show, migrations=arguments.migrations, on_progress=line.show)
    return int(failed and arguments.migrations is not None)
