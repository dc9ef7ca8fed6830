"""Stored value to modality value by slope and intercept, floor 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ahi_ml.errors import ConfigError
from ahi_ml.pixels.arrays import blocks, check_pair, set_floats, working_dtype
from ahi_ml.pixels.stored import stored_range
from ahi_ml.types import AnyArray

__all__ = ["Rescale"]

_TWO_PASSES = 1 << 17  # elements: numpy takes one pass in pieces that it copies, at a third more time


@dataclass(frozen=True)
class Rescale:
    """Stored value to modality value by a line, PS3.3 C.11.1.1.2: ``value = stored * slope + intercept``.

    Parameters
    ----------
    slope, intercept : float
        Rescale Slope, modality units (such as HU) per stored unit, not 0; Rescale Intercept, modality units.

    Raises
    ------
    ConfigError
        The slope is 0, which `from_tags` forgives, or a number is not finite.
    """

    slope: float = 1.0
    intercept: float = 0.0

    def __post_init__(self) -> None:
        set_floats(self, "slope", "intercept")
        if self.slope == 0:
            raise ConfigError(f"{self}: a slope of 0 maps every pixel to one value; use Rescale.from_tags")

    @classmethod
    def from_tags(cls, slope: float | None, intercept: float | None) -> Rescale:
        """Build from what a file says: a slope that is 0 or missing counts as 1, a missing intercept as 0."""
        return cls(slope or 1.0, intercept or 0.0)

    def value_range(self, bits_stored: int, signed: bool) -> tuple[float, float]:
        """Return the lowest and highest modality value that the stored range can give."""
        low, high = (value * self.slope + self.intercept for value in stored_range(bits_stored, signed))
        return min(low, high), max(low, high)

    def into(self, stored: AnyArray, out: AnyArray) -> None:
        """Write modality values into `out`.

        One float32 pass where that is exact: slope 1, integers of at most 16 bits, an intercept that float32
        holds (all CT). Else float64, rounded once: float32 terms lose several last places when they cancel.

        I/O: none.

        Parameters
        ----------
        stored : (rows, columns[, samples]) ndarray, integer or floating
            Stored values; not changed.
        out : ndarray of any floating dtype, shape of `stored`
            Receives modality values.

        Raises
        ------
        ConfigError
            `out` has another shape, or is not floating.
        """
        check_pair(stored, out)
        self.writer(stored.dtype, out.dtype)(stored, out)

    def writer(self, stored: np.dtype[Any], out: np.dtype[Any]) -> Callable[[AnyArray, AnyArray], Any]:
        """Return what `into` does with arrays of these dtypes: chosen once, for many of them.

        I/O: none.

        Parameters
        ----------
        stored, out : dtype
            Of integers or floating numbers, and floating.

        Returns
        -------
        callable
            Takes stored values and where modality values go, of one shape and of these dtypes: it does not look.
        """
        if self.slope == 1.0:
            exact = working_dtype(stored, out) == np.float32 and float(np.float32(self.intercept)) == self.intercept
            if exact and out == np.float32:
                return partial(_add, np.float32(self.intercept))
            work = np.float32 if exact else np.float64
            return partial(np.add, work(self.intercept), dtype=work)
        if self.intercept == 0.0:
            return partial(np.multiply, self.slope, dtype=np.float64)
        return self._in_blocks

    def _in_blocks(self, stored: AnyArray, out: AnyArray) -> None:
        for rows in blocks(stored):
            scratch = stored[rows].astype(np.float64)
            np.multiply(scratch, self.slope, out=scratch)
            np.add(scratch, self.intercept, out=scratch)
            np.copyto(out[rows], scratch, casting="same_kind")


def _add(intercept: np.float32, stored: AnyArray, out: AnyArray) -> None:
    """Write ``stored + intercept`` in float32: in two passes while they fit into the processor's cache."""
    if stored.size > _TWO_PASSES:
        np.add(stored, intercept, out=out, dtype=np.float32)
    else:
        np.copyto(out, stored)
        np.add(out, intercept, out=out)
