"""python -m multifd_uadk.check: whether the Kunpeng's compression engine works with this plugin."""

from __future__ import annotations

from multifd.formats.pagedevice import check
from multifd_uadk.hardware import Libwd

if __name__ == "__main__":
    check(Libwd(), wrapped=True)
