"""extract_features: the same table for any number of jobs and backend, failures as rows, a file whole or absent."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from ahi_ml.errors import ConfigError, DataError, GeometryError
from ahi_ml.features import extract_features
from ahi_ml.index import DatasetIndex
from ahi_ml.store import DataStore, connect

SIZES = (6, 3, 9, 4, 7)
ERRORS = ["error_type", "error"]


def write_slice(folder: Path, series: int, number: int, *, flat: bool = False) -> None:
    """One slice of a CT series whose values are all 100 times the series and the slice's number."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[f"{series} {number}"])
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[f"series {series}"])
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=[f"study {series}"])
    dataset.PatientID, dataset.Modality, dataset.InstanceNumber = f"phantom-{series}", "CT", number + 1
    if not flat:
        dataset.ImagePositionPatient = [0, 0, 2 * number]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [1, 1]
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -10
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 8, 6, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    dataset.PixelData = np.full((8, 6), 100 * series + number, np.int16).tobytes()
    pydicom.dcmwrite(folder / f"{series}-{number}.dcm", dataset, enforce_file_format=True)


@pytest.fixture(scope="module")
def store(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataStore]:
    folder = tmp_path_factory.mktemp("dicom")
    for series, size in enumerate(SIZES):
        for number in range(size):
            write_slice(folder, series, number)
    for number in range(2):
        write_slice(folder, 8, number, flat=True)
    with connect(store_folder, cache=tmp_path_factory.mktemp("cache")) as made:
        made.progress = False
        assert made.import_dicom(folder).imported == sum(SIZES) + 2
        yield made


@pytest.fixture(scope="module")
def everything(store: DataStore) -> DatasetIndex:
    return store.search().index()


@pytest.fixture(scope="module")
def index(everything: DatasetIndex) -> DatasetIndex:
    """Those series that are volumes."""
    flat = generate_uid(entropy_srcs=["series 8"])
    return everything.where(f"series_instance_uid != '{flat}'")


def describe(volume: Any) -> dict[str, Any]:
    """Numbers, a text, a vector and a 0-D array."""
    values = volume.values
    return {
        "mean": values.mean(),
        "maximum": volume.max(),
        "slices": volume.sizes["z"],
        "modality": volume.name,
        "profile": values.mean((1, 2))[:3],
        "process": os.getpid(),
    }


def expected_means(index: DatasetIndex) -> list[float]:
    series = {generate_uid(entropy_srcs=[f"series {number}"]): number for number in range(len(SIZES))}
    numbers = [series[uid] for uid, _ in index.series_rows()]
    return [100 * number + (SIZES[number] - 1) / 2 - 10 for number in numbers]


def fails_on_some(volume: Any) -> dict[str, Any]:
    if volume.sizes["z"] == 9:
        raise ZeroDivisionError("nine slices")
    return {"slices": volume.sizes["z"]}


def stops(volume: Any) -> dict[str, Any]:
    raise KeyboardInterrupt


