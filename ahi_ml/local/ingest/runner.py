"""The queue of import jobs: one runs at a time, in a thread, and every job reaches an end state."""

from __future__ import annotations

import logging
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from ahi_ml.local.blobs import BlobStore
from ahi_ml.local.catalog import Catalog, Datastore, Job
from ahi_ml.local.ingest.job import JobFailure, Limits, run_job
from ahi_ml.local.uris import UriMap

__all__ = ["JobRunner"]

_LOG = logging.getLogger(__name__)
_UNSAYABLE = re.compile(r"[^\w -:`]", re.ASCII)  # what the service's model keeps out of messages


class JobRunner:
    """Runs the jobs of a store one after the other, in a thread of its own.

    Parameters
    ----------
    catalog, blobs, uris, limits
        What `run_job` takes.
    """

    def __init__(self, catalog: Catalog, blobs: BlobStore, uris: UriMap, limits: Limits) -> None:
        self._catalog, self._blobs, self._uris, self._limits = catalog, blobs, uris, limits
        self._queue = ThreadPoolExecutor(1, "ahi-ml-jobs")
        self._pending = 0
        self._lock = threading.Lock()

    @property
    def idle(self) -> bool:
        """Whether every submitted job has ended."""
        return self._pending == 0

    def recover(self) -> None:
        """End the jobs that an earlier server did not: nothing of them is half visible."""
        for status in ("SUBMITTED", "IN_PROGRESS"):
            for job in self._catalog.jobs(status=status):
                self._end(
                    job,
                    "FAILED",
                    "DICOM import job has failed. The server stopped while it ran: start it again",
                )

    def submit(self, store: Datastore, job: Job) -> None:
        """Queue a job that is saved as SUBMITTED."""
        with self._lock:
            self._pending += 1
        self._queue.submit(self._run, store, job)

    def close(self) -> None:
        """Drop queued jobs and wait for the running one."""
        self._queue.shutdown(wait=True, cancel_futures=True)

    def _run(self, store: Datastore, job: Job) -> None:
        try:
            self._run_to_its_end(store, job)
        finally:
            with self._lock:
                self._pending -= 1

    def _run_to_its_end(self, store: Datastore, job: Job) -> None:
        job = self._catalog.update_job(job, status="IN_PROGRESS")
        try:
            run_job(self._catalog, self._blobs, self._uris, store, job, limits=self._limits)
        except JobFailure as failure:
            self._end(job, "FAILED", str(failure))
        except Exception as error:
            _LOG.exception("import job %s", job.id)
            self._end(job, "FAILED", f"DICOM import job has failed. Internal error ({type(error).__name__})")
        else:
            self._end(job, "COMPLETED", None)

    def _end(self, job: Job, status: str, message: str | None) -> None:
        if message is not None:
            message = _UNSAYABLE.sub(" ", message)[:2048]
        self._catalog.update_job(job, status=status, ended=time.time(), message=message)
