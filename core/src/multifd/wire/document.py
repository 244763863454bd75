"""JSON from somebody else: parsed within bounds."""

from __future__ import annotations

import json
import os
from typing import Any

#: Nobody's are as deep (a VM description has some 20); Python's own functions give up at several hundred.
MAX_LEVELS = 64
_TOO_DEEP = f"it is nested deeper than {MAX_LEVELS} levels"


def parse_document(text: bytes | bytearray) -> Any:
    """What a JSON text says.  Raises ValueError where it is none, or nested deeper than MAX_LEVELS."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [found]
    for _ in range(MAX_LEVELS):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError(_TOO_DEEP)
    return found


def is_text(text: str) -> bool:
    """Whether it can be written; JSON can hold halves of characters, which cannot."""
    try:
        os.fsencode(text)
        text.encode()
    except UnicodeError:
        return False
    return True
