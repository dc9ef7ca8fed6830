"""Type aliases and small protocols that every floor shares, floor 0: no behaviour, numpy only.

Shapes stand in the names: ``StoredFrame`` is ``(rows, columns)`` or ``(rows, columns, samples)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["AnyArray", "Buffer", "FloatArray", "Output", "PathType", "RateLimit", "StoredFrame"]

AnyArray = NDArray[Any]
StoredFrame = NDArray[np.integer[Any]]
FloatArray = NDArray[np.float64]
Buffer = bytes | bytearray | memoryview
PathType = str | PathLike[str]
RateLimit = float | Mapping[str, float | Sequence[float]]
"""Frames a second; or by operation, requests a second, or these and the burst."""

Output = Literal["stored", "modality", "display"]
"""Where reading a frame stops: stored values, rescaled to modality values, or ready to look at."""


class FrameStep(Protocol):
    """A pixel operation that the reader runs in its decode threads, on one frame, in place."""

    def apply(self, image: AnyArray) -> None:
        """Change `image`, ``(rows, columns[, samples])`` float32, in place."""
        ...
