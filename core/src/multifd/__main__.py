"""Where `multifd` and `python -m multifd` begin."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from multifd import __version__


def main() -> int:
    """The version at once; everything else through the command line proper."""
    if sys.argv[1:] == ["--version"]:
        with suppress(OSError):  # or else it is said why
            os.write(1, f"multifd {__version__}\n".encode())
            return 0
    from multifd.cli.main import main as run  # --version need not wait for it

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
