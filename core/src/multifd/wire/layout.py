"""Layouts and words that the main channel's reader and writer share."""

from __future__ import annotations

import struct

from multifd.wire.flags import RamSave

FILE_HEADER = struct.Struct(">II")
U32 = struct.Struct(">I")
WORD = struct.Struct(">Q")
ZERO_WORD = struct.Struct(">QB")
SECTION_HEAD = struct.Struct(">II")
COMMAND_HEAD = struct.Struct(">HH")

# Plain numbers: arithmetic with an IntFlag makes a member of every result, for words of a peer.
ZERO = RamSave.ZERO.value
PAGE = RamSave.PAGE.value
CONTINUE = RamSave.CONTINUE.value
MEM_SIZE = RamSave.MEM_SIZE.value
EOS = RamSave.EOS.value
FLUSH = RamSave.MULTIFD_FLUSH.value
