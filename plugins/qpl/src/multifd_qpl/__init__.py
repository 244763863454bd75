"""The compressors "qpl" and "qpl-sw": one payload format, QEMU's `qpl`.

`hardware` drives Intel's In-Memory Analytics Accelerator (IAA) through libqpl, `software` makes
and reads the same bytes without it.  Importing either touches no library of the system.
"""

__version__ = "0.2.0"
