"""Which pages of a RAM block have come, and when."""

from __future__ import annotations

from multifd.memory.buffer import private_memory


class Arrivals:
    """Which pages of one block have come, and when: one byte of memory per page, once it came.

    0 is never, 1..254 an epoch (the time between two sync points), 255 some epoch before.
    Raises OSError where there is no room for a block of so many pages.
    """

    NEVER = 0
    LAST = 254
    BEFORE = 255
    _FORGET = bytes([NEVER]) + bytes([BEFORE]) * 255
    _STEP = 1 << 20

    def __init__(self, pages: int) -> None:
        # Not a bytearray: a peer can claim any size, and this takes memory only where it is touched.
        self._when = private_memory(pages)
        self._pages = pages
        self._epoch = 1

    def mark(self, first: int, count: int) -> tuple[bool, set[int]]:
        """Note that pages came; says whether any had come before, and which in this epoch."""
        when = self._when[first : first + count]
        again = set()
        if self._epoch in when:
            again = {first + index for index, epoch in enumerate(when) if epoch == self._epoch}
        self._when[first : first + count] = bytes([self._epoch]) * count
        return when.count(self.NEVER) != count, again

    def this_epoch(self, page: int) -> bool:
        """Whether the page has come since the last sync point."""
        return self._when[page] == self._epoch

    def next_epoch(self) -> None:
        """A sync point was passed."""
        if self._epoch == self.LAST:
            for start in range(0, self._pages, self._STEP):
                when = self._when[start : start + self._STEP]
                if any(when):
                    self._when[start : start + self._STEP] = when.translate(self._FORGET)
            self._epoch = 0
        self._epoch += 1

    def missing(self) -> tuple[int, int]:
        """How many pages never came, and the first of them (-1 if none)."""
        count = sum(
            self._when[start : start + self._STEP].count(self.NEVER) for start in range(0, self._pages, self._STEP)
        )
        return count, self._when.find(b"\0") if count else -1
