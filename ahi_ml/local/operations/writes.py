"""Writes to image sets: update, copy, delete. Each locks first, answers, and settles in the background.

The answer shows the image set LOCKED; the work ends in one transaction that makes it ACTIVE again,
with a new document or with a message that says what failed. A server that is killed in between
settles the attempt as failed when it starts again.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ahi_ml.local import edits
from ahi_ml.local.catalog import ImageSet, Version
from ahi_ml.local.ingest.image_sets import document_keys, pack, search_columns, search_tags, unpack
from ahi_ml.local.operations.context import Context
from ahi_ml.local.protocol import ServiceFault

__all__ = ["copy_image_set", "delete_image_set", "recover_writes", "update_image_set_metadata"]

Json = dict[str, Any]
_MOST_COPIED_FRAMES = 1_000
_MOST_PAYLOAD = 10 * 1024
_CUT_SHORT = "INTERNAL_ERROR: The operation was cut short: try again."
_NOTHING: Json = dict.fromkeys(
    ("patient_id", "accession_number", "study_id", "study_uid", "series_uid", "study_moment")
)
_FAILED = {
    "UPDATING": "UPDATE_FAILED",
    "UPDATING_FOR_STUDY_CONSISTENCY": "UPDATE_FAILED",
    "COPYING": "COPY_FAILED",
    "DELETING": "DELETING",
    "IMPORTING": "IMPORT_FAILED",
}


def _document(context: Context, found: ImageSet, version: int | None = None) -> Json:
    body = context.catalog.document(found.id, version or found.version)
    if body is None:
        raise ServiceFault("ConflictException", f"The metadata of image set {found.id} is not ready yet")
    return unpack(body)


def _unlocked(context: Context, found: ImageSet, latest: str | None) -> ImageSet:
    version = context.catalog.version(found.id, found.version)
    if version is None or version.state == "LOCKED":
        raise ServiceFault("ConflictException", f"ImageSet with id {found.id} is locked by another operation")
    if latest is not None and latest != str(found.version):
        raise ServiceFault(
            "ConflictException", f"The latest version of image set {found.id} is {found.version}, not the one given"
        )
    return found


def _lock(context: Context, found: ImageSet, workflow: str, *, forced: bool | None = None) -> Version:
    """Begin a new version of an image set, LOCKED."""
    now = context.clock()
    version = Version(found.id, found.version + 1, "LOCKED", workflow, now, None, forced, found.is_primary)
    context.catalog.save_version(version)
    context.catalog.save_image_set(replace(found, version=version.version, updated=now))
    return version


def _settle(context: Context, version: Version, workflow: str, document: Json | None, message: str | None) -> None:
    """End a version: with a document, or without one and a message."""
    now = context.clock()
    row = context.catalog.image_set_of(version.image_set_id)
    if document is not None:
        context.catalog.save_document(version.image_set_id, version.version, pack(document))
        columns: Json = dict(search_columns(document))
        columns["study_key"], columns["series_key"] = document_keys(document)
        row = replace(row, tags=search_tags(document), **columns)
    context.catalog.save_version(replace(version, state="ACTIVE", workflow=workflow, updated=now, message=message))
    context.catalog.save_image_set(replace(row, updated=now))


def _properties(found: ImageSet, version: Version, id_name: str = "latestVersionId") -> Json:
    return {
        "imageSetId": found.id,
        id_name: str(version.version),
        "imageSetState": version.state,
        "imageSetWorkflowStatus": version.shown_workflow,
        "createdAt": found.created,
        "updatedAt": version.updated,
    }


def update_image_set_metadata(context: Context, params: Json) -> Json:
    """Change elements, remove elements or instances, or go back to an earlier version."""
    updates = params["updateImageSetMetadataUpdates"]
    force = bool(params.get("force"))
    with_study = bool(params.get("includeStudyImageSets"))
    with context.catalog.transaction():
        found = context.image_set(params["datastoreId"], params["imageSetId"])
        _unlocked(context, found, params["latestVersionId"])
        change, trees = _change(context, found, updates, force=force)
        others: list[ImageSet] = []
        if with_study:
            if trees is None:
                raise ServiceFault("ValidationException", "includeStudyImageSets does not go with revertToVersionId")
            if not found.is_primary or not all(edits.study_level_only(tree) for tree in trees):
                raise ServiceFault(
                    "ValidationException",
                    "includeStudyImageSets is for changes of patient and study attributes of a primary image set",
                )
            siblings = context.catalog.primaries(found.datastore_id, study_uid=found.study_uid or "")
            others = [_unlocked(context, each, None) for each in siblings if each.id != found.id]
        context.accesses.note(found.id)
        forced = force or None
        version = _lock(context, found, "UPDATING", forced=forced)
        locked = [(found, version)]
        locked += [(each, _lock(context, each, "UPDATING_FOR_STUDY_CONSISTENCY", forced=forced)) for each in others]

    def work() -> None:
        documents: list[Json] = []
        try:
            for each, _ in locked:
                documents.append(change(_document(context, each)))
        except edits.EditFailure as failure:
            for _, attempt in locked:
                _settle(context, attempt, "UPDATE_FAILED", None, str(failure))
            return
        for (_, attempt), document in zip(locked, documents, strict=True):
            _settle(context, attempt, "UPDATED", document, None)

    context.later(work, lambda: _settle_stranded(context, {each.id for each, _ in locked}))
    return {"datastoreId": found.datastore_id, **_properties(found, version)}


def _change(
    context: Context, found: ImageSet, updates: Json, *, force: bool
) -> tuple[Callable[[Json], Json], list[Json] | None]:
    """What to do to a document, and the trees it was asked with (None for a revert)."""
    wanted = updates.get("revertToVersionId")
    if wanted is not None:
        number = int(wanted) if len(wanted) < 19 else 0
        earlier = context.catalog.version(found.id, number)
        if earlier is None or number >= found.version or earlier.workflow.endswith("_FAILED"):
            raise ServiceFault(
                "ValidationException", "revertToVersionId names no earlier version that can be gone back to"
            )
        old = _document(context, found, number)
        return (lambda document: old), None
    payload = updates["DICOMUpdates"]
    trees: dict[str, Json] = {}
    try:
        for member in ("updatableAttributes", "removableAttributes"):
            if payload.get(member) is not None:
                if len(payload[member]) > _MOST_PAYLOAD:
                    raise edits.InvalidEdit(f"{member} has more than {_MOST_PAYLOAD} bytes")
                trees[member] = edits.parse_tree(payload[member], member)
                edits.check(trees[member], member, force=force, primary=found.is_primary)
        if not trees:
            raise edits.InvalidEdit("DICOMUpdates names no attributes")
    except edits.InvalidEdit as error:
        raise ServiceFault("ValidationException", str(error)) from error

    def change(document: Json) -> Json:
        if "updatableAttributes" in trees:
            document = edits.apply_updates(document, trees["updatableAttributes"])
        if "removableAttributes" in trees:
            document = edits.apply_removals(document, trees["removableAttributes"])
        return document

    return change, list(trees.values())


def copy_image_set(context: Context, params: Json) -> Json:
    """Copy an image set, or some of its instances, to a new or an existing image set."""
    asked = params["copyImageSetInformation"]
    force, promote = bool(params.get("force")), bool(params.get("promoteToPrimary"))
    with context.catalog.transaction():
        source = context.image_set(params["datastoreId"], params["sourceImageSetId"])
        _unlocked(context, source, asked["sourceImageSet"]["latestVersionId"])
        part = _part(_document(context, source), asked["sourceImageSet"].get("DICOMCopies"))
        now = context.clock()
        into = asked.get("destinationImageSet")
        if into is not None:
            if promote:
                raise ServiceFault("ValidationException", "promoteToPrimary does not go with a destination image set")
            if into["imageSetId"] == source.id:
                raise ServiceFault("ValidationException", "An image set cannot be copied into itself")
            destination = context.image_set(params["datastoreId"], into["imageSetId"])
            _unlocked(context, destination, into["latestVersionId"])
            version = _lock(context, destination, "COPYING", forced=force or None)
        else:
            destination, version = _new_copy(context, source, promote=promote, forced=force or None, now=now)
        source_version = context.catalog.version(source.id, source.version)
        assert source_version is not None
        context.accesses.note(source.id)
        reading = replace(source_version, state="LOCKED")
        context.catalog.save_version(reading)

    def work() -> None:
        context.catalog.save_version(source_version)
        try:
            merged = part if into is None else _merge(_document(context, destination), part, force=force)
        except edits.EditFailure as failure:
            _settle(context, version, "COPY_FAILED", None, str(failure))
            return
        merged = {**merged, "ImageSetID": destination.id}
        wanted = set(_frame_ids(part))
        context.catalog.add_frames(
            destination.id, [row for row in context.catalog.frames(source.id) if row.frame_id in wanted]
        )
        _settle(context, version, "COPIED", merged, None)

    context.later(work, lambda: _settle_stranded(context, {source.id, destination.id}))
    return {
        "datastoreId": source.datastore_id,
        "sourceImageSetProperties": {
            **_properties(source, reading),
            "imageSetArn": context.image_set_arn(source.datastore_id, source.id),
        },
        "destinationImageSetProperties": {
            **_properties(destination, version),
            "imageSetArn": context.image_set_arn(source.datastore_id, destination.id),
        },
    }


def _part(document: Json, copies: Json | None) -> Json:
    """The instances of a document that a copy asks for."""
    if copies is not None:
        try:
            tree = edits.parse_tree(copies["copiableAttributes"], "copiableAttributes")
        except edits.InvalidEdit as error:
            raise ServiceFault("ValidationException", str(error)) from error
        wanted = (tree.get("Study") or {}).get("Series") or {}
        chosen: Json = {}
        for series_uid, series in wanted.items():
            known = document["Study"]["Series"].get(series_uid)
            uids = list(series.get("Instances") or {})
            if known is None or not uids or any(uid not in known["Instances"] for uid in uids):
                raise ServiceFault(
                    "ValidationException", "copiableAttributes names instances that are not in the source"
                )
            chosen[series_uid] = {**known, "Instances": {uid: known["Instances"][uid] for uid in uids}}
        if not chosen:
            raise ServiceFault("ValidationException", "copiableAttributes names no instances")
        document = {**document, "Study": {**document["Study"], "Series": chosen}}
    if sum(1 for _ in _frame_ids(document)) > _MOST_COPIED_FRAMES:
        raise ServiceFault("ServiceQuotaExceededException", f"A copy has at most {_MOST_COPIED_FRAMES} image frames")
    return document


def _frame_ids(document: Json) -> list[str]:
    return [
        frame["ID"]
        for series in document["Study"]["Series"].values()
        for instance in series["Instances"].values()
        for frame in instance.get("ImageFrames") or []
    ]


def _new_copy(
    context: Context, source: ImageSet, *, promote: bool, forced: bool | None, now: float
) -> tuple[ImageSet, Version]:
    if promote:
        primaries = context.catalog.series_image_sets(source.datastore_id, source.series_uid or "")
        if any(each.is_primary for each in primaries):
            raise ServiceFault("ConflictException", "The series has a primary image set already: delete it first")
    made = replace(
        source, id=secrets.token_hex(16), is_primary=promote, version=1, created=now, updated=now, accessed=now
    )
    version = Version(made.id, 1, "LOCKED", "COPYING", now, None, forced, promote)
    context.catalog.save_image_set(made)
    context.catalog.save_version(version)
    return made, version


def _merge(document: Json, part: Json, *, force: bool) -> Json:
    """The destination's document with the instances of a part."""
    mine, theirs = document["Study"]["Series"], part["Study"]["Series"]
    if set(mine) != set(theirs):
        raise edits.EditFailure("INVALID_REQUEST: Series of SourceImageSet and DestinationImageSet don't match.")
    agree = document["Patient"] == part["Patient"] and document["Study"]["DICOM"] == part["Study"]["DICOM"]
    agree = agree and all(mine[uid]["DICOM"] == theirs[uid]["DICOM"] for uid in mine)
    if not agree and not force:
        raise edits.EditFailure(
            "INVALID_REQUEST: Metadata of SourceImageSet and DestinationImageSet don't match: use force."
        )
    for uid, series in theirs.items():
        if set(series["Instances"]) & set(mine[uid]["Instances"]):
            raise edits.EditFailure("INVALID_REQUEST: SOP instances of SourceImageSet exist in DestinationImageSet.")
        mine[uid]["Instances"].update(series["Instances"])
    return document


