"""Stand between a source and a destination, and re-compress each packet on its way.

    import multifd

    with multifd.Relay("unix:here.sock", "unix:there.sock", to="zstd") as relay:
        relay.serve(print, migrations=1)

The main channel passes through untouched in both directions, so it is the destination that
confirms.  Each multifd channel has a thread, which keeps the order of its packets; what is in
the relay at any time is one packet per channel.  The main channel is connected first: a QEMU
before 8.0 takes the first connection for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self
from uuid import UUID

from multifd.codec.readers import Readers
from multifd.codec.settings import RESERVED
from multifd.crew import Crew
from multifd.effort.choice import Choice
from multifd.errors import Cancelled, MultifdError, UsageError
from multifd.jobs.relay.counters import Sample, added
from multifd.jobs.relay.migration import Migration
from multifd.jobs.relay.outcome import Relayed
from multifd.jobs.relay.plan import Plan
from multifd.jobs.report import OnProgress, check_page_size
from multifd.log import about, log
from multifd.net import parting
from multifd.net.caller import Caller
from multifd.net.deadline import DEFAULT_TIMEOUT, FOREVER, Silence
from multifd.net.door import Door
from multifd.net.listener import Listener
from multifd.net.security import connecting_wrap, listening_wrap
from multifd.net.uri import Uri
from multifd.observe.observers import Observers

#: Seconds in which the channels of a migration that failed without any may still come.
LATE = 0.5
#: Of migrations that did not fail, by whether the destination confirmed them.
OUTCOMES = {True: "completed", False: "unconfirmed"}


class Relay:
    """Listens for sources, and serves one migration after another."""

    def __init__(
        self,
        listen: str,
        to_uri: str,
        *,
        source: str | None = None,
        to: str | None = None,
        uuid: bytes | None = None,
        channels: int | None = None,
        drop_switchover_start: bool = False,
        page_size: int | None = None,
        find_zero_pages: bool = False,
        listen_tls_creds: str | Path | None = None,
        connect_tls_creds: str | Path | None = None,
        connect_tls_hostname: str | None = None,
        rate: int | None = None,
        observe: Sequence[str] = (),
        timeout: float = DEFAULT_TIMEOUT,
        crew: Crew | None = None,
    ) -> None:
        """`listen` and `to_uri` are `tcp:HOST:PORT` or `unix:PATH`.

        `source` names the compressor that reads the packets (each says its own method unless
        given), `to` the one that writes them, `NAME[,key=value...]`, or
        `auto[,accepts=METHOD+METHOD...]` for the best one here of the methods that the destination
        accepts: where there is none, or both are the same, payloads pass unread.
        `uuid` replaces the guest's, 16 bytes; `channels` is the most that a source may use; `page_size`, in bytes, is
        assumed where its stream tells none.
        `drop_switchover_start` takes out a command that destinations before 10.0 refuse;
        `find_zero_pages` looks for zero pages that the source sent as normal ones, for destinations of 9.0
        and newer with fresh memory; towards uadk in the first round only, since QEMU's clears no page
        that came before.  `listen_tls_creds` and `connect_tls_creds` are directories of
        certificates as `multifd.net.tls` wants them, for either leg, plain without; `connect_tls_hostname` is
        what the destination's has to name where that is not `to_uri`'s host.  `rate` is the most that is written to
        the destination in a second, in bytes, over all connections together.  `timeout`, in seconds, is how
        long nothing may move while somebody waits.  `observe` are those that look on, each `NAME[=ARG]`
        (`multifd.observe.hooks`): at what came from the source and at what went to the destination.  `crew` is a new
        Crew, whose `cancel` is as `stop`.
        Raises UsageError, CallerError, CompressorError, HostError.
        """
        check_page_size(page_size)
        target = Uri.parse(to_uri)
        where = Uri.parse(listen)
        for uri in (where, target):
            if uri.scheme == "recording":
                raise UsageError(f"{uri}: a relay stands between sockets")
        if find_zero_pages and to is None:
            raise UsageError(
                "zero pages can only be looked for where payloads are read: name a compressor to write with (--to)"
            )
        choice = None
        if to is not None and (to != source or to in RESERVED or find_zero_pages):
            choice = Choice.parse(to, bytes)
        log.debug(f"payloads are written by {choice}" if choice is not None else "payloads pass as they are")
        wrap = connecting_wrap(connect_tls_creds, connect_tls_hostname, target, rate)
        readers = Readers.parse(source)
        observers = Observers(observe)
        self._plan = Plan(
            target,
            wrap,
            readers,
            choice,
            uuid,
            channels,
            drop_switchover_start,
            page_size,
            find_zero_pages,
            observers,
            timeout,
        )
        self._crew = crew or Crew()
        self._changed = self._crew.changed
        # Guarded by the condition:
        self._current: Migration | None = None
        self._totals: dict[Sample, float] = {}
        self._serves = False
        self._listener = Listener(where, Silence(timeout), listening_wrap(listen_tls_creds))
        self.uri = str(self._listener.uri)
        self._crew.used = True  # `serve` begins with a look at it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; end what is under way.  From another thread than `serve`'s it does not wait for that."""
        self.stop()
        if not self._serves:  # or its door closes it
            self._listener.close()

    def stop(self) -> None:
        """Let `serve` return; safe from any thread, and twice.

        A migration under way is ended, but not while its guest's memory is in two places (postcopy): that one is
        served to its end first.
        """
        self._crew.cancel()

    def counters(self) -> dict[Sample, float]:
        """What went through since the start, and `active`: 1 while a migration is under way."""
        with self._changed:
            current, now = self._current, self._totals
            if current is not None:
                now = added(now, current.counters())
        return {Sample("active", ()): float(current is not None), **now}

    def serve(
        self,
        on_end: Callable[[Relayed | MultifdError], None],
        *,
        migrations: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Serve until `stop`, or so many migrations; `on_end` is told how each came out.  Once only.

        `on_progress` is told twice a second how far the one under way is; what it raises fails that.
        """
        door = Door(self._listener, self._plan.timeout, self._crew, self._plan.page_size, passes=True)
        self._serves = True
        served = 0
        try:
            door.begin()
            while served != migrations:
                with self._changed:
                    self._crew.wait_for(lambda: door.mains)
                    migration = self._current = self._next(door)
                with about(migration.about):
                    outcome = self._outcome(door, migration, on_progress)
                    if not isinstance(outcome, Cancelled):
                        on_end(outcome)
                served += 1
        except Cancelled:
            pass
        finally:
            door.close()
            door.join(2 * parting.MOST)
            self._crew.join()

    def _next(self, door: Door) -> Migration:
        main = door.mains[0]
        door.take([main])
        try:
            return Migration(self._plan, main, self._changed)
        except BaseException:
            main.connection.close()
            raise

    def _outcome(self, door: Door, migration: Migration, on_progress: OnProgress | None) -> Relayed | MultifdError:
        """Serve one to its end."""
        outcome: Relayed | MultifdError
        try:
            migration.begin(on_progress)
            self._attend(door, migration)
        finally:
            if not migration.stop():
                self._crew.patience = FOREVER
                log.warning(
                    "the guest's memory is in two places (postcopy): the relay goes on until the migration has ended; "
                    "a second signal ends it"
                )
            try:
                outcome = migration.join()
            except MultifdError as error:
                outcome = error
                self._see_off(door, migration)
            with self._changed:
                self._crew.adopt(migration.crew)
                self._current = None
                door.busy = False
                how = "failed" if isinstance(outcome, MultifdError) else OUTCOMES[outcome.confirmed]
                ended = {Sample("migrations", (("outcome", how),)): 1.0}
                self._totals = added(self._totals, migration.counters() | ended)
        return outcome

    def _attend(self, door: Door, migration: Migration) -> None:
        """Let its channels in while it lasts, and nobody else."""
        with self._changed:
            door.busy = True
            while not (migration.over or self._crew.over):
                for main in list(door.mains) if not migration.source_left else ():
                    door.dismiss(main, "is a second main channel, the relay serves one migration at a time")
                self._let_in(door, migration)
                self._changed.wait(LATE)
            until = time.monotonic() + LATE
            while migration.incomplete and time.monotonic() < until and not (door.mains or self._crew.over):
                self._let_in(door, migration)
                self._changed.wait(0.05)

    def _own(self, door: Door, migration: Migration) -> list[Caller]:
        """Who waits and may be one of its channels; once its source has left, none behind the next main channel."""
        until = door.next_main(migration.number) if migration.source_left else math.inf
        return [channel for channel in migration.group(door.channels) if channel.number < until]

    def _let_in(self, door: Door, migration: Migration) -> None:
        for channel in self._own(door, migration):
            if migration.take(channel):
                door.take([channel])
            else:
                who = f"is channel {channel.init.id} of VM {UUID(bytes=channel.init.uuid)}"
                door.dismiss(channel, f"{who}, which is not the migration that the relay serves")

    def _see_off(self, door: Door, migration: Migration) -> None:
        """Let go of the channels of one that failed: those that have come, and those that still come."""
        deadline = time.monotonic() + parting.MOST
        late = 0.0 if migration.left else time.monotonic() + LATE
        door.see_off(migration.left)
        with self._changed:
            while (door.parting or time.monotonic() < late) and time.monotonic() < deadline and not self._crew.over:
                for channel in self._own(door, migration):
                    if migration.uuid in (None, channel.init.uuid):
                        door.take([channel])
                        door.see_off([channel.connection])
                if door.mains:
                    return
                self._changed.wait(0.1)
