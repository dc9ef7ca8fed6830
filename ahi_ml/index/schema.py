"""The tables of an index: their columns and types.

``series`` (one row an image set and series) ← ``instances`` ← ``frames`` → ``profiles`` (attribute
combinations, each once) and ``planes`` (positions). References are row numbers, so a frame row has a
fixed width and strings stand once.
"""

from __future__ import annotations

from typing import Final

import pyarrow as pa

from ahi_ml.metadata import INSTANCE_COLUMNS, PROFILE_COLUMNS, SERIES_COLUMNS

__all__ = ["FRAMES", "INSTANCES", "KINDS", "PLANES", "PROFILES", "SCHEMA_VERSION", "SERIES", "TABLES"]

SCHEMA_VERSION: Final = 1

KINDS: Final = {
    "text": pa.string(),
    "texts": pa.list_(pa.string()),
    "int": pa.int64(),
    "float": pa.float64(),
    "floats": pa.list_(pa.float64()),
}


def _fields(columns: dict[str, str]) -> list[pa.Field]:
    return [pa.field(name, KINDS[kind]) for name, kind in columns.items()]


SERIES: Final = pa.schema(
    [
        pa.field("datastore_id", pa.string()),
        pa.field("image_set_id", pa.string()),
        pa.field("version_id", pa.string()),
        pa.field("is_primary", pa.bool_()),
        pa.field("study_instance_uid", pa.string()),
        pa.field("series_instance_uid", pa.string()),
        pa.field("patient_key", pa.string()),
        *_fields(SERIES_COLUMNS),
    ]
)
INSTANCES: Final = pa.schema(
    [
        pa.field("series", pa.uint32()),
        pa.field("sop_instance_uid", pa.string()),
        *_fields(INSTANCE_COLUMNS),
    ]
)
PROFILES: Final = pa.schema([*_fields(PROFILE_COLUMNS), pa.field("lookup_tables", pa.string())])
PLANES: Final = pa.schema([pa.field(axis, pa.float64()) for axis in "xyz"])
FRAMES: Final = pa.schema(
    [
        pa.field("frame_id", pa.binary(16)),
        pa.field("instance", pa.uint32()),
        pa.field("frame_number", pa.uint32()),
        pa.field("profile", pa.uint32()),
        pa.field("plane", pa.uint32()),  # null where the frame has no position
        pa.field("checksum", pa.uint32()),
        pa.field("size", pa.uint32()),
        pa.field("minimum", pa.int32()),
        pa.field("maximum", pa.int32()),
    ]
)

TABLES: Final = {
    "series": SERIES,
    "instances": INSTANCES,
    "profiles": PROFILES,
    "planes": PLANES,
    "frames": FRAMES,
}
