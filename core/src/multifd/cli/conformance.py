"""`multifd conformance`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from multifd.cli.commands import Run
from multifd.cli.options import plugin_options
from multifd.cli.output import emit, emit_json
from multifd.errors import UsageError


def configure(parser: argparse.ArgumentParser) -> Run:
    """Its options."""
    parser.description = "Run every check of the conformance suite on one compressor, each in a process of its own."
    parser.set_defaults(_alone=True)  # checks are forked
    plugin_options(parser)
    parser.add_argument("compressor", metavar="NAME[,key=value...]", help="see `multifd compressors`")
    parser.add_argument("--check", metavar="CHECK", action="append", help="only this one; may be repeated")
    return run


def run(arguments: argparse.Namespace) -> int:
    """Do it."""
    from multifd.codec.selection import load, names
    from multifd.codec.settings import Spec
    from multifd.testing import checks, runner

    spec = Spec.parse(arguments.compressor)
    if spec.name not in names():
        load(spec.name)  # says who is installed, and what is missing
    wanted = {check.name: check for check in checks.CHECKS}
    for name in arguments.check or ():
        if name not in wanted:
            raise UsageError(f"no check is named {name!r}; there are: {', '.join(wanted)}")
    outcomes = []
    for outcome in runner.run(spec, [wanted[name] for name in arguments.check or wanted]):
        outcomes.append(outcome)
        if not arguments.json:
            lines = f"{outcome.check:<24}{outcome.result:<11}{outcome}".rstrip().splitlines()
            emit(lines[0], *(f"    {line}" for line in lines[1:]))
    results = [outcome.result for outcome in outcomes]
    kept = not {runner.FAILED, runner.NOT_RUN} & set(results)
    if arguments.json:
        emit_json({"compressor": spec.name, "passed": kept, "checks": list(map(asdict, outcomes))})
        return int(not kept)
    verdict = "it keeps the contract"
    if not kept:
        verdict = "it breaks the contract" if runner.FAILED in results else "not all of it could be checked"
    counts = ", ".join(f"{results.count(result)} {result}" for result in dict.fromkeys(results))
    emit(f"{spec.name}: {counts}: {verdict}")
    return int(not kept)
