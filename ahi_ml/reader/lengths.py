"""How much of an encoded frame lower resolutions need: to stop a download there, and to read no more of the cache."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ahi_ml.client import Part
from ahi_ml.codec import prefix, prefixes
from ahi_ml.index import FrameSource
from ahi_ml.types import Buffer

__all__ = ["lengths_of", "part_of"]

_MOST_LEVELS = 8


def part_of(source: FrameSource, reduce: int) -> Part | None:
    """What to fetch of a frame for a resolution; None for all of it. I/O: none."""
    if not reduce:
        return None
    kind = source.profile

    def needed(head: bytes) -> tuple[int, bool]:
        answer = prefix(head, kind.syntax, kind.pixels, reduce)
        return sys.maxsize if answer.size is None else answer.size, answer.known

    return Part(needed)


def lengths_of(source: FrameSource, data: Buffer, reduce: int) -> Sequence[int]:
    """How many bytes are enough for ``reduce`` 1, 2, ... of a frame, of which there is so much as `reduce` needs.

    I/O: none. 0 for resolutions that need more than there is.
    """
    kind = source.profile
    if not reduce:
        return prefixes(data, kind.syntax, kind.pixels)
    answers = [prefix(data, kind.syntax, kind.pixels, level) for level in range(reduce, _MOST_LEVELS + 1)]
    return [0] * (reduce - 1) + [answer.size or 0 if answer.known else 0 for answer in answers]
