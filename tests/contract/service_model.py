"""A model of the service in plain dicts: what a data store must answer after what was done to it.

It knows the service's rules and nothing else: no HTTP, no SQL, no code of the embedded store. Ids and
moments are the ones the store handed out; frames are symbols here, and `Model.ids` says which id the
store gave each. Documents are the service's own JSON with symbols for frame ids and without
``FrameSizeInBytes``, which depends on an encoder.
"""

from __future__ import annotations

import copy
import itertools
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Json = dict[str, Any]

STUDY_KEY = (
    ("Patient", "PatientID"),
    ("Study", "StudyInstanceUID"),
    ("Study", "StudyDate"),
    ("Study", "AccessionNumber"),
    ("Study", "StudyID"),
)
SERIES_KEY = (*STUDY_KEY, ("Series", "SeriesInstanceUID"), ("Series", "SeriesNumber"))
EQUAL = {
    "DICOMPatientId": ("Patient", "PatientID"),
    "DICOMAccessionNumber": ("Study", "AccessionNumber"),
    "DICOMStudyId": ("Study", "StudyID"),
    "DICOMStudyInstanceUID": ("Study", "StudyInstanceUID"),
    "DICOMSeriesInstanceUID": ("Series", "SeriesInstanceUID"),
}
TAGS = EQUAL | {
    "DICOMPatientName": ("Patient", "PatientName"),
    "DICOMPatientBirthDate": ("Patient", "PatientBirthDate"),
    "DICOMPatientSex": ("Patient", "PatientSex"),
    "DICOMStudyDescription": ("Study", "StudyDescription"),
    "DICOMStudyDate": ("Study", "StudyDate"),
    "DICOMStudyTime": ("Study", "StudyTime"),
    "DICOMSeriesModality": ("Series", "Modality"),
    "DICOMSeriesBodyPart": ("Series", "BodyPartExamined"),
}


@dataclass(frozen=True, eq=False)
class Scan:
    """One DICOM file: the elements of its four levels as documents show them, and its frames."""

    name: str
    levels: dict[str, Json]
    frames: tuple[np.ndarray, ...]
    family: Any = None

    @property
    def sop_uid(self) -> str:
        return str(self.levels["Instance"]["SOPInstanceUID"])


@dataclass
class Version:
    """What a version is once nothing works on it any more."""

    workflow: str
    document: Json
    primary: bool
    forced: bool | None = None
    failed: bool = False
    updated: float | None = None


@dataclass
class ImageSet:
    """An image set: its versions count from 1."""

    id: str
    family: Any
    created: float | None = None
    versions: list[Version] = field(default_factory=list)
    deleted: bool = False
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def latest(self) -> Version:
        return self.versions[-1]

    @property
    def document(self) -> Json:
        return self.latest.document

    @property
    def version(self) -> str:
        return str(len(self.versions))

    def frames(self) -> set[str]:
        return {symbol for version in self.versions for symbol in frames_of(version.document)}


@dataclass
class Store:
    """A data store, its image sets by id and its jobs' end states in the order of their start."""

    id: str
    name: str
    format: str
    token: str
    tags: dict[str, str]
    sets: dict[str, ImageSet] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)
    deleted: bool = False

    def live(self) -> list[ImageSet]:
        return [each for each in list(self.sets.values()) if not each.deleted]


@dataclass
class Change:
    """What an update asks for, and which of the service's rules it touches."""

    put: Json | None = None
    remove: Json | None = None
    revert: str | None = None
    needs_force: bool = False
    of_uid: bool = False
    never: bool = False


def series_of(document: Json) -> tuple[str, Json]:
    """The one series of a document."""
    ((uid, series),) = document["Study"]["Series"].items()
    return uid, series


def levels_of(document: Json) -> dict[str, Json]:
    """Shared elements by level."""
    return {
        "Patient": document["Patient"]["DICOM"],
        "Study": document["Study"]["DICOM"],
        "Series": series_of(document)[1]["DICOM"],
    }


def said(levels: dict[str, Json], where: tuple[str, str]) -> str | None:
    """An element's text; None when it is absent or empty."""
    value = levels[where[0]].get(where[1])
    return (value or "").strip() or None


def key(levels: dict[str, Json], elements: Iterable[tuple[str, str]]) -> tuple[str | None, ...]:
    return tuple(said(levels, each) for each in elements)


