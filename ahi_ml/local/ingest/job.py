"""An import job from its scan to its report: files in, image sets and ndjson lines out."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
from pydicom.config import IGNORE
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID

from ahi_ml.codec.syntaxes import SYNTAXES
from ahi_ml.errors import LocalStoreError
from ahi_ml.local.blobs import BlobStore
from ahi_ml.local.catalog import Catalog, Datastore, FrameRow, ImageSet, Job, Version
from ahi_ml.local.ingest import frames as pixel_data
from ahi_ml.local.ingest.document import read_levels
from ahi_ml.local.ingest.image_sets import (
    Group,
    Instance,
    add_instance,
    grouping_keys,
    new_document,
    pack,
    search_columns,
    search_tags,
    unpack,
)
from ahi_ml.local.uris import UriMap

__all__ = ["JobFailure", "Limits", "run_job"]

_LOG = logging.getLogger(__name__)
_REQUIRED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_DISCARDED = 0xB006
_BAD_UID = 0xB201
_LONGEST_LOCK_S = 60.0

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Limits:
    """The service's limits of one import job."""

    files: int = 5_000
    job_bytes: int = 10 * 2**30
    file_bytes: int = 10 * 2**30


class JobFailure(Exception):
    """The whole job fails; the text goes into its ``message``."""


class _FileFailure(Exception):
    """One file fails; the text goes into its line of ``failure.ndjson``."""


def run_job(
    catalog: Catalog,
    blobs: BlobStore,
    uris: UriMap,
    store: Datastore,
    job: Job,
    *,
    limits: Limits | None = None,
    workers: int | None = None,
) -> None:
    """Import everything under a job's input URI and write its report.

    I/O: reads the input files, writes blobs, one catalog transaction for each image set, and the
    output folder. Files are parsed and encoded on all cores; one file a core is in memory.

    Raises
    ------
    JobFailure
        Nothing was imported: a limit is passed, or a folder cannot be used.
    """
    limits = limits or Limits()
    try:
        files = _scan(uris.files(job.input_uri), limits)
        output = uris.folder(job.output_uri)
        output.mkdir(parents=True, exist_ok=True)
    except (OSError, LocalStoreError) as error:
        raise JobFailure(f"DICOM import job has failed. ACCESS_DENIED: {error}") from error
    groups: dict[str, Group] = {}
    failures: list[Json] = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1, "ahi-ml-import") as pool:
        parsed = pool.map(lambda file: _parse_or_explain(file[0], file[1], store, blobs), files)
        for (key, _), result in zip(files, parsed, strict=True):
            if isinstance(result, Instance):
                study_key, series_key = grouping_keys(result.levels)
                group = groups.get(series_key)
                if group is None:
                    study, series = (str(result.levels.get(name)) for name in ("StudyInstanceUID", "SeriesInstanceUID"))
                    group = groups[series_key] = Group(study, series, study_key, series_key)
                group.instances.append(result)
            else:
                failures.append(_failure(key, result))
    committed: list[tuple[Group, ImageSet]] = []
    for group in groups.values():
        try:
            committed.append((group, _commit_when_free(catalog, store, group)))
        except Exception as error:
            # One image set that cannot be written must not take the others, and their report, with it.
            _LOG.exception("an image set of job %s could not be written", job.id)
            reason = str(error) if isinstance(error, _Busy) else "the image set could not be written"
            failures += [_failure(instance.key, reason, "InternalServerException") for instance in group.instances]
    _report(output, job, len(files), committed, failures)


def _failure(key: str, reason: str, kind: str = "ValidationException") -> Json:
    return {"inputFile": key, "exception": {"exceptionType": kind, "message": reason}}


def _scan(found: Iterable[tuple[str, Path]], limits: Limits) -> list[tuple[str, Path]]:
    files: list[tuple[str, Path]] = []
    total = 0
    for key, path in found:
        files.append((key, path))
        total += path.stat().st_size
        if len(files) > limits.files:
            raise JobFailure(
                "DICOM import job has failed. FILE_COUNTS_LIMIT_EXCEEDED: more than "
                f"{limits.files} files under the input prefix"
            )
        if total > limits.job_bytes:
            raise JobFailure(
                "DICOM import job has failed. FILE_SIZE_LIMIT_EXCEEDED: more than "
                f"{limits.job_bytes} bytes under the input prefix"
            )
    return files


