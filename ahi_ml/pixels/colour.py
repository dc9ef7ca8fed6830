"""Colour, floor 1: YBR_FULL and PALETTE COLOR to RGB."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ahi_ml.errors import DataError, MetadataError
from ahi_ml.pixels.arrays import blocks
from ahi_ml.pixels.lookup import LookupTable, look_up
from ahi_ml.types import AnyArray, StoredFrame

__all__ = ["palette_to_rgb", "ybr_full_to_rgb"]


def ybr_full_to_rgb(image: AnyArray) -> NDArray[np.uint8]:
    """Turn YBR_FULL into RGB, PS3.3 C.7.6.3.1.2; YBR_FULL_422 too, once a decoder has upsampled it.

    Rounds to nearest, halves up, in exact integer arithmetic; float32 arithmetic gets green wrong by 1 for
    some 30 of the 16.8 million inputs.

    I/O: none.

    Parameters
    ----------
    image : (..., 3) uint8
        Y, Cb, Cr in the last axis.

    Returns
    -------
    (..., 3) uint8
        Red, green, blue; a new array.

    Raises
    ------
    DataError
        The array is of another shape or dtype.
    """
    if image.dtype != np.uint8 or image.ndim < 2 or image.shape[-1] != 3:
        raise DataError(f"YBR_FULL needs (rows, columns, 3) uint8, not {image.shape} {image.dtype}")
    out = np.empty(image.shape, np.uint8)
    for rows in blocks(image):
        luma, blue, red = (image[rows][..., sample].astype(np.int32) for sample in range(3))
        blue -= 128
        red -= 128
        channels = (  # green: 0.114 * 1.772 / 0.587 of blue, 0.299 * 1.402 / 0.587 of red
            (1402 * red + 500) // 1000,
            (293_500 - 202_008 * blue - 419_198 * red) // 587_000,
            (1772 * blue + 500) // 1000,
        )
        for sample, channel in enumerate(channels):
            channel += luma
            np.clip(channel, 0, 255, out=channel)
            np.copyto(out[rows][..., sample], channel, casting="unsafe")
    return out


def palette_to_rgb(indices: StoredFrame, red: LookupTable, green: LookupTable, blue: LookupTable) -> AnyArray:
    """Turn PALETTE COLOR indices into RGB, PS3.3 C.7.6.3.1.5. I/O: none.

    Parameters
    ----------
    indices : ndarray of any integer dtype
        Stored values, any shape.
    red, green, blue : LookupTable
        Palettes, alike in `first` and length.

    Returns
    -------
    (..., 3) uint8, or uint16 when a palette has more than 8 bits

    Raises
    ------
    MetadataError
        The palettes do not belong together.
    """
    palettes = (red, green, blue)
    if len({(palette.first, len(palette)) for palette in palettes}) != 1:
        raise MetadataError(f"Palettes differ in first value or length: {red}, {green}, {blue}")
    dtype = np.uint8 if max(palette.bits for palette in palettes) <= 8 else np.uint16
    table = np.stack([palette.table for palette in palettes], axis=-1).astype(dtype)
    out = np.empty((*indices.shape, 3), dtype)
    look_up(table, red.first, indices, out)
    return out
