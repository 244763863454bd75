"""Which commands there are: multifd's own, and those that other packages bring.

An entry point of group `multifd.commands` is a command: its name the entry point's, its object a callable.

    def configure(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:

It is given the command's parser, which has `--json`, `--log`, `-v` and `--debug` (unless it brings its own of these
names), sets its `description`, adds its options, and returns what runs the command: given the parsed arguments, that
returns the exit code.  A MultifdError is told in one line, and so is whatever else is raised, as a fault in the plugin.
Nothing of it is imported before the command is called; a command of multifd's own keeps its name.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

from multifd.cli.stdout import is_of_another_package
from multifd.errors import HostError, MultifdError, describe

Run = Callable[[argparse.Namespace], int]
Configure = Callable[[argparse.ArgumentParser], Run]

#: Command -> its module here, and what it does.
OWN = {
    "compressors": ("compressors", "which compressors work here, and why not"),
    "receive": ("receive", "take one migration into a snapshot"),
    "send": ("send", "send memory to a destination"),
    "relay": ("relay", "stand between a source and a destination, and re-compress"),
    "doctor": ("doctor", "compare two QEMUs before anything moves"),
    "inspect": ("inspect", "what a recording or a snapshot holds"),
    "bench": ("bench", "which compressor pays on your own memory"),
    "conformance": ("conformance", "check that a compressor keeps the contract"),
    "new-plugin": ("new_plugin", "write the package of a new compressor"),
}


@dataclass(frozen=True, slots=True)
class Command:
    """One command; `configure` imports it, and raises MultifdError where it cannot be used."""

    name: str
    summary: str
    configure: Configure


def find(wanted: str) -> Iterator[Command]:
    """All commands, for who asks for `wanted`; those of other packages only where it is none of multifd's own."""
    for name, (module, summary) in OWN.items():
        yield Command(name, summary, _own(module))
    if wanted not in OWN:
        yield from _brought()


def _own(module: str) -> Configure:
    def configure(parser: argparse.ArgumentParser) -> Run:
        found: Configure = import_module(f"multifd.cli.{module}").configure
        return found(parser)

    return configure


def _brought() -> Iterator[Command]:
    from multifd.codec.discovery import choose, flaw, providers  # takes longer than all of the above
    from multifd.hookspecs import COMMAND_GROUP

    for name, found in sorted(providers(COMMAND_GROUP).items()):
        owners = " and ".join(sorted(map(str, found)))
        if name in OWN:
            # argparse takes a name once: this is a line of the help alone.
            yield Command(f"({name})", f"of {owners}: not used, multifd has a command of this name", _own(OWN[name][0]))
        elif len(found) > 1:
            yield Command(name, f"cannot be used: of {choose(found, COMMAND_GROUP)}", _brought_by(name))
        elif problem := flaw(found[0]):
            yield Command(name, f"cannot be used: of {owners}: {problem}", _brought_by(name))
        else:
            yield Command(name, f"of {owners}", _brought_by(name))


def _brought_by(name: str) -> Configure:
    def configure(parser: argparse.ArgumentParser) -> Run:
        from multifd.codec.discovery import load_plugin, provider_of
        from multifd.hookspecs import COMMAND_GROUP

        provider = provider_of(COMMAND_GROUP, "command", name)
        assert provider is not None, "it was found among them"

        @contextmanager
        def guarded() -> Iterator[None]:
            """A fault in the plugin becomes a line."""
            try:
                yield
            except (MultifdError, SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                raise HostError(f"the command {name} ({provider}) failed: {describe(error)}") from error

        def run(arguments: argparse.Namespace) -> int:
            is_of_another_package()
            with guarded():
                return int(its_run(arguments))

        with guarded():
            its_run: Run = load_plugin(provider)(parser)
        return run

    return configure
