"""`FrameDataset`: one item a frame, for any torch DataLoader and for `FrameLoader`."""

from __future__ import annotations

import gc
import logging
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from ahi_ml.cache import FrameCache, ResultTier
from ahi_ml.datasets.buffers import BufferPool
from ahi_ml.datasets.collate import stack_as_anywhere
from ahi_ml.datasets.pending import KnownRows, PendingBatch, TensorOptions, channels_last
from ahi_ml.datasets.profile import Meters, Profile
from ahi_ml.datasets.seeding import SeededTransform, SharedEpoch
from ahi_ml.datasets.segments import SegmentPool
from ahi_ml.datasets.targets import Targets
from ahi_ml.errors import AhiError, ConfigError, DataError, MetadataError
from ahi_ml.index import DatasetIndex, FrameProfile, FrameSources
from ahi_ml.perprocess import PerProcess
from ahi_ml.pixels import Window
from ahi_ml.store import DataStore
from ahi_ml.types import AnyArray, FrameStep, Output, PathType

__all__ = ["FrameDataset", "Item"]

_LOG = logging.getLogger(__name__)

Item = dict[str, Any]
Transform = Callable[..., Item]

_SKIP_RATE = 0.01
_SKIP_GRACE = 5
_LOOKED_AT = 256  # rows at a time