def frames_of(document: Json) -> list[str]:
    return [
        frame["ID"] for instance in series_of(document)[1]["Instances"].values() for frame in instance["ImageFrames"]
    ]


def moment(document: Json) -> str:
    """Study date and time as one text that sorts; empty without a date."""
    levels = levels_of(document)
    date, time = said(levels, ("Study", "StudyDate")), said(levels, ("Study", "StudyTime"))
    return moment_text(date, time) if date else ""


def moment_text(date: str, time: str | None) -> str:
    whole, _, fraction = (time or "").partition(".")
    return f"{date}{whole.ljust(6, '0')}.{fraction.ljust(6, '0')}"


def summary_of(document: Json) -> Json:
    """The ``DICOMTags`` of a search summary."""
    levels = levels_of(document)
    uid, series = series_of(document)
    tags: Json = {name: text for name, where in TAGS.items() if (text := said(levels, where)) is not None}
    tags["DICOMSeriesInstanceUID"] = uid
    if (number := said(levels, ("Series", "SeriesNumber"))) is not None:
        tags["DICOMSeriesNumber"] = int(number)
    return {
        **tags,
        "DICOMNumberOfStudyRelatedSeries": 1,
        "DICOMNumberOfStudyRelatedInstances": len(series["Instances"]),
    }


