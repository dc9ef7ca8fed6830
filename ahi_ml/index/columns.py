"""The tables of an index at frame grain: columns, look-ups, hashes for given frame rows.

Arrays here are views of the tables' own buffers, so that forked or mapped workers share them; what is
copied is as large as the rows asked for.
"""

from __future__ import annotations

import hashlib
from functools import cached_property, partial
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa

from ahi_ml.errors import MetadataError
from ahi_ml.index.expression import unknown_column
from ahi_ml.index.profile import FrameProfile
from ahi_ml.index.schema import SCHEMA_VERSION
from ahi_ml.index.sources import FrameSource, FrameSources
from ahi_ml.index.tables import Tables
from ahi_ml.types import AnyArray, FloatArray

__all__ = ["FrameColumns"]

_FIRST = ("image_set_id", "version_id", "series_instance_uid", "sop_instance_uid", "frame_number", "frame_id")
_REFERENCES = frozenset({"instance", "profile", "plane", "series", "lookup_tables"})
_OF_SERIES = ("image_set_id", "version_id", "series_instance_uid")  # the first is what frames are fetched by
_MOST_KNOWN = 1024  # series whose texts are remembered: a third of a MiB in each worker
_POSITION = "ImagePositionPatient"
_OF_FIRST_FRAME = ("Rows", "Columns", "PixelSpacing", "PhotometricInterpretation")


class FrameColumns:
    """Look-ups over `Tables`; ``rows`` are always row numbers of the ``frames`` table.

    I/O: none.
    """

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self._kinds: dict[int, FrameProfile | MetadataError] = {}
        self._known_series: dict[int, tuple[str, ...]] = {}

    @cached_property
    def _instance(self) -> AnyArray:
        return _values(self.tables.frames["instance"], np.uint32)

    @cached_property
    def _frame_number(self) -> AnyArray:
        return _values(self.tables.frames["frame_number"], np.uint32)

    @cached_property
    def _texts(self) -> dict[str, _Texts]:
        columns = {name: self.tables.series[name] for name in _OF_SERIES}
        columns["sop_instance_uid"] = self.tables.instances["sop_instance_uid"]
        return {name: _Texts(column) for name, column in columns.items()}

    @cached_property
    def _profile(self) -> AnyArray:
        return _values(self.tables.frames["profile"], np.uint32)

    @cached_property
    def _series_of_instance(self) -> AnyArray:
        return _values(self.tables.instances["series"], np.uint32)

    @cached_property
    def _ids(self) -> AnyArray:
        ids = _chunk(self.tables.frames["frame_id"])
        if not len(ids):
            return np.empty((0, 16), np.uint8)
        return np.frombuffer(ids.buffers()[1], np.uint8, len(ids) * 16, ids.offset * 16).reshape(-1, 16)

    def series(self, rows: AnyArray) -> AnyArray:
        """Row of the ``series`` table for each frame."""
        return self._series_of_instance[self._instance[rows]].astype(np.int64)

    @property
    def names(self) -> list[str]:
        """Names of the columns at frame grain, ids first."""
        tables = (self.tables.series, self.tables.instances, self.tables.profiles, self.tables.frames)
        names = dict.fromkeys([*(name for table in tables for name in table.column_names), _POSITION])
        return [*_FIRST, *(name for name in names if name not in _FIRST and name not in _REFERENCES)]

    def column(self, name: str, rows: AnyArray) -> Any:
        """A column as an Arrow array.

        Raises
        ------
        ConfigError
            No such column; close matches are named.
        """
        tables = self.tables
        if name == "frame_id":
            return pa.array([self._ids[row].tobytes().hex() for row in rows], pa.string())
        if name == _POSITION:
            places = [None if np.isnan(place[0]) else place.tolist() for place in self.positions(rows)]
            return pa.array(places, pa.list_(pa.float64()))
        if name not in _REFERENCES:
            if name in tables.series.column_names:
                return _take(tables.series, name, self.series(rows))
            if name in tables.instances.column_names:
                return _take(tables.instances, name, self._instance[rows])
            if name in tables.profiles.column_names:
                return _take(tables.profiles, name, self._profile[rows])
            if name in tables.frames.column_names:
                return _take(tables.frames, name, rows)
        raise unknown_column(name, self.names)

    def frame_table(self, rows: AnyArray) -> pa.Table:
        """All columns."""
        return pa.table({name: self.column(name, rows) for name in self.names})

    def series_table(self, rows: AnyArray) -> pa.Table:
        """One row a series: its columns, size attributes of its first frame, counts of instances and frames."""
        series = self.series(rows)
        used, first, counts = np.unique(series, return_index=True, return_counts=True)
        table = self.tables.series.take(pa.array(used))
        for name in _OF_FIRST_FRAME:
            table = table.append_column(name, _take(self.tables.profiles, name, self._profile[rows[first]]))
        owners = self._series_of_instance[np.unique(self._instance[rows])]
        instances = np.bincount(owners, minlength=self.tables.series.num_rows)[used]
        return table.append_column("instances", pa.array(instances)).append_column("frames", pa.array(counts))

    def ids(self, rows: AnyArray) -> dict[str, list[Any]]:
        """Ids of frames by name. Every item of a data set carries them, so they must cost next to nothing."""
        instances = self._instance[rows]
        texts = self._series_texts(self._series_of_instance[instances].tolist())
        of_series = [*map(list, zip(*texts, strict=True))] or [[] for _ in _OF_SERIES]
        return {
            **dict(zip(_OF_SERIES, of_series, strict=True)),
            "sop_instance_uid": self._texts["sop_instance_uid"][instances],
            "frame_number": self._frame_number[rows].tolist(),
        }

    def _series_texts(self, series: list[int]) -> list[tuple[str, ...]]:
        """The texts of `_OF_SERIES` for each of some series; those of the last ones are remembered."""
        known = self._known_series
        found = {number: known.get(number) for number in set(series)}
        absent = [number for number, texts in found.items() if texts is None]
        if absent:
            if len(known) + len(absent) > _MOST_KNOWN:
                known.clear()
            numbers = np.array(absent, np.int64)
            texts = zip(*(self._texts[name][numbers] for name in _OF_SERIES), strict=True)
            made: dict[int, tuple[str, ...]] = dict(zip(absent, texts, strict=True))
            found.update(made)
            known.update(made)
        return list(map(found.__getitem__, series))  # type: ignore[arg-type]

    def positions(self, rows: AnyArray) -> FloatArray:
        """Image Position (Patient), ``(n, 3)`` LPS mm; NaN where there is none."""
        places = _take(self.tables.frames, "plane", rows)
        present = np.asarray(places.is_valid().to_numpy(zero_copy_only=False), bool)
        numbers = places.fill_null(0).to_numpy()[present]
        found = np.full((len(rows), 3), np.nan)
        for axis, name in enumerate("xyz"):
            found[present, axis] = _values(self.tables.planes[name], np.float64)[numbers]
        return found

    def profile(self, row: int) -> FrameProfile:
        """How the frame of a row is decoded and rescaled."""
        kind = self._kind(int(self._profile[row]))
        if isinstance(kind, MetadataError):
            raise kind
        return kind

    def _kind(self, number: int) -> FrameProfile | MetadataError:
        found = self._kinds.get(number)
        if found is None:
            try:
                found = FrameProfile.from_row(self.tables.profiles.slice(number, 1).to_pylist()[0])
            except MetadataError as error:
                found = error
            self._kinds[number] = found
        return found

    def sources(self, rows: AnyArray) -> FrameSources:
        """What the reader needs to read frames."""
        frame_ids = self._ids[rows].tobytes().hex(" ", 16).split()
        profiles = self._profile[rows].tolist()
        by_number = {number: self._kind(number) for number in set(profiles)}
        kinds = list(map(by_number.__getitem__, profiles))

        def make() -> list[FrameSource]:
            frames = self.tables.frames
            texts = self._series_texts(self._series_of_instance[self._instance[rows]].tolist())
            sets = map(itemgetter(0), texts)
            integers = (_integers(frames[name], rows) for name in ("checksum", "minimum", "maximum"))
            checksums, lowest, highest = integers
            columns = zip(sets, frame_ids, checksums, kinds, lowest, highest, strict=True)
            return list(map(partial(tuple.__new__, FrameSource), columns))  # its own constructor is a Python function

        return FrameSources(frame_ids, kinds, by_number.values(), make)

    def snapshot_id(self, rows: AnyArray) -> str:
        """Hash of which frames of which versions these are, in any order."""
        sets = self.tables.series.select(["image_set_id", "version_id"]).to_pylist()
        pins = b"".join(_digest(f"{each['image_set_id']}\0{each['version_id']}".encode()) for each in sets)
        of_series = np.frombuffer(pins, np.uint8).reshape(-1, 16)
        lines = np.concatenate([of_series[self.series(rows)], self._ids[rows]], axis=1)
        ordered = np.sort(np.ascontiguousarray(lines).view("V32").reshape(-1).view("S32"))
        return _digest(f"ahi_ml index {SCHEMA_VERSION}\0".encode() + ordered.tobytes()).hex()


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _chunk(column: Any) -> Any:
    if isinstance(column, pa.ChunkedArray):
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return column


