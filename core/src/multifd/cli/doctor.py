"""`multifd doctor`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from multifd.cli.commands import Run
from multifd.cli.options import seconds
from multifd.cli.output import emit, emit_json


def configure(parser: argparse.ArgumentParser) -> Run:
    """Its options."""
    parser.description = "Ask both QEMUs, change nothing, and say what would fail and how to set it."
    for side in ("source", "destination"):
        parser.add_argument(f"--{side}-qmp", required=True, metavar="SOCKET", help=f"the monitor of the {side}'s QEMU")
    parser.add_argument(
        "--timeout", type=seconds, default=5.0, metavar="SECONDS", help="how long a monitor may take to answer (5)"
    )
    return run


def run(arguments: argparse.Namespace) -> int:
    """Do it."""
    from multifd.jobs.doctor.compare import advise, compare
    from multifd.jobs.doctor.side import describe, examine
    from multifd.qemu.monitor import Monitor

    with Monitor(arguments.source_qmp, arguments.timeout, arguments.crew) as monitor:
        source = examine(monitor)
    with Monitor(arguments.destination_qmp, arguments.timeout, arguments.crew) as monitor:
        destination = examine(monitor)
    troubles = compare(source, destination)
    advice = advise(source, destination)
    if arguments.json:
        found = {
            "source": asdict(source),
            "destination": asdict(destination),
            "troubles": list(map(asdict, troubles)),
            "advice": list(map(asdict, advice)),
        }
        emit_json(found)
    else:
        emit(f"{'source':<13}{describe(source)}", f"{'destination':<13}{describe(destination)}")
        for trouble in troubles:
            emit(f"- {trouble.what}: {trouble.remedy}")
        for one in advice:
            emit(f"  {one.what}: {one.remedy}")
        if not troubles:
            emit("nothing is seen that would fail")
    return int(bool(troubles))
