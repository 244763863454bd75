"""Compressors with one mistake each, as their authors make them: modules as text, and what is said of each.

`ON_LOAD` are found when they are loaded, `HANDS_BACK` and `RAISES` while they run.
"""

from __future__ import annotations

import array
import re
from collections.abc import Callable, Sequence
from typing import Any

from multifd.errors import CompressorError, PeerError
from multifd.hookspecs import Buffer, Channel, Facts, Probe, hookimpl

PLAIN = """
import zlib
from multifd.hookspecs import Channel, Facts, Option, Probe, hookimpl
@hookimpl
def multifd_compressor():
    return Facts("{name}", "{name}", {flag}, "an example", levels=range(1, 10), default_level=1)
@hookimpl
def multifd_probe():
    return Probe(True, "zlib", "1")
@hookimpl
def multifd_send_prepare(channel, pages):
    return [zlib.compress(b"".join(pages), 1)]
@hookimpl
def multifd_recv(channel, pages):
    payload = bytearray(channel.next_packet_size)
    channel.read_into(payload)
    pages[:] = zlib.decompress(payload)
"""
NOT_MARKED = "A compressor is a module (or any object) whose functions are marked with `hookimpl`"
#: Name -> (a pattern of PLAIN, what stands there instead, what is said, the beginning of the sentence).
ON_LOAD = {
    "argument": (
        "channel, pages",
        "chan, pages",
        "takes 'chan', which is none of its arguments: multifd_",
        "A function",
    ),
    "keyword": (r"recv\(channel, pages", "recv(channel, *, pages", "takes 'pages' by keyword only", "A function takes"),
    "waits": (
        "@hookimpl\ndef multifd_recv",
        "@hookimpl\nasync def multifd_recv",
        "is a generator or async",
        "A function",
    ),
    "unmarked": ("@hookimpl", "", "no function that is marked with @hookimpl: put @hookimpl above", NOT_MARKED),
    "half": (
        "@hookimpl\ndef multifd_recv",
        "def multifd_recv",
        "multifd_recv is not marked with @hookimpl",
        NOT_MARKED,
    ),
    "recieve": (
        "multifd_recv",
        "multifd_recev",
        "multifd_recev is no hook: did you mean multifd_recv?",
        "`multifd_comp",
    ),
    "cleanup": (
        "$",
        "@hookimpl\ndef multifd_send_clean_up(channel): pass",
        "did you mean multifd_send_cleanup?",
        "`multifd_compr",
    ),
    "extra": (
        "$",
        "@hookimpl\ndef multifd_flush(): pass",
        "multifd_flush is no hook",
        "`multifd_compressor`, `multifd_",
    ),
    "absent": (
        r"@hookimpl\ndef multifd_probe.*\n.*\n",
        "",
        "it has no multifd_probe",
        "`multifd_compressor`, `multifd_",
    ),
    "renamed": (
        "{name}",
        "other",
        "calls itself 'other', its entry point 'renamed'",
        "`name` is the entry point's name:",
    ),
    "flag": ("{flag}", "'31'", "flag is '31' (str), not an int", "`flag` is the method's number"),
    "truth": ("{flag}", "True", "flag is True (bool), not an int", "`flag` is the method's number"),
    "level": (r"range\(1, 10\)", "9", "levels is 9 (int), neither a range in steps of 1", "`levels` is the range"),
    "default": (
        "default_level=1",
        "default_level='1'",
        "default_level is '1' (str), not an int",
        "`levels` is the range",
    ),
    "ladder": ("default_level=1", "default_level=1, ladder=3", "ladder is 3 (int), not a tuple", "`ladder` are levels"),
    "options": ("default_level=1", "options=['fast'], default_level=1", "not a tuple of Option", "An option of a comp"),
    "option": (
        "default_level=1",
        "options=[Option('a', None, 'h')], default_level=1",
        "the default is None",
        "The type is",
    ),
    "lines": ('"an example"', '"an\\nexample"', "not one line of text", "`summary` is one line for people."),
    "wraps": (
        "@hookimpl\ndef multifd_recv",
        "@hookimpl(wrapper=True)\ndef multifd_recv",
        "its hooks do not fit this",
        "",
    ),
    "facts": ("return Facts", "return tuple", "import failed|TypeError|not Facts", ""),
    "devices": (
        '"zlib", "1"',
        '"zlib", "1", True, devices="card0"',
        "devices is 'card0' (str), not a tuple",
        "`devices` wh",
    ),
    "says": ("return Probe.*", "return True", "multifd_probe returned True (bool), not Probe", "Say whether the comp"),
}


