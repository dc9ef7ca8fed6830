"""What the pixel arithmetic of this room shares, floor 1: checked numbers and arrays, and walking in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import EllipsisType
from typing import Any

import numpy as np

from ahi_ml.errors import ConfigError
from ahi_ml.types import AnyArray

__all__ = ["blocks", "check_pair", "finite", "set_floats", "working_dtype"]

_BLOCK = 32_768  # elements worked on at once where a scratch array is needed: 256 KB of float64


def finite(value: Any) -> float:
    """Return a number as a float; ConfigError when it is infinite or NaN."""
    number = float(value) + 0.0  # no -0.0: equal objects must have equal reprs
    if not math.isfinite(number):
        raise ConfigError(f"Pixel arithmetic needs finite numbers, not {number}")
    return number


def set_floats(instance: object, *names: str) -> None:
    """Make finite floats of the named fields of a frozen instance."""
    for name in names:
        object.__setattr__(instance, name, finite(getattr(instance, name)))


def check_pair(values: AnyArray, out: AnyArray) -> None:
    """Refuse an output that is not floating, or of another shape than the values."""
    if out.dtype.kind != "f":
        raise ConfigError(f"Pixel arithmetic writes floating numbers; the output is {out.dtype}")
    if values.shape != out.shape:
        raise ConfigError(f"Output of shape {out.shape} for pixels of shape {values.shape}")


def working_dtype(values: np.dtype[Any], out: np.dtype[Any]) -> type[np.float32] | type[np.float64]:
    """Return float32 when it holds every value and `out` asks for no more, else float64."""
    return np.float32 if out.itemsize <= 4 and np.can_cast(values, np.float32) else np.float64


def blocks(array: AnyArray) -> Iterator[slice | EllipsisType]:
    """Yield keys that walk the first axis of `array` in pieces of some `_BLOCK` elements."""
    if array.size <= _BLOCK or array.ndim == 0:
        yield ...
        return
    rows = max(1, _BLOCK * array.shape[0] // array.size)
    for start in range(0, array.shape[0], rows):
        yield slice(start, start + rows)
