"""Vectors and tolerances that grouping, stacking and the grid share, floor 1."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from ahi_ml.errors import GeometryError
from ahi_ml.types import FloatArray

__all__ = ["COSINE_TOLERANCE", "JITTER_MM", "SPACING_TOLERANCE", "IndexArray", "distances_along", "normalised"]

IndexArray = NDArray[np.intp]

COSINE_TOLERANCE = 1e-3  # between direction cosines of one stack, and for row . column of one frame
SPACING_TOLERANCE = 1e-3  # between pixel spacings of one stack, relative
JITTER_MM = 0.01  # scanners round positions to decimal strings


def distances_along(points: FloatArray, direction: FloatArray) -> FloatArray:
    """(n,) how far along the unit vector `direction` each of the (n, 3) points lies."""
    # Not a matrix product: BLAS may round a row differently according to where it stands.
    return cast(FloatArray, (points * direction).sum(axis=1))


def normalised(cosines: FloatArray, where: str) -> FloatArray:
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
