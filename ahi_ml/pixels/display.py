"""Modality values made ready to look at, floor 1: display values 0 to 1, and bytes of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ahi_ml.errors import ConfigError
from ahi_ml.pixels.arrays import blocks, check_pair
from ahi_ml.pixels.lookup import LookupTable, look_up
from ahi_ml.pixels.window import Scale, Window
from ahi_ml.types import AnyArray

__all__ = ["to_display", "uint8"]


def to_display(
    modality_values: AnyArray,
    window: Window | Scale | LookupTable | None,
    *,
    invert: bool = False,
    value_range: tuple[float, float] | None = None,
    out: AnyArray | None = None,
) -> AnyArray:
    """Make modality values ready to look at: VOI first, inversion last (PS3.4 N.2).

    I/O: none.

    Parameters
    ----------
    modality_values : ndarray, integer or floating
        Modality values, any shape.
    window : Window, Scale, LookupTable or None
        VOI transform. A table's entries are divided by ``2**bits - 1``. None takes `value_range` whole.
    invert : bool
        Whether 0 is to be the brightest: MONOCHROME1, or Presentation LUT Shape INVERSE.
    value_range : (low, high), optional
        What to show without a window, such as `Rescale.value_range` gives; never guessed from the pixels.
    out : floating ndarray, shape of `modality_values`, optional
        Receives the result; may be `modality_values` itself.

    Returns
    -------
    ndarray, float32 or `out`
        0..1; NaN where the input is NaN.

    Raises
    ------
    ConfigError
        Neither window nor range was given, or `out` does not suit.
    """
    step = Scale(*value_range) if window is None and value_range is not None else window
    if step is None:
        raise ConfigError("No window and no value_range: the display range is never taken from the pixels")
    if out is None:
        out = np.empty(modality_values.shape, np.float32)
    if isinstance(step, LookupTable):
        check_pair(modality_values, out)
        table = (step.table / ((1 << step.bits) - 1)).astype(out.dtype)
        look_up(table, step.first, modality_values, out)
    else:
        step.into(modality_values, out)
    if invert:
        np.subtract(1.0, out, out=out)
    return out


def uint8(display: AnyArray, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Return display values 0..1, floating, as 0..255, halves up; clipped, NaN as 0. In `out`, if given. I/O: none."""
    if out is None:
        out = np.empty(display.shape, np.uint8)
    elif out.shape != display.shape or out.dtype != np.uint8:
        raise ConfigError(f"Output is {out.shape} {out.dtype}, the display values are {display.shape}: needs uint8")
    for rows in blocks(display):
        scratch = np.asarray(np.fmax(display[rows], 0.0))
        np.minimum(scratch, 1.0, out=scratch)
        np.multiply(scratch, 255.0, out=scratch)
        np.add(scratch, 0.5, out=scratch)
        np.copyto(out[rows], scratch, casting="unsafe")
    return out
