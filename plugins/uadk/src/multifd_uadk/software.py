"""The compressor "uadk-sw": QEMU's uadk format without libwd, on any machine.

A QEMU that has no device refuses every page that is compressed, and sends its own raw: towards
such a one, `raw=on`.
"""

from __future__ import annotations

from multifd.formats.pagelist import DEFAULT_LEVEL, LADDER, LEVELS, RAW, SoftwareCompressor
from multifd.hookspecs import METHODS, Facts, Option

SUMMARY = "QEMU's uadk format in software, levels 1-9"
RAW_OPTION = Option(RAW, False, "on: send every page as it is, for a QEMU without the device, which reads nothing else")

plugin = SoftwareCompressor(
    Facts("uadk-sw", "uadk", METHODS["uadk"], SUMMARY, LEVELS, DEFAULT_LEVEL, (RAW_OPTION,), ladder=LADDER),
    wrapped=True,
)