def delete_image_set(context: Context, params: Json) -> Json:
    """Delete an image set with all its versions."""
    with context.catalog.transaction():
        found = _unlocked(context, context.image_set(params["datastoreId"], params["imageSetId"]), None)
        current = context.catalog.version(found.id, found.version)
        assert current is not None
        deleting = replace(current, state="LOCKED", workflow="DELETING", updated=context.clock())
        context.catalog.save_version(deleting)
    context.later(lambda: _delete(context, found, deleting), lambda: _settle_stranded(context, {found.id}))
    return {
        "datastoreId": found.datastore_id,
        "imageSetId": found.id,
        "imageSetState": "LOCKED",
        "imageSetWorkflowStatus": "DELETING",
    }


def _delete(context: Context, found: ImageSet, deleting: Version) -> None:
    now = context.clock()
    context.catalog.forget(found.id)
    context.catalog.save_version(replace(deleting, state="DELETED", workflow="DELETED", updated=now))
    context.catalog.save_image_set(replace(found, deleted=now, updated=now, tags={}, **_NOTHING))
    arn = context.image_set_arn(found.datastore_id, found.id)
    context.catalog.drop_tags(arn, context.catalog.tags(arn))


def recover_writes(context: Context) -> None:
    """Settle what a killed server left LOCKED: deletions finish, other attempts have failed."""
    _settle_stranded(context, {version.image_set_id for version in context.catalog.unsettled_versions()})


def _settle_stranded(context: Context, image_set_ids: set[str]) -> None:
    for version in context.catalog.unsettled_versions():
        if version.image_set_id not in image_set_ids:
            continue
        with context.catalog.transaction():
            found = context.catalog.image_set_of(version.image_set_id)
            if version.workflow == "DELETING":
                _delete(context, found, version)
            elif version.workflow == "COPYING" and context.catalog.document(found.id, version.version) is None:
                # A new copy without a document is nothing to go on with.
                _delete(context, found, replace(version, message=_CUT_SHORT))
            elif version.read_by_copy:
                context.catalog.save_version(replace(version, state="ACTIVE"))
            else:
                _settle(context, version, _FAILED.get(version.workflow, "UPDATE_FAILED"), None, _CUT_SHORT)
