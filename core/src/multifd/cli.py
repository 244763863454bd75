"""The command line: options in, a result or one line of error out.

A thin layer: each command calls one function of the library, imported when it is needed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from multifd import __version__
from multifd.errors import CallerError, HostError, MultifdError, UsageError, counted

if TYPE_CHECKING:
    from multifd.bench import Bench
    from multifd.migrate import OnProgress, Progress, Result

SOURCE_HELP = "a raw memory image, or a snapshot's directory"
WAKE_SECONDS = 0.25
URI_HELP = "tcp:HOST:PORT or unix:PATH"
LISTENING_CREDS = "a directory with ca-cert.pem, server-cert.pem, server-key.pem, as QEMU's tls-creds-x509"
CONNECTING_CREDS = "a directory with ca-cert.pem, client-cert.pem, client-key.pem, as QEMU's tls-creds-x509"


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    arguments = _parser().parse_args(argv)
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", RuntimeWarning)
    gc.freeze()  # what was imported lives to the end: do not look through it again and again
    try:
        with _signals():
            if getattr(arguments, "disable", None) or getattr(arguments, "plugin", None):
                _choose_plugins(arguments)
            code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has gone; do not complain about it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except MultifdError as error:
        if arguments.debug:
            traceback.print_exc()
        _say(str(error))
        return 2 if isinstance(error, UsageError) else 1


def _say(text: str) -> None:
    """One line."""
    print(f"multifd: {text}".replace("\n", " "), file=sys.stderr, flush=True)


def _choose_plugins(arguments: argparse.Namespace) -> None:
    """Before anything is loaded."""
    from multifd import plugins

    plugins.disable(arguments.disable)
    for path in arguments.plugin:
        plugins.add_file(path)


_warned: set[str] = set()


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Each text once: many channels have the same to say."""
    if str(message) not in _warned:
        _warned.add(str(message))
        _say(f"warning: {message}")


@contextmanager
def _signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the command through its cleaning up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    # A signal that comes just before a lock or a read blocks is seen only when that returns.
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, WAKE_SECONDS, WAKE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # at exit Python gives SIGALRM back its deadly default


