"""Image sets, read: search, properties, versions, metadata documents, frames."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from ahi_ml.local.catalog import ImageSet, Version
from ahi_ml.local.operations.context import Context
from ahi_ml.local.protocol import ServiceFault

__all__ = [
    "get_image_frame",
    "get_image_set",
    "get_image_set_metadata",
    "list_image_set_versions",
    "search_image_sets",
]

Json = dict[str, Any]
_EQUAL = {
    "DICOMPatientId": "patient_id",
    "DICOMAccessionNumber": "accession_number",
    "DICOMStudyId": "study_id",
    "DICOMStudyInstanceUID": "study_uid",
    "DICOMSeriesInstanceUID": "series_uid",
    "isPrimary": "is_primary",
}
_BETWEEN = {"createdAt": "created", "updatedAt": "updated", "DICOMStudyDateAndTime": "study_moment"}
_SORT = {"updatedAt": "updated", "createdAt": "created", "DICOMStudyDateAndTime": "study_moment"}


def search_image_sets(context: Context, params: Json) -> Json:
    """A page of image sets that meet every filter, in the order asked for."""
    store = context.datastore(params["datastoreId"])
    criteria = params.get("searchCriteria") or {}
    sort = criteria.get("sort") or {"sortField": "updatedAt", "sortOrder": "DESC"}
    order = _SORT[sort["sortField"]]
    equal, between = [], []
    for each in criteria.get("filters") or []:
        column, values = _condition(each)
        if each["operator"] == "EQUAL":
            equal.append((column, values[0]))
        else:
            between.append((column, values[0], values[1]))
    found, token = context.page(
        params,
        lambda after, limit: context.catalog.search(
            store.id,
            equal=equal,
            between=between,
            order=order,
            descending=sort["sortOrder"] == "DESC",
            after=after,
            limit=limit,
        ),
        lambda row: (getattr(row, order) or "", row.id),
        bound_to=["SearchImageSets", store.id, criteria],
    )
    return {"imageSetsMetadataSummaries": [_summary(context, row) for row in found], "sort": sort, "nextToken": token}


def _condition(search_filter: Json) -> tuple[str, Sequence[Any]]:
    """The column that a filter is about, and its one or two values."""
    operator = search_filter["operator"]
    names = {next(iter(value)) for value in search_filter["values"]}
    values = [next(iter(value.values())) for value in search_filter["values"]]
    if len(names) != 1:
        raise ServiceFault("ValidationException", "The values of a filter must be of one attribute")
    (name,) = names
    if operator == "EQUAL" and name in _EQUAL:
        if len(values) != 1:
            raise ServiceFault("ValidationException", "The EQUAL operator takes one value")
        return _EQUAL[name], values
    if operator == "BETWEEN" and name in _BETWEEN:
        if len(values) != 2:
            raise ServiceFault("ValidationException", "The BETWEEN operator takes two values")
        bounds = [_study_moment(each) if name == "DICOMStudyDateAndTime" else _seconds(each) for each in values]
        return _BETWEEN[name], bounds
    raise ServiceFault("ValidationException", f"The {operator} operator is not supported for {name}")


def _seconds(value: datetime) -> float:
    return value.timestamp()


def _study_moment(value: Json) -> str:
    date = value["DICOMStudyDate"]
    whole, _, fraction = (value.get("DICOMStudyTime") or "000000").partition(".")
    if len(date) != 8 or not date.isdigit():
        raise ServiceFault("ValidationException", "DICOMStudyDate must be YYYYMMDD")
    if len(whole) > 6 or len(fraction) > 6 or not (whole + fraction).isdigit():
        raise ServiceFault("ValidationException", "DICOMStudyTime must be HHmmss.FFFFFF")
    return f"{date}{whole:0<6}.{fraction:0<6}"


def _summary(context: Context, found: ImageSet) -> Json:
    return {
        "imageSetId": found.id,
        "version": found.version,
        "createdAt": found.created,
        "updatedAt": found.updated,
        **context.accesses.shown(found),
        "isPrimary": found.is_primary,
        "DICOMTags": found.tags,
    }


def get_image_set(context: Context, params: Json) -> Json:
    """The properties of an image set at a version, the latest by default."""
    with context.catalog.steady():
        found = context.image_set(params["datastoreId"], params["imageSetId"], deleted=True)
        version = _version(context, found, params)
    return {
        "datastoreId": found.datastore_id,
        "imageSetId": found.id,
        "versionId": str(version.version),
        "imageSetState": version.state,
        "imageSetWorkflowStatus": version.shown_workflow,
        "createdAt": found.created,
        "updatedAt": version.updated,
        "deletedAt": found.deleted,
        "message": version.message,
        "imageSetArn": context.image_set_arn(found.datastore_id, found.id),
        "overrides": None if version.forced is None else {"forced": version.forced},
        "isPrimary": version.is_primary,
        **context.accesses.shown(found),
    }


def _version(context: Context, found: ImageSet, params: Json) -> Version:
    number = int(params["versionId"]) if params.get("versionId") else found.version
    version = context.catalog.version(found.id, number) if number < 2**63 else None
    if version is None:
        raise ServiceFault("ResourceNotFoundException", f"ImageSet with id {found.id} has no version {number}")
    return version


def get_image_set_metadata(context: Context, params: Json) -> Json:
    """The metadata document at a version, gzipped."""
    with context.catalog.steady():  # or a deletion in between would look like metadata that is not ready
        found = context.image_set(params["datastoreId"], params["imageSetId"])
        version = _version(context, found, params)
        body = context.catalog.document(found.id, version.version)
    unready_s = context.injector.faults.unready_s
    imported = version.workflow in ("CREATED", "IMPORTED")
    if body is None or (unready_s and imported and context.clock() - version.updated < unready_s):
        raise ServiceFault("ConflictException", f"The metadata of image set {found.id} is not ready yet")
    context.accesses.note(found.id)
    return {"imageSetMetadataBlob": body, "contentType": "application/json", "contentEncoding": "gzip"}


def get_image_frame(context: Context, params: Json) -> Json:
    """The encoded bytes of a frame."""
    frame_id = params["imageFrameInformation"]["imageFrameId"]
    row = context.catalog.frame(params["datastoreId"], params["imageSetId"], frame_id)
    if row is None:
        context.image_set(params["datastoreId"], params["imageSetId"])  # says which of them is unknown
        raise ServiceFault(
            "ResourceNotFoundException", f"Image frame with id {frame_id} does not exist in this image set"
        )
    context.accesses.note(params["imageSetId"])
    return {"imageFrameBlob": context.blobs.read(row.blob), "contentType": row.content_type}


def list_image_set_versions(context: Context, params: Json) -> Json:
    """A page of versions, newest first, failed attempts included."""
    with context.catalog.steady():
        found = context.image_set(params["datastoreId"], params["imageSetId"], deleted=True)
        versions, token = context.page(
            params,
            lambda after, limit: context.catalog.versions(found.id, before=after[0] if after else None, limit=limit),
            lambda version: (version.version,),
            bound_to=["ListImageSetVersions", found.id],
        )
    return {
        "imageSetPropertiesList": [
            {
                "imageSetId": found.id,
                "versionId": str(version.version),
                "imageSetState": version.state,
                "ImageSetWorkflowStatus": version.shown_workflow,
                "createdAt": found.created,
                "updatedAt": version.updated,
                "deletedAt": found.deleted,
                "message": version.message,
                "overrides": None if version.forced is None else {"forced": version.forced},
                "isPrimary": version.is_primary,
            }
            for version in versions
        ],
        "nextToken": token,
    }
