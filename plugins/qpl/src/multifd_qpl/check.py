"""python -m multifd_qpl.check [software]: whether IAA, or libqpl's path in software, works with this plugin."""

from __future__ import annotations

import sys

from multifd.formats.pagedevice import check
from multifd_qpl.hardware import HARDWARE, SOFTWARE, Libqpl

if __name__ == "__main__":
    check(Libqpl(SOFTWARE if sys.argv[1:] == ["software"] else HARDWARE), wrapped=False)
