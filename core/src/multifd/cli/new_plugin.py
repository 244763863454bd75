"""`multifd new-plugin`."""

from __future__ import annotations

import argparse
import json

from multifd.cli.commands import Run
from multifd.cli.output import emit


def configure(parser: argparse.ArgumentParser) -> Run:
    """Its options."""
    parser.description = "Write a package with a compressor that works at once, to put another method into."
    parser.add_argument("name", metavar="NAME", help="the compressor's name: METHOD, or METHOD-suffix")
    parser.add_argument("--cffi", action="store_true", help="as an example that binds a C library")
    parser.add_argument("--into", default=".", metavar="DIR", help="where its directory multifd-NAME goes (.)")
    return run


def run(arguments: argparse.Namespace) -> int:
    """Do it."""
    from multifd import skeleton

    path = skeleton.write(arguments.name, arguments.into, cffi=arguments.cffi)
    if arguments.json:
        emit(json.dumps({"name": arguments.name, "path": str(path)}))
        return 0
    where = str(path) if path.is_absolute() else f"./{path}"
    emit(f"wrote {path}: pip install {where}, then multifd conformance {arguments.name}")
    return 0
