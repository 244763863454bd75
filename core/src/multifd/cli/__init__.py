"""The command line; `main` is where it begins, each command a module."""
