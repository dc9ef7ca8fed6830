"""The lazy array under a volume: a shape, a dtype, and reading the slices that an index asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from xarray.backends import BackendArray
from xarray.core import indexing

from ahi_ml.cache import FrameCache
from ahi_ml.index import DatasetIndex
from ahi_ml.reader import ReadOptions
from ahi_ml.store import DataStore
from ahi_ml.types import AnyArray

__all__ = ["FrameStack"]


@dataclass(eq=False)
class FrameStack(BackendArray):
    """Frames along z, read when indexed: only those of the slices asked for.

    Pickles with its store and index, both of which travel as paths.

    Parameters
    ----------
    store : DataStore
        Where the frames are.
    index : DatasetIndex
        Its rows are the frames.
    order : (z,) ndarray of int
        Row of each slice; -1 for a slice that is missing.
    options : ReadOptions
        What frames are turned into.
    shape : tuple of int
        ``(z, y, x[, channel])``.
    dtype : numpy.dtype
        Of the values.
    fill : float
        Value of missing slices.
    cache : FrameCache, None or "store"
        Looked into first; "store" means the data store's.
    """

    store: DataStore
    index: DatasetIndex
    order: AnyArray
    options: ReadOptions
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: float
    cache: FrameCache | Literal["store"] | None = "store"

    def __getitem__(self, key: indexing.ExplicitIndexer) -> AnyArray:
        """Values of an index. I/O: cache files and requests for the slices it touches."""
        if not isinstance(key, indexing.VectorizedIndexer):
            return self._read(key.tuple)  # the adapter fails on empty slices with a negative step
        return indexing.explicit_indexing_adapter(  # type: ignore[no-any-return]
            key, self.shape, indexing.IndexingSupport.OUTER, self._read
        )

    def _read(self, key: tuple[Any, ...]) -> AnyArray:
        places, rest = key[0], key[1:]
        wanted = np.atleast_1d(np.arange(self.shape[0])[places])
        rows = self.order[wanted]
        block = np.full((len(wanted), *self.shape[1:]), self.fill, self.dtype)
        present = np.flatnonzero(rows >= 0)
        cache = self.store.cache if self.cache == "store" else self.cache
        batch = self.store.reader.submit(
            self.index.sources(rows[present]),
            self.options,
            outs=[block[place] for place in present],
            cache=cache,
        )
        batch.wait()
        if isinstance(places, int | np.integer):
            return np.asarray(_outer(block[0], rest))
        return _outer(block, (slice(None), *rest))


def _outer(block: AnyArray, key: tuple[Any, ...]) -> AnyArray:
    """Index each axis by its own slice, integer or array, one after the other, from the last to the first."""
    for axis in range(len(key) - 1, -1, -1):
        block = block[(slice(None),) * axis + (key[axis],)]
    return block
