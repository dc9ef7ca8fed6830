"""The catalog of an embedded store read with plain SQL: what must hold whatever happened to its server."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

TABLES = ("datastores", "jobs", "image_sets", "versions", "documents", "frames", "tags")


def read_tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row of a copy of the catalog, whose server must be dead or at rest."""
    with tempfile.TemporaryDirectory() as copy:
        for name in ("catalog.sqlite", "catalog.sqlite-wal"):
            if (folder / name).exists():
                shutil.copy(folder / name, copy)
        database = sqlite3.connect(Path(copy, "catalog.sqlite"))
        database.row_factory = sqlite3.Row
        try:
            assert [tuple(row) for row in database.execute("PRAGMA integrity_check")] == [("ok",)]
            if not database.execute("PRAGMA user_version").fetchone()[0]:
                return {table: [] for table in TABLES}  # killed before it was made
            return {table: [dict(row) for row in database.execute(f"SELECT * FROM {table}")] for table in TABLES}
        finally:
            database.close()


def blob_path(folder: Path, name: str) -> Path:
    return folder / "blobs" / name[:1] / name[1:]


def problems(folder: Path, *, settled: bool) -> list[str]:
    """What is wrong with a catalog and its blobs.

    Parameters
    ----------
    settled : bool
        Whether its server has started again: nothing may be left to do.
    """
    tables = read_tables(folder)
    found: list[str] = []

    def expect(holds: Any, what: str) -> None:
        if not holds:
            found.append(what)

    stores = {row["id"]: row for row in tables["datastores"]}
    sets = {row["id"]: row for row in tables["image_sets"]}
    versions: dict[str, list[dict[str, Any]]] = {each: [] for each in sets}
    documents: dict[tuple[str, int], bytes] = {}
    frames: dict[str, dict[str, str]] = {each: {} for each in sets}
    for row in sorted(tables["versions"], key=lambda row: row["version"]):
        expect(row["image_set_id"] in sets, f"version without image set: {row}")
        versions.setdefault(row["image_set_id"], []).append(row)
        expect(row["state"] in ("ACTIVE", "DELETED") or not settled, f"stays {row['state']}: {row}")
    for row in tables["documents"]:
        documents[row["image_set_id"], row["version"]] = row["body"]
        known = [each["version"] for each in versions.get(row["image_set_id"], [])]
        expect(row["version"] in known, f"document without version: {row['image_set_id']} {row['version']}")
    for row in tables["frames"]:
        expect(row["image_set_id"] in sets, f"frame without image set: {row}")
        frames.setdefault(row["image_set_id"], {})[row["frame_id"]] = row["blob"]
    for row in tables["jobs"]:
        expect(row["datastore_id"] in stores, f"job without data store: {row['id']}")
        ended = row["status"] in ("COMPLETED", "FAILED")
        expect(ended == (row["ended"] is not None), f"job is {row['status']} and ended {row['ended']}: {row['id']}")
        expect(ended or not settled, f"job is still {row['status']}: {row['id']}")
    for row in stores.values():
        expect(row["status"] in ("ACTIVE", "DELETED") or not settled, f"data store is {row['status']}: {row['id']}")
    for blob in {blob for named in frames.values() for blob in named.values()}:
        path = blob_path(folder, blob)
        whole = path.is_file() and hashlib.blake2b(path.read_bytes(), digest_size=20).hexdigest() == blob
        expect(whole, f"blob is missing or damaged: {blob}")
    primaries: dict[tuple[str, str], str] = {}
    for set_id, row in sets.items():
        expect(row["datastore_id"] in stores, f"image set without data store: {set_id}")
        mine = versions[set_id]
        numbers = [each["version"] for each in mine]
        expect(numbers == list(range(1, row["version"] + 1)), f"versions of {set_id} are {numbers}")
        if row["deleted"] is not None:
            left = [number for owner, number in documents if owner == set_id]
            tagged = [each for each in tables["tags"] if each["arn"].endswith(set_id)]
            states = {each["state"] for each in mine}
            gone = not left and not frames[set_id] and not tagged and states == {"DELETED"}
            expect(gone, f"{set_id} is deleted, and has left {left}, {len(frames[set_id])} frames, {tagged}, {states}")
            continue
        if row["is_primary"]:
            other = primaries.setdefault((row["datastore_id"], row["series_uid"]), set_id)
            expect(other == set_id, f"{other} and {set_id} are primary image sets of one series")
        expect(stores[row["datastore_id"]]["status"] != "DELETED", f"the data store of {set_id} is deleted")
        _check_image_set(row, mine, documents, frames[set_id], expect)
    return found


def _check_image_set(
    row: dict[str, Any],
    versions: list[dict[str, Any]],
    documents: dict[tuple[str, int], bytes],
    frames: dict[str, str],
    expect: Any,
) -> None:
    set_id, document = row["id"], None
    for version in versions:
        what = f"{set_id} {version['version']} {version['workflow']}"
        own = documents.get((set_id, version["version"]))
        deleting = version["workflow"] == "DELETING"  # its own status is not kept
        if version["workflow"] in ("UPDATING", "UPDATING_FOR_STUDY_CONSISTENCY", "COPYING", "IMPORTING"):
            expect(version["state"] == "LOCKED", f"{what}: {version['state']}")
            expect(own is None, f"{what}: LOCKED, and has its document")
            expect(version is versions[-1], f"{what}: LOCKED, and not the latest")
            continue
        if not deleting:
            failed = version["workflow"].endswith("_FAILED")
            expect(failed == (own is None), f"{what}: document {'missing' if own is None else 'of a failure'}")
            expect(failed == (version["message"] is not None), f"{what}: message {version['message']}")
        if own is not None:
            document = json.loads(gzip.decompress(own))
            owner = (document["DatastoreID"], document["ImageSetID"])
            expect(owner == (row["datastore_id"], set_id), f"{what}: the document of {owner}")
            listed = {
                frame["ID"]
                for series in document["Study"]["Series"].values()
                for instance in series["Instances"].values()
                for frame in instance["ImageFrames"]
            }
            expect(listed <= set(frames), f"{what}: lists frames that it does not have")
    if versions and versions[-1]["state"] != "LOCKED":
        expect(row["updated"] == versions[-1]["updated"], f"{set_id}: updated {row['updated']}")
    if document is None:
        expect(versions[-1]["workflow"] == "COPYING", f"{set_id}: no document at all")
        return
    ((series_uid, series),) = document["Study"]["Series"].items()
    shown = (row["series_uid"], row["patient_id"], json.loads(row["tags"])["DICOMNumberOfStudyRelatedInstances"])
    said = (series_uid, document["Patient"]["DICOM"].get("PatientID"), len(series["Instances"]))
    expect(shown == said, f"{set_id}: found as {shown}, and is {said}")


def blobs_on_disk(folder: Path) -> set[str]:
    """Names of all files among the blobs."""
    root = folder / "blobs"
    return {path.parent.name + path.name for path in root.glob("*/*")} if root.is_dir() else set()


def blobs_in_use(folder: Path) -> set[str]:
    return {row["blob"] for row in read_tables(folder)["frames"]}
