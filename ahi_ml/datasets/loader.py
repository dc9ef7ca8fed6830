"""`FrameLoader`: batches from threads, read ahead into the batch buffer, no worker processes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from time import perf_counter
from typing import Any

import numpy as np
import torch

from ahi_ml.datasets.buffers import BufferPool
from ahi_ml.datasets.collate import collate
from ahi_ml.datasets.frames import FrameDataset, Item
from ahi_ml.datasets.pending import KnownRows, PendingBatch
from ahi_ml.datasets.profile import LoadingStats, Profile
from ahi_ml.datasets.sampler import EpochRows, ResumableSampler
from ahi_ml.errors import ConfigError
from ahi_ml.types import AnyArray

__all__ = ["FrameLoader"]

_FRAMES_AHEAD = 96  # 1.5 times the requests in flight that the service's latency needs
_LOOKED_UP = 256  # rows at once: between batches the processor's cache is decoding's, and what runs rarely runs slowly


class FrameLoader:
    """Batches of a `FrameDataset`, fetched and decoded by threads of this process.

    While one batch is used the next ones are on their way; memory is bounded by the batches ahead.
    Batches equal those of torch's DataLoader over the same dataset and order. Each iteration is an
    epoch; the order depends on the seed and the epoch alone. `state_dict` tells where the loop
    stands, counting the batches it has got and none that are on their way.

    I/O: none when made.

    Parameters
    ----------
    dataset : FrameDataset
        What to load.
    batch_size : int
        Frames a batch.
    shuffle : bool
        Whether each epoch has an order of its own.
    seed : int
        Of that order.
    drop_last : bool
        Leave a last, smaller batch out.
    sampler : iterable of int, optional
        Gives the rows of an epoch, instead of `shuffle`: a `ResumableSampler` for one of several ranks.
    collate_fn : callable, optional
        Makes a batch of a list of items; by default as torch does.
    frames_ahead : int
        Frames on their way at a time, at least one batch more than the one in use.

    Raises
    ------
    ConfigError
        Options that cannot work.

    Examples
    --------
    >>> loader = FrameLoader(FrameDataset(store, index), batch_size=32, shuffle=True, seed=0)
    >>> for batch in loader:
    ...     step(batch["image"], batch["key"])
    """

    def __init__(
        self,
        dataset: FrameDataset,
        batch_size: int = 32,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        sampler: Iterable[int] | None = None,
        collate_fn: Callable[[list[Item]], Any] | None = None,
        frames_ahead: int = _FRAMES_AHEAD,
    ) -> None:
        if batch_size < 1 or frames_ahead < 1:
            raise ConfigError("batch_size and frames_ahead are 1 or more")
        if sampler is not None and shuffle:
            raise ConfigError("give a sampler or shuffle=True, not both")
        self.dataset = dataset
        self.batch_size = batch_size
        self._drop_last = drop_last
        if sampler is None:
            sampler = ResumableSampler(dataset, seed=seed, shuffle=shuffle, num_replicas=1, rank=0)
            sampler.tells_dataset = False  # another loader may be reading it, in another epoch
        self.sampler: Iterable[int] = sampler
        self._epoch = self._skip = 0  # of another kind of sampler: next epoch, samples of it to leave out
        self._latest: _Progress | None = None
        self._since = Profile(dataset.meters)
        self._elapsed_s = 0.0
        self._under_way: set[float] = set()  # when the iterations began that have not ended
        self._collate = collate_fn
        self._ahead = 1 + math.ceil(frames_ahead / batch_size)
        self._buffers = BufferPool(self._ahead + 2)

    def __repr__(self) -> str:
        return f"<FrameLoader: {len(self):,} batches of {self.batch_size} over {self.dataset!r}, epoch {self.epoch}>"

    def __len__(self) -> int:
        """Batches of an epoch."""
        rows = len(self.sampler) if isinstance(self.sampler, Sized) else len(self.dataset)
        return rows // self.batch_size if self._drop_last else math.ceil(rows / self.batch_size)

    @property
    def epoch(self) -> int:
        """Which epoch the next iteration is."""
        return self.sampler.upcoming()[0] if isinstance(self.sampler, ResumableSampler) else self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is. What a state has consumed of that very epoch stays. I/O: none."""
        if epoch != self._epoch:
            self._skip = 0
        self._epoch, self._latest = epoch, None
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands: after the batches it has got. After a whole epoch, at the start of the next.

        I/O: none. Without a sampler or with a `ResumableSampler` this is a state of the latter, good for
        any batch size and number of ranks. Of another sampler it counts samples, to leave them out.
        """
        latest = self._latest
        if isinstance(self.sampler, ResumableSampler):
            if latest is not None and isinstance(latest.rows, EpochRows):
                left = latest.rows.count - latest.taken
                done = self._drop_last and left < self.batch_size  # what is left will be dropped
                return latest.rows.state_dict(latest.rows.count if done else latest.taken)
            return self.sampler.state_at(*self.sampler.upcoming())
        if latest is not None:
            return {"epoch": latest.epoch, "taken": latest.taken}
        return {"epoch": self._epoch, "taken": self._skip}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the next iteration is the rest of its epoch, later ones are whole. I/O: none.

        Raises
        ------
        ConfigError, SnapshotDriftError
            See `ResumableSampler.load_state_dict`.
        """
        if isinstance(self.sampler, ResumableSampler):
            self.sampler.load_state_dict(state)
            self._latest = None
            return
        if not {"epoch", "taken"} <= state.keys():
            raise ConfigError(f"not a state of a FrameLoader with a {type(self.sampler).__name__}")
        self.set_epoch(int(state["epoch"]))
        self._skip = int(state["taken"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the batches of an epoch.

        I/O: in the background, cache files and requests. Leaving the loop drops what is on its way.

        Raises
        ------
        AhiError
            A frame cannot be read, unless the dataset skips such frames.
        """
        progress = self._latest = self._begin()
        pending: deque[PendingBatch] = deque()
        started = perf_counter()
        self._under_way.add(started)
        try:
            for rows in self._batches(progress.rows):
                pending.append(self.dataset.submit(rows, self._buffers.take))
                pending[-1].epoch = progress.epoch
                if len(pending) > self._ahead:
                    yield self._finish(pending.popleft(), progress)
            while pending:
                yield self._finish(pending.popleft(), progress)
            if self._latest is progress:
                self._latest = None
        finally:
            self._under_way.discard(started)
            self._elapsed_s += perf_counter() - started
            for left in pending:
                left.batch.cancel()

    def stats(self) -> LoadingStats:
        """Where the time of all iterations so far went, and counts; ``print`` it for a report with advice. I/O: none.

        Reading of the dataset past this loader counts as well.
        """
        now = perf_counter()
        elapsed_s = self._elapsed_s + sum(now - started for started in self._under_way)
        return replace(self._since.total, elapsed_s=elapsed_s)

    def profile(self) -> AbstractContextManager[Profile]:
        """Tell where the time goes while a ``with`` block runs; see `FrameDataset.profile`. I/O: none."""
        return self.dataset.profile()

    def _begin(self) -> _Progress:
        rows = iter(self.sampler)
        if isinstance(rows, EpochRows):
            return _Progress(rows.begin(), rows)
        epoch, skip = self._epoch, self._skip
        self._epoch, self._skip = epoch + 1, 0
        return _Progress(epoch, islice(rows, skip, None), skip)

    def _batches(self, rows: Iterator[int]) -> Iterator[KnownRows]:
        size = self.batch_size
        # Another kind of sampler may decide late what comes next: it is asked for no more than is read.
        at_once = size * (max(_LOOKED_UP // size, 1) if isinstance(rows, EpochRows) else 1)
        while taken := rows.take(at_once) if isinstance(rows, EpochRows) else list(islice(rows, at_once)):
            known = self.dataset.look_up(taken)
            for start in range(0, len(taken) - (size - 1 if self._drop_last else 0), size):
                yield known[start : start + size]

    def _finish(self, pending: PendingBatch, progress: _Progress) -> Any:
        batch = self._collated(pending)
        progress.taken += len(pending.rows)
        return batch

    def _collated(self, pending: PendingBatch) -> Any:
        if self._collate is not None:
            return self._collate(self.dataset.items(pending))
        if self.dataset.transforms_items:
            return collate(self.dataset.items(pending))
        rest = self.dataset.collated(pending)
        if isinstance(pending.images, np.ndarray):
            return {"image": self._buffers.lend(pending.images), **rest}
        return {"image": collate(_images(pending.images, rest["key"]))["image"], **rest}


@dataclass(eq=False)
class _Progress:
    """An iteration: its epoch, its rows, and how many samples the loop has got."""

    epoch: int
    rows: Iterator[int]
    taken: int = 0


def _images(arrays: list[AnyArray], keys: list[str]) -> list[Item]:
    return [{"image": torch.from_numpy(array), "key": key} for array, key in zip(arrays, keys, strict=True)]
