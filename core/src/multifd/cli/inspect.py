"""`multifd inspect`."""

from __future__ import annotations

import argparse

from multifd.cli.commands import Run
from multifd.cli.output import emit, emit_json


def configure(parser: argparse.ArgumentParser) -> Run:
    """Its options."""
    parser.description = "Describe a recording (main.bin, chK.bin) or a snapshot."
    parser.add_argument("path", metavar="RECORDING|SNAPSHOT")
    return run


def run(arguments: argparse.Namespace) -> int:
    """Do it."""
    from multifd.jobs.inspect import inspect

    found = inspect(arguments.path)
    if arguments.json:
        emit_json(found)
        return 0
    for key, value in found.items():
        if key == "blocks":
            for block in value:
                digest = block.get("sha256")
                emit(f"{'block':<19}{block['idstr']}: {block['used_length']} bytes" + (f", {digest}" if digest else ""))
        elif key == "disks":
            for disk in value or ():
                access = "read-only" if disk["read_only"] else "writable"
                emit(f"{'disk':<19}{disk['file']}: {disk['format']}, node {disk['node']}, {disk['device']}, {access}")
        elif value is not None:
            emit(f"{key.replace('_', ' '):<19}{value}")
    return 0
