"""What a migration changes on a QEMU, and puts back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from multifd.errors import MultifdError
from multifd.log import log
from multifd.net.connection import Ended, Lost, Stalled
from multifd.qemu.monitor import Monitor, of

#: Capabilities that send memory or state another way than over multifd's packets.
OTHER_WAYS = ("mapped-ram", "x-colo", "background-snapshot")
#: Compression of pages on the main channel, which QEMU refuses beside multifd or ignores.
OTHER_COMPRESSION = ("xbzrle", "compress")
#: Those that two QEMUs can use with each other, and that have no place where one end of a migration is ours.  Each goes
#: together with what depends on it: postcopy-preempt is refused without postcopy-ram.  zero-copy-send is refused
#: beside a compression, and fails on a unix socket.
BETWEEN_QEMUS = (
    "x-ignore-shared",
    "block",
    "postcopy-ram",
    "postcopy-preempt",
    "dirty-bitmaps",
    "switchover-ack",
    "pause-before-switchover",
    "zero-copy-send",
)
OFF = dict.fromkeys((*OTHER_WAYS, *OTHER_COMPRESSION, *BETWEEN_QEMUS), False)

#: max-bandwidth, in bytes per second, that is no limit; every QEMU takes it, and libvirt has about the same.
UNLIMITED = (1 << 63) - 1


class Settings:
    """Migration capabilities and parameters of one QEMU, changed for a time."""

    def __init__(self, monitor: Monitor, capabilities: Mapping[str, bool], parameters: Mapping[str, object]) -> None:
        """Raises PeerError where QEMU does not take one; then all are as they were."""
        self._monitor = monitor
        now = monitor.ask("query-migrate-capabilities", read_capabilities)
        wanted = {name: state for name, state in capabilities.items() if now.get(name, False) != state}
        self._capabilities = {name: now[name] for name in wanted if name in now}
        current = monitor.ask("query-migrate-parameters", read_parameters)
        self._parameters = {
            name: current[name] for name, value in parameters.items() if current.get(name, value) != value
        }
        changes = [f"{name} {'on' if state else 'off'}" for name, state in wanted.items()]
        changes += [f"{name} {parameters[name]} (was {was})" for name, was in self._parameters.items()]
        log.debug(f"{monitor.name}: {', '.join(changes) or 'nothing'} is changed until the end, so that it fits")
        try:
            self._set(wanted, dict(parameters))
        except BaseException:
            self.restore()
            raise

    def _set(self, capabilities: dict[str, bool], parameters: dict[str, object]) -> None:
        if capabilities:
            items = [{"capability": name, "state": state} for name, state in capabilities.items()]
            self._monitor.command("migrate-set-capabilities", capabilities=items)
        if parameters:
            self._monitor.command("migrate-set-parameters", **parameters)

    def change(self, name: str, value: object) -> None:
        """One parameter more.  Raises PeerError where QEMU does not take it."""
        before = self._monitor.ask("query-migrate-parameters", lambda answer: read_parameters(answer)[name])
        self._set({}, {name: value})
        self._parameters.setdefault(name, before)

    def restore(self) -> None:
        """Put back what was changed.  Warns of what QEMU refuses; one that has gone needs nothing."""
        # In reverse: mapped-ram is not taken beside a compression.
        left: list[tuple[dict[str, bool], dict[str, object]]] = [({}, self._parameters), (self._capabilities, {})]
        while left:
            try:
                self._set(*left[0])
            except (Ended, Lost):
                return
            except MultifdError as error:
                # One that does not answer is not asked, and waited for, again.
                refused = left if isinstance(error, Stalled) else left[:1]
                names = ", ".join(name for settings in refused for kind in settings for name in kind)
                log.warning(f"not put back as it was: {names}: {error}")
                del left[: len(refused)]
            else:
                del left[0]


def read_capabilities(answer: Any) -> dict[str, bool]:
    """`query-migrate-capabilities`'s answer, for `Monitor.ask`."""
    return {of(str, item["capability"]): of(bool, item["state"]) for item in of(list, answer)}


def read_parameters(answer: Any) -> dict[str, Any]:
    """`query-migrate-parameters`'s answer, for `Monitor.ask`."""
    return of(dict, answer)
