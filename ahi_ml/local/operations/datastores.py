"""Data stores: create, read, list, delete."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

from ahi_ml.local.catalog import Datastore
from ahi_ml.local.operations.context import Context
from ahi_ml.local.protocol import ServiceFault

__all__ = ["create_datastore", "delete_datastore", "get_datastore", "list_datastores"]

Json = dict[str, Any]
_MOST_STORES = 100


def create_datastore(context: Context, params: Json) -> Json:
    """Make a data store; the same ``clientToken`` gives the same one again."""
    with context.catalog.transaction():
        token = params["clientToken"]
        store = context.catalog.datastore_by_token(token)
        if store is None:
            if sum(found.status != "DELETED" for found in context.catalog.datastores()) >= _MOST_STORES:
                raise ServiceFault("ServiceQuotaExceededException", f"More than {_MOST_STORES} data stores")
            now = context.clock()
            store = Datastore(
                id=secrets.token_hex(16),
                name=params.get("datastoreName") or f"datastore-{secrets.token_hex(4)}",
                status="ACTIVE",
                storage_format=params.get("losslessStorageFormat") or "HTJ2K",
                created=now,
                updated=now,
                client_token=token,
                kms_key_arn=params.get("kmsKeyArn"),
                authorizer_arn=params.get("lambdaAuthorizerArn"),
            )
            context.catalog.save_datastore(store)
            context.catalog.set_tags(context.datastore_arn(store.id), params.get("tags") or {})
    return {"datastoreId": store.id, "datastoreStatus": "CREATING"}


def get_datastore(context: Context, params: Json) -> Json:
    """The properties of a data store."""
    store = context.datastore(params["datastoreId"], active=False)
    properties = {
        **_summary(context, store),
        "losslessStorageFormat": store.storage_format,
        "kmsKeyArn": store.kms_key_arn,
        "lambdaAuthorizerArn": store.authorizer_arn,
    }
    return {"datastoreProperties": properties}


def list_datastores(context: Context, params: Json) -> Json:
    """A page of data stores, oldest first."""
    status = params.get("datastoreStatus")
    stores, token = context.page(
        params,
        lambda after, limit: context.catalog.datastores(status, after, limit),
        lambda store: (store.created, store.id),
        bound_to=["ListDatastores", status],
    )
    return {"datastoreSummaries": [_summary(context, store) for store in stores], "nextToken": token}


def delete_datastore(context: Context, params: Json) -> Json:
    """Delete an empty data store."""
    with context.catalog.transaction():
        store = context.datastore(params["datastoreId"])
        if context.catalog.count_image_sets(store.id):
            raise ServiceFault("ConflictException", f"Datastore with id {store.id} is not empty")
        if any(job.ended is None for job in context.catalog.jobs(store.id)):
            raise ServiceFault("ConflictException", f"Datastore with id {store.id} has import jobs that have not ended")
        context.catalog.save_datastore(replace(store, status="DELETED", updated=context.clock(), client_token=None))
    return {"datastoreId": store.id, "datastoreStatus": "DELETING"}


def _summary(context: Context, store: Datastore) -> Json:
    return {
        "datastoreId": store.id,
        "datastoreName": store.name,
        "datastoreStatus": store.status,
        "datastoreArn": context.datastore_arn(store.id),
        "createdAt": store.created,
        "updatedAt": store.updated,
    }
