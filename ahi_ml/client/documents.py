"""Metadata documents as the service sends them, waited for while they are being made."""

from __future__ import annotations

import time
from typing import Any

from ahi_ml.client.failures import translated
from ahi_ml.errors import ConflictError

__all__ = ["image_set_document"]

_ATTEMPTS = 20
_WAIT_S = 0.25


def image_set_document(client: Any, datastore_id: str, image_set_id: str, version_id: str | None = None) -> bytes:
    """The metadata document of an image set, gzipped as a rule; see `metadata.parse_document`.

    I/O: one GetImageSetMetadata; more, with pauses, while the service answers that a large document is
    still being processed after its import.

    Parameters
    ----------
    client : boto3 client
        For ``medical-imaging``; it may be shared by threads.
    datastore_id, image_set_id : str
        Which image set.
    version_id : str, optional
        Which version; the latest by default.

    Raises
    ------
    ServiceError
        The data store said no.
    """
    request = {"datastoreId": datastore_id, "imageSetId": image_set_id}
    if version_id is not None:
        request["versionId"] = version_id
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            with translated("GetImageSetMetadata", f"image set {image_set_id}"):
                body: bytes = client.get_image_set_metadata(**request)["imageSetMetadataBlob"].read()
            return body
        except ConflictError:
            if attempt == _ATTEMPTS:
                raise
            time.sleep(_WAIT_S * attempt)
    raise AssertionError("unreachable")