def _parse_or_explain(key: str, path: Path, store: Datastore, blobs: BlobStore) -> Instance | str:
    try:
        return _parse(key, path, store, blobs)
    except _FileFailure as failure:
        return str(failure)
    except pixel_data.PixelFailure as failure:
        return str(failure)
    except MemoryError:
        return "the file does not fit into memory"
    except Exception as error:
        # Hostile files reach every corner of the parser; whatever it raises, the file is at fault
        # and the job goes on. Values stay out of the text: they may identify a patient.
        _LOG.debug("a file could not be parsed", exc_info=True)
        return f"DICOM attributes cannot be read: {_why(error)}"


def _name(uid: str) -> str:
    """A transfer syntax that the data store does not take, in words."""
    if not re.fullmatch(r"[0-9.]{1,64}", uid):
        return "(no UID)"
    name = UID(uid, validation_mode=IGNORE).name
    return f"{uid} ({'unknown' if name == uid else name})"


def _why(error: Exception) -> str:
    """What a parser's error means, without its own text: that may quote a value."""
    if isinstance(error, RecursionError):
        return "sequences are nested too deeply"
    if isinstance(error, zlib.error):
        return "the deflated data set is damaged"
    if isinstance(error, EOFError):
        return "the file ends inside one of them"
    return "the file is damaged, or its transfer syntax is another than it says"


def _parse(key: str, path: Path, store: Datastore, blobs: BlobStore) -> Instance:
    try:
        dataset = pydicom.dcmread(path)
    except InvalidDicomError:
        raise _FileFailure("DICOM attribute TransferSyntaxUID does not exist") from None
    except OSError as error:
        raise _FileFailure(f"the file cannot be read: {error.strerror or type(error).__name__}") from None
    uid = str(getattr(dataset.file_meta, "TransferSyntaxUID", "") or "")
    if not uid:
        raise _FileFailure("DICOM attribute TransferSyntaxUID does not exist")
    if uid not in SYNTAXES:
        raise _FileFailure(f"transfer syntax {_name(uid)} is not supported")
    if not len(dataset):
        raise _FileFailure("DICOM attributes does not exist: the file ends with its header or inside the data set")
    try:
        levels = read_levels(dataset)
    except ValueError as error:  # its text names no value
        raise _FileFailure(f"DICOM attributes cannot be read: {error}") from error
    for keyword in _REQUIRED:
        if not isinstance(levels.get(keyword), str):
            raise _FileFailure(f"DICOM attribute {keyword} does not exist")
        if len(levels.get(keyword)) > 256:
            raise _FileFailure(f"DICOM attribute {keyword} is longer than 256 characters")
    instance = Instance(key, levels.get("SOPInstanceUID"), levels, "", None, [], [])
    if levels.discarded:
        instance.warnings.append(
            _warning(_DISCARDED, "ElementsDiscarded", f"unreadable values: {', '.join(levels.discarded)}")
        )
    bad = [keyword for keyword in _REQUIRED if set(levels.get(keyword)) - set("0123456789.")]
    if bad:
        instance.warnings.append(_warning(_BAD_UID, "InvalidUIDFormat", f"not a UID: {', '.join(bad)}"))
    if pixel_data.has_pixels(dataset):
        _store_frames(dataset, uid, store, blobs, instance)
    return instance


def _store_frames(dataset: pydicom.Dataset, uid: str, store: Datastore, blobs: BlobStore, instance: Instance) -> None:
    pixels = pixel_data.pixel_format(dataset)
    instance.stored_syntax = pixel_data.stored_syntax(uid, pixels, store.storage_format)
    content_type = SYNTAXES[instance.stored_syntax].content_type
    transcoded = instance.stored_syntax in pixel_data.STORED_SYNTAX.values()
    instance.checksum_type = "DECOMPRESSED" if transcoded else "COMPRESSED"
    for frame in pixel_data.stored_frames(dataset, pixels, store.storage_format):
        row = FrameRow(secrets.token_hex(16), blobs.put(frame.data), content_type)
        instance.rows.append(row)
        entry: Json = {
            "ID": row.frame_id,
            "PixelDataChecksumFromBaseToFullResolution": [
                {"Width": pixels.columns, "Height": pixels.rows, "Checksum": frame.checksum}
            ],
            "MinPixelValue": frame.minimum,
            "MaxPixelValue": frame.maximum,
            "FrameSizeInBytes": len(frame.data),
        }
        instance.frames.append(entry)


