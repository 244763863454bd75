"""The compressors "uadk" and "uadk-sw": one payload format, QEMU's `uadk`.

`hardware` drives the compression engine of HiSilicon Kunpeng processors through libwd_comp,
`software` makes and reads the same bytes without it.  Importing either touches no library of the
system.
"""

__version__ = "0.2.0"
