"""The demo from end to end: on a small folder of files, twice, and once on its own sample."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from ahi_ml.cli.demo import DemoReport, run_demo
from ahi_ml.errors import ConfigError
from ahi_ml.index import DatasetIndex
from ahi_ml.store import connect

CANARY = "CANARYPATIENT"
SLICES = 6
PATIENTS = 4


def write_patients(folder: Path, patients: int = PATIENTS) -> None:
    """CT series of a bright ball, one for each patient, and a file that is no DICOM."""
    folder.mkdir(exist_ok=True)
    z, y, x = np.mgrid[:SLICES, :32, :32] - np.array([SLICES / 2, 16, 16])[:, None, None, None]
    for patient in range(patients):
        ball = ((2 * z) ** 2 + y**2 + x**2 < (8 + patient) ** 2) * 1000
        for number in range(SLICES):
            dataset = Dataset()
            dataset.file_meta = FileMetaDataset()
            dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
            dataset.SOPInstanceUID = generate_uid(entropy_srcs=[f"{patient} {number}"])
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[f"series {patient}"])
            dataset.StudyInstanceUID = generate_uid(entropy_srcs=[f"study {patient}"])
            dataset.PatientID, dataset.PatientName = f"{CANARY}{patient}", f"{CANARY}^{patient}"
            dataset.Modality, dataset.InstanceNumber = "CT", number + 1
            dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [0, 0, 2 * number], [1, 0, 0, 0, 1, 0]
            dataset.PixelSpacing = [1, 1]
            dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
            dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 32, 32, 1
            dataset.PhotometricInterpretation = "MONOCHROME2"
            dataset.BitsAllocated = dataset.BitsStored = 16
            dataset.HighBit, dataset.PixelRepresentation = 15, 1
            dataset.PixelData = ball[number].astype("<i2").tobytes()
            pydicom.dcmwrite(folder / f"{patient}-{number}.dcm", dataset, enforce_file_format=True)
    (folder / "notes.txt").write_text("not an image")


@dataclass
class Run:
    """A demo on small files, run twice."""

    data: Path
    folder: Path
    first: DemoReport
    second: DemoReport
    said: list[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("demo")
    write_patients(data)
    said: list[str] = []
    first = run_demo(folder, data=data, steps=3, say=said.append, progress=False)
    second = run_demo(folder, data=data, steps=2, say=said.append, progress=False)
    return Run(data, folder, first, second, said)


def jobs_of(folder: Path) -> list[Any]:
    with connect(folder / "store") as store:
        pages = store.client.get_paginator("list_dicom_import_jobs").paginate(datastoreId=store.datastore_id)
        return [job for page in pages for job in page["jobSummaries"]]


class TestSmallFolder:
    def test_the_report_counts_what_there_is(self, run: Run) -> None:
        report = run.first
        assert (report.imported_files, report.failed_files) == (PATIENTS * SLICES, 1)
        assert (report.image_sets, report.series, report.patients) == (PATIENTS, PATIENTS, PATIENTS)
        assert report.frames == PATIENTS * SLICES
        assert sum(report.split_frames.values()) == report.frames
        assert sum(report.split_patients.values()) == PATIENTS
        assert all(report.split_frames.values())
        assert report.verified_frames == 2 * report.frames
        assert report.unverified_frames == 0
        assert report.training["task"] == "denoising"
        assert report.training["steps"] == 3
        assert np.isfinite([report.training["first_loss"], report.training["val_error"]]).all()
        assert report.volume == {
            "modality": "CT",
            "shape": [SLICES, 32, 32],
            "spacing_mm": [2.0, 1.0, 1.0],
            "kind": "regular",
        }
        assert (report.feature_rows, report.feature_errors) == (PATIENTS, 0)
        assert report.cold_frames_per_s > 0
        assert report.warm_frames_per_s > 0
        assert str(run.data) in report.provenance[0]
        assert all(seconds >= 0 for seconds in report.timings_s.values())
        assert {"import", "training", "volume", "features"} <= report.timings_s.keys()

    def test_outputs_exist_and_can_be_read(self, run: Run) -> None:
        outputs = {name: Path(path) for name, path in run.second.outputs.items()}
        assert outputs.keys() == {"index", "store", "report", "volume picture", "features"}
        assert all(path.exists() for path in outputs.values())
        assert all(path.is_relative_to(run.folder) for path in outputs.values())
        assert DatasetIndex.load(outputs["index"]).snapshot_id == run.second.snapshot_id
        assert outputs["volume picture"].read_bytes().startswith(b"\x89PNG")
        table = pd.read_parquet(outputs["features"])
        assert table["maximum"].tolist() == [-24.0] * PATIENTS
        assert table["minimum"].tolist() == [-1024.0] * PATIENTS
        # The ball's size: voxels brighter than the mean, 2 mm3 each.
        assert sorted(table["bright_volume_ml"]) == pytest.approx(sorted(ball_ml(n) for n in range(PATIENTS)))
        written = json.loads(outputs["report"].read_text())
        assert written["frames"] == run.second.frames
        assert written["training"]["steps"] == 2

    def test_the_second_run_imports_nothing_and_gives_the_same(self, run: Run) -> None:
        assert len(jobs_of(run.folder)) == 1
        assert any("nothing to do" in line for line in run.said)
        first, second = run.first, run.second
        assert first.snapshot_id == second.snapshot_id
        assert first.split_frames == second.split_frames
        assert (first.imported_files, first.failed_files) == (second.imported_files, second.failed_files)
        assert first.volume == second.volume

    def test_no_patient_in_what_it_says_or_writes(self, run: Run) -> None:
        assert CANARY not in "\n".join(run.said)
        for path in run.folder.iterdir():
            if path.is_file():
                assert CANARY.encode() not in path.read_bytes(), path.name

    def test_new_files_are_imported(self, run: Run, tmp_path: Path) -> None:
        data = tmp_path / "data"
        write_patients(data, 2)
        folder = tmp_path / "demo"
        first = run_demo(folder, data=data, steps=1, progress=False)
        write_patients(data, 3)
        second = run_demo(folder, data=data, steps=1, progress=False)
        assert (first.patients, second.patients) == (2, 3)
        assert len(jobs_of(folder)) == 2
        assert first.snapshot_id != second.snapshot_id


def ball_ml(patient: int) -> float:
    z, y, x = np.mgrid[:SLICES, :32, :32] - np.array([SLICES / 2, 16, 16])[:, None, None, None]
    return float(((2 * z) ** 2 + y**2 + x**2 < (8 + patient) ** 2).sum()) * 2 / 1000


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        run_demo(tmp_path / "demo", data=tmp_path / "nowhere")


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("not an image")
    with pytest.raises(ConfigError, match="no images"):
        run_demo(tmp_path / "demo", data=tmp_path / "data", progress=False)


def test_one_patient_is_split_by_series_or_not_at_all(tmp_path: Path) -> None:
    write_patients(tmp_path / "data", 1)
    said: list[str] = []
    report = run_demo(tmp_path / "demo", data=tmp_path / "data", steps=1, say=said.append, progress=False)
    assert report.frames == SLICES
    assert sum(report.split_frames.values()) == SLICES


def test_the_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("nilearn")
    pytest.importorskip("highdicom")
    with caplog.at_level(logging.WARNING, "ahi_ml"):
        report = run_demo(tmp_path / "demo", steps=2, progress=False)
    assert report.failed_files == 0
    assert report.training["task"] == "segmentation"
    assert report.training["steps"] == 2
    assert report.patients > 1
    assert all(report.split_patients.values())
    assert report.volume["kind"] == "regular"
    assert len(report.provenance) >= 1
    assert not caplog.records


def test_one_patient_is_trained_on_as_a_whole(tmp_path: Path) -> None:
    from pydicom import dcmread
    from pydicom.data import get_testdata_file
    from pydicom.uid import generate_uid

    scans = tmp_path / "scans"
    scans.mkdir()
    dataset = dcmread(get_testdata_file("CT_small.dcm", download=False))
    for number in range(4):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid(
            entropy_srcs=["one patient", str(number)]
        )
        dataset.ImagePositionPatient = [0, 0, 5 * number]
        dataset.save_as(scans / f"{number}.dcm")
    heard: list[str] = []
    report = run_demo(tmp_path / "demo", data=scans, steps=2, say=heard.append, progress=False)
    assert report.split_frames == {"train": 4, "val": 0}
    assert report.training["steps"] == 2
    assert report.training["val_error"] is None
    assert any("one patient" in line for line in heard)
