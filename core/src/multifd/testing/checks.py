"""The checks, each with the sentence of the contract that it holds a compressor to.

A check returns where the sentence holds, raises Broken where it does not, NotAsked where the
compressor does not claim it, and NotRun where it cannot be asked.  Each runs in a process of its
own: it may use up whatever it likes.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from typing import NoReturn

from multifd.codec.compressor import Compressor
from multifd.codec.contract import WrongFacts, WrongHooks
from multifd.codec.hooks import HOOK_ERRORS
from multifd.codec.selection import load
from multifd.errors import CompressorError, MultifdError
from multifd.hookspecs import Option, Probe
from multifd.testing.harness import (
    KINDS,
    PAGE,
    ZEROS,
    Broken,
    Footprint,
    Lost,
    NotAsked,
    NotRun,
    Receiver,
    Sender,
    Subject,
    address_space,
    call,
    call_raising,
    describe,
    difference,
    full,
    join,
    mixed,
    no_descriptors,
    no_libraries,
    peak,
    peak_begins,
    threads_now,
)
from multifd.wire.flags import MAX_PAYLOAD, METHOD_NAMES, PACKET_SIZE
from multifd.wire.packet import INIT, RamPacket, header_length

#: Packets on one stream, and sessions one after another: enough that a leak of 4 KiB each shows.
PACKETS = 2000
SESSIONS = 400
#: Bytes of memory that a process may grow by meanwhile: the allocator's own ups and downs.
SLACK = 1 << 20
#: Bytes of memory that a payload may make a receiver take, and bytes that the bomb decodes to.
MEMORY = 32 << 20
BOMB = 96 << 20


@dataclass(frozen=True)
class Check:
    """One thing that is asked; `sentence` stands in the contract, word by word."""

    name: str
    sentence: str
    function: Callable[[Subject], None]


CHECKS: list[Check] = []


def check(sentence: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Put a function into the table, in the order of this file."""

    def put(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        CHECKS.append(Check(function.__name__.replace("_", "-"), sentence, function))
        return function

    return put


# --- what it says of itself ---


@check("Return the facts, the same each time.")
def facts(subject: Subject) -> None:
    try:
        compressor = load(subject.spec.name)
    except WrongHooks as error:
        raise NotRun(f"it does not load: {error}") from error
    except MultifdError as error:
        raise Broken(f"load({subject.spec.name!r})", describe(error)) from error
    said = compressor.facts
    again = call(compressor, "multifd_compressor", "")
    if again != said:
        raise Broken("multifd_compressor() again", f"returned {again}, the first time {said}")


def _line(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip()) and "\n" not in text


@check("`multifd_compressor`, `multifd_probe`, `multifd_send_prepare` and `multifd_recv` must be there")
def hooks(subject: Subject) -> None:
    try:
        load(subject.spec.name)
    except WrongHooks as error:
        raise Broken(f"load({subject.spec.name!r})", describe(error)) from error
    except MultifdError as error:
        raise NotRun(f"it does not load: {error}") from error


@check("Importing the module and asking it for its facts must work where no library can be loaded")
def without_library(subject: Subject) -> None:
    no_libraries()
    try:
        load(subject.spec.name)
    except (WrongHooks, WrongFacts) as error:
        raise NotRun(f"it does not load anywhere: {error}") from error
    except MultifdError as error:
        raise Broken(
            "importing it, and multifd_compressor(), where no library can be loaded", describe(error)
        ) from error


@check("A library that is missing is an answer with its `reason`, not an error.")
def probe_without_library(subject: Subject) -> None:
    no_libraries()
    _probe(subject, subject.compressor, "multifd_probe() where no library can be loaded")


def _probe(subject: Subject, compressor: Compressor, called: str) -> Probe:
    options = compressor.settings(subject.spec.settings, sending=True).options
    try:
        answer = call_raising(compressor, "multifd_probe", options=options)
    except HOOK_ERRORS as error:
        raise Broken(called, describe(error)) from error
    if not isinstance(answer, Probe):
        raise Broken(called, f"returned {answer!r}, not a Probe")
    texts = (answer.provider, answer.version, answer.reason, answer.install, *answer.devices)
    if any(not isinstance(text, str) or "\n" in text for text in texts):
        raise Broken(called, f"returned {answer}: a text that is not one line")
    if not answer.available and not answer.reason.strip():
        raise Broken(called, f"returned {answer}: it does not say why not")
    if answer.available and not answer.provider.strip():
        raise Broken(called, f"returned {answer}: it does not say by which library")
    return answer


@check("Where it says that the compressor is available, set-up works.")
def probe(subject: Subject) -> None:
    compressor = subject.compressor
    first, again = (_probe(subject, compressor, f"multifd_probe() the {time} time") for time in ("first", "second"))
    if again != first:
        raise Broken("multifd_probe() the second time", f"returned {again}, the first time {first}")
    if first.available:
        for end in subject.pair():
            end.clean_up()


@check("May load the library; leaves nothing running or open, and nothing of the process changed.")
def probe_leaves_nothing(subject: Subject) -> None:
    compressor = subject.compressor
    before = _state()
    _probe(subject, compressor, "multifd_probe()")
    for name, value in _state().items():
        if value != before[name]:
            raise Broken("multifd_probe()", f"left {name} changed: {_change(before[name], value)}")


def _state() -> dict[str, object]:
    holds = Footprint.now()
    try:
        children = f"process {os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) or 'running'}"
    except ChildProcessError:
        children = "none"
    return {
        "the descriptors": holds.descriptors,
        "the threads": holds.threads,
        "the child processes": children,
        "the environment": frozenset(os.environ.items()),
        "the signal handlers": frozenset((number, repr(signal.getsignal(number))) for number in signal.valid_signals()),
        "the working directory": os.getcwd(),
    }


def _change(before: object, after: object) -> str:
    if isinstance(before, frozenset) and isinstance(after, frozenset):
        return f"{sorted(map(str, after ^ before))}"
    return f"{before} before, {after} after"


# --- pages there and back ---


def _there_and_back(sender: Sender, receiver: Receiver, *runs: bytes, text: str = "") -> bytes:
    payload = sender.encode(*runs, text=text)
    pages = b"".join(runs)
    receiver.decode(payload, pages, text and f"{text}: {len(payload)} bytes of payload for {len(pages)} of pages")
    return payload


@check("Gives back the sender's pages, byte for byte.")
def contents(subject: Subject) -> None:
    sender, receiver = subject.pair()
    mix = random.Random(1)
    for name, kind in KINDS.items():
        for pages in (1, 2, 17, full()):
            data = b"".join(kind(mix, PAGE) for _ in range(pages))
            _there_and_back(sender, receiver, data, text=f"packet of {pages} pages, {name}")
    _there_and_back(sender, receiver, mixed(1, full()), text=f"packet of {full()} pages of all kinds")


@check("1 to PACKET_SIZE (512 KiB) bytes in all, each a multiple of the page size.")
def packet_sizes(subject: Subject) -> None:
    sender, receiver = subject.pair()
    memory = mixed(2, full())
    for pages in range(1, full() + 1):
        _there_and_back(sender, receiver, memory[: pages * PAGE], text=f"packet of {pages} pages")


@check("`id` is the channel's number from 0, `page_size` a power of two from 1 to 64 KiB.")
def page_sizes(subject: Subject) -> None:
    for number, size in enumerate(1 << bits for bits in range(10, 17)):
        sender, receiver = subject.pair(page_size=size, number=number)
        for pages in (1, 3, full(size)):
            _there_and_back(sender, receiver, mixed(3, pages, size), text=f"packet of {pages} pages")
        sender.clean_up()
        receiver.clean_up()


@check("`pages` are read-only views in packet order, neighbours joined into runs")
def scattered(subject: Subject) -> None:
    sender, receiver = subject.pair()
    mix = random.Random(4)
    memory = mixed(4, full())
    pages = [memory[at : at + PAGE] for at in range(0, len(memory), PAGE)]
    _there_and_back(sender, receiver, *pages, text=f"packet of {full()} pages, each alone")
    for _ in range(10):
        mix.shuffle(pages)
        cuts = sorted({0, *mix.choices(range(full()), k=mix.randrange(1, 40)), full()})
        runs = [b"".join(pages[a:b]) for a, b in pairwise(cuts)]
        _there_and_back(sender, receiver, *runs, text=f"packet of {full()} pages in {len(runs)} runs")


@check("once for each packet with normal pages, as long as the migration lasts")
def long_stream(subject: Subject) -> None:
    sender, receiver = subject.pair()
    memory = mixed(5, full())
    for number in range(PACKETS):
        first = number % (full() - 3)
        pages = memory[first * PAGE : (first + 1 + number % 3) * PAGE] if number % 100 else memory
        _there_and_back(sender, receiver, pages, text=f"packet {number + 1} of the channel")


@check("A session leaves nothing behind: after cleanup its memory, descriptors and threads are released")
def many_sessions(subject: Subject) -> None:
    memory = mixed(6, 8)
    before = None
    for number in range(SESSIONS):
        sender, receiver = subject.pair(number=number % 8)
        payload = sender.encode(memory)
        receiver.decode(payload, memory)
        receiver.takes(payload[: len(payload) // 2], len(memory), "half of a payload")
        sender.clean_up()
        receiver.clean_up()
        if number == SESSIONS // 4:
            before = Footprint.now()
    assert before is not None
    _no_more(before, Footprint.now(), f"{SESSIONS - SESSIONS // 4} sessions of one packet, set up and cleaned up")


def _no_more(before: Footprint, after: Footprint, doing: str) -> None:
    if more := after.descriptors - before.descriptors:
        raise Broken(doing, f"left {len(more)} descriptors open: {min(more)}")
    # The kernel lists a thread that was joined for a moment longer.
    deadline = time.monotonic() + 1
    while (left := threads_now() - before.threads) > 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if left > 0:
        raise Broken(doing, f"left {left} threads")
    if after.memory - before.memory > SLACK:
        raise Broken(doing, f"took {(after.memory - before.memory) // 1024} KiB of memory that did not come back")


@check("It does not grow with the packets that it carries.")
def many_packets(subject: Subject) -> None:
    sender, receiver = subject.pair()
    memory = mixed(7, 4)
    before = None
    for number in range(PACKETS):
        _there_and_back(sender, receiver, memory)
        if number == PACKETS // 4:
            before = Footprint.now()
    assert before is not None
    _no_more(before, Footprint.now(), f"{PACKETS - PACKETS // 4} packets of 4 pages there and back on one channel")


# --- buffers ---


@check("Returns the payload as a sequence of bytes, bytearray or memoryview (of bytes)")
def payload(subject: Subject) -> None:
    sender, _ = subject.pair()
    pages = memoryview(mixed(8, 5))
    made = sender.prepare([pages[: 2 * PAGE], pages[2 * PAGE :]])
    for number, buffer in enumerate(made):
        came = f"buffer {number} of {len(made)} is "
        if not isinstance(buffer, bytes | bytearray | memoryview):
            raise Broken("multifd_send_prepare(2 runs)", f"{came}{type(buffer).__name__}: {buffer!r:.80}")
        if isinstance(buffer, memoryview) and (buffer.nbytes != len(buffer) or not buffer.c_contiguous):
            raise Broken(
                "multifd_send_prepare(2 runs)", f"{came}a memoryview of format {buffer.format!r}, not of bytes"
            )


@check("1 to MAX_PAYLOAD (1 MiB) bytes together, whatever the pages hold.")
def expansion(subject: Subject) -> None:
    compressor = subject.compressor
    levels = compressor.facts.levels or [None]
    for level in {levels[0], compressor.facts.default_level, levels[-1]}:
        sender = subject.sender({} if level is None else {"level": str(level)})
        for name, kind in KINDS.items():
            made = sender.encode(b"".join(kind(random.Random(page), PAGE) for page in range(full())))
            if not 0 < len(made) <= MAX_PAYLOAD:
                text = sender.text(f"{full()} pages, {name}")
                raise Broken(f"multifd_send_prepare({text})", f"returned {len(made)} bytes in all")
        sender.clean_up()


@check("They stay valid until the next call on this channel or its cleanup, whatever other channels do")
def payload_stays(subject: Subject) -> None:
    sender, receiver = subject.pair()
    other, other_receiver = subject.pair(number=1)
    for number in range(8):
        pages = memoryview(mixed(9 + number, 20)).toreadonly()
        made = sender.prepare([pages])
        at_once = join(made)
        more = mixed(30 + number, 20)
        _there_and_back(other, other_receiver, more)
        receiver.decode(at_once, bytes(pages))
        third = other.encode(more)
        Footprint.now()  # collects garbage
        other_receiver.decode(third, more)
        if join(made) != at_once:
            raise Broken(
                f"multifd_send_prepare({sender.text(f'packet {number + 1}')})",
                "returned buffers that hold something else after other channels' calls",
            )


@check("They stay as they are until the next call on this channel or its cleanup, and hold other pages after it")
def pages_change(subject: Subject) -> None:
    sender, receiver = subject.pair()
    buffer = bytearray(20 * PAGE)
    view = memoryview(buffer).toreadonly()
    for number in range(20):
        buffer[:] = data = mixed(50 + number, 20)
        made = join(sender.prepare([view], f"packet {number + 1}, pages in the same buffer as the last packet's"))
        receiver.decode(made, data, f"packet {number + 1}, whose pages were sent from the last packet's buffer")


@check("and no view of a buffer that it was given is kept.")
def buffers_released(subject: Subject) -> None:
    sender, receiver = subject.pair()
    data = mixed(10, 20)
    source, target = bytearray(data), bytearray(len(data))
    made = sender.encode(source)
    if receiver.recv(made, memoryview(target)):
        raise Broken(f"multifd_recv({receiver.text()})", "left bytes of the payload unread")
    sender.clean_up()
    receiver.clean_up()
    Footprint.now()  # collects garbage
    for buffer, hook in ((source, "multifd_send_cleanup"), (target, "multifd_recv_cleanup")):
        try:
            buffer.append(0)
        except BufferError:
            raise Broken(f"{hook}()", "kept a view of pages that it was given") from None


@check("Their bytes may not be changed.")
def pages_untouched(subject: Subject) -> None:
    sender, _ = subject.pair()
    for number in range(6):
        data = mixed(70 + number, 19)
        buffer = bytearray(data)
        made = sender.prepare([memoryview(buffer).toreadonly()])
        if buffer != data:
            came = difference(bytes(buffer), data, PAGE)
            raise Broken(f"multifd_send_prepare({sender.text()})", f"changed the sender's own pages: {came}")
        del made


@check("nothing in front of it or behind it is written.")
def pages_only(subject: Subject) -> None:
    sender, receiver = subject.pair()
    for pages in (1, 3, 20, full()):
        data = mixed(11, pages)
        receiver.takes(sender.encode(data), len(data), f"a good payload of {pages} pages")


# --- payloads that are not good ---


def _samples(subject: Subject) -> list[tuple[bytes, bytes]]:
    """(payload, pages) of good first packets of a stream: one page, one random page, 24 of all kinds."""
    found = []
    for pages in (mixed(13, 1), random.Random(13).randbytes(PAGE), mixed(13, 24)):
        sender = subject.sender()
        found.append((sender.encode(pages), pages))
        sender.clean_up()
    return found


def _try(subject: Subject, payload: bytes, length: int, text: str, before: Sequence[bytes] = ()) -> bytes | None:
    """A payload on a fresh channel, twice over other bytes: the pages, or None where it was refused.

    `before` are good packets' payloads of a page each.
    """
    text = f"{text}: {len(payload)} bytes of payload for {length} of pages"
    found = []
    for fill in (0xA5, 0x5A):
        receiver = subject.receiver()
        for good in before:
            receiver.takes(good, PAGE, "a good packet")
        found.append(receiver.takes(payload, length, text, fill))
        receiver.clean_up("after that payload")
    if found[0] != found[1]:
        what = "refused it the other time" if None in found else "left bytes of its pages as they were"
        raise Broken(f"multifd_recv({text})", f"took it, and {what}")
    return found[0]


@check("A payload can be anything: fills all of `pages` or raises CompressorError.")
def flipped(subject: Subject) -> None:
    mix = random.Random(14)
    for payload, pages in _samples(subject):
        size = 8 * len(payload)
        for bit in [*range(min(160, size)), *(mix.randrange(size) for _ in range(30))]:
            damaged = bytearray(payload)
            damaged[bit >> 3] ^= 1 << (bit & 7)
            _try(subject, bytes(damaged), len(pages), f"a good payload with bit {bit} flipped")


@check("A payload can be anything: fills all of `pages` or raises CompressorError.")
def anything(subject: Subject) -> None:
    mix = random.Random(15)
    for length in (1, 4, 20, 1000, PACKET_SIZE, MAX_PAYLOAD):
        for name, kind in KINDS.items():
            for pages in (1, full()):
                noise = b"".join(kind(mix, PAGE) for _ in range(MAX_PAYLOAD // PAGE))[-length:]
                _try(subject, noise, pages * PAGE, f"{name} bytes")


@check("A payload can be anything: fills all of `pages` or raises CompressorError.")
def swapped(subject: Subject) -> None:
    sender = subject.sender()
    payloads = [sender.encode(mixed(16 + number, 1)) for number in range(4)]
    for order in ((1,), (3, 2), (0, 2), (0, 0), (0, 1, 0)):
        *before, last = (payloads[number] for number in order)
        text = f"packets of one stream in the order {', '.join(str(number + 1) for number in order)}"
        _try(subject, last, PAGE, text, before)


@check("A payload that holds less than `pages`, or more, is an error.")
def truncated(subject: Subject) -> None:
    for payload, pages in _samples(subject):
        size = len(payload)
        for length in sorted(
            {*range(1, min(size, 40)), *range(max(1, size - 40), size), *range(1, size, size // 20 + 1)}
        ):
            came = _try(subject, payload[:length], len(pages), f"a good payload cut to {length} of {size} bytes")
            if came is not None and came != pages:
                called = f"multifd_recv({length} of the {size} bytes of a good payload)"
                raise Broken(called, f"took it: {difference(came, pages, PAGE)}")


@check("A payload that holds less than `pages`, or more, is an error.")
def another_size(subject: Subject) -> None:
    for payload, pages in _samples(subject):
        count = len(pages) // PAGE
        for other in {1, count - 1, count + 1, 2 * count, full()} - {0, count}:
            if _try(subject, payload, other * PAGE, f"a good payload of {count} pages for {other}") is not None:
                raise Broken(f"multifd_recv(a good payload of {count} pages, for {other} pages)", "took it")


@check("bytes of a payload that are left over are an error, whether they were read or not.")
def padded(subject: Subject) -> None:
    for payload, pages in _samples(subject):
        for more in (1, 3, 4, 8, 100, MAX_PAYLOAD - len(payload)):
            if _try(subject, payload + b"\xff" * more, len(pages), f"a good payload and {more} bytes more") is not None:
                raise Broken(f"multifd_recv(a good payload and {more} bytes of 0xff)", "took it")


@check("An error is a `multifd.errors.CompressorError` with one line of text: what came, and what was expected.")
def messages(subject: Subject) -> None:
    for payload, pages in _samples(subject):
        bad = [payload[:1], payload[: len(payload) // 2], payload[:-1], payload + b"\xff", b"\xff" * 100, bytes(100)]
        for damaged in bad:
            receiver = subject.receiver()
            receiver.takes(damaged, len(pages), f"{len(damaged)} bytes of a damaged payload")
            receiver.clean_up()
            if receiver.refused is not None and not _line(receiver.refused):
                raise Broken("multifd_recv(a damaged payload)", f"raised CompressorError({receiver.refused!r})")


@check("A PeerError of `read_into` passes through unchanged.")
def connection_lost(subject: Subject) -> None:
    *_, (payload, pages) = _samples(subject)
    for after in (0, 1, len(payload) // 2, len(payload) - 1):
        receiver = subject.receiver()
        called = f"multifd_recv({receiver.text(f'{len(payload)} bytes of payload, lost after {after}')})"
        try:
            receiver.recv(payload, memoryview(bytearray(len(pages))), lost_after=after)
        except Lost:
            receiver.clean_up("after a lost connection")
            continue
        except HOOK_ERRORS as error:
            raise Broken(called, describe(error)) from error
        raise Broken(called, "returned as if nothing had happened")


@check("Takes bounded memory, whatever the payload claims or decodes to.")
def bomb(subject: Subject) -> None:
    for content, payload in _bombs(subject):
        receiver = subject.receiver()
        text = f"{len(payload)} bytes of payload, {content}, for {full()} pages"
        begin = peak_begins()
        with address_space(4 * BOMB):
            receiver.takes(payload, PACKET_SIZE, text)
        _bounded(begin, receiver, text)


def _bounded(begin: int, receiver: Receiver, text: str) -> None:
    took = peak() - begin
    if took > MEMORY:
        raise Broken(
            f"multifd_recv({receiver.text(text)})", f"took {took >> 20} MiB of memory, {MEMORY >> 20} are enough"
        )


def _bombs(subject: Subject) -> list[tuple[str, bytes]]:
    """Payloads that decode to far more than a packet, of this compressor's own make."""
    sender = subject.sender()
    packets = list(_fitting(sender.encode(ZEROS) for _ in range(BOMB // PACKET_SIZE)))
    sender.clean_up()
    found = [(f"{len(packets)} packets of zeros in one", b"".join(packets))] if len(packets) > 1 else []
    sender = subject.sender()
    zeros = memoryview(bytes(BOMB)).toreadonly()
    with suppress(*HOOK_ERRORS):  # it need not take so much, but where it does, that is a bomb in any format
        made = join(call_raising(sender.compressor, "multifd_send_prepare", channel=sender.channel, pages=[zeros]))
        found += [(f"{BOMB >> 20} MiB of zeros", payload) for payload in _fitting([made])]
    sender.clean_up()
    return found


def _fitting(payloads: Iterable[bytes]) -> Iterator[bytes]:
    """As many as fit into one payload."""
    length = 0
    for payload in payloads:
        length += len(payload)
        if length > MAX_PAYLOAD:
            return
        yield payload


@check("Takes bounded memory, whatever the payload claims or decodes to.")
def claims(subject: Subject) -> None:
    *_, (payload, pages) = _samples(subject)
    begin = 0
    for field in map(struct.Struct, ("<I", ">I", "<Q", ">Q")):
        for at in range(min(64, len(payload) - field.size)):
            if not at % 8:  # what is garbage by then is not this payload's
                begin = peak_begins()
            damaged = bytearray(payload)
            field.pack_into(damaged, at, (1 << (8 * field.size - 2)) - 1)
            receiver = subject.receiver()
            text = f"a good payload whose bytes {at} to {at + field.size - 1} are a large number"
            with address_space(4 * BOMB):
                receiver.takes(damaged, len(pages), text)
            _bounded(begin, receiver, text)
            receiver.clean_up()


# --- sessions ---


@check("Safe after a failed or absent set-up, and twice; never raises.")
def cleanup(subject: Subject) -> None:
    for end in subject.ends():
        for when in ("without set-up", "without set-up, a second time"):
            end.clean_up(when)
    assert subject.ready
    for work in ("set-up", "a packet", "a damaged payload"):
        sender, receiver = subject.pair()
        pages = mixed(20, 3)
        if work == "a packet":
            _there_and_back(sender, receiver, pages)
        elif work == "a damaged payload":
            receiver.takes(sender.encode(pages)[:-1], len(pages), "a good payload without its last byte")
        for when in ("after", "a second time after"):
            sender.clean_up(f"{when} {work}")
            receiver.clean_up(f"{when} {work}")


@check("One that raises leaves nothing behind; `multifd_send_cleanup` is called all the same.")
def set_up_fails(subject: Subject) -> None:
    for end in subject.pair():  # what a library starts once for the process is there now
        end.clean_up()
    for end in subject.ends():
        _fail(end, "no descriptor can be opened", no_descriptors())
    _there_and_back(
        *subject.pair(), mixed(21, 3), text="first packet after set-ups where no descriptor could be opened"
    )


def _fail(end: Sender | Receiver, where: str, limit: AbstractContextManager[None]) -> None:
    """Set up where it may fail, and clean up."""
    called = f"multifd_{end.direction}_setup({end.text()}) where {where}"
    before = Footprint.now()
    result = "works"
    with limit:
        try:
            call_raising(end.compressor, f"multifd_{end.direction}_setup", channel=end.channel)
        except HOOK_ERRORS as error:
            result = describe(error)
    end.clean_up(f"after a set-up that {result}")
    try:
        _no_more(before, Footprint.now(), called)
    except Broken as broken:
        raise Broken(called, f"{result}, and with cleanup {broken.came}") from broken


@check("One that raises leaves nothing behind; `multifd_recv_cleanup` is called all the same.")
def set_up_without_library(subject: Subject) -> None:
    no_libraries()
    for end in subject.ends():
        _fail(end, "no library can be loaded", nullcontext())


@check("What a channel needs is kept in its `compress_data`, so that channels share nothing that one of them changes.")
def channels_apart(subject: Subject) -> None:
    first = subject.pair(number=0)
    for number in range(1, 12):
        second = subject.pair(number=number)
        for step in range(4):
            pages = [mixed(100 + 10 * number + 2 * step + which, 5) for which in (0, 1)]
            payloads = [sender.encode(data) for (sender, _), data in zip((first, second), pages, strict=True)]
            for which in (1, 0):
                text = f"packet after another channel's, {len(payloads[which])} bytes of payload"
                (first, second)[which][1].decode(payloads[which], pages[which], text)
        for end in second:
            end.clean_up()


@check("called by two at once, and different channels run at the same time.")
def threads(subject: Subject) -> None:
    count = 8
    ready = threading.Barrier(count)
    failures: list[BaseException] = []
    assert subject.ready  # asked before the channels begin
    memory = mixed(200, full())

    def run(number: int) -> None:
        try:
            ready.wait()
            sender, receiver = subject.pair(number=number)
            for packet in range(20):
                pages = memory[(number + packet) * PAGE :][: (1 + 6 * packet) * PAGE]
                _there_and_back(sender, receiver, pages, text=f"packet {packet + 1}, while {count} channels run")
            sender.clean_up()
            receiver.clean_up()
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    running = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failures:
        raise failures[0]


# --- settings ---


def _levels(compressor: Compressor) -> list[int]:
    """All levels, or of many the lowest, the highest, and some between; none where it has none."""
    levels, default = compressor.facts.levels, compressor.facts.default_level
    if levels is None:
        return []
    if len(levels) <= 12:
        return list(levels)
    return sorted({levels[0], levels[-1], *levels[:: len(levels) // 5], default or 0} & set(levels))


@check("`levels` is the range of levels the sending side takes, every one of them, and `default_level` one of it")
def levels(subject: Subject) -> None:
    compressor = subject.compressor
    for level in _levels(compressor) or _not_asked("it has no levels"):
        sender, receiver = subject.pair({"level": str(level)})
        for pages in (mixed(22, 24), mixed(23, 3)):
            _there_and_back(sender, receiver, pages)
        sender.clean_up()
        receiver.clean_up()


@check("Where `live`, core may set another level of the ladder before any packet")
def ladder(subject: Subject) -> None:
    steps = subject.compressor.facts.ladder or _not_asked("it has no ladder")
    assert subject.ready
    sender, receiver = subject.ends()
    sender.channel.live = True
    for end in (sender, receiver):
        end.set_up()
    mix = random.Random(25)
    for number in range(30):
        sender.channel.level = mix.choice(steps)
        _there_and_back(sender, receiver, mixed(number, full()), text=f"packet {number} of changing levels")
        if sender.channel.level not in steps:
            raise Broken(f"multifd_send_prepare({sender.text()})", f"left a level that is none of its ladder {steps}")
    for end in (sender, receiver):
        end.clean_up()


def _not_asked(reason: str) -> NoReturn:
    raise NotAsked(reason)


@check("a value that the compressor cannot take is refused at set-up with CompressorError.")
def options(subject: Subject) -> None:
    compressor = subject.compressor
    assert subject.ready
    for option in compressor.facts.options or _not_asked("it has no options"):
        for text in _values(option):
            ends = subject.ends({option.name: text})
            works = True
            for end in ends:
                called = f"multifd_{end.direction}_setup({end.text()})"
                try:
                    call_raising(compressor, f"multifd_{end.direction}_setup", channel=end.channel)
                except CompressorError as error:
                    works = False
                    if not _line(str(error)):
                        raise Broken(called, f"raised CompressorError({str(error)!r})") from error
                except HOOK_ERRORS as error:
                    raise Broken(called, describe(error)) from error
            if works:
                _there_and_back(*ends, mixed(24, 5), text=f"packet with {option.name}={text}")
            for end in ends:
                end.clean_up()


def _values(option: Option) -> tuple[str, ...]:
    """Values that core lets pass."""
    if isinstance(option.default, bool):
        return ("on", "off")
    if isinstance(option.default, int):
        return (str(option.default), "0", "1", "-1", str(1 << 31), str(1 << 70))
    return (option.default, "", "no such thing", "\N{SNOWMAN}", "x" * 5000)


@check("`counts` is the compressor's to fill: the way that a packet took -> how many did")
def counts(subject: Subject) -> None:
    ends = subject.pair()
    for number in range(10):
        _there_and_back(*ends, mixed(30 + number, 5))
    for end in ends:
        for way, count in end.channel.counts.items():
            if not _line(way) or not isinstance(count, int) or not 0 <= count <= 10:
                raise Broken(f"10 packets through multifd_{end.direction}", f"counted {end.channel.counts}")


# --- what QEMU wrote ---


@check("A flag of QEMU's promises QEMU's payloads.")
def captures(subject: Subject) -> None:
    flag = subject.compressor.facts.flag
    if flag not in METHOD_NAMES:
        raise NotAsked(f"flag {flag} is none of QEMU's")
    method = METHOD_NAMES[flag]
    folder = resources.files("multifd.testing") / "captures"
    capture = json.loads((folder / "captures.json").read_text())[method]
    data = memoryview(zlib.decompress((folder / f"{method}.z").read_bytes()))
    receiver = subject.receiver()
    size = capture["page_size"]
    digests = []
    at = INIT.size
    while at < len(data):
        packet = RamPacket.unpack(data[at : at + header_length(size)], size)
        at += header_length(size)
        if not packet.normal:
            continue
        payload = data[at : at + packet.next_packet_size]
        at += len(payload)
        called = f"packet {packet.packet_num} of QEMU's migration {capture['capture']}, {len(payload)} bytes of payload"
        pages = receiver.takes(payload, len(packet.normal) * size, called)
        if pages is None:
            came = f"refused it: {receiver.refused}" if receiver.refused else "left bytes of the payload unread"
            raise Broken(f"multifd_recv({called})", came)
        digests.append(hashlib.sha256(pages).hexdigest())
    for number, (found, known) in enumerate(zip(digests, capture["sha256"], strict=True)):
        if found != known:
            raise Broken(
                f"multifd_recv({capture['capture']}, payload {number + 1})", "gave back other pages than the guest's"
            )
