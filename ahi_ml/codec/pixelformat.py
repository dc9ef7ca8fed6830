"""What the Image Pixel attributes say of a frame: its shape, its type, its range, and those of its lower resolutions.

Floor 1; no I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ahi_ml.codec.syntaxes import describe
from ahi_ml.errors import ConfigError, DecodeError
from ahi_ml.types import AnyArray

__all__ = ["PixelFormat", "match_shape"]


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """The Image Pixel attributes that fix the shape and type of a frame (PS3.3 C.7.6.3).

    Parameters
    ----------
    rows, columns : int
        Size of the frame.
    samples : int
        Samples per Pixel: 1, or 3 for colour.
    bits_allocated : int
        1, 8, 16 or 32.
    bits_stored : int
        Bits that carry the value.
    signed : bool
        Pixel Representation 1.
    photometric : str
        Photometric Interpretation.
    labels : bool
        Whether values are names (the segments of a label map), which a lower resolution must not blend.
        Single bits and palette indices are so anyway.
    """

    rows: int
    columns: int
    samples: int = 1
    bits_allocated: int = 16
    bits_stored: int = 16
    signed: bool = False
    photometric: str = "MONOCHROME2"
    labels: bool = False

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """The dtype of stored values; single bits unpack to uint8."""
        return _dtype(self.bits_allocated, self.signed)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(rows, columns)``, or ``(rows, columns, samples)`` for colour."""
        plane = (self.rows, self.columns)
        return plane if self.samples == 1 else (*plane, self.samples)

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded frame."""
        return self.rows * self.columns * self.samples * self.dtype.itemsize

    @property
    def stored_range(self) -> tuple[int, int]:
        """Lowest and highest value of `bits_stored` bits, as far as the dtype holds them."""
        bits = min(self.bits_stored, max(self.bits_allocated, 8))
        return (-(1 << bits - 1), (1 << bits - 1) - 1) if self.signed else (0, (1 << bits) - 1)

    @property
    def blends(self) -> bool:
        """Whether a value between two values means something: not in masks, label maps and palette indices."""
        return not self.labels and self.bits_stored > 1 and self.photometric != "PALETTE COLOR"

    def reduced(self, reduce: int) -> PixelFormat:
        """The format of the same frame `reduce` resolution levels lower: both sides halved each time, rounded up.

        I/O: none.

        Raises
        ------
        ConfigError
            `reduce` is negative.
        """
        if reduce < 0:
            raise ConfigError(f"reduce is a number of resolution levels, 0 or more, not {reduce}")
        return _reduced(self, reduce)


@lru_cache(16)
def _dtype(bits_allocated: int, signed: bool) -> np.dtype[np.integer]:
    return np.dtype(f"{'i' if signed and bits_allocated > 1 else 'u'}{max(bits_allocated, 8) // 8}")


@lru_cache(64)
def _reduced(pixels: PixelFormat, reduce: int) -> PixelFormat:
    return replace(pixels, rows=-(-pixels.rows >> reduce), columns=-(-pixels.columns >> reduce))


def match_shape(image: AnyArray, pixels: PixelFormat, syntax: str) -> AnyArray:
    """Give a decoded frame the shape of its metadata: axes of one sample come and go. I/O: none.

    Raises
    ------
    DecodeError
        It has another shape.
    """
    if image.size == pixels.rows * pixels.columns * pixels.samples and image.ndim < 3 + (pixels.samples > 1):
        squeezed = image.reshape([n for n in image.shape if n != 1] or [1])
        if squeezed.shape == tuple(n for n in pixels.shape if n != 1) or squeezed.size == 1:
            return image.reshape(pixels.shape)
    if image.ndim == 3 and image.shape[2] == 4 and pixels.samples == 3:
        raise DecodeError(f"{describe(syntax)}: the frame has an alpha channel, which DICOM does not allow")
    raise DecodeError(f"{describe(syntax)}: the frame decodes to {image.shape}, the metadata says {pixels.shape}")
