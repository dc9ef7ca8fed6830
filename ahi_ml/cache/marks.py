"""What one process remembers of the entries it has read: which were checked, and which were touched lately."""

from __future__ import annotations

import time
from random import Random

__all__ = ["BYTE", "SAMPLE_BITS", "Marks"]

_BYTES = 1 << 20  # of a bitmap of names
BYTE = _BYTES - 1
# When entries are touched again. What is read all the time goes before what was never read in a cache that is filled
# anew in less; and 16,384 mapped entries, each looked at again in some 0.1 ms, take 0.3 % of it.
_FORGET_AFTER_S = 600.0
SAMPLE_BITS = 6  # one read in 64 is checked


class Marks:
    """Bits for names, by their hashes, in fixed space: two names may share a bit.

    An entry is checked when a process first reads it and on one read in 64 from then on: checking each read would
    take half of the speed of reading results, and lets go of the GIL once more for each encoded frame.
    """

    __slots__ = ("checked", "forget_at", "random", "touched")

    def __init__(self) -> None:
        self.random = Random()
        self.checked = bytearray(_BYTES)
        self.touched = bytearray(_BYTES)
        self.forget_at = time.monotonic() + _FORGET_AFTER_S

    def lately(self) -> bytearray:
        """Return the bitmap of names touched within ten minutes."""
        now = time.monotonic()
        if now > self.forget_at:
            self.touched, self.forget_at = bytearray(_BYTES), now + _FORGET_AFTER_S
        return self.touched

    def known(self, mark: int) -> bool:
        """Whether an entry was checked and touched lately, and this read of it is not one to check."""
        return self.lately()[mark >> 3 & BYTE] >> (mark & 7) & 1 == 1 and self.random.getrandbits(SAMPLE_BITS) != 0

    def note(self, mark: int) -> None:
        """Remember that an entry was checked and touched."""
        for bitmap in (self.checked, self.touched):
            bitmap[mark >> 3 & BYTE] |= 1 << (mark & 7)

    def forget(self, mark: int) -> None:
        """The next read of an entry is a first one: it was written anew."""
        for bitmap in (self.checked, self.touched):
            bitmap[mark >> 3 & BYTE] &= ~(1 << (mark & 7))
