"""`receive`: one migration into a snapshot."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from multifd.codec.readers import Readers
from multifd.crew import Crew, undone
from multifd.errors import Cancelled, MultifdError, PeerError, UsageError
from multifd.jobs.destination.connections import meet, recorded
from multifd.jobs.destination.migration import Migration
from multifd.jobs.destination.stopping import StopAfter, Stopping
from multifd.jobs.recording import open_named
from multifd.jobs.report import DEFAULT_CHANNELS, EVERY, OnProgress, Result, check_channels, check_page_size
from multifd.jobs.verdict import ENDED_EARLY
from multifd.log import log
from multifd.net.connection import Stalled
from multifd.net.deadline import DEFAULT_TIMEOUT, FOREVER, Silence
from multifd.net.door import Door
from multifd.net.listener import Listener
from multifd.net.security import listening_wrap
from multifd.net.uri import Uri
from multifd.observe.hooks import IN
from multifd.observe.observers import Observers
from multifd.qemu.driver import THEN, Source
from multifd.qemu.monitor import BRIEF
from multifd.qemu.settings import UNLIMITED
from multifd.snapshot.directory import Access
from multifd.snapshot.disks import Disk, named
from multifd.snapshot.writer import check_free

#: Seconds without a byte after which QEMU is asked whether it waits for somebody.
WAITS = 2.0
#: Seconds from one look at a QEMU's rounds to the next, where its guest is to be stopped at the end of one.
LOOKS = 0.1


def receive(
    uri: str,
    output: str | Path,
    compressor: str | None = None,
    *,
    channels: int | None = None,
    page_size: int | None = None,
    description_required: bool = True,
    missing_allowed: bool = False,
    digests: bool = True,
    sha256: bool = False,
    group: str | int | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    first_timeout: float | None = None,
    idle_timeout: float | None = None,
    tls_creds: str | Path | None = None,
    uuid: bytes | None = None,
    qmp: str | None = None,
    then: str = "stop",
    stop_after: str | None = None,
    max_bandwidth: int | None = None,
    observe: Sequence[str] = (),
    on_listening: Callable[[str], None] | None = None,
    on_progress: OnProgress | None = None,
    on_digests: Callable[[], None] = lambda: None,
    crew: Crew | None = None,
) -> Result:
    """Take one migration from `uri` (`tcp:`, `unix:` or `recording:`) into a snapshot.

        result = multifd.receive("recording:tests/captures/q72-none-2ch", "snap")
        print(result.zero_pages, "zero pages of", result.normal_pages + result.zero_pages)

    Without `compressor`, or with `auto`, each packet's own flag decides.  `channels` is DEFAULT_CHANNELS unless
    given; a recording says it itself.  `page_size` is assumed where the stream names none.
    `description_required` refuses a stream without VM description, `missing_allowed` takes one
    in which pages never came (memory that the guest gave back to its host).  `digests` are made once the source has
    its answer, with `sha256` each file's plain one, too; `on_digests` is called where that takes more than a second,
    and fails nothing.  `group`, a name or a number, may read the snapshot, as QEMU's user has to.  `timeout` bounds
    first bytes and a SYNC that others wait for, `first_timeout` the first connection,
    `idle_timeout` any silence; all in seconds, the last two None for ever.
    `tls_creds` is a directory of certificates as `multifd.net.tls` wants them; plain without.  `uuid`, 16 bytes, is the
    VM's: another one's connections are ignored; without it the first migration whose connections are complete is taken.
    `qmp` is the monitor of the source's QEMU: its settings are made to fit and put back at the
    end, the migration is started, and after it the guest is left as `then` says: `stop`,
    `resume` or `quit`; where it fails, a guest that ran goes on.  `stop_after`, `30s` or `5rounds`, ends the migration
    of a guest that writes memory faster than the link carries it: at the end of the round of RAM that is under way so
    long after the beginning, or after so many rounds, QEMU stops the guest and sends what is left.  `max_bandwidth` is
    the most that QEMU sends, in bytes per second; None for no limit, whatever it has of its own.  `observe` are those
    that look on, each `NAME[=ARG]` (`multifd.observe.hooks`).  What a callback raises fails the job.  `crew` is a new
    Crew, whose `cancel` ends the job from any thread.
    Raises UsageError, CallerError, HostError, PeerError, CompressorError, Cancelled.
    """
    check_page_size(page_size)
    if then not in THEN:
        raise UsageError(f"then {then!r} is none of {', '.join(THEN)}")
    stopping = Stopping(StopAfter.parse(stop_after)) if stop_after is not None else None
    if stopping is not None and qmp is None:
        raise UsageError("only over its monitor can a guest be stopped: say where that is, too (--qmp)")
    if max_bandwidth is not None and qmp is None:
        raise UsageError("a bandwidth is set over its monitor: say where that is, too (--qmp)")
    if max_bandwidth is not None and not 0 < max_bandwidth <= UNLIMITED:
        raise UsageError(f"a bandwidth of {max_bandwidth} bytes per second: from 1 to {UNLIMITED}")
    where = Uri.parse(uri)
    if where.scheme == "unix":
        where = Uri("unix", path=os.path.abspath(where.path))  # QEMU may be elsewhere
    elif where.scheme == "recording" and qmp is not None:
        raise UsageError(f"{uri}: no QEMU sends a recording")
    wrap = listening_wrap(tls_creds)
    path = Path(os.path.abspath(output))
    access = Access.of(group)
    check_free(path, access)
    readers = Readers.parse(compressor)
    # A recording waits for nobody, and nobody for it.
    silence = Silence(timeout, idle_timeout) if where.scheme != "recording" else Silence(FOREVER)
    observers = Observers(observe)
    crew = crew or Crew()
    crew.on_end(silence.cancel)
    job = Migration(path, access, page_size, description_required, missing_allowed, readers, silence, crew, observers)
    job.switchover.seen_to = stopping is not None
    driver: Source | None = None
    observed = ExitStack()
    with ExitStack() as last, ExitStack() as cleanup:
        # From the last to the first, once it is over: threads, connections, QEMU, files.
        cleanup.push(observed)
        cleanup.enter_context(undone(job.close))
        if where.scheme == "recording":
            main, others = open_named(where.path)
            for connection in (main, *others):
                cleanup.callback(connection.close)
            if channels not in (None, len(others)):
                raise UsageError(f"{uri} has {len(others)} channels, not {channels}: leave --channels out")
        else:
            channels = DEFAULT_CHANNELS if channels is None else channels
            check_channels(channels)
            if qmp is not None:
                limit = max_bandwidth or UNLIMITED
                driver = Source(
                    qmp, channels=channels, method=readers.method, timeout=timeout, max_bandwidth=limit, crew=crew
                )
                cleanup.enter_context(driver)
                cleanup.push(driver.recover)
                job.ask_disks = driver.disks
                first_timeout = timeout
            listener = Listener(where, silence, wrap)
            cleanup.callback(listener.close)
        cleanup.callback(job.let_go)
        cleanup.callback(crew.join)
        try:
            if where.scheme == "recording":
                job.party = recorded(main, others)
            else:
                if on_listening is not None:
                    on_listening(str(listener.uri))
                door = Door(listener, timeout, crew, page_size)
                crew.on_end(door.close)
                door.begin()
                if driver is not None:
                    crew.on_cancel(driver.cancel)
                    driver.start(str(listener.uri))
                    cleanup.enter_context(crew.every(WAITS, partial(_watch, driver, silence, job)))
                    if stopping is not None:
                        cleanup.enter_context(
                            crew.every(LOOKS, partial(_stop, driver, stopping, job, time.monotonic()))
                        )
                job.party = meet(door, crew, channels or DEFAULT_CHANNELS, uuid, silence, first_timeout)
                door.close()
            observed.enter_context(observers.migration(IN))
            if on_progress is not None:
                cleanup.enter_context(crew.every(EVERY, lambda: on_progress(job.progress())))
            result = crew.run("receive", job.run)
        except BaseException as error:
            ended = job.ended(crew.fail(error))
            crew.join()
            job.let_go()  # first: while QEMU writes to them, its monitor does not answer
            if driver is not None and isinstance(ended, MultifdError) and not isinstance(ended, Cancelled):
                ended = driver.explain(ended)
            if ended is error:
                raise
            raise ended from error
        if digests:
            # The guest has waited long enough.
            last.callback(job.add_digests, plain=sha256, on_wait=on_digests)
        if driver is not None:
            _tell_disks([disk for disk in job.disks or () if not disk.read_only], then)
            _leave(driver, then)
    return replace(result, digest=job.digest, standstill=driver.standstill if driver is not None else None)


def _watch(driver: Source, silence: Silence, job: Migration) -> None:
    """Say whom QEMU waits for, where nothing has come for a while.  Raises PeerError where it never will."""
    if silence.lasted(WAITS):
        driver.name_wait()
        if job.unfinished and driver.given_up():
            raise PeerError(ENDED_EARLY)


def _tell_disks(disks: Sequence[Disk], then: str) -> None:
    """A guest that is restored with other content on them is damaged."""
    if disks and then == "resume":
        log.warning(
            f"the guest goes on and writes to its disks, which are not in the snapshot: {named(disks)}: to have both "
            "as of one moment, take it with --then stop, copy them (or blockdev-snapshot-sync on its monitor), cont"
        )
    elif disks:
        log.info(f"the guest's disks are not in the snapshot: keep them with it as they are now: {named(disks)}")


def _stop(driver: Source, stopping: Stopping, job: Migration, started: float) -> None:
    """Let the guest be stopped where this is the moment.  Raises PeerError where QEMU does not do that."""
    if stopping.done or not job.unfinished:
        return
    with suppress(Stalled):  # it is blocked writing to us
        if stopping.now(time.monotonic() - started, driver.status(BRIEF).rounds - 1):
            log.debug("the guest is stopped now: what is left is sent while it stands still")
            driver.switch_over()
            stopping.done = True


def _leave(driver: Source, then: str) -> None:
    """The snapshot is whole: what becomes of the guest.  Raises PeerError where that cannot be."""
    try:
        driver.wait()
        driver.leave(then)
    except MultifdError as error:
        text = f"the snapshot is complete, but not all is well at the source: {error}"
        if then != "stop":
            raise PeerError(f"{text}; its guest did not {then}") from error
        log.warning(text)
