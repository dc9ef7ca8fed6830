"""The life of a data store as the AWS CLI lives it: a client that shares no code with this package.

The CLI runs as a process of its own, with its own botocore and its own copy of the service's model.
It knows the store by the variables of `DataStore.environment` and nothing else. Every operation is
made to succeed and to fail at least once, and the last test says so. Each test brings the series it
changes, so none depends on another; a call costs a third of a second, so each asks no more than it
needs.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import openjpeg
import pydicom
import pytest
from botocore import xform_name
from botocore.loaders import Loader
from pydicom.data import get_testdata_file

import ahi_ml
from ahi_ml import DataStore

Json = dict[str, Any]

REFUSED = 255  # version 1 of the CLI ends so for whatever a service refuses; version 2 would say 254
ROLE = "arn:aws:iam::123456789012:role/import"
UNKNOWN = "0" * 32
UNKNOWN_ARN = f"arn:aws:medical-imaging:us-east-1:123456789012:datastore/{UNKNOWN}"
COMMANDS = {xform_name(name, "-") for name in Loader().load_service_model("medical-imaging", "service-2")["operations"]}


@dataclass
class Cli:
    """``aws medical-imaging`` with the environment of a store, and a record of what was asked of it."""

    environment: dict[str, str]
    folder: Path
    succeeded: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)

    def run(self, command: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "awscli", "medical-imaging", command, *words],
            cwd=self.folder,
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def __call__(self, command: str, *words: str) -> Json:
        """What a command that must succeed prints."""
        done = self.run(command, *words)
        assert (done.returncode, done.stderr) == (0, ""), f"{command}: {done.stderr}"
        self.succeeded.add(command)
        return dict(json.loads(done.stdout or "{}"))

    def fails(self, code: str, command: str, *words: str, **variables: str) -> str:
        """What the service says to a command that it must refuse with `code`."""
        done = self.run(command, *words, **variables)
        assert (done.returncode, done.stdout) == (REFUSED, ""), done.stdout
        said = done.stderr.strip()
        opening = f"An error occurred ({code}) when calling the "
        assert said.startswith(opening), said
        operation, _, message = said.removeprefix(opening).partition(" operation: ")
        assert xform_name(operation, "-") == command
        self.refused.add(command)
        return message

    def until(self, done: Callable[[Json], bool], command: str, *words: str) -> Json:
        """The first answer of a command that satisfies `done`."""
        deadline = time.monotonic() + 30
        while not done(answer := self(command, *words)):
            assert time.monotonic() < deadline, answer
        return answer

    def settled(self, where: list[str]) -> Json:
        """An image set's properties once it is not LOCKED any more."""
        return self.until(lambda answer: answer["imageSetState"] != "LOCKED", "get-image-set", *where)

    def document(self, where: list[str], *words: str) -> Json:
        """An image set's metadata. The CLI writes the bytes it gets to a file."""
        file = self.folder / "metadata.json.gz"
        answer = self("get-image-set-metadata", *where, *words, str(file))
        assert answer == {"contentType": "application/json", "contentEncoding": "gzip"}
        return dict(json.loads(gzip.decompress(file.read_bytes())))

    def frame(self, where: list[str], frame_id: str) -> tuple[bytes, str]:
        """The bytes of a frame, and their type."""
        file = self.folder / "frame"
        answer = self("get-image-frame", *where, "--image-frame-information", f"imageFrameId={frame_id}", str(file))
        return file.read_bytes(), str(answer["contentType"])


@pytest.fixture(scope="module")
def store(store_folder: Path) -> Iterator[DataStore]:
    """The module's embedded store."""
    with ahi_ml.connect(store_folder, cache=store_folder.with_name("cache")) as opened:
        yield opened


