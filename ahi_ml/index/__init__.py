"""`DatasetIndex`: which frames a data set is made of, and everything needed to read them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ahi_ml.errors import ConfigError
from ahi_ml.index import expression
from ahi_ml.index.profile import FrameProfile, FrameSource
from ahi_ml.index.schema import SCHEMA_VERSION
from ahi_ml.index.spill import spill_path
from ahi_ml.index.split import assign_groups, check_identifiers, connected_groups
from ahi_ml.index.tables import Gatherer, Tables, private_file
from ahi_ml.types import AnyArray, FloatArray, PathType

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DatasetIndex", "FrameProfile", "FrameSource", "Gatherer", "Tables"]

_LOG = logging.getLogger(__name__)
_FIRST = ("image_set_id", "version_id", "series_instance_uid", "sop_instance_uid", "frame_number", "frame_id")
_REFERENCES = frozenset({"instance", "profile", "plane", "series", "lookup_tables"})


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
        notes: Sequence[str] = (),
    ) -> None:
        self._tables = tables
        self._rows = rows
        self._path = path
        self._snapshot_id = snapshot_id
        self._patient_secret = patient_secret
        self.notes = tuple(notes)
        self._profiles: list[FrameProfile | None] | None = None
        self._lookup: tuple[AnyArray, ...] | None = None

    def __len__(self) -> int:
        """Number of frames."""
        return self._tables.frames.num_rows if self._rows is None else len(self._rows)

    def __repr__(self) -> str:
        series = self._used_series()
        keys = self._tables.series["patient_key"].take(pa.array(series))
        modalities = sorted(set(self._tables.series["Modality"].take(pa.array(series)).to_pylist()) - {None})
        text = (
            f"<DatasetIndex: {len(self):,} frames, {len(series):,} series, {len(keys.unique()):,} patients"
            f"{', ' + '/'.join(modalities) if modalities else ''}; snapshot {self.snapshot_id[:12]}>"
        )
        return "\n".join([text, *(f"  {note}" for note in self.notes)])

    # Selecting

    def _take(self, rows: AnyArray) -> DatasetIndex:
        base = rows if self._rows is None else self._rows[rows]
        selected = DatasetIndex(self._tables, rows=base, patient_secret=self._patient_secret, notes=self.notes)
        selected._profiles, selected._lookup = self._profiles, self._lookup
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
            columns = {name: self._column(name) for name in sorted(expression.columns_of(condition))}
            mask = expression.evaluate(condition, columns)
        for name, wanted in equals.items():
            column = self._column(name)
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
        series = self._series_of_rows()
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
            Another seed, another split. Together with the patient key it decides alone: new data
            moves nobody.

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
        parts = part_of_series[self._series_of_rows()]
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
        return result

    # Looking

    def _lookups(self) -> tuple[AnyArray, ...]:
        """Frame columns as arrays: instance, profile, plane, series of instance, ids, checksums."""
        if self._lookup is None:
            tables = self._tables
            frames = tables.frames
            ids = _chunk(frames["frame_id"])
            buffer = ids.buffers()[1]
            raw = np.frombuffer(buffer, np.uint8, len(ids) * 16, ids.offset * 16) if len(ids) else np.empty(0, np.uint8)
            plane = _chunk(frames["plane"])
            checksum = _chunk(frames["checksum"])
            self._lookup = (
                _chunk(frames["instance"]).to_numpy(),
                _chunk(frames["profile"]).to_numpy(),
                np.where(_valid(plane), plane.fill_null(0).to_numpy().astype(np.int64), -1),
                _chunk(tables.instances["series"]).to_numpy(),
                raw.reshape(-1, 16),
                np.where(_valid(checksum), checksum.fill_null(0).to_numpy().astype(np.int64), -1),
            )
        return self._lookup

    def _base_rows(self, rows: AnyArray | None = None) -> AnyArray:
        if rows is None:
            return np.arange(len(self)) if self._rows is None else self._rows
        return rows if self._rows is None else self._rows[rows]

    def _series_of_rows(self) -> AnyArray:
        instance, _, _, series, _, _ = self._lookups()
        return series[instance[self._base_rows()]].astype(np.int64)

    def _used_series(self) -> AnyArray:
        return np.unique(self._series_of_rows())

    def _column(self, name: str) -> Any:
        """A column at frame grain, as an Arrow array."""
        instance, profile, plane, series, raw, _ = self._lookups()
        rows = self._base_rows()
        tables = self._tables
        if name == "frame_id":
            return pa.array([raw[row].tobytes().hex() for row in rows], pa.string())
        if name == "ImagePositionPatient":
            xyz = np.column_stack([_chunk(tables.planes[axis]).to_numpy() for axis in "xyz"])
            places = plane[rows]
            return pa.array([xyz[place].tolist() if place >= 0 else None for place in places], pa.list_(pa.float64()))
        for table, numbers in (
            (tables.series, lambda: series[instance[rows]]),
            (tables.instances, lambda: instance[rows]),
            (tables.profiles, lambda: profile[rows]),
            (tables.frames, lambda: rows),
        ):
            if name in table.column_names and name not in _REFERENCES:
                return _chunk(table[name]).take(pa.array(numbers()))  # type: ignore[no-untyped-call]
        raise expression.unknown_column(name, self.columns)

    @property
    def columns(self) -> list[str]:
        """Names of the columns of `frames`. I/O: none."""
        tables = self._tables
        names = [
            name
            for table in (tables.series, tables.instances, tables.profiles, tables.frames)
            for name in table.column_names
        ]
        rest = [
            name
            for name in dict.fromkeys([*names, "ImagePositionPatient"])
            if name not in _FIRST and name not in _REFERENCES
        ]
        return [*_FIRST, *rest]

    @property
    def frames(self) -> pd.DataFrame:
        """One row a frame: ids, frame number (from 1), then attributes under their DICOM keywords.

        I/O: none. A copy: made anew at each access, Arrow-typed.
        """
        import pandas as pd

        table = pa.table({name: self._column(name) for name in self.columns})
        frame: pd.DataFrame = table.to_pandas(types_mapper=pd.ArrowDtype)
        return frame

    @property
    def series(self) -> pd.DataFrame:
        """One row a series, indexed by ``series_instance_uid``, with counts of instances and frames.

        I/O: none. A copy: made anew at each access, Arrow-typed.
        """
        import pandas as pd

        instance, profile, _, _, _, _ = self._lookups()
        rows = self._base_rows()
        series = self._series_of_rows()
        used, first, counts = np.unique(series, return_index=True, return_counts=True)
        instances = (
            np.unique(np.column_stack([series, instance[rows]]), axis=0)[:, 0] if len(rows) else np.empty(0, int)
        )
        table = self._tables.series.take(pa.array(used))
        profiles = self._tables.profiles.take(pa.array(profile[rows[first]]))
        for name in ("Rows", "Columns", "PixelSpacing", "PhotometricInterpretation"):
            table = table.append_column(name, profiles[name])
        table = table.append_column(
            "instances",
            pa.array(np.searchsorted(instances, used, "right") - np.searchsorted(instances, used)),
        )
        table = table.append_column("frames", pa.array(counts))
        frame: pd.DataFrame = table.to_pandas(types_mapper=pd.ArrowDtype)
        return frame.set_index("series_instance_uid")

    # Reading

    def profile(self, row: int) -> FrameProfile:
        """How the frame of a row is decoded and rescaled. I/O: none."""
        return self._profile(int(self._lookups()[1][self._base_rows(np.array([row]))[0]]))

    def _profile(self, number: int) -> FrameProfile:
        if self._profiles is None:
            self._profiles = [None] * self._tables.profiles.num_rows
        found = self._profiles[number]
        if found is None:
            found = self._profiles[number] = FrameProfile.from_row(
                self._tables.profiles.slice(number, 1).to_pylist()[0]
            )
        return found

    def sources(self, rows: Sequence[int] | AnyArray | None = None) -> list[FrameSource]:
        """What the reader needs to read some rows, in their order. I/O: none.

        Raises
        ------
        MetadataError
            A frame lacks an attribute that decoding needs.
        """
        instance, profile, _, series, raw, checksums = self._lookups()
        base = self._base_rows(None if rows is None else np.asarray(rows, np.int64))
        names = self._tables.series["image_set_id"]
        sets = {int(number): names[int(number)].as_py() for number in np.unique(series[instance[base]])}
        return [
            FrameSource(
                sets[int(series[instance[row]])],
                raw[row].tobytes().hex(),
                int(checksums[row]) if checksums[row] >= 0 else None,
                self._profile(int(profile[row])),
            )
            for row in base
        ]

    def details(self, rows: Sequence[int] | AnyArray | None = None) -> list[dict[str, Any]]:
        """Ids of some rows: image set, version, series, instance, frame number. I/O: none."""
        instance, _, _, series, _, _ = self._lookups()
        base = self._base_rows(None if rows is None else np.asarray(rows, np.int64))
        instances = instance[base]
        columns = {
            **{
                name: self._tables.series[name].take(pa.array(series[instances])).to_pylist()
                for name in ("image_set_id", "version_id", "series_instance_uid")
            },
            "sop_instance_uid": self._tables.instances["sop_instance_uid"].take(pa.array(instances)).to_pylist(),
            "frame_number": self._tables.frames["frame_number"].take(pa.array(base)).to_pylist(),
        }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def positions(self) -> FloatArray:
        """Image Position (Patient) of every row, ``(n, 3)`` LPS mm; NaN where there is none. I/O: none."""
        plane = self._lookups()[2][self._base_rows()]
        planes = self._tables.planes
        xyz = (
            np.column_stack([_chunk(planes[axis]).to_numpy() for axis in "xyz"])
            if planes.num_rows
            else np.empty((0, 3))
        )
        found = np.full((len(plane), 3), np.nan)
        found[plane >= 0] = xyz[plane[plane >= 0]]
        return found

    def column(self, name: str) -> Any:
        """A column of `frames` as an Arrow array. I/O: none.

        Raises
        ------
        ConfigError
            No such column; close matches are named.
        """
        return self._column(name)

    # Keeping

    @property
    def snapshot_id(self) -> str:
        """Hash of which frames of which versions these are; the patient key has no part in it. I/O: none."""
        if self._snapshot_id is None:
            instance, _, _, series, raw, _ = self._lookups()
            rows = self._base_rows()
            sets = self._tables.series.select(["image_set_id", "version_id"]).to_pylist()
            digests = (
                np.array(
                    [
                        hashlib.blake2b(
                            f"{each['image_set_id']}\0{each['version_id']}".encode(), digest_size=16
                        ).digest()
                        for each in sets
                    ]
                    or [b""],
                    "S16",
                )
                .view(np.uint8)
                .reshape(-1, 16)
                if sets
                else np.empty((0, 16), np.uint8)
            )
            lines = (
                np.concatenate([digests[series[instance[rows]]], raw[rows]], axis=1)
                if len(rows)
                else np.empty((0, 32), np.uint8)
            )
            ordered = np.sort(np.ascontiguousarray(lines).view("S32").reshape(-1)) if len(rows) else b""
            digest = hashlib.blake2b(f"ahi_ml index {SCHEMA_VERSION}\0".encode(), digest_size=16)
            digest.update(np.asarray(ordered).tobytes())
            self._snapshot_id = digest.hexdigest()
        return self._snapshot_id

    def save(self, path: PathType) -> Path:
        """Write the index to one Arrow file, and the patient key's secret to ``<path>.key``.

        I/O: two files, mode 0600, written whole or not at all. What is not selected is not written.
        Keep the key file if later data must get the same patient keys; hand it to nobody with the index.

        Returns
        -------
        Path
            Where the index lies.
        """
        path = Path(path).expanduser().absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._compact().save(path, snapshot_id=self.snapshot_id)
        if self._patient_secret is not None:
            with private_file(path.with_name(f"{path.name}.key")) as file:
                file.write(self._patient_secret)
        if self._rows is None:
            self._path = path
        return path

    def _compact(self) -> Tables:
        return self._tables if self._rows is None else self._tables.take(self._rows)

    @classmethod
    def load(cls, path: PathType) -> DatasetIndex:
        """Open a saved index. I/O: maps the file; reads the key beside it if it is there.

        Raises
        ------
        ConfigError
            No such file, or not an index this release reads.
        """
        path = Path(path).expanduser().absolute()
        tables, snapshot_id = Tables.load(path)
        try:
            secret = path.with_name(f"{path.name}.key").read_bytes()
        except OSError:
            secret = None
        return cls(tables, path=path, snapshot_id=snapshot_id, patient_secret=secret)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a path: other processes map the same file."""
        if self._path is None or not self._path.exists():
            path = spill_path(self._tables)
            self._compact().save(path, snapshot_id=self.snapshot_id)
            self._path = path
        return _reopen, (self._path, self.notes, self.snapshot_id)


def _reopen(path: Path, notes: tuple[str, ...], expected: str) -> DatasetIndex:
    tables, snapshot_id = Tables.load(path)
    if snapshot_id != expected:
        raise ConfigError(
            f"{path} was overwritten with another index after this one was sent here: save under a new name"
        )
    return DatasetIndex(tables, path=path, snapshot_id=snapshot_id, notes=notes)


def _chunk(column: Any) -> Any:
    if isinstance(column, pa.ChunkedArray):
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return column


def _valid(array: Any) -> AnyArray:
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False), bool)
