"""The embedded store's catalog with many image sets: how long its reads take, against the same with few.

Catalogs are written directly, one image set of a few instances a series; requests go through boto3
and the server, one after the other, for image sets drawn at random.
"""

from __future__ import annotations

import random
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import ahi_ml
from ahi_ml.local.catalog import Catalog, Datastore, FrameRow, ImageSet, Version
from ahi_ml.local.files import StoreFolder
from ahi_ml.local.ingest.image_sets import pack, search_columns, search_tags
from benchmarks.runner import Measurement, Ratio, result, take_turns

__all__ = ["run"]

_BUDGET = 1.5
_INSTANCES = 8


@dataclass(frozen=True)
class _Size:
    few: int
    many: int
    requests: int
    rounds: int


_SIZES = {
    "toy": _Size(20, 200, 10, 2),
    "small": _Size(500, 5_000, 100, 5),
    "full": _Size(500, 50_000, 200, 9),
}


def run(size: str = "small", rounds: int | None = None) -> dict[str, Any]:
    """Measure; see the module. `rounds` overrides how often everything is repeated."""
    asked = _SIZES[size]
    if rounds:
        asked = replace(asked, rounds=rounds)
    with tempfile.TemporaryDirectory(prefix="ahi-ml-benchmark-") as name, ExitStack() as stack:
        works: dict[str, Callable[[], float]] = {}
        for label, count in (("few", asked.few), ("many", asked.many)):
            folder = Path(name) / label
            ids = _fill(folder, count)
            store = stack.enter_context(ahi_ml.connect(folder, cache=Path(name) / "no-cache"))
            works |= {
                f"{what}, {label}": partial(_p50, ask, asked.requests) for what, ask in _reads(store, ids).items()
            }
        took = take_turns(works, asked.rounds)
    measurements = [Measurement(name, "ms, p50 of a round", values) for name, values in took.items()]
    p50 = {measurement.name: measurement.p50 for measurement in measurements}
    reads = [name.removesuffix(", few") for name in p50 if name.endswith(", few")]
    ratios = [
        Ratio(f"{read}: {asked.many:,} / {asked.few:,}", p50[f"{read}, many"] / p50[f"{read}, few"], at_most=_BUDGET)
        for read in reads
    ]
    parameters = {
        "image_sets": [asked.few, asked.many],
        "instances_each": _INSTANCES,
        "requests_a_round": asked.requests,
        "rounds": asked.rounds,
    }
    return result("catalog_scale", size, parameters, measurements, ratios)


def _reads(store: ahi_ml.DataStore, ids: list[str]) -> dict[str, Callable[[], Any]]:
    client, datastore_id, draw = store.client, store.datastore_id, random.Random(0)

    def search(**criteria: Any) -> Any:
        return client.search_image_sets(datastoreId=datastore_id, maxResults=50, searchCriteria=criteria)

    def equal(name: str, value: Any) -> dict[str, Any]:
        return {"operator": "EQUAL", "values": [{name: value}]}

    def day() -> dict[str, Any]:
        at = {"DICOMStudyDate": _study_date(draw.randrange(len(ids)))}
        bounds = [{"DICOMStudyDateAndTime": {**at, "DICOMStudyTime": time}} for time in ("000000", "235959")]
        return {"operator": "BETWEEN", "values": bounds}

    def years() -> dict[str, Any]:
        bounds = [{"DICOMStudyDateAndTime": {"DICOMStudyDate": date}} for date in ("19900101", "20301231")]
        return {"operator": "BETWEEN", "values": bounds}

    def metadata() -> bytes:
        answer = client.get_image_set_metadata(datastoreId=datastore_id, imageSetId=draw.choice(ids))
        body: bytes = answer["imageSetMetadataBlob"].read()
        return body

    return {
        "search page, newest first": search,
        "search page, by study date": lambda: search(
            sort={"sortField": "DICOMStudyDateAndTime", "sortOrder": "ASC"}, filters=[equal("isPrimary", True)]
        ),
        "search page, a day": lambda: search(filters=[day(), equal("isPrimary", True)]),
        "search page, all dates": lambda: search(filters=[years()]),
        "search page, not primary": lambda: search(filters=[equal("isPrimary", False)]),
        "search page, a patient": lambda: search(filters=[equal("DICOMPatientId", _patient(draw.randrange(len(ids))))]),
        "GetImageSet": lambda: client.get_image_set(datastoreId=datastore_id, imageSetId=draw.choice(ids)),
        "GetImageSetMetadata": metadata,
    }


def _p50(ask: Callable[[], Any], requests: int) -> float:
    took = []
    for _ in range(requests):
        start = time.perf_counter()
        ask()
        took.append(time.perf_counter() - start)
    return statistics.median(took) * 1e3


def _patient(number: int) -> str:
    return f"P{number // 4:06}"


def _study_date(number: int) -> str:
    """Fifty image sets a day: a page, however many there are."""
    return (date(2000, 1, 1) + timedelta(days=number // 50)).strftime("%Y%m%d")


def _fill(folder: Path, count: int) -> list[str]:
    """Make a store whose default data store has so many image sets; return their ids."""
    catalog = Catalog(StoreFolder.open(folder).catalog)
    store = Datastore(secrets.token_hex(16), "default", "ACTIVE", "HTJ2K", 1.0, 1.0, "ahi-ml-default")
    ids = []
    with catalog.transaction():
        catalog.save_datastore(store)
        for number in range(count):
            ids.append(secrets.token_hex(16))
            document = _document(store.id, ids[-1], number)
            now = 1.6e9 + number
            catalog.save_document(ids[-1], 1, pack(document))
            catalog.save_version(Version(ids[-1], 1, "ACTIVE", "CREATED", now, None, None, True))
            catalog.add_frames(
                ids[-1], [FrameRow(secrets.token_hex(16), "0" * 40, "image/jph") for _ in range(_INSTANCES)]
            )
            columns: dict[str, Any] = dict(search_columns(document))
            catalog.save_image_set(
                ImageSet(
                    id=ids[-1],
                    datastore_id=store.id,
                    is_primary=True,
                    version=1,
                    created=now,
                    updated=now,
                    accessed=now,
                    deleted=None,
                    study_key=str(number // 2),
                    series_key=str(number),
                    tags=search_tags(document),
                    **columns,
                )
            )
    catalog.close()
    return ids


def _document(datastore_id: str, image_set_id: str, number: int) -> dict[str, Any]:
    root = f"1.2.826.0.1.3680043.8.498.{number // 2}"
    instances = {
        f"{root}.{number % 2}.{each}": {
            "DICOM": {
                "InstanceNumber": str(each),
                "ImagePositionPatient": ["-181.5", "-5.5", f"{each}.5"],
                "Rows": 512,
            },
            "DICOMVRs": {},
            "ImageFrames": [],
        }
        for each in range(_INSTANCES)
    }
    series = {"DICOM": {"Modality": "CT", "SeriesNumber": str(number % 2)}, "Instances": instances}
    return {
        "SchemaVersion": "1.1",
        "DatastoreID": datastore_id,
        "ImageSetID": image_set_id,
        "Patient": {"DICOM": {"PatientID": _patient(number)}},
        "Study": {
            "DICOM": {"StudyInstanceUID": root, "StudyDate": _study_date(number), "StudyTime": "120000"},
            "Series": {f"{root}.{number % 2}": series},
        },
    }
