"""`connect` and `DataStore`: the one way in, whether the data store is AWS's or a folder. Floor 4."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ahi_ml.cache import FrameCache
from ahi_ml.client import AccessKeys, BestTransport, Connection, Service, make_connection, make_s3_client, translated
from ahi_ml.config import Quota, rate_limits, store_folder
from ahi_ml.errors import ConfigError
from ahi_ml.imports import ImportPlaces, ImportReport, run_import
from ahi_ml.imports.staging import JobLimits
from ahi_ml.perprocess import PerProcess
from ahi_ml.reader import Reader
from ahi_ml.reader.prefetch import Prefetched, prefetch
from ahi_ml.search import Search, make_search
from ahi_ml.types import PathType, RateLimit

if TYPE_CHECKING:
    from ahi_ml.index import DatasetIndex
    from ahi_ml.local.process import Lease

__all__ = ["DataStore", "connect"]

_ID = re.compile(r"[0-9a-z]{32}")
_DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Target:
    """What `connect` was asked for: all that a pickled `DataStore` carries.

    Parameters
    ----------
    datastore_id : str or None
        Of a data store of the service.
    folder : Path or None
        Of an embedded store.
    name : str
        Data store of that folder.
    service : Service
        Region, profile and endpoint.
    cache : str or None
        Folder or URL given for the cache.
    limits : dict or None
        Quotas to keep, by operation.
    """

    datastore_id: str | None
    folder: Path | None
    name: str = _DEFAULT
    service: Service = field(default_factory=Service)
    cache: str | None = None
    limits: dict[str, Quota] | None = field(default=None, hash=False)


@dataclass(slots=True)
class _Session:
    """One process's connection."""

    connection: Connection
    datastore_id: str
    endpoint_url: str
    reader: Reader
    places: ImportPlaces
    environment: dict[str, str]
    lease: Lease | None = None


