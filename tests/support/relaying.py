"""The relay in a thread of the test's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import peers
from multifd import Relay
from multifd.errors import MultifdError
from multifd.jobs.relay.outcome import Relayed


class Relaying:
    """A relay in a thread, for so many migrations."""

    def __init__(self, target: str, migrations: int = 1, listen: str = "tcp:127.0.0.1:0", **options: object) -> None:
        self.outcomes: list[Relayed | MultifdError] = []
        self.relay = Relay(listen, target, **{"timeout": peers.TIMEOUT} | options)  # type: ignore[arg-type]
        self.uri = self.relay.uri
        self._thread = threading.Thread(target=lambda: self.relay.serve(self.outcomes.append, migrations=migrations))
        self._thread.start()

    def connections(self) -> int:
        """How many are open."""
        migration = self.relay._current
        return 0 if migration is None else len(migration._connections) + len(migration._onward)

    def join(self) -> list[Relayed | MultifdError]:
        self._thread.join(peers.TIMEOUT)
        assert not self._thread.is_alive(), "the relay hangs"
        self.relay.close()
        return self.outcomes

    def result(self) -> Relayed:
        (outcome,) = self.join()
        if isinstance(outcome, MultifdError):
            raise outcome
        return outcome

    def error(self) -> str:
        (outcome,) = self.join()
        assert isinstance(outcome, MultifdError), outcome
        return str(outcome)


@contextmanager
def closing(relaying: Relaying) -> Iterator[Relaying]:
    try:
        yield relaying
    finally:
        relaying.relay.stop()
        relaying.join()