def _stop(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # who asks twice does not want to wait for cleaning up
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="multifd",
        description="QEMU's parallel migration channels: send, receive and look into guest memory, "
        "compressed by plugins.",
    )
    parser.add_argument("--version", action="version", version=f"multifd {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object at the end")
    common.add_argument("--debug", action="store_true", help="on an error, print where it came from")
    plugged = argparse.ArgumentParser(add_help=False)
    plugged.add_argument(
        "--disable",
        action="append",
        default=[],
        metavar="NAME",
        help="leave out what a distribution provides, or else a plugin of this name; repeatable, as is MULTIFD_DISABLE",
    )
    plugged.add_argument(
        "--plugin", action="append", default=[], metavar="FILE.py", help="a compressor under development; repeatable"
    )
    observed = argparse.ArgumentParser(add_help=False)
    observed.add_argument(
        "--observe",
        action="append",
        default=[],
        metavar="NAME[=ARG]",
        help="who looks on: stats[=FILE], trace[=FILE], record=DIR, or an installed one; repeatable",
    )
    timed = argparse.ArgumentParser(add_help=False)
    timed.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="bounds connecting, first bytes and a SYNC that others wait for (30)",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser(
        "compressors",
        parents=[common, plugged],
        help="which compressors work here, and why not",
        description="List the installed compressors: whether each works here, with what, or why not.",
    )
    command.set_defaults(run=_compressors)

    command = commands.add_parser(
        "receive",
        parents=[common, plugged, observed, timed],
        help="take one migration into a snapshot",
        description="Take one migration and end.  Waits for the source without limit unless --timeout is given.",
    )
    command.add_argument("uri", metavar="URI", help=f"{URI_HELP} to listen on (port 0: any), or recording:DIR")
    command.add_argument("-o", "--output", required=True, metavar="DIR", help="the snapshot to make; must not exist")
    command.add_argument("--compressor", metavar="NAME", help="refuse packets of any other method")
    command.add_argument("--channels", type=int, metavar="N", help="the source's multifd-channels (2)")
    command.add_argument(
        "--page-size", type=_size, metavar="SIZE", help="assumed where the stream names none: 4K, 16K or 64K (4K)"
    )
    command.add_argument("--no-digest", action="store_true", help="do not compute the blocks' SHA-256 at the end")
    command.add_argument(
        "--no-description", action="store_true", help="take a stream without VM description (suppress-vmdesc=on)"
    )
    command.add_argument(
        "--missing-pages", action="store_true", help="take a stream in which pages never come (balloon, virtio-mem)"
    )
    command.add_argument(
        "--idle-timeout", type=_seconds, metavar="SECONDS", help="give up when nothing comes for so long (never)"
    )
    command.add_argument("--tls-creds", metavar="DIR", help=f"expect TLS: {LISTENING_CREDS}")
    command.add_argument("--qmp", metavar="SOCKET", help="the source QEMU's monitor: set it up, start it, watch it")
    command.add_argument(
        "--then", choices=("stop", "resume", "quit"), default="stop", help="with --qmp: the guest afterwards (stop)"
    )
    command.set_defaults(run=_receive)

    command = commands.add_parser(
        "send",
        parents=[common, plugged, observed, timed],
        help="send memory to a destination",
        description="Send a snapshot or a raw memory image; succeeds when the destination has confirmed.",
    )
    command.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    command.add_argument("uri", metavar="URI", help=f"where the destination listens: {URI_HELP}")
    command.add_argument(
        "--compressor",
        default="none",
        metavar="NAME[,key=value...]",
        help="see `multifd compressors` (none); NAME,level=adaptive follows the link; auto[,accepts=METHOD+METHOD...] "
        "takes the best that works here, adaptive[,accepts=...] changes while it sends, to a multifd",
    )
    command.add_argument("--level", metavar="N", help="short for --compressor NAME,level=N")
    command.add_argument("--channels", type=int, metavar="N", help="multifd channels (2)")
    command.add_argument(
        "--zero-pages",
        choices=("multifd", "legacy", "none"),
        help="in the packets (the default for an image), on the main channel (right for every destination, the "
        "default for a snapshot), or as normal pages",
    )
    command.add_argument("--block", default="pc.ram", metavar="NAME", help="an image's RAM block (pc.ram)")
    command.add_argument("--page-size", type=_size, metavar="SIZE", help="an image's page size: 4K, 16K or 64K (4K)")
    command.add_argument("--uuid", type=_uuid, metavar="UUID", help="the destination's VM uuid (the snapshot's)")
    command.add_argument(
        "--sync",
        choices=("section", "round"),
        help="a sync point per section, for machine types up to 8.0, or per round, for newer ones (the snapshot's)",
    )
    command.add_argument("--tls-creds", metavar="DIR", help=f"use TLS: {CONNECTING_CREDS}")
    command.add_argument("--tls-hostname", metavar="NAME", help="what the destination's certificate names (URI's host)")
    command.add_argument(
        "--qmp", metavar="SOCKET", help="the monitor of the destination's QEMU, started with -incoming defer: set it up"
    )
    command.set_defaults(run=_send)

    command = commands.add_parser(
        "relay",
        parents=[common, plugged, observed, timed],
        help="stand between a source and a destination, and re-compress",
        description="Serve one migration after another until told to stop; re-compress each packet on its way.",
    )
    command.add_argument("--listen", required=True, metavar="URI", help=f"where the source connects: {URI_HELP}")
    command.add_argument("--connect", required=True, metavar="URI", help=f"where the destination listens: {URI_HELP}")
    command.add_argument("--from", dest="source", metavar="NAME", help="refuse packets of any other method")
    command.add_argument(
        "--to",
        metavar="NAME[,key=value...]",
        help="the compressor to write with (payloads pass as they are), as for `multifd send`",
    )
    command.add_argument("--channels", type=int, metavar="N", help="the most channels that a source may use")
    command.add_argument("--uuid", type=_uuid, metavar="UUID", help="the destination's VM uuid, where it differs")
    command.add_argument(
        "--drop-switchover-start", action="store_true", help="take out a command that a destination before 10.0 refuses"
    )
    command.add_argument(
        "--find-zero-pages",
        action="store_true",
        help="look for zero pages that the source did not mark (for a destination of 9.0 or newer with fresh memory)",
    )
    command.add_argument("--listen-tls-creds", metavar="DIR", help=f"expect TLS of the source: {LISTENING_CREDS}")
    command.add_argument("--connect-tls-creds", metavar="DIR", help=f"use TLS to the destination: {CONNECTING_CREDS}")
    command.add_argument(
        "--connect-tls-hostname", metavar="NAME", help="what the destination's certificate names (its URI's host)"
    )
    command.add_argument("--metrics", metavar="tcp:HOST:PORT", help="answer GET /metrics there, as Prometheus reads it")
    command.add_argument("--migrations", type=int, metavar="N", help="end after so many (never)")
    command.set_defaults(run=_relay)

    command = commands.add_parser(
        "doctor",
        parents=[common],
        help="compare two QEMUs before anything moves",
        description="Ask both QEMUs, change nothing, and say what would fail and how to set it.",
    )
    for side in ("source", "destination"):
        command.add_argument(f"--{side}-qmp", required=True, metavar="SOCKET", help=f"the monitor of the {side}'s QEMU")
    command.set_defaults(run=_doctor)

    command = commands.add_parser(
        "inspect",
        parents=[common],
        help="what a recording or a snapshot holds",
        description="Describe a recording (main.bin, chK.bin) or a snapshot.",
    )
    command.add_argument("path", metavar="RECORDING|SNAPSHOT")
    command.set_defaults(run=_inspect)

    command = commands.add_parser(
        "bench",
        parents=[common, plugged],
        help="which compressor pays on your own memory",
        description="Measure every compressor and level on packets of an image, and recommend one for the link.",
    )
    command.add_argument("path", metavar="IMAGE|SNAPSHOT", help=SOURCE_HELP)
    command.add_argument(
        "--link", type=_bandwidth, metavar="BANDWIDTH", help="the network's, as 10Gbit/s (a few usual ones)"
    )
    command.add_argument(
        "--cores", type=_count, default=2, metavar="N", help="cores for the channels of each side, one each (2)"
    )
    command.add_argument("--svg", metavar="FILE", help="draw migration time over bandwidth")
    command.set_defaults(run=_bench)
    _add_authors_commands(commands, common)
    return parser