@pytest.fixture(scope="module")
def aws(store: DataStore, tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """The CLI with the store's variables, no settings of anybody's, and no way to other machines."""
    home = tmp_path_factory.mktemp("home")
    clean = {
        "HOME": str(home),
        "PATH": os.defpath,
        "AWS_CONFIG_FILE": str(home / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(home / "credentials"),
        "HTTPS_PROXY": "http://127.0.0.1:9",  # where nobody answers; the store itself speaks plain HTTP
    }
    return Cli({**store.environment(), **clean}, home)


def write_series(folder: Path, name: str, instances: int = 1, **changes: Any) -> list[pydicom.Dataset]:
    """Write CT slices of one patient, study and series, all made from `name`; each slice has its own pixels."""
    root = "1.2.3." + ".".join(str(ord(letter)) for letter in name)
    datasets = []
    for number in range(1, instances + 1):
        dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
        dataset.PatientID = dataset.PatientName = f"MADE-UP-{name}"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"{root}.1", f"{root}.2"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{root}.2.{number}"
        dataset.InstanceNumber = number
        dataset.ImagePositionPatient = [-10.5, 20, 2.5 * number]
        dataset.PixelData = np.roll(dataset.pixel_array, number, axis=0).tobytes()
        for keyword, value in changes.items():
            setattr(dataset, keyword, value)
        folder.mkdir(parents=True, exist_ok=True)
        dataset.save_as(folder / f"{name}-{number}.dcm")
        datasets.append(dataset)
    return datasets


@dataclass(frozen=True)
class Filled:
    """A data store after its first import."""

    datastore_id: str
    scans: Path
    series: dict[str, list[pydicom.Dataset]]
    job: Json

    @property
    def here(self) -> list[str]:
        """The options that name the data store."""
        return ["--datastore-id", self.datastore_id]

    def image_set(self, name: str) -> list[str]:
        """The options that name the image set of a series, which the report of the import knows."""
        report = Path(self.job["outputS3Uri"].removeprefix("s3://this-machine")) / "SUCCESS" / "success.ndjson"
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        (found,) = {
            each["importResponse"]["imageSetId"] for each in lines if each["inputFile"].endswith(f"/{name}-1.dcm")
        }
        return [*self.here, "--image-set-id", found]


@pytest.fixture(scope="module")
def filled(aws: Cli, tmp_path_factory: pytest.TempPathFactory) -> Filled:
    """A data store of HTJ2K with one series for each test, imported from a folder of this machine."""
    scans, reports = tmp_path_factory.mktemp("scans"), tmp_path_factory.mktemp("reports")
    series = {
        "OLD": write_series(scans, "OLD", StudyDate="20010203", StudyTime="101112.25"),
        "NEXT": write_series(scans, "NEXT", StudyDate="20010203", StudyTime="101113"),
        "READ": write_series(
            scans,
            "READ",
            3,
            StudyDate="20020304",
            StudyTime="121314",
            AccessionNumber="A-1",
            PatientBirthDate="19700102",
            BodyPartExamined="CHEST",
        ),
        **{name: write_series(scans, name, 2, StudyDate="20150101") for name in ("EDIT", "COPY", "TAGS")},
    }
    (scans / "notes.txt").write_text("not DICOM")
    made = aws(
        "create-datastore", "--datastore-name", "first", "--tags", "team=x,empty=", "--lossless-storage-format", "HTJ2K"
    )
    assert made["datastoreStatus"] == "CREATING"
    here = ["--datastore-id", made["datastoreId"]]
    started = aws(
        *("start-dicom-import-job", *here, "--job-name", "first-job", "--data-access-role-arn", ROLE),
        *("--input-s3-uri", f"s3://this-machine{scans}/", "--output-s3-uri", f"s3://this-machine{reports}/"),
    )
    assert started["jobStatus"] == "SUBMITTED"
    job = ended(aws, here, started["jobId"])
    assert job["submittedAt"] == started["submittedAt"]
    return Filled(made["datastoreId"], scans, series, job)


def ended(aws: Cli, here: list[str], job_id: str) -> Json:
    answer = aws.until(
        lambda answer: answer["jobProperties"]["jobStatus"] in ("COMPLETED", "FAILED"),
        *("get-dicom-import-job", *here, "--job-id", job_id),
    )
    return dict(answer["jobProperties"])


def criteria(sort: str = "", order: str = "DESC", **filters: Any) -> list[str]:
    """Search criteria as the CLI takes them: a list of two values is a range, any other value is to be equal."""
    asked: Json = {"filters": []}
    for name, value in filters.items():
        values = value if isinstance(value, list) else [value]
        operator = "BETWEEN" if isinstance(value, list) else "EQUAL"
        asked["filters"].append({"operator": operator, "values": [{name: each} for each in values]})
    if sort:
        asked["sort"] = {"sortField": sort, "sortOrder": order}
    return ["--search-criteria", json.dumps(asked)]


def instances_of(document: Json) -> Json:
    (series,) = document["Study"]["Series"].values()
    return dict(series["Instances"])


def check_pixels(aws: Cli, where: list[str], instance: Json, dataset: pydicom.Dataset, content_type: str) -> None:
    """Hold a frame against the DICOM file that it came from, and against its own description."""
    (described,) = instance["ImageFrames"]
    frame, given_type = aws.frame(where, described["ID"])
    assert given_type == content_type
    assert len(frame) == described["FrameSizeInBytes"]
    head = frame[: frame.index(b"\xff\x90")]  # before the first tile-part; only HTJ2K has a CAP marker there
    assert (b"\xff\x50" in head) is (content_type == "image/jph")
    pixels = openjpeg.decode(frame)
    np.testing.assert_array_equal(pixels, dataset.pixel_array)
    assert described["PixelDataChecksumFromBaseToFullResolution"][-1]["Checksum"] == zlib.crc32(pixels.tobytes())
    assert (described["MinPixelValue"], described["MaxPixelValue"]) == (pixels.min(), pixels.max())


def test_data_stores_are_described_and_listed(aws: Cli, filled: Filled, store: DataStore) -> None:
    found = aws("get-datastore", *filled.here)["datastoreProperties"]
    assert found["createdAt"] == found["updatedAt"] <= time.time()
    summary = {
        "datastoreId": filled.datastore_id,
        "datastoreName": "first",
        "datastoreStatus": "ACTIVE",
        "datastoreArn": UNKNOWN_ARN.replace(UNKNOWN, filled.datastore_id),
        "createdAt": found["createdAt"],
        "updatedAt": found["updatedAt"],
    }
    assert found == {**summary, "losslessStorageFormat": "HTJ2K"}
    assert aws("list-tags-for-resource", "--resource-arn", found["datastoreArn"])["tags"] == {"team": "x", "empty": ""}

    # Two data stores: the one that connecting made, and this one. In pages of one, by the CLI and by hand.
    active = ["--datastore-status", "ACTIVE"]
    listed = aws("list-datastores", *active, "--page-size", "1")["datastoreSummaries"]
    assert [each["datastoreId"] for each in listed] == [store.datastore_id, filled.datastore_id]
    assert listed[1] == summary
    page = aws("list-datastores", *active, "--max-results", "1")
    assert page["datastoreSummaries"] == listed[:1]
    page = aws("list-datastores", *active, "--max-results", "1", "--next-token", page["nextToken"])
    assert page == {"datastoreSummaries": listed[1:]}
    assert aws("list-datastores", "--datastore-status", "CREATE_FAILED") == {"datastoreSummaries": []}


def test_import_jobs_report_and_are_listed(aws: Cli, filled: Filled) -> None:
    job = filled.job
    scans = str(filled.scans).removeprefix("/")
    output = Path(job["outputS3Uri"].removeprefix("s3://this-machine"))
    assert job == {
        "jobId": job["jobId"],
        "jobName": "first-job",
        "jobStatus": "COMPLETED",
        "datastoreId": filled.datastore_id,
        "dataAccessRoleArn": ROLE,
        "inputS3Uri": f"s3://this-machine/{scans}/",
        "outputS3Uri": f"s3://this-machine{output}/",
        "submittedAt": job["submittedAt"],
        "endedAt": job["endedAt"],
    }
    assert job["submittedAt"] < job["endedAt"]
    assert output.name == f"{filled.datastore_id}-DicomImport-{job['jobId']}"
    manifest = json.loads((output / "job-output-manifest.json").read_text())["jobSummary"]
    assert (manifest["numberOfScannedFiles"], manifest["numberOfImportedFiles"]) == (12, 11)
    assert manifest["numberOfGeneratedImageSets"] == len(filled.series)
    (failure,) = map(json.loads, (output / "FAILURE" / "failure.ndjson").read_text().splitlines())
    assert failure["inputFile"] == f"{scans}/notes.txt"

    # A second job, over a key that leaves its bucket, fails as a whole, and says why.
    started = aws(
        *("start-dicom-import-job", *filled.here, "--data-access-role-arn", ROLE),
        *("--input-s3-uri", "s3://bucket/../away/", "--output-s3-uri", "s3://bucket/reports/"),
    )
    failed = ended(aws, filled.here, started["jobId"])
    assert failed["jobStatus"] == "FAILED"
    assert failed["message"].startswith("DICOM import job has failed.")
    listed = aws("list-dicom-import-jobs", *filled.here, "--page-size", "1")["jobSummaries"]
    assert [each["jobId"] for each in listed] == [started["jobId"], job["jobId"]]
    assert listed[1] == {name: value for name, value in job.items() if not name.endswith("S3Uri")}
    assert aws("list-dicom-import-jobs", *filled.here, "--job-status", "FAILED")["jobSummaries"] == listed[:1]


def test_a_search_finds_filters_sorts_and_pages(aws: Cli, filled: Filled) -> None:
    read = filled.image_set("READ")
    found = aws("get-image-set", *read)
    (dataset, *_) = filled.series["READ"]
    summary = {
        "imageSetId": read[-1],
        "version": 1,
        "createdAt": found["createdAt"],
        "updatedAt": found["updatedAt"],
        "lastAccessedAt": found["lastAccessedAt"],
        "storageTier": "FREQUENT_ACCESS",
        "isPrimary": True,
        "DICOMTags": {
            "DICOMPatientId": "MADE-UP-READ",
            "DICOMPatientName": "MADE-UP-READ",
            "DICOMPatientBirthDate": "19700102",
            "DICOMPatientSex": dataset.PatientSex,
            "DICOMStudyInstanceUID": dataset.StudyInstanceUID,
            "DICOMStudyId": dataset.StudyID,
            "DICOMStudyDescription": dataset.StudyDescription,
            "DICOMStudyDate": "20020304",
            "DICOMStudyTime": "121314",
            "DICOMAccessionNumber": "A-1",
            "DICOMSeriesInstanceUID": dataset.SeriesInstanceUID,
            "DICOMSeriesModality": "CT",
            "DICOMSeriesBodyPart": "CHEST",
            "DICOMSeriesNumber": 1,
            "DICOMNumberOfStudyRelatedSeries": 1,
            "DICOMNumberOfStudyRelatedInstances": 3,
        },
    }
    # This client sends the whole seconds of a moment only.
    second = int(found["updatedAt"])
    ends = [datetime.fromtimestamp(second + after, UTC).isoformat() for after in (-2, -1, 0, 1)]
    sort = {"sortField": "updatedAt", "sortOrder": "DESC"}
    for span, summaries in ((ends[2:], [summary]), (ends[:2], [])):
        asked = criteria(DICOMSeriesInstanceUID=str(dataset.SeriesInstanceUID), updatedAt=span)
        answer = aws("search-image-sets", *filled.here, *asked)
        assert answer == {"imageSetsMetadataSummaries": summaries, "sort": sort}

    # Three studies lie at or between these moments. They were imported in another order.
    moments = [
        {"DICOMStudyDate": "20010203", "DICOMStudyTime": "101112.25"},
        {"DICOMStudyDate": "20020304", "DICOMStudyTime": "121314"},
    ]
    asked = criteria("DICOMStudyDateAndTime", "ASC", DICOMStudyDateAndTime=moments)
    answer = aws("search-image-sets", *filled.here, *asked, "--page-size", "1")
    assert answer["sort"] == {"sortField": "DICOMStudyDateAndTime", "sortOrder": "ASC"}
    patients = [each["DICOMTags"]["DICOMPatientId"] for each in answer["imageSetsMetadataSummaries"]]
    assert patients == ["MADE-UP-OLD", "MADE-UP-NEXT", "MADE-UP-READ"]
    page = aws("search-image-sets", *filled.here, *asked, "--max-results", "2")
    assert page["imageSetsMetadataSummaries"] == answer["imageSetsMetadataSummaries"][:2]
    token = ["--next-token", page["nextToken"]]
    page = aws("search-image-sets", *filled.here, *asked, "--max-results", "2", *token)
    assert page["imageSetsMetadataSummaries"] == answer["imageSetsMetadataSummaries"][2:]
    assert "nextToken" not in page
    message = aws.fails("ValidationException", "search-image-sets", *filled.here, *token)
    assert "nextToken is not valid for this request" in message


def test_an_image_set_is_read(aws: Cli, filled: Filled) -> None:
    read, datasets = filled.image_set("READ"), filled.series["READ"]
    found = aws("get-image-set", *read)
    times = {name: found[name] for name in ("createdAt", "updatedAt")}
    assert found == {
        "datastoreId": filled.datastore_id,
        "imageSetId": read[-1],
        "versionId": "1",
        "imageSetState": "ACTIVE",
        "imageSetWorkflowStatus": "CREATED",
        **times,
        "imageSetArn": f"{UNKNOWN_ARN.replace(UNKNOWN, filled.datastore_id)}/imageset/{read[-1]}",
        "isPrimary": True,
        "lastAccessedAt": found["lastAccessedAt"],
        "storageTier": "FREQUENT_ACCESS",
    }
    version = {"imageSetId": read[-1], "versionId": "1", "imageSetState": "ACTIVE", "isPrimary": True, **times}
    listed = aws("list-image-set-versions", *read)
    assert listed == {"imageSetPropertiesList": [{**version, "ImageSetWorkflowStatus": "CREATED"}]}

    document = aws.document(read)
    assert (document["DatastoreID"], document["ImageSetID"]) == (filled.datastore_id, read[-1])
    assert document["Patient"]["DICOM"]["PatientID"] == "MADE-UP-READ"
    assert document["Study"]["DICOM"]["StudyInstanceUID"] == datasets[0].StudyInstanceUID
    assert document["Study"]["DICOM"]["StudyDate"] == "20020304"
    series = document["Study"]["Series"][datasets[0].SeriesInstanceUID]
    assert (series["DICOM"]["Modality"], series["DICOM"]["BodyPartExamined"]) == ("CT", "CHEST")
    assert list(series["Instances"]) == [dataset.SOPInstanceUID for dataset in datasets]
    for dataset in datasets:
        instance = series["Instances"][dataset.SOPInstanceUID]
        assert instance["StoredTransferSyntaxUID"] == "1.2.840.10008.1.2.4.202"
        values = instance["DICOM"]
        assert values["TransferSyntaxUID"] == "1.2.840.10008.1.2.1"
        assert (values["Rows"], values["Columns"]) == (128, 128)
        assert int(values["InstanceNumber"]) == dataset.InstanceNumber
        assert [float(text) for text in values["ImagePositionPatient"]] == dataset.ImagePositionPatient
        assert float(values["RescaleIntercept"]) == dataset.RescaleIntercept
        assert "PatientID" not in values
        check_pixels(aws, read, instance, dataset, "image/jph")


def update(aws: Cli, where: list[str], latest: int, *words: str, **changes: Json) -> Json:
    """Update an image set and wait for it; answers what it became."""
    trees = {name: json.dumps({"SchemaVersion": 1.1, **tree}) for name, tree in changes.items()}
    answer = aws(
        *("update-image-set-metadata", *where, "--latest-version-id", str(latest), *words),
        *("--update-image-set-metadata-updates", json.dumps({"DICOMUpdates": trees})),
    )
    assert (answer["imageSetId"], answer["latestVersionId"]) == (where[-1], str(latest + 1))
    assert (answer["imageSetState"], answer["imageSetWorkflowStatus"]) == ("LOCKED", "UPDATING")
    found = aws.settled(where)
    assert found["versionId"] == str(latest + 1)
    return found


def test_an_image_set_is_edited_and_goes_back(aws: Cli, filled: Filled) -> None:
    where, (kept, removed) = filled.image_set("EDIT"), filled.series["EDIT"]
    before = aws.document(where)

    described = {"Study": {"DICOM": {"StudyDescription": "CHEST"}}}
    update(aws, where, 1, "--include-study-image-sets", updatableAttributes=described)
    sex = {"Patient": {"DICOM": {"PatientSex": kept.PatientSex}}}
    assert update(aws, where, 2, removableAttributes=sex)["imageSetWorkflowStatus"] == "UPDATED"
    after = aws.document(where)
    assert after["Study"]["DICOM"].pop("StudyDescription") == "CHEST"
    assert before["Study"]["DICOM"]["StudyDescription"] == kept.StudyDescription
    assert after["Patient"]["DICOM"] == {
        name: value for name, value in before["Patient"]["DICOM"].items() if name != "PatientSex"
    }
    assert instances_of(after) == instances_of(before)

    # What is not there any more cannot be removed: the attempt fails, and counts.
    failed = update(aws, where, 3, removableAttributes=sex)
    assert (failed["imageSetState"], failed["imageSetWorkflowStatus"]) == ("ACTIVE", "UPDATE_FAILED")
    assert "PatientSex" in failed["message"]

    # An instance goes with force only, and only by the latest version.
    instance = {"Instances": {removed.SOPInstanceUID: {}}}
    tree = json.dumps({"SchemaVersion": 1.1, "Study": {"Series": {removed.SeriesInstanceUID: instance}}})
    asked = ["--update-image-set-metadata-updates", json.dumps({"DICOMUpdates": {"removableAttributes": tree}})]
    command = ["update-image-set-metadata", *where, *asked, "--latest-version-id"]
    assert "force" in aws.fails("ValidationException", *command, "4")
    assert "is 4, not the one given" in aws.fails("ConflictException", *command, "3", "--force")
    found = update(aws, where, 4, "--force", removableAttributes=json.loads(tree))
    assert (found["imageSetWorkflowStatus"], found["overrides"]) == ("UPDATED", {"forced": True})
    assert list(instances_of(aws.document(where))) == [kept.SOPInstanceUID]
    assert aws("get-image-set", *where, "--version-id", "1")["imageSetWorkflowStatus"] == "CREATED"
    assert aws.document(where, "--version-id", "1") == before

    revert = ["--update-image-set-metadata-updates", "revertToVersionId=1"]
    answer = aws("update-image-set-metadata", *where, "--latest-version-id", "5", *revert)
    assert answer["latestVersionId"] == "6"
    assert aws.settled(where)["imageSetWorkflowStatus"] == "UPDATED"
    assert aws.document(where) == before
    versions = aws("list-image-set-versions", *where, "--page-size", "4")["imageSetPropertiesList"]
    assert [(each["versionId"], each["ImageSetWorkflowStatus"]) for each in versions] == [
        ("6", "UPDATED"),
        ("5", "UPDATED"),
        ("4", "UPDATE_FAILED"),
        ("3", "UPDATED"),
        ("2", "UPDATED"),
        ("1", "CREATED"),
    ]


def copy(aws: Cli, filled: Filled, source: list[str], *words: str, part: Json | None = None) -> list[str]:
    """Copy an image set, wait for the copy, and return the options that name it."""
    asked: Json = {"sourceImageSet": {"latestVersionId": "1"}}
    if part is not None:
        asked["sourceImageSet"]["DICOMCopies"] = {"copiableAttributes": json.dumps(part)}
    answer = aws(
        *("copy-image-set", *filled.here, "--source-image-set-id", source[-1], *words),
        *("--copy-image-set-information", json.dumps(asked)),
    )
    read, made = answer["sourceImageSetProperties"], answer["destinationImageSetProperties"]
    assert (read["imageSetId"], read["latestVersionId"]) == (source[-1], "1")
    assert (read["imageSetState"], read["imageSetWorkflowStatus"]) == ("LOCKED", "COPYING_WITH_READ_ONLY_ACCESS")
    assert (made["imageSetState"], made["imageSetWorkflowStatus"]) == ("LOCKED", "COPYING")
    where = [*filled.here, "--image-set-id", made["imageSetId"]]
    assert aws.settled(where)["imageSetWorkflowStatus"] == "COPIED"
    return where


def test_image_sets_are_copied_promoted_and_deleted(aws: Cli, filled: Filled) -> None:
    source, (first, second) = filled.image_set("COPY"), filled.series["COPY"]
    original = aws.document(source)

    whole = copy(aws, filled, source)
    copied = aws.document(whole)
    assert copied == {**original, "ImageSetID": whole[-1]}
    tree = {"Study": {"Series": {second.SeriesInstanceUID: {"Instances": {second.SOPInstanceUID: {}}}}}}
    part = copy(aws, filled, source, part={"SchemaVersion": "1.1", **tree})
    copied = instances_of(aws.document(part))
    assert copied == {second.SOPInstanceUID: instances_of(original)[second.SOPInstanceUID]}

    # One primary image set a series: its place must be free before a copy takes it.
    found = aws("search-image-sets", *filled.here, *criteria(DICOMPatientId=first.PatientID, isPrimary=False))
    summaries = found["imageSetsMetadataSummaries"]
    assert {each["imageSetId"] for each in summaries} == {whole[-1], part[-1]}
    asked = ["--copy-image-set-information", "sourceImageSet={latestVersionId=1}", "--promote-to-primary"]
    promotion = [*filled.here, "--source-image-set-id", whole[-1], *asked]
    assert "primary" in aws.fails("ConflictException", "copy-image-set", *promotion)
    assert aws("delete-image-set", *source) == {
        "datastoreId": filled.datastore_id,
        "imageSetId": source[-1],
        "imageSetState": "LOCKED",
        "imageSetWorkflowStatus": "DELETING",
    }
    gone = aws.settled(source)
    assert (gone["imageSetState"], gone["imageSetWorkflowStatus"]) == ("DELETED", "DELETED")
    assert gone["deletedAt"] >= gone["createdAt"]
    aws.fails("ResourceNotFoundException", "get-image-set-metadata", *source, "metadata")
    promoted = copy(aws, filled, whole, "--promote-to-primary")
    found = aws("search-image-sets", *filled.here, *criteria(DICOMPatientId=first.PatientID, isPrimary=True))
    assert [each["imageSetId"] for each in found["imageSetsMetadataSummaries"]] == [promoted[-1]]
    instance = instances_of(aws.document(promoted))[first.SOPInstanceUID]
    check_pixels(aws, promoted, instance, first, "image/jph")


def test_an_image_set_is_tagged(aws: Cli, filled: Filled) -> None:
    arn = ["--resource-arn", aws("get-image-set", *filled.image_set("TAGS"))["imageSetArn"]]
    assert aws("tag-resource", *arn, "--tags", json.dumps({"a:b/c": "d e", "team": "x", "gone": ""})) == {}
    assert aws("untag-resource", *arn, "--tag-keys", "gone", "absent") == {}
    assert aws("list-tags-for-resource", *arn) == {"tags": {"a:b/c": "d e", "team": "x"}}


def test_a_data_store_lives_and_ends(aws: Cli, store: DataStore, store_folder: Path) -> None:
    """One data store from its creation to its end, with JPEG 2000 frames and files in a bucket."""
    bucket = store_folder / "s3" / "hospital"
    (dataset,) = write_series(bucket / "scans", "LIFE")
    write_series(bucket / "elsewhere", "ELSE")
    made = aws(
        *("create-datastore", "--datastore-name", "life", "--lossless-storage-format", "JPEG_2000_LOSSLESS"),
        *("--tags", json.dumps({"team": "y"})),
    )
    here = ["--datastore-id", made["datastoreId"]]
    properties = aws("get-datastore", *here)["datastoreProperties"]
    assert properties["losslessStorageFormat"] == "JPEG_2000_LOSSLESS"
    arn = ["--resource-arn", properties["datastoreArn"]]
    assert aws("tag-resource", *arn, "--tags", "project=z") == {}
    assert aws("untag-resource", *arn, "--tag-keys", "team") == {}
    assert aws("list-tags-for-resource", *arn) == {"tags": {"project": "z"}}

    started = aws(
        *("start-dicom-import-job", *here, "--data-access-role-arn", ROLE),
        *("--input-s3-uri", "s3://hospital/scans/", "--output-s3-uri", "s3://hospital/reports"),
    )
    job = ended(aws, here, started["jobId"])
    reports = f"reports/{made['datastoreId']}-DicomImport-{started['jobId']}/"
    assert (job["jobStatus"], job["outputS3Uri"]) == ("COMPLETED", f"s3://hospital/{reports}")
    (line,) = (bucket / reports / "SUCCESS" / "success.ndjson").read_text().splitlines()
    assert json.loads(line)["inputFile"] == "scans/LIFE-1.dcm"
    (summary,) = aws("search-image-sets", *here)["imageSetsMetadataSummaries"]
    assert summary["imageSetId"] == json.loads(line)["importResponse"]["imageSetId"]
    where = [*here, "--image-set-id", summary["imageSetId"]]
    instance = instances_of(aws.document(where))[dataset.SOPInstanceUID]
    assert instance["StoredTransferSyntaxUID"] == "1.2.840.10008.1.2.4.90"
    check_pixels(aws, where, instance, dataset, "image/j2c")

    # Its only image set goes before it does.
    assert "not empty" in aws.fails("ConflictException", "delete-datastore", *here)
    aws("delete-image-set", *where)
    assert aws.settled(where)["imageSetState"] == "DELETED"
    assert aws("delete-datastore", *here) == {"datastoreId": made["datastoreId"], "datastoreStatus": "DELETING"}
    deleted = aws.until(
        lambda answer: bool(answer["datastoreSummaries"]), "list-datastores", "--datastore-status", "DELETED"
    )
    assert [each["datastoreId"] for each in deleted["datastoreSummaries"]] == [made["datastoreId"]]
    aws.fails("ResourceNotFoundException", "search-image-sets", *here)


NOT_FOUND, INVALID = "ResourceNotFoundException", "ValidationException"
NO_STORE = f"--datastore-id {UNKNOWN}"
NO_SET = f"--datastore-id STORE --image-set-id {UNKNOWN}"
IMPORT = f"--data-access-role-arn {ROLE} --output-s3-uri s3://bucket/ --input-s3-uri"
EQUAL_DATE = '{"filters":[{"operator":"EQUAL","values":[{"createdAt":1.5}]}]}'


@pytest.mark.parametrize(
    ("code", "said", "command"),
    [
        (NOT_FOUND, "Datastore with id", f"get-datastore {NO_STORE}"),
        (NOT_FOUND, "Datastore with id", f"delete-datastore {NO_STORE}"),
        (NOT_FOUND, "import job with id 0", "get-dicom-import-job --datastore-id STORE --job-id 0"),
        (NOT_FOUND, "Datastore with id", f"list-dicom-import-jobs {NO_STORE}"),
        (NOT_FOUND, "ImageSet with id", f"get-image-set {NO_SET}"),
        (NOT_FOUND, "ImageSet with id", f"get-image-frame {NO_SET} --image-frame-information imageFrameId={UNKNOWN} f"),
        (NOT_FOUND, "ImageSet with id", f"list-image-set-versions {NO_SET}"),
        (NOT_FOUND, "ImageSet with id", f"delete-image-set {NO_SET}"),
        (NOT_FOUND, "Datastore with id", f"tag-resource --resource-arn {UNKNOWN_ARN} --tags a=b"),
        (NOT_FOUND, "Datastore with id", f"untag-resource --resource-arn {UNKNOWN_ARN} --tag-keys a"),
        (NOT_FOUND, "Datastore with id", f"list-tags-for-resource --resource-arn {UNKNOWN_ARN}"),
        # The CLI sends what is not well formed, and leaves it to the service to say so.
        (INVALID, "'datastoreId' failed to satisfy constraint", "get-datastore --datastore-id XYZ"),
        (INVALID, "less than or equal to 50", "list-datastores --max-results 51"),
        (INVALID, "[HTJ2K, JPEG_2000_LOSSLESS]", "create-datastore --lossless-storage-format GIF"),
        (INVALID, "'inputS3Uri'", f"start-dicom-import-job --datastore-id STORE {IMPORT} bucket/"),
        (
            INVALID,
            "not supported for createdAt",
            f"search-image-sets --datastore-id STORE --search-criteria {EQUAL_DATE}",
        ),
    ],
    ids=lambda text: text.partition(" ")[0],
)
def test_what_is_unknown_or_malformed_is_refused(aws: Cli, filled: Filled, code: str, said: str, command: str) -> None:
    assert said in aws.fails(code, *command.replace("STORE", filled.datastore_id).split())


def test_a_request_must_be_signed_with_the_keys_of_the_store(aws: Cli) -> None:
    message = aws.fails("InvalidSignatureException", "list-datastores", AWS_SECRET_ACCESS_KEY="x" * 40)
    assert message.startswith("The request signature we calculated does not match")
    aws.fails("UnrecognizedClientException", "list-datastores", AWS_ACCESS_KEY_ID="AKIA" + "X" * 16)
    aws.fails("MissingAuthenticationTokenException", "list-datastores", "--no-sign-request")


def test_every_operation_succeeded_and_was_refused(aws: Cli, request: pytest.FixtureRequest) -> None:
    tests = {name for name in vars(request.module) if name.startswith("test_")}
    ran = {item.originalname for item in request.session.items if item.path == request.path}
    if tests - ran:
        pytest.skip("this is about the module as a whole, and a part of it was chosen")
    assert len(COMMANDS) == 18
    assert aws.succeeded == COMMANDS
    assert aws.refused == COMMANDS
