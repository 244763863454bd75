"""A QEMU over its monitor."""
