"""Import jobs as a client sees them: start, wait, read the report. Floor 3."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from ahi_ml.client import translated
from ahi_ml.errors import ConfigError, ServiceError
from ahi_ml.types import PathType

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FileFailure", "ImportPlaces", "ImportReport", "run_import"]

_POLL_S = 0.05
_SLOWEST_POLL_S = 5.0
_REPORT_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class ImportPlaces:
    """What an import job needs besides its input.

    Parameters
    ----------
    role_arn, output_uri : str or None
        Role to assume, and where to write the report.
    machine_bucket : str or None
        Bucket whose keys are paths of this machine: an embedded store reads local folders in place.
    buckets : Path or None
        Folder that stands for S3, where reports of an embedded store are read.
    s3 : callable or None
        Makes the S3 client that reads the reports of the service.
    """

    role_arn: str | None = None
    output_uri: str | None = None
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
    """What an import job did.

    Parameters
    ----------
    job_id, status : str
        The job and its last known status.
    scanned, imported : int
        Files seen and files imported.
    image_sets : tuple of str
        Ids of the image sets made or changed.
    failed : tuple of FileFailure
        Files left out.
    warnings : tuple of FileFailure
        Files imported with a remark.
    """

    job_id: str
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
    wait: bool,
    progress: bool | None,
) -> ImportReport:
    """Start an import job and, if asked to, see it through; see `DataStore.import_dicom`."""
    if places.role_arn is None or places.output_uri is None:
        raise ConfigError("on AWS an import needs role_arn= (what HealthImaging assumes) and output_uri= (s3://...)")
    input_uri = _input_uri(source, places)
    with translated("StartDICOMImportJob", f"data store {datastore_id}"):
        started = client.start_dicom_import_job(
            datastoreId=datastore_id,
            dataAccessRoleArn=places.role_arn,
            inputS3Uri=input_uri,
            outputS3Uri=places.output_uri,
        )
    job_id = started["jobId"]
    if not wait:
        return ImportReport(job_id, started["jobStatus"])
    with tqdm(
        desc="import",
        unit="poll",
        bar_format="{desc}: {elapsed} {postfix}",
        disable=None if progress is None else not progress,
    ) as bar:
        job = _wait(client, datastore_id, job_id, bar)
        if job["jobStatus"] == "FAILED":
            raise ServiceError(
                f"import job {job_id}: {job.get('message', 'failed without a message')}",
                operation="StartDICOMImportJob",
            )
        report = _read_report(job, places)
        bar.set_postfix_str(f"{report.imported} of {report.scanned} files")
    return report


def _input_uri(source: PathType, places: ImportPlaces) -> str:
    name = os.fspath(source)
    if name.startswith("s3://"):
        return name
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"no folder {name!r} to import from")
    if places.machine_bucket is None:
        raise ConfigError(f"HealthImaging imports from S3: upload {name!r} and pass its s3:// URI")
    path = Path(os.path.realpath(folder)).as_posix().lstrip("/")
    uri = f"s3://{places.machine_bucket}/{path}/"
    if len(uri) > 1024:
        raise ConfigError(f"the path {name!r} is too long to be imported from")
    return uri


def _wait(client: Any, datastore_id: str, job_id: str, bar: Any) -> dict[str, Any]:
    pause = _POLL_S
    while True:
        with translated("GetDICOMImportJob", f"job {job_id}"):
            job: dict[str, Any] = client.get_dicom_import_job(datastoreId=datastore_id, jobId=job_id)["jobProperties"]
        bar.set_postfix_str(job["jobStatus"])
        if job["jobStatus"] in ("COMPLETED", "FAILED"):
            return job
        time.sleep(pause)
        pause = min(pause * 1.3, _SLOWEST_POLL_S)


def _read_report(job: dict[str, Any], places: ImportPlaces) -> ImportReport:
    folder = _Objects(job["outputS3Uri"], places)
    deadline = time.monotonic() + _REPORT_WAIT_S
    while (text := folder.read("job-output-manifest.json")) is None:  # it can lag behind the job's status
        if time.monotonic() > deadline:
            raise ServiceError(
                f"import job {job['jobId']} is COMPLETED, but its manifest is not at {job['outputS3Uri']} after "
                f"{_REPORT_WAIT_S:.0f} s: read it there later",
                operation="GetDICOMImportJob",
            )
        time.sleep(0.5)
    summary = json.loads(text)["jobSummary"]
    failed = [
        FileFailure(line["inputFile"], line["exception"]["message"]) for line in folder.lines("FAILURE/failure.ndjson")
    ]
    warned = [
        FileFailure(line["inputFile"], warning["message"])
        for line in folder.lines("WARNING/warning.ndjson")
        for warning in line["importResponse"].get("warnings", ())
    ]
    return ImportReport(
        job_id=job["jobId"],
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
        self._root = places.buckets
        self._connect_s3 = places.s3
        self._s3: Any = None

    def read(self, name: str) -> str | None:
        """An object's text, or None when it is not there. I/O: one file, or one request to S3."""
        if self._root is not None:
            try:
                return (self._root / self._bucket / self._prefix / name).read_text(encoding="utf-8")
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

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The objects of an ndjson file; none when the file is not there. I/O: as `read`."""
        for line in (self.read(name) or "").splitlines():
            if line.strip():
                yield json.loads(line)
