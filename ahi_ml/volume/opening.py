"""`open_volume`: from the frames of a series to a lazy array with its geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import xarray as xr
from xarray.core import indexing

from ahi_ml.errors import ConfigError, GeometryError, MixedOrientationError, NotFoundError
from ahi_ml.geometry import Geometry, Stack, group_frames, stack_frames
from ahi_ml.index import DatasetIndex
from ahi_ml.pixels import Window
from ahi_ml.reader import ReadOptions
from ahi_ml.store import DataStore
from ahi_ml.types import AnyArray, Output
from ahi_ml.volume.lazy import FrameStack

__all__ = ["open_volume", "stack_series"]

_AIR_HU = -1024.0


def open_volume(
    store: DataStore,
    series: str | DatasetIndex,
    *,
    output: Output = "modality",
    dtype: Any = None,
    padding: Literal["keep", "mask"] | float = "keep",
    window: Window | str | tuple[float, float] | int | None = None,
    gaps: Literal["error", "fill", "keep"] = "error",
    verify: bool = True,
    reduce: int = 0,
    cache: Any = "store",
) -> xr.DataArray:
    """Open a series as a volume. Pixels are read when the array is indexed, slice by slice.

    I/O: none for an index. For a series UID, a search and its metadata. Indexing the array reads the
    frames of the slices it touches, in parallel, through the cache.

    Parameters
    ----------
    store : DataStore
        Where the frames are.
    series : str or DatasetIndex
        A series UID (its latest primary image set), or an index of one series (the versions it pins).
    output, dtype, padding, window, verify
        See `ReadOptions`; modality values (HU for CT) as float32 by default.
    reduce : int
        Resolution levels to leave out: each doubles the spacing in plane; the first voxel stays where it is.
    gaps : {"error", "fill", "keep"}
        What to do when slices are missing: raise; insert them, marked in the coordinate
        ``slice_present``; or keep the irregular positions (and no affine).
    cache : FrameCache or None, optional
        Instead of ``store.cache``; None reads without a cache.

    Returns
    -------
    xarray.DataArray
        Dims ``("z", "y", "x")``, and ``"channel"`` for colour. Slices ascend along the slice normal,
        row direction x column direction. Coordinates are millimetres along the axes of the
        image: for an axial series the patient's L, P and H. ``attrs["affine"]``, 4x4 float64, maps
        ``(k, j, i, 1)`` of this array to LPS mm (PS3.3 C.7.6.2.1.1); attrs are of the whole volume,
        also on a part of it. The name is the modality.

    Raises
    ------
    GeometryError
        The frames form no volume; GapError, DuplicateSliceError and MixedOrientationError say why.
    ConfigError
        An index of no series or of several, or options that cannot work.
    NotFoundError
        No primary image set has this series UID.
    """
    options = ReadOptions(output=output, dtype=dtype, padding=padding, window=window, verify=verify, reduce=reduce)
    index = _one_series(store, series)
    stack, index = stack_series(index, gaps=gaps)
    profile = index.profile(0)
    result_dtype = options.result_dtype(profile)
    frame_shape = profile.shape(output, options.reduce)
    if options.reduce:
        stack = replace(stack, geometry=stack.geometry.reduced(options.reduce))
    row = index.series.iloc[0]
    modality = row["Modality"] if isinstance(row["Modality"], str) else ""
    units = _units(index, modality) if output == "modality" else ("stored" if output == "stored" else "1")
    fill = _fill_value(options, result_dtype, units)
    lazy = FrameStack(
        store=store,
        index=index,
        order=stack.order,
        options=options,
        shape=(len(stack.order), *frame_shape),
        dtype=result_dtype,
        fill=fill,
        cache=cache,
    )
    dims = ("z", "y", "x", "channel")[: 1 + len(frame_shape)]
    coords: dict[str, Any] = dict(stack.geometry.coords())
    if not stack.slice_present.all():
        coords["slice_present"] = ("z", stack.slice_present)
    if "channel" in dims:
        coords["channel"] = ["R", "G", "B"]
    array = xr.DataArray(
        indexing.LazilyIndexedArray(lazy),
        dims=dims,
        coords=coords,
        name=modality or None,
        attrs={**_attributes(stack, index, units), "reduce": options.reduce},
    )
    for axis in ("z", "y", "x"):
        array[axis].attrs["units"] = "mm"
    return array


def _one_series(store: DataStore, series: str | DatasetIndex) -> DatasetIndex:
    if isinstance(series, str):
        index = store.search(series_instance_uid=series).index(progress=False)
        if len(index) == 0:
            raise NotFoundError(
                "no primary image set of this data store has images of the series asked for: check the UID, or "
                "build an index with search(primary=None)"
            )
    else:
        index = series
    uids = [uid for uid, _ in index.series_rows()]
    if len(uids) != 1:
        raise ConfigError(
            f"a volume needs an index of one series; this one has {len(uids)}: index.where(series_instance_uid=...)"
        )
    sets = index.series["image_set_id"].nunique()
    if sets > 1:
        raise ConfigError(f"the series stands in {sets} image sets: choose one with index.where(image_set_id=...)")
    return index


def stack_series(
    index: DatasetIndex, *, gaps: Literal["error", "fill", "keep"] = "error"
) -> tuple[Stack, DatasetIndex]:
    """Order the frames of a series. I/O: none.

    Returns
    -------
    stack : Stack
        Whose ``order`` counts the rows of the index returned.
    index : DatasetIndex
        The frames of the stack: those set aside (localizers) are not in it.

    Raises
    ------
    GeometryError
        Or a kind of it: the frames form no stack, or more than one.
    """
    image_set_id = index.column("image_set_id")[0].as_py()
    label = f"image set {image_set_id}"
    positions = index.positions()
    orientations = _vectors(index, "ImageOrientationPatient", 6)
    spacing = _vectors(index, "PixelSpacing", 2)
    rows, columns, samples = (_numbers(index, name) for name in ("Rows", "Columns", "SamplesPerPixel"))
    if not (np.isfinite(positions).all() and np.isfinite(orientations).all() and np.isfinite(spacing).all()):
        raise GeometryError(
            f"{label}: frames without position, orientation or pixel spacing form no volume (projection or planar "
            "images): read them as frames, with FrameDataset",
            image_set_id=image_set_id,
        )
    groups = group_frames(
        orientations,
        spacing,
        rows.tolist(),
        columns.tolist(),
        samples.tolist(),
        index.column("FrameOfReferenceUID").to_pylist(),
        image_types=[kind or () for kind in index.column("ImageType").to_pylist()],
    )
    stacks = [group for group in groups if group.kind == "stack"] or groups
    if len(stacks) > 1:
        listed = ", ".join(
            f"{len(group.indices)} frames{f' (by {group.reason})' if group.reason else ''}" for group in stacks
        )
        raise MixedOrientationError(
            f"{label}: its frames form {len(stacks)} stacks: {listed}. Select one, for example with index.where(...)",
            image_set_id=image_set_id,
        )
    chosen = stacks[0].indices
    index = index[chosen]
    profiles_thickness = index.column("SliceThickness").to_pylist()
    between = index.column("SpacingBetweenSlices").to_pylist()
    stack = stack_frames(
        positions[chosen],
        orientations[chosen],
        spacing[chosen],
        int(rows[chosen[0]]),
        int(columns[chosen[0]]),
        frame_of_reference=index.column("FrameOfReferenceUID")[0].as_py() or "",
        instance_numbers=[number or 0 for number in index.column("InstanceNumber").to_pylist()],
        keys=index.column("frame_id").to_pylist(),
        checksums=index.column("checksum").to_pylist(),
        slice_thickness=profiles_thickness[0],
        spacing_between_slices=between[0],
        gaps=gaps,
        label=label,
    )
    aside = len(positions) - len(chosen)
    if aside:
        reasons = ", ".join(sorted({group.reason for group in groups if group.reason}))
        stack = replace(stack, notes=(*stack.notes, f"{aside} frames set aside (by {reasons})"))
    return stack, index


def _vectors(index: DatasetIndex, name: str, length: int) -> AnyArray:
    missing = [np.nan] * length
    values: Sequence[Any] = index.column(name).to_pylist()
    return np.array([value if value is not None and len(value) == length else missing for value in values], float)


def _numbers(index: DatasetIndex, name: str) -> AnyArray:
    return np.array([value if value is not None else 1 for value in index.column(name).to_pylist()], np.int64)


def _units(index: DatasetIndex, modality: str) -> str:
    kind = index.column("RescaleType")[0].as_py()
    if modality == "CT" or kind == "HU":
        return "HU"
    return kind if kind not in (None, "US") else "stored"  # US: unspecified


def _fill_value(options: ReadOptions, dtype: np.dtype[Any], units: str) -> float:
    """What stands in slices that are missing: as padding does, or air; what is shown is black."""
    if options.padding == "mask" and dtype.kind == "f":
        return np.nan
    if options.output == "display":
        return 0.0
    if not isinstance(options.padding, str):
        return float(options.padding)
    return _AIR_HU if units == "HU" else 0.0


def _attributes(stack: Stack, index: DatasetIndex, units: str) -> dict[str, Any]:
    geometry: Geometry = stack.geometry
    first = index.series.iloc[0]
    attrs: dict[str, Any] = {
        "units": units,
        "spacing": geometry.spacing,
        "orientation": geometry.orientation,
        "frame_of_reference": geometry.frame_of_reference,
        "kind": geometry.kind,
        "tolerance_mm": geometry.tolerance,
        "spacing_assumed": geometry.spacing_assumed,
        "notes": stack.notes,
        "image_set_id": first["image_set_id"],
        "version_id": first["version_id"],
        "snapshot_id": index.snapshot_id,
        "lossy": any(index.profile(row).lossy for row in range(len(index))),
    }
    if geometry.kind != "irregular":
        attrs["affine"] = np.array(geometry.affine)
    return attrs