def _warning(code: int, kind: str, text: str) -> Json:
    return {"warning_reason_code": code, "type": kind, "message": text}


class _Busy(Exception):
    """The image set is LOCKED by another write; the text goes into the files' lines."""


def _commit_when_free(catalog: Catalog, store: Datastore, group: Group) -> ImageSet:
    """Write a group once no update, copy or deletion holds its image set."""
    deadline = time.monotonic() + _LONGEST_LOCK_S
    while True:
        try:
            return _commit(catalog, store, group)
        except _Busy:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _commit(catalog: Catalog, store: Datastore, group: Group) -> ImageSet:
    """Write one image set, new or as a new version, in one transaction."""
    with catalog.transaction():
        now = round(time.time(), 3)  # what answers show, so that a search by them finds it
        known = catalog.series_image_sets(store.id, group.series_uid)
        same = [found for found in known if found.series_key == group.series_key]
        target = next((found for found in same if found.is_primary), None)
        if target is None and same and any(found.is_primary for found in known):
            target = same[0]  # what contradicts the primary stays together
        if target is not None:
            version_now = catalog.version(target.id, target.version)
            if version_now is not None and version_now.state == "LOCKED":
                raise _Busy(f"image set {target.id} stays locked by another operation")
        if target is None:
            primaries = catalog.primaries(store.id, study_uid=group.study_uid)
            fits = all(p.study_key == group.study_key for p in primaries)
            image_set_id, version, created = secrets.token_hex(16), 1, now
            primary = fits and not any(found.is_primary for found in known)
            document = new_document(store.id, image_set_id, group.series_uid)
        else:
            image_set_id, version, created = target.id, target.version + 1, target.created
            primary = target.is_primary
            body = catalog.document(image_set_id, target.version)
            if body is None:
                raise LocalStoreError(f"image set {image_set_id} has no metadata document")
            document = unpack(body)
        for instance in group.instances:
            add_instance(document, group.series_uid, instance)
            catalog.add_frames(image_set_id, instance.rows)
        workflow = "CREATED" if target is None else "IMPORTED"
        found = ImageSet(
            id=image_set_id,
            datastore_id=store.id,
            is_primary=primary,
            version=version,
            created=created,
            updated=now,
            accessed=now,
            deleted=None,
            study_key=group.study_key,
            series_key=group.series_key,
            tags=search_tags(document),
            **search_columns(document),
        )
        catalog.save_document(image_set_id, version, pack(document))
        catalog.save_version(Version(image_set_id, version, "ACTIVE", workflow, now, None, None, primary))
        catalog.save_image_set(found)
        return found


def _report(
    output: Path, job: Job, scanned: int, committed: list[tuple[Group, ImageSet]], failures: list[Json]
) -> None:
    successes: list[Json] = []
    warned: list[Json] = []
    for group, found in committed:
        response = {"imageSetId": found.id, "imageSetVersion": found.version, "isPrimary": found.is_primary}
        for instance in group.instances:
            line: Json = {"inputFile": instance.key, "importResponse": response}
            successes.append(line)
            if instance.warnings:
                warned.append(
                    {"inputFile": instance.key, "importResponse": {**response, "warnings": instance.warnings}}
                )
    for folder, name, lines in (
        ("SUCCESS", "success", successes),
        ("FAILURE", "failure", failures),
        ("WARNING", "warning", warned),
    ):
        (output / folder).mkdir(exist_ok=True)
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        _write(output / folder / f"{name}.ndjson", text)
    summary = {
        "jobId": job.id,
        "datastoreId": job.datastore_id,
        "inputS3Uri": job.input_uri,
        "outputS3Uri": job.output_uri,
        "successOutputS3Uri": f"{job.output_uri}SUCCESS/",
        "failureOutputS3Uri": f"{job.output_uri}FAILURE/",
        "warningsOutputS3Uri": f"{job.output_uri}WARNING/",
        "numberOfScannedFiles": scanned,
        "numberOfImportedFiles": len(successes),
        "numberOfFilesWithCustomerError": len(failures),
        "numberOfFilesWithServerError": 0,
        "numberOfGeneratedImageSets": len(committed),
        "imageSetsSummary": [
            {
                "imageSetId": found.id,
                "imageSetVersion": found.version,
                "isPrimary": found.is_primary,
                "numberOfMatchedSOPInstances": len(group.instances),
            }
            for group, found in committed
        ],
    }
    _write(output / "job-output-manifest.json", json.dumps({"jobSummary": summary}))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
