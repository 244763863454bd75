"""`multifd receive`."""

from __future__ import annotations

import argparse

from multifd.cli.commands import Run
from multifd.cli.options import (
    LISTENING_CREDS,
    PAGE_SIZE_HELP,
    URI_HELP,
    observe_option,
    plugin_options,
    progress_option,
    seconds,
    size,
    timeout_option,
    uuid,
)
from multifd.cli.output import ProgressLine, report, say, tell


def configure(parser: argparse.ArgumentParser) -> Run:
    """Its options."""
    parser.description = "Take one migration and end.  Waits for the source without limit unless --timeout is given."
    plugin_options(parser)
    observe_option(parser)
    timeout_option(parser)
    progress_option(parser)
    parser.add_argument("uri", metavar="URI", help=f"{URI_HELP} to listen on (port 0: any), or recording:DIR")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="the snapshot to make; must not exist")
    parser.add_argument("--compressor", metavar="NAME", help="refuse packets of any other method")
    parser.add_argument("--channels", type=int, metavar="N", help="the source's multifd-channels (2)")
    parser.add_argument("--page-size", type=size, metavar="SIZE", help=PAGE_SIZE_HELP)
    parser.add_argument("--no-digest", action="store_true", help="make no digests at the end")
    parser.add_argument("--sha256", action="store_true", help="make the plain SHA-256 of each file, too")
    parser.add_argument(
        "--group", metavar="NAME", help="who may read the snapshot besides you: QEMU's group under libvirt (nobody)"
    )
    parser.add_argument(
        "--no-description", action="store_true", help="take a stream without VM description (suppress-vmdesc=on)"
    )
    parser.add_argument(
        "--missing-pages", action="store_true", help="take a stream in which pages never come (balloon, virtio-mem)"
    )
    parser.add_argument(
        "--idle-timeout", type=seconds, metavar="SECONDS", help="give up when nothing comes for so long (never)"
    )
    parser.add_argument("--tls-creds", metavar="DIR", help=f"expect TLS: {LISTENING_CREDS}")
    parser.add_argument("--uuid", type=uuid, metavar="UUID", help="take this VM's migration, and ignore any other")
    parser.add_argument("--qmp", metavar="SOCKET", help="the source QEMU's monitor: set it up, start it, watch it")
    parser.add_argument(
        "--then", choices=("stop", "resume", "quit"), default="stop", help="with --qmp: the guest afterwards (stop)"
    )
    parser.add_argument(
        "--stop-after",
        metavar="30s|5rounds",
        help="with --qmp: stop a guest that still runs then, at the end of a round of RAM, and send what is left",
    )
    parser.add_argument(
        "--max-bandwidth",
        type=size,
        metavar="SIZE",
        help="with --qmp: the most bytes per second that QEMU sends, with K, M or G (no limit)",
    )
    return run


def run(arguments: argparse.Namespace) -> int:
    """Do it."""
    from multifd.jobs.destination.receive import receive
    from multifd.net.deadline import DEFAULT_TIMEOUT

    with ProgressLine(arguments) as line:
        result = receive(
            arguments.uri,
            arguments.output,
            arguments.compressor,
            channels=arguments.channels,
            page_size=arguments.page_size,
            description_required=not arguments.no_description,
            missing_allowed=arguments.missing_pages,
            digests=not arguments.no_digest,
            sha256=arguments.sha256,
            group=arguments.group,
            timeout=arguments.timeout or DEFAULT_TIMEOUT,
            first_timeout=arguments.timeout,
            idle_timeout=arguments.idle_timeout,
            tls_creds=arguments.tls_creds,
            uuid=arguments.uuid,
            qmp=arguments.qmp,
            then=arguments.then,
            stop_after=arguments.stop_after,
            max_bandwidth=arguments.max_bandwidth,
            observe=arguments.observe,
            on_listening=lambda uri: say(f"listening on {uri}"),
            on_progress=line.show,
            on_digests=lambda: say(f"{arguments.output} is complete; its digests are being made"),
            crew=arguments.crew,
        )
    report(arguments, "received", result, {"snapshot": arguments.output})
    if result.digest and not arguments.json:
        tell(f"digest {result.digest}")
    return 0
