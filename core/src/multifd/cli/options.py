"""Options that several commands have, and how words become values."""

from __future__ import annotations

import argparse
import re

SOURCE_HELP = "a raw memory image, or a snapshot's directory"
RAW_HELP = "it is a raw image, though it begins as another kind of file does"
URI_HELP = "tcp:HOST:PORT or unix:PATH"
LISTENING_CREDS = "a directory with ca-cert.pem, server-cert.pem, server-key.pem, as QEMU's tls-creds-x509"
CONNECTING_CREDS = "a directory with ca-cert.pem, client-cert.pem, client-key.pem, as QEMU's tls-creds-x509"


def plugin_options(parser: argparse.ArgumentParser) -> None:
    """Which plugins are left out, and which are added."""
    parser.add_argument(
        "--disable",
        dest="_disable",  # a command of another package may have options of these names
        action="append",
        default=[],
        metavar="NAME",
        help="leave out what a distribution provides, or else a plugin of this name; repeatable, as is MULTIFD_DISABLE",
    )
    parser.add_argument(
        "--plugin",
        dest="_plugin",
        action="append",
        default=[],
        metavar="FILE.py",
        help="a compressor under development; repeatable",
    )


def choose_plugins(arguments: argparse.Namespace) -> None:
    """Do what `plugin_options` were given, before anything is loaded."""
    left_out, files = getattr(arguments, "_disable", None), getattr(arguments, "_plugin", None)
    if left_out or files:
        from multifd.codec import discovery

        discovery.disable(left_out or ())
        for path in files or ():
            discovery.add_file(path)


def observe_option(parser: argparse.ArgumentParser) -> None:
    """Who looks on."""
    parser.add_argument(
        "--observe",
        action="append",
        default=[],
        metavar="NAME[=ARG]",
        help="who looks on: stats[=FILE], trace[=FILE], record=DIR, or an installed one; repeatable",
    )


def timeout_option(parser: argparse.ArgumentParser) -> None:
    """How long the other side may take."""
    parser.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        help="bounds connecting, first bytes and a SYNC that others wait for (30)",
    )


def progress_option(parser: argparse.ArgumentParser) -> None:
    """How often it is told how far it is."""
    parser.add_argument(
        "--progress",
        type=seconds,
        metavar="SECONDS",
        help="say every so often how far it is, also where there is no terminal",
    )


def rate_option(parser: argparse.ArgumentParser) -> None:
    """How much of a link it may take."""
    parser.add_argument(
        "--rate",
        type=size,
        metavar="LIMIT",
        help="write no more bytes a second to the destination, over all connections together: 100M, 800K (no limit)",
    )


def seconds(text: str) -> float:
    """A time."""
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a time in seconds")
    return value


def count(text: str) -> int:
    """At least one of something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def bandwidth(text: str) -> float:
    """Bits per second."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt])bit/s", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no bandwidth: write 10Gbit/s or 100Mbit/s")
    return float(found[1]) * 1000.0 ** ("kmgt".index(found[2].lower()) + 1)


#: Of `receive` and `relay`.
PAGE_SIZE_HELP = "the guest's page size, 1K to 64K, where neither the stream nor its machine type tells it (4K)"


def size(text: str) -> int:
    """Bytes; K for 1024 of them, M and G for 1024 of those each."""
    power = " KMG".find(text[-1:].upper())
    return int(text[:-1]) << 10 * power if power > 0 else int(text)


def uuid(text: str) -> bytes:
    """A uuid's 16 bytes."""
    from uuid import UUID

    try:
        return UUID(text).bytes
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a uuid") from None
