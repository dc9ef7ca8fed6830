"""From the levels of instances to image sets: grouping, merging, search attributes, documents.

The rules are the service's: seven elements group instances; a later import joins the primary image
set of its series and makes a new version of it; what contradicts the primary hierarchy becomes a
non-primary image set.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from ahi_ml.local.catalog import FrameRow
from ahi_ml.local.ingest.document import Levels
from ahi_ml.local.ingest.levels import GROUPING, STUDY_GROUPING

__all__ = [
    "Group",
    "Instance",
    "add_instance",
    "document_keys",
    "grouping_keys",
    "new_document",
    "pack",
    "search_columns",
    "search_tags",
    "unpack",
]

Json = dict[str, Any]


@dataclass(slots=True)
class Instance:
    """One parsed file whose frames are stored."""

    key: str
    sop_uid: str
    levels: Levels
    stored_syntax: str
    checksum_type: str | None
    frames: list[Json]
    rows: list[FrameRow]
    warnings: list[Json] = field(default_factory=list)


@dataclass(slots=True)
class Group:
    """The instances of one job that belong to one image set."""

    study_uid: str
    series_uid: str
    study_key: str
    series_key: str
    instances: list[Instance] = field(default_factory=list)


def grouping_keys(levels: Levels) -> tuple[str, str]:
    """Hashes of what a study's and a series' instances must agree on. I/O: none."""

    def digest(keywords: tuple[str, ...]) -> str:
        text = json.dumps([levels.get(keyword) for keyword in keywords])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    return digest(STUDY_GROUPING), digest(GROUPING)


def document_keys(document: Json) -> tuple[str, str]:
    """`grouping_keys` of what a document says now. I/O: none."""
    series = next(iter(document["Study"]["Series"].values()))
    return grouping_keys(Levels(document["Patient"]["DICOM"], document["Study"]["DICOM"], series["DICOM"]))


def new_document(datastore_id: str, image_set_id: str, series_uid: str) -> Json:
    """An image set's metadata document without instances. I/O: none."""
    return {
        "SchemaVersion": "1.1",
        "DatastoreID": datastore_id,
        "ImageSetID": image_set_id,
        "Patient": {"DICOM": {}},
        "Study": {"DICOM": {}, "Series": {series_uid: {"DICOM": {}, "Instances": {}}}},
    }


def add_instance(document: Json, series_uid: str, instance: Instance) -> None:
    """Put an instance into a document, replacing one of the same UID. I/O: none.

    Patient, study and series elements are kept once. Where an instance differs from what its level
    already says, its own value (null for an element it lacks) stays with the instance: readers take
    the most specific level, so nothing is lost and no instance inherits what it never had.
    """
    series = document["Study"]["Series"][series_uid]
    first = not series["Instances"]
    own: Json = {}
    for shared, mine in (
        (document["Patient"]["DICOM"], instance.levels.patient),
        (document["Study"]["DICOM"], instance.levels.study),
        (series["DICOM"], instance.levels.series),
    ):
        if first and not shared:
            shared.update(mine)
            continue
        own.update({key: value for key, value in mine.items() if key not in shared or shared[key] != value})
        own.update(dict.fromkeys(key for key in shared if key not in mine))
    entry: Json = {"DICOM": {**instance.levels.instance, **own}, "DICOMVRs": instance.levels.vrs}
    if instance.frames:
        entry["StoredTransferSyntaxUID"] = instance.stored_syntax
        entry["ChecksumType"] = instance.checksum_type
    entry["ImageFrames"] = instance.frames
    series["Instances"][instance.sop_uid] = entry


def pack(document: Json) -> bytes:
    """A document as it is stored and sent: gzipped UTF-8 JSON. I/O: none."""
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return gzip.compress(text.encode("utf-8", "replace"), compresslevel=4, mtime=0)


def unpack(body: bytes) -> Json:
    """The inverse of `pack`. I/O: none."""
    return json.loads(gzip.decompress(body))  # type: ignore[no-any-return]


def _clean(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else "\\".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.strip() or None


def _moment(date: str | None, time: str | None) -> str | None:
    """Study date and time as one text that sorts: ``YYYYMMDDHHMMSS.FFFFFF``."""
    if not date or len(date) != 8 or not date.isdigit():
        return None
    whole, _, fraction = (time or "").replace(":", "").partition(".")
    if not (whole + fraction).isdigit():
        whole = fraction = ""
    return f"{date}{whole[:6]:0<6}.{fraction[:6]:0<6}"


def search_columns(document: Json) -> dict[str, str | None]:
    """The attributes of a document that a search can ask for. I/O: none."""
    patient, study = document["Patient"]["DICOM"], document["Study"]["DICOM"]
    return {
        "patient_id": _clean(patient.get("PatientID")),
        "accession_number": _clean(study.get("AccessionNumber")),
        "study_id": _clean(study.get("StudyID")),
        "study_uid": _clean(study.get("StudyInstanceUID")),
        "series_uid": next(iter(document["Study"]["Series"]), None),
        "study_moment": _moment(_clean(study.get("StudyDate")), _clean(study.get("StudyTime"))),
    }


_UID = re.compile(r"[0-9.]+")
_SERIES_NUMBER = re.compile(r"[+-]?[0-9]{1,9}")
_TAGS = {
    "Patient": {
        "DICOMPatientId": ("PatientID", 512),
        "DICOMPatientName": ("PatientName", 512),
        "DICOMPatientBirthDate": ("PatientBirthDate", 36),
        "DICOMPatientSex": ("PatientSex", 16),
    },
    "Study": {
        "DICOMStudyInstanceUID": ("StudyInstanceUID", 512),
        "DICOMStudyId": ("StudyID", 512),
        "DICOMStudyDescription": ("StudyDescription", 512),
        "DICOMAccessionNumber": ("AccessionNumber", 512),
        "DICOMStudyDate": ("StudyDate", 36),
        "DICOMStudyTime": ("StudyTime", 56),
    },
    "Series": {
        "DICOMSeriesInstanceUID": ("SeriesInstanceUID", 512),
        "DICOMSeriesModality": ("Modality", 32),
        "DICOMSeriesBodyPart": ("BodyPartExamined", 128),
    },
}


def search_tags(document: Json) -> Json:
    """The ``DICOMTags`` of a document's search summary. I/O: none."""
    series_uid, series = next(iter(document["Study"]["Series"].items()))
    levels = {
        "Patient": document["Patient"]["DICOM"],
        "Study": document["Study"]["DICOM"],
        "Series": {**series["DICOM"], "SeriesInstanceUID": series_uid},
    }
    tags: Json = {}
    for level, names in _TAGS.items():
        for name, (keyword, longest) in names.items():
            value = _clean(levels[level].get(keyword))
            if value is None or (name.endswith("UID") and not _UID.fullmatch(value)):
                continue  # files may have other UIDs than answers may show
            tags[name] = value[:longest]
    if (number := _clean(series["DICOM"].get("SeriesNumber"))) and _SERIES_NUMBER.fullmatch(number):
        tags["DICOMSeriesNumber"] = int(number)
    tags["DICOMNumberOfStudyRelatedSeries"] = len(document["Study"]["Series"])
    tags["DICOMNumberOfStudyRelatedInstances"] = len(series["Instances"])
    return tags
