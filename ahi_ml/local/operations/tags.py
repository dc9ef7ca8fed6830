"""Tags of data stores and image sets."""

from __future__ import annotations

from typing import Any

from ahi_ml.local.operations.context import Context
from ahi_ml.local.protocol import ServiceFault

__all__ = ["list_tags_for_resource", "tag_resource", "untag_resource"]

Json = dict[str, Any]
_MOST_TAGS = 50


def _resource(context: Context, params: Json) -> str:
    arn = str(params["resourceArn"])
    _, datastore_id, *rest = arn.split(":", 5)[5].split("/")
    # A data store has its tags while it is made and unmade, too: these operations know no conflict.
    store = context.datastore(datastore_id, active=False)
    if rest:
        context.image_set(datastore_id, rest[1], active=False)
        known = context.image_set_arn(datastore_id, rest[1])
    else:
        known = context.datastore_arn(datastore_id)
    if arn != known or store.status == "DELETED":
        raise ServiceFault("ResourceNotFoundException", "The resource of this ARN does not exist")
    return arn


def tag_resource(context: Context, params: Json) -> Json:
    """Add tags to a resource, or replace their values."""
    with context.catalog.transaction():
        arn = _resource(context, params)
        tags = {**context.catalog.tags(arn), **params["tags"]}
        if len(tags) > _MOST_TAGS:
            raise ServiceFault("ValidationException", f"A resource has at most {_MOST_TAGS} tags")
        context.catalog.set_tags(arn, tags)
    return {}


def untag_resource(context: Context, params: Json) -> Json:
    """Remove tags from a resource."""
    with context.catalog.transaction():
        context.catalog.drop_tags(_resource(context, params), params["tagKeys"])
    return {}


def list_tags_for_resource(context: Context, params: Json) -> Json:
    """The tags of a resource."""
    return {"tags": context.catalog.tags(_resource(context, params))}
