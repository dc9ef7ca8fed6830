"""The low-pass band of the reversible 5/3 wavelet, and the colour transform it is taken in. Floor 1; no I/O.

What a JPEG 2000 decoder returns at a lower resolution, computed from pixels: for frames of other
syntaxes, and for resolutions below the lowest of a codestream. Nothing here clips or wraps.

Sources: ITU-T T.800 F.4 (forward transform: columns, then rows; 5/3 lifting; mirrored ends) and
G.2 (reversible colour transform).
"""

from __future__ import annotations

import math

import numpy as np

from ahi_ml.types import AnyArray

__all__ = ["low_pass", "low_pass_range", "reached"]

# Sums of the magnitudes of the filter's taps, of both axes: how much wider a range can become. After one step along
# an axis the taps are (-1, 2, 6, 2, -1) / 8, and their sum 12 / 8; after many it tends to 1.716.
_GAINS = (1.0, 1.5**2, 1.625**2, 1.6875**2)
_GAIN_OF_MANY = 2.95
_ROUNDING = 16  # a step: 0.75 along each axis, widened by the later ones, and in up to three differences of colours


def low_pass(image: AnyArray, reduce: int, *, colour_transform: bool = False) -> AnyArray:
    """Low-pass band of a frame after `reduce` steps of the reversible 5/3 wavelet.

    I/O: none.

    Parameters
    ----------
    image : (rows, columns) or (rows, columns, samples) ndarray
        Integers; 32 bits are computed in 64, fewer in 32.
    reduce : int
        How many times both sides are halved, rounded up; a side of one sample stays.
    colour_transform : bool
        Whether three samples are taken apart into luminance and colour differences first, as in a
        codestream with the reversible colour transform (RCT). Roundings differ a little from those
        of each sample alone.

    Returns
    -------
    ndarray, int32 or int64
        Not clipped: the filter overshoots. Values leave the range of `image` by up to 0.63 times its
        width on either side after one step, 0.83 after two, 0.97 after many.
    """
    values = image.astype(np.int64 if image.itemsize > 2 else np.int32)
    if colour_transform:
        values = _to_differences(values)
    for _ in range(reduce):
        if values.shape[:2] == (1, 1):
            break
        values = _low(_low(values, 0), 1)
    return _to_rgb(values) if colour_transform else values


def low_pass_range(low: int, high: int, reduce: int) -> tuple[int, int]:
    """Bounds of all low-pass values of frames with stored values from `low` to `high`, at most `reduce` steps down.

    I/O: none.

    Returns
    -------
    (int, int)
        Also of colour with `colour_transform`; a little wider than what can occur.
    """
    gain = _GAINS[reduce] if reduce < len(_GAINS) else _GAIN_OF_MANY
    overshoot = math.ceil((high - low) * (gain - 1) / 2) + _ROUNDING * reduce
    return low - overshoot, high + overshoot


def reached(mask: AnyArray, reduce: int) -> AnyArray:
    """Tell which low-pass samples depend on any of some samples of a frame.

    I/O: none.

    Parameters
    ----------
    mask : (rows, columns) ndarray of bool
        Those samples.
    reduce : int
        As for `low_pass`.

    Returns
    -------
    ndarray of bool, shape of the low-pass band
    """
    for _ in range(reduce):
        for axis in (0, 1):
            if mask.shape[axis] == 1:
                continue
            x = np.moveaxis(mask, axis, 0)
            even, odd = x[0::2], x[1::2]
            near = even.copy()  # the taps of sample n are at 2n - 2 to 2n + 2
            near[1:] |= even[:-1]
            near[:-1] |= even[1:]
            near[: len(odd)] |= odd
            near[1:] |= odd[: len(even) - 1]
            mask = np.moveaxis(near, 0, axis)
    return mask


def _low(image: AnyArray, axis: int) -> AnyArray:
    """Low-pass samples along an axis of a signal that begins at an even place."""
    if image.shape[axis] == 1:
        return image
    x = np.moveaxis(image, axis, 0)
    even, odd = x[0::2], x[1::2]
    high = odd.copy()  # x(2n+1) - floor((x(2n) + x(2n+2)) / 2); an even length mirrors x(2n+2) to x(2n)
    inner = len(even) - 1
    high[:inner] -= (even[:-1] + even[1:]) >> 1
    if len(odd) > inner:
        high[-1] -= even[-1]
    low = np.empty_like(even)  # x(2n) + floor((y(2n-1) + y(2n+1) + 2) / 4), mirrored at both ends
    low[0] = 2 * high[0]
    np.add(high[:-1], high[1:], out=low[1 : len(high)])
    if len(even) > len(high):
        low[-1] = 2 * high[-1]
    low += 2
    low >>= 2
    low += even
    return np.moveaxis(low, 0, axis)


def _to_differences(rgb: AnyArray) -> AnyArray:
    red, green, blue = (rgb[..., sample] for sample in range(3))
    return np.stack([(red + 2 * green + blue) >> 2, blue - green, red - green], axis=2)


def _to_rgb(differences: AnyArray) -> AnyArray:
    luminance, blue, red = (differences[..., sample] for sample in range(3))
    green = luminance - ((blue + red) >> 2)
    return np.stack([red + green, green, blue + green], axis=2)
