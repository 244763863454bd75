"""`multifd bench`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from multifd.cli.commands import Run
from multifd.cli.options import RAW_HELP, SOURCE_HELP, bandwidth, count, plugin_options
from multifd.cli.output import emit, emit_json, print_table, rewrite, size_text
from multifd.errors import CallerError, counted, os_errors

if TYPE_CHECKING:
    from multifd.jobs.bench.model import Bench


def configure(parser: argparse.ArgumentParser) -> Run:
    """Its options."""
    parser.description = "Measure every compressor and level on packets of an image, and recommend one for the link."
    plugin_options(parser)
    parser.add_argument("--raw", action="store_true", help=RAW_HELP)
    parser.add_argument("path", metavar="IMAGE|SNAPSHOT", help=SOURCE_HELP)
    parser.add_argument(
        "--link", type=bandwidth, metavar="BANDWIDTH", help="the network's, as 10Gbit/s (a few usual ones)"
    )
    parser.add_argument(
        "--cores", type=count, default=2, metavar="N", help="cores for the channels of each side, one each (2)"
    )
    parser.add_argument("--svg", metavar="FILE", help="draw migration time over bandwidth")
    return run


def run(arguments: argparse.Namespace) -> int:
    """Do it."""
    from multifd.jobs.bench.measure import bench
    from multifd.jobs.bench.model import LINKS
    from multifd.jobs.bench.picture import picture

    folder = os.path.dirname(arguments.svg or "") or "."
    if not os.path.isdir(folder):
        raise CallerError(f"{folder} is not a directory: create it first")
    links = [arguments.link] if arguments.link else LINKS
    measuring = sys.stderr.isatty()
    on_setting = rewrite if measuring else None
    found = bench(arguments.path, cores=arguments.cores, raw=arguments.raw, on_setting=on_setting, crew=arguments.crew)
    if measuring:
        rewrite("")
    if arguments.json:
        emit_json(found.report(links))
    else:
        _print_bench(found, links)
    if arguments.svg:
        drawn = picture(found, links)
        with os_errors(arguments.svg), open(arguments.svg, "w") as file:
            file.write(drawn)
    return 0


def _print_bench(found: Bench, links: Sequence[float]) -> None:
    from multifd.jobs.bench.model import MODEL, bandwidth

    emit(
        f"{found.path}: {size_text(found.memory_bytes)}, {found.zero_bytes / found.looked_bytes:.0%} of it zero pages; "
        f"measured on {size_text(found.sampled_bytes)} of the others, in {counted(found.sampled_packets, 'packet')}"
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
                size_text(row.sampled_bytes),
            )
        )
    print_table(table, numbers=True)
    notes = (
        f"{row.compressor} works in software: {row.reason}"
        if row.sampled_bytes
        else f"{row.text} was not measured: {row.reason}"
        for row in found.rows
        if row.reason
    )
    for note in dict.fromkeys(notes):  # what holds for a compressor is said of each level
        emit(note)
    emit("", f"with {counted(found.cores, 'core')} on each side, {MODEL}")
    expected = [("LINK", "BEST", "SECONDS", "WITH NONE")]
    for link in links:
        best = found.recommend(link)
        seconds, without = (found.seconds(row, link) for row in (best, found.none))
        expected.append((bandwidth(link), f"--compressor {best.text}", f"{seconds:.4g}", f"{without:.4g}"))
    print_table(expected)
