"""The report of an import job: a manifest and ndjson lines, in the service's form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ahi_ml.local.catalog import ImageSet, Job
from ahi_ml.local.uris import Bucket

__all__ = ["Outcome", "write_lines", "write_manifest"]

Json = dict[str, Any]
_CUSTOMER, _SERVER = "ValidationException", "InternalServerException"


@dataclass(slots=True)
class Outcome:
    """What a job did, file by file.

    Parameters
    ----------
    scanned : int
        Files found.
    successes, failures, warnings : list of dict
        Lines of the three reports.
    image_sets : list of (ImageSet, int)
        Image sets made or changed, with the number of instances each got.
    """

    scanned: int = 0
    successes: list[Json] = field(default_factory=list)
    failures: list[Json] = field(default_factory=list)
    warnings: list[Json] = field(default_factory=list)
    image_sets: list[tuple[ImageSet, int]] = field(default_factory=list)

    def fail(self, key: str, reason: str, *, server: bool = False) -> None:
        """Note a file that was not imported."""
        exception = {"exceptionType": _SERVER if server else _CUSTOMER, "message": reason}
        self.failures.append({"inputFile": key, "exception": exception})

    def succeed(self, found: ImageSet, files: Sequence[tuple[str, list[Json]]], *, instances: int) -> None:
        """Note files, each with its warnings, that went into an image set: several may be of one instance."""
        response = {"imageSetId": found.id, "imageSetVersion": found.version, "isPrimary": found.is_primary}
        for key, warnings in files:
            self.successes.append({"inputFile": key, "importResponse": response})
            if warnings:
                self.warnings.append({"inputFile": key, "importResponse": {**response, "warnings": warnings}})
        self.image_sets.append((found, instances))


def write_lines(bucket: Bucket, prefix: str, outcome: Outcome) -> None:
    """Write the lines of the three reports. I/O: three objects."""
    for name, lines in (
        ("success", outcome.successes),
        ("failure", outcome.failures),
        ("warning", outcome.warnings),
    ):
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        bucket.write(f"{prefix}{name.upper()}/{name}.ndjson", text)


def write_manifest(bucket: Bucket, prefix: str, job: Job, outcome: Outcome) -> None:
    """Write the summary, which says that the lines are complete. I/O: one object."""
    servers = sum(line["exception"]["exceptionType"] == _SERVER for line in outcome.failures)
    summary = {
        "jobId": job.id,
        "datastoreId": job.datastore_id,
        "inputS3Uri": job.input_uri,
        "outputS3Uri": job.output_uri,
        "successOutputS3Uri": f"{job.output_uri}SUCCESS/",
        "failureOutputS3Uri": f"{job.output_uri}FAILURE/",
        "warningsOutputS3Uri": f"{job.output_uri}WARNING/",
        "numberOfScannedFiles": outcome.scanned,
        "numberOfImportedFiles": len({line["inputFile"] for line in outcome.successes}),
        "numberOfFilesWithCustomerError": len(outcome.failures) - servers,
        "numberOfFilesWithServerError": servers,
        "numberOfGeneratedImageSets": len({found.id for found, _ in outcome.image_sets}),
        "imageSetsSummary": [
            {
                "imageSetId": found.id,
                "imageSetVersion": found.version,
                "isPrimary": found.is_primary,
                "numberOfMatchedSOPInstances": count,
            }
            for found, count in outcome.image_sets
        ],
    }
    bucket.write(f"{prefix}job-output-manifest.json", json.dumps({"jobSummary": summary}))
