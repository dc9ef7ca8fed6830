"""Import jobs as a client sees them: start, wait, read the report. Floor 3."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ahi_ml.client import translated
from ahi_ml.errors import AhiError, ConfigError, ServiceError
from ahi_ml.imports.staging import JobLimits, LocalFile, Staging, bucket_folder, jobs_of, local_files
from ahi_ml.types import PathType

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FileFailure", "ImportPlaces", "ImportReport", "run_import"]

_LOG = logging.getLogger(__name__)
_POLL_S = 0.05
_WATCHED_POLL_S = 0.25  # a job that fails writes no report
_LOOK_S = 0.01
_SLOWEST_POLL_S = 5.0
_REPORT_WAIT_S = 30.0
_MANIFEST = "job-output-manifest.json"
_LONGEST_URI = 1024  # the service's bound


@dataclass(frozen=True, slots=True)
class ImportPlaces:
    """What an import job needs besides its input.

    Parameters
    ----------
    role_arn, output_uri : str or None
        Role to assume, and where to write the report.
    staging_uri : str or None
        Where local files are put while jobs read them.
    machine_bucket : str or None
        Bucket whose keys are paths of this machine: an embedded store reads local folders in place.
    buckets : Path or None
        Folder that stands for S3, where an embedded store's reports are read.
    s3 : callable or None
        Makes the S3 client for everything that is no such folder.
    """

    role_arn: str | None = None
    output_uri: str | None = None
    staging_uri: str | None = None
    machine_bucket: str | None = None
    buckets: Path | None = None
    s3: Callable[[], Any] | None = None


@dataclass(frozen=True, slots=True)
class FileFailure:
    """A file that was not imported, and why."""

    input_file: str
    reason: str


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What one or several import jobs did.

    Parameters
    ----------
    job_ids : tuple of str
        The jobs.
    status : str
        Their last known status.
    scanned, imported : int
        Files seen and files imported.
    image_sets : tuple of str
        Ids of the image sets made or changed.
    failed : tuple of FileFailure
        Files left out.
    warnings : tuple of FileFailure
        Files imported with a remark.
    """

    job_ids: tuple[str, ...]
    status: str
    scanned: int = 0
    imported: int = 0
    image_sets: tuple[str, ...] = ()
    failed: tuple[FileFailure, ...] = ()
    warnings: tuple[FileFailure, ...] = ()

    def __repr__(self) -> str:
        return (
            f"<ImportReport {self.status}: {self.imported:,} of {self.scanned:,} files imported into "
            f"{len(self.image_sets):,} image sets, {len(self.failed):,} failed>"
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row for each file that failed or got a remark. I/O: none."""
        import pandas as pd

        rows = [("failed", each.input_file, each.reason) for each in self.failed]
        rows += [("warning", each.input_file, each.reason) for each in self.warnings]
        return pd.DataFrame(rows, columns=["outcome", "input_file", "reason"])


def run_import(
    client: Any,
    datastore_id: str,
    source: PathType,
    places: ImportPlaces,
    *,
    limits: JobLimits,
    wait: bool,
    progress: bool | None,
) -> ImportReport:
    """Start import jobs and, if asked to, see them through; see `DataStore.import_dicom`."""
    if places.role_arn is None or places.output_uri is None:
        raise ConfigError("on AWS an import needs role_arn= (what HealthImaging assumes) and output_uri= (s3://...)")
    jobs = _Jobs(client, datastore_id, places)
    silent = None if progress is None else not progress
    name = os.fspath(source)
    if name.startswith("s3://"):
        return jobs.run(name, {}, wait=wait, silent=silent)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"no folder {name!r} to import from")
    files = local_files(folder)
    fitting = [file for file in files if file.size <= limits.file_bytes]
    parts = jobs_of(fitting, limits)
    if places.machine_bucket is not None and len(fitting) == len(files) and len(parts) <= 1:
        uri = f"s3://{places.machine_bucket}/{Path(os.path.realpath(folder)).as_posix().lstrip('/')}/"
        if len(uri) <= _LONGEST_URI:
            return jobs.run(uri, None, wait=wait, silent=silent)
    if places.staging_uri is None:
        raise ConfigError(
            f"HealthImaging imports from S3: pass staging_uri='s3://bucket/prefix/' to have {name!r} uploaded there "
            "while it is imported, or upload it and pass its s3:// URI"
        )
    staging = Staging(places.staging_uri, buckets=places.buckets, s3=places.s3)
    too_large = tuple(
        FileFailure(str(file.path), f"the file has more than {limits.file_bytes:,} bytes, the most a job takes")
        for file in files
        if file.size > limits.file_bytes
    )
    reports = [ImportReport((), "COMPLETED", scanned=len(too_large), failed=too_large)]
    with tqdm(
        desc="upload", unit="B", unit_scale=True, total=sum(file.size for file in fitting), disable=silent
    ) as bar:
        for number, part in enumerate(parts):
            reports.append(jobs.run_staged(staging, number, part, bar.update, wait=wait, silent=silent))
    return _together(reports)


class _Jobs:
    """Import jobs of one data store, one after the other: two that add to one series would contend for it."""

    def __init__(self, client: Any, datastore_id: str, places: ImportPlaces) -> None:
        self._client, self._datastore_id, self._places = client, datastore_id, places

    def run_staged(
        self,
        staging: Staging,
        number: int,
        files: list[LocalFile],
        uploaded: Callable[[int], Any],
        *,
        wait: bool,
        silent: bool | None,
    ) -> ImportReport:
        """Upload files, import them, and remove them again unless nobody waits for the job."""
        part = staging.upload(number, files, uploaded)
        try:
            report = self.run(part.uri, part.paths, wait=wait, silent=silent)
        except AhiError:
            staging.remove(part)
            raise
        except BaseException:  # interrupted: the job may be reading them
            _LOG.warning("uploaded files stay at %s: remove them when the import job has ended", part.uri)
            raise
        if wait:
            staging.remove(part)
        return report

    def run(self, uri: str, paths: dict[str, Path] | None, *, wait: bool, silent: bool | None) -> ImportReport:
        """Start a job and see it through.

        Parameters
        ----------
        paths : dict or None
            Local paths of staged keys; None when keys are paths of this machine.
        """
        with translated("StartDICOMImportJob", f"data store {self._datastore_id}"):
            started = self._client.start_dicom_import_job(
                datastoreId=self._datastore_id,
                dataAccessRoleArn=self._places.role_arn,
                inputS3Uri=uri,
                outputS3Uri=self._places.output_uri,
            )
        job_id = started["jobId"]
        if not wait:
            return ImportReport((job_id,), started["jobStatus"])
        with tqdm(desc="import", unit="poll", bar_format="{desc}: {elapsed} {postfix}", disable=silent) as bar:
            job = self._wait(job_id, bar)
            if job["jobStatus"] == "FAILED":
                raise ServiceError(
                    f"import job {job_id}: {job.get('message', 'failed without a message')}",
                    operation="StartDICOMImportJob",
                )
            report = _read_report(job, self._places, paths)
            bar.set_postfix_str(f"{report.imported} of {report.scanned} files")
        return report

    def _wait(self, job_id: str, bar: Any) -> dict[str, Any]:
        started = time.monotonic()
        while True:
            with translated("GetDICOMImportJob", f"job {job_id}"):
                answer = self._client.get_dicom_import_job(datastoreId=self._datastore_id, jobId=job_id)
            job: dict[str, Any] = answer["jobProperties"]
            bar.set_postfix_str(job["jobStatus"])
            if job["jobStatus"] in ("COMPLETED", "FAILED"):
                return job
            report = _Objects(job["outputS3Uri"], self._places)
            # So often that waiting makes no job much longer, and never so often as to be throttled.
            least_s = _WATCHED_POLL_S if report.watched else _POLL_S
            report.expect(_MANIFEST, min(max(least_s, (time.monotonic() - started) / 20), _SLOWEST_POLL_S))


def _together(reports: list[ImportReport]) -> ImportReport:
    return ImportReport(
        job_ids=tuple(job_id for each in reports for job_id in each.job_ids),
        status=reports[-1].status,
        scanned=sum(each.scanned for each in reports),
        imported=sum(each.imported for each in reports),
        image_sets=tuple(dict.fromkeys(image_set for each in reports for image_set in each.image_sets)),
        failed=tuple(failure for each in reports for failure in each.failed),
        warnings=tuple(warning for each in reports for warning in each.warnings),
    )


def _read_report(job: dict[str, Any], places: ImportPlaces, paths: dict[str, Path] | None) -> ImportReport:
    folder = _Objects(job["outputS3Uri"], places)

    def local(key: str) -> str:
        return f"/{key}" if paths is None else str(paths.get(key, key))

    deadline = time.monotonic() + _REPORT_WAIT_S
    while (text := folder.read(_MANIFEST)) is None:  # it can lag behind the job's status
        if time.monotonic() > deadline:
            raise ServiceError(
                f"import job {job['jobId']} is COMPLETED, but its manifest is not at {job['outputS3Uri']} after "
                f"{_REPORT_WAIT_S:.0f} s: read it there later",
                operation="GetDICOMImportJob",
            )
        time.sleep(0.5)
    summary = json.loads(text)["jobSummary"]
    failed = [
        FileFailure(local(line["inputFile"]), line["exception"]["message"])
        for line in folder.lines("FAILURE/failure.ndjson")
    ]
    warned = [
        FileFailure(local(line["inputFile"]), warning["message"])
        for line in folder.lines("WARNING/warning.ndjson")
        for warning in line["importResponse"].get("warnings", ())
    ]
    return ImportReport(
        job_ids=(job["jobId"],),
        status=job["jobStatus"],
        scanned=summary["numberOfScannedFiles"],
        imported=summary["numberOfImportedFiles"],
        image_sets=tuple(each["imageSetId"] for each in summary["imageSetsSummary"]),
        failed=tuple(failed),
        warnings=tuple(warned),
    )


class _Objects:
    """Objects under an ``s3://`` prefix: files of an embedded store's buckets, or S3 itself."""

    def __init__(self, uri: str, places: ImportPlaces) -> None:
        self._bucket, _, self._prefix = uri.removeprefix("s3://").partition("/")
        self._root = bucket_folder(places.buckets, self._bucket, places.s3)
        self._connect_s3 = places.s3
        self._s3: Any = None

    def read(self, name: str) -> str | None:
        """An object's text, or None when it is not there. I/O: one file, or one request to S3."""
        if self._root is not None:
            try:
                return (self._root / self._prefix / name).read_text(encoding="utf-8")
            except FileNotFoundError:
                return None
        if self._s3 is None:
            assert self._connect_s3 is not None
            self._s3 = self._connect_s3()
        with translated("GetObject", f"s3://{self._bucket}/{self._prefix}{name}"):
            try:
                answer = self._s3.get_object(Bucket=self._bucket, Key=f"{self._prefix}{name}")
            except self._s3.exceptions.NoSuchKey:
                return None
            return str(answer["Body"].read().decode("utf-8"))

    @property
    def watched(self) -> bool:
        """Whether looking for an object costs no request."""
        return self._root is not None

    def expect(self, name: str, longest_s: float) -> None:
        """Wait so long, or until an object is there if that can be watched. I/O: one file's status, often."""
        if self._root is None:
            time.sleep(longest_s)
            return
        path = str(self._root / self._prefix / name)
        deadline = time.monotonic() + longest_s
        while (left_s := deadline - time.monotonic()) > 0:
            time.sleep(min(_LOOK_S, left_s))
            if os.path.exists(path):
                return

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The objects of an ndjson file; none when the file is not there. I/O: as `read`."""
        for line in (self.read(name) or "").splitlines():
            if line.strip():
                yield json.loads(line)
