"""Frames that belong together, put in order along their normal, floor 1: step, gaps and duplicates."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ahi_ml.errors import ConfigError, DuplicateSliceError, GapError, GeometryError, MixedOrientationError
from ahi_ml.geometry.grid import Geometry, Kind
from ahi_ml.geometry.vectors import (
    COSINE_TOLERANCE,
    JITTER_MM,
    SPACING_TOLERANCE,
    IndexArray,
    distances_along,
    normalised,
)
from ahi_ml.types import FloatArray

__all__ = ["Gaps", "Stack", "stack_frames"]

Gaps = Literal["error", "fill", "keep"]

JITTER_OF_STEP = 0.02  # some scanners round coarsely: one oblique series of step 7.0 has 6.96 to 7.07
SHEAR = 1e-3  # 1 - cosine between the step and the normal, about 2.6 degrees
SIDEWAYS_OF_PIXEL = 0.1  # in-plane drift of this part of a pixel moves nothing that can be seen


@dataclass(frozen=True, eq=False)
class Stack:
    """Frames in slice order, with the geometry of the volume they make.

    Parameters
    ----------
    order : (z,) intp
        Which input frame is each slice; -1 for a slice that is missing and to be filled.
    geometry : Geometry
    positions_mm : (z,) float64
        Position of each slice along the normal, mm, as recorded; for a missing one, where it belongs.
    slice_present : (z,) bool
        False for slices that are to be filled.
    notes : tuple of str
        What was assumed, dropped or filled.
    """

    order: IndexArray
    geometry: Geometry
    positions_mm: FloatArray
    slice_present: NDArray[np.bool_]
    notes: tuple[str, ...] = ()


def stack_frames(
    positions: ArrayLike,
    orientations: ArrayLike,
    pixel_spacing: ArrayLike,
    rows: int,
    columns: int,
    *,
    frame_of_reference: str = "",
    instance_numbers: Sequence[int | None] | None = None,
    keys: Sequence[str] | None = None,
    checksums: Sequence[Hashable] | None = None,
    slice_thickness: float | None = None,
    spacing_between_slices: float | None = None,
    gaps: Gaps = "error",
    label: str = "",
) -> Stack:
    """Order frames that belong together along their normal, and find the geometry of the stack.

    The result does not depend on the order of the input. The step comes from the positions alone.

    I/O: none.

    Parameters
    ----------
    positions : (n, 3) float64
        Image Position (Patient): centre of the first voxel, LPS, mm.
    orientations : (n, 6) or (6,) float64
        Image Orientation (Patient): direction of growing column index, then of growing row index.
    pixel_spacing : (n, 2) or (2,) float64
        As DICOM gives it: distance between rows, then between columns, mm.
    rows, columns : int
    frame_of_reference : str, optional
    instance_numbers, keys : sequence of n, optional
        Tell apart frames at one position: the lowest number, then the lowest key, comes first.
    checksums : sequence of n, optional
        Of the pixels. Frames at one position with one checksum are the same; None is unknown.
    slice_thickness, spacing_between_slices : float, optional
        mm. Used for a single slice only, the latter first.
    gaps : "error", "fill" or "keep"
        What to do about missing slices: refuse, leave places for them, or keep an irregular stack.
        Positions that are uneven in any other way can only be kept.
    label : str, optional
        Where the frames come from, for messages; must not identify a patient.

    Raises
    ------
    GapError
        Slices are missing or uneven; the message gives positions and counts.
    DuplicateSliceError
        Frames share a position and are not known to be identical.
    MixedOrientationError
        The frames differ in orientation or pixel spacing.
    GeometryError
        Values are missing, axes are not orthogonal, or frames lie side by side, not behind each other.
    ConfigError
        `gaps` is none of the three.
    """
    if gaps not in get_args(Gaps):
        raise ConfigError(f"gaps is 'error', 'fill' or 'keep', not {gaps!r}")
    where = f" in {label}" if label else ""
    points = np.asarray(positions, np.float64).reshape(-1, 3) + 0.0  # -0.0 would make results depend on order
    n = len(points)
    if n == 0:
        raise GeometryError(f"no frames to stack{where}")
    pixel = _common_spacing(pixel_spacing, where)
    row, column, normal = _common_axes(orientations, where)
    if not np.isfinite(points).all():
        raise GeometryError(f"frames without a position{where}: a projection or planar series is no stack")

    numbers = [math.inf] * n if instance_numbers is None else instance_numbers
    names = [""] * n if keys is None else keys
    sums = [None] * n if checksums is None else checksums
    counts = [np.size(orientations) // 6, np.size(pixel_spacing) // 2, len(numbers), len(names), len(sums)]
    if not (set(counts[:2]) <= {1, n} and set(counts[2:]) == {n}):
        raise GeometryError(
            f"{n} positions{where}, but {counts} orientations, spacings, instance numbers, keys and checksums"
        )
    tie = [(math.inf if number is None else number, name) for number, name in zip(numbers, names, strict=True)]
    ranked, notes = _distinct(points, normal, tie, sums, float(pixel.min()), where)
    points = points[ranked]
    along = distances_along(points, normal)
    matrix = np.eye(4)
    matrix[:3, 1] = column * pixel[0]
    matrix[:3, 2] = row * pixel[1]
    matrix[:3, 3] = points[0]
    present = np.ones(len(ranked), np.bool_)

    def stack(kind: Kind, tolerance: float, places: FloatArray | None = None) -> Stack:
        shape = (len(ranked), rows, columns)
        geometry = Geometry(matrix, shape, frame_of_reference, kind, kind == "single", tolerance, places)
        return Stack(ranked, geometry, along, present, tuple(notes))

    if len(ranked) == 1:
        depth, source = _assumed_depth(spacing_between_slices, slice_thickness)
        matrix[:3, 0] = normal * depth
        notes.append(f"slice distance of {depth:.6g} mm taken from {source}")
        return stack("single", JITTER_MM)

    index = _grid_index(along)
    step = (points[-1] - points[0]) / index[-1]
    distance = float(step @ normal)
    tolerance = _tolerance(distance)
    off = points - (points[0] + index[:, None] * step)
    off_along = np.abs(distances_along(off, normal))
    off_aside = np.linalg.norm(off - distances_along(off, normal)[:, None] * normal, axis=1)
    total = int(index[-1]) + 1
    trouble = ""
    if (np.diff(index) < 1).any() or off_along.max() > tolerance:
        jumps = np.diff(along)
        worst = int(np.argmax(np.abs(jumps - np.median(jumps))))
        trouble = (
            f"slices are unevenly spaced{where}, {jumps.min():.4g} to {jumps.max():.4g} mm apart, oddest "
            f"between z={along[worst]:.6g} and z={along[worst + 1]:.6g}"
        )
    elif off_aside.max() > max(tolerance, SIDEWAYS_OF_PIXEL * float(pixel.min())):
        trouble = f"slices lie up to {off_aside.max():.4g} mm sideways of a straight line{where}"
    missing = "" if trouble or total == len(ranked) else _describe_gaps(along, index, distance, where)
    if trouble and gaps != "keep":
        raise GapError(f"{trouble}; no slices can be filled in: pass gaps='keep' for irregular z coordinates")
    if missing and gaps == "error":
        raise GapError(f"{missing}: pass gaps='fill' to leave places for them, or 'keep' for irregular z")
    if trouble or (missing and gaps == "keep"):
        notes.append(f"kept as an irregular stack: {trouble or missing}")
        return stack("irregular", JITTER_MM, points)

    matrix[:3, 0] = step
    if missing:
        measured, frames = along, ranked
        present = np.isin(np.arange(total), index)
        along, ranked = measured[0] + np.arange(total) * distance, np.full(total, -1, np.intp)
        along[index], ranked[index] = measured, frames
        notes.append(f"filled: {missing}")
    sheared = distance < (1 - SHEAR) * float(np.linalg.norm(step))
    return stack("tilted" if sheared else "regular", tolerance)


def _tolerance(step: float) -> float:
    # Below 0.04 mm between slices (microscopy, OCT) 0.01 mm would let neighbours swallow each other.
    return min(max(JITTER_MM, JITTER_OF_STEP * step), step / 4)


def _lower_median(values: FloatArray) -> float:
    # One of the values itself: between 5 and 10 mm the mean of the middle two fits neither.
    return float(np.sort(values)[(len(values) - 1) // 2])


def _common_axes(orientations: ArrayLike, where: str) -> tuple[FloatArray, FloatArray, FloatArray]:
    cosines = normalised(np.asarray(orientations, np.float64).reshape(-1, 6), where)
    # The median, not the first frame's: it does not depend on the order of the input.
    common = np.median(cosines, axis=0)
    if (np.abs(cosines - common) > COSINE_TOLERANCE).any():
        raise MixedOrientationError(f"frames of different orientation{where}: group them, or read in 2-D")
    row, column = (vector / np.linalg.norm(vector) for vector in (common[:3], common[3:]))
    normal = np.cross(row, column)
    return row, column, normal / np.linalg.norm(normal)


def _common_spacing(pixel_spacing: ArrayLike, where: str) -> FloatArray:
    spacing = np.asarray(pixel_spacing, np.float64).reshape(-1, 2)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise GeometryError(f"pixel spacing must be known and above 0{where}")
    common = np.median(spacing, axis=0)
    if (np.abs(spacing / common - 1) > SPACING_TOLERANCE).any():
        raise MixedOrientationError(f"frames of different pixel spacing{where}: group them first")
    return common


def _distinct(
    points: FloatArray,
    normal: FloatArray,
    tie: list[Any],
    checksums: Sequence[Hashable],
    pixel: float,
    where: str,
) -> tuple[IndexArray, list[str]]:
    """One frame for each position, in ascending order, with notes of the frames that were dropped."""
    along = distances_along(points, normal)
    aside = points - along[:, None] * normal
    ranked = sorted(range(len(points)), key=lambda frame: (along[frame], tie[frame]))
    jumps = np.diff(along[ranked])
    same = math.inf
    if jumps.sum() > JITTER_MM:
        wide = jumps[jumps > JITTER_MM]
        same = _tolerance(_lower_median(wide if wide.size else jumps[jumps > 0]))
    shared: list[list[int]] = []
    for frame in ranked:
        if shared and along[frame] - along[shared[-1][0]] <= same:
            shared[-1].append(frame)
        else:
            shared.append([frame])
    for frames in shared:
        frames.sort(key=lambda frame: tie[frame])
        what = f"{len(frames)} frames at z={along[frames[0]]:.6g}{where}"
        apart = np.linalg.norm(aside[frames] - aside[frames[0]], axis=1).max()
        if apart > max(JITTER_MM, SIDEWAYS_OF_PIXEL * pixel):
            raise GeometryError(f"{what} lie side by side, {apart:.4g} mm apart: tiles, or several stacks")
        pixels = {checksums[frame] for frame in frames}
        if len(frames) > 1 and (len(pixels) > 1 or None in pixels):
            which = ", ".join(str(tie[frame][0]).replace("inf", "unknown") for frame in frames[:6])
            times = sum(len(f) > 1 for f in shared)
            raise DuplicateSliceError(
                f"{what} (instance numbers {which}) share one position and are not known to be identical; "
                f"{times} of {len(shared)} positions are shared: time, or the like, must tell them apart"
            )
    dropped = len(points) - len(shared)
    notes = [f"{dropped} of {len(points)} frames dropped: duplicates with identical checksums"]
    return np.array([frames[0] for frames in shared], np.intp), notes if dropped else []


def _assumed_depth(spacing_between_slices: float | None, slice_thickness: float | None) -> tuple[float, str]:
    named = (("SpacingBetweenSlices", spacing_between_slices), ("SliceThickness", slice_thickness))
    for name, value in named:
        if value is not None and math.isfinite(value) and value != 0:
            return abs(float(value)), name  # nuclear medicine has negative ones
    return 1.0, "nowhere (no tag gives one)"


def _grid_index(along: FloatArray) -> IndexArray:
    """Number of each slice on an even grid, where missing ones count too."""
    jumps = np.diff(along)
    usual = np.rint(jumps / _lower_median(jumps)) == 1
    # The mean of the usual jumps counts a wide gap right where the median's rounding would add up.
    counts = np.rint(jumps / jumps[usual].mean()).astype(np.intp)
    return np.concatenate([np.zeros(1, np.intp), np.cumsum(counts)])


def _describe_gaps(along: FloatArray, index: IndexArray, distance: float, where: str) -> str:
    counts = np.diff(index) - 1
    wide = np.flatnonzero(counts)
    listed = [f"{counts[g]} between z={along[g]:.6g} and z={along[g + 1]:.6g}" for g in wide[:5]]
    more = f" and {len(wide) - 5} more gaps" if len(wide) > 5 else ""
    missing = f"{counts.sum()} of {index[-1] + 1} slices missing (step {distance:.4g} mm){where}"
    return f"{missing}: {', '.join(listed)}{more}"
