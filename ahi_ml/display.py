"""Pictures of frames and volumes, with matplotlib. Floor 7."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ahi_ml.errors import ConfigError
from ahi_ml.pixels import Window

if TYPE_CHECKING:
    import xarray as xr

    from ahi_ml.types import AnyArray

    AnyWindow = Window | str | tuple[float, float]

__all__ = ["montage", "mpr"]

_FALLBACK_PERCENTILES = (0.5, 99.5)


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'ahi_ml[plot]'") from error
    return plt


def _limits(volume: xr.DataArray, window: AnyWindow | None) -> tuple[float, float]:
    """Range of a picture, from black to white: of display values and of colour theirs; the window's; the middle's."""
    if window is None and volume.attrs.get("units") == "1":  # open_volume(output="display")
        return 0.0, 255.0 if volume.dtype.kind == "u" else 1.0
    if "channel" in volume.dims:
        return 0.0, 255.0
    if window is None and volume.attrs.get("units") == "HU":
        window = Window.preset("abdomen")
    if window is not None:
        window = Window.of(window)
        return window.center - window.width / 2, window.center + window.width / 2
    middle = volume.isel(z=slice(volume.sizes["z"] // 4, 3 * volume.sizes["z"] // 4 + 1)).values
    low, high = np.nanpercentile(middle, _FALLBACK_PERCENTILES)
    return float(low), float(max(high, low + 1e-6))


def montage(volume: xr.DataArray, *, count: int = 12, columns: int = 4, window: AnyWindow | None = None) -> Any:
    """Draw evenly spaced slices of a volume, each in its true proportions.

    I/O: reads the slices drawn; writes nothing.

    Parameters
    ----------
    volume : xarray.DataArray
        ``(z, y, x)``, as `open_volume` gives it.
    count, columns : int
        Slices, and how many stand in a row.
    window : Window, str or pair, optional
        Grey range: a window, the name of a preset, or (center, width); abdomen for CT, else by percentiles.

    Returns
    -------
    matplotlib.figure.Figure
    """
    plt = _pyplot()
    places = np.unique(np.linspace(0, volume.sizes["z"] - 1, count).round().astype(int))
    columns = min(columns, len(places))
    low, high = _limits(volume, window)
    _, dy, dx = volume.attrs["spacing"]
    ratio = (volume.sizes["y"] * dy) / (volume.sizes["x"] * dx)
    lines = -(-len(places) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.4 * columns, 2.4 * ratio * lines + 0.3), squeeze=False, facecolor="black"
    )
    for axis in axes.flat:
        axis.axis("off")
    block = volume.isel(z=places).values
    for axis, place, image in zip(axes.flat, places, block, strict=False):
        _image(axis, image, low, high, dy / dx)
        axis.set_title(f"z {float(volume.z[place]):.1f} mm", color="white", fontsize=7, pad=2)
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.95, 0.02, 0.12)
    return figure


def mpr(volume: xr.DataArray, *, window: AnyWindow | None = None) -> Any:
    """Draw the three middle planes of a volume, in true proportions, with orientation letters.

    I/O: reads the whole volume; writes nothing. Columns and returns as `montage`.

    Raises
    ------
    ConfigError
        The slices are unevenly spaced.
    """
    dz, dy, dx = volume.attrs["spacing"]
    if not np.isfinite(dz):
        raise ConfigError("unevenly spaced slices have no planes across them: draw them with montage")
    plt = _pyplot()
    low, high = _limits(volume, window)
    letters = volume.attrs["orientation"]
    k, j, i = (size // 2 for size in volume.shape[:3])
    values = volume.values
    # Slices stand upright: the axis that grows toward the head is drawn upward.
    upward = letters[0] == "S"
    planes = [
        (values[k], dy / dx, letters[2], letters[1], False),
        (values[:, j], dz / dx, letters[2], letters[0], upward),
        (values[:, :, i], dz / dy, letters[1], letters[0], upward),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), facecolor="black")
    for axis, (image, aspect, right, down, flip) in zip(axes, planes, strict=True):
        _image(axis, image, low, high, aspect, flip=flip)
        edge = _OPPOSITE[down] if flip else down
        axis.text(0.99, 0.5, right, transform=axis.transAxes, color="yellow", ha="right", va="center")
        axis.text(0.5, 0.01, edge, transform=axis.transAxes, color="yellow", ha="center", va="bottom")
        axis.axis("off")
    figure.subplots_adjust(0.005, 0.01, 0.995, 0.99, 0.02, 0.02)
    return figure


_OPPOSITE = {"L": "R", "R": "L", "A": "P", "P": "A", "S": "I", "I": "S"}


def _image(axis: Any, image: AnyArray, low: float, high: float, aspect: float, *, flip: bool = False) -> None:
    axis.imshow(
        np.clip((image - low) / (high - low), 0, 1),
        cmap="gray",
        vmin=0,
        vmax=1,
        aspect=aspect,
        origin="lower" if flip else "upper",
        interpolation="bilinear",
    )
