"""Imports beyond one folder in place: S3 itself, staging, divided jobs, limits, JSON metadata."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

import ahi_ml
from ahi_ml import imports, local
from ahi_ml.errors import ConfigError, ServiceError
from ahi_ml.imports import JobLimits
from ahi_ml.imports.staging import LocalFile, jobs_of

ROLE = "arn:aws:iam::123456789012:role/import"
NAMES = ["CT_small.dcm", "MR_small.dcm", "rtplan.dcm", "SC_rgb_rle_2frame.dcm", "JPEG2000.dcm"]


@pytest.fixture
def scans(tmp_path: Path, pydicom_file: Callable[[str], Path]) -> Path:
    """Five DICOM files of five series in two folders, and one file that is none."""
    folder = tmp_path / "DOE^JANE"  # file names may say whose they are
    (folder / "deeper").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        shutil.copy(pydicom_file(name), folder / ("deeper" if number % 2 else ".") / name)
    (folder / "notes.txt").write_text("no DICOM")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ahi_ml.DataStore]:
    with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache") as opened:
        yield opened


@pytest.fixture
def s3(moto_s3: str) -> Iterator[Any]:
    """A client of an S3 server that this process's AWS settings name, with two buckets."""
    client = boto3.client("s3")
    for bucket in ("in-bucket", "out-bucket"):
        client.create_bucket(Bucket=bucket)
    yield client
    for bucket in ("in-bucket", "out-bucket"):
        for found in keys(client, bucket):
            client.delete_object(Bucket=bucket, Key=found)
        client.delete_bucket(Bucket=bucket)


def keys(client: Any, bucket: str) -> list[str]:
    return [found["Key"] for found in client.list_objects_v2(Bucket=bucket).get("Contents", ())]


def staged(store_folder: Path) -> list[Path]:
    return [path for path in (store_folder / "s3" / "import-staging").rglob("*") if path.is_file()]


class TestS3:
    def test_from_s3_to_s3(self, tmp_path: Path, scans: Path, s3: Any) -> None:
        for path in scans.rglob("*"):
            if path.is_file():
                s3.upload_file(str(path), "in-bucket", f"scans/{path.relative_to(scans)}")
        s3.put_object(Bucket="in-bucket", Key="scans/", Body=b"")  # as consoles make folders
        s3.put_object(Bucket="in-bucket", Key="scans-of-others/a.dcm", Body=b"x")
        local.configure(tmp_path / "store", s3=True)
        with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache") as store:
            report = store.import_dicom("s3://in-bucket/scans/", output_uri="s3://out-bucket/reports/")
            assert (report.scanned, report.imported) == (6, 5)
            assert [failure.input_file for failure in report.failed] == ["scans/notes.txt"]
            index = store.search(primary=None).index()
            assert len(store.reader.read(list(index.sources(range(len(index)))))) == len(index) > 4
            datastore_id = store.datastore_id
        (job_id,) = report.job_ids
        folder = f"reports/{datastore_id}-DicomImport-{job_id}/"
        assert sorted(keys(s3, "out-bucket")) == [
            f"{folder}FAILURE/failure.ndjson",
            f"{folder}SUCCESS/success.ndjson",
            f"{folder}WARNING/warning.ndjson",
            f"{folder}job-output-manifest.json",
        ]

    def test_a_local_folder_through_staging_on_s3(self, tmp_path: Path, scans: Path, s3: Any) -> None:
        seen: list[str] = []
        local.configure(tmp_path / "store", s3=True)
        with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache") as store:
            client, start = store.client, store.client.start_dicom_import_job

            def started(**asked: Any) -> Any:
                seen.extend(keys(s3, "in-bucket"))
                return start(**asked)

            client.start_dicom_import_job = started
            report = store.import_dicom(
                scans,
                staging_uri="s3://in-bucket/staging",
                output_uri="s3://out-bucket/",
                limits=JobLimits(files=4),
            )
        assert (report.scanned, report.imported, len(report.job_ids)) == (6, 5, 2)
        assert [failure.input_file for failure in report.failed] == [str(scans / "notes.txt")]
        assert len(seen) == 6  # four, and two: a job's files are gone before the next one's come
        assert all(key.startswith("staging/") and "DOE" not in key and ".dcm" not in key for key in seen)
        assert keys(s3, "in-bucket") == []

    def test_a_folder_of_the_store_goes_before_a_bucket(self, tmp_path: Path, scans: Path, s3: Any) -> None:
        local.configure(tmp_path / "store", s3=True)
        with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache") as store:
            shutil.copytree(scans, tmp_path / "store" / "s3" / "in-bucket" / "scans")
            assert store.import_dicom("s3://in-bucket/scans/").imported == 5

    def test_a_bucket_that_is_not_there(self, tmp_path: Path, s3: Any) -> None:
        local.configure(tmp_path / "store", s3=True)
        with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache") as store:
            with pytest.raises(ServiceError, match=r"ACCESS_DENIED.*no-such-bucket.*NoSuchBucket"):
                store.import_dicom("s3://no-such-bucket/x/")
            s3.put_object(Bucket="in-bucket", Key="x/a", Body=b"x")
            with pytest.raises(ServiceError, match=r"ACCESS_DENIED.*no-such-bucket"):
                store.import_dicom("s3://in-bucket/x/", output_uri="s3://no-such-bucket/")

    def test_s3_is_not_asked_unless_set(self, store: ahi_ml.DataStore, s3: Any) -> None:
        s3.put_object(Bucket="in-bucket", Key="x/a", Body=b"x")
        with pytest.raises(ServiceError, match=r"ACCESS_DENIED: there is no bucket in-bucket\b"):
            store.import_dicom("s3://in-bucket/x/")


