"""From stored values to what was asked for: modality units, colour, display, steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ahi_ml.codec import reached, shrink
from ahi_ml.errors import AhiError, ConfigError, DataError
from ahi_ml.index import FrameProfile
from ahi_ml.pixels import Rescale, normalize_polarity, padding_mask, palette_to_rgb, to_display, uint8, ybr_full_to_rgb
from ahi_ml.reader.options import ReadOptions
from ahi_ml.types import AnyArray

__all__ = ["Conversion", "conversion"]

Conversion = Callable[[AnyArray, AnyArray], Any]

# RGB when decoded (the codec inverts RCT and ICT), or made so here.
_COLOURS = frozenset({"RGB", "YBR_RCT", "YBR_ICT", "YBR_FULL", "YBR_FULL_422"})


def conversion(profile: FrameProfile, options: ReadOptions) -> Conversion:
    """Choose how stored values of one kind of frames become what the options ask for.

    I/O: none.

    Returns
    -------
    callable
        Takes stored values, of `ReadOptions.levels` resolution levels below the full one, and the array that the
        result is written to.
    """
    if options.output == "stored":
        return _copy_exactly
    if profile.pixels.samples > 1 and profile.pixels.photometric not in _COLOURS:
        called = profile.pixels.photometric or "not named"
        return partial(
            _refuse,
            DataError(f'its colour space, {called}, is not converted to RGB: output="stored" reads it as it is'),
        )
    convert = partial(_colour, profile, options) if profile.colour else _grey(profile, options)
    if options.in_bytes:
        return partial(_in_bytes, convert)
    return partial(_with_steps, convert, options) if options.steps else convert


def _in_bytes(convert: Conversion, stored: AnyArray, out: AnyArray) -> None:
    shown = np.empty(out.shape, np.float32)
    convert(stored, shown)
    uint8(shown, out=out)


def _with_steps(convert: Conversion, options: ReadOptions, stored: AnyArray, out: AnyArray) -> None:
    convert(stored, out)
    for step in options.steps:
        step.apply(out)


def _copy_exactly(stored: AnyArray, out: AnyArray) -> None:
    """Copy to another dtype; values that it cannot hold are an error, not other values."""
    if not np.can_cast(stored.dtype, out.dtype) and out.dtype.kind in "iu" and stored.size:
        limits, low, high = np.iinfo(out.dtype), stored.min(), stored.max()
        if low < limits.min or high > limits.max:
            raise ConfigError(f"values from {low} to {high} do not fit into {out.dtype}: choose a wider dtype")
    np.copyto(out, stored, casting="unsafe")


def _colour(profile: FrameProfile, options: ReadOptions, stored: AnyArray, out: AnyArray) -> None:
    rgb = _rgb(stored, profile)
    if options.output == "display":
        low, high = _colour_range(profile)
        above = rgb - np.float64(low) if low else rgb
        np.divide(above, high - low, out=out, casting="unsafe")
    else:
        _copy_exactly(rgb, out)


def _colour_range(profile: FrameProfile) -> tuple[int, int]:
    """What is black and what is white: samples need not fill their dtype, nor entries of a palette."""
    if profile.palette is None:
        return profile.pixels.stored_range
    return 0, (1 << max(channel.bits for channel in profile.palette)) - 1


def _rgb(stored: AnyArray, profile: FrameProfile) -> AnyArray:
    if profile.palette is not None:
        return palette_to_rgb(stored, *profile.palette)
    if profile.pixels.photometric in ("YBR_FULL", "YBR_FULL_422"):
        return ybr_full_to_rgb(stored)
    return stored


def _grey(profile: FrameProfile, options: ReadOptions) -> Conversion:
    dtype = np.dtype(np.float32) if options.in_bytes else options.result_dtype(profile)
    modality = profile.modality
    convert: Conversion = modality.into
    if isinstance(modality, Rescale) and dtype.kind == "f":  # `into` says what is wrong with another dtype
        convert = modality.writer(profile.pixels.dtype, dtype)
    if options.normalize_polarity and options.output == "modality" and profile.inverted and profile.projection:
        convert = partial(_with_polarity, convert, profile)
    if profile.padding is not None and options.padding != "keep":
        masked = _with_padding if options.levels(profile) == options.reduce else _with_padding_reduced
        convert = partial(masked, convert, profile, options)
    if options.output != "display":
        return convert
    try:
        window = options.voi(profile)
    except ConfigError as error:
        return partial(_refuse, error)
    bits, signed = profile.pixels.bits_stored, profile.pixels.signed
    span = modality.value_range(bits, signed) if isinstance(modality, Rescale) else (0.0, float(2**modality.bits - 1))
    show = partial(to_display, window=window, invert=profile.inverted, value_range=span)
    return partial(_with_display, convert, show)


def _refuse(error: AhiError, stored: AnyArray, out: AnyArray) -> None:
    """Raise for each frame: those read together, of files of other kinds, are not to fail with it."""
    raise type(error)(*error.args)


def _with_polarity(convert: Conversion, profile: FrameProfile, stored: AnyArray, out: AnyArray) -> None:
    # Into a new array: padding is found in the values as stored.
    convert(normalize_polarity(stored, profile.pixels.bits_stored, profile.pixels.signed), out)


def _with_padding(
    convert: Conversion, profile: FrameProfile, options: ReadOptions, stored: AnyArray, out: AnyArray
) -> None:
    convert(stored, out)
    out[_is_padding(profile, stored)] = np.nan if options.padding == "mask" else options.padding


def _with_padding_reduced(
    convert: Conversion, profile: FrameProfile, options: ReadOptions, whole: AnyArray, out: AnyArray
) -> None:
    """Of the stored values at full resolution, where alone padding can be found."""
    convert(shrink(whole, profile.pixels, options.reduce), out)
    mask = reached(_is_padding(profile, whole), options.reduce)
    out[mask] = np.nan if options.padding == "mask" else options.padding


def _is_padding(profile: FrameProfile, stored: AnyArray) -> AnyArray:
    assert profile.padding is not None
    pixels = profile.pixels
    return padding_mask(stored, *profile.padding, signed=pixels.signed, bits=pixels.bits_stored)


def _with_display(convert: Conversion, show: Callable[..., Any], stored: AnyArray, out: AnyArray) -> None:
    convert(stored, out)
    show(out, out=out)