class DataStore:
    """A data store of AWS HealthImaging, or an embedded one that answers alike.

    Made by `connect`. It pickles to what it was connected with (for a folder: its path), and each
    process connects for itself on first use.

    Attributes
    ----------
    progress : bool or None
        Whether long work shows progress bars: None shows them in terminals and notebooks.
    """

    def __init__(self, target: Target, *, faults: Mapping[str, Any] | None = None, create: bool = True) -> None:
        self._target = target
        self._faults = dict(faults) if faults else None
        self._create = create
        self._sessions = PerProcess(self._open, lambda session: session.connection.leave())
        self.progress: bool | None = None
        self.cache = FrameCache.at(target.cache)

    def __repr__(self) -> str:
        target = self._target
        place = repr(str(target.folder)) if target.folder else target.datastore_id
        name = f", datastore={target.name!r}" if target.folder and target.name != _DEFAULT else ""
        return f"<DataStore {place}{name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        self._sessions.leave()
        return _reconnect, (self._target,)

    def __enter__(self) -> DataStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Connection

    def _open(self) -> _Session:
        return self._open_folder() if self._target.folder is not None else self._open_service()

    def _open_service(self) -> _Session:
        target = self._target
        assert target.datastore_id is not None
        connection = make_connection(target.service, limits=target.limits)
        region = connection.client.meta.region_name
        places = ImportPlaces(s3=lambda: make_s3_client(region, target.service.profile))
        return self._session(connection, target.datastore_id, places, {})

    def _open_folder(self) -> _Session:
        from ahi_ml.local import process
        from ahi_ml.local.uris import MACHINE_BUCKET

        target = self._target
        assert target.folder is not None
        lease = process.attach(target.folder, create=self._create, faults=self._faults)
        endpoint, keys = lease.endpoint, lease.keys
        service = Service(
            region=endpoint.region,
            endpoint_url=endpoint.url,
            keys=AccessKeys(keys.access_key_id, keys.secret_access_key),
        )
        connection = make_connection(service, limits=target.limits)
        places = ImportPlaces(
            role_arn=f"arn:aws:iam::{endpoint.account}:role/embedded-store",
            output_uri="s3://import-reports/",
            staging_uri="s3://import-staging/",
            machine_bucket=MACHINE_BUCKET,
            buckets=target.folder / "s3",
            s3=lambda: make_s3_client(endpoint.region),
        )
        datastore_id = _named_datastore(connection.client, target.name, create=self._create)
        session = self._session(connection, datastore_id, places, process.environment(endpoint, keys))
        return replace(session, lease=lease)

    def _session(
        self, connection: Connection, datastore_id: str, places: ImportPlaces, environment: dict[str, str]
    ) -> _Session:
        reader = Reader(BestTransport(connection, datastore_id), datastore_id)
        return _Session(connection, datastore_id, connection.client.meta.endpoint_url, reader, places, environment)

    @property
    def _here(self) -> _Session:
        return self._sessions.get()

    @property
    def client(self) -> Any:
        """The boto3 client of this process, good for all operations of the service. I/O: connects."""
        return self._here.connection.client

    @property
    def datastore_id(self) -> str:
        """The 32-character id. I/O: connects, for a folder."""
        return self._target.datastore_id or self._here.datastore_id

    @property
    def endpoint_url(self) -> str:
        """Where requests go. I/O: connects."""
        return self._here.endpoint_url

    @property
    def reader(self) -> Reader:
        """The frame reader of this process. I/O: connects."""
        return self._here.reader

    def environment(self) -> dict[str, str]:
        """Variables with which any other AWS client reaches an embedded store.

        I/O: connects. They hold the store's secret key: hand them to your own processes only.

        Raises
        ------
        ConfigError
            The data store is not an embedded one; AWS clients reach it by themselves.
        """
        if self._target.folder is None:
            raise ConfigError("environment() is for embedded stores; AWS clients find AWS by themselves")
        return dict(self._here.environment)

    def close(self) -> None:
        """Let go of this process's connection; using the store again reconnects. I/O: none."""
        session = self._sessions.take()
        if session is not None:
            session.reader.close()
            session.connection.client.close()
            if session.lease is not None:
                session.lease.close()

    # Work

    def search(
        self,
        *,
        patient_id: str | None = None,
        accession_number: str | None = None,
        study_id: str | None = None,
        study_instance_uid: str | None = None,
        series_instance_uid: str | None = None,
        study_date: str | date | tuple[Any, Any] | None = None,
        created: tuple[datetime, datetime] | None = None,
        updated: tuple[datetime, datetime] | None = None,
        primary: bool | None = True,
    ) -> Search:
        """What to look for, by what the service can filter; at most two filters.

        I/O: none; nothing is sent before a result is asked for. Narrow further with ``.where()``.

        Parameters
        ----------
        patient_id, accession_number, study_id, study_instance_uid, series_instance_uid : str, optional
            Exact values.
        study_date : date, str or pair of them, optional
            A day, or first and last day, ``YYYYMMDD``.
        created, updated : pair of datetime, optional
            First and last moment.
        primary : bool or None
            Keep primary image sets (True), the others (False), or all (None).

        Raises
        ------
        ConfigError
            More than two filters, or a date that is none.
        """
        return make_search(
            _ClientOf(self),
            self.datastore_id,
            patient_id=patient_id,
            accession_number=accession_number,
            study_id=study_id,
            study_instance_uid=study_instance_uid,
            series_instance_uid=series_instance_uid,
            study_date=study_date,
            created=created,
            updated=updated,
            primary=primary,
            progress=self.progress,
        )

    def prefetch(
        self, index: DatasetIndex, *, cache: FrameCache | None = None, progress: bool | None = None
    ) -> Prefetched:
        """Bring every frame of an index into the cache, verified, so that later epochs need no network.

        I/O: one look at the cache a frame, and one request for each that is not there.

        Parameters
        ----------
        index : DatasetIndex
            Which frames.
        cache : FrameCache, optional
            Where to; the store's own by default.
        progress : bool, optional
            Show a progress bar.

        Returns
        -------
        Prefetched
            Counts, and an error for each frame that could not be read.

        Raises
        ------
        CacheError
            Others can look into the folder.
        """
        return prefetch(
            self.reader, index, cache or self.cache, progress=self.progress if progress is None else progress
        )

    def import_dicom(
        self,
        source: PathType,
        *,
        role_arn: str | None = None,
        output_uri: str | None = None,
        staging_uri: str | None = None,
        limits: JobLimits | None = None,
        wait: bool = True,
        progress: bool | None = None,
    ) -> ImportReport:
        """Import DICOM files into the data store.

        I/O: one import job; for a local folder as many, one after the other, as the limits of a job
        ask for. On AWS its files are uploaded to `staging_uri` and removed from there when their job
        has ended (not without `wait`: then they stay). An embedded store reads a folder in place that
        is one job's, and links or copies the files of larger ones.

        Parameters
        ----------
        source : path or ``s3://`` URI
            A folder, scanned recursively whatever the file names are, or a prefix in S3.
        role_arn, output_uri : str, optional
            Role the service assumes and where it writes its report: needed on AWS, known to an
            embedded store.
        staging_uri : str, optional
            ``s3://`` prefix to upload local files to; the role must be able to read there.
        limits : JobLimits, optional
            What goes into one job, for accounts whose quotas differ from 5,000 files, 10 GiB, and 10 GiB a file.
        wait : bool
            Wait for the jobs to end and read their reports.
        progress : bool, optional
            Show a progress bar.

        Returns
        -------
        ImportReport
            Counts, image sets, and a reason for every file that was not imported.

        Raises
        ------
        ConfigError
            No such folder, or a missing `role_arn`, `output_uri` or `staging_uri`.
        ServiceError
            The data store or S3 said no, or a whole job failed: what earlier jobs imported stays.
        """
        session = self._here
        places = replace(
            session.places,
            role_arn=role_arn or session.places.role_arn,
            output_uri=output_uri or session.places.output_uri,
            staging_uri=staging_uri or session.places.staging_uri,
        )
        shown = self.progress if progress is None else progress
        limits = limits or JobLimits()
        return run_import(
            session.connection.client, session.datastore_id, source, places, limits=limits, wait=wait, progress=shown
        )