class TestDividedJobs:
    def test_more_files_than_a_job_takes(self, tmp_path: Path, store: ahi_ml.DataStore, scans: Path) -> None:
        report = store.import_dicom(scans, limits=JobLimits(files=2))
        assert (report.scanned, report.imported, len(report.job_ids)) == (6, 5, 3)
        assert len(report.image_sets) == 5
        assert [failure.input_file for failure in report.failed] == [str(scans / "notes.txt")]
        assert staged(tmp_path / "store") == []
        assert sorted(path.name for path in scans.rglob("*.dcm")) == sorted(NAMES)

    def test_a_series_in_two_jobs_is_one_image_set(self, store: ahi_ml.DataStore, tmp_path: Path, scans: Path) -> None:
        import pydicom

        dataset = pydicom.dcmread(scans / "CT_small.dcm")
        folder = tmp_path / "series"
        folder.mkdir()
        for number in range(5):
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
            dataset.save_as(folder / f"{number}")
        report = store.import_dicom(folder, limits=JobLimits(files=2))
        assert (report.imported, len(report.job_ids), len(report.image_sets)) == (5, 3, 1)
        found = store.client.get_image_set(datastoreId=store.datastore_id, imageSetId=report.image_sets[0])
        assert found["versionId"] == "3"

    def test_a_file_larger_than_a_job_takes(self, store: ahi_ml.DataStore, scans: Path) -> None:
        size = (scans / "CT_small.dcm").stat().st_size
        report = store.import_dicom(scans, limits=JobLimits(file_bytes=size - 1))
        assert str(scans / "CT_small.dcm") in {failure.input_file for failure in report.failed}
        assert report.scanned == 6
        assert report.imported + len(report.failed) == 6

    def test_without_waiting_every_job_is_started(self, tmp_path: Path, store: ahi_ml.DataStore, scans: Path) -> None:
        report = store.import_dicom(scans, limits=JobLimits(files=2), wait=False)
        assert (len(report.job_ids), report.status) == (3, "SUBMITTED")
        for job_id in report.job_ids:
            ended = threading.Event()
            while not ended.wait(0.05):
                job = store.client.get_dicom_import_job(datastoreId=store.datastore_id, jobId=job_id)["jobProperties"]
                if job["jobStatus"] in ("COMPLETED", "FAILED"):
                    ended.set()
            assert job["jobStatus"] == "COMPLETED"
        assert len(staged(tmp_path / "store")) == 6  # the jobs may still have been reading them

    def test_nothing_stays_staged_when_a_job_fails(self, tmp_path: Path, scans: Path) -> None:
        faults = {"quota_rate": 1, "operations": ["StartDICOMImportJob"]}  # which no client asks for again
        with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache", faults=faults) as store:
            with pytest.raises(ServiceError):
                store.import_dicom(scans, limits=JobLimits(files=2))
            assert staged(tmp_path / "store") == []

    def test_an_interrupt_says_what_stays_where(
        self, tmp_path: Path, store: ahi_ml.DataStore, scans: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        def interrupted(**asked: Any) -> Any:
            raise KeyboardInterrupt

        store.client.get_dicom_import_job = interrupted
        with pytest.raises(KeyboardInterrupt):
            store.import_dicom(scans, limits=JobLimits(files=2))
        assert len(staged(tmp_path / "store")) == 2
        assert "s3://import-staging/" in caplog.text
        assert "DOE" not in caplog.text

    def test_a_later_job_that_fails_leaves_the_others_their_files(
        self, tmp_path: Path, store: ahi_ml.DataStore, scans: Path
    ) -> None:
        start, started = store.client.start_dicom_import_job, []

        def failing(**asked: Any) -> Any:
            started.append(asked)
            return start(**{**asked, **({"inputS3Uri": "nonsense"} if len(started) > 1 else {})})

        store.client.start_dicom_import_job = failing
        with pytest.raises(ServiceError):
            store.import_dicom(scans, limits=JobLimits(files=2), wait=False)
        assert len(staged(tmp_path / "store")) == 2

    def test_jobs_of(self) -> None:
        files = [LocalFile(Path(str(number)), size) for number, size in enumerate([5, 5, 5, 1, 1, 9, 10, 3])]

        def sizes(limits: JobLimits) -> list[list[int]]:
            return [[file.size for file in job] for job in jobs_of(files, limits)]

        assert sizes(JobLimits()) == [[5, 5, 5, 1, 1, 9, 10, 3]]
        assert sizes(JobLimits(files=3)) == [[5, 5, 5], [1, 1, 9], [10, 3]]
        assert sizes(JobLimits(job_bytes=10)) == [[5, 5], [5, 1, 1], [9], [10], [3]]
        assert jobs_of([], JobLimits()) == []

    def test_on_aws_a_folder_needs_a_staging_prefix(self, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        store = ahi_ml.connect("0" * 32, region="us-east-1")
        with pytest.raises(ConfigError, match="staging_uri="):
            store.import_dicom(scans, role_arn=ROLE, output_uri="s3://out/")
        with pytest.raises(ConfigError, match="role_arn="):
            store.import_dicom(scans, staging_uri="s3://in/")
        with pytest.raises(ConfigError, match="is an s3:// URI"):
            store.import_dicom(scans, role_arn=ROLE, output_uri="s3://out/", staging_uri="in/")

    def test_as_on_aws(self, tmp_path: Path, scans: Path, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """By id and endpoint nothing is known of folders: uploads and reports go through S3."""
        local.configure(tmp_path / "store", s3=True)
        with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache") as store:
            for name, value in store.environment().items():
                monkeypatch.setenv(name, value)
            with ahi_ml.connect(store.datastore_id, endpoint_url=store.endpoint_url) as aws:
                report = aws.import_dicom(
                    scans,
                    role_arn=ROLE,
                    output_uri="s3://out-bucket/r/",
                    staging_uri="s3://in-bucket/",
                    limits=JobLimits(files=5),
                )
        assert (report.scanned, report.imported, len(report.job_ids)) == (6, 5, 2)
        assert keys(s3, "in-bucket") == []
        assert len(keys(s3, "out-bucket")) == 8


def test_a_report_that_can_be_seen_ends_the_wait(
    store: ahi_ml.DataStore, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_WATCHED_POLL_S", "_SLOWEST_POLL_S"):
        monkeypatch.setattr(imports, name, 60.0)
    started = time.monotonic()
    assert store.import_dicom(scans).imported == 5
    assert time.monotonic() - started < 50


class TestLimits:
    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            ({"files": 5}, "FILE_COUNTS_LIMIT_EXCEEDED"),
            ({"folders": 1}, "FOLDER_COUNTS_LIMIT_EXCEEDED"),
            ({"job_bytes": 1000}, "FILE_SIZE_LIMIT_EXCEEDED"),
        ],
    )
    def test_a_job_over_a_limit_imports_nothing(
        self, tmp_path: Path, scans: Path, limits: dict[str, int], message: str
    ) -> None:
        local.configure(tmp_path / "store", limits=limits)
        with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache") as store:
            with pytest.raises(ServiceError, match=message):
                store.import_dicom(scans)
            assert len(store.search(primary=None).to_pandas()) == 0
            local.configure(tmp_path / "store")  # in force from the next job on
            assert store.import_dicom(scans).imported == 5

    def test_a_file_over_the_limit_fails_alone(self, tmp_path: Path, scans: Path) -> None:
        size = (scans / "CT_small.dcm").stat().st_size
        local.configure(tmp_path / "store", limits={"file_bytes": size - 1})
        with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache") as store:
            report = store.import_dicom(scans)
        reasons = {Path(failure.input_file).name: failure.reason for failure in report.failed}
        assert "FILE_SIZE_LIMIT_EXCEEDED" in reasons["CT_small.dcm"]
        assert report.imported == 6 - len(reasons)

    @pytest.mark.parametrize("limits", [{"files": 0}, {"files": True}, {"file": 1}, {"files": 1.5}])
    def test_limits_that_cannot_be(self, tmp_path: Path, limits: Any) -> None:
        with pytest.raises(ConfigError, match=r"limit|known are"):
            local.configure(tmp_path / "store", limits=limits)

    def test_settings_that_are_none_fail_the_job_and_say_so(self, store: ahi_ml.DataStore, tmp_path: Path) -> None:
        (tmp_path / "store" / "settings.json").write_text("{")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ServiceError, match="settings"):
            store.import_dicom(tmp_path / "empty")


class TestJsonMetadata:
    def run(self, store: ahi_ml.DataStore, folder: Path, mappings: list[dict[str, str]]) -> dict[str, list[Any]]:
        job_id = store.client.start_dicom_import_job(
            datastoreId=store.datastore_id,
            dataAccessRoleArn=ROLE,
            inputS3Uri=f"s3://this-machine{folder}/",
            outputS3Uri="s3://reports/",
            importConfiguration={"dicomJsonMetadataImportConfiguration": {"dicomMetadataMappings": mappings}},
        )["jobId"]
        while True:
            asked = {"datastoreId": store.datastore_id, "jobId": job_id}
            job = store.client.get_dicom_import_job(**asked)["jobProperties"]
            if job["jobStatus"] in ("COMPLETED", "FAILED"):
                break
        assert job["jobStatus"] == "COMPLETED", job
        assert job["importConfiguration"]["dicomJsonMetadataImportConfiguration"]["dicomMetadataMappings"] == mappings
        root = Path(store._target.folder, "s3", job["outputS3Uri"].removeprefix("s3://"))  # type: ignore[arg-type]
        return {
            name: [json.loads(line) for line in (root / name.upper() / f"{name}.ndjson").read_text().splitlines()]
            for name in ("success", "failure")
        }

    @pytest.fixture
    def folder(self, tmp_path: Path, pydicom_file: Callable[[str], Path]) -> Path:
        folder = tmp_path / "with-json"
        folder.mkdir()
        shutil.copy(pydicom_file("CT_small.dcm"), folder)
        return folder

    def uids(self, pydicom_file: Callable[[str], Path]) -> dict[str, str]:
        import pydicom

        dataset = pydicom.dcmread(pydicom_file("CT_small.dcm"))
        return {"studyInstanceUID": dataset.StudyInstanceUID, "seriesInstanceUID": dataset.SeriesInstanceUID}

    def test_elements_are_merged(self, store: ahi_ml.DataStore, folder: Path, pydicom_file: Any) -> None:
        uids = self.uids(pydicom_file)
        tree = {
            "SchemaVersion": 1.1,
            "Study": {
                "DICOM": {"StudyDescription": "ENHANCED"},
                "Series": {uids["seriesInstanceUID"]: {"DICOM": {"BodyPartExamined": "HEAD"}}},
            },
        }
        (folder / "study.json").write_text(json.dumps(tree))
        lines = self.run(store, folder, [{**uids, "metadataFilePath": "study.json"}])
        assert lines["failure"] == []
        assert [line["inputFile"].rsplit("/", 1)[-1] for line in lines["success"]] == ["CT_small.dcm", "study.json"]
        (summary,) = store.client.search_image_sets(datastoreId=store.datastore_id)["imageSetsMetadataSummaries"]
        assert summary["version"] == 2
        assert summary["DICOMTags"]["DICOMStudyDescription"] == "ENHANCED"
        assert summary["DICOMTags"]["DICOMSeriesBodyPart"] == "HEAD"

    @pytest.mark.parametrize(
        ("name", "text", "reason"),
        [
            ("absent.json", None, "does not exist"),
            ("bad.json", "{", "not valid JSON"),
            ("other.json", "{}", "SchemaVersion"),
            ("pixels.json", '{"SchemaVersion": 1.1, "Study": {"DICOM": {"PixelData": "x"}}}', "PixelData"),
        ],
    )
    def test_what_cannot_be_merged_is_a_failure(
        self, store: ahi_ml.DataStore, folder: Path, pydicom_file: Any, name: str, text: str | None, reason: str
    ) -> None:
        if text is not None:
            (folder / name).write_text(text)
        lines = self.run(store, folder, [{**self.uids(pydicom_file), "metadataFilePath": name}])
        (line,) = lines["failure"]
        assert reason in line["exception"]["message"]
        assert len(lines["success"]) == 1

    def test_a_study_that_is_not_there(self, store: ahi_ml.DataStore, folder: Path) -> None:
        (folder / "a.json").write_text('{"SchemaVersion": 1.1, "Study": {"DICOM": {"StudyDescription": "X"}}}')
        lines = self.run(store, folder, [{"studyInstanceUID": "1.2.3", "metadataFilePath": "a.json"}])
        assert "no primary image set" in lines["failure"][0]["exception"]["message"]


class TestClientTokens:
    def test_a_job_token_with_other_parameters_is_a_conflict(self, store: ahi_ml.DataStore, scans: Path) -> None:
        asked = {
            "datastoreId": store.datastore_id,
            "dataAccessRoleArn": ROLE,
            "inputS3Uri": f"s3://this-machine{scans}/deeper/",
            "outputS3Uri": "s3://reports/",
            "clientToken": "token",
        }
        first = store.client.start_dicom_import_job(**asked)["jobId"]
        assert store.client.start_dicom_import_job(**asked)["jobId"] == first
        for change in ({"inputS3Uri": "s3://other/"}, {"outputS3Uri": "s3://other/"}, {"jobName": "named"}):
            with pytest.raises(store.client.exceptions.ConflictException, match="clientToken"):
                store.client.start_dicom_import_job(**{**asked, **change})

    def test_a_data_store_token_with_other_parameters_is_a_conflict(self, store: ahi_ml.DataStore) -> None:
        asked = {"datastoreName": "one", "clientToken": "token"}
        first = store.client.create_datastore(**asked)["datastoreId"]
        assert store.client.create_datastore(**asked)["datastoreId"] == first
        for change in ({"datastoreName": "two"}, {"losslessStorageFormat": "JPEG_2000_LOSSLESS"}):
            with pytest.raises(store.client.exceptions.ConflictException, match="clientToken"):
                store.client.create_datastore(**{**asked, **change})


class TestWarnings:
    @pytest.mark.parametrize(
        ("change", "code", "kind", "named"),
        [
            ({"StudyInstanceUID": "1.2.x"}, 0xB201, "InvalidUIDFormat", "StudyInstanceUID"),
            ({"PatientName": "N" * 257}, 0xB202, "InvalidValueLength", "PatientName"),
            ({"StudyTime": "1" * 29}, 0xB202, "InvalidValueLength", "StudyTime"),
        ],
    )
    def test_each_has_its_code(
        self,
        store: ahi_ml.DataStore,
        tmp_path: Path,
        pydicom_file: Callable[[str], Path],
        change: dict[str, str],
        code: int,
        kind: str,
        named: str,
    ) -> None:
        import pydicom
        from pydicom.config import IGNORE
        from pydicom.dataelem import DataElement

        dataset = pydicom.dcmread(pydicom_file("CT_small.dcm"))
        for keyword, value in change.items():
            old = dataset[keyword]
            dataset[keyword] = DataElement(old.tag, old.VR, value, validation_mode=IGNORE)
        (tmp_path / "in").mkdir()
        dataset.save_as(tmp_path / "in" / "warned.dcm")
        shutil.copy(pydicom_file("MR_small.dcm"), tmp_path / "in")
        report = store.import_dicom(tmp_path / "in")
        assert (report.imported, len(report.failed)) == (2, 0)
        (warning,) = report.warnings
        assert warning.input_file == str(tmp_path / "in" / "warned.dcm")
        assert named in warning.reason
        assert next(iter(change.values())) not in warning.reason
        (file,) = (tmp_path / "store" / "s3" / "import-reports").rglob("warning.ndjson")
        (line,) = (json.loads(text) for text in file.read_text().splitlines())
        (told,) = line["importResponse"]["warnings"]
        assert (told["warning_reason_code"], told["type"]) == (code, kind)
        assert set(line["importResponse"]) == {"imageSetId", "imageSetVersion", "isPrimary", "warnings"}