def _values(column: Any, dtype: Any) -> AnyArray:
    """A column's own buffer as an array; entries that are null hold anything."""
    chunk = _chunk(column)
    size = np.dtype(dtype).itemsize
    return (
        np.frombuffer(chunk.buffers()[1], dtype, len(chunk), chunk.offset * size) if len(chunk) else np.empty(0, dtype)
    )


class _Texts:
    """Strings of a column without nulls by row: Arrow's own `take` is made for more rows than a batch has."""

    def __init__(self, column: Any) -> None:
        chunk = _chunk(column)
        _, offsets, data = chunk.buffers()
        self._places = np.frombuffer(offsets, np.int32, len(chunk) + 1, chunk.offset * 4) if len(chunk) else None
        self._data = memoryview(data if data is not None else b"")

    def __getitem__(self, rows: AnyArray) -> list[str]:
        if self._places is None:
            return []
        starts, ends, data = self._places[rows].tolist(), self._places[1:][rows].tolist(), self._data
        return [str(data[start:end], "utf-8") for start, end in zip(starts, ends, strict=True)]


def _integers(column: Any, rows: AnyArray) -> list[int | None]:
    """The integers of some rows of a column, None for null."""
    chunk = _chunk(column)
    numbers: list[int | None] = _values(chunk, chunk.type.to_pandas_dtype())[rows].tolist()
    if chunk.null_count:
        valid = np.frombuffer(chunk.buffers()[0], np.uint8)
        at = rows + chunk.offset
        for place in np.flatnonzero(~(valid[at >> 3] >> (at & 7) & 1).astype(bool)):
            numbers[place] = None
    return numbers


def _take(table: pa.Table, name: str, rows: AnyArray) -> Any:
    # Not pa.array(rows): that imports pandas, which would take longer than the first batch may.
    numbers = np.ascontiguousarray(rows, np.int64)
    return _chunk(table[name]).take(pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)]))
