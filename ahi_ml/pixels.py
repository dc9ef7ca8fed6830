"""Pixel arithmetic on decoded frames, floor 1: stored value to modality value to display value, and colour.

Holds the value objects that say what to do and the functions that do it; knows neither files nor metadata
documents, and does no I/O. The objects are frozen, hashable and picklable; equal ones have equal `repr`,
different ones different: caches use it as a fingerprint.

NumPy ufuncs write into the caller's array and release the GIL, so decode threads run in parallel. Where
exactness needs float64, it is used in blocks that stay in the processor's cache. NaN stays NaN.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ahi_ml.errors import ConfigError, DataError, MetadataError
from ahi_ml.types import AnyArray, Buffer, StoredFrame

__all__ = [
    "LookupTable",
    "Normalize",
    "Rescale",
    "Scale",
    "Window",
    "normalize_polarity",
    "padding_mask",
    "palette_to_rgb",
    "stored_range",
    "to_display",
    "uint8",
    "ybr_full_to_rgb",
]

_BLOCK = 32_768  # elements worked on at once where a scratch array is needed: 256 KB of float64
_MAX_ENTRIES = 65_536
_PRESETS = {  # centre and width, HU
    "abdomen": (50.0, 400.0),
    "bone": (400.0, 1800.0),
    "brain": (40.0, 80.0),
    "lung": (-600.0, 1500.0),
    "mediastinum": (50.0, 350.0),
}


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
        _set_floats(self, "slope", "intercept")
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
        _check_pair(stored, out)
        work = _working_dtype(stored, out)
        if self.slope == 1.0:
            exact = work == np.float32 and float(np.float32(self.intercept)) == self.intercept
            np.add(stored, self.intercept, out=out, dtype=np.float32 if exact else np.float64)
        elif self.intercept == 0.0:
            np.multiply(stored, self.slope, out=out, dtype=np.float64)
        else:
            for rows in _blocks(stored):
                scratch = stored[rows].astype(np.float64)
                np.multiply(scratch, self.slope, out=scratch)
                np.add(scratch, self.intercept, out=scratch)
                np.copyto(out[rows], scratch, casting="same_kind")


@dataclass(frozen=True, repr=False)
class LookupTable:
    """A Modality LUT (PS3.3 C.11.1.1), VOI LUT (C.11.2.1.1) or palette channel (C.7.6.3.1.5).

    Inputs below `first` take the first entry, inputs beyond the table the last. Floating inputs go to the
    nearest entry, halves to even. Not a frame step: what the entries mean is for the caller to say.

    Parameters
    ----------
    first : int
        Input value that the first entry belongs to.
    values : bytes
        1 to 65,536 entries, unsigned 16-bit little-endian whatever `bits` is.
    bits : int
        Bits of an entry, 1 to 16: the range of the output is 0 to ``2**bits - 1``.

    Raises
    ------
    MetadataError
        The numbers do not describe a table.
    """

    first: int
    values: bytes
    bits: int = 16

    def __post_init__(self) -> None:
        for name, kind in (("first", int), ("values", bytes), ("bits", int)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        sound = 1 <= self.bits <= 16 and len(self.values) % 2 == 0 and 1 <= len(self) <= _MAX_ENTRIES
        if not sound or int(self.table.max()) >> self.bits:
            raise MetadataError(f"Unusable lookup table: {len(self.values)} bytes, {self.bits} bits an entry")

    def __len__(self) -> int:
        return len(self.values) // 2

    def __repr__(self) -> str:
        digest = hashlib.sha256(self.values).hexdigest()[:32]
        return f"LookupTable(first={self.first}, entries={len(self)}, bits={self.bits}, sha256={digest})"

    @classmethod
    def from_tags(cls, descriptor: Sequence[int], data: Buffer | Sequence[int], signed: bool) -> LookupTable:
        """Build from LUT Descriptor and LUT Data.

        I/O: none.

        Parameters
        ----------
        descriptor : three int
            Number of entries (0 means 65,536), first mapped value, bits of an entry.
        data : bytes or sequence of int
            Entries of 8 or 16 bits, little-endian; as integers, one entry each, or two 8-bit ones packed.
        signed : bool
            Whether the first mapped value is signed: by Pixel Representation; for a VOI LUT, whether
            modality values can be negative.

        Returns
        -------
        LookupTable
            `bits` as the descriptor says, but 8 for 8-bit data, and 16 when an entry needs more.

        Raises
        ------
        MetadataError
            The descriptor is malformed, or the data's length contradicts it.
        """
        entries, first, bits = _descriptor(descriptor, signed)
        raw = _data_bytes(data)
        if len(raw) in (2 * entries, 2 * entries + 2):
            table = np.frombuffer(raw[: 2 * entries], "<u2")
        elif len(raw) in (entries, entries + 1):
            table, bits = np.frombuffer(raw[:entries], np.uint8).astype("<u2"), min(bits, 8)
        else:
            raise MetadataError(f"LUT Data has {len(raw)} bytes; its descriptor promises {entries} entries")
        return cls(first, table.tobytes(), 16 if int(table.max()) >> bits else bits)

    @classmethod
    def from_segments(cls, descriptor: Sequence[int], data: Buffer | Sequence[int], signed: bool) -> LookupTable:
        """Build from Segmented Palette Color Lookup Table Data, PS3.3 C.7.9.2; else like `from_tags`."""
        entries, first, bits = _descriptor(descriptor, signed)
        unit = 1 if bits <= 8 else 2
        raw = _data_bytes(data)
        elements = np.frombuffer(raw[: len(raw) // unit * unit], f"<u{unit}").tolist()
        table: list[int] = []
        try:
            _expand_segments(elements, unit, table, entries)
        except IndexError as error:
            raise MetadataError(f"Segmented table ends after {len(table)} of {entries} entries") from error
        return cls(first, np.array(table, "<u2").tobytes(), bits)

    @property
    def table(self) -> NDArray[np.uint16]:
        """The entries, ``(entries,)`` uint16, read-only."""
        return np.frombuffer(self.values, "<u2")

    def apply(self, values: AnyArray) -> AnyArray:
        """Return the entries for `values`: a new array of its shape, uint8 if `bits` allows, else uint16."""
        out = np.empty(values.shape, np.uint8 if self.bits <= 8 else np.uint16)
        _lookup(self.table.astype(out.dtype), self.first, values, out)
        return out

    def into(self, values: AnyArray, out: AnyArray) -> None:
        """Write the entries for `values` into `out`, floating, same shape; may be `values` itself.

        Raises ConfigError when the shapes differ or `out` is not floating.
        """
        _check_pair(values, out)
        _lookup(self.table.astype(out.dtype), self.first, values, out)


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


@dataclass(frozen=True)
class Window:
    """A VOI window: modality values to 0..1, PS3.3 C.11.2.1.2 and C.11.2.1.3. A frame step.

    Parameters
    ----------
    center, width : float
        Window Center and Window Width, modality units.
    function : {"LINEAR", "LINEAR_EXACT", "SIGMOID"}
        VOI LUT Function. LINEAR, DICOM's default, runs from ``c - w/2`` to ``c - w/2 + (w - 1)``.

    Raises
    ------
    ConfigError
        The function is unknown, a number is not finite, or the width is below 1 (LINEAR) or not above 0.
    """

    center: float
    width: float
    function: str = "LINEAR"

    def __post_init__(self) -> None:
        _set_floats(self, "center", "width")
        object.__setattr__(self, "function", self.function.strip().upper())
        if self.function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
            raise ConfigError(f"Unknown VOI LUT Function {self.function!r}: LINEAR, LINEAR_EXACT or SIGMOID")
        if self.width < 1 if self.function == "LINEAR" else self.width <= 0:
            least = "at least 1" if self.function == "LINEAR" else "above 0"
            raise ConfigError(f"Window width {self.width} is unusable: {self.function} needs {least}")

    @classmethod
    def preset(cls, name: str) -> Window:
        """Return the usual window, HU: lung, bone, brain, abdomen, mediastinum; ConfigError for others."""
        if (key := name.strip().lower()) in _PRESETS:
            return cls(*_PRESETS[key])
        near = difflib.get_close_matches(key, _PRESETS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(_PRESETS)}"
        raise ConfigError(f"No window preset {name!r}: {hint}")

    def apply(self, image: AnyArray) -> None:
        """Map `image`, floating modality values of any shape, to 0..1 in place."""
        self.into(image, image)

    def into(self, values: AnyArray, out: AnyArray) -> None:
        """Write 0..1 for modality values into `out`, floating, same shape; may be `values` itself.

        Raises ConfigError when the shapes differ or `out` is not floating.
        """
        if self.function != "SIGMOID":
            span = self.width - 1 if self.function == "LINEAR" else self.width
            _ramp(values, out, self.center - self.width / 2, span)
            return
        _check_pair(values, out)  # 1 / (1 + exp(-4 d / w)), written so that nothing overflows
        np.subtract(values, self.center, out=out, dtype=_working_dtype(values, out))
        np.multiply(out, 2 / self.width, out=out)
        np.tanh(out, out=out)
        np.multiply(out, 0.5, out=out)
        np.add(out, 0.5, out=out)


@dataclass(frozen=True)
class Scale:
    """Modality values `low`..`high` to 0..1, clipped. A frame step. ConfigError unless low < high."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _set_floats(self, "low", "high")
        if not self.low < self.high:
            raise ConfigError(f"{self}: low must be below high")

    def apply(self, image: AnyArray) -> None:
        """Map `image`, floating modality values of any shape, to 0..1 in place."""
        self.into(image, image)

    def into(self, values: AnyArray, out: AnyArray) -> None:
        """Write 0..1 for modality values into `out`, floating, same shape; may be `values` itself."""
        _ramp(values, out, self.low, self.high - self.low)


