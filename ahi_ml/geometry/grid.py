"""The geometry of a stack, floor 1: an affine and a shape, how to slice, reduce, flip and transpose them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import ArrayLike

from ahi_ml.errors import ConfigError, GeometryError
from ahi_ml.geometry.vectors import JITTER_MM, distances_along
from ahi_ml.types import FloatArray

__all__ = ["Geometry", "Kind", "reorient"]

Kind = Literal["regular", "tilted", "single", "irregular"]

_ALL = slice(None)
_LETTERS = ("LR", "PA", "SI")  # LPS axis, then (positive, negative) direction


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Geometry:
    """Where the voxels of a ``(z, y, x)`` array lie: an affine, a shape and how they came about.

    An irregular stack has no affine (reading it raises); it holds the position of every slice instead.

    I/O: none.

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
        labels = {"z": distances_along(self.slice_origins(), normal)}
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


def _unit_axes(matrix: FloatArray) -> FloatArray:
    x, y = (matrix[:3, axis] / np.linalg.norm(matrix[:3, axis]) for axis in (2, 1))
    normal = np.cross(x, y)
    normal /= np.linalg.norm(normal) * (1 if normal @ matrix[:3, 0] >= 0 else -1)
    return np.stack([normal, y, x])


def _nearest_axes(directions: FloatArray) -> list[tuple[int, float]]:
    """For each column: the LPS axis it is nearest to, each used once, and the sign."""
    best = max(permutations(range(3)), key=lambda p: sum(abs(directions[w, axis]) for axis, w in enumerate(p)))
    return [(world, float(np.sign(directions[world, axis]))) for axis, world in enumerate(best)]
