"""`DatasetIndex`: which frames a data set is made of, and everything needed to read them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ahi_ml.config import index_folder
from ahi_ml.errors import ConfigError
from ahi_ml.index import expression
from ahi_ml.index.columns import FrameColumns
from ahi_ml.index.profile import FrameProfile
from ahi_ml.index.secret import PatientSecret
from ahi_ml.index.sources import FrameSource, FrameSources
from ahi_ml.index.spill import local_copy, spill_path
from ahi_ml.index.split import assign_groups, check_identifiers, connected_groups
from ahi_ml.index.tables import Gatherer, Tables
from ahi_ml.remote import RemoteFile, local_or_remote
from ahi_ml.types import AnyArray, FloatArray, PathType

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DatasetIndex", "FrameProfile", "FrameSource", "FrameSources", "Gatherer", "Tables"]

_LOG = logging.getLogger(__name__)


class DatasetIndex:
    """The frames of a data set, pinned to versions of their image sets.

    Self-sufficient: with it and a data store, frames are fetched, decoded, verified, stacked and
    rescaled without another look at metadata. Arrow columns, memory-mapped once saved; a selection
    is a list of row numbers over shared tables. No patient identifier is in it, only a keyed hash.

    Build one with ``store.search(...).index()`` or `DatasetIndex.load`. ``len`` counts frames;
    a slice, an array of row numbers or a boolean mask selects.

    I/O: none, but for `save`, `load` and pickling (which saves an unsaved index to a private file).
    """

    def __init__(
        self,
        tables: Tables,
        *,
        rows: AnyArray | None = None,
        path: Path | None = None,
        snapshot_id: str | None = None,
        patient_secret: bytes | None = None,
        secret_kept: bool = True,
        notes: Sequence[str] = (),
    ) -> None:
        self._tables = tables
        self._rows = rows
        self._path = path
        self._remote: RemoteFile | None = None
        self._snapshot_id = snapshot_id
        self._secret = PatientSecret(patient_secret, secret_kept) if patient_secret is not None else None
        self._order = Tables.saved_order(path) if path is not None else None
        self.notes = tuple(notes)
        self._columns = FrameColumns(tables)

    def __len__(self) -> int:
        """Number of frames."""
        return self._tables.frames.num_rows if self._rows is None else len(self._rows)

    def __repr__(self) -> str:
        series = self._used_series()
        keys = self._tables.series["patient_key"].take(pa.array(series)).drop_null()
        modalities = sorted(set(self._tables.series["Modality"].take(pa.array(series)).to_pylist()) - {None})
        text = (
            f"<DatasetIndex: {len(self):,} frames, {len(series):,} series, {len(keys.unique()):,} patients"
            f"{', ' + '/'.join(modalities) if modalities else ''}; snapshot {self.snapshot_id[:12]}>"
        )
        return "\n".join([text, *(f"  {note}" for note in self.notes)])

    # Selecting

    def _take(self, rows: AnyArray) -> DatasetIndex:
        base = rows if self._rows is None else self._rows[rows]
        selected = DatasetIndex(self._tables, rows=base, notes=self.notes)
        selected._columns, selected._secret = self._columns, self._secret
        return selected

    def __getitem__(self, key: slice | Sequence[int] | AnyArray) -> DatasetIndex:
        """The frames of a slice, of row numbers, or where a boolean mask is true, as an index."""
        if isinstance(key, slice):
            return self._take(np.arange(len(self))[key])
        rows = np.asarray(key.fillna(False) if hasattr(key, "fillna") else key)  # a pandas mask: null is false
        if rows.dtype == bool:
            if rows.shape != (len(self),):
                raise ConfigError(f"a mask of {rows.shape} for an index of {len(self)} frames")
            return self._take(np.flatnonzero(rows))
        if rows.ndim != 1 or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
            raise ConfigError("select frames by a slice, row numbers or a boolean mask")
        if rows.size and (rows.min() < -len(self) or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of an index of {len(self)} frames")
        return self._take(np.where(rows < 0, rows + len(self), rows).astype(np.int64))

    def where(self, condition: str | None = None, /, **equals: Any) -> DatasetIndex:
        """The frames that meet a condition.

        I/O: none.

        Parameters
        ----------
        condition : str, optional
            Such as ``"Rows == 512 and Modality in ('CT', 'MR')"``; see `expression.evaluate`.
        **equals
            Columns and the value (or the list of values) they must have.

        Raises
        ------
        ConfigError
            An unknown column, with close matches, or a condition that cannot be read.
        """
        mask: Any = pa.array(np.ones(len(self), bool))
        if condition is not None:
            columns = {name: self.column(name) for name in sorted(expression.columns_of(condition))}
            mask = expression.evaluate(condition, columns)
        for name, wanted in equals.items():
            column = self.column(name)
            values = list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]
            try:
                mask = pc.and_(mask, expression.member(column, values))
            except (pa.ArrowException, OverflowError, UnicodeError) as error:
                raise ConfigError(f"cannot compare {name} with {wanted!r}: {error}") from error
        return self[np.asarray(mask.to_numpy(zero_copy_only=False), bool)]

    def sample(self, n: int, seed: int = 0) -> DatasetIndex:
        """At most `n` frames by chance, in index order. I/O: none."""
        if n < 0:
            raise ConfigError(f"a sample of {n} frames")
        if n >= len(self):
            return self
        return self[np.sort(np.random.default_rng(seed).choice(len(self), n, replace=False))]

    def head(self, n: int = 5) -> DatasetIndex:
        """The first frames. I/O: none."""
        return self[:n]

    def series_rows(self) -> Iterator[tuple[str, AnyArray]]:
        """Yield series UID and row numbers of its frames, in index order. I/O: none."""
        series = self._columns.series(self._numbers)
        order = np.argsort(series, kind="stable")
        starts = np.flatnonzero(np.diff(series[order], prepend=-1))
        groups = dict[str, list[AnyArray]]()
        for rows in np.split(order, starts[1:]) if len(order) else []:
            uid = self._tables.series["series_instance_uid"][int(series[rows[0]])].as_py()
            groups.setdefault(uid, []).append(rows)
        for uid, parts in groups.items():
            yield uid, np.sort(np.concatenate(parts))

    # Splitting

    def split(
        self,
        ratios: Mapping[str, float],
        *,
        by: Literal["patient", "study", "series"] = "patient",
        seed: int = 0,
    ) -> dict[str, DatasetIndex]:
        """Divide the index so that no patient (or study, or series) stands in two parts.

        I/O: none. The receipt goes to the log at INFO level: patients, series and frames of each part.

        Parameters
        ----------
        ratios : mapping of name to float
            Such as ``{"train": 0.8, "val": 0.2}``: shares of the patients, adding up to 1 at most.
        by : {"patient", "study", "series"}
            What must stay together. Series of one study always do, except by series.
        seed : int
            Another seed, another split. Together with the patient key's secret it decides alone: new data
            moves nobody. Without a secret of your own (``index(patient_key=...)``, ``AHI_ML_PATIENT_KEY``, or the
            file that `save` writes) the secret, and so the split, is another one for each index built.

        Returns
        -------
        dict of str to DatasetIndex
            In the order of `ratios`.

        Raises
        ------
        ConfigError
            Ratios or `by` that cannot be.
        SplitLeakError
            Patients cannot be told apart; see `split.check_identifiers`.
        """
        if by not in ("patient", "study", "series"):
            raise ConfigError(f"split by patient, study or series, not by {by!r}")
        used = self._used_series()
        table = self._tables.series.take(pa.array(used))
        patients, studies, uids = (
            table[name].to_pylist() for name in ("patient_key", "study_instance_uid", "series_instance_uid")
        )
        if by == "patient":
            check_identifiers(patients, studies)
            members, groups = patients, connected_groups(patients, studies)
        elif by == "study":
            members, groups = studies, connected_groups(studies)
        else:
            members, groups = uids, connected_groups(uids)
        names = assign_groups(groups, members, ratios, seed=seed)
        part_of_series = np.full(self._tables.series.num_rows, -1)
        order = list(ratios)
        part_of_series[used] = [order.index(name) if name else -1 for name in names]
        parts = part_of_series[self._columns.series(self._numbers)]
        result = {name: self[np.flatnonzero(parts == number)] for number, name in enumerate(order)}
        for name, part in result.items():
            count = len({group for group, where in zip(groups, names, strict=True) if where == name})
            _LOG.info(
                "split %s: %d groups, %d frames (%.1f %%)",
                name,
                count,
                len(part),
                100 * len(part) / max(len(self), 1),
            )
            if not len(part) and len(self):
                _LOG.warning("split: part %r is empty; with few patients another seed divides otherwise", name)
        return result

    # Looking

    @property
    def _numbers(self) -> AnyArray:
        """Rows of the ``frames`` table that are selected."""
        return np.arange(self._tables.frames.num_rows) if self._rows is None else self._rows

    def _at(self, rows: Sequence[int] | AnyArray | None) -> AnyArray:
        if rows is None:
            return self._numbers
        places = np.asarray(rows, np.int64)
        if self._rows is not None:
            return self._rows[places]
        return np.where(places < 0, places + len(self), places)

    def _used_series(self) -> AnyArray:
        return np.unique(self._columns.series(self._numbers))

    @property
    def columns(self) -> list[str]:
        """Names of the columns of `frames`. I/O: none."""
        return self._columns.names

    def column(self, name: str) -> Any:
        """A column of `frames` as an Arrow array. I/O: none.

        Raises
        ------
        ConfigError
            No such column; close matches are named.
        """
        return self._columns.column(name, self._numbers)

    @property
    def frames(self) -> pd.DataFrame:
        """One row a frame: ids, frame number (from 1), then attributes under their DICOM keywords.

        I/O: none. A copy: made anew at each access, Arrow-typed.
        """
        import pandas as pd

        frame: pd.DataFrame = self._columns.frame_table(self._numbers).to_pandas(types_mapper=pd.ArrowDtype)
        return frame

    @property
    def series(self) -> pd.DataFrame:
        """One row a series, indexed by ``series_instance_uid``, with counts of instances and frames.

        I/O: none. A copy: made anew at each access, Arrow-typed.
        """
        import pandas as pd

        frame: pd.DataFrame = self._columns.series_table(self._numbers).to_pandas(types_mapper=pd.ArrowDtype)
        return frame.set_index("series_instance_uid")

    # Reading

    def profile(self, row: int) -> FrameProfile:
        """How the frame of a row is decoded and rescaled. I/O: none."""
        return self._columns.profile(int(self._at([row])[0]))

    def sources(self, rows: Sequence[int] | AnyArray | None = None) -> FrameSources:
        """What the reader needs to read some rows, in their order. I/O: none.

        A frame that lacks an attribute that decoding needs has a `FrameSource.problem`.
        """
        return self._columns.sources(self._at(rows))

    def ids(self, rows: Sequence[int] | AnyArray | None = None) -> dict[str, list[Any]]:
        """Image set, version, series, instance and frame number of some rows: by name, a list each. I/O: none."""
        return self._columns.ids(self._at(rows))

    def details(self, rows: Sequence[int] | AnyArray | None = None) -> list[dict[str, Any]]:
        """Ids of some rows, as `ids` names them: a dict each. I/O: none."""
        ids = self.ids(rows)
        return [dict(zip(ids, values, strict=True)) for values in zip(*ids.values(), strict=True)]

    def positions(self) -> FloatArray:
        """Image Position (Patient) of every row, ``(n, 3)`` LPS mm; NaN where there is none. I/O: none."""
        return self._columns.positions(self._numbers)

    # Keeping

    @property
    def snapshot_id(self) -> str:
        """Hash of which frames of which versions these are; the patient key has no part in it. I/O: none."""
        if self._snapshot_id is None:
            self._snapshot_id = self._columns.snapshot_id(self._numbers)
        return self._snapshot_id

    def save(self, path: PathType) -> Path | str:
        """Write the index to one Arrow file, and on this machine the patient key's secret to ``<path>.key``.

        I/O: two files, mode 0600, written whole or not at all. What is not selected is not written.
        Keep the key file if later data must get the same patient keys; hand it to nobody with the index.
        For an fsspec URL one upload, whole or not at all, and never the secret.

        Parameters
        ----------
        path : path or str
            Or an fsspec URL, such as ``s3://bucket/ct.arrow``; its bucket or folder exists.

        Returns
        -------
        Path or str
            Where the index lies; a URL as it was given.

        Raises
        ------
        ConfigError
            A URL that cannot be used; or a secret that was made for this index and is kept nowhere yet.
        OSError
            The file cannot be written.
        """
        place = local_or_remote(path)
        if isinstance(place, RemoteFile):
            if self._secret is not None:
                self._secret.check_kept(place)
            with place.whole() as file:
                self._compact().write(file, snapshot_id=self.snapshot_id)
            return place.url
        place.parent.mkdir(parents=True, exist_ok=True)
        self._compact().save(place, snapshot_id=self.snapshot_id)
        if self._secret is not None:
            self._secret.keep_beside(place)
        if self._rows is None:
            self._path, self._remote, self._order = place, None, Tables.saved_order(place)
        return place

    def _compact(self) -> Tables:
        return self._tables if self._rows is None else self._tables.take(self._rows)

    @classmethod
    def load(cls, path: PathType) -> DatasetIndex:
        """Open a saved index.

        I/O: maps the file; reads the key beside it if it is there. A remote file is copied to this machine
        first, into ``indexes`` of the cache folder, once for all processes: again only when it has changed.
        No key is looked for there.

        Parameters
        ----------
        path : path or str
            As `save` takes it.

        Raises
        ------
        ConfigError
            No such file, or not an index this release reads.
        OSError
            A remote file cannot be reached.
        """
        place = local_or_remote(path)
        if isinstance(place, RemoteFile):
            return _loaded(place)
        tables, snapshot_id = Tables.load(place)
        loaded = cls(tables, path=place, snapshot_id=snapshot_id)
        loaded._secret = PatientSecret.beside(place)
        return loaded

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a path: other processes map the same file. One from elsewhere finds its way back there."""
        if self._path is None or not (self._path.exists() or self._remote):
            path = spill_path(self._tables)
            self._compact().save(path, snapshot_id=self.snapshot_id)
            self._path = path
            self._order = Tables.saved_order(path)
        return _reopen, (self._path, self.notes, self._order or "", self._remote)


def _loaded(remote: RemoteFile) -> DatasetIndex:
    path = local_copy(remote, index_folder())
    try:
        tables, snapshot_id = Tables.load(path)
    except ConfigError as error:
        path.unlink(missing_ok=True)  # a disk may have damaged the copy: the next attempt makes another
        raise ConfigError(f"{remote}, copied here: {error}") from error
    loaded = DatasetIndex(tables, path=path, snapshot_id=snapshot_id)
    loaded._remote = remote
    return loaded


def _reopen(path: Path, notes: tuple[str, ...], expected: str, remote: RemoteFile | None = None) -> DatasetIndex:
    if remote is not None and not path.exists():
        loaded = _loaded(remote)
    else:
        tables, snapshot_id = Tables.load(path)
        loaded = DatasetIndex(tables, path=path, snapshot_id=snapshot_id)
        loaded._remote = remote
    if loaded._order != expected:
        raise ConfigError(
            f"{remote or path} was overwritten with another index after this one was sent here: save under a new name"
        )
    loaded.notes = notes
    return loaded
