"""Compressors: found, asked, loaded, and called."""
