"""Import jobs: start, read, list. The work itself is `ingest`'s."""

from __future__ import annotations

import json
import secrets
from typing import Any

from ahi_ml.local.catalog import Job
from ahi_ml.local.operations.context import Context
from ahi_ml.local.protocol import ServiceFault

__all__ = ["get_dicom_import_job", "list_dicom_import_jobs", "start_dicom_import_job"]

Json = dict[str, Any]
_MOST_JOBS = 100


def start_dicom_import_job(context: Context, params: Json) -> Json:
    """Queue an import; the same ``clientToken`` gives the same job again."""
    with context.catalog.transaction():
        store = context.datastore(params["datastoreId"])
        job = context.catalog.job_by_token(store.id, params["clientToken"])
        configuration = params.get("importConfiguration")
        if job is not None:
            if _differs(job, params, configuration):
                raise ServiceFault(
                    "ConflictException", "The clientToken belongs to an earlier request that had other parameters"
                )
        else:
            running = sum(found.ended is None for found in context.catalog.jobs(store.id))
            if running >= _MOST_JOBS:
                raise ServiceFault("ServiceQuotaExceededException", f"More than {_MOST_JOBS} concurrent import jobs")
            job_id = secrets.token_hex(16)
            job = Job(
                id=job_id,
                datastore_id=store.id,
                name=params.get("jobName"),
                status="SUBMITTED",
                role_arn=params["dataAccessRoleArn"],
                input_uri=params["inputS3Uri"],
                output_uri=_output_uri(params, store.id, job_id),
                submitted=context.clock(),
                client_token=params["clientToken"],
                configuration=_dumped(configuration),
            )
            context.catalog.save_job(job)
            context.jobs.submit(store, job)
    return {"datastoreId": store.id, "jobId": job.id, "jobStatus": "SUBMITTED", "submittedAt": job.submitted}


def _output_uri(params: Json, datastore_id: str, job_id: str) -> str:
    output = params["outputS3Uri"]
    return f"{output}{'' if output.endswith('/') else '/'}{datastore_id}-DicomImport-{job_id}/"


def _dumped(configuration: Json | None) -> str | None:
    return json.dumps(configuration, sort_keys=True) if configuration else None


def _differs(job: Job, params: Json, configuration: Json | None) -> bool:
    asked = (
        params.get("jobName"),
        params["dataAccessRoleArn"],
        params["inputS3Uri"],
        _output_uri(params, job.datastore_id, job.id),
        _dumped(configuration),
    )
    return asked != (job.name, job.role_arn, job.input_uri, job.output_uri, job.configuration)


def get_dicom_import_job(context: Context, params: Json) -> Json:
    """The properties of a job."""
    context.datastore(params["datastoreId"], active=False)
    job = context.catalog.job(params["datastoreId"], params["jobId"])
    if job is None:
        raise ServiceFault("ResourceNotFoundException", f"DICOM import job with id {params['jobId']} does not exist")
    properties = {
        **_summary(job),
        "inputS3Uri": job.input_uri,
        "outputS3Uri": job.output_uri,
        "importConfiguration": json.loads(job.configuration) if job.configuration else None,
    }
    return {"jobProperties": properties}


def list_dicom_import_jobs(context: Context, params: Json) -> Json:
    """A page of jobs, newest first."""
    store = context.datastore(params["datastoreId"], active=False)
    status = params.get("jobStatus")
    jobs, token = context.page(
        params,
        lambda after, limit: context.catalog.jobs(store.id, status, after, limit),
        lambda job: (job.submitted, job.id),
        bound_to=["ListDICOMImportJobs", store.id, status],
    )
    return {"jobSummaries": [_summary(job) for job in jobs], "nextToken": token}


def _summary(job: Job) -> Json:
    return {
        "jobId": job.id,
        "jobName": job.name or job.id,  # the model requires a name in answers and not in requests
        "jobStatus": job.status,
        "datastoreId": job.datastore_id,
        "dataAccessRoleArn": job.role_arn,
        "submittedAt": job.submitted,
        "endedAt": job.ended,
        "message": job.message,
    }
