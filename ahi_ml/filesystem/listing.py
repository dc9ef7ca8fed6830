"""What the directories hold, and whether a path exists, as the service tells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ahi_ml.client import image_set_document, translated
from ahi_ml.filesystem.places import DOCUMENT, Place, missing
from ahi_ml.metadata import frame_ids
from ahi_ml.store import DataStore

__all__ = ["Entry", "datastores", "directory", "file", "listed", "looked_up"]

Entry = dict[str, Any]

# Attempts that made no version, or have not made one yet: they have a number and no document of their own.
_NO_VERSION = {"COPYING", "UPDATING", "UPDATING_FOR_STUDY_CONSISTENCY", "IMPORTING", "DELETING"}


def directory(path: str, **more: Any) -> Entry:
    """The entry of a directory. I/O: none."""
    return {"name": path, "size": 0, "type": "directory", **more}


def file(path: str, size: int | None = None) -> Entry:
    """The entry of a file; its size is None until it was read. I/O: none."""
    return {"name": path, "size": size, "type": "file"}


def datastores(client: Any) -> list[Entry]:
    """The active data stores of the account and region. I/O: one ListDatastores request a page."""
    with translated("ListDatastores"):
        pages = client.get_paginator("list_datastores").paginate(datastoreStatus="ACTIVE")
        return [_datastore(summary) for page in pages for summary in page["datastoreSummaries"]]


def _datastore(properties: dict[str, Any]) -> Entry:
    return directory(
        properties["datastoreId"], created=properties.get("createdAt"), updated=properties.get("updatedAt")
    )


def listed(place: Place, store: DataStore) -> list[Entry]:
    """What a directory below the root holds.

    I/O: for a data store one SearchImageSets request for every 50 image sets; for ``versions`` one
    ListImageSetVersions for every 50; for ``frames`` the latest metadata document; for an image set or
    a version none, so whoever asks looks it up first.
    """
    match place.kind:
        case "datastore":
            return list(_image_sets(place, store))
        case "image_set":
            return [
                file(f"{place.path}/{DOCUMENT}"),
                directory(f"{place.path}/frames"),
                directory(f"{place.path}/versions"),
            ]
        case "versions":
            return _versions(place, store)
        case "version":
            return [file(f"{place.path}/{DOCUMENT}")]
        case "frames":
            body = image_set_document(store.client, place.datastore_id, place.image_set_id)
            return [file(f"{place.path}/{frame_id}") for frame_id in frame_ids(body)]
    raise AssertionError(place.kind)


def _image_sets(place: Place, store: DataStore) -> Iterator[Entry]:
    for found in store.search(primary=None).summaries():
        yield directory(
            f"{place.path}/{found.image_set_id}",
            created=found.created_at,
            updated=found.updated_at,
            version_id=found.version_id,
            is_primary=found.is_primary,
            storage_tier=found.storage_tier,
        )


def _versions(place: Place, store: DataStore) -> list[Entry]:
    with translated("ListImageSetVersions", f"image set {place.image_set_id}"):
        pages = store.client.get_paginator("list_image_set_versions").paginate(
            datastoreId=place.datastore_id, imageSetId=place.image_set_id, PaginationConfig={"PageSize": 50}
        )
        found = [each for page in pages for each in page["imageSetPropertiesList"]]
    if any(each["imageSetState"] == "DELETED" for each in found):
        raise missing(place.path)
    numbers = {int(each["versionId"]): each for each in found if _is_version(each)}
    return [
        directory(f"{place.path}/{number}", created=each.get("createdAt"), updated=each.get("updatedAt"))
        for number, each in sorted(numbers.items())
    ]


def _is_version(properties: dict[str, Any]) -> bool:
    workflow = properties.get("ImageSetWorkflowStatus") or ""
    return workflow not in _NO_VERSION and not workflow.endswith("_FAILED")


def looked_up(place: Place, store: DataStore) -> Entry:
    """The entry of a directory, or of what a document describes: proof that it exists.

    I/O: one GetDatastore or GetImageSet, which move no image set to another storage tier.

    Raises
    ------
    FileNotFoundError
        It was deleted.
    NotFoundError
        The data store does not have it.
    """
    client = store.client
    if place.kind == "datastore":
        with translated("GetDatastore", f"data store {place.datastore_id}"):
            properties = client.get_datastore(datastoreId=place.datastore_id)["datastoreProperties"]
        if properties["datastoreStatus"] == "DELETED":
            raise missing(place.path)
        return _datastore(properties)
    request = {"datastoreId": place.datastore_id, "imageSetId": place.image_set_id}
    if place.version_id is not None:
        request["versionId"] = place.version_id
    with translated("GetImageSet", f"image set {place.image_set_id}"):
        answer = client.get_image_set(**request)
    if answer["imageSetState"] == "DELETED":
        raise missing(place.path)
    if place.kind == "document":
        return file(place.path)
    more = {}
    if place.kind == "image_set":
        more = {
            "version_id": answer["versionId"],
            "is_primary": answer.get("isPrimary", True),
            "storage_tier": answer.get("storageTier"),
        }
    return directory(place.path, created=answer.get("createdAt"), updated=answer.get("updatedAt"), **more)