def plain(name: str) -> str:
    """The module of one that works."""
    return PLAIN.replace("{name}", name).replace("{flag}", "31")


def on_load(name: str) -> str:
    """The module of one of ON_LOAD."""
    pattern, instead, *_ = ON_LOAD[name]
    text = re.sub(pattern if pattern != "$" else r"\Z", lambda _: instead, PLAIN)
    return text.replace("{name}", name).replace("{flag}", "31")


class Toy:
    """Stores; `mistake` is called where it says, with what the hook is given, and its result handed back."""

    def __init__(self, where: str = "", mistake: Callable[[Any], Any] = lambda _: None) -> None:
        self.where = where
        self.mistake = mistake

    def at(self, where: str, argument: Any) -> Any:
        return self.mistake(argument) if where == self.where else None

    @hookimpl
    def multifd_compressor(self) -> Facts:
        return Facts("toy", "toy", 31, "for tests")

    @hookimpl
    def multifd_probe(self) -> Probe:
        return Probe(True, "Python")

    @hookimpl
    def multifd_send_setup(self, channel: Channel) -> None:
        self.at("send_setup", channel)

    @hookimpl
    def multifd_send_prepare(self, channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        self.at("counts", channel)
        return self.at("send_prepare", pages) or [b"".join(pages)]

    @hookimpl
    def multifd_send_cleanup(self, channel: Channel) -> None:
        self.at("send_cleanup", channel)

    @hookimpl
    def multifd_recv_setup(self, channel: Channel) -> None:
        self.at("recv_setup", channel)

    @hookimpl
    def multifd_recv(self, channel: Channel, pages: memoryview) -> None:
        self.at("recv", channel)
        channel.read_into(pages)

    @hookimpl
    def multifd_recv_cleanup(self, channel: Channel) -> None:
        self.at("recv_cleanup", channel)


class Odd(BaseException):
    """Nobody's."""


class OwnError(CompressorError):
    """With arguments of its own, which core cannot give."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"code {code}: {text}")


class OwnPeerError(PeerError):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"code {code}: {text}")


class Wordless(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def deep(argument: object) -> object:
    return deep(argument)


def raising(error: BaseException) -> Callable[[Any], Any]:
    def fail(_: object) -> None:
        raise error

    return fail


def released(pages: Sequence[memoryview]) -> Sequence[memoryview]:
    for view in pages:
        view.release()
    return pages


RAISES: dict[str, Callable[[Any], Any]] = {
    "KeyboardInterrupt": raising(KeyboardInterrupt()),
    "SystemExit: 3": raising(SystemExit(3)),
    "GeneratorExit": raising(GeneratorExit()),
    "Odd": raising(Odd()),
    "RecursionError": deep,
    "code 7: no card": raising(OwnError(7, "no card")),
    "code 8: no peer": raising(OwnPeerError(8, "no peer")),
    "Wordless": raising(Wordless()),
    "MemoryError": raising(MemoryError()),
}
#: What is said -> what `multifd_send_prepare` returns instead of a payload.
HANDS_BACK: dict[str, Callable[[Any], Any]] = {
    "returned 'abc' (str)": lambda _: "abc",
    "returned b'abc' (bytes)": lambda _: b"abc",
    "returned 7 (int)": lambda _: 7,
    "(generator)": lambda pages: (bytes(page) for page in pages),
    "with 'abc' (str) in it": lambda _: [b"x", "abc"],
    "with None (NoneType) in it": lambda _: [None],
    "a memoryview of 'I' in it, 4096 bytes": lambda _: [memoryview(bytes(4096)).cast("I")],
    "a memoryview of 'B' in it, 2048 bytes": lambda _: [memoryview(bytes(4096))[::2]],
    "a array of 'H' in it, 8 bytes": lambda _: [array.array("H", [1, 2, 3, 4])],
    "made 0 bytes": lambda _: [b""],
    "made 2000000 bytes": lambda _: [bytes(20000)] * 100,
    "ValueError": released,
}
