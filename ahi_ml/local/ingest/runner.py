"""The queue of import jobs: one runs at a time, in a thread, and every job reaches an end state."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from ahi_ml.errors import ConfigError
from ahi_ml.local import memory
from ahi_ml.local.blobs import BlobStore
from ahi_ml.local.catalog import Catalog, Datastore, Job
from ahi_ml.local.files import REGION, StoreFolder
from ahi_ml.local.ingest.job import JobFailure, run_job
from ahi_ml.local.injector import Injector
from ahi_ml.local.settings import Settings
from ahi_ml.local.uris import UriMap

__all__ = ["JobRunner"]

_LOG = logging.getLogger(__name__)
_UNSAYABLE = re.compile(r"[^\w -:`]", re.ASCII)  # what the service's model keeps out of messages


class JobRunner:
    """Runs the jobs of a store one after the other, in a thread of its own.

    Parameters
    ----------
    catalog, blobs
        What `run_job` takes.
    folder : StoreFolder
        Holds the buckets and the settings.
    injector : Injector
        Says how slow jobs are.
    """

    def __init__(self, catalog: Catalog, blobs: BlobStore, folder: StoreFolder, injector: Injector) -> None:
        self._catalog, self._blobs, self._folder, self._injector = catalog, blobs, folder, injector
        self._queue = ThreadPoolExecutor(1, "ahi-ml-jobs")
        self._pending = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        for name in ("import-reports", "import-staging"):  # what this package's own client names
            (folder.buckets / name).mkdir(mode=0o700, parents=True, exist_ok=True)

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
        """Drop queued jobs, stop the running one unless it writes image sets already, and wait for it."""
        self._stopping.set()
        self._queue.shutdown(wait=True, cancel_futures=True)

    def _run(self, store: Datastore, job: Job) -> None:
        try:
            self._run_to_its_end(store, job)
        finally:
            with self._lock:
                self._pending -= 1
                idle = not self._pending
            if idle:
                memory.give_back()

    def _run_to_its_end(self, store: Datastore, job: Job) -> None:
        self._wait()
        job = self._catalog.update_job(job, status="IN_PROGRESS")
        self._wait()
        try:
            settings = Settings.read(self._folder.settings)
            write_manifest = run_job(
                self._catalog,
                self._blobs,
                self._uris(settings),
                store,
                job,
                limits=settings.limits,
                stopping=self._stopping,
                pause=self._wait if self._injector.faults.slow_s else None,
            )
            lag_s = self._injector.faults.manifest_lag_s
            if not lag_s:
                write_manifest()
        except JobFailure as failure:
            self._end(job, "FAILED", str(failure))
        except OSError as error:
            self._end(job, "FAILED", f"DICOM import job has failed. Its manifest could not be written: {error}")
        except ConfigError:
            _LOG.exception("import job %s", job.id)
            self._end(job, "FAILED", "DICOM import job has failed. The settings of the store cannot be read")
        except Exception as error:
            _LOG.exception("import job %s", job.id)
            self._end(job, "FAILED", f"DICOM import job has failed. Internal error ({type(error).__name__})")
        else:
            self._end(job, "COMPLETED", None)
            if lag_s:
                self._stopping.wait(lag_s)
                write_manifest()

    def _uris(self, settings: Settings) -> UriMap:
        if not settings.s3:
            return UriMap(self._folder.buckets)
        from ahi_ml.local.s3 import S3Bucket, connect_s3  # costs a tenth of a second, and few need it

        client = None

        def bucket(name: str) -> S3Bucket:
            nonlocal client
            client = client or connect_s3(REGION, connections=os.cpu_count() or 1)
            return S3Bucket(client, name)

        return UriMap(self._folder.buckets, bucket)

    def _wait(self) -> None:
        """Take the time that slow mode asks for; a server that stops does not wait."""
        if slow_s := self._injector.faults.slow_s:
            self._stopping.wait(slow_s)

    def _end(self, job: Job, status: str, message: str | None) -> None:
        if message is not None:
            message = _UNSAYABLE.sub(" ", message)[:2048]
        self._catalog.update_job(job, status=status, ended=time.time(), message=message)
