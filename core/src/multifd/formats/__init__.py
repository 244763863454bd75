"""Payload formats that several compressors share, for plugins: a promised name."""
