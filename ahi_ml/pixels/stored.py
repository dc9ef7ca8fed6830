"""Stored values as the attributes describe them, floor 1: their range, padding and polarity."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ahi_ml.errors import ConfigError
from ahi_ml.types import StoredFrame

__all__ = ["normalize_polarity", "padding_mask", "stored_range", "us_or_ss"]


def stored_range(bits_stored: int, signed: bool) -> tuple[int, int]:
    """Return the lowest and highest value of `bits_stored` bits, 1 to 64 or ConfigError; PS3.3 C.7.6.3.1."""
    if not 1 <= bits_stored <= 64:
        raise ConfigError(f"bits_stored must be 1 to 64, not {bits_stored}")
    return (-(1 << bits_stored - 1), (1 << bits_stored - 1) - 1) if signed else (0, (1 << bits_stored) - 1)


def padding_mask(
    stored: StoredFrame, padding_value: int | None, range_limit: int | None, *, signed: bool, bits: int
) -> NDArray[np.bool_]:
    """Tell which stored values are padding, PS3.3 C.7.5.1.1.2; ask before rescaling.

    The tags are 16-bit numbers typed by Pixel Representation, whatever the parser made of them: 63536
    in a signed image means -2000. A value that does not fit `bits` even so, but is a bit pattern of that
    width, is read as one: 4095 in a signed 12-bit image means -1. Any other value matches nothing.

    I/O: none.

    Parameters
    ----------
    stored : ndarray of any integer dtype
        Stored values.
    padding_value, range_limit : int or None
        Pixel Padding Value, and Pixel Padding Range Limit: the other end of a closed range, above or below.
    signed, bits : bool, int
        Whether Pixel Representation is 1; Bits Stored.

    Returns
    -------
    ndarray of bool, shape of `stored`
        True where padding; all False when there is no padding value.
    """
    if padding_value is None:
        return np.zeros(stored.shape, np.bool_)
    first = _padding(padding_value, signed, bits)
    last = first if range_limit is None else _padding(range_limit, signed, bits)
    if first == last:
        return np.asarray(stored == first)
    mask = np.asarray(stored >= min(first, last))
    np.logical_and(mask, stored <= max(first, last), out=mask)
    return mask


def normalize_polarity(
    stored: StoredFrame, bits_stored: int, signed: bool, out: StoredFrame | None = None
) -> StoredFrame:
    """Swap dark and bright: ``x -> (min + max of the stored range) - x``, never the image's own extremes.

    Acts on stored values, before any rescale, so that MONOCHROME1 radiographs agree with MONOCHROME2 ones;
    window tags do not apply to the result.

    I/O: none.

    Parameters
    ----------
    stored : ndarray of an integer dtype
        Stored values, all within the stored range.
    bits_stored, signed : int, bool
        Bits Stored; whether Pixel Representation is 1.
    out : ndarray, shape and dtype of `stored`, optional
        Receives the result; may be `stored` itself.

    Returns
    -------
    ndarray, shape and dtype of `stored`

    Raises
    ------
    ConfigError
        The dtype cannot hold the stored range, or `out` differs from `stored` in shape or dtype.
    """
    low, high = stored_range(bits_stored, signed)
    if stored.dtype.kind not in "iu" or low < np.iinfo(stored.dtype).min or high > np.iinfo(stored.dtype).max:
        raise ConfigError(f"{stored.dtype} cannot hold the stored range {low} to {high}")
    if out is None:
        out = np.empty_like(stored)
    elif out.shape != stored.shape or out.dtype != stored.dtype:
        raise ConfigError(f"Output is {out.shape} {out.dtype}, the pixels are {stored.shape} {stored.dtype}")
    np.subtract(np.array(low + high, stored.dtype), stored, out=out)
    return out


def us_or_ss(value: int, signed: bool) -> int:
    """Type a 16-bit "US or SS" number by Pixel Representation, however it was parsed."""
    value &= 0xFFFF
    return value - 0x10000 if signed and value > 0x7FFF else value


def _padding(value: int, signed: bool, bits: int) -> int:
    typed = us_or_ss(int(value), signed) if -0x8000 <= value <= 0xFFFF else int(value)
    if signed and stored_range(bits, True)[1] < value < 1 << bits:
        return int(value) - (1 << bits)
    return typed
