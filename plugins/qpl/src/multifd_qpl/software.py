"""The compressor "qpl-sw": QEMU's qpl format without libqpl, on any machine."""

from __future__ import annotations

from multifd.formats.pagelist import DEFAULT_LEVEL, LADDER, LEVELS, SoftwareCompressor
from multifd.hookspecs import METHODS, Facts

SUMMARY = "QEMU's qpl format in software, levels 1-9"

plugin = SoftwareCompressor(
    Facts("qpl-sw", "qpl", METHODS["qpl"], SUMMARY, LEVELS, DEFAULT_LEVEL, ladder=LADDER),
    wrapped=False,
)