@dataclass(frozen=True)
class Normalize:
    """Subtract `mean`, divide by `std`; one number each, or one a sample for colour. A frame step.

    Raises ConfigError unless the numbers are finite, the counts agree and every `std` is above 0.
    """

    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value: Any = getattr(self, name)
            numbers = tuple(map(_finite, value)) if np.iterable(value) else _finite(value)
            object.__setattr__(self, name, numbers)
        if np.shape(self.mean) != np.shape(self.std) or np.size(self.mean) == 0 or np.min(self.std) <= 0:
            raise ConfigError(f"{self}: needs as many means as standard deviations, and those above 0")

    def apply(self, image: AnyArray) -> None:
        """Standardise `image`, ``(rows, columns[, samples])`` floating, in place.

        Raises ConfigError when it is not floating, or has another number of samples than there are means.
        """
        _check_pair(image, image)
        if np.ndim(self.mean) and (image.ndim != 3 or image.shape[-1] != np.size(self.mean)):
            raise ConfigError(f"{self} needs (rows, columns, {np.size(self.mean)}), not {image.shape}")
        np.subtract(image, np.asarray(self.mean, image.dtype), out=image)
        np.divide(image, np.asarray(self.std, image.dtype), out=image)


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
        _check_pair(modality_values, out)
        table = (step.table / ((1 << step.bits) - 1)).astype(out.dtype)
        _lookup(table, step.first, modality_values, out)
    else:
        step.into(modality_values, out)
    if invert:
        np.subtract(1.0, out, out=out)
    return out


