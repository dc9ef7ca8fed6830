"""The five tables of an index together: gather records into them, save, map, compact."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from ahi_ml.errors import ConfigError, MetadataError
from ahi_ml.index.schema import FRAMES, INSTANCES, KINDS, PLANES, PROFILES, SCHEMA_VERSION, SERIES, TABLES
from ahi_ml.metadata import SeriesRecord
from ahi_ml.types import AnyArray

__all__ = ["Gatherer", "Tables", "private_file"]

_VERSION_KEY = b"ahi_ml.index"
_SNAPSHOT_KEY = b"ahi_ml.snapshot"
_ORDER_KEY = b"ahi_ml.order"


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Tables:
    """The tables of an index, in memory or mapped from a file.

    Parameters
    ----------
    series, instances, profiles, planes, frames : pyarrow.Table
        As `schema` says; ``series`` may have further columns.
    """

    series: pa.Table
    instances: pa.Table
    profiles: pa.Table
    planes: pa.Table
    frames: pa.Table

    @classmethod
    def empty(cls) -> Tables:
        """Tables without rows. I/O: none."""
        return cls(**{name: schema.empty_table() for name, schema in TABLES.items()})

    def order(self) -> str:
        """Hash of the frame ids in row order. I/O: reads the whole id column."""
        digest = hashlib.blake2b(digest_size=16)
        for chunk in self.frames["frame_id"].chunks:
            if len(chunk):
                digest.update(memoryview(chunk.buffers()[1])[chunk.offset * 16 : (chunk.offset + len(chunk)) * 16])
        return digest.hexdigest()

    def take(self, rows: AnyArray) -> Tables:
        """The tables of some frames alone, in the order given. I/O: none."""
        frames = self.frames.take(pa.array(rows))
        frames, instances = _follow(frames, "instance", self.instances)
        frames, profiles = _follow(frames, "profile", self.profiles)
        frames, planes = _follow(frames, "plane", self.planes)
        instances, series = _follow(instances, "series", self.series)
        return Tables(series, instances, profiles, planes, frames)

    def save(self, path: Path, *, snapshot_id: str) -> None:
        """Write one file; see `write`. I/O: writes beside `path` and moves it there; mode 0600."""
        with private_file(path) as file:
            self.write(file, snapshot_id=snapshot_id)

    def write(self, file: IO[bytes], *, snapshot_id: str) -> None:
        """Write the tables as Arrow IPC: one row, one column a table, each a list of that table's rows.

        I/O: writes to `file`.
        """
        columns, names = [], []
        for name in TABLES:
            table = getattr(self, name).combine_chunks()
            rows = pa.StructArray.from_arrays(
                [_one_chunk(table[column]) for column in table.column_names], fields=list(table.schema)
            )
            columns.append(pa.LargeListArray.from_arrays(pa.array([0, len(rows)], pa.int64()), rows))
            names.append(name)
        metadata = {
            _VERSION_KEY: str(SCHEMA_VERSION).encode(),
            _SNAPSHOT_KEY: snapshot_id.encode(),
            _ORDER_KEY: self.order().encode(),
        }
        batch = pa.RecordBatch.from_arrays(columns, names=names)
        schema = batch.schema.with_metadata(metadata)
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(batch.replace_schema_metadata(metadata))

    @staticmethod
    def saved_order(path: Path) -> str:
        """`order` of the tables in a file. I/O: reads its header."""
        with pa.memory_map(os.fspath(path)) as source:
            metadata = pa.ipc.open_file(source).schema.metadata or {}
            return str(metadata.get(_ORDER_KEY, b"").decode())

    @classmethod
    def load(cls, path: Path) -> tuple[Tables, str]:
        """Map a file that `save` wrote; return the tables and the snapshot id. I/O: maps the file.

        Raises
        ------
        ConfigError
            No such file, or not an index of this format version.
        """
        try:
            reader = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
            metadata = reader.schema.metadata or {}
            version, snapshot_id = (metadata.get(key, b"").decode() for key in (_VERSION_KEY, _SNAPSHOT_KEY))
        except FileNotFoundError as error:
            raise ConfigError(f"no index at {path}") from error
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ConfigError(f"{path} is not an index: {error}") from error
        if version != str(SCHEMA_VERSION):
            raise ConfigError(
                f"{path} is {'no index' if not version else f'an index of format version {version}'}; this release "
                f"reads version {SCHEMA_VERSION}: build it again"
            )
        tables = {}
        try:
            batch = reader.get_batch(0)
            batch.validate()
            for name, schema in TABLES.items():
                rows = batch.column(name).values
                tables[name] = pa.Table.from_arrays(
                    [rows.field(number) for number in range(rows.type.num_fields)],
                    schema=pa.schema(list(rows.type)),
                )
                if tables[name].schema.names[: len(schema)] != schema.names:
                    raise KeyError(name)
        except (OSError, ValueError, LookupError, AttributeError, pa.ArrowException) as error:
            raise ConfigError(f"{path} is a damaged index: build it again ({error})") from error
        return cls(**tables), snapshot_id


@contextmanager
def private_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, mode 0600, that takes the place of `path` once it is whole. I/O: one file."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _follow(referring: pa.Table, column: str, referred: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Drop the rows of `referred` that nobody refers to, and renumber the references."""
    references = _one_chunk(referring[column])
    valid = references.is_valid().to_numpy(zero_copy_only=False)
    numbers = references.fill_null(0).to_numpy()
    used = np.unique(numbers[valid])
    renumbered = pa.array(np.searchsorted(used, numbers).astype(np.uint32), mask=~valid)
    position = referring.schema.get_field_index(column)
    return referring.set_column(position, referring.schema.field(position), renumbered), referred.take(pa.array(used))


