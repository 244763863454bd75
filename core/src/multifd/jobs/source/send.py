"""`send`: memory to a destination."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from multifd.codec.settings import ADAPTIVE
from multifd.crew import Crew
from multifd.effort.choice import Choice
from multifd.engine.sender import ZERO_PAGES
from multifd.errors import UsageError
from multifd.jobs.report import DEFAULT_CHANNELS, EVERY, OnProgress, Result, check_channels
from multifd.jobs.source.migration import Migration
from multifd.log import log
from multifd.memory.buffer import packet_buffer
from multifd.memory.zeropages import part
from multifd.net.connect import connect
from multifd.net.deadline import DEFAULT_TIMEOUT, Silence
from multifd.net.security import connecting_wrap
from multifd.net.uri import Uri
from multifd.observe.hooks import OUT
from multifd.observe.observers import Observers
from multifd.snapshot.digests import Pieces
from multifd.snapshot.disks import named
from multifd.snapshot.format import SYNC_MODES
from multifd.snapshot.reader import Snapshot, open_snapshot
from multifd.wire.events import Place
from multifd.wire.flags import PACKET_SIZE


def send(
    source: Snapshot | str | Path,
    uri: str,
    compressor: str = "none",
    *,
    channels: int = DEFAULT_CHANNELS,
    zero_pages: str | None = None,
    sync: str | None = None,
    uuid: bytes | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    tls_creds: str | Path | None = None,
    tls_hostname: str | None = None,
    rate: int | None = None,
    qmp: str | None = None,
    verify: bool = True,
    observe: Sequence[str] = (),
    on_progress: OnProgress | None = None,
    crew: Crew | None = None,
) -> Result:
    """Send a snapshot or a raw image to the destination at `uri`.

        result = multifd.send("guest.raw", "unix:there.sock", "zlib,level=6", channels=2)
        print(result.normal_pages, result.zero_pages, result.wire_bytes)

    `source` is its path, or what `multifd.open_snapshot` has opened.

    `compressor` is `NAME[,key=value...]`, or `auto[,accepts=METHOD+METHOD...]` for the best one
    here of the methods that the destination accepts, all of them unless given.  `zero_pages` says
    where zero pages go: `multifd`, in the packets, for destinations of 9.0 and newer with fresh
    memory (the default for raw images); `legacy`, on the main channel, right for every
    destination (for snapshots); `none`, as normal pages.  `sync` is `round` or `section`, what the
    destination's machine type wants; the source's own unless given, and so is `uuid`, 16 bytes.
    `tls_creds` is a directory of certificates as `multifd.net.tls` wants them, `tls_hostname`
    what the destination's has to name where that is not `uri`'s host; plain without.  `rate` is the most that is
    written in a second, in bytes, over all connections together.  `qmp` is the monitor of the
    destination's QEMU, started with `-incoming defer`: its settings are made to fit, it is told to
    listen at `uri`, and its version and uuid are asked.  `verify` checks what is read of a snapshot against its
    digests, where it has any, as it is read, and the device state before.
    `observe` are those that look on, each `NAME[=ARG]` (`multifd.observe.hooks`).  What `on_progress` raises fails the
    job.  `crew` is a new Crew, whose `cancel` ends the job from any thread.  Returns when the destination has
    confirmed.  Raises UsageError, CallerError, HostError, PeerError, CompressorError, Cancelled.
    """
    check_channels(channels)
    target = Uri.parse(uri)
    if target.scheme == "recording":
        raise UsageError(f"{uri}: a recording can only be received")
    if target.scheme == "unix":
        target = Uri("unix", path=os.path.abspath(target.path))  # QEMU may be elsewhere
    if not isinstance(source, Snapshot):
        source = open_snapshot(source)
    page_size = source.page_size
    zero_pages, asked = zero_pages or ("legacy" if source.configuration is not None else "multifd"), zero_pages
    sync = sync or source.sync
    if zero_pages not in ZERO_PAGES or sync not in SYNC_MODES:
        raise UsageError(f"zero_pages {zero_pages!r} or sync {sync!r} is none of {ZERO_PAGES}, {SYNC_MODES}")
    wrap = connecting_wrap(tls_creds, tls_hostname, target, rate)
    choice = Choice.parse(compressor, partial(_sample, source), page_size)
    why = "as asked" if asked else "right for every destination" if zero_pages == "legacy" else "an image's default"
    log.debug(f"compressor {choice}; zero pages {zero_pages}: {why}; a sync point per {sync}")
    if qmp is not None and len(choice.flags) > 1:
        raise UsageError(
            f"QEMU takes packets of one method: {ADAPTIVE} is between multifd's own ends; name a compressor"
        )
    pieces: Sequence[Pieces | None] = source.load_pieces() if verify else ()
    verified = source.digests.manifest if pieces and source.digests else None
    if not verified:
        log.debug(f"{source.path} is sent unchecked: {'it has no digests' if verify else 'as asked'}")
        pieces = [None] * (len(source.blocks) + 2 + len(source.places))
    if source.disks:
        log.info(f"the destination is to have the guest's disks as they were then: {named(source.disks)}")
    observers = Observers(observe)
    crew = crew or Crew()
    silence = Silence(timeout)
    crew.on_end(silence.cancel)
    with ExitStack() as cleanup:
        cleanup.enter_context(observers.migration(OUT))
        driver = None
        if qmp is not None:
            from multifd.qemu.driver import Destination

            driver = Destination(qmp, channels=channels, method=choice.method, timeout=timeout, crew=crew)
            cleanup.enter_context(driver)
            uuid = uuid or driver.uuid
            if tls_creds is None and (theirs := driver.tls_creds):
                raise UsageError(
                    f"{qmp}: this QEMU expects TLS (tls-creds {theirs}): say with which, too (--tls-creds)"
                )
        blocks = [cleanup.enter_context(item.open(its)) for item, its in zip(source.blocks, pieces, strict=False)]
        if driver is not None:
            driver.listen(str(target))
        link = partial(connect, target, silence, wrap=wrap)
        _, state_pieces, *early_pieces = pieces[len(source.blocks) :]
        by_place = dict(zip(source.places, early_pieces, strict=True))
        state = partial(source.read_device_state, state_pieces)

        def early(place: Place) -> Iterator[bytes]:
            return source.read_early(place, by_place.get(place))

        job = Migration(
            source, blocks, early, state, link, choice, channels, zero_pages, sync, uuid, silence, crew, observers
        )
        cleanup.callback(job.close)
        cleanup.callback(crew.join)
        if on_progress is not None:
            cleanup.enter_context(crew.every(EVERY, lambda: on_progress(job.progress())))
        try:
            result = crew.run("send", job.run)
            if driver is not None:
                driver.wait()
        except BaseException as error:
            ended = job.ended(crew.fail(error), driver.reason if driver is not None else str)
            if ended is error:
                raise
            raise ended from error
    return replace(result, digest=verified)


def _sample(source: Snapshot) -> bytes:
    """Normal pages from all over the memory, for `auto` to compress: of about eight packets."""
    step = max(1, source.memory_bytes // PACKET_SIZE // 8) * PACKET_SIZE
    buffer = memoryview(packet_buffer())
    found: list[bytes] = []
    for item in source.blocks:
        with item.open() as block:
            for offset in range(0, item.block.used_length, step):
                pages = buffer[: min(PACKET_SIZE, item.block.used_length - offset)]
                block.read_into(offset, pages)
                runs, _, _ = part(pages, source.page_size, range(0, len(pages), source.page_size))
                found += map(bytes, runs)
    return b"".join(found)