class TestBySeries:
    def test_one_row_a_series_in_parquet(self, store: DataStore, index: DatasetIndex, tmp_path: Path) -> None:
        out = tmp_path / "deep" / "features.parquet"
        table = extract_features(store, index, describe, out=out)
        uids = [uid for uid, _ in index.series_rows()]
        assert table["series_instance_uid"].tolist() == uids
        assert table["frames"].tolist() == table["slices"].tolist() == [index.series.loc[uid]["frames"] for uid in uids]
        assert table["mean"].tolist() == expected_means(index)
        assert table["image_set_id"].tolist() == [index.series.loc[uid]["image_set_id"] for uid in uids]
        assert list(table.columns[-2:]) == ERRORS
        assert table[ERRORS].isna().all(axis=None)
        written = pd.read_parquet(out)
        assert list(written.columns) == list(table.columns)
        assert written["mean"].tolist() == table["mean"].tolist()
        assert written["modality"].tolist() == ["CT"] * 5
        for given, read in zip(table["profile"], written["profile"], strict=True):
            assert given == list(read)
            assert len(read) == 3
        assert [path.name for path in out.parent.iterdir()] == ["features.parquet"]

    @pytest.mark.parametrize("backend", ["loky", "threading", "sequential"])
    def test_the_table_is_that_of_one_job(
        self, store: DataStore, index: DatasetIndex, tmp_path: Path, backend: str
    ) -> None:
        one = extract_features(store, index, describe, n_jobs=1, out=tmp_path / "one.parquet")
        with joblib.parallel_config(backend=backend, n_jobs=2):
            two = extract_features(store, index, describe, out=tmp_path / "two.parquet")
        processes = set(two.pop("process"))
        assert one.pop("process").unique().tolist() == [os.getpid()]
        assert (os.getpid() in processes) == (backend != "loky")
        pd.testing.assert_frame_equal(one, two)
        read = [pd.read_parquet(tmp_path / f"{name}.parquet").drop(columns="process") for name in ("one", "two")]
        pd.testing.assert_frame_equal(*read)

    def test_n_jobs_is_joblibs(self, store: DataStore, index: DatasetIndex) -> None:
        table = extract_features(store, index, describe, n_jobs=2)
        assert table["mean"].tolist() == expected_means(index)
        assert os.getpid() not in set(table["process"])

    def test_threads_are_threads(self, store: DataStore, index: DatasetIndex) -> None:
        names = set()

        def note(volume: Any) -> dict[str, Any]:
            names.add(threading.current_thread().name)
            return {"sum": volume.sum()}

        with joblib.parallel_config(backend="threading", n_jobs=2):
            extract_features(store, index, note)
        assert threading.current_thread().name not in names

    def test_errors_are_recorded_in_their_rows(
        self, store: DataStore, everything: DatasetIndex, tmp_path: Path
    ) -> None:
        for n_jobs in (1, 2):
            table = extract_features(store, everything, fails_on_some, n_jobs=n_jobs, out=tmp_path / "table.parquet")
            read = pd.read_parquet(tmp_path / "table.parquet")
            for each in (table, read):
                failed = each[each["error"].notna()]
                assert sorted(failed["error_type"]) == ["GeometryError", "ZeroDivisionError"]
                assert failed["slices"].isna().all()
                assert set(failed["frames"]) == {9, 2}
                assert "nine slices" in set(failed["error"])
                assert each[each["error"].isna()]["slices"].tolist() == each[each["error"].isna()]["frames"].tolist()
                assert len(each) == 6
            assert not read["error"].str.contains("phantom", na=False).any()

    @pytest.mark.parametrize("n_jobs", [1, 2])
    def test_errors_may_end_the_run_and_leave_no_file(
        self, store: DataStore, everything: DatasetIndex, tmp_path: Path, n_jobs: int
    ) -> None:
        with pytest.raises((ZeroDivisionError, GeometryError)):
            extract_features(
                store, everything, fails_on_some, on_error="raise", n_jobs=n_jobs, out=tmp_path / "table.parquet"
            )
        assert list(tmp_path.iterdir()) == []

    def test_an_interrupt_leaves_the_last_file(self, store: DataStore, index: DatasetIndex, tmp_path: Path) -> None:
        out = tmp_path / "table.parquet"
        extract_features(store, index, describe, out=out)
        before = out.read_bytes()
        with pytest.raises(KeyboardInterrupt):
            extract_features(store, index, stops, out=out)
        assert out.read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == [out.name]

    def test_a_table_that_parquet_cannot_hold_leaves_no_file(
        self, store: DataStore, index: DatasetIndex, tmp_path: Path
    ) -> None:
        with pytest.raises(Exception, match=r"complex|convert|object"):
            extract_features(store, index, lambda volume: {"odd": 1j}, out=tmp_path / "table.parquet")
        assert list(tmp_path.iterdir()) == []

    def test_options_are_of_open_volume(self, store: DataStore, index: DatasetIndex) -> None:
        table = extract_features(store, index, describe, options={"output": "stored"})
        assert table["mean"].tolist() == [mean + 10 for mean in expected_means(index)]

    def test_a_function_that_gives_nothing_is_an_error_in_its_row(self, store: DataStore, index: DatasetIndex) -> None:
        table = extract_features(store, index, lambda volume: None)  # type: ignore[arg-type, return-value]
        assert table["error_type"].tolist() == ["TypeError"] * 5

    @pytest.mark.parametrize("name", ["error", "series_instance_uid", "frames"])
    def test_features_may_not_hide_columns(self, store: DataStore, index: DatasetIndex, name: str) -> None:
        table = extract_features(store, index, lambda volume: {name: 1})
        assert table["error_type"].tolist() == ["ConfigError"] * 5
        assert table["series_instance_uid"].tolist() == [uid for uid, _ in index.series_rows()]
        assert name in table["error"][0]

    def test_no_series_no_rows(self, store: DataStore, index: DatasetIndex, tmp_path: Path) -> None:
        table = extract_features(store, index[:0], describe, out=tmp_path / "none.parquet")
        assert len(table) == len(pd.read_parquet(tmp_path / "none.parquet")) == 0
        assert list(table.columns[-2:]) == ERRORS

    @pytest.mark.parametrize("options", [{"by": "study"}, {"on_error": "skip"}])
    def test_options_that_cannot_work_are_refused(
        self, store: DataStore, index: DatasetIndex, options: dict[str, Any]
    ) -> None:
        with pytest.raises(ConfigError):
            extract_features(store, index, describe, **options)