class Model:
    """Data stores, and the frames of all of them."""

    def __init__(self) -> None:
        self.stores: dict[str, Store] = {}
        self.pixels: dict[str, np.ndarray] = {}
        self.ids: dict[str, str] = {}
        self._numbers = itertools.count(1)

    # Imports

    @staticmethod
    def groups(scans: Sequence[Scan]) -> list[list[Scan]]:
        """Files of a job, by the seven elements, in the order of their names."""
        found: dict[Any, list[Scan]] = {}
        for scan in sorted(scans, key=lambda each: each.name):
            found.setdefault(key(scan.levels, SERIES_KEY), []).append(scan)
        return list(found.values())

    @staticmethod
    def home(store: Store, scan: Scan) -> tuple[ImageSet | None, bool]:
        """The image set a group joins (None: a new one), and whether it is the primary of its series."""
        live = sorted(store.live(), key=lambda each: (each.created or math.inf, each.id))
        series_uid = scan.levels["Series"]["SeriesInstanceUID"]
        of_series = [each for each in live if series_of(each.document)[0] == series_uid]
        mine = key(scan.levels, SERIES_KEY)
        same = [each for each in of_series if key(levels_of(each.document), SERIES_KEY) == mine]
        for each in same:
            if each.latest.primary:
                return each, True
        study_uid = said(scan.levels, ("Study", "StudyInstanceUID"))
        fits = all(
            key(levels_of(each.document), STUDY_KEY) == key(scan.levels, STUDY_KEY)
            for each in live
            if each.latest.primary and said(levels_of(each.document), ("Study", "StudyInstanceUID")) == study_uid
        )
        contradicts = not fits or any(each.latest.primary for each in of_series)
        if contradicts:
            return (same[0] if same else None), False
        return None, True

    def commit(self, store: Store, group: Sequence[Scan], set_id: str) -> ImageSet:
        """Put a group into the image set of this id, as a new version or a new image set."""
        target, primary = self.home(store, group[0])
        if target is None:
            target = store.sets[set_id] = ImageSet(set_id, group[0].family)
            document: Json = {
                "SchemaVersion": "1.1",
                "DatastoreID": store.id,
                "ImageSetID": set_id,
                "Patient": {"DICOM": dict(group[0].levels["Patient"])},
                "Study": {
                    "DICOM": dict(group[0].levels["Study"]),
                    "Series": {
                        group[0].levels["Series"]["SeriesInstanceUID"]: {
                            "DICOM": dict(group[0].levels["Series"]),
                            "Instances": {},
                        }
                    },
                },
            }
            workflow = "CREATED"
        else:
            assert target.id == set_id, f"the import went into {set_id}, and belongs into {target.id}"
            document, workflow = copy.deepcopy(target.document), "IMPORTED"
        instances = series_of(document)[1]["Instances"]
        for scan in group:
            own: Json = dict(scan.levels["Instance"])
            for level, shared in levels_of(document).items():
                mine = scan.levels[level]
                own |= {name: value for name, value in mine.items() if name not in shared or shared[name] != value}
                own |= dict.fromkeys(set(shared) - set(mine))
            entry: Json = {"DICOM": own, "DICOMVRs": {}, "ImageFrames": [self._frame(each) for each in scan.frames]}
            if scan.frames:
                syntax = "202" if store.format == "HTJ2K" else "90"
                entry["StoredTransferSyntaxUID"] = f"1.2.840.10008.1.2.4.{syntax}"
                entry["ChecksumType"] = "DECOMPRESSED"
            instances[scan.sop_uid] = entry
        target.versions.append(Version(workflow, document, primary))
        return target

    def _frame(self, image: np.ndarray) -> Json:
        symbol = f"frame {next(self._numbers)}"
        self.pixels[symbol] = image
        height, width = image.shape
        checksum = zlib.crc32(image.astype("<u2").tobytes())
        return {
            "ID": symbol,
            "PixelDataChecksumFromBaseToFullResolution": [{"Width": width, "Height": height, "Checksum": checksum}],
            "MinPixelValue": int(image.min()),
            "MaxPixelValue": int(image.max()),
        }

    def cut_import_short(self, target: ImageSet) -> None:
        """An attempt of a slow import that a killed server left behind."""
        self._attempt(target, "IMPORT", None, force=False)

    # Writes: `*_faults` are the codes a request may be refused with (none: it must be taken).

    @staticmethod
    def update_faults(target: ImageSet, latest: str, change: Change, *, force: bool, study: bool) -> set[str]:
        faults = set()
        if latest != target.version:
            faults.add("ConflictException")
        if change.revert is not None:
            number = int(change.revert)
            gone = not 1 <= number < len(target.versions) or target.versions[number - 1].failed
            if gone or study:
                faults.add("ValidationException")
        elif change.never or (change.needs_force and not force) or (change.of_uid and target.latest.primary):
            faults.add("ValidationException")
        below = any("Series" in (tree or {}).get("Study", {}) for tree in (change.put, change.remove))
        if study and (below or not target.latest.primary):
            faults.add("ValidationException")
        return faults

    def update_targets(self, store: Store, target: ImageSet, *, study: bool) -> list[ImageSet]:
        """The image set itself, and with `study` the other primary ones of its study."""
        where = ("Study", "StudyInstanceUID")
        uid = said(levels_of(target.document), where)
        others = [
            each
            for each in store.live()
            if each is not target and each.latest.primary and said(levels_of(each.document), where) == uid
        ]
        return [target, *(others if study else [])]

    def update(self, targets: list[ImageSet], change: Change, *, force: bool, cut_short: bool = False) -> None:
        """Settle an update that was taken: all of its image sets, or all failed."""
        documents = [self.changed(each, change) for each in targets]
        failed = cut_short or any(document is None for document in documents)
        for each, document in zip(targets, documents, strict=True):
            self._attempt(each, "UPDATE", None if failed else document, force=force)

    @staticmethod
    def _attempt(target: ImageSet, what: str, document: Json | None, *, force: bool) -> None:
        done = f"{what}_FAILED" if document is None else {"UPDATE": "UPDATED", "COPY": "COPIED"}[what]
        primary, failed = target.latest.primary, document is None
        target.versions.append(Version(done, document or target.document, primary, force or None, failed))

    @staticmethod
    def changed(target: ImageSet, change: Change) -> Json | None:
        """The document after a change; None where the change does not fit it."""
        if change.revert is not None:
            return target.versions[int(change.revert) - 1].document
        document = copy.deepcopy(target.document)
        for level in ("Patient", "Study"):
            document[level]["DICOM"].update((change.put or {}).get(level, {}).get("DICOM", {}))
        for series_uid, series in (change.put or {}).get("Study", {}).get("Series", {}).items():
            if series_uid not in document["Study"]["Series"]:
                return None
            present = document["Study"]["Series"][series_uid]
            present["DICOM"].update(series.get("DICOM", {}))
            for sop_uid, instance in series.get("Instances", {}).items():
                if sop_uid not in present["Instances"]:
                    return None
                present["Instances"][sop_uid]["DICOM"].update(instance.get("DICOM", {}))
                present["Instances"][sop_uid]["DICOMVRs"].update(instance.get("DICOMVRs", {}))
            wanted = series.get("DICOM", {}).get("SeriesInstanceUID", series_uid)
            document["Study"]["Series"][wanted] = document["Study"]["Series"].pop(series_uid)
        removals = change.remove or {}
        nodes = [(document[level], removals.get(level, {})) for level in ("Patient", "Study")]
        for series_uid, series in removals.get("Study", {}).get("Series", {}).items():
            if series_uid not in document["Study"]["Series"]:
                return None
            present = document["Study"]["Series"][series_uid]
            nodes.append((present, series))
            for sop_uid, instance in series.get("Instances", {}).items():
                if sop_uid not in present["Instances"]:
                    return None
                if instance:
                    nodes.append((present["Instances"][sop_uid], instance))
                else:
                    del present["Instances"][sop_uid]
        for node, removal in nodes:
            for name, value in removal.get("DICOM", {}).items():
                if name not in node["DICOM"] or node["DICOM"][name] != value:
                    return None
                del node["DICOM"][name]
        return document if series_of(document)[1]["Instances"] else None

    def copy_faults(
        self,
        store: Store,
        source: ImageSet,
        latest: str,
        uids: Sequence[str] | None,
        into: ImageSet | None,
        into_latest: str,
        *,
        promote: bool,
    ) -> set[str]:
        faults = set()
        if latest != source.version or (into is not None and into_latest != into.version):
            faults.add("ConflictException")
        series_uid, series = series_of(source.document)
        if uids is not None and (not uids or set(uids) - set(series["Instances"])):
            faults.add("ValidationException")
        if into is source or (promote and into is not None):
            faults.add("ValidationException")
        of_series = [each for each in store.live() if series_of(each.document)[0] == series_uid]
        if promote and any(each.latest.primary for each in of_series):
            faults.add("ConflictException")
        return faults

    @staticmethod
    def part(source: ImageSet, uids: Sequence[str] | None) -> Json:
        """A document with some of its instances, or all."""
        document = copy.deepcopy(source.document)
        instances = series_of(document)[1]["Instances"]
        if uids is not None:
            series_of(document)[1]["Instances"] = {uid: instances[uid] for uid in uids}
        return document

    def copy_new(self, store: Store, source: ImageSet, uids: Any, set_id: str, *, promote: bool, force: bool) -> None:
        """Settle a copy into a new image set."""
        document = {**self.part(source, uids), "ImageSetID": set_id}
        made = store.sets[set_id] = ImageSet(set_id, source.family)
        made.versions.append(Version("COPIED", document, promote, force or None))

    def copy_into(
        self, source: ImageSet, uids: Any, into: ImageSet, *, force: bool, cut_short: bool = False
    ) -> Json | None:
        """Settle a copy into another image set; it fails when the two do not go together."""
        part, merged = self.part(source, uids), copy.deepcopy(into.document)
        (mine_uid, mine), (theirs_uid, theirs) = series_of(merged), series_of(part)
        fits = mine_uid == theirs_uid and not set(mine["Instances"]) & set(theirs["Instances"])
        fits = fits and (force or levels_of(merged) == levels_of(part))
        mine["Instances"].update(theirs["Instances"])
        document = merged if fits and not cut_short else None
        self._attempt(into, "COPY", document, force=force)
        return document

    # Search

    @staticmethod
    def search(store: Store, filters: Sequence[tuple[str, Any]], sort: tuple[str, str]) -> list[ImageSet]:
        """Image sets that meet ``(attribute, value or (lower, upper))`` filters, in order."""

        def meets(each: ImageSet, attribute: str, value: Any) -> bool:
            if attribute == "isPrimary":
                return each.latest.primary is value
            if attribute == "DICOMSeriesInstanceUID":
                return series_of(each.document)[0] == value
            if attribute in EQUAL:
                return said(levels_of(each.document), EQUAL[attribute]) == value
            return value[0] <= place(each, attribute) <= value[1]

        def place(each: ImageSet, attribute: str) -> Any:
            if attribute == "DICOMStudyDateAndTime":
                return moment(each.document)
            return each.created if attribute == "createdAt" else each.latest.updated

        found = [each for each in store.live() if all(meets(each, *one) for one in filters)]
        return sorted(found, key=lambda each: (place(each, sort[0]), each.id), reverse=sort[1] == "DESC")
