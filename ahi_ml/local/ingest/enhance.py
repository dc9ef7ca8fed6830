"""JSON metadata of an import job: elements that enhance what is in the data store.

The service has not published the schema of these files. Here one is a tree of elements as
UpdateImageSetMetadata takes it, and it is merged like a forced update.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ahi_ml.local import edits
from ahi_ml.local.catalog import Catalog, Datastore
from ahi_ml.local.ingest.commit import Busy, change_image_set
from ahi_ml.local.ingest.report import Outcome
from ahi_ml.local.uris import InputFile

__all__ = ["enhance"]

_MOST_BYTES = 50 * 2**20  # the service's bound of a metadata document

Json = dict[str, Any]


def enhance(catalog: Catalog, store: Datastore, mapping: Json, key: str, file: InputFile | None, out: Outcome) -> None:
    """Merge a metadata file into the primary image sets of its study, or of one series of it.

    I/O: reads the file, and the catalog. What fails becomes the file's line of the report.

    Parameters
    ----------
    mapping : dict
        ``studyInstanceUID`` and, for one series, ``seriesInstanceUID``.
    key : str
        Of the metadata file, for the report.
    file : InputFile or None
        None when there is none at that key.
    """
    if file is None:
        out.fail(key, "the metadata file does not exist")
        return
    if file.size > _MOST_BYTES:
        out.fail(key, f"a metadata file has at most {_MOST_BYTES} bytes")
        return
    try:
        with file.open() as stream:
            tree = edits.parse_tree(stream.read(), "the metadata file")
        edits.check(tree, "the metadata file", force=True, primary=True)
    except (edits.InvalidEdit, OSError) as error:
        out.fail(key, str(error))
        return
    series_uid = mapping.get("seriesInstanceUID")
    found = catalog.primaries(store.id, study_uid=mapping["studyInstanceUID"])
    found = [each for each in found if series_uid is None or each.series_uid == series_uid]
    if not found:
        out.fail(key, "the data store has no primary image set of that study or series")
    for each in found:
        change = partial(edits.apply_updates, tree=_part(tree, each.series_uid))
        try:
            changed = change_image_set(catalog, each, change)
        except (edits.EditFailure, Busy) as error:
            out.fail(key, str(error), server=isinstance(error, Busy))
        else:
            out.succeed(changed, [(key, [])], instances=1)


def _part(tree: Json, series_uid: str | None) -> Json:
    """What a tree says of one series, its study and its patient."""
    study = tree.get("Study")
    if not study or "Series" not in study:
        return tree
    series = {uid: node for uid, node in study["Series"].items() if uid == series_uid}
    return {**tree, "Study": {**study, "Series": series}}
