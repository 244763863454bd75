"""The command line: options in, a result or one line of error out.

A thin layer: each command calls one function of the library, and only the one that is called is imported.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from multifd import __version__
from multifd.cli import commands
from multifd.cli.options import choose_plugins
from multifd.cli.output import say, show_warning
from multifd.cli.signals import Stopped, ignore_at_exit, leave_stuck, run_alone, run_beside, settle
from multifd.cli.stdout import protect
from multifd.crew import Crew
from multifd.errors import MultifdError, UsageError


def main(argv: Sequence[str]) -> int:
    """Run one command; returns the exit code: 0, 1 for an error, 2 for usage, 128 + its number for a signal."""
    protect()
    ignore_at_exit()  # at first: what plugins do at exit comes before it
    warnings.showwarning = show_warning
    warnings.simplefilter("always", RuntimeWarning)
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
        debug = arguments.debug
        arguments.crew = crew
        gc.freeze()  # what was imported lives to the end: do not look through it again and again

        def run() -> int:
            choose_plugins(arguments)
            code: int = arguments._run(arguments)
            sys.stdout.flush()
            return code

        return run_alone(run) if getattr(arguments, "_alone", False) else run_beside(run, crew)
    except BrokenPipeError:
        # Whoever read our output has gone; do not complain about it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 128 + signal.SIGINT
    except Stopped as stopped:
        if stopped.code == 128 + signal.SIGINT:
            say("interrupted")
        return stopped.code
    except MultifdError as error:
        if debug:
            import traceback

            traceback.print_exc()
        say(str(error))
        return 2 if isinstance(error, UsageError) else 1


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """For this command line: only its command has its options.  Raises MultifdError where a plugin's cannot be used."""
    parser = argparse.ArgumentParser(
        prog="multifd",
        description="QEMU's parallel migration channels: send, receive and look into guest memory, "
        "compressed by plugins.",
    )
    parser.add_argument("--version", action="version", version=f"multifd {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object at the end")
    common.add_argument("--debug", action="store_true", help="on an error, print where it came from")
    wanted = next((word for word in argv if not word.startswith("-")), "")
    known = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands.find(wanted):
        its = known.add_parser(command.name, parents=[common], help=command.summary.replace("%", "%%"))
        if command.name == wanted:
            its.set_defaults(_run=command.configure(its))
    return parser
