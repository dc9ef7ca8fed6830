"""Where voxels lie in the patient, floor 1: frames sorted into stacks, and the affine of a stack.

Holds the geometry value, the rules that group and order frames, and flips and transposes of an
affine. Holds no pixels, no resampling and no reading of tags: it works on numbers that the metadata
floor parsed. Millimetres and patient LPS throughout (x to the left, y to posterior, z to the head).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ahi_ml.errors import ConfigError, DuplicateSliceError, GapError, GeometryError, MixedOrientationError
from ahi_ml.types import FloatArray

__all__ = ["Geometry", "Group", "Stack", "group_frames", "reorient", "stack_frames"]

Kind = Literal["regular", "tilted", "single", "irregular"]
Gaps = Literal["error", "fill", "keep"]
IndexArray = NDArray[np.intp]

COSINE_TOLERANCE = 1e-3  # between direction cosines of one stack, and for row . column of one frame
SPACING_TOLERANCE = 1e-3  # between pixel spacings of one stack, relative
JITTER_MM = 0.01  # scanners round positions to decimal strings
JITTER_OF_STEP = 0.02  # and some do so coarsely: one oblique series of step 7.0 has 6.96 to 7.07
SHEAR = 1e-3  # 1 - cosine between the step and the normal, about 2.6 degrees
SIDEWAYS_OF_PIXEL = 0.1  # in-plane drift of this part of a pixel moves nothing that can be seen

_ALL = slice(None)
_LETTERS = ("LR", "PA", "SI")  # LPS axis, then (positive, negative) direction


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Geometry:
    """Where the voxels of a ``(z, y, x)`` array lie: an affine, a shape and how they came about.

    An irregular stack has no affine (reading it raises); it holds the position of every slice instead.

    Parameters
    ----------
    affine : (4, 4) float64
        From array index ``(k, j, i, 1)`` to LPS mm. Columns: step from slice to slice, from row to
        row, from column to column, centre of the first voxel. With `positions`, the first is ignored.
    shape : (z, y, x)
    frame_of_reference : str
    kind : "regular", "tilted" (the step is not along the normal), "single" or "irregular"
    spacing_assumed : bool
        The distance between slices was not measured (single slice).
    tolerance : float
        How far, mm, a slice may have been recorded from where the affine puts it along the normal.
    positions : (z, 3) float64, optional
        Centre of the first voxel of each slice, LPS, mm: for kind "irregular" and only then.
    axes : (3, 3) float64, optional
        Rows are the unit vectors along which `coords` measures z, y and x: normal, column direction,
        row direction. By default those of `affine`. They survive slicing, so that a flipped axis
        counts down, as a flipped coordinate array does.

    Raises
    ------
    GeometryError
        The affine is not an invertible affine, or kind and positions disagree.
    """

    _matrix: FloatArray
    shape: tuple[int, int, int]
    frame_of_reference: str
    kind: Kind
    spacing_assumed: bool
    tolerance: float
    positions: FloatArray | None
    axes: FloatArray

    # Written out because `affine` is given at construction, yet must refuse to be read when irregular.
    # The fields above stand in the order of the parameters.
    def __init__(
        self,
        affine: ArrayLike,
        shape: Sequence[int],
        frame_of_reference: str = "",
        kind: Kind = "regular",
        spacing_assumed: bool = False,
        tolerance: float = JITTER_MM,
        positions: ArrayLike | None = None,
        axes: ArrayLike | None = None,
    ) -> None:
        matrix = np.array(affine, np.float64)
        if matrix.shape != (4, 4) or not np.array_equal(matrix[3], (0, 0, 0, 1)):
            raise GeometryError("an affine is a 4x4 matrix whose last row is 0 0 0 1")
        if len(shape) != 3 or min(shape) < 0:
            raise GeometryError(f"a shape is (z, y, x), not {tuple(shape)}")
        if kind not in get_args(Kind) or (kind == "irregular") != (positions is not None):
            raise GeometryError(f"kind {kind!r}: 'irregular' has positions, and no other kind does")
        places = None if positions is None else np.array(positions, np.float64)
        if places is not None:
            if places.shape != (shape[0], 3) or not np.isfinite(places).all():
                raise GeometryError(f"{shape[0]} slices need as many finite positions (x, y, z)")
            matrix[:3, 0] = np.cross(matrix[:3, 2], matrix[:3, 1])
            matrix[:3, 3] = places[0] if len(places) else matrix[:3, 3]
        if not np.isfinite(matrix).all() or np.linalg.det(matrix) == 0:
            raise GeometryError("the affine has values that are not finite, or no volume")
        units = _unit_axes(matrix) if axes is None else np.array(axes, np.float64)
        size = tuple(int(n) for n in shape)
        values = (matrix, size, frame_of_reference, kind, spacing_assumed, float(tolerance), places, units)
        for name, value in zip(Geometry.__annotations__, values, strict=True):
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
            object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # Through the constructor: a plain pickle would bring the arrays back writeable.
        return type(self), tuple(vars(self).values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Geometry):
            return NotImplemented
        return all(np.array_equal(vars(self)[name], vars(other)[name]) for name in vars(self))

    def __hash__(self) -> int:
        return hash((self.shape, self.kind, self.frame_of_reference))

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.shape))
        spacing = " x ".join(f"{mm:.4g}" for mm in self.spacing)
        return f"<Geometry {self.kind}, {size} voxels, {spacing} mm, {self.orientation}>"

    @property
    def affine(self) -> FloatArray:
        """(4, 4) float64, read-only: array index ``(k, j, i, 1)`` to LPS mm.

        Raises
        ------
        GeometryError
            The stack is irregular: no affine describes it.
        """
        if self.positions is not None:
            raise GeometryError("an irregular stack has no affine: use coords() and positions")
        return self._matrix

    def affine_ras(self) -> FloatArray:
        """(4, 4) float64: the same array index ``(k, j, i, 1)`` to RAS mm (NIfTI's frame).

        The index order stays the array's; a NIfTI writer that stores ``(i, j, k)`` reorders the columns.

        Raises
        ------
        GeometryError
            The stack is irregular.
        """
        return np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.affine

    @property
    def spacing(self) -> tuple[float, float, float]:
        """(dz, dy, dx) in mm, positive.

        dz is the distance between slice planes, measured along the normal, so that dz * dy * dx is the
        volume of a voxel for a sheared stack too. NaN for an irregular stack: there is no one value.
        """
        dy, dx = (float(np.linalg.norm(self._matrix[:3, axis])) for axis in (1, 2))
        dz = math.nan if self.positions is not None else abs(float(self._matrix[:3, 0] @ self.axes[0]))
        return dz, dy, dx

    @property
    def origin(self) -> FloatArray:
        """(3,) float64: centre of the first voxel, LPS, mm."""
        return self._matrix[:3, 3]

    @property
    def directions(self) -> FloatArray:
        """(3, 3) float64: columns are the unit LPS directions in which z, y and x indices grow.

        For a tilted stack the first is the true, sheared one; for an irregular stack it is the normal.
        """
        columns = self._matrix[:3, :3]
        return cast(FloatArray, columns / np.linalg.norm(columns, axis=0))

    @property
    def orientation(self) -> str:
        """Where the indices grow to, one letter of L R P A S I for each array axis, in z, y, x order.

        A plain axial stack, feet to head, is "SPL". Oblique axes take the nearest letters, each once.
        """
        return "".join(_LETTERS[world][sign < 0] for world, sign in _nearest_axes(self.directions))

    def slice_origins(self) -> FloatArray:
        """(z, 3) float64: centre of the first voxel of each slice, LPS, mm. I/O: none."""
        if self.positions is not None:
            return self.positions
        return self.origin + np.arange(self.shape[0])[:, None] * self._matrix[:3, 0]

    def coords(self) -> dict[str, FloatArray]:
        """Give each index its distance along its unit axis: the labels of an array's dimensions.

        The axes are the slice normal, the column and the row direction, so a plain axial stack has its
        LPS coordinates. For a tilted stack, y and x are those of the first slice.

        I/O: none.

        Returns
        -------
        dict of "z", "y", "x" to (n,) float64, mm
        """
        normal, *in_plane = self.axes
        labels = {"z": _along(self.slice_origins(), normal)}
        for axis, name, unit in zip((1, 2), "yx", in_plane, strict=True):
            labels[name] = self.origin @ unit + np.arange(self.shape[axis]) * (self._matrix[:3, axis] @ unit)
        return labels

    def reduced(self, level: int) -> Geometry:
        """Geometry of the same slices decoded `level` resolution levels lower.

        In-plane spacing doubles with each level and the first voxel stays where it is: the low-pass
        samples of the wavelet sit on samples 0, 2, 4, ..., not on block centres.

        I/O: none.

        Raises
        ------
        ConfigError
            `level` is negative.
        """
        if level < 0:
            raise ConfigError(f"a resolution level is 0 or more, not {level}")
        matrix = self._matrix.copy()
        matrix[:3, 1:3] *= 2**level
        z, *plane = self.shape
        return self._with(matrix, (z, *(-(-n // 2**level) for n in plane)), self.positions)

    def sliced(self, k: slice = _ALL, j: slice = _ALL, i: slice = _ALL) -> Geometry:
        """Geometry of ``array[k, j, i]``; steps may be negative, and a slice may be empty.

        I/O: none.

        Parameters
        ----------
        k, j, i : slice
            What is taken along z, y and x.
        """
        taken = [range(n)[part] for n, part in zip(self.shape, (k, j, i), strict=True)]
        starts = np.array([part.start for part in taken])
        matrix = self._matrix.copy()
        matrix[:3, 3] += self._matrix[:3, :3] @ starts
        matrix[:3, :3] *= [part.step for part in taken]
        positions = self.positions
        if positions is not None:
            positions = positions[list(taken[0])] + self._matrix[:3, 1:3] @ starts[1:]
        return self._with(matrix, [len(part) for part in taken], positions)

    def _with(self, matrix: FloatArray, shape: Sequence[int], positions: FloatArray | None) -> Geometry:
        rest = (
            self.frame_of_reference,
            self.kind,
            self.spacing_assumed,
            self.tolerance,
            positions,
            self.axes,
        )
        return Geometry(matrix, shape, *rest)


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


@dataclass(frozen=True, eq=False)
class Group:
    """Frames of a series that could make one stack.

    Parameters
    ----------
    indices : (n,) intp, ascending
    reason : str
        DICOM keyword that sets these frames apart from those of the first group; "" for the first.
    kind : "stack" or "localizer"
        A localizer is set aside: it says so itself, or has one or two frames beside a larger stack.
    """

    indices: IndexArray
    reason: str
    kind: Literal["stack", "localizer"]


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
    along = _along(points, normal)
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
    off_along = np.abs(_along(off, normal))
    off_aside = np.linalg.norm(off - _along(off, normal)[:, None] * normal, axis=1)
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


def group_frames(
    orientations: ArrayLike,
    pixel_spacing: ArrayLike,
    rows: Sequence[int],
    columns: Sequence[int],
    samples: Sequence[int],
    frames_of_reference: Sequence[str],
    image_types: Sequence[Sequence[str]] | None = None,
    stack_ids: Sequence[str] | None = None,
) -> list[Group]:
    """Split the frames of a series into groups that could each make one stack.

    The order of the groups (stacks before localizers, then larger ones first) does not depend on the
    order of the frames. An orientation that turns slowly from frame to frame stays in one group, which
    `stack_frames` then refuses: cut into pieces it would look like several sound stacks.

    I/O: none.

    Parameters
    ----------
    orientations : (n, 6) float64
        Image Orientation (Patient).
    pixel_spacing : (n, 2) float64
        Between rows, between columns, mm.
    rows, columns, samples : sequence of n int
    frames_of_reference : sequence of n str
    image_types : sequence of n sequences of str, optional
        Values of Image Type; "LOCALIZER" or "SCOUT" in the third sets a frame aside.
    stack_ids : sequence of n str, optional
        Stack ID of enhanced multi-frame images.

    Raises
    ------
    GeometryError
        Frames have no orientation or pixel spacing: a projection or planar series.
    """
    cosines = np.asarray(orientations, np.float64).reshape(-1, 6)
    spacing = np.asarray(pixel_spacing, np.float64).reshape(-1, 2)
    n = len(cosines)
    if n == 0:
        return []
    known = np.isfinite(cosines).all(axis=1) & np.isfinite(spacing).all(axis=1)
    if not known.all():
        raise GeometryError(
            f"{n - int(known.sum())} of {n} frames have no orientation or pixel spacing: the series is a "
            "projection or planar one; read its frames in 2-D"
        )
    if (spacing <= 0).any():
        raise GeometryError("pixel spacing must be above 0")
    rulers = np.log(spacing)  # so that a relative tolerance becomes an absolute one
    kinds = [()] * n if image_types is None else image_types
    scout = [len(kind) > 2 and kind[2].upper() in ("LOCALIZER", "SCOUT") for kind in kinds]
    tags: dict[str, Sequence[Any]] = {
        "FrameOfReferenceUID": frames_of_reference,
        "Rows": rows,
        "Columns": columns,
        "ImageOrientationPatient": _clusters(_normalised(cosines, ""), COSINE_TOLERANCE),
        "PixelSpacing": _clusters(rulers, SPACING_TOLERANCE),
        "StackID": [""] * n if stack_ids is None else stack_ids,
        "SamplesPerPixel": samples,
        "ImageType": scout,
    }
    members: dict[tuple[Any, ...], list[int]] = {}
    for frame, key in enumerate(zip(*tags.values(), strict=True)):
        members.setdefault(key, []).append(frame)
    largest = max((len(frames) for key, frames in members.items() if not key[-1]), default=0)

    def aside(key: tuple[Any, ...]) -> bool:
        return bool(key[-1]) or len(members[key]) < min(3, largest)

    keys = sorted(members, key=lambda key: (aside(key), -len(members[key]), key))
    return [
        Group(
            np.array(members[key], np.intp),
            next((tag for tag, a, b in zip(tags, key, keys[0], strict=True) if a != b), ""),
            "localizer" if aside(key) else "stack",
        )
        for key in keys
    ]


def reorient(
    affine: ArrayLike, shape: Sequence[int], code: str
) -> tuple[tuple[int, int, int], tuple[bool, bool, bool], FloatArray]:
    """Find the transpose and the flips that make an array's axes grow towards `code`.

    Apply them in this order: ``np.flip(np.transpose(array, axes), [n for n in range(3) if flips[n]])``.

    I/O: none.

    Parameters
    ----------
    affine : (4, 4) float64
        Array index to LPS mm.
    shape : three int
        Of the array.
    code : str
        Where the first, second and third axis of the result grow to, such as "RAS", "LPS" or "SPL"
        (`Geometry.orientation` of a plain axial stack). Axes that are oblique count as the nearest.

    Returns
    -------
    axes : (3,) int
        Which axis of the array each axis of the result is.
    flips : (3,) bool
        Which axes of the result are reversed.
    affine : (4, 4) float64
        Index of the result to LPS mm: every voxel stays where it is.

    Raises
    ------
    ConfigError
        The code does not name each of L/R, P/A and S/I once.
    """
    matrix = np.asarray(affine, np.float64)
    wanted = [next((w for w, pair in enumerate(_LETTERS) if letter in pair), -1) for letter in code.upper()]
    if sorted(wanted) != [0, 1, 2]:
        raise ConfigError(f"an orientation names each of L/R, P/A and S/I once, as 'RAS' does: not {code!r}")
    nearest = _nearest_axes(matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0))
    found = {world: (axis, sign) for axis, (world, sign) in enumerate(nearest)}
    axes = cast(tuple[int, int, int], tuple(found[world][0] for world in wanted))
    flips = cast(
        tuple[bool, bool, bool],
        tuple(_LETTERS[w][found[w][1] < 0] != letter for w, letter in zip(wanted, code.upper(), strict=True)),
    )
    back = np.zeros((4, 4))  # from index of the result to index of the array
    back[3, 3] = 1
    for new, (old, flip) in enumerate(zip(axes, flips, strict=True)):
        back[old, new] = -1 if flip else 1
        back[old, 3] = shape[old] - 1 if flip else 0
    return axes, flips, matrix @ back


def _along(points: FloatArray, direction: FloatArray) -> FloatArray:
    # Not a matrix product: BLAS may round a row differently according to where it stands.
    return cast(FloatArray, (points * direction).sum(axis=1))


def _tolerance(step: float) -> float:
    # Below 0.04 mm between slices (microscopy, OCT) 0.01 mm would let neighbours swallow each other.
    return min(max(JITTER_MM, JITTER_OF_STEP * step), step / 4)


def _lower_median(values: FloatArray) -> float:
    # One of the values itself: between 5 and 10 mm the mean of the middle two fits neither.
    return float(np.sort(values)[(len(values) - 1) // 2])


def _unit_axes(matrix: FloatArray) -> FloatArray:
    x, y = (matrix[:3, axis] / np.linalg.norm(matrix[:3, axis]) for axis in (2, 1))
    normal = np.cross(x, y)
    normal /= np.linalg.norm(normal) * (1 if normal @ matrix[:3, 0] >= 0 else -1)
    return np.stack([normal, y, x])


def _nearest_axes(directions: FloatArray) -> list[tuple[int, float]]:
    """For each column: the LPS axis it is nearest to, each used once, and the sign."""
    best = max(permutations(range(3)), key=lambda p: sum(abs(directions[w, axis]) for axis, w in enumerate(p)))
    return [(world, float(np.sign(directions[world, axis]))) for axis, world in enumerate(best)]


def _normalised(cosines: FloatArray, where: str) -> FloatArray:
    """(n, 6) cosines with both vectors of unit length; refuses axes that are not orthogonal."""
    vectors: FloatArray = cosines.reshape(-1, 2, 3) + 0.0
    lengths = np.linalg.norm(vectors, axis=2, keepdims=True)
    if not np.isfinite(vectors).all() or (lengths == 0).any():
        raise GeometryError(f"frames without an orientation{where}: a projection or planar series")
    vectors /= lengths
    skew = np.abs((vectors[:, 0] * vectors[:, 1]).sum(axis=1)).max()
    if skew > COSINE_TOLERANCE:
        raise GeometryError(f"image axes are not orthogonal{where}: row . column is {skew:.4g}")
    return vectors.reshape(-1, 6)


def _common_axes(orientations: ArrayLike, where: str) -> tuple[FloatArray, FloatArray, FloatArray]:
    cosines = _normalised(np.asarray(orientations, np.float64).reshape(-1, 6), where)
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
    along = _along(points, normal)
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


def _clusters(values: FloatArray, tolerance: float) -> list[int]:
    """Number the clusters of rows that chains of neighbours within `tolerance` join, lowest row first."""
    rows, inverse = np.unique(values, axis=0, return_inverse=True)
    number = np.full(len(rows), -1)
    for start in range(len(rows)):
        reached = [start] if number[start] < 0 else []
        label = int(number.max()) + 1
        while reached:
            row = reached.pop()
            number[row] = label
            near = (np.abs(rows - rows[row]) <= tolerance).all(axis=1) & (number < 0)
            number[near] = label
            reached += np.flatnonzero(near).tolist()
    return [int(n) for n in number[inverse.reshape(-1)]]
