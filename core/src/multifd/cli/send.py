"""`multifd send`."""

from __future__ import annotations

import argparse

from multifd.cli.commands import Run
from multifd.cli.options import (
    CONNECTING_CREDS,
    RAW_HELP,
    SOURCE_HELP,
    URI_HELP,
    observe_option,
    plugin_options,
    progress_option,
    rate_option,
    size,
    timeout_option,
    uuid,
)
from multifd.cli.output import ProgressLine, report
from multifd.errors import UsageError


def configure(parser: argparse.ArgumentParser) -> Run:
    """Its options."""
    parser.description = "Send a snapshot or a raw memory image; succeeds when the destination has confirmed."
    plugin_options(parser)
    observe_option(parser)
    timeout_option(parser)
    progress_option(parser)
    rate_option(parser)
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("uri", metavar="URI", help=f"where the destination listens: {URI_HELP}")
    parser.add_argument(
        "--compressor",
        default="none",
        metavar="NAME[,key=value...]",
        help="see `multifd compressors` (none); NAME,level=adaptive follows the link; auto[,accepts=METHOD+METHOD...] "
        "takes the best that works here, adaptive[,accepts=...] changes while it sends, to a multifd",
    )
    parser.add_argument("--level", metavar="N", help="short for --compressor NAME,level=N")
    parser.add_argument("--channels", type=int, metavar="N", help="multifd channels (2)")
    parser.add_argument(
        "--zero-pages",
        choices=("multifd", "legacy", "none"),
        help="in the packets (the default for an image), on the main channel (right for every destination, the "
        "default for a snapshot), or as normal pages",
    )
    parser.add_argument("--raw", action="store_true", help=RAW_HELP)
    parser.add_argument("--block", default="pc.ram", metavar="NAME", help="an image's RAM block (pc.ram)")
    parser.add_argument("--page-size", type=size, metavar="SIZE", help="an image's page size: 1K to 64K (4K)")
    parser.add_argument("--uuid", type=uuid, metavar="UUID", help="the destination's VM uuid (the snapshot's)")
    parser.add_argument(
        "--sync",
        choices=("section", "round"),
        help="a sync point per section, for machine types up to 8.0, or per round, for newer ones (the snapshot's)",
    )
    parser.add_argument("--tls-creds", metavar="DIR", help=f"use TLS: {CONNECTING_CREDS}")
    parser.add_argument("--tls-hostname", metavar="NAME", help="what the destination's certificate names (URI's host)")
    parser.add_argument(
        "--qmp", metavar="SOCKET", help="the monitor of the destination's QEMU, started with -incoming defer: set it up"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not check what is read of a snapshot against its digests"
    )
    return run


def run(arguments: argparse.Namespace) -> int:
    """Do it."""
    from multifd.jobs.report import DEFAULT_CHANNELS
    from multifd.jobs.source.send import send
    from multifd.net.deadline import DEFAULT_TIMEOUT
    from multifd.snapshot.reader import open_snapshot

    if not 0 < len(arguments.block.encode()) < 256 or not arguments.block.isascii():
        raise UsageError(f"block name {arguments.block!r}: 1 to 255 ASCII characters")
    compressor = arguments.compressor
    if arguments.level is not None:
        compressor += f",level={arguments.level}"
    source = open_snapshot(arguments.source, block=arguments.block, page_size=arguments.page_size, raw=arguments.raw)
    with ProgressLine(arguments) as line:
        result = send(
            source,
            arguments.uri,
            compressor,
            channels=DEFAULT_CHANNELS if arguments.channels is None else arguments.channels,
            zero_pages=arguments.zero_pages,
            sync=arguments.sync,
            uuid=arguments.uuid,
            timeout=arguments.timeout or DEFAULT_TIMEOUT,
            tls_creds=arguments.tls_creds,
            tls_hostname=arguments.tls_hostname,
            rate=arguments.rate,
            qmp=arguments.qmp,
            verify=not arguments.no_verify,
            observe=arguments.observe,
            on_progress=line.show,
            crew=arguments.crew,
        )
    report(arguments, "sent", result, {})
    return 0
