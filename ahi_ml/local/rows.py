"""The rows of the embedded store's catalog: the SQL that makes the tables, and a type for each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "MIGRATIONS",
    "SCHEMA",
    "SCHEMA_VERSION",
    "Datastore",
    "FrameRow",
    "ImageSet",
    "Job",
    "Version",
    "image_set_from",
    "version_from",
]

SCHEMA_VERSION = 2
# Each is an order that a search can ask for, behind what it can ask to be equal: a page is read and not
# sorted. An image set without a study date comes before those that have one.
INDEXES = "".join(
    f"CREATE INDEX image_sets_{name} ON image_sets(datastore_id, {columns}, id) WHERE deleted IS NULL;\n"
    for name, columns in {
        "updated": "updated",
        "created": "created",
        "moment": "coalesce(study_moment, '')",
        "patient": "patient_id, updated",
        "accession": "accession_number, updated",
        "study_id": "study_id, updated",
        "study": "study_uid, updated",
        "series": "series_uid, updated",
    }.items()
)
INDEXES += (
    "CREATE INDEX image_sets_other ON image_sets(datastore_id, updated, id) WHERE deleted IS NULL AND NOT is_primary;\n"
)
SCHEMA = (
    """
CREATE TABLE datastores(
    id TEXT PRIMARY KEY, name TEXT NOT NULL, status TEXT NOT NULL, storage_format TEXT NOT NULL,
    created REAL NOT NULL, updated REAL NOT NULL, client_token TEXT UNIQUE, kms_key_arn TEXT, authorizer_arn TEXT);
CREATE TABLE jobs(
    id TEXT PRIMARY KEY, datastore_id TEXT NOT NULL, name TEXT, status TEXT NOT NULL, role_arn TEXT NOT NULL,
    input_uri TEXT NOT NULL, output_uri TEXT NOT NULL, submitted REAL NOT NULL, ended REAL, message TEXT,
    client_token TEXT, configuration TEXT, UNIQUE(datastore_id, client_token));
CREATE INDEX jobs_by_store ON jobs(datastore_id, submitted, id);
CREATE TABLE image_sets(
    id TEXT PRIMARY KEY, datastore_id TEXT NOT NULL, is_primary INTEGER NOT NULL, version INTEGER NOT NULL,
    created REAL NOT NULL, updated REAL NOT NULL, accessed REAL NOT NULL, deleted REAL,
    patient_id TEXT, accession_number TEXT, study_id TEXT, study_uid TEXT, series_uid TEXT, study_moment TEXT,
    study_key TEXT NOT NULL, series_key TEXT NOT NULL, tags TEXT NOT NULL);
CREATE TABLE versions(
    image_set_id TEXT NOT NULL, version INTEGER NOT NULL, state TEXT NOT NULL, workflow TEXT NOT NULL,
    updated REAL NOT NULL, message TEXT, forced INTEGER, is_primary INTEGER NOT NULL,
    PRIMARY KEY(image_set_id, version)) WITHOUT ROWID;
CREATE TABLE documents(
    image_set_id TEXT NOT NULL, version INTEGER NOT NULL, body BLOB NOT NULL, UNIQUE(image_set_id, version));
CREATE TABLE frames(
    image_set_id TEXT NOT NULL, frame_id TEXT NOT NULL, blob TEXT NOT NULL, content_type TEXT NOT NULL,
    PRIMARY KEY(image_set_id, frame_id)) WITHOUT ROWID;
CREATE TABLE tags(arn TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY(arn, key)) WITHOUT ROWID;
"""
    + INDEXES
)
MIGRATIONS = {
    1: "".join(
        f"DROP INDEX image_sets_{name};\n"
        for name in ("updated", "created", "moment", "patient", "accession", "study_id", "study", "series")
    )
    + INDEXES
}
"""What brings a catalog of an earlier version to the next one."""


@dataclass(frozen=True, slots=True)
class Datastore:
    """A data store of the folder."""

    id: str
    name: str
    status: str
    storage_format: str
    created: float
    updated: float
    client_token: str | None = None
    kms_key_arn: str | None = None
    authorizer_arn: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """An import job."""

    id: str
    datastore_id: str
    name: str | None
    status: str
    role_arn: str
    input_uri: str
    output_uri: str
    submitted: float
    ended: float | None = None
    message: str | None = None
    client_token: str | None = None
    configuration: str | None = None


@dataclass(frozen=True, slots=True)
class ImageSet:
    """The latest state of an image set, with what a search can ask for."""

    id: str
    datastore_id: str
    is_primary: bool
    version: int
    created: float
    updated: float
    accessed: float
    deleted: float | None
    patient_id: str | None
    accession_number: str | None
    study_id: str | None
    study_uid: str | None
    series_uid: str | None
    study_moment: str | None
    study_key: str
    series_key: str
    tags: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Version:
    """One version of an image set."""

    image_set_id: str
    version: int
    state: str
    workflow: str
    updated: float
    message: str | None
    forced: bool | None
    is_primary: bool

    @property
    def read_by_copy(self) -> bool:
        """Whether it is LOCKED because a copy reads it: it keeps its own status, to go back to after a crash."""
        return self.state == "LOCKED" and self.workflow.endswith("ED")

    @property
    def shown_workflow(self) -> str:
        """The workflow status that answers show."""
        return "COPYING_WITH_READ_ONLY_ACCESS" if self.read_by_copy else self.workflow


@dataclass(frozen=True, slots=True)
class FrameRow:
    """Where the bytes of a frame are."""

    frame_id: str
    blob: str
    content_type: str


def image_set_from(row: Sequence[Any]) -> ImageSet:
    """An image set from its row, columns in the order of the table. I/O: none."""
    fields = dict(zip(ImageSet.__dataclass_fields__, row, strict=True))
    return ImageSet(**{**fields, "is_primary": bool(row[2]), "tags": json.loads(row[16])})


def version_from(row: Sequence[Any]) -> Version:
    """A version from its row, columns in the order of the table. I/O: none."""
    forced = None if row[6] is None else bool(row[6])
    return Version(row[0], row[1], row[2], row[3], row[4], row[5], forced, bool(row[7]))
