"""The tables of an index at frame grain: columns, look-ups, hashes for given frame rows.

Arrays here are views of the tables' own buffers, so that forked or mapped workers share them; what is
copied is as large as the rows asked for.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from ahi_ml.errors import MetadataError
from ahi_ml.index.expression import unknown_column
from ahi_ml.index.profile import FrameProfile, FrameSource
from ahi_ml.index.schema import SCHEMA_VERSION
from ahi_ml.index.tables import Tables
from ahi_ml.types import AnyArray, FloatArray

__all__ = ["FrameColumns"]

_FIRST = ("image_set_id", "version_id", "series_instance_uid", "sop_instance_uid", "frame_number", "frame_id")
_REFERENCES = frozenset({"instance", "profile", "plane", "series", "lookup_tables"})
_POSITION = "ImagePositionPatient"
_OF_FIRST_FRAME = ("Rows", "Columns", "PixelSpacing", "PhotometricInterpretation")


class FrameColumns:
    """Look-ups over `Tables`; ``rows`` are always row numbers of the ``frames`` table.

    I/O: none.
    """

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self._profiles: dict[int, FrameProfile] = {}

    @cached_property
    def _instance(self) -> AnyArray:
        return _values(self.tables.frames["instance"], np.uint32)

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

    def details(self, rows: AnyArray) -> list[dict[str, Any]]:
        """Ids of frames as plain dicts."""
        names = ("image_set_id", "version_id", "series_instance_uid", "sop_instance_uid", "frame_number")
        columns = [self.column(name, rows).to_pylist() for name in names]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

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
        number = int(self._profile[row])
        found = self._profiles.get(number)
        if found is None:
            found = FrameProfile.from_row(self.tables.profiles.slice(number, 1).to_pylist()[0])
            self._profiles[number] = found
        return found

    def _kind(self, row: int) -> FrameProfile | MetadataError:
        try:
            return self.profile(row)
        except MetadataError as error:
            return error

    def sources(self, rows: AnyArray) -> list[FrameSource]:
        """What the reader needs to read frames."""
        sets = self.column("image_set_id", rows).to_pylist()
        checksums = _take(self.tables.frames, "checksum", rows).to_pylist()
        ids = [row.tobytes().hex() for row in self._ids[rows]]
        return [
            FrameSource(image_set_id, frame_id, checksum, self._kind(int(row)))
            for image_set_id, frame_id, checksum, row in zip(sets, ids, checksums, rows, strict=True)
        ]

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


def _take(table: pa.Table, name: str, rows: AnyArray) -> Any:
    # Not pa.array(rows): that imports pandas, which would take longer than the first batch may.
    numbers = np.ascontiguousarray(rows, np.int64)
    return _chunk(table[name]).take(pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)]))