def uint8(display: AnyArray) -> NDArray[np.uint8]:
    """Return display values 0..1, floating, as 0..255, halves up; clipped, NaN as 0. I/O: none."""
    out = np.empty(display.shape, np.uint8)
    for rows in _blocks(display):
        scratch = np.asarray(np.fmax(display[rows], 0.0))
        np.minimum(scratch, 1.0, out=scratch)
        np.multiply(scratch, 255.0, out=scratch)
        np.add(scratch, 0.5, out=scratch)
        np.copyto(out[rows], scratch, casting="unsafe")
    return out


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
    for rows in _blocks(image):
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
    _lookup(table, red.first, indices, out)
    return out


def _finite(value: Any) -> float:
    number = float(value) + 0.0  # no -0.0: equal objects must have equal reprs
    if not math.isfinite(number):
        raise ConfigError(f"Pixel arithmetic needs finite numbers, not {number}")
    return number


def _set_floats(instance: object, *names: str) -> None:
    for name in names:
        object.__setattr__(instance, name, _finite(getattr(instance, name)))


def _check_pair(values: AnyArray, out: AnyArray) -> None:
    if out.dtype.kind != "f":
        raise ConfigError(f"Pixel arithmetic writes floating numbers; the output is {out.dtype}")
    if values.shape != out.shape:
        raise ConfigError(f"Output of shape {out.shape} for pixels of shape {values.shape}")


def _working_dtype(values: AnyArray, out: AnyArray) -> type[np.float32] | type[np.float64]:
    """Return float32 when it holds every value and `out` asks for no more, else float64."""
    return np.float32 if out.itemsize <= 4 and np.can_cast(values.dtype, np.float32) else np.float64


