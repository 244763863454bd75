"""One plugin's hooks: every call of any plugin goes through `Hooks.call`, which names what it raises."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

import pluggy

from multifd.errors import MultifdError
from multifd.hookspecs import PROJECT

#: What a plugin may raise instead of returning, wherever that is.
HOOK_ERRORS = (Exception, SystemExit, GeneratorExit)


def check_own(error: BaseException) -> None:
    """Raises what came out of a plugin's code and is not its own: what signals raise, in the main thread only."""
    if not isinstance(error, HOOK_ERRORS) and threading.current_thread() is threading.main_thread():
        raise error


class Hooks:
    """A plugin with a PluginManager of its own, so that no hook reaches another."""

    def __init__(self, specs: ModuleType, plugin: object) -> None:
        """Raises what registering does, where the plugin does not fit `specs`."""
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(specs)
        manager.register(plugin)
        manager.check_pending()
        self.hook = manager.hook

    def call(self, hook: str, /, *, doing: str = "", **arguments: object) -> Any:
        """Call a hook and return its result; `doing` says in messages what for, else the hook's name does.

        Raises what `failed` makes of an error.
        """
        try:
            return getattr(self.hook, hook)(**arguments)
        except BaseException as error:
            check_own(error)
            failed = self.failed(doing or hook, error)
            if failed is error:
                raise
            raise failed from error

    def failed(self, doing: str, error: BaseException) -> MultifdError:
        """What a hook raised, as an error that says in which plugin, and what was being done."""
        raise NotImplementedError
