"""Frame steps, floor 1: linear and sigmoid maps of modality values, in place, as a network or an eye wants them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ahi_ml.errors import ConfigError
from ahi_ml.pixels.arrays import check_pair, finite, set_floats, working_dtype
from ahi_ml.types import AnyArray

__all__ = ["VOI_FUNCTIONS", "Normalize", "Scale", "Window"]

VOI_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")
"""Values of VOI LUT Function, DICOM's default first."""

_PRESETS = {  # centre and width, HU
    "abdomen": (50.0, 400.0),
    "bone": (400.0, 1800.0),
    "brain": (40.0, 80.0),
    "lung": (-600.0, 1500.0),
    "mediastinum": (50.0, 350.0),
}


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
        set_floats(self, "center", "width")
        object.__setattr__(self, "function", self.function.strip().upper())
        if self.function not in VOI_FUNCTIONS:
            raise ConfigError(f"Unknown VOI LUT Function {self.function!r}: LINEAR, LINEAR_EXACT or SIGMOID")
        if self.width < 1 if self.function == "LINEAR" else self.width <= 0:
            least = "at least 1" if self.function == "LINEAR" else "above 0"
            raise ConfigError(f"Window width {self.width} is unusable: {self.function} needs {least}")

    @classmethod
    def of(cls, value: Window | str | Sequence[float]) -> Window:
        """Return the window that is meant by one, by the name of a preset, or by a pair (center, width).

        Raises ConfigError for anything else.
        """
        if isinstance(value, Window):
            return value
        if isinstance(value, str):
            return cls.preset(value)
        try:
            center, width = map(float, value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{value!r} is no Window, no name of a preset, and no pair (center, width)") from error
        return cls(center, width)

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
        check_pair(values, out)  # 1 / (1 + exp(-4 d / w)), written so that nothing overflows
        np.subtract(values, self.center, out=out, dtype=working_dtype(values.dtype, out.dtype))
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
        set_floats(self, "low", "high")
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
            numbers = tuple(map(finite, value)) if np.iterable(value) else finite(value)
            object.__setattr__(self, name, numbers)
        if np.shape(self.mean) != np.shape(self.std) or np.size(self.mean) == 0 or np.min(self.std) <= 0:
            raise ConfigError(f"{self}: needs as many means as standard deviations, and those above 0")

    def apply(self, image: AnyArray) -> None:
        """Standardise `image`, ``(rows, columns[, samples])`` floating, in place.

        Raises ConfigError when it is not floating, or has another number of samples than there are means.
        """
        check_pair(image, image)
        if np.ndim(self.mean) and (image.ndim != 3 or image.shape[-1] != np.size(self.mean)):
            raise ConfigError(f"{self} needs (rows, columns, {np.size(self.mean)}), not {image.shape}")
        np.subtract(image, np.asarray(self.mean, image.dtype), out=image)
        np.divide(image, np.asarray(self.std, image.dtype), out=image)


def _ramp(values: AnyArray, out: AnyArray, low: float, span: float) -> None:
    """Write ``clip((values - low) / span, 0, 1)``; without a span, a step just above `low`."""
    check_pair(values, out)
    np.subtract(values, low, out=out, dtype=working_dtype(values.dtype, out.dtype))
    if span == 0:
        np.heaviside(out, 0.0, out=out)
    else:
        np.divide(out, span, out=out)
        np.clip(out, 0.0, 1.0, out=out)
