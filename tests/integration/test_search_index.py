"""Search and index against the embedded store: pages, versions, requests counted, import reports, connecting."""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import botocore.exceptions
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

import ahi_ml
from ahi_ml.errors import ConfigError, ConflictError, MetadataError, NotFoundError
from ahi_ml.index import DatasetIndex
from ahi_ml.reader import ReadOptions
from ahi_ml.store import DataStore

SERIES = 123


def tiny(series: str, number: int = 1, **changes: Any) -> pydicom.Dataset:
    """A CT slice of 16 x 16, its values settled by its UIDs."""
    made = pydicom.Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID = CTImageStorage
    made.SOPInstanceUID = f"{series}.{number}"
    made.SeriesInstanceUID = series
    made.StudyInstanceUID = "1.2.3"
    made.StudyDate, made.StudyTime, made.StudyID, made.AccessionNumber = "20240101", "120000", "S", "A"
    made.PatientID, made.PatientName, made.Modality = "P", "P", "CT"
    made.SeriesNumber, made.InstanceNumber = 1, number
    made.Rows = made.Columns = 16
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 1
    made.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    made.ImagePositionPatient, made.ImageOrientationPatient = [0, 0, 2.0 * number], [1, 0, 0, 0, 1, 0]
    made.PixelSpacing, made.RescaleSlope, made.RescaleIntercept = [1, 1], 1, 0
    for name, value in changes.items():
        setattr(made, name, value)
    if "PixelData" not in changes:
        made.PixelData = pixels(made.SOPInstanceUID).tobytes()
    return made


def pixels(uid: str) -> np.ndarray:
    return np.random.default_rng(list(uid.encode())).integers(-1000, 1000, (16, 16), np.int16)


def write(folder: Path, *datasets: pydicom.Dataset) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for dataset in datasets:
        dataset.save_as(folder / f"{dataset.SOPInstanceUID}.dcm", enforce_file_format=True)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataStore]:
    """A store whose data store ``default`` holds many tiny series of 40 patients and 80 studies."""
    root = tmp_path_factory.mktemp("searched")
    datasets = [
        tiny(
            f"2.25.{number}",
            slice_,
            PatientID=f"patient-{number % 40}",
            StudyInstanceUID=f"1.2.{number % 80}",
            StudyID=f"study-{number % 80}",
            AccessionNumber=f"accession-{number % 80}",
            StudyDate=(date(2024, 1, 1) + timedelta(days=number % 80)).strftime("%Y%m%d"),
            Modality="MR" if number % 5 == 0 else "CT",
            SeriesNumber=number,
        )
        for number in range(SERIES)
        for slice_ in (1, 2)
    ]
    opened = ahi_ml.connect(root / "store", cache=root / "cache")
    opened.progress = False
    report = opened.import_dicom(write(root / "files", *datasets))
    assert report.imported == 2 * SERIES
    yield opened
    opened.close()


@pytest.fixture
def another(store: DataStore, tmp_path: Path) -> Iterator[DataStore]:
    """An empty data store of the same folder, with a cache of its own."""
    folder = store._target.folder
    assert folder is not None
    opened = ahi_ml.connect(folder, datastore=f"t-{os.urandom(6).hex()}", cache=tmp_path / "cache")
    opened.progress = False
    yield opened
    opened.close()


@contextmanager
def counted(store: DataStore) -> Iterator[Counter[str]]:
    """Counts requests by operation."""
    found: Counter[str] = Counter()

    def count(event_name: str, **rest: Any) -> None:
        found[event_name.rpartition(".")[2]] += 1

    events = store.client.meta.events
    events.register("before-send.medical-imaging.*", count)
    try:
        yield found
    finally:
        events.unregister("before-send.medical-imaging.*", count)