class FrameDataset(Dataset[Item]):
    """The frames of an index as items ``{"image", "key", "meta"[, "target"]}``.

    ``image`` is a ``(C, rows, columns)`` tensor, float32 unless asked otherwise; ``key`` a string
    unique in the data store; ``meta`` a small dict of strings and numbers. Item i is row i of
    ``index.frames``.

    It pickles to paths: workers, forked or spawned, connect for themselves. ``__getitems__`` reads a
    whole batch at once, which torch's DataLoader uses by itself.

    I/O: none when made. An item is one cache file or one request.

    Parameters
    ----------
    store : DataStore
        Where the frames are.
    index : DatasetIndex
        Which frames.
    transform : FrameStep, sequence of FrameStep, or callable, optional
        The package's own pixel steps (`pixels.Window`, ...) run in the decode threads, in place. A
        callable takes the item and returns it, once an item, before batches are made. What it draws at random,
        from a parameter ``rng`` (a `numpy.random.Generator`) or from torch, numpy and Python, depends on
        `seed`, epoch and the item's key alone; see `set_epoch`.
    target : str, mapping or callable, optional
        ``item["target"]``: a column of ``index.frames``; a mapping from key, SOP instance UID or series UID; or a
        callable that takes the item.
    output : {"modality", "stored", "display"}
        See `ReadOptions`. Stored uint16 comes as int32, uint32 as int64.
    dtype : dtype, optional
        Of the image: a dtype of numpy, or one of torch that numpy has too (bfloat16 is not).
    padding : "keep", "mask" or float
        What becomes of pixels with the file's padding value.
    window : Window, str, pair or int, optional
        For ``output="display"``; see `ReadOptions`.
    normalize_polarity : bool
        For ``output="modality"``: MONOCHROME1 radiographs like the others; see `ReadOptions`.
    reduce : int
        Resolution levels to leave out; each halves rows and columns. See `ReadOptions`.
    cache : FrameCache, path or None
        ``store.cache`` by default; None reads without a cache.
    cache_decoded : bool
        Keep images in the cache too, as the options and pixel steps make them (not what a callable makes of
        them): much faster to read again, and several times the space.
    on_error : {"raise", "skip"}
        Whether a frame that cannot be read ends the run, or the next one of its form that can takes its place.
        More than 1 % of skipped frames (and more than five), of all workers and epochs, raise all the same. Logged at
        level INFO, counted in `profile`.
    verify : bool
        Compare with the data store's checksums.
    seed : int or None
        Of random transforms. None leaves their randomness as it is.

    Raises
    ------
    ConfigError
        Options that cannot work.
    """

    def __init__(
        self,
        store: DataStore,
        index: DatasetIndex,
        *,
        transform: FrameStep | Sequence[FrameStep] | Transform | None = None,
        target: str | Mapping[str, Any] | Callable[[Item], Any] | None = None,
        output: Output = "modality",
        dtype: Any = None,
        padding: Literal["keep", "mask"] | float = "keep",
        window: Window | str | tuple[float, float] | int | None = None,
        normalize_polarity: bool = False,
        reduce: int = 0,
        cache: FrameCache | PathType | Literal["store"] | None = "store",
        cache_decoded: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
        verify: bool = True,
        seed: int | None = 0,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error is 'raise' or 'skip', not {on_error!r}")
        self.store = store
        self.index = index
        steps, call = _divide_transform(transform)
        self._transform = None if call is None else SeededTransform(call, seed)
        self._epoch = SharedEpoch()
        self._meters = Meters()
        self._buffers = PerProcess(_make_buffers)
        self.options = TensorOptions(output, dtype, steps, padding, window, verify, reduce, normalize_polarity)
        self._targets = None if target is None else Targets(target, index)
        self.cache = (
            store.cache if cache == "store" else FrameCache.at(cache) if isinstance(cache, str | os.PathLike) else cache
        )
        self._derived = self._results() if cache_decoded else None
        self._on_error = on_error
        self._unreadable: set[int] = set()  # rows that take nobody's place
        self._settled = False

    def _results(self) -> ResultTier | None:
        """Where results of this dataset's options are kept. I/O: connects, for a folder."""
        if self.cache is None:
            raise ConfigError("cache_decoded=True keeps images in the cache, and cache=None has none")
        described = self.options.recipe()
        if described is None:
            _LOG.warning("images are not kept in the cache: a pixel step has no fingerprint that would tell a change")
            return None
        return self.cache.derived(self.store.datastore_id, described)

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.index)

    def __repr__(self) -> str:
        return f"<FrameDataset: {len(self):,} frames of {self.store!r}, output={self.options.output!r}>"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_unreadable": set(), "_settled": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._targets is not None:
            self._targets = self._targets.for_rows(self.index)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch items are read for, here and in workers that run: another epoch, another augmentation.

        I/O: none. `ResumableSampler` calls it; `FrameLoader` does without. Selections of it count by themselves.
        """
        self._epoch.set(epoch)

    @property
    def transforms_items(self) -> bool:
        """Whether items pass through a callable of the user's, which may keep them or change them."""
        return self._transform is not None or (self._targets is not None and self._targets.sees_items)

    def __getitem__(self, row: Any) -> Any:
        """The item of a row; a slice or a boolean mask gives a dataset of those rows.

        I/O: one cache file or one request.

        Raises
        ------
        IndexError
            No such row.
        TypeError
            It is no whole number.
        AhiError
            The frame cannot be read; the message names it.
        """
        if isinstance(row, slice | range | list) or (isinstance(row, np.ndarray | torch.Tensor) and row.ndim):
            key = row.numpy() if isinstance(row, torch.Tensor) else list(row) if isinstance(row, range) else row
            selected = FrameDataset.__new__(FrameDataset)
            own = {
                "index": self.index[key],
                "_epoch": SharedEpoch(self._epoch.value),
                "_meters": Meters(),
                "_buffers": PerProcess(_make_buffers),
            }
            selected.__setstate__({**self.__getstate__(), **own})
            return selected
        return self.__getitems__([operator.index(row)])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Item]:
        """The items of some rows, in their order, read at the same time; see `__getitem__`."""
        worker = None if self._settled else get_worker_info()
        if worker is not None:
            # A full collection writes to every object that a forked worker inherited, and so copies them all.
            gc.freeze()
            stack_as_anywhere()
            self.store.reader.share_cores(worker.num_workers)
            self._settled = True
        buffers = self._buffers.get()
        return self.items(self.submit(self.look_up(rows), buffers.take), buffers)

    def profile(self) -> AbstractContextManager[Profile]:
        """Tell where the time of reading goes, here and in each DataLoader worker, while a ``with`` block runs.

        I/O: none.

        Examples
        --------
        >>> with dataset.profile() as profile:
        ...     for batch in DataLoader(dataset, 32, num_workers=2):
        ...         step(batch)
        >>> print(profile)  # profile.total, profile.workers: LoadingStats
        """
        return Profile.of(self._meters)

    # What FrameLoader builds on

    @property
    def meters(self) -> Meters:
        """Counters of this dataset, of all processes."""
        return self._meters

    def look_up(self, rows: Sequence[int] | AnyArray) -> KnownRows:
        """What the index says of some rows; negative ones count from the end. I/O: none.

        Raises
        ------
        IndexError
            No such row.
        """
        started = perf_counter()
        known = KnownRows.of(self.index, rows)
        self._meters.add(collate_s=perf_counter() - started)
        return known

    def submit(self, rows: KnownRows, allocate: Callable[..., AnyArray] = np.empty) -> PendingBatch:
        """Start reading some rows. I/O: in the background.

        Parameters
        ----------
        rows : KnownRows
            Which; see `look_up`.
        allocate : callable
            Takes shape ``(n, C, rows, columns)`` and dtype, gives the array that frames of one shape are
            read into.
        """
        started = perf_counter()
        images = self._allocate(rows.sources, allocate)
        outs: AnyArray | list[AnyArray] = (
            channels_last(images) if isinstance(images, np.ndarray) else [channels_last(image) for image in images]
        )
        reader = self.store.reader
        if not self._meters.counts_requests:  # what others have asked for before is not this dataset's
            self._meters.add_requests(reader.requests())
            self._meters.set_threads(reader.threads)
        batch = reader.submit(rows.sources, self.options, outs=outs, cache=self.cache, derived=self._derived)
        return PendingBatch(rows, images, batch, submit_s=perf_counter() - started)

    def _allocate(self, sources: FrameSources, allocate: Callable[..., AnyArray]) -> AnyArray | list[AnyArray]:
        forms = {id(kind): self._form(kind) for kind in sources.distinct}
        if len(set(forms.values())) == 1:
            shape, dtype = next(iter(forms.values()))
            return allocate((len(sources), *shape), dtype)
        return [np.empty(*forms[id(kind)]) for kind in sources.kinds]

    def _form(self, kind: FrameProfile | MetadataError) -> tuple[tuple[int, ...], np.dtype[Any]]:
        if isinstance(kind, MetadataError):
            # What cannot be decoded has no form; its error is the reader's to give, and items' to handle.
            return (1, 1, 1), np.dtype(np.uint8)
        shape = kind.shape(self.options.output, self.options.reduce)
        return ((shape[2], *shape[:2]) if len(shape) == 3 else (1, *shape)), self.options.result_dtype(kind)

    def items(self, pending: PendingBatch, buffers: BufferPool | SegmentPool | None = None) -> list[Item]:
        """Wait for rows that were submitted and make their items; with the pool that lent their buffer. I/O: waits."""
        rows = self._arrived(pending)
        epoch = self._epoch.value if pending.epoch is None else pending.epoch
        still = self._transform is not None and pending.epoch is None and self._epoch.stands_still(len(rows), len(self))
        ids = rows.ids
        started, transform_s = perf_counter(), 0.0
        items: list[Item] = []
        images: Iterable[torch.Tensor] = (
            buffers.lend(pending.images)
            if buffers is not None and isinstance(pending.images, np.ndarray)
            else map(torch.from_numpy, pending.images)
        )
        for row, image, key, *values in zip(rows.numbers, images, rows.keys, *ids.values(), strict=True):
            meta = dict(zip(ids, values, strict=True))
            item: Item = {"image": image, "key": key, "meta": meta}
            if self._targets is not None or self._transform is not None:
                before = perf_counter()
                try:
                    if self._targets is not None:
                        item["target"] = self._targets.of(int(row), item)
                    if self._transform is not None:
                        item = self._transform(item, epoch, stands_still=still and not items)
                except Exception as error:
                    error.add_note(f"while the item of row {row} was made, {key}")
                    raise
                transform_s += perf_counter() - before
            items.append(item)
        self._meters.add(transform_s=transform_s, collate_s=perf_counter() - started - transform_s)
        return items

    def collated(self, pending: PendingBatch) -> dict[str, Any]:
        """Wait for rows that were submitted, and collate their items as torch does, images left out. I/O: waits.

        For data sets whose items no callable sees (`transforms_items`): theirs need not be made one by one, which
        would cost as much as reading a decoded frame.
        """
        rows = self._arrived(pending)
        started = perf_counter()
        batch = {"key": rows.keys, "meta": {name: _column(values) for name, values in rows.ids.items()}}
        if self._targets is not None:
            targets = [
                self._targets.of(int(row), {"key": key, "meta": dict(zip(rows.ids, values, strict=True))})
                for row, key, *values in zip(rows.numbers, rows.keys, *rows.ids.values(), strict=True)
            ]
            batch["target"] = default_collate(targets)
        self._meters.add(collate_s=perf_counter() - started)
        return batch

    def _arrived(self, pending: PendingBatch) -> KnownRows:
        """The rows of a batch once its frames are there: others in place of those that are skipped."""
        started = perf_counter()
        rows, outcomes = pending.rows, pending.batch.outcomes()
        self._measure(pending, started)
        if pending.batch.failed:
            numbers = rows.numbers.copy()
            failed = {slot: each for slot, each in enumerate(outcomes) if isinstance(each, BaseException)}
            if self._on_error == "skip":
                self._unreadable.update(numbers[list(failed)].tolist())
            for slot, error in failed.items():
                numbers[slot] = self._replace(pending, slot, error)
            rows = self.look_up(numbers)
        return rows

    def _measure(self, pending: PendingBatch, started: float) -> None:
        """Count what a batch took that was waited for since `started`."""
        waited, batch = perf_counter() - started, pending.batch
        network = min(max(batch.arrived - started, 0.0), waited)
        counts, reader = batch.stats, self.store.reader
        self._meters.add(
            frames=len(batch.sources),
            batches=1,
            network_s=network,
            decode_s=waited - network,
            collate_s=pending.submit_s,
            read_busy_s=counts.read_s,
            decode_busy_s=counts.decode_s,
            convert_busy_s=counts.convert_s,
            hits=counts.cached,
            misses=counts.fetched,
            bytes_fetched=counts.bytes_fetched,
            verified=counts.verified,
            unverified=counts.unverified,
            refetched=counts.refetched,
        )
        if counts.fetched or batch.failed:
            self._meters.add_requests(reader.requests())

    def _replace(self, pending: PendingBatch, slot: int, error: BaseException) -> int:
        """Read another row into a slot that failed; say which."""
        if self._on_error == "raise" or not isinstance(error, AhiError):
            raise error
        row = int(pending.rows.numbers[slot])
        self._skip(row, error)
        for other_row in self._alike_after(row, pending.rows.sources.kinds, slot):
            other = self.submit(self.look_up([other_row]))
            outcome = other.batch.outcomes()[0]
            if not isinstance(outcome, BaseException):
                pending.images = list(pending.images)
                pending.images[slot] = other.images[0]
                return other_row
            if not isinstance(outcome, AhiError):
                raise outcome
            self._unreadable.add(other_row)
            self._skip(other_row, outcome)
        raise error

    def _skip(self, row: int, error: AhiError) -> None:
        """Count a frame that is left out, unless that is one too many."""
        self._meters.add(skipped=1)
        skipped, frames = self._meters.total("skipped"), self._meters.total("frames")
        if skipped > max(_SKIP_GRACE, _SKIP_RATE * frames):
            raise DataError(
                f"{skipped:.0f} of {frames:,.0f} frames could not be read, more than {_SKIP_RATE:.0%}: "
                f"the last is row {row}: {error}"
            ) from error
        _LOG.info("row %d is skipped: %s", row, error)

    def _alike_after(self, row: int, kinds: Sequence[FrameProfile | MetadataError], slot: int) -> Iterator[int]:
        """The rows after one, from the end on to the start, whose images have the form of its batch."""
        usable = (kind for kind in (kinds[slot], *kinds) if not isinstance(kind, MetadataError))
        form = next(map(self._form, usable), None)
        for start in range(1, len(self), _LOOKED_AT):
            rows = (row + np.arange(start, min(start + _LOOKED_AT, len(self)))) % len(self)
            for number, kind in zip(rows.tolist(), self.index.sources(rows).kinds, strict=True):
                if number in self._unreadable or isinstance(kind, MetadataError):
                    continue
                if form in (None, self._form(kind)):
                    yield number


def _column(values: list[Any]) -> Any:
    """What torch collates strings or integers to. Its own way asks for the GIL twice, and looks at every string."""
    return torch.from_numpy(np.array(values, np.int64)) if isinstance(values[0], int) else values


def _make_buffers() -> BufferPool | SegmentPool:
    private = BufferPool(2)  # one batch is made while another is copied to where the consumer finds it
    return SegmentPool(private) if get_worker_info() is not None and SegmentPool.possible() else private


def _divide_transform(transform: Any) -> tuple[tuple[FrameStep, ...], Transform | None]:
    if transform is None:
        return (), None
    if hasattr(transform, "apply") and not callable(transform):
        return (transform,), None
    if isinstance(transform, list | tuple):
        if not all(hasattr(step, "apply") for step in transform):
            raise ConfigError(
                "a sequence of transforms holds the package's own pixel steps only; compose callables into one"
            )
        return tuple(transform), None
    if not callable(transform):
        raise ConfigError(f"transform is a pixel step or a callable, not {type(transform).__name__}")
    return (), transform