def _add_authors_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """For those who write a compressor."""
    command = commands.add_parser(
        "conformance",
        parents=[common],
        help="check that a compressor keeps the contract",
        description="Run every check of the conformance suite on one compressor, each in a process of its own.",
    )
    command.add_argument("compressor", metavar="NAME[,key=value...]", help="see `multifd compressors`")
    command.add_argument("--check", metavar="CHECK", action="append", help="only this one; may be repeated")
    command.set_defaults(run=_conformance)

    command = commands.add_parser(
        "new-plugin",
        parents=[common],
        help="write the package of a new compressor",
        description="Write a package with a compressor that works at once, to put another method into.",
    )
    command.add_argument("name", metavar="NAME", help="the compressor's name: METHOD, or METHOD-suffix")
    command.add_argument("--cffi", action="store_true", help="as an example that binds a C library")
    command.add_argument("--into", default=".", metavar="DIR", help="where its directory multifd-NAME goes (.)")
    command.set_defaults(run=_new_plugin)


def _conformance(arguments: argparse.Namespace) -> int:
    from multifd import plugins
    from multifd.testing import checks, runner

    spec = plugins.Spec.parse(arguments.compressor)
    if spec.name not in plugins.names():
        plugins.load(spec.name)  # says who is installed, and what is missing
    wanted = {check.name: check for check in checks.CHECKS}
    for name in arguments.check or ():
        if name not in wanted:
            raise UsageError(f"no check is named {name!r}; there are: {', '.join(wanted)}")
    outcomes = []
    for outcome in runner.run(spec, [wanted[name] for name in arguments.check or wanted]):
        outcomes.append(outcome)
        if not arguments.json:
            lines = f"{outcome.check:<24}{outcome.result:<11}{outcome}".rstrip().splitlines()
            print("\n    ".join(lines), flush=True)
    results = [outcome.result for outcome in outcomes]
    kept = not {runner.FAILED, runner.NOT_RUN} & set(results)
    if arguments.json:
        print(json.dumps({"compressor": spec.name, "passed": kept, "checks": list(map(asdict, outcomes))}, indent=2))
        return int(not kept)
    verdict = "it keeps the contract"
    if not kept:
        verdict = "it breaks the contract" if runner.FAILED in results else "not all of it could be checked"
    counts = ", ".join(f"{results.count(result)} {result}" for result in dict.fromkeys(results))
    print(f"{spec.name}: {counts}: {verdict}")
    return int(not kept)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a time in seconds")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _bandwidth(text: str) -> float:
    """Bits per second."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt])bit/s", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no bandwidth: write 10Gbit/s or 100Mbit/s")
    return float(found[1]) * 1000.0 ** ("kmgt".index(found[2].lower()) + 1)


def _size(text: str) -> int:
    number = text.upper().removesuffix("K")
    return int(number) * (1024 if number != text.upper() else 1)


def _uuid(text: str) -> bytes:
    import uuid

    try:
        return uuid.UUID(text).bytes
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a uuid") from None


def _compressors(arguments: argparse.Namespace) -> int:
    from multifd import plugins

    rows = plugins.rows()
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = [("NAME", "METHOD", "FLAG", "AVAILABLE", "WITH")]
    for row in rows:
        state = ("hardware" if row["hardware"] else "software") if row["available"] else "no"
        detail = f"{row['provider']} {row['version']}".strip() if row["available"] else ""
        if row["devices"]:
            detail += f" on {', '.join(row['devices'])}"
        detail = "; ".join(filter(None, (detail, row["reason"], row["install"] if row["reason"] else "")))
        table.append((row["name"], row["method"], str(row["flag"]), state, f"{detail} [{row['distribution']}]"))
    _print_table(table)
    have = {row["name"] for row in rows}
    for name, distribution in plugins.OURS.items():
        if name not in have:
            print(f"not installed: {name} (pip install {distribution})")
    return 0


def _receive(arguments: argparse.Namespace) -> int:
    from multifd import migrate

    with _ProgressLine() as line:
        result = migrate.receive(
            arguments.uri,
            arguments.output,
            arguments.compressor,
            channels=arguments.channels,
            page_size=arguments.page_size,
            description_required=not arguments.no_description,
            missing_allowed=arguments.missing_pages,
            digests=not arguments.no_digest,
            timeout=arguments.timeout or migrate.DEFAULT_TIMEOUT,
            first_timeout=arguments.timeout,
            idle_timeout=arguments.idle_timeout,
            tls_creds=arguments.tls_creds,
            qmp=arguments.qmp,
            then=arguments.then,
            observe=arguments.observe,
            on_listening=lambda uri: _say(f"listening on {uri}"),
            on_progress=line.show,
        )
    _report(arguments, "received", result, {"snapshot": arguments.output})
    return 0


def _send(arguments: argparse.Namespace) -> int:
    from multifd import migrate
    from multifd.snapshot import open_source

    if not 0 < len(arguments.block.encode()) < 256 or not arguments.block.isascii():
        raise UsageError(f"block name {arguments.block!r}: 1 to 255 ASCII characters")
    compressor = arguments.compressor
    if arguments.level is not None:
        compressor += f",level={arguments.level}"
    source = open_source(arguments.source, block=arguments.block, page_size=arguments.page_size)
    with _ProgressLine() as line:
        result = migrate.send(
            source,
            arguments.uri,
            compressor,
            channels=migrate.DEFAULT_CHANNELS if arguments.channels is None else arguments.channels,
            zero_pages=arguments.zero_pages,
            sync=arguments.sync,
            uuid=arguments.uuid,
            timeout=arguments.timeout or migrate.DEFAULT_TIMEOUT,
            tls_creds=arguments.tls_creds,
            tls_hostname=arguments.tls_hostname,
            qmp=arguments.qmp,
            observe=arguments.observe,
            on_progress=line.show,
        )
    _report(arguments, "sent", result, {})
    return 0


def _relay(arguments: argparse.Namespace) -> int:
    from multifd.migrate import DEFAULT_TIMEOUT
    from multifd.relay import Relay, Relayed

    failed = False

    def show(outcome: Relayed | MultifdError) -> None:
        nonlocal failed
        failed = isinstance(outcome, MultifdError)
        if isinstance(outcome, MultifdError):
            _say(str(outcome))
        elif arguments.json:
            print(json.dumps(asdict(outcome)), flush=True)
        else:
            print(
                f"relayed {outcome.normal_pages + outcome.zero_pages} pages, {outcome.zero_pages} of them zero, in "
                f"{outcome.seconds:.2f} s: {outcome.source} {_bytes(outcome.bytes_in)} in, {outcome.destination} "
                f"{_bytes(outcome.bytes_out)} out, {counted(outcome.channels, 'channel')}"
                f"{_ways(outcome.statistics)}",
                flush=True,
            )

    with (
        Relay(
            arguments.listen,
            arguments.connect,
            source=arguments.source,
            to=arguments.to,
            uuid=arguments.uuid,
            channels=arguments.channels,
            drop_switchover_start=arguments.drop_switchover_start,
            find_zero_pages=arguments.find_zero_pages,
            listen_tls_creds=arguments.listen_tls_creds,
            connect_tls_creds=arguments.connect_tls_creds,
            connect_tls_hostname=arguments.connect_tls_hostname,
            observe=arguments.observe,
            timeout=arguments.timeout or DEFAULT_TIMEOUT,
        ) as relay,
        ExitStack() as stack,
    ):
        if arguments.metrics:
            from multifd.metrics import serving

            _say(f"metrics on {stack.enter_context(serving(arguments.metrics, relay.counters))}")
        _say(f"listening on {relay.uri}")
        stack.enter_context(suppress(KeyboardInterrupt, SystemExit))  # it serves until it is told to stop
        relay.serve(show, migrations=arguments.migrations)
    return int(failed and arguments.migrations is not None)


def _report(arguments: argparse.Namespace, verb: str, result: Result, more: dict[str, Any]) -> None:
    if arguments.json:
        print(json.dumps(asdict(result) | more))
        return
    rate = result.memory_bytes / max(result.seconds, 1e-9)
    pages = result.normal_pages + result.zero_pages
    channels = counted(result.channels, "channel")
    target = f" into {more['snapshot']}" if more else ""
    print(
        f"{verb} {_bytes(result.memory_bytes)} in {result.seconds:.2f} s ({_bytes(rate)}/s){target}: {pages} pages, "
        f"{result.zero_pages} of them zero; {_bytes(result.wire_bytes)} on the wire (ratio "
        f"{result.memory_bytes / max(result.wire_bytes, 1):.2f}), {channels}, {result.compressor}"
        f"{_ways(result.statistics)}"
    )


def _ways(statistics: dict[str, int]) -> str:
    """What the compressors counted, in brackets; empty where there is but one way."""
    ways = ", ".join(f"{count} {way}" for way, count in sorted(statistics.items()))
    return f" (packets: {ways})" if ways else ""


def _doctor(arguments: argparse.Namespace) -> int:
    from multifd import doctor
    from multifd.qmp import Monitor

    with Monitor(arguments.source_qmp) as monitor:
        source = doctor.examine(monitor)
    with Monitor(arguments.destination_qmp) as monitor:
        destination = doctor.examine(monitor)
    troubles = doctor.compare(source, destination)
    if arguments.json:
        found = {"source": asdict(source), "destination": asdict(destination), "troubles": list(map(asdict, troubles))}
        print(json.dumps(found, indent=2))
    else:
        print(f"{'source':<13}{doctor.describe(source)}\n{'destination':<13}{doctor.describe(destination)}")
        for trouble in troubles:
            print(f"- {trouble.what}: {trouble.remedy}")
        if not troubles:
            print("nothing is seen that would fail")
    return int(bool(troubles))


def _inspect(arguments: argparse.Namespace) -> int:
    from multifd.inspect import inspect

    found = inspect(arguments.path)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for key, value in found.items():
        if key == "blocks":
            for block in value:
                digest = block.get("sha256")
                print(
                    f"{'block':<19}{block['idstr']}: {block['used_length']} bytes" + (f", {digest}" if digest else "")
                )
        elif value is not None:
            print(f"{key.replace('_', ' '):<19}{value}")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from multifd import bench

    folder = os.path.dirname(arguments.svg or "") or "."
    if not os.path.isdir(folder):
        raise CallerError(f"{folder} is not a directory: create it first")
    links = [arguments.link] if arguments.link else bench.LINKS
    measuring = sys.stderr.isatty()
    found = bench.bench(arguments.path, cores=arguments.cores, on_setting=_rewrite if measuring else None)
    if measuring:
        _rewrite("")
    if arguments.json:
        print(json.dumps(found.report(links), indent=2))
    else:
        _print_bench(found, links)
    if arguments.svg:
        picture = bench.picture(found, links)
        try:
            with open(arguments.svg, "w") as file:
                file.write(picture)
        except OSError as error:
            raise HostError(f"{arguments.svg}: {error.strerror}") from error
    return 0


def _print_bench(found: Bench, links: Sequence[float]) -> None:
    from multifd.bench import MODEL, bandwidth

    print(
        f"{found.path}: {_bytes(found.memory_bytes)}, {found.zero_bytes / found.looked_bytes:.0%} of it zero pages; "
        f"measured on {_bytes(found.sampled_bytes)} of the others, in {counted(found.sampled_packets, 'packet')}"
    )
    table = [("SETTING", "ENCODE MB/s", "DECODE MB/s", "RATIO", "CPU s/GB", "PAYS BELOW", "MEASURED ON")]
    for row in found.measured:
        below = found.pays_below(row)
        table.append(
            (
                row.text,
                f"{row.encode_mb_per_s:.0f}",
                f"{row.decode_mb_per_s:.0f}",
                f"{row.ratio:.2f}",
                f"{row.encode_cpu_s_per_gb + row.decode_cpu_s_per_gb:.2f}",
                "" if row is found.none else bandwidth(below) if below else "never",
                _bytes(row.sampled_bytes),
            )
        )
    _print_table(table, numbers=True)
    notes = (
        f"{row.compressor} works in software: {row.reason}"
        if row.sampled_bytes
        else f"{row.text} was not measured: {row.reason}"
        for row in found.rows
        if row.reason
    )
    for note in dict.fromkeys(notes):  # what holds for a compressor is said of each level
        print(note)
    print(f"\nwith {counted(found.cores, 'core')} on each side, {MODEL}")
    expected = [("LINK", "BEST", "SECONDS", "WITH NONE")]
    for link in links:
        best = found.recommend(link)
        seconds, without = (found.seconds(row, link) for row in (best, found.none))
        expected.append((bandwidth(link), f"--compressor {best.text}", f"{seconds:.4g}", f"{without:.4g}"))
    _print_table(expected)


def _print_table(table: Sequence[Sequence[str]], *, numbers: bool = False) -> None:
    """Columns two spaces apart; `numbers` are to the right, but for the first column."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *line in table:
        cells = [
            cell.rjust(width) if numbers else cell.ljust(width) for cell, width in zip(line, widths[1:], strict=True)
        ]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def _rewrite(text: str) -> None:
    """One line on the terminal instead of what stood there."""
    print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _new_plugin(arguments: argparse.Namespace) -> int:
    from multifd import skeleton

    path = skeleton.write(arguments.name, arguments.into, cffi=arguments.cffi)
    if arguments.json:
        print(json.dumps({"name": arguments.name, "path": str(path)}))
        return 0
    where = str(path) if path.is_absolute() else f"./{path}"
    print(f"wrote {path}: pip install {where}, then multifd conformance {arguments.name}")
    return 0


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


class _ProgressLine:
    """One line on the terminal, rewritten; `show` is None where there is no terminal."""

    def __init__(self) -> None:
        self.show: OnProgress | None = self._show if sys.stderr.isatty() else None
        self._last: Progress | None = None

    def __enter__(self) -> _ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._last is not None:
            _rewrite("")

    def _show(self, progress: Progress) -> None:
        last = self._last
        seconds = progress.seconds - last.seconds if last else progress.seconds
        memory = progress.memory_bytes - last.memory_bytes if last else progress.memory_bytes
        self._last = progress
        ratio = progress.memory_bytes / max(progress.wire_bytes, 1)
        left = max(progress.total_pages - progress.pages, 0)
        _rewrite(f"{_bytes(max(memory, 0) / max(seconds, 1e-9))}/s, ratio {ratio:.2f}, {left} pages left")
