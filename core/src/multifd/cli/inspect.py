"""`multifd inspect`."""

from __future__ import annotations

import argparse
import json

from multifd.cli.commands import Run


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
        print(json.dumps(found, indent=2))
        return 0
    for key, value in found.items():
        if key == "blocks":
            for block in value:
                digest = block.get("sha256")
                text = f"{block['idstr']}: {block['used_length']} bytes" + (f", {digest}" if digest else "")
                print(f"{'block':<19}{_visible(text)}")
        elif value is not None:
            print(f"{key.replace('_', ' '):<19}{_visible(value)}")
    return 0


def _visible(value: object) -> str:
    """What somebody else wrote, as letters that do nothing to a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(value))
