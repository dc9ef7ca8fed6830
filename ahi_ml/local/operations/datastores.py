"""Data stores: create, read, list, delete."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

from ahi_ml.local.catalog import Datastore
from ahi_ml.local.operations.context import Context
from ahi_ml.local.protocol import ServiceFault

__all__ = ["create_datastore", "delete_datastore", "get_datastore", "list_datastores", "recover_datastores"]

Json = dict[str, Any]
_MOST_STORES = 100
_SETTLED = {"CREATING": "ACTIVE", "DELETING": "DELETED"}


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
                status=_status(context, "CREATING"),
                storage_format=params.get("losslessStorageFormat") or "HTJ2K",
                created=now,
                updated=now,
                client_token=token,
                kms_key_arn=params.get("kmsKeyArn"),
                authorizer_arn=params.get("lambdaAuthorizerArn"),
            )
            context.catalog.save_datastore(store)
            context.catalog.set_tags(context.datastore_arn(store.id), params.get("tags") or {})
            _settle_later(context, store)
        elif _differs(store, params):
            raise ServiceFault(
                "ConflictException", "The clientToken belongs to an earlier request that had other parameters"
            )
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
        status = _status(context, "DELETING")
        store = replace(store, status=status, updated=context.clock(), client_token=None)
        context.catalog.save_datastore(store)
        _settle_later(context, store)
    return {"datastoreId": store.id, "datastoreStatus": "DELETING"}


def recover_datastores(context: Context) -> None:
    """Bring to its end what a killed server left CREATING or DELETING."""
    for status in _SETTLED:
        for store in context.catalog.datastores(status):
            _settle(context, store)


def _status(context: Context, passing: str) -> str:
    """The passing state in slow mode, the state it ends in otherwise."""
    return passing if context.injector.faults.slow_s else _SETTLED[passing]


def _settle_later(context: Context, store: Datastore) -> None:
    if store.status in _SETTLED:
        context.later(lambda: _settle(context, store), lambda: None)


def _settle(context: Context, store: Datastore) -> None:
    context.catalog.save_datastore(replace(store, status=_SETTLED[store.status], updated=context.clock()))


def _differs(store: Datastore, params: Json) -> bool:
    asked = (
        params.get("datastoreName") or store.name,
        params.get("losslessStorageFormat") or "HTJ2K",
        params.get("kmsKeyArn"),
        params.get("lambdaAuthorizerArn"),
    )
    return asked != (store.name, store.storage_format, store.kms_key_arn, store.authorizer_arn)


def _summary(context: Context, store: Datastore) -> Json:
    return {
        "datastoreId": store.id,
        "datastoreName": store.name,
        "datastoreStatus": store.status,
        "datastoreArn": context.datastore_arn(store.id),
        "createdAt": store.created,
        "updatedAt": store.updated,
    }