class TestSearch:
    def test_every_page_is_followed(self, store: DataStore) -> None:
        with counted(store) as requests:
            found = list(store.search())
        assert len({each.image_set_id for each in found}) == len(found) == SERIES
        assert requests == {"SearchImageSets": 3}

    def test_nothing_is_sent_before_a_result_is_asked_for(self, store: DataStore) -> None:
        with counted(store) as requests:
            search = store.search(study_id="study-1").where(modality="CT").where(lambda each: True)
            text = repr(search)
        assert not requests
        assert "not sent yet" in text
        assert "study-1" not in text

    def test_a_search_runs_anew(self, store: DataStore) -> None:
        search = store.search(study_id="study-1")
        assert search.count() == search.count() == len(search.to_pandas()) == 2

    def test_where(self, store: DataStore) -> None:
        search = store.search()
        assert search.where(modality="MR").count() == 25
        assert search.where(modality=["MR", "CT"]).count() == SERIES
        assert search.where(modality="CT", series_number=[1, 2, 5]).count() == 2
        assert search.where(lambda each: (each.series_number or 0) < 10).where(modality="MR").count() == 2
        assert {each.modality for each in search.where(modality="MR")} == {"MR"}
        assert search.count() == SERIES  # narrowing makes another search
        with pytest.raises(ConfigError, match="did you mean modality"):
            search.where(modalty="CT")
        with pytest.raises(ConfigError, match="index"):
            search.where("modality == 'CT'")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("filters", "count"),
        [
            ({"patient_id": "patient-3"}, 3),
            ({"accession_number": "accession-7"}, 2),
            ({"study_id": "study-79"}, 1),
            ({"study_instance_uid": "1.2.7"}, 2),
            ({"series_instance_uid": "2.25.100"}, 1),
            ({"patient_id": "patient-3", "study_id": "study-3"}, 2),
            ({"patient_id": "patient-3", "study_id": "study-4"}, 0),
            ({"study_date": "20240101"}, 2),
            ({"study_date": date(2024, 1, 2)}, 2),
            ({"study_date": datetime(2024, 1, 2, 12)}, 2),
            ({"study_date": ("20240101", "20240103")}, 6),
            ({"study_date": (date(2024, 1, 1), "2024-01-31")}, 62),
            ({"study_date": ("20250101", "20251231")}, 0),
            ({"study_date": ("20240101", "20240131"), "patient_id": "patient-3"}, 2),
        ],
    )
    def test_filters(self, store: DataStore, filters: dict[str, Any], count: int) -> None:
        assert store.search(**filters).count() == count

    def test_spans_of_time(self, store: DataStore) -> None:
        now = datetime.now(UTC)
        hour = timedelta(hours=1)
        assert store.search(created=(now - hour, now + hour)).count() == SERIES
        assert store.search(updated=(now + hour, now + 2 * hour)).count() == 0
        assert store.search(created=(now - hour, now + hour), study_id="study-1").count() == 2

    def test_three_filters_are_refused_before_anything_is_sent(self, store: DataStore) -> None:
        with counted(store) as requests, pytest.raises(ConfigError, match=r"2 filters, not 3.*\.where"):
            store.search(patient_id="p", study_id="s", study_date="20240101")
        assert not requests

    @pytest.mark.parametrize(
        "filters",
        [
            {"study_date": "2024"},
            {"study_date": "20241301"},
            {"study_date": "20240230"},
            {"study_date": "yesterday"},
            {"study_date": ("20240101",)},
            {"study_date": ("20240101", "20240102", "20240103")},
            {"study_date": ["20240101", "20240102"]},
            {"study_date": 20241301},
            {"created": datetime(2024, 1, 1)},
            {"patient_id": 12345},
        ],
    )
    def test_values_that_cannot_be(self, store: DataStore, filters: dict[str, Any]) -> None:
        with pytest.raises(ConfigError) as caught:
            store.search(**filters)
        assert "12345" not in str(caught.value)  # an identifier stays out of the message

    def test_a_search_travels(self, store: DataStore) -> None:
        search = pickle.loads(pickle.dumps(store.search(study_id="study-1").where(modality="CT")))
        assert search.count() == 2


