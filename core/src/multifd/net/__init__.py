"""Connections; the only package that knows sockets."""
