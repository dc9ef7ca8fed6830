"""From stored values to what was asked for: modality units, colour, display, steps."""

from __future__ import annotations

import numpy as np

from ahi_ml.errors import ConfigError
from ahi_ml.index import FrameProfile
from ahi_ml.pixels import Rescale, padding_mask, palette_to_rgb, to_display, ybr_full_to_rgb
from ahi_ml.reader.options import ReadOptions
from ahi_ml.types import AnyArray

__all__ = ["convert_values"]


def convert_values(stored: AnyArray, profile: FrameProfile, options: ReadOptions, out: AnyArray) -> None:
    """Write what the options make of stored values into `out`. I/O: none."""
    if options.output == "stored":
        _copy_exactly(stored, out)
        return
    if profile.colour:
        rgb = _rgb(stored, profile)
        if options.output == "display":
            top = np.iinfo(rgb.dtype).max if rgb.dtype.kind == "u" else 1
            np.divide(rgb, top, out=out, casting="unsafe")
        else:
            _copy_exactly(rgb, out)
    else:
        _grey(stored, profile, options, out)
    for step in options.steps:
        step.apply(out)


def _copy_exactly(stored: AnyArray, out: AnyArray) -> None:
    """Copy to another dtype; values that it cannot hold are an error, not other values."""
    if not np.can_cast(stored.dtype, out.dtype) and out.dtype.kind in "iu" and stored.size:
        limits, low, high = np.iinfo(out.dtype), stored.min(), stored.max()
        if low < limits.min or high > limits.max:
            raise ConfigError(f"values from {low} to {high} do not fit into {out.dtype}: choose a wider dtype")
    np.copyto(out, stored, casting="unsafe")


def _rgb(stored: AnyArray, profile: FrameProfile) -> AnyArray:
    if profile.palette is not None:
        return palette_to_rgb(stored, *profile.palette)
    if profile.pixels.photometric in ("YBR_FULL", "YBR_FULL_422"):
        return ybr_full_to_rgb(stored)
    return stored


def _grey(stored: AnyArray, profile: FrameProfile, options: ReadOptions, out: AnyArray) -> None:
    modality = profile.modality
    modality.into(stored, out)
    if profile.padding is not None and options.padding != "keep":
        mask = padding_mask(
            stored,
            profile.padding[0],
            profile.padding[1],
            signed=profile.pixels.signed,
            bits=profile.pixels.bits_stored,
        )
        out[mask] = np.nan if options.padding == "mask" else options.padding
    if options.output != "display":
        return
    window = options.window or profile.voi or (profile.windows[0] if profile.windows else None)
    bits, signed = profile.pixels.bits_stored, profile.pixels.signed
    span = modality.value_range(bits, signed) if isinstance(modality, Rescale) else (0.0, float(2**modality.bits - 1))
    to_display(out, window, invert=profile.inverted, value_range=span, out=out)