def _blocks(array: AnyArray) -> Iterator[slice | EllipsisType]:
    """Yield keys that walk the first axis of `array` in pieces of some `_BLOCK` elements."""
    if array.size <= _BLOCK or array.ndim == 0:
        yield ...
        return
    rows = max(1, _BLOCK * array.shape[0] // array.size)
    for start in range(0, array.shape[0], rows):
        yield slice(start, start + rows)


def _ramp(values: AnyArray, out: AnyArray, low: float, span: float) -> None:
    """Write ``clip((values - low) / span, 0, 1)``; without a span, a step just above `low`."""
    _check_pair(values, out)
    np.subtract(values, low, out=out, dtype=_working_dtype(values, out))
    if span == 0:
        np.heaviside(out, 0.0, out=out)
    else:
        np.divide(out, span, out=out)
        np.clip(out, 0.0, 1.0, out=out)


def _lookup(table: AnyArray, first: int, values: AnyArray, out: AnyArray) -> None:
    """Write ``table[values - first]`` with clamped indices; NaN stays NaN if `out` can say so."""
    floating = values.dtype.kind == "f"
    for rows in _blocks(values):
        block = values[rows]
        absent = np.isnan(block) if floating and out.dtype.kind == "f" else None
        if floating:
            nearest = np.rint(np.subtract(block, first, dtype=np.float64))
            index = np.fmin(np.fmax(nearest, 0), len(table) - 1).astype(np.intp)
        else:
            index = np.subtract(block, first, dtype=np.intp)
        np.take(table, index, axis=0, out=out[rows], mode="clip")
        if absent is not None:
            np.copyto(out[rows], np.nan, where=absent)


def _us_or_ss(value: int, signed: bool) -> int:
    """Type a 16-bit "US or SS" number by Pixel Representation, however it was parsed."""
    value &= 0xFFFF
    return value - 0x10000 if signed and value > 0x7FFF else value


def _padding(value: int, signed: bool, bits: int) -> int:
    typed = _us_or_ss(int(value), signed) if -0x8000 <= value <= 0xFFFF else int(value)
    if signed and stored_range(bits, True)[1] < value < 1 << bits:
        return int(value) - (1 << bits)
    return typed


def _descriptor(descriptor: Sequence[int], signed: bool) -> tuple[int, int, int]:
    if len(descriptor) != 3 or not 1 <= descriptor[2] <= 16:
        raise MetadataError(f"LUT Descriptor {list(descriptor)}: needs entries, first value and bits, 1 to 16")
    entries, first, bits = map(int, descriptor)
    return (entries & 0xFFFF) or _MAX_ENTRIES, _us_or_ss(first, signed), bits


def _data_bytes(data: Buffer | Sequence[int]) -> bytes:
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    return (np.asarray(data, np.int64) & 0xFFFF).astype("<u2").tobytes()


def _expand_segments(
    data: list[int], unit: int, table: list[int], entries: int, at: int = 0, count: int = 0, depth: int = 0
) -> None:
    """Append what the segments of `data` mean to `table`, until it is full or `count` of them are done.

    Raises IndexError when `data` ends too early. Empty segments are refused: every step makes progress.
    """
    done = 0
    while (done < count) if depth else (len(table) < entries):
        code, length = data[at], data[at + 1]
        at += 2
        if length == 0 or depth > 8 or code not in (0, 1, 2) or (code and not table):
            raise MetadataError(f"Segmented table: bad segment ({code}, {length}) at element {at - 2}")
        if code == 0:  # discrete: as it stands
            table += data[at : at + length]
            at += length
            if at > len(data):
                raise IndexError
        elif code == 1:  # linear, from the entry before it
            steps = np.linspace(table[-1], data[at], length + 1)[1:]
            table += np.rint(steps).astype(np.int64).tolist()
            at += 1
        else:  # indirect: repeat segments from a 32-bit byte offset, low half first
            offset = sum(data[at + part] << 8 * unit * part for part in range(4 // unit)) // unit
            at += 4 // unit
            _expand_segments(data, unit, table, entries, offset, length, depth + 1)
        if len(table) > entries:
            raise MetadataError(f"Segmented lookup table gives more than its {entries} entries")
        done += 1