class Gatherer:
    """Collects series records into tables.

    Parameters
    ----------
    extra : dict, optional
        Further series columns and their kinds.
    """

    def __init__(self, extra: dict[str, str] | None = None) -> None:
        self._series_schema = pa.schema(
            [*SERIES, *(pa.field(name, KINDS[kind]) for name, kind in (extra or {}).items())]
        )
        self._series: list[dict[str, Any]] = []
        self._instances: list[dict[str, Any]] = []
        self._planes: list[tuple[float, float, float]] = []
        self._profiles: dict[tuple[Any, ...], int] = {}
        self._frames: dict[str, list[Any]] = {name: [] for name in FRAMES.names}

    def add(self, record: SeriesRecord, *, version_id: str, is_primary: bool, patient_key: str | None) -> None:
        """Add a series with its instances and frames. I/O: none."""
        series = len(self._series)
        self._series.append(
            {
                "datastore_id": record.datastore_id,
                "image_set_id": record.image_set_id,
                "version_id": version_id,
                "is_primary": is_primary,
                "study_instance_uid": record.study_instance_uid,
                "series_instance_uid": record.series_instance_uid,
                "patient_key": patient_key,
                **record.attributes,
            }
        )
        frames = self._frames
        for instance in record.instances:
            number = len(self._instances)
            self._instances.append(
                {"series": series, "sop_instance_uid": instance.sop_instance_uid, **instance.attributes}
            )
            for frame in instance.frames:
                frames["frame_id"].append(_packed(frame.frame_id, record.image_set_id))
                frames["instance"].append(number)
                frames["frame_number"].append(frame.number)
                frames["profile"].append(self._profiles.setdefault(frame.profile, len(self._profiles)))
                frames["plane"].append(self._plane(frame.position))
                frames["checksum"].append(frame.checksum)
                frames["size"].append(min(frame.size, 2**32 - 1))
                frames["minimum"].append(_int32(frame.minimum))
                frames["maximum"].append(_int32(frame.maximum))

    def _plane(self, position: tuple[float, float, float] | None) -> int | None:
        if position is None:
            return None
        self._planes.append(position)
        return len(self._planes) - 1

    def tables(self) -> Tables:
        """What was added. I/O: none."""
        profiles: Iterable[tuple[Any, ...]] = self._profiles
        columns = list(zip(*profiles, strict=True)) or [()] * len(PROFILES)
        return Tables(
            series=pa.Table.from_pylist(self._series, schema=self._series_schema),
            instances=pa.Table.from_pylist(self._instances, schema=INSTANCES),
            profiles=pa.Table.from_arrays(
                [pa.array(column, field.type) for column, field in zip(columns, PROFILES, strict=True)],
                schema=PROFILES,
            ),
            planes=pa.Table.from_arrays(
                [
                    pa.array(column, pa.float64())
                    for column in (zip(*self._planes, strict=True) if self._planes else [[]] * 3)
                ],
                schema=PLANES,
            ),
            frames=pa.table(self._frames, schema=FRAMES),
        )


def _int32(value: int | None) -> int | None:
    return value if value is not None and -(2**31) <= value < 2**31 else None


def _packed(frame_id: str, image_set_id: str) -> bytes:
    try:
        packed = bytes.fromhex(frame_id)
    except ValueError:
        packed = b""
    if len(packed) != 16 or packed.hex() != frame_id:
        raise MetadataError(
            f"the frame id {frame_id!r} in image set {image_set_id} is not 32 hexadecimal digits",
            image_set_id=image_set_id,
            frame_id=frame_id,
        )
    return packed
