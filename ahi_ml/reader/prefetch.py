"""Filling the cache: every frame of an index read once, verified, and thrown away."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ahi_ml.cache import FrameCache
from ahi_ml.errors import AhiError, CacheError
from ahi_ml.index import DatasetIndex
from ahi_ml.reader import Reader
from ahi_ml.reader.batch import Batch
from ahi_ml.reader.options import ReadOptions
from ahi_ml.reader.stats import ReaderStats

__all__ = ["Prefetched", "prefetch"]

_AT_ONCE = 32
_AHEAD = 3  # batches under way: more than the requests in flight


@dataclass(frozen=True)
class Prefetched:
    """What came of filling a cache.

    Parameters
    ----------
    frames : int
        Of the index.
    stats : ReaderStats
        Where they were, and how many of them are verified.
    errors : tuple of AhiError
        One for each frame that could not be read; their messages name it.
    """

    frames: int
    stats: ReaderStats
    errors: tuple[AhiError, ...]

    def __repr__(self) -> str:
        return (
            f"<Prefetched: {self.frames:,} frames, {self.stats.cached:,} were there, {self.stats.fetched:,} fetched, "
            f"{self.stats.verified:,} verified, {len(self.errors):,} failed>"
        )


def prefetch(reader: Reader, index: DatasetIndex, cache: FrameCache, *, progress: bool | None = None) -> Prefetched:
    """Bring every frame of an index into a cache.

    I/O: one look at the cache a frame, and one request for each that is not there.

    Parameters
    ----------
    reader : Reader
        Fetches, decodes and verifies.
    index : DatasetIndex
        Which frames.
    cache : FrameCache
        Where to.
    progress : bool, optional
        Show a progress bar: by default in terminals and notebooks.

    Raises
    ------
    CacheError
        Others can look into the folder.
    """
    options = ReadOptions(output="stored")
    stats, errors = ReaderStats(), list[AhiError]()
    pending: deque[Batch] = deque()
    with tqdm(total=len(index), unit="frame", desc="fetch", disable=None if progress is None else not progress) as bar:

        def end(batch: Batch) -> None:
            outcomes: list[Any] = batch.outcomes()
            for outcome in outcomes if batch.failed else ():
                if isinstance(outcome, CacheError) or not isinstance(outcome, AhiError | np.ndarray):
                    raise outcome
                if isinstance(outcome, AhiError):
                    errors.append(outcome)
            stats.add(batch.stats)
            bar.update(len(outcomes))
            bar.set_postfix(cached=stats.cached, failed=len(errors), refresh=False)

        try:
            for start in range(0, len(index), _AT_ONCE):
                sources = index.sources(np.arange(start, min(start + _AT_ONCE, len(index))))
                pending.append(reader.submit(sources, options, cache=cache))
                if len(pending) > _AHEAD:
                    end(pending.popleft())
            while pending:
                end(pending.popleft())
        finally:
            for left in pending:
                left.cancel()
    cache.flush()
    return Prefetched(len(index), stats, tuple(errors))
