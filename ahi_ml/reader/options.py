"""What a reader turns frames into."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ahi_ml.errors import ConfigError
from ahi_ml.index import FrameProfile
from ahi_ml.pixels import LookupTable, Window
from ahi_ml.types import FrameStep, Output

__all__ = ["ReadOptions"]

_MOST_REDUCED = 8


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What a frame is turned into.

    Parameters
    ----------
    output : {"stored", "modality", "display"}
        Stored values; values in modality units (HU for CT), colour as RGB (a colour space that is not converted is a
        DataError); or 0 to 1 to look at, by the file's VOI LUT or first window.
    dtype : dtype, optional
        Of the result, as numpy knows it: by default the stored dtype for "stored", else float32. With uint8, "display"
        is 0 to 255, and 0 where padding is masked.
    steps : tuple of FrameStep
        Applied in place, in order, after the output; to floating values only.
    padding : "keep", "mask" or float
        Pixels equal to the file's padding value stay, become NaN, or become this value. So do those of a lower
        resolution that any padding has part in, which takes the whole frame to tell. Colour has none.
    window : Window, str, pair or int, optional
        For "display", instead of the file's VOI LUT or first window: a window, the name of a preset (see
        `pixels.Window.preset`), a center and a width, or which of the file's own windows, from 0; those of no usable
        width do not count, and a file that has fewer is a ConfigError of the frame.
    verify : bool
        Whether to compare with the data store's checksums. They are of full frames: a reduced one counts
        as verified only when its frame was so when it was cached. Where no checksum can be compared, the lowest and
        the highest value are, which verifies nothing.
    reduce : int
        Resolution levels to leave out: each halves rows and columns, rounded up. What comes is the low-pass
        image of the wavelet that frames are stored with, whatever stored them; masks and palette
        indices are sampled.
    normalize_polarity : bool
        For "modality": of radiographs (CR, DX, mammography, intra-oral) whose low values are white, swap dark and
        bright over the range of the stored bits before the rescale, so that all radiographs agree. Others stay as
        they are. The file's windows do not apply to such values. Padding is found in the values as stored. "display"
        is as it should look without.
    """

    output: Output = "modality"
    dtype: Any = None
    steps: tuple[FrameStep, ...] = ()
    padding: Literal["keep", "mask"] | float = "keep"
    window: Window | str | tuple[float, float] | int | None = None
    verify: bool = True
    reduce: int = 0
    normalize_polarity: bool = False

    def __post_init__(self) -> None:
        if self.output not in ("stored", "modality", "display"):
            raise ConfigError(f"output is 'stored', 'modality' or 'display', not {self.output!r}")
        object.__setattr__(self, "reduce", _levels(self.reduce))
        object.__setattr__(self, "dtype", None if self.dtype is None else _numeric(self.dtype))
        if isinstance(self.padding, str) and self.padding not in ("keep", "mask"):
            raise ConfigError(f"padding is 'keep', 'mask' or a number, not {self.padding!r}")
        if self.output == "stored" and (self.steps or self.padding != "keep"):
            raise ConfigError("stored values are as the file has them: no transform and no padding option applies")
        if self.output == "stored" and self.normalize_polarity:
            raise ConfigError("stored values are as the file has them: normalize_polarity works on modality values")
        if self.output == "display" and self.dtype is not None and self.dtype.kind != "f":
            if not self.in_bytes:
                raise ConfigError(f"display values are 0 to 1, or 0 to 255 in uint8: dtype cannot be {self.dtype}")
            if self.steps:
                raise ConfigError("pixel steps work on floating values: no dtype='uint8' with them")
        object.__setattr__(self, "window", _normalised(self.window))

    @property
    def in_bytes(self) -> bool:
        """Whether display values are wanted as 0 to 255. I/O: none."""
        return self.output == "display" and self.dtype == np.uint8

    def voi(self, profile: FrameProfile) -> Window | LookupTable | None:
        """What makes display values of modality values; None if nothing was given and the file has none. I/O: none.

        Raises
        ------
        ConfigError
            The file has fewer windows than were counted on.
        """
        chosen = self.window
        if chosen is None:
            return profile.voi or (profile.windows[0] if profile.windows else None)
        if not isinstance(chosen, int):
            return Window.of(chosen)
        if chosen >= len(profile.windows):
            usable = f"{len(profile.windows)} usable windows" if profile.windows else "no usable window"
            raise ConfigError(f"window={chosen} counts from 0, and the file has {usable}")
        return profile.windows[chosen]

    def levels(self, profile: FrameProfile) -> int:
        """How many resolution levels decoding leaves out: none where padding must be found. I/O: none."""
        # Between padding and tissue the wavelet makes values of its own, which are equal to neither.
        if self.padding == "keep" or profile.padding is None or profile.colour or not profile.pixels.blends:
            return self.reduce
        return 0

    def result_dtype(self, profile: FrameProfile) -> np.dtype[Any]:
        """The dtype a frame of this profile comes out in. I/O: none."""
        if self.dtype is not None:
            return self.dtype  # type: ignore[no-any-return]
        return profile.pixels.dtype if self.output == "stored" else np.dtype(np.float32)


def _levels(reduce: Any) -> int:
    try:
        number = -1 if isinstance(reduce, bool) else operator.index(reduce)
    except TypeError:
        number = -1
    if not 0 <= number <= _MOST_REDUCED:
        raise ConfigError(f"reduce is a number of resolution levels from 0 to {_MOST_REDUCED}, not {reduce!r}")
    return number


def _numeric(dtype: Any) -> np.dtype[Any]:
    try:
        known: np.dtype[Any] = np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ConfigError(f"numpy knows no dtype {dtype!r}: {error}") from error
    if known.kind not in "biuf":
        raise ConfigError(f"pixels are real numbers: dtype cannot be {known}")
    return known


def _normalised(window: Window | str | tuple[float, float] | int | None) -> Window | int | None:
    if window is None:
        return None
    try:
        which = operator.index(window)  # type: ignore[arg-type]
    except TypeError:
        return Window.of(window)  # type: ignore[arg-type]
    if isinstance(window, bool) or which < 0:
        raise ConfigError(f"window counts the file's own windows from 0, and is not {window!r}")
    return which