class TestIndex:
    def test_all_is_read_once_and_pinned(self, store: DataStore) -> None:
        with counted(store) as requests:
            index = store.search().index()
        assert requests == {"SearchImageSets": 3, "GetImageSetMetadata": SERIES}
        frames = index.frames
        assert len(frames) == len(index) == 2 * SERIES
        assert set(frames["version_id"]) == {"1"}
        assert frames["is_primary"].all()
        assert (index.series["SeriesNumber"] == [int(uid.rpartition(".")[2]) for uid in index.series.index]).all()
        assert index.series["patient_key"].nunique() == 40
        assert not index.notes

    def test_it_is_enough_for_everything_after(self, store: DataStore, tmp_path: Path) -> None:
        index = store.search(study_date=("20240101", "20240110")).index()
        saved = DatasetIndex.load(index.save(tmp_path / "index.arrow"))
        with counted(store) as requests:
            parts = saved.split({"train": 0.5, "val": 0.5})
            assert sum(map(len, parts.values())) == len(saved)
            arrays = store.reader.read(saved.sources(), ReadOptions(output="stored"))
            for array, uid in zip(arrays, saved.frames["sop_instance_uid"], strict=True):
                np.testing.assert_array_equal(array, pixels(uid))
            for uid, rows in saved.series_rows():
                volume = ahi_ml.open_volume(store, saved[rows], cache=None)
                np.testing.assert_array_equal(volume.values, np.stack([pixels(f"{uid}.1"), pixels(f"{uid}.2")]))
            items = ahi_ml.FrameDataset(store, parts["train"], cache=None)
            assert len([items[row] for row in range(len(items))]) == len(parts["train"])
        assert set(requests) == {"GetImageFrame"}
        assert requests["GetImageFrame"] == 2 * len(saved) + len(parts["train"])

    def test_a_series_uid_costs_a_search_and_its_metadata(self, store: DataStore) -> None:
        with counted(store) as requests:
            volume = ahi_ml.open_volume(store, "2.25.7", cache=None)
        assert requests == {"SearchImageSets": 1, "GetImageSetMetadata": 1}
        np.testing.assert_array_equal(volume[1], pixels("2.25.7.2"))
        with pytest.raises(NotFoundError):
            ahi_ml.open_volume(store, "2.25.999")

    def test_the_same_whatever_the_order_of_arrival(self, store: DataStore) -> None:
        once, again = (store.search(study_id="study-3").index(patient_key="k") for _ in range(2))
        assert once.snapshot_id == again.snapshot_id
        assert once.frames.equals(again.frames)

    def test_patient_keys_follow_from_their_secret(
        self, store: DataStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def keys(**options: Any) -> list[str]:
            return list(store.search(study_id="study-3").index(**options).series["patient_key"])

        assert keys(patient_key="a") == keys(patient_key=b"a") != keys(patient_key="b")
        assert keys() != keys()
        monkeypatch.setenv("AHI_ML_PATIENT_KEY", "a")
        assert keys() == keys(patient_key="a")
        path = store.search(study_id="study-3").index().save(tmp_path / "index.arrow")
        assert path.with_name("index.arrow.key").read_bytes() == b"a"
        with pytest.raises(ConfigError, match="empty"):
            keys(patient_key="")

    def test_more_columns_need_a_word_aloud(self, store: DataStore) -> None:
        search = store.search(study_id="study-3")
        with counted(store) as requests, pytest.raises(ConfigError, match=r"AccessionNumber.*phi=True"):
            search.index(columns=["Modality", "AccessionNumber"])
        assert not requests
        assert "AccessionNumber" not in search.index(columns=["Modality"]).columns
        index = search.index(columns=["AccessionNumber", "StudyDate", "NoSuchKeyword"], phi=True)
        assert set(index.frames["AccessionNumber"]) == {"accession-3"}
        assert set(index.series["StudyDate"]) == {"20240104"}
        assert index.series["NoSuchKeyword"].isna().all()
        assert len(index.where(AccessionNumber="accession-3")) == len(index)

    def test_empty_has_a_reason(self, store: DataStore, another: DataStore) -> None:
        for search in (store.search(study_id="absent"), store.search().where(modality="XA")):
            index = search.index()
            assert len(index) == 0
            assert index.notes == ("empty: no image set was found among those searched for",)
            assert index.notes[0] in repr(index)
        assert another.search().index().notes == ("empty: no image set was found",)

    def test_instances_without_images_are_counted(
        self, another: DataStore, tmp_path: Path, pydicom_file: Callable[[str], Path]
    ) -> None:
        for name in ("reportsi.dcm", "MR_small.dcm"):
            shutil.copy(pydicom_file(name), tmp_path)
        another.import_dicom(tmp_path)
        index = another.search().index()
        assert len(index) == 1
        assert index.notes == ("1 instances hold no image and were left out",)


class TestVersions:
    def test_an_index_keeps_its_frames(self, another: DataStore, tmp_path: Path) -> None:
        """Importing an instance again replaces it; what an index pinned stays readable."""
        another.import_dicom(write(tmp_path / "old", tiny("2.1", 1), tiny("2.1", 2)))
        old = another.search().index()
        changed = np.full((16, 16), 77, np.int16)
        report = another.import_dicom(write(tmp_path / "new", tiny("2.1", 1, PixelData=changed.tobytes())))
        assert report.image_sets == (old.frames["image_set_id"].iloc[0],)
        new = another.search().index()
        assert set(old.frames["version_id"]) == {"1"}
        assert set(new.frames["version_id"]) == {"2"}
        assert old.snapshot_id != new.snapshot_id
        stored = ReadOptions(output="stored")
        for index, first in ((old, pixels("2.1.1")), (new, changed)):
            one, two = another.reader.read(index.sources(), stored)
            np.testing.assert_array_equal(one, first)
            np.testing.assert_array_equal(two, pixels("2.1.2"))
        np.testing.assert_array_equal(ahi_ml.open_volume(another, old, cache=None)[0], pixels("2.1.1"))
        np.testing.assert_array_equal(ahi_ml.open_volume(another, "2.1", cache=None)[0], changed)

    def test_conflicting_imports_are_left_out_and_counted(self, another: DataStore, tmp_path: Path) -> None:
        another.import_dicom(write(tmp_path / "first", tiny("2.1", 1)))
        another.import_dicom(write(tmp_path / "second", tiny("2.1", 2, PatientID="somebody else")))
        counts = {primary: another.search(primary=primary).count() for primary in (True, False, None)}
        assert counts == {True: 1, False: 1, None: 2}
        index = another.search().index()
        assert index.notes == ("1 non-primary image sets were left out (search(primary=None) keeps them)",)
        assert index.notes[0] in repr(index)
        others = another.search(primary=False).index()
        assert others.notes == ("1 primary image sets were left out (search(primary=None) keeps them)",)
        assert not others.frames["is_primary"].any()
        both = another.search(primary=None).index()
        assert (len(both), len(both.series), both.notes) == (2, 2, ())


class _Answers:
    """A client that is asked for metadata of one image set, and conflicts at first."""

    def __init__(self, body: bytes, conflicts: int) -> None:
        self.body, self.conflicts, self.asked = body, conflicts, 0

    def search_image_sets(self, **request: Any) -> dict[str, Any]:
        return {"imageSetsMetadataSummaries": [{"imageSetId": "a" * 32, "version": 3}]}

    def get_image_set_metadata(self, **request: Any) -> dict[str, Any]:
        assert request["versionId"] == "3"
        self.asked += 1
        if self.asked <= self.conflicts:
            raise botocore.exceptions.ClientError(
                {"Error": {"Code": "ConflictException"}, "ResponseMetadata": {"HTTPStatusCode": 409}},
                "GetImageSetMetadata",
            )
        return {"imageSetMetadataBlob": io.BytesIO(self.body)}


class TestTrouble:
    body = json.dumps(
        {
            "ImageSetID": "a" * 32,
            "DatastoreID": "d" * 32,
            "Study": {
                "DICOM": {},
                "Series": {"2.1": {"Instances": {"3.1": {"DICOM": {}, "ImageFrames": [{"ID": "0" * 32}]}}}},
            },
        }
    ).encode()

    def search(self, store: DataStore, client: Any) -> Any:
        return replace(store.search(), client=lambda: client)

    def test_a_conflict_after_an_import_is_waited_out(self, store: DataStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ahi_ml.client.documents._WAIT_S", 0.01)
        client = _Answers(self.body, 2)
        assert len(self.search(store, client).index()) == 1
        assert client.asked == 3

    def test_a_conflict_that_stays_is_raised(self, store: DataStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ahi_ml.client.documents._WAIT_S", 0.0)
        with pytest.raises(ConflictError, match="a" * 32):
            self.search(store, _Answers(self.body, 10**9)).index()

    @pytest.mark.parametrize("body", [b"", b"{}", b"\x1f\x8b\x08", body.replace(b'"ID": "0', b'"ID": "x')])
    def test_a_document_that_cannot_be_used_names_its_image_set(self, store: DataStore, body: bytes) -> None:
        with pytest.raises(MetadataError, match="a" * 32) as caught:
            self.search(store, _Answers(body, 0)).index()
        assert caught.value.image_set_id == "a" * 32


class TestImport:
    def test_a_report(self, another: DataStore, tmp_path: Path, pydicom_file: Callable[[str], Path]) -> None:
        folder = write(tmp_path / "in" / "deep", tiny("2.1", 1), tiny("2.1", 2), tiny("2.2", 1)).parent
        (folder / "notes.txt").write_text("not DICOM")
        shutil.copy(pydicom_file("rtplan_truncated.dcm"), folder)
        report = another.import_dicom(folder)
        assert (report.status, report.scanned) == ("COMPLETED", 5)
        assert report.imported + len(report.failed) == 5
        (failure,) = (each for each in report.failed if each.input_file.endswith("notes.txt"))
        assert "TransferSyntaxUID" in failure.reason
        assert {each.image_set_id for each in another.search(primary=None)} == set(report.image_sets)
        assert len(report.image_sets) == (2 if len(report.failed) == 2 else 3)
        table = report.to_pandas()
        assert list(table.columns) == ["outcome", "input_file", "reason"]
        assert (table["outcome"] == "failed").sum() == len(report.failed)
        assert (table["outcome"] == "warning").sum() == len(report.warnings)
        assert f"{report.imported} of 5 files" in repr(report)

    def test_remarks(self, another: DataStore, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match="UI"):
            report = another.import_dicom(write(tmp_path / "in", tiny("2.1", 1, StudyInstanceUID="1.2.x")))
        assert report.imported == 1
        assert [each.reason for each in report.warnings] == ["not a UID: StudyInstanceUID"]
        assert list(report.to_pandas()["outcome"]) == ["warning"]

    def test_without_waiting(self, another: DataStore, tmp_path: Path) -> None:
        report = another.import_dicom(write(tmp_path / "in", tiny("2.1", 1)), wait=False)
        assert report.status in ("SUBMITTED", "IN_PROGRESS", "COMPLETED")
        assert (report.scanned, report.imported, report.image_sets) == (0, 0, ())
        deadline = datetime.now(UTC) + timedelta(seconds=30)
        while another.search().count() < 1:
            assert datetime.now(UTC) < deadline
        job = another.client.get_dicom_import_job(datastoreId=another.datastore_id, jobId=report.job_ids[0])
        assert job["jobProperties"]["jobId"] == report.job_ids[0]

    def test_an_empty_folder(self, another: DataStore, tmp_path: Path) -> None:
        report = another.import_dicom(tmp_path)
        assert (report.scanned, report.imported, report.failed) == (0, 0, ())
        assert len(report.to_pandas()) == 0

    def test_a_missing_folder(self, another: DataStore, tmp_path: Path) -> None:
        for source in (tmp_path / "absent", str(tmp_path / "absent")):
            with counted(another) as requests, pytest.raises(ConfigError, match="absent"):
                another.import_dicom(source)
            assert not requests
        (tmp_path / "file").write_text("x")
        with pytest.raises(ConfigError):
            another.import_dicom(tmp_path / "file")

    def test_on_aws_more_is_needed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        store = ahi_ml.connect("0" * 32, region="us-east-1", endpoint_url="http://127.0.0.1:9")
        with pytest.raises(ConfigError, match="role_arn"):
            store.import_dicom(tmp_path)
        with pytest.raises(ConfigError, match="S3"):
            store.import_dicom(tmp_path, role_arn="arn:aws:iam::123456789012:role/r", output_uri="s3://b/o/")


def _read_one(store: DataStore, index: DatasetIndex, queue: Any) -> None:
    queue.put(store.reader.read(index.sources([0]), ReadOptions(output="stored"))[0])


class TestConnect:
    @pytest.mark.parametrize(
        "name",
        [
            "0123456789abcdef0123456789abcde",
            "0123456789abcdef0123456789abcdef0",
            "0123456789ABCDEF0123456789ABCDEF",
            "01234567-89ab-cdef-0123-456789abcdef",
            "deadbeefdeadbeefdead",
        ],
    )
    def test_what_looks_like_a_mistyped_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError, match="mistyped"):
            ahi_ml.connect(name)
        assert not list(tmp_path.iterdir())
        with ahi_ml.connect(Path(name)) as store:
            assert store.search().count() == 0
        with ahi_ml.connect(name) as store:  # now that it is there
            assert store.search().count() == 0

    def test_an_id_costs_nothing(self) -> None:
        store = ahi_ml.connect("0" * 32)
        assert store.datastore_id == "0" * 32
        assert repr(store) == f"<DataStore {'0' * 32}>"
        with pytest.raises(ConfigError, match="embedded"):
            store.environment()
        store.close()

    @pytest.mark.parametrize(
        ("target", "options"),
        [
            ("0" * 32, {"faults": {"latency_ms": 1}}),
            ("0" * 32, {"datastore": "other"}),
            ("folder", {"region": "us-east-1"}),
            ("folder", {"profile": "p"}),
            ("folder", {"endpoint_url": "http://127.0.0.1:1"}),
            ("folder", {"datastore": ""}),
            ("folder", {"datastore": "no spaces"}),
            ("folder", {"datastore": "x" * 51}),
            ("folder", {"faults": {"no_such": 1}}),
            ("folder", {"faults": {"latency_ms": -1}}),
            ("", {}),
        ],
    )
    def test_options_that_do_not_go_together(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, options: dict[str, Any]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigError):
            ahi_ml.connect(target, **options)
        assert not list(tmp_path.iterdir())

    def test_a_running_server_is_reached_by_id(self, store: DataStore, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in store.environment().items():
            if name.startswith("AWS_") and "ENDPOINT" not in name and "PREFIX" not in name:
                monkeypatch.setenv(name, value)
        with ahi_ml.connect(store.datastore_id, endpoint_url=store.endpoint_url) as other:
            index = other.search(study_id="study-3").index()
            (array,) = other.reader.read(index.sources([0]), ReadOptions(output="stored"))
            np.testing.assert_array_equal(array, pixels(index.frames["sop_instance_uid"].iloc[0]))

    def test_data_stores_of_a_folder_are_apart(self, store: DataStore, another: DataStore) -> None:
        assert another.datastore_id != store.datastore_id
        assert another.search().count() == 0
        with pickle.loads(pickle.dumps(another)) as again:
            assert again.datastore_id == another.datastore_id

    def test_closed_and_used_again(self, store: DataStore) -> None:
        with ahi_ml.connect(store._target.folder) as opened:
            client = opened.client
            assert opened.search(study_id="study-1").count() == 2
        opened.close()
        assert opened.search(study_id="study-1").count() == 2
        assert opened.client is not client
        opened.close()

    def test_reprs_have_no_secrets(self, store: DataStore) -> None:
        environment = store.environment()
        secret = environment["AWS_SECRET_ACCESS_KEY"]
        search = store.search(patient_id="patient-3")
        for thing in (store, search, store.cache, store._target, store.reader, search.index()):
            assert secret not in repr(thing)
            assert environment["AWS_ACCESS_KEY_ID"] not in repr(thing)
            assert "patient-3" not in repr(thing)
        assert secret.encode() not in pickle.dumps(store)

    @pytest.mark.parametrize("method", ["spawn", "fork"])
    def test_another_process_connects_for_itself(self, store: DataStore, method: str) -> None:
        index = store.search(study_id="study-3").index()
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=_read_one, args=(store, index, queue))
        process.start()
        found = queue.get(timeout=60)
        process.join(60)
        np.testing.assert_array_equal(found, pixels(index.frames["sop_instance_uid"].iloc[0]))
        assert len(pickle.dumps(store)) < 2000

    def test_an_absent_folder_is_not_made_elsewhere(self, store: DataStore, tmp_path: Path) -> None:
        target = replace(store._target, folder=tmp_path / "gone")
        there = copy.copy(store)
        there._target = target
        again = pickle.loads(pickle.dumps(there))
        with pytest.raises(ConfigError, match=r"ahi-ml serve.*AWS"):
            again.search().count()
        assert not (tmp_path / "gone").exists()

    def test_environment_reaches_it_with_plain_boto3(self, store: DataStore, monkeypatch: pytest.MonkeyPatch) -> None:
        import boto3

        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        plain = boto3.client("medical-imaging")
        found = plain.search_image_sets(datastoreId=store.datastore_id, searchCriteria={})
        assert len(found["imageSetsMetadataSummaries"]) > 0
