"""The compressors "qatzip" and "qatzip-sw": one payload format, QEMU's `qatzip`.

`hardware` drives Intel QuickAssist devices through libqatzip, `software` makes and reads the
same bytes without it; `members` knows the format, `library` libqatzip, `devices` why there is
no device.  Importing any of them touches no library of the system.
"""

__version__ = "0.2.0"
