"""An import job from its scan to its report: files in, image sets and ndjson lines out."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from ahi_ml.errors import LocalStoreError
from ahi_ml.local.blobs import BlobStore
from ahi_ml.local.catalog import Catalog, Datastore, Job
from ahi_ml.local.ingest.commit import Busy, commit_group
from ahi_ml.local.ingest.enhance import enhance
from ahi_ml.local.ingest.image_sets import Group, Instance, grouping_keys
from ahi_ml.local.ingest.instances import Refusal, read_instance
from ahi_ml.local.ingest.report import Outcome, write_lines, write_manifest
from ahi_ml.local.settings import Limits
from ahi_ml.local.uris import InputFile, UriMap

__all__ = ["JobFailure", "run_job"]

_LOG = logging.getLogger(__name__)

Json = dict[str, Any]


class JobFailure(Exception):
    """The whole job fails; the text goes into its ``message``."""


def run_job(
    catalog: Catalog,
    blobs: BlobStore,
    uris: UriMap,
    store: Datastore,
    job: Job,
    *,
    limits: Limits | None = None,
    workers: int | None = None,
    stopping: threading.Event | None = None,
    pause: Callable[[], None] | None = None,
) -> Callable[[], None]:
    """Import everything under a job's input URI and write the lines of its report.

    I/O: reads the input files, writes blobs, one catalog transaction for each image set, and the
    report. Files are parsed and encoded on all cores; one file a thread is in memory.

    Parameters
    ----------
    limits : Limits, optional
        The service's by default.
    workers : int, optional
        Threads; one more than cores by default: while one waits for the GIL or the disk, none of them idles.
    stopping : Event, optional
        Once set, the job fails before it has changed an image set, or goes on to its end.
    pause : callable, optional
        Waits while an image set that is there already shows LOCKED and IMPORTING.

    Returns
    -------
    callable
        Writes the manifest, which ends the report; raises OSError.

    Raises
    ------
    JobFailure
        Nothing was imported: a limit is passed, a folder or bucket cannot be used, or the server stops.
    """
    limits = limits or Limits()
    try:
        source, prefix = uris.find(job.input_uri)
        files = _scan(source.files(prefix), limits)
        target, output = uris.find(job.output_uri)
        target.check_writable(output)
    except (OSError, LocalStoreError) as error:
        raise JobFailure(f"DICOM import job has failed. ACCESS_DENIED: {error}") from error
    outcome = Outcome(scanned=len(files))
    mappings = _mappings(job, prefix)
    named = {key for key, _ in mappings}
    groups = _read_all(
        [file for file in files if file.key not in named],
        lambda file: read_instance(file, store, blobs, limits),
        outcome,
        workers or (os.cpu_count() or 1) + 1,
        stopping or threading.Event(),
    )
    for group in groups:
        try:
            found = commit_group(catalog, store, group, pause=pause)
        except Exception as error:
            # One image set that cannot be written must not take the others, and their report, with it.
            _LOG.exception("an image set of job %s could not be written", job.id)
            reason = str(error) if isinstance(error, Busy) else "the image set could not be written"
            for instance in group.instances:
                outcome.fail(instance.key, reason, server=True)
        else:
            written = [(instance.key, instance.warnings) for instance in group.instances]
            outcome.succeed(found, written, instances=len({instance.sop_uid for instance in group.instances}))
    by_key = {file.key: file for file in files}
    for key, mapping in mappings:
        enhance(catalog, store, mapping, key, by_key.get(key), outcome)
    try:
        write_lines(target, output, outcome)
    except OSError as error:
        raise JobFailure(
            f"DICOM import job has failed. The image sets are there, the report could not be written: {error}"
        ) from error
    return partial(write_manifest, target, output, job, outcome)


def _scan(found: Iterable[InputFile], limits: Limits) -> list[InputFile]:
    files: list[InputFile] = []
    folders: set[str] = set()
    total = 0
    for file in found:
        files.append(file)
        folders.add(file.key.rpartition("/")[0])
        total += file.size
        for name, count, most, what in (
            ("FILE_COUNTS", len(files), limits.files, "files"),
            ("FOLDER_COUNTS", len(folders), limits.folders, "folders"),
            ("FILE_SIZE", total, limits.job_bytes, "bytes"),
        ):
            if count > most:
                raise JobFailure(
                    f"DICOM import job has failed. {name}_LIMIT_EXCEEDED: more than {most} {what} under the input "
                    "prefix"
                )
    return files


def _mappings(job: Job, prefix: str) -> list[tuple[str, Json]]:
    """The metadata files that a job names: the key of each, and what it is for."""
    configuration = json.loads(job.configuration) if job.configuration else {}
    listed = configuration.get("dicomJsonMetadataImportConfiguration", {}).get("dicomMetadataMappings", [])
    folder = prefix if not prefix or prefix.endswith("/") else f"{prefix}/"
    return [(folder + mapping["metadataFilePath"].lstrip("/"), mapping) for mapping in listed]


def _read_all(
    files: list[InputFile],
    read: Callable[[InputFile], Instance | Refusal],
    outcome: Outcome,
    workers: int,
    stopping: threading.Event,
) -> list[Group]:
    """Read files on several threads; group the instances, note the refusals."""
    groups: dict[str, Group] = {}
    with ThreadPoolExecutor(workers, "ahi-ml-import") as pool:
        for file, result in zip(files, pool.map(read, files), strict=True):
            if stopping.is_set():
                pool.shutdown(wait=False, cancel_futures=True)
                raise JobFailure("DICOM import job has failed. The server stopped while it ran: start it again")
            if isinstance(result, Refusal):
                outcome.fail(file.key, result.reason, server=result.server)
                continue
            study_key, series_key = grouping_keys(result.levels)
            group = groups.get(series_key)
            if group is None:
                study, series = (str(result.levels.get(name)) for name in ("StudyInstanceUID", "SeriesInstanceUID"))
                group = groups[series_key] = Group(study, series, study_key, series_key)
            group.instances.append(result)
    return list(groups.values())
