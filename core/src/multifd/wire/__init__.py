"""QEMU's wire: packets, the main channel, the return path; no I/O."""

from multifd._compat import older

__getattr__ = older(__name__)
