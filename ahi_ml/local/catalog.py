"""The SQLite catalog of the embedded store: data stores, jobs, image sets, versions, frames, tags.

It holds SQL and nothing of the service's rules. One process writes; its threads share one
connection, because with ``locking_mode=EXCLUSIVE`` (which lets WAL work on network homes) a second
connection would be locked out.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from ahi_ml.errors import LocalStoreError
from ahi_ml.local.rows import (
    MIGRATIONS,
    SCHEMA,
    SCHEMA_VERSION,
    Datastore,
    FrameRow,
    ImageSet,
    Job,
    Version,
    image_set_from,
    version_from,
)

__all__ = ["Catalog", "Datastore", "FrameRow", "ImageSet", "Job", "Version"]


_FEW = 1_000


def _term(column: str) -> str:
    """A column as it is indexed."""
    return "coalesce(study_moment, '')" if column == "study_moment" else column


class Catalog:
    """The catalog in one file.

    I/O: opens, and creates when absent, the SQLite file; every method is one statement or runs
    inside the caller's `transaction`. Safe to use from many threads.

    Parameters
    ----------
    path : Path
        The database file. Its folder must exist.

    Raises
    ------
    LocalStoreError
        The file is no catalog, or one of a newer version.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            for pragma in (
                "locking_mode=EXCLUSIVE",
                "journal_mode=WAL",
                "synchronous=FULL",
                "cache_size=-65536",
            ):
                self._db.execute(f"PRAGMA {pragma}")
            (found,) = self._db.execute("PRAGMA user_version").fetchone()
            if found == 0:
                self._db.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
            while found in MIGRATIONS:
                self._db.executescript(f"BEGIN; {MIGRATIONS[found]} PRAGMA user_version={found + 1}; COMMIT;")
                found += 1
            if found not in (0, SCHEMA_VERSION):
                raise LocalStoreError(
                    f"the catalog {path} has schema version {found}, this release reads {SCHEMA_VERSION}: "
                    "open it with the release that made it, or import into a new folder"
                )
        except sqlite3.Error as error:
            raise LocalStoreError(f"cannot open the catalog {path}: {error}") from error

    def busy(self) -> bool:
        """Whether another thread works on the catalog right now: whoever must not wait asks first."""
        free = self._lock.acquire(blocking=False)
        if free:
            self._lock.release()
        return not free

    def close(self) -> None:
        """Close the file. I/O: checkpoints the journal."""
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing for the statements inside; nests."""
        with self._lock:
            if self._depth == 0:
                self._db.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield
                if self._depth == 1:
                    self._db.execute("COMMIT")
            except BaseException:
                # SQLite itself rolls back when the disk is full, and does not when a commit fails otherwise.
                if self._depth == 1 and self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Nothing changes between the reads inside: all of them see one state. I/O: none of its own."""
        with self._lock:
            yield

    def _all(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def _one(self, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        with self._lock:
            return self._db.execute(sql, values).fetchone()  # type: ignore[no-any-return]

    def _do(self, sql: str, values: Sequence[Any] = ()) -> int:
        with self._lock:
            return self._db.execute(sql, values).rowcount

    # Data stores

    def save_datastore(self, store: Datastore) -> None:
        """Insert or replace a data store."""
        self._do(
            "INSERT OR REPLACE INTO datastores VALUES(?,?,?,?,?,?,?,?,?)",
            astuple(store),
        )

    def datastore(self, datastore_id: str) -> Datastore | None:
        """The data store of this id."""
        row = self._one("SELECT * FROM datastores WHERE id=?", (datastore_id,))
        return Datastore(*row) if row else None

    def datastore_by_token(self, client_token: str) -> Datastore | None:
        """The data store that a request with this idempotency token made."""
        row = self._one("SELECT * FROM datastores WHERE client_token=?", (client_token,))
        return Datastore(*row) if row else None

    def datastores(
        self, status: str | None = None, after: Sequence[Any] | None = None, limit: int = -1
    ) -> list[Datastore]:
        """Data stores, oldest first, after the ``(created, id)`` given."""
        sql = "SELECT * FROM datastores WHERE (?1 IS NULL OR status=?1)"
        values: list[Any] = [status]
        if after is not None:
            sql += " AND (created, id) > (?2, ?3)"
            values += after
        return [Datastore(*row) for row in self._all(f"{sql} ORDER BY created, id LIMIT {int(limit)}", values)]

    # Jobs

    def save_job(self, job: Job) -> None:
        """Insert or replace a job."""
        self._do(
            "INSERT OR REPLACE INTO jobs VALUES(?,?,?,?,?,?,?,?,?,?,?,?)",
            astuple(job),
        )

    def update_job(self, job: Job, **changes: Any) -> Job:
        """Save `job` with some fields changed, and return it."""
        job = replace(job, **changes)
        self.save_job(job)
        return job

    def job(self, datastore_id: str, job_id: str) -> Job | None:
        """The job of this id."""
        row = self._one("SELECT * FROM jobs WHERE datastore_id=? AND id=?", (datastore_id, job_id))
        return Job(*row) if row else None

    def job_by_token(self, datastore_id: str, client_token: str) -> Job | None:
        """The job that a request with this idempotency token started."""
        row = self._one("SELECT * FROM jobs WHERE datastore_id=? AND client_token=?", (datastore_id, client_token))
        return Job(*row) if row else None

    def jobs(
        self,
        datastore_id: str | None = None,
        status: str | None = None,
        after: Sequence[Any] | None = None,
        limit: int = -1,
    ) -> list[Job]:
        """Jobs, newest first, after the ``(submitted, id)`` given."""
        sql = "SELECT * FROM jobs WHERE (?1 IS NULL OR datastore_id=?1) AND (?2 IS NULL OR status=?2)"
        values: list[Any] = [datastore_id, status]
        if after is not None:
            sql += " AND (submitted, id) < (?3, ?4)"
            values += after
        sql += f" ORDER BY submitted DESC, id DESC LIMIT {int(limit)}"
        return [Job(*row) for row in self._all(sql, values)]

    # Image sets

    def save_image_set(self, found: ImageSet) -> None:
        """Insert or replace an image set's latest state."""
        self._do(
            "INSERT OR REPLACE INTO image_sets VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (*astuple(found)[:-1], json.dumps(found.tags)),
        )

    def image_set(self, datastore_id: str, image_set_id: str) -> ImageSet | None:
        """The image set of this id, deleted ones included."""
        row = self._one("SELECT * FROM image_sets WHERE id=? AND datastore_id=?", (image_set_id, datastore_id))
        return image_set_from(row) if row else None

    def image_set_of(self, image_set_id: str) -> ImageSet:
        """The image set of an id that is known to exist."""
        row = self._one("SELECT * FROM image_sets WHERE id=?", (image_set_id,))
        if row is None:
            raise LocalStoreError(f"the catalog has no image set {image_set_id}")
        return image_set_from(row)

    def count_image_sets(self, datastore_id: str) -> int:
        """How many image sets are not deleted."""
        row = self._one("SELECT count(*) FROM image_sets WHERE datastore_id=? AND deleted IS NULL", (datastore_id,))
        return int(row[0]) if row else 0

    def primaries(self, datastore_id: str, *, study_uid: str) -> list[ImageSet]:
        """The primary image sets of a study, oldest first."""
        rows = self._all(
            "SELECT * FROM image_sets WHERE datastore_id=? AND study_uid=? AND is_primary AND deleted IS NULL "
            "ORDER BY created, id",
            (datastore_id, study_uid),
        )
        return [image_set_from(row) for row in rows]

    def series_image_sets(self, datastore_id: str, series_uid: str) -> list[ImageSet]:
        """The image sets of a series, primary or not, oldest first."""
        rows = self._all(
            "SELECT * FROM image_sets WHERE datastore_id=? AND series_uid=? AND deleted IS NULL ORDER BY created, id",
            (datastore_id, series_uid),
        )
        return [image_set_from(row) for row in rows]

    def search(
        self,
        datastore_id: str,
        *,
        equal: Sequence[tuple[str, Any]] = (),
        between: Sequence[tuple[str, Any, Any]] = (),
        order: str,
        descending: bool,
        after: Sequence[Any] | None,
        limit: int,
    ) -> list[ImageSet]:
        """Image sets that are not deleted and meet every condition.

        Parameters
        ----------
        equal : sequence of (column, value)
            Columns of ``image_sets`` and what they hold.
        between : sequence of (column, value, value)
            Columns and their first and last value.
        order : {"updated", "created", "study_moment"}
            Sort column; the id breaks ties.
        after : (value, id), optional
            Last row of the page before.
        """
        where, values = ["datastore_id=?", "deleted IS NULL"], [datastore_id]
        for column, value in equal:
            if column == "is_primary":  # spelt out: there is an index of those that are not
                where.append("is_primary" if value else "NOT is_primary")
            else:
                where.append(f"{column}=?")
                values.append(value)
        for column, low, high in between:
            term = _term(column)
            if column != order and self._many(datastore_id, term, low, high):
                # Reading all of a wide range to sort it takes longer than reading in order and leaving
                # out the few beside it; the plus sign keeps the range's own index out of it.
                term = f"+{term}"
            where.append(f"{term} BETWEEN ? AND ?")
            values += [low, high]
        if after is not None:
            where.append(f"({_term(order)}, id) {'<' if descending else '>'} (?, ?)")
            values += after
        way = "DESC" if descending else "ASC"
        sql = f"SELECT * FROM image_sets WHERE {' AND '.join(where)} ORDER BY {_term(order)} {way}, id {way} LIMIT ?"
        return [image_set_from(row) for row in self._all(sql, [*values, limit])]

    def _many(self, datastore_id: str, term: str, low: Any, high: Any) -> bool:
        """Whether a range holds more image sets than are quickly sorted."""
        sql = f"SELECT 1 FROM image_sets WHERE datastore_id=? AND deleted IS NULL AND {term} BETWEEN ? AND ?"
        row = self._one(f"SELECT count(*) FROM ({sql} LIMIT {_FEW})", (datastore_id, low, high))
        return row is not None and int(row[0]) == _FEW

    def touch(self, image_set_id: str, moment: float) -> None:
        """Note an access."""
        self._do("UPDATE image_sets SET accessed=? WHERE id=?", (moment, image_set_id))

    # Versions and their documents

    def save_version(self, version: Version) -> None:
        """Insert or replace a version."""
        self._do(
            "INSERT OR REPLACE INTO versions VALUES(?,?,?,?,?,?,?,?)",
            astuple(version),
        )

    def version(self, image_set_id: str, version: int) -> Version | None:
        """One version of an image set."""
        row = self._one("SELECT * FROM versions WHERE image_set_id=? AND version=?", (image_set_id, version))
        return version_from(row) if row else None

    def versions(self, image_set_id: str, *, before: int | None = None, limit: int = -1) -> list[Version]:
        """Versions, newest first."""
        rows = self._all(
            "SELECT * FROM versions WHERE image_set_id=?1 AND (?2 IS NULL OR version<?2) "
            f"ORDER BY version DESC LIMIT {int(limit)}",
            (image_set_id, before),
        )
        return [version_from(row) for row in rows]

    def unsettled_versions(self) -> list[Version]:
        """Versions that a writer left LOCKED."""
        return [version_from(row) for row in self._all("SELECT * FROM versions WHERE state='LOCKED'")]

    def save_document(self, image_set_id: str, version: int, body: bytes) -> None:
        """Store a version's gzipped metadata document."""
        self._do("INSERT OR REPLACE INTO documents VALUES(?,?,?)", (image_set_id, version, body))

    def document(self, image_set_id: str, version: int) -> bytes | None:
        """The gzipped metadata document in force at a version: its own, or the last one before.

        A failed attempt makes a version without a document of its own.
        """
        row = self._one(
            "SELECT body FROM documents WHERE image_set_id=? AND version<=? ORDER BY version DESC LIMIT 1",
            (image_set_id, version),
        )
        return row[0] if row else None

    # Frames

    def add_frames(self, image_set_id: str, frames: Iterable[FrameRow]) -> None:
        """List frames under an image set."""
        with self._lock:
            self._db.executemany(
                "INSERT OR REPLACE INTO frames VALUES(?,?,?,?)",
                ((image_set_id, frame.frame_id, frame.blob, frame.content_type) for frame in frames),
            )

    def frame(self, datastore_id: str, image_set_id: str, frame_id: str) -> FrameRow | None:
        """Where a frame's bytes are, if the image set lists it and is not deleted."""
        row = self._one(
            "SELECT frame_id, blob, content_type FROM frames WHERE image_set_id=? AND frame_id=? AND EXISTS("
            "SELECT 1 FROM image_sets WHERE id=image_set_id AND datastore_id=? AND deleted IS NULL)",
            (image_set_id, frame_id, datastore_id),
        )
        return FrameRow(*row) if row else None

    def frames(self, image_set_id: str) -> list[FrameRow]:
        """Every frame an image set lists, in any version."""
        rows = self._all("SELECT frame_id, blob, content_type FROM frames WHERE image_set_id=?", (image_set_id,))
        return [FrameRow(*row) for row in rows]

    def forget(self, image_set_id: str) -> None:
        """Drop a deleted image set's frames and documents; its versions stay as a tombstone."""
        self._do("DELETE FROM frames WHERE image_set_id=?", (image_set_id,))
        self._do("DELETE FROM documents WHERE image_set_id=?", (image_set_id,))
        self._do("UPDATE versions SET state='DELETED', workflow='DELETED' WHERE image_set_id=?", (image_set_id,))

    def blobs(self) -> set[str]:
        """The names of all blobs that some frame refers to."""
        return {row[0] for row in self._all("SELECT DISTINCT blob FROM frames")}

    # Tags

    def tags(self, arn: str) -> dict[str, str]:
        """Tags of a resource, by key."""
        return dict(self._all("SELECT key, value FROM tags WHERE arn=? ORDER BY key", (arn,)))

    def set_tags(self, arn: str, tags: dict[str, str]) -> None:
        """Add tags, or replace their values."""
        with self.transaction():
            for key, value in tags.items():
                self._do("INSERT OR REPLACE INTO tags VALUES(?,?,?)", (arn, key, value))

    def drop_tags(self, arn: str, keys: Iterable[str]) -> None:
        """Remove tags; absent ones are no error."""
        with self.transaction():
            for key in keys:
                self._do("DELETE FROM tags WHERE arn=? AND key=?", (arn, key))