@dataclass(frozen=True, slots=True)
class _ClientOf:
    """A recipe for this process's client: a search holds it instead of a client."""

    store: DataStore

    def __call__(self) -> Any:
        return self.store.client


def _reconnect(target: Target) -> DataStore:
    # A folder that is absent where this is unpickled is a mistake, not a wish for an empty store.
    return DataStore(target, create=False)


def _named_datastore(client: Any, name: str, *, create: bool) -> str:
    with translated("ListDatastores"):
        for page in client.get_paginator("list_datastores").paginate(datastoreStatus="ACTIVE"):
            for summary in page["datastoreSummaries"]:
                if summary["datastoreName"] == name:
                    return str(summary["datastoreId"])
        if not create:
            raise ConfigError(f"the embedded store has no data store named {name!r}")
        # The token makes one data store of several openers' requests.
        made = client.create_datastore(datastoreName=name, clientToken=f"ahi-ml-{name}"[:64])
    return str(made["datastoreId"])


def connect(
    target: PathType,
    *,
    region: str | None = None,
    profile: str | None = None,
    endpoint_url: str | None = None,
    config: Any = None,
    datastore: str = _DEFAULT,
    cache: PathType | None = None,
    rate_limit: RateLimit | None = None,
    faults: Mapping[str, Any] | None = None,
    create: bool = True,
) -> DataStore:
    """Open a data store: one of AWS HealthImaging, or an embedded one in a folder.

    I/O: for a folder, joins or starts its server (ready when this returns) and makes the folder when
    absent. For an id, none: the first use connects.

    Parameters
    ----------
    target : str or path
        A 32-character data store id means AWS. Anything else is the folder of an embedded store; a
        `Path` always is.
    region, profile, endpoint_url : str, optional
        As boto3 takes them, for an id. ``endpoint_url`` reaches a running ``ahi-ml serve``.
    config : botocore.config.Config, optional
        For an id: client certificates, proxies, and whatever else boto3 takes so. It travels in pickles.
    datastore : str
        Which data store of a folder; made when absent.
    cache : path or str, optional
        Folder of the frame cache; else ``AHI_ML_CACHE``, else the user's cache folder. A URL such as
        ``s3://bucket/prefix`` keeps frames there as well as in the folder.
    rate_limit : float or mapping, optional
        The account's quotas, where they differ from the service's defaults: frames a second, or a mapping of
        operations to requests a second or to these and the burst; else ``AHI_ML_RATE_LIMIT``. What is not named has
        the service's default at an endpoint of AWS, and no limit elsewhere; ``math.inf`` lifts one. All processes of
        a machine keep them together.
    faults : mapping, optional
        Slows an embedded store down or makes it fail, for tests: ``{"latency_ms": 30}``.
    create : bool
        Whether a folder, and a data store in it, that is absent is made.

    Returns
    -------
    DataStore

    Raises
    ------
    ConfigError
        Options that do not go together, a string that looks like a mistyped id, or a folder that
        cannot be used.
    LocalStoreError
        The embedded store's server does not start.
    """
    name = os.fspath(target)
    cache_place = os.fspath(cache) if cache is not None else None
    limits = rate_limits(rate_limit)
    if isinstance(target, str) and _ID.fullmatch(name):
        if faults or datastore != _DEFAULT:
            raise ConfigError("faults and datastore are options of embedded stores, and this target is a data store id")
        service = Service(region, profile, endpoint_url, config=config)
        return DataStore(Target(name, None, service=service, cache=cache_place, limits=limits))
    folder = store_folder(name, datastore, sure=not isinstance(target, str))
    if region or profile or endpoint_url or config is not None:
        raise ConfigError(f"region, profile, endpoint_url and config are options of ids, and {name!r} is a folder")
    store = DataStore(Target(None, folder, datastore, cache=cache_place, limits=limits), faults=faults, create=create)
    _ = store.client  # joins or starts the server now, so that errors come from here
    return store
