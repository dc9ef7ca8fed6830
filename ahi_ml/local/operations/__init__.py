"""The operations of the service, one function each, over the catalog.

Parameters come parsed and validated from `protocol`, results go back to be serialised by it; both
are dicts in the service model's own names. What fails raises `ServiceFault`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ahi_ml.local.operations import datastores, image_sets, imports, tags, writes
from ahi_ml.local.operations.context import Context
from ahi_ml.local.protocol import ServiceFault

__all__ = ["HANDLERS", "Context", "call"]

Handler = Callable[[Context, dict[str, Any]], dict[str, Any]]

HANDLERS: dict[str, Handler] = {
    "CreateDatastore": datastores.create_datastore,
    "GetDatastore": datastores.get_datastore,
    "ListDatastores": datastores.list_datastores,
    "DeleteDatastore": datastores.delete_datastore,
    "StartDICOMImportJob": imports.start_dicom_import_job,
    "GetDICOMImportJob": imports.get_dicom_import_job,
    "ListDICOMImportJobs": imports.list_dicom_import_jobs,
    "SearchImageSets": image_sets.search_image_sets,
    "GetImageSet": image_sets.get_image_set,
    "GetImageSetMetadata": image_sets.get_image_set_metadata,
    "GetImageFrame": image_sets.get_image_frame,
    "ListImageSetVersions": image_sets.list_image_set_versions,
    "UpdateImageSetMetadata": writes.update_image_set_metadata,
    "CopyImageSet": writes.copy_image_set,
    "DeleteImageSet": writes.delete_image_set,
    "TagResource": tags.tag_resource,
    "UntagResource": tags.untag_resource,
    "ListTagsForResource": tags.list_tags_for_resource,
}


def call(context: Context, operation: str, params: dict[str, Any]) -> dict[str, Any]:
    """Run one operation.

    I/O: the catalog, and the blobs for frames.

    Raises
    ------
    ServiceFault
        The service's answer when it says no.
    """
    handler = HANDLERS.get(operation)
    if handler is None:
        raise ServiceFault(
            "ValidationException", f"{operation} is not available in this release of the embedded data store"
        )
    return handler(context, params)
