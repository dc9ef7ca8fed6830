"""From groups of instances to versions of image sets in the catalog, each in one transaction."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ahi_ml.errors import LocalStoreError
from ahi_ml.local.catalog import Catalog, Datastore, ImageSet, Version
from ahi_ml.local.ingest.image_sets import (
    Group,
    add_instance,
    document_keys,
    new_document,
    pack,
    search_columns,
    search_tags,
    unpack,
)

__all__ = ["Busy", "change_image_set", "commit_group"]

_LONGEST_LOCK_S = 60.0
_CUT_SHORT = "INTERNAL_ERROR: The import was cut short: try again."

Json = dict[str, Any]
_NOTHING_YET: Json = dict.fromkeys(
    ("patient_id", "accession_number", "study_id", "study_uid", "series_uid", "study_moment")
)
Pause = Callable[[], None]


class Busy(Exception):
    """The image set is LOCKED by another write; the text goes into the files' lines."""


def commit_group(catalog: Catalog, store: Datastore, group: Group, *, pause: Pause | None = None) -> ImageSet:
    """Write a group as a new image set, or as a new version of one, once no other write holds it.

    I/O: the catalog.

    Parameters
    ----------
    pause : callable, optional
        Waits while an image set that is there already shows LOCKED and IMPORTING.

    Raises
    ------
    Busy
        It stays locked by another write.
    """
    return _when_free(lambda: _commit(catalog, store, group, pause))


def change_image_set(catalog: Catalog, found: ImageSet, change: Callable[[Json], Json]) -> ImageSet:
    """Write a new version of an image set with a changed document, once no other write holds it.

    I/O: the catalog. `change` gets the document and returns it; what it raises leaves all as it was.

    Raises
    ------
    Busy
        It stays locked by another write.
    """

    def write() -> ImageSet:
        with catalog.transaction():
            now = _now()
            target = catalog.image_set_of(found.id)
            _refuse_locked(catalog, target)
            return _save(catalog, replace(target, version=target.version + 1), change(_document(catalog, target)), now)

    return _when_free(write)


def _when_free(write: Callable[[], ImageSet]) -> ImageSet:
    deadline = time.monotonic() + _LONGEST_LOCK_S
    while True:
        try:
            return write()
        except Busy:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _now() -> float:
    return round(time.time(), 3)  # what answers show, so that a search by them finds it


def _refuse_locked(catalog: Catalog, target: ImageSet) -> None:
    version = catalog.version(target.id, target.version)
    if version is not None and version.state == "LOCKED":
        raise Busy(f"image set {target.id} stays locked by another operation")


def _document(catalog: Catalog, target: ImageSet) -> Json:
    body = catalog.document(target.id, target.version)
    if body is None:
        raise LocalStoreError(f"image set {target.id} has no metadata document")
    return unpack(body)


def _commit(catalog: Catalog, store: Datastore, group: Group, pause: Pause | None) -> ImageSet:
    with catalog.transaction():
        now = _now()
        known = catalog.series_image_sets(store.id, group.series_uid)
        same = [found for found in known if found.series_key == group.series_key]
        target = next((found for found in same if found.is_primary), None)
        primaries = catalog.primaries(store.id, study_uid=group.study_uid)
        fits = all(p.study_key == group.study_key for p in primaries)
        primary = fits and not any(found.is_primary for found in known)
        if target is None and same and not primary:
            target = same[0]  # what contradicts the primary, of the series or of its study, stays together
        if target is None:
            made = ImageSet(
                id=secrets.token_hex(16),
                datastore_id=store.id,
                is_primary=primary,
                version=1,
                created=now,
                updated=now,
                accessed=now,
                deleted=None,
                study_key=group.study_key,
                series_key=group.series_key,
                **_NOTHING_YET,
            )
            document = new_document(store.id, made.id, group.series_uid)
            return _add(catalog, made, document, group, now, workflow="CREATED")
        _refuse_locked(catalog, target)
        grown = replace(target, version=target.version + 1)
        if pause is None:
            return _add(catalog, grown, _document(catalog, target), group, now)
        importing = Version(grown.id, grown.version, "LOCKED", "IMPORTING", now, None, None, grown.is_primary)
        catalog.save_version(importing)
        catalog.save_image_set(replace(grown, updated=now))
    try:
        pause()
        with catalog.transaction():
            return _add(catalog, grown, _document(catalog, grown), group, _now())
    except BaseException:
        failed = replace(importing, state="ACTIVE", workflow="IMPORT_FAILED", updated=_now(), message=_CUT_SHORT)
        catalog.save_version(failed)
        raise


def _add(
    catalog: Catalog, target: ImageSet, document: Json, group: Group, now: float, workflow: str = "IMPORTED"
) -> ImageSet:
    for instance in group.instances:
        add_instance(document, group.series_uid, instance)
        catalog.add_frames(target.id, instance.rows)
    return _save(catalog, target, document, now, workflow)


def _save(catalog: Catalog, target: ImageSet, document: Json, now: float, workflow: str = "IMPORTED") -> ImageSet:
    """Write a version with its document, and what a search finds of it."""
    columns: Json = dict(search_columns(document))
    columns["study_key"], columns["series_key"] = document_keys(document)
    found = replace(target, updated=now, accessed=now, tags=search_tags(document), **columns)
    catalog.save_document(found.id, found.version, pack(document))
    catalog.save_version(Version(found.id, found.version, "ACTIVE", workflow, now, None, None, found.is_primary))
    catalog.save_image_set(found)
    return found
