"""Snapshots on disk: the format, read and written."""

from multifd._compat import older

__getattr__ = older(__name__)
