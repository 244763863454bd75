"""`multifd compressors`."""

from __future__ import annotations

import argparse

from multifd.cli.commands import Run
from multifd.cli.options import plugin_options
from multifd.cli.output import emit, emit_json, print_table


def configure(parser: argparse.ArgumentParser) -> Run:
    """Its options."""
    parser.description = "List the installed compressors: whether each works here, with what, or why not."
    plugin_options(parser)
    return run


def run(arguments: argparse.Namespace) -> int:
    """Do it."""
    from multifd.codec.probing import compressors
    from multifd.codec.selection import distributions, how_to_install

    rows = compressors(arguments.crew)
    if arguments.json:
        emit_json(rows)
        return 0
    table = [("NAME", "METHOD", "FLAG", "AVAILABLE", "WITH")]
    for row in rows:
        state = ("hardware" if row["hardware"] else "software") if row["available"] else "no"
        detail = f"{row['provider']} {row['version']}".strip() if row["available"] else ""
        if row["devices"]:
            detail += f" on {', '.join(row['devices'])}"
        detail = "; ".join(filter(None, (detail, row["reason"], row["install"] if row["reason"] else "", row["note"])))
        table.append((row["name"], row["method"], str(row["flag"]), state, f"{detail} [{row['distribution']}]"))
    print_table(table)
    have = {row["name"] for row in rows}
    for name, distribution in distributions().items():
        if name not in have:
            emit(f"not installed: {name} ({how_to_install(distribution)})")
    return 0
