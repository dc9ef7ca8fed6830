"""`extract_features`: a function over every series or frame, in parallel, into Parquet. Floor 6.

Parallelism is joblib's: whatever backend is in force (processes here, Dask on a cluster) runs it.
Workers are sent the index's path and row numbers, never data or clients.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from joblib import Parallel, delayed
from tqdm.auto import tqdm

from ahi_ml.errors import ConfigError
from ahi_ml.index import DatasetIndex
from ahi_ml.reader import ReadOptions
from ahi_ml.remote import RemoteFile, local_or_remote
from ahi_ml.store import DataStore
from ahi_ml.types import AnyArray, PathType
from ahi_ml.volume import open_volume

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["extract_features"]

Features = Mapping[str, Any]
_FRAMES_A_TASK = 64


def extract_features(
    store: DataStore,
    index: DatasetIndex,
    function: Callable[[Any], Features],
    *,
    by: Literal["series", "frame"] = "series",
    out: PathType | None = None,
    n_jobs: int | None = None,
    on_error: Literal["record", "raise"] = "record",
    options: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Compute features of every series, or frame, of an index.

    I/O: reads what `function` touches, through the cache; writes `out` whole or not at all.

    Parameters
    ----------
    store : DataStore
        Where the frames are.
    index : DatasetIndex
        What to go through.
    function : callable
        Takes a lazy volume (`open_volume`) by series, or a ``(rows, columns[, 3])`` array by frame;
        gives a mapping of names to numbers, strings or 1-D arrays. It must pickle.
    by : {"series", "frame"}
        One row a series or a frame.
    out : path or str, optional
        Parquet file, or an fsspec URL of one, such as ``s3://bucket/features.parquet``.
    n_jobs : int, optional
        As joblib takes it: None follows ``joblib.parallel_config``, -1 is all cores.
    on_error : {"record", "raise"}
        Whether an item that fails gets its error in the columns ``error_type`` and ``error``, or
        ends the run.
    options : mapping, optional
        Keyword arguments of `open_volume`, or of `ReadOptions` by frame.
    progress : bool, optional
        Show a progress bar.

    Returns
    -------
    pandas.DataFrame
        In index order, whatever the number of jobs: ids, the features, ``error_type`` and ``error``
        (null where all went well).

    Raises
    ------
    ConfigError
        An option that cannot work.
    OSError
        `out` cannot be written.
    """
    import pandas as pd

    if by not in ("series", "frame"):
        raise ConfigError(f"features are by 'series' or 'frame', not {by!r}")
    if on_error not in ("record", "raise"):
        raise ConfigError(f"on_error is 'record' or 'raise', not {on_error!r}")
    place = local_or_remote(out) if out is not None else None
    if isinstance(place, RemoteFile):
        place.check()
    tasks = list(_tasks(index, by))
    run = _one_series if by == "series" else _some_frames
    work = (delayed(run)(store, index, rows, function, dict(options or {}), on_error) for rows in tasks)
    shown = store.progress if progress is None else progress
    rows: list[dict[str, Any]] = []
    failed = 0
    with tqdm(total=len(tasks), desc="features", unit=by, disable=None if shown is None else not shown) as bar:
        # "generator" gives results in the order of the tasks, which makes the table independent of n_jobs.
        for result in Parallel(n_jobs=n_jobs, return_as="generator")(work):
            rows += result
            failed += sum(row["error"] is not None for row in result)
            bar.set_postfix(failed=failed)
            bar.update()
    table = pd.DataFrame(rows, columns=None if rows else [*_IDS[by], *_ERRORS])
    table = table[[*(name for name in table if name not in _ERRORS), *_ERRORS]]  # errors last
    if place is not None:
        _write(table, place)
    return table


_ERRORS = ("error_type", "error")
_COMMON = ("image_set_id", "version_id", "series_instance_uid")
_IDS = {"series": (*_COMMON, "frames"), "frame": (*_COMMON, "sop_instance_uid", "frame_number")}


def _tasks(index: DatasetIndex, by: str) -> Iterator[AnyArray]:
    if by == "series":
        for _, rows in index.series_rows():
            yield rows
    else:
        for start in range(0, len(index), _FRAMES_A_TASK):
            yield np.arange(start, min(start + _FRAMES_A_TASK, len(index)))


def _one_series(
    store: DataStore,
    index: DatasetIndex,
    rows: AnyArray,
    function: Callable[[Any], Features],
    options: dict[str, Any],
    on_error: str,
) -> list[dict[str, Any]]:
    part = index[rows]
    first = part.details([0])[0]
    row = {name: first[name] for name in _COMMON} | {"frames": len(part)}
    return [_attempt(row, lambda: function(open_volume(store, part, **options)), on_error)]


def _some_frames(
    store: DataStore,
    index: DatasetIndex,
    rows: AnyArray,
    function: Callable[[Any], Features],
    options: dict[str, Any],
    on_error: str,
) -> list[dict[str, Any]]:
    part = index[rows]
    batch = store.reader.submit(part.sources(), ReadOptions(**options), cache=store.cache)

    def apply(outcome: AnyArray | BaseException) -> Features:
        if isinstance(outcome, BaseException):
            raise outcome
        return function(outcome)

    return [
        _attempt(details, lambda outcome=outcome: apply(outcome), on_error)  # type: ignore[misc]
        for details, outcome in zip(part.details(), batch.outcomes(), strict=True)
    ]


def _attempt(row: dict[str, Any], work: Callable[[], Features], on_error: str) -> dict[str, Any]:
    """The row of an item with its features, or with what went wrong."""
    try:
        features = {name: _plain(value) for name, value in dict(work()).items()}
        if taken := sorted(features.keys() & {*row, *_ERRORS}):
            raise ConfigError(f"features cannot be called {', '.join(taken)}: columns of that name are in the table")
    except Exception as error:
        if on_error == "raise":
            raise
        return {**row, "error_type": type(error).__name__, "error": str(error)}
    return {**row, **features, "error_type": None, "error": None}


def _plain(value: Any) -> Any:
    """What Parquet can hold: NumPy scalars and 0-D arrays (xarray's too) as numbers, vectors as lists."""
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else array.tolist()


def _write(table: pd.DataFrame, path: Path | RemoteFile) -> None:
    if isinstance(path, RemoteFile):
        with path.whole() as file:
            table.to_parquet(file, index=False)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        table.to_parquet(temporary, index=False)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
