"""Which frames of a series could make one stack, floor 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from ahi_ml.errors import GeometryError
from ahi_ml.geometry.vectors import COSINE_TOLERANCE, SPACING_TOLERANCE, IndexArray, normalised
from ahi_ml.types import FloatArray

__all__ = ["Group", "group_frames"]


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
        "ImageOrientationPatient": _clusters(normalised(cosines, ""), COSINE_TOLERANCE),
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