def frame_mean(image: np.ndarray) -> dict[str, Any]:
    assert isinstance(image, np.ndarray)
    return {"mean": image.mean(), "shape": image.shape}


class TestByFrame:
    @pytest.mark.parametrize("n_jobs", [1, 2])
    def test_one_row_a_frame_in_index_order(
        self, store: DataStore, everything: DatasetIndex, tmp_path: Path, n_jobs: int
    ) -> None:
        shuffled = everything[np.random.default_rng(0).permutation(len(everything))]
        table = extract_features(
            store, shuffled, frame_mean, by="frame", n_jobs=n_jobs, out=tmp_path / "frames.parquet"
        )
        frames = shuffled.frames
        assert table["sop_instance_uid"].tolist() == frames["sop_instance_uid"].tolist()
        assert table["frame_number"].tolist() == [1] * len(shuffled)
        assert table["mean"].tolist() == (frames["minimum"] - 10).tolist()
        assert [tuple(shape) for shape in table["shape"]] == [(8, 6)] * len(shuffled)
        assert pd.read_parquet(tmp_path / "frames.parquet")["mean"].tolist() == table["mean"].tolist()

    def test_a_frame_that_cannot_be_read_is_a_row_and_never_none(
        self, store_folder: Path, store: DataStore, everything: DatasetIndex, tmp_path: Path
    ) -> None:
        source = everything.sources([4])[0]
        blob = store.reader.fetch(source.image_set_id, source.frame_id)
        digest = hashlib.blake2b(blob, digest_size=20).hexdigest()
        path = store_folder / "blobs" / digest[:1] / digest[1:]
        given = []

        def note(image: Any) -> dict[str, Any]:
            given.append(image)
            return frame_mean(image)

        store.cache.clear()
        path.write_bytes(blob[: len(blob) // 2])
        try:
            table = extract_features(store, everything[:8], note, by="frame", n_jobs=1)
            with pytest.raises(DataError, match=source.frame_id):
                extract_features(store, everything[:8], note, by="frame", n_jobs=1, on_error="raise")
        finally:
            path.write_bytes(blob)
        assert all(isinstance(image, np.ndarray) for image in given)
        failed = table[table["error"].notna()]
        assert failed.index.tolist() == [4]
        assert failed["error_type"].tolist()[0] in ("ChecksumError", "DecodeError")
        assert source.frame_id in failed["error"].tolist()[0]

    def test_options_are_of_read_options(self, store: DataStore, index: DatasetIndex) -> None:
        table = extract_features(store, index[:5], frame_mean, by="frame", options={"output": "stored"})
        assert table["mean"].tolist() == index.frames["minimum"][:5].tolist()
