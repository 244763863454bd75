"""The command line: options in, a result or one line of error out.

A thin layer: each command calls one function of the library, and only the one that is called is imported.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

from multifd import __version__
from multifd.cli import commands, lines, records
from multifd.cli.options import choose_plugins
from multifd.cli.output import emit
from multifd.cli.signals import Stopped, ignore_at_exit, leave_stuck, run_alone, run_beside, settle
from multifd.cli.stdout import protect
from multifd.crew import Crew
from multifd.errors import MultifdError, UsageError
from multifd.log import escaped, log, take_warnings


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code: 0, 1 for an error, 2 for usage, 128 + its number for a signal."""
    ignore_at_exit()  # at first: what plugins do at exit comes before it
    lines.take_places()
    protect()
    as_json = "--log=json" in argv or ("--log", "json") in pairwise(argv)  # until options are read
    records.begin(lines.stderr, as_json=as_json, verbose=not {"-v", "--verbose"}.isdisjoint(argv))
    take_warnings()
    crew = Crew()
    code = _run(argv, crew)
    settle(code)
    if names := crew.stuck():
        leave_stuck(code, names)
    return code


def _run(argv: Sequence[str], crew: Crew) -> int:
    debug = "--debug" in argv
    try:
        arguments = _parser(argv).parse_args(argv)
        debug = getattr(arguments, "debug", debug)
        if getattr(arguments, "log", "") in ("text", "json"):  # another package's command may have one of its own
            records.begin(
                lines.stderr, as_json=arguments.log == "json", verbose=bool(getattr(arguments, "verbose", False))
            )
        arguments.crew = crew
        gc.freeze()  # what was imported lives to the end: do not look through it again and again

        def run() -> int:
            choose_plugins(arguments)
            code: int = arguments._run(arguments)
            sys.stdout.flush()  # a command of another package prints
            return code

        return run_alone(run) if getattr(arguments, "_alone", False) else run_beside(run, crew)
    except KeyboardInterrupt:
        log.error("interrupted")
        return 128 + signal.SIGINT
    except Stopped as stopped:
        if stopped.code == 128 + signal.SIGINT:
            log.error("interrupted")
        return stopped.code
    except MultifdError as error:
        if debug:
            import traceback

            for line in traceback.format_exc().splitlines():
                log.error(line)
        log.error(str(error))
        return 2 if isinstance(error, UsageError) else 1


class _Parser(argparse.ArgumentParser):
    """Its words go where all others do: help is what a command is for, a wrong option is an error in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        #: Whose help says more: argparse finds an unknown option of a command only where all of the line is read.
        self.helper = self.prog

    def error(self, message: str) -> NoReturn:
        where = self.helper.removeprefix("multifd").strip()
        raise UsageError(f"{where}: {message}; see {self.helper} --help".lstrip(": "))

    def _print_message(self, message: str, file: object = None) -> None:  # noqa: ARG002 - of help, and the version
        emit(*message.rstrip("\n").split("\n"))


def _parser(argv: Sequence[str]) -> _Parser:
    """For this command line: only its command has its options.  Raises MultifdError where a plugin's cannot be used."""
    parser = _Parser(
        prog="multifd",
        description="QEMU's parallel migration channels: send, receive and look into guest memory, "
        "compressed by plugins.",
    )
    parser.add_argument("--version", action="version", version=f"multifd {__version__}")
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object at the end")
    common.add_argument("-v", "--verbose", action="store_true", help="say what was decided, and why")
    common.add_argument(
        "--log", choices=("text", "json"), default="text", help="what is said on standard error, for people or machines"
    )
    common.add_argument("--debug", action="store_true", help="on an error, print where it came from")
    wanted = next((word for word in argv if not word.startswith("-")), "")
    known = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands.find(wanted):
        its = known.add_parser(
            command.name,
            parents=[common],
            help=escaped(command.summary).replace("%", "%%"),
            conflict_handler="error" if command.name in commands.OWN else "resolve",
        )
        if command.name == wanted:
            its.set_defaults(_run=command.configure(its))
            parser.helper = its.prog
    return parser
