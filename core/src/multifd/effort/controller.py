"""How hard to compress, found out while it runs: harder while the link is what all wait for, else lighter.

A choice is one way to compress, or a ladder of them, the first of which stores: the levels of one
compressor (`zlib,level=adaptive`), or those of all that work here (`adaptive`, between multifd's own
ends, where each packet says its method).  What each rung costs and saves is measured on the
memory itself, a sample every few seconds; what the link carries, on the packets.  The rung is then
the one with which the memory passes fastest:

    bytes of pages per second = min(threads / (seconds to encode a byte + to handle it), link / payload per byte)

A rung is left for one that promises a tenth more.  What share of its promise it then kept counts from
there on: the other side may be busy with the pages and not with their bytes, or with the same
processors.  Promises are compared, not what passed at other times, when other memory did.
`once` stays with the first choice.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from multifd.codec.compressor import Compressor
from multifd.codec.measure import measure
from multifd.codec.settings import Settings
from multifd.effort.choice import Choice
from multifd.effort.sampling import SAMPLE, looks_random, sample
from multifd.log import log

#: Seconds between two looks at the link, and at the memory.  Storing fills a slow link's buffers, which costs as much
#: time as it is long.
INTERVAL = 0.2
STORE_INTERVAL = 0.05
REFRESH = 2.0
#: Bytes of one channel that may be in both sides' sockets: they were made by the rung before.
UNDERWAY = 8 << 20
#: A link is as slow as the fastest of so many intervals was, at most: the others may have been a moment's, where the
#: destination waited for its disk or its memory.
LATELY = 2
STORE_LATELY = 4
#: A sample is not all of the memory: so many count alike, then each new one for its part of them.
SAMPLES = 6
#: Seconds after which a link that was not used up may carry more than it did, doubled each time up to the other.
PATIENCE = 10.0
MOST_PATIENCE = 60.0
#: What another rung has to promise, and what any has to where nothing is compressed, which costs the other side time
#: too; by how much a rung's own rate changes where everything did.
GAIN = 1.1
STORE_GAIN = 1.15
SHIFT = 1.6
#: A compressor that was not tried yet may make so much less of the memory: zstd's window is longer than a sample.
DOUBT = 0.85
#: Above this share of their time at work the channels do not wait for the link; below the other for nothing else.
BUSY = 0.75
IDLE = 0.4


#: As `codec.measure.measure`.
Measure = Callable[[Compressor, Settings, memoryview, int, Callable[[], float]], tuple[float, float]]


def _named(compressor: Compressor, level: int | None) -> str:
    return compressor.name if level is None else f"{compressor.name} level {level}"


@dataclass(slots=True, eq=False)
class Rung:
    """One way to compress.

    `seconds` of one thread per byte of pages, payload bytes per byte of pages: as measured.
    """

    compressor: Compressor
    settings: Settings
    seconds: float = 0.0
    ratio: float = 1.0

    def __str__(self) -> str:
        return _named(self.compressor, self.settings.level)


@dataclass(slots=True)
class _Interval:
    """What passed since some time, and what of it with the rung at hand: the rest was stored, or chosen before."""

    started: float
    pages: int = 0
    packets: int = 0
    payload: int = 0
    encode: float = 0.0
    handle: float = 0.0
    idle: float = 0.0
    own_pages: int = 0
    own_payload: int = 0
    own_encode: float = 0.0


@dataclass(frozen=True, slots=True)
class _Seen:
    """What share of its promise a rung kept, and until when that is believed."""

    share: float
    until: float


class Effort:
    """The rung at hand for all sending channels of one migration; any thread may call it."""

    def __init__(
        self, choice: Choice, clock: Callable[[], float] = time.perf_counter, measure: Measure = measure
    ) -> None:
        self.rungs = [Rung(compressor, settings) for compressor, settings in choice.ways]
        #: Whether there is something to choose, and what was, for how many packets.
        self.ladder = len(self.rungs) > 1
        self.used: Counter[str] = Counter()
        self._store = self._now = self.rungs[0]
        self._once = choice.once
        self._clock = clock
        self._measurement = measure
        self._cores = len(os.sched_getaffinity(0))
        self._measuring = threading.Lock()
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._channels = 0
        self._settled = False
        self._skip = 0.0
        self._samples = 0
        self._measured = -math.inf
        self._interval = _Interval(math.inf)
        self._link = math.inf
        self._link_since = 0.0
        self._patience = PATIENCE
        # Of the last intervals, the wire's bytes per second and the share of its promise that the rung kept:
        self._lately: deque[tuple[float, float]] = deque(maxlen=STORE_LATELY)
        # Seconds to what the sample promised, and of all else that a byte of pages takes.
        self._slower = 1.0
        self._handle = 0.0
        # Payload to what the sample promised: lately, and of each compressor as a rule, whose window may be longer
        # than a sample.
        self._larger = 1.0
        self._usual: dict[Compressor, float] = {}
        self._content = 1.0
        self._seen: dict[Rung, _Seen] = {}

    def join(self) -> None:
        """One more channel."""
        with self._lock:
            self._channels += 1

    @property
    def now(self) -> Rung:
        """The rung at hand."""
        return self._now

    def choose(self, pages: Sequence[memoryview], page_size: int) -> Rung:
        """The rung for a packet: the first, which stores, where a look says that nothing would shrink."""
        if looks_random(pages):
            return self._store
        # The first few samples follow one another faster, and a few pages say less than what is known.
        due = not self._settled and self._clock() - self._measured > REFRESH * min(1, self._samples / SAMPLES)
        if due and self._samples:
            due = sum(map(len, pages)) >= SAMPLE
        if due and self._measuring.acquire(blocking=False):
            try:
                self._measure(memoryview(sample(pages, page_size)), page_size)
            finally:
                self._measuring.release()
        return self._now

    def note(
        self, compressor: Compressor, level: int | None, pages: int, payload: int, encode: float, handle: float
    ) -> None:
        """A packet is on its way: what made it, bytes of its pages and of its payload, seconds in the compressor.

        `handle` are the seconds since the channel's last packet for everything else: reading, writing.  Both are CPU
        time of the channel's thread: how long a busy machine let it wait says nothing.
        """
        with self._lock:
            now = self._clock()
            interval = self._interval
            interval.started = min(interval.started, now)
            interval.pages += pages
            interval.payload += payload
            interval.encode += encode
            interval.handle += handle
            rung = self._now
            self.used[_named(compressor, level)] += 1
            if compressor is rung.compressor and level == rung.settings.level:
                interval.packets += 1
                interval.own_pages += pages
                interval.own_payload += payload
                interval.own_encode += encode
            enough = interval.packets >= self._channels or rung is self._store
            change = ""
            long = self._skip or (STORE_INTERVAL if rung is self._store else INTERVAL)
            elapsed = now - interval.started - interval.idle / self._channels
            if elapsed >= long and enough and self._samples and not self._settled:
                self._learn(interval)
                if self._skip:  # on the wire was what was under way when the rung changed
                    self._skip = 0.0
                    self._lately.append((interval.payload / elapsed, 0.0))
                else:
                    self._look(now, elapsed, interval)
                change = self._decide(now)
                self._interval = _Interval(now)
        if change:  # whoever reads that may be slow
            log.debug(change)

    def idle(self, seconds: float) -> None:
        """A channel had packets without payload for so long, which are the same to every compressor."""
        with self._lock:
            if self._interval.started != math.inf:
                self._interval.idle += seconds

    def _measure(self, data: memoryview, page_size: int) -> None:
        found = [
            self._measurement(rung.compressor, rung.settings, data, page_size, time.thread_time) for rung in self.rungs
        ]
        with self._lock:
            if not self._samples:
                self._interval = _Interval(math.inf)
            self._samples = min(self._samples + 1, SAMPLES)
            for rung, (seconds, ratio) in zip(self.rungs, found, strict=True):
                rung.seconds += (seconds - rung.seconds) / self._samples
                rung.ratio += (ratio - rung.ratio) / self._samples
            self._measured = self._clock()

    # --- locked ---

    def _learn(self, interval: _Interval) -> None:
        """By how much this machine at work and this memory differ from the measurement."""
        current = self._now
        self._handle = interval.handle / interval.pages
        if current is not self._store and interval.own_pages:  # storing tells nothing
            self._slower = interval.own_encode / interval.own_pages / current.seconds
            larger = interval.own_payload / interval.own_pages / current.ratio
            usual = self._usual.get(current.compressor, larger)
            self._usual[current.compressor] = usual = (3 * usual + larger) / 4
            self._larger, self._content = usual, larger / usual

    def _look(self, now: float, elapsed: float, interval: _Interval) -> None:
        """What the link carries, and how much of its promise the rung kept."""
        current = self._now
        rate = interval.pages / elapsed
        wire = interval.payload / elapsed
        busy = (interval.encode + interval.handle) / (self._workers * elapsed)
        lately = list(self._lately)[1 - (STORE_LATELY if current is self._store else LATELY) :]
        if busy < IDLE or wire > self._link or (busy < BUSY and self._link == math.inf):
            self._link, self._link_since = max([wire, *(before for before, _ in lately)]), now
        elif now - self._link_since > self._patience:
            self._link, self._link_since = math.inf, now
            self._patience = min(2 * self._patience, MOST_PATIENCE)
        known, latest = self._seen.get(current), rate / self._promise(current)
        share = max([latest, *(before for _, before in lately)])
        self._lately.append((wire, latest))
        if known is not None and not known.share / SHIFT < share < known.share * SHIFT:
            self._seen.clear()  # another link, or another destination
        self._seen[current] = _Seen(share, now + self._patience)

    def _decide(self, now: float) -> str:
        """In words, where it is another rung."""
        change = ""
        current = self._now
        promises = {rung: self._promise(rung) * self._kept(rung, now) for rung in self.rungs}
        best = max(promises, key=lambda rung: promises[rung])
        gain = STORE_GAIN if current is self._store else GAIN
        if best is not current and promises[best] >= gain * promises[current]:
            self._now = best
            link = "nobody knows how much" if self._link == math.inf else f"{self._link / 1e6:.0f} MB/s"
            change = (
                f"{best} promises {promises[best] / 1e6:.0f} MB/s of pages, {current} {promises[current] / 1e6:.0f}, "
                f"and the link carries {link}: from now on {best}"
            )
            self._skip = max(STORE_INTERVAL, min(INTERVAL, self._channels * UNDERWAY / self._link))
            self._lately = deque(((wire, 0.0) for wire, _ in self._lately), STORE_LATELY)
        # Before that, the lightest was tried: nobody had used the link up.
        self._settled = self._once and self._link != math.inf
        return change

    def _kept(self, rung: Rung, now: float) -> float:
        seen = self._seen.get(rung)
        return seen.share if seen is not None and seen.until > now else 1.0

    @property
    def _workers(self) -> int:
        return min(self._channels, self._cores)

    def _promise(self, rung: Rung) -> float:
        """Bytes of pages per second, as it is to be expected."""
        encoding = self._workers / (rung.seconds * self._slower + self._handle)
        larger = self._usual.get(rung.compressor, DOUBT * self._larger) * self._content
        ratio = rung.ratio if rung is self._store else rung.ratio * larger
        return min(encoding, self._link / ratio)
