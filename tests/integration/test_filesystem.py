"""``ahi://`` on an embedded store: what is listed, what is read, how many requests that takes, what is refused."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

import ahi_ml
from ahi_ml.cache import FrameCache
from ahi_ml.errors import AccessDeniedError, ConfigError, ConnectionFailedError, NotFoundError
from ahi_ml.filesystem import AhiFileSystem
from ahi_ml.filesystem.contents import contents
from ahi_ml.filesystem.places import Place
from ahi_ml.store import DataStore

SERIES, SLICES = 60, 3
NAME, BIRTH_DATE, PATIENT_ID, ACCESSION = "Canary^Name", "19010203", "canary-id", "canary-accession"
ABSENT = "0" * 32


def tiny(series: int, number: int) -> pydicom.Dataset:
    """A CT slice of 16 x 16 of somebody whose identifiers can be searched for."""
    made = pydicom.Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID = CTImageStorage
    made.SeriesInstanceUID = f"2.25.{series}"
    made.SOPInstanceUID = f"2.25.{series}.{number}"
    made.StudyInstanceUID, made.StudyID, made.StudyDate = f"1.2.{series}", "S", "20240101"
    made.PatientName, made.PatientID, made.PatientBirthDate = NAME, PATIENT_ID, BIRTH_DATE
    made.AccessionNumber, made.Modality = ACCESSION, "CT"
    made.SeriesNumber, made.InstanceNumber = 1, number
    made.Rows = made.Columns = 16
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 1
    made.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    made.ImagePositionPatient, made.ImageOrientationPatient = [0, 0, 2.0 * number], [1, 0, 0, 0, 1, 0]
    made.PixelSpacing, made.RescaleSlope, made.RescaleIntercept = [1, 1], 1, 0
    made.PixelData = np.random.default_rng([series, number]).integers(-9, 9, (16, 16), np.int16).tobytes()
    return made


def write(folder: Path, *datasets: pydicom.Dataset) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for dataset in datasets:
        dataset.save_as(folder / f"{dataset.SOPInstanceUID}.dcm", enforce_file_format=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _protocol(entry_points_folder: Path) -> Iterator[None]:
    """fsspec knows ``ahi`` as it would from an installation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(entry_points_folder))
        fsspec.process_entries()
        yield


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataStore]:
    """A store of 60 series of three slices. Its second image set has two versions."""
    root = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AHI_ML_CACHE", str(root / "cache"))
        store = ahi_ml.connect(root / "store")
        store.progress = False
        datasets = [tiny(series, number) for series in range(SERIES) for number in range(1, SLICES + 1)]
        assert store.import_dicom(write(root / "dicom", *datasets)).imported == SERIES * SLICES
        image_set = next(iter(store.search(series_instance_uid="2.25.1"))).image_set_id
        changes = {"SchemaVersion": 1.1, "Study": {"DICOM": {"StudyDescription": "CHANGED"}}}
        store.client.update_image_set_metadata(
            datastoreId=store.datastore_id,
            imageSetId=image_set,
            latestVersionId="1",
            updateImageSetMetadataUpdates={"DICOMUpdates": {"updatableAttributes": json.dumps(changes).encode()}},
        )
        while store.client.get_image_set(datastoreId=store.datastore_id, imageSetId=image_set)["versionId"] != "2":
            pass
        yield store
        store.close()


@pytest.fixture
def store(opened: DataStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataStore:
    """The same data store, with an empty cache."""
    monkeypatch.setattr(opened, "cache", FrameCache(tmp_path / "cache"))
    return opened


@pytest.fixture
def files(store: DataStore) -> AhiFileSystem:
    return AhiFileSystem(store=store)


@pytest.fixture(scope="module")
def image_sets(opened: DataStore) -> list[str]:
    """Image sets of series 0, 1, 2 ..."""
    index = opened.search().index().series
    return [index.loc[f"2.25.{number}", "image_set_id"] for number in range(SERIES)]


@pytest.fixture(scope="module")
def frames(opened: DataStore, image_sets: list[str]) -> list[str]:
    """Paths of the frames of ten series."""
    table = opened.search().index().frames
    return [
        f"{opened.datastore_id}/{image_set}/frames/{frame}"
        for image_set in image_sets[:10]
        for frame in table.loc[table["image_set_id"] == image_set, "frame_id"]
    ]


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


def names(paths: list[str]) -> list[str]:
    return [path.rpartition("/")[2] for path in paths]


class TestListing:
    def test_the_root_shows_the_data_store(self, files: AhiFileSystem, store: DataStore) -> None:
        assert files.ls("ahi://", detail=False) == files.ls("", detail=False) == [store.datastore_id]
        assert files.isdir("")
        assert files.info("ahi://")["type"] == "directory"

    def test_a_data_store_is_paged_through_once(
        self, files: AhiFileSystem, store: DataStore, image_sets: list[str]
    ) -> None:
        with counted(store) as requests:
            found = files.ls(f"ahi://{store.datastore_id}")
        assert requests == {"SearchImageSets": 2}  # 60 image sets, 50 a page; and no metadata
        assert {each["name"] for each in found} == {f"{store.datastore_id}/{each}" for each in image_sets}
        assert {(each["type"], each["size"], each["is_primary"]) for each in found} == {("directory", 0, True)}
        versions = {each["name"]: each["version_id"] for each in found}
        assert versions[f"{store.datastore_id}/{image_sets[1]}"] == "2"
        with counted(store) as requests:
            assert files.ls(f"ahi://{store.datastore_id}", detail=False) == sorted(versions)
            assert files.isdir(f"{store.datastore_id}/{image_sets[3]}")
            assert names(files.ls(f"{store.datastore_id}/{image_sets[3]}", detail=False)) == [
                "frames",
                "metadata.json",
                "versions",
            ]
        assert not requests
        with counted(store) as requests:
            files.ls(store.datastore_id, refresh=True)
        assert requests == {"SearchImageSets": 2}

    def test_non_primary_image_sets_are_there_too(self, files: AhiFileSystem, store: DataStore) -> None:
        source = store.client.search_image_sets(datastoreId=store.datastore_id)["imageSetsMetadataSummaries"][0]
        copy = store.client.copy_image_set(
            datastoreId=store.datastore_id,
            sourceImageSetId=source["imageSetId"],
            copyImageSetInformation={"sourceImageSet": {"latestVersionId": str(source["version"])}},
        )["destinationImageSetProperties"]["imageSetId"]
        path = f"{store.datastore_id}/{copy}"
        try:
            entry = next(each for each in files.ls(store.datastore_id) if each["name"] == path)
            assert not entry["is_primary"]
        finally:
            while (
                store.client.get_image_set(datastoreId=store.datastore_id, imageSetId=copy)["imageSetState"] != "ACTIVE"
            ):
                pass
            store.client.delete_image_set(datastoreId=store.datastore_id, imageSetId=copy)
        files.invalidate_cache()
        while files.exists(path):  # deleting takes a moment; what is deleted is not there
            files.invalidate_cache()
        for below in ("", "/versions", "/frames", "/metadata.json", "/versions/1"):
            assert not files.exists(path + below)
            with pytest.raises(FileNotFoundError):
                files.ls(path + below)

    def test_an_image_set_alone_costs_one_look(
        self, files: AhiFileSystem, store: DataStore, image_sets: list[str]
    ) -> None:
        path = f"{store.datastore_id}/{image_sets[0]}"
        with counted(store) as requests:
            found = files.ls(path)
        assert requests == {"GetImageSet": 1}
        assert [(each["name"], each["type"], each["size"]) for each in found] == [
            (f"{path}/metadata.json", "file", None),
            (f"{path}/frames", "directory", 0),
            (f"{path}/versions", "directory", 0),
        ]
        with counted(store) as requests:
            assert files.exists(f"{path}/metadata.json")
            assert files.exists(path)
            assert files.isdir(f"{path}/versions")
        assert not requests

    def test_frames_are_listed_from_one_document(
        self, files: AhiFileSystem, store: DataStore, image_sets: list[str], frames: list[str]
    ) -> None:
        path = f"{store.datastore_id}/{image_sets[0]}/frames"
        with counted(store) as requests:
            found = files.ls(path)
            assert files.exists(found[0]["name"])
            assert files.isfile(found[0]["name"])
        assert requests == {"GetImageSetMetadata": 1}
        assert {each["name"] for each in found} == set(frames[:SLICES])
        assert {(each["type"], each["size"]) for each in found} == {("file", None)}

    def test_versions(self, files: AhiFileSystem, store: DataStore, image_sets: list[str]) -> None:
        path = f"{store.datastore_id}/{image_sets[1]}/versions"
        assert names(files.ls(path, detail=False)) == ["1", "2"]
        assert files.ls(f"{path}/2", detail=False) == [f"{path}/2/metadata.json"]
        assert not files.exists(f"{path}/3")
        old, new = (json.loads(files.cat_file(f"{path}/{number}/metadata.json")) for number in "12")
        latest = json.loads(files.cat_file(f"{store.datastore_id}/{image_sets[1]}/metadata.json"))
        assert "StudyDescription" not in old["Study"]["DICOM"]
        assert new["Study"]["DICOM"]["StudyDescription"] == "CHANGED"
        assert latest == new

    def test_attempts_that_made_no_version_are_not_listed(self, files: AhiFileSystem, store: DataStore) -> None:
        image_set = next(iter(store.search(series_instance_uid="2.25.30"))).image_set_id
        changes = {"SchemaVersion": 1.1, "Study": {"DICOM": {"StudyDescription": "NOT SO"}}}
        store.client.update_image_set_metadata(
            datastoreId=store.datastore_id,
            imageSetId=image_set,
            latestVersionId="1",
            updateImageSetMetadataUpdates={"DICOMUpdates": {"removableAttributes": json.dumps(changes).encode()}},
        )
        ask = {"datastoreId": store.datastore_id, "imageSetId": image_set}
        while (found := store.client.get_image_set(**ask))["imageSetState"] != "ACTIVE":
            pass
        assert found["imageSetWorkflowStatus"] == "UPDATE_FAILED"
        assert names(files.ls(f"{store.datastore_id}/{image_set}/versions", detail=False)) == ["1"]

    def test_glob_find_and_walk(self, files: AhiFileSystem, store: DataStore, image_sets: list[str]) -> None:
        with counted(store) as requests:
            documents = files.glob(f"ahi://{store.datastore_id}/*/metadata.json")
        assert requests.keys() <= {"SearchImageSets", "GetDatastore"}
        assert documents == sorted(f"{store.datastore_id}/{each}/metadata.json" for each in image_sets)
        path = f"{store.datastore_id}/{image_sets[1]}"
        below = files.find(path)
        assert [each.removeprefix(f"{path}/").split("/")[0] for each in below] == [
            *["frames"] * SLICES,
            "metadata.json",
        ] + ["versions"] * 2
        assert [sorted(names(found)) for _, found, _ in files.walk(path)] == [
            ["frames", "versions"],
            [],
            ["1", "2"],
            [],
            [],
        ]
        assert files.du(f"{path}/frames") == sum(len(each) for each in files.cat(f"{path}/frames/*").values())

    def test_listings_are_kept_until_they_are_invalidated(
        self, files: AhiFileSystem, store: DataStore, image_sets: list[str]
    ) -> None:
        def asks(path: str) -> int:
            with counted(store) as requests:
                files.ls(path)
            return requests.total()

        whole, one, other = store.datastore_id, *(f"{store.datastore_id}/{each}" for each in image_sets[:2])
        for path in (whole, one, other, f"{one}/frames", f"{other}/frames"):
            files.ls(path)
        files.invalidate_cache(f"ahi://{one}")
        assert [asks(path) for path in (f"{other}/frames", f"{one}/frames", other, whole)] == [0, 1, 0, 2]
        files.invalidate_cache()
        assert asks(f"{other}/frames") == 1
        files.invalidate_cache("")
        assert asks(f"{other}/frames") == 1
        fresh = AhiFileSystem(store=store, use_listings_cache=False)
        fresh.ls(whole)
        with counted(store) as requests:
            fresh.ls(whole)
        assert requests == {"SearchImageSets": 2}

    def test_what_is_returned_may_be_changed(self, files: AhiFileSystem, store: DataStore) -> None:
        for entry in files.ls(store.datastore_id):
            entry.clear()
        assert all(each["name"] for each in files.ls(store.datastore_id))


class TestReading:
    def test_a_frame_is_what_the_data_store_keeps(
        self, files: AhiFileSystem, store: DataStore, frames: list[str]
    ) -> None:
        _, image_set, _, frame = frames[0].split("/")
        data = store.reader.fetch(image_set, frame)
        with counted(store) as requests:
            assert files.cat_file(f"ahi://{frames[0]}") == data
        assert requests == {"GetImageFrame": 1}
        with counted(store) as requests:
            assert files.cat_file(frames[0]) == data
            assert files.info(frames[0]) == {"name": frames[0], "size": len(data), "type": "file"}
            assert files.ls(frames[0]) == [files.info(frames[0])]
            assert files.size(frames[0]) == len(data)
            assert files.exists(frames[0])
            with files.open(frames[0]) as file:
                assert file.read() == data
        assert not requests
        again = AhiFileSystem(store=ahi_ml.connect(store._target.folder, cache=store.cache.folder))  # another process
        assert again.cat_file(frames[0]) == data
        assert store.cache.stats()["writes"] == 1

    def test_a_cached_frame_counts_as_unverified(
        self, files: AhiFileSystem, store: DataStore, frames: list[str]
    ) -> None:
        files.cat_file(frames[0])
        entry = store.cache.get(store.datastore_id, frames[0].rpartition("/")[2])
        assert entry is not None
        assert not entry.verified

    @pytest.mark.parametrize(
        ("start", "end"),
        [(None, None), (0, 4), (4, 9), (-5, None), (None, -3), (-9, -2), (5, 2), (3, 10**9), (-(10**9), 2)],
    )
    def test_parts(self, files: AhiFileSystem, frames: list[str], start: int | None, end: int | None) -> None:
        assert files.cat_file(frames[0], start, end) == files.cat_file(frames[0])[start:end]

    def test_a_file_seeks(self, files: AhiFileSystem, frames: list[str]) -> None:
        data = files.cat_file(frames[0])
        with files.open(frames[0], "rb") as file:
            assert isinstance(file, io.IOBase)
            assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
            assert file.size == len(data)
            assert file.read(4) == data[:4]
            assert file.seek(-6, io.SEEK_END) == len(data) - 6
            assert file.read() == data[-6:]
            assert file.read() == b""
            buffer = bytearray(5)
            assert file.seek(2) == 2
            assert file.readinto(buffer) == 5
            assert buffer == data[2:7]
            with pytest.raises(ValueError):
                file.write(b"x")
            copy = pickle.loads(pickle.dumps(file))
            assert copy.read(3) == data[7:10]
        with pytest.raises(ValueError):
            file.read()

    def test_documents_are_text(self, files: AhiFileSystem, store: DataStore, image_sets: list[str]) -> None:
        path = f"{store.datastore_id}/{image_sets[0]}/metadata.json"
        with counted(store) as requests, files.open(path, "r", encoding="utf-8") as file:
            document = json.load(file)
        assert requests == {"GetImageSetMetadata": 1}
        assert document["ImageSetID"] == image_sets[0]
        assert files.info(path)["size"] == len(files.cat_file(path))
        assert json.loads(files.read_text(path)) == document

    def test_by_url(self, opened: DataStore, image_sets: list[str], frames: list[str]) -> None:
        target = os.fspath(opened._target.folder)  # type: ignore[arg-type]
        url = f"ahi://{opened.datastore_id}/{image_sets[0]}/metadata.json"
        with fsspec.open(url, "rt", target=target) as file:
            assert json.load(file)["ImageSetID"] == image_sets[0]
        table = pd.read_json(url, storage_options={"target": target}, orient="index")
        assert table.loc["ImageSetID", 0] == image_sets[0]
        files = fsspec.filesystem("ahi", target=target)
        assert isinstance(files, AhiFileSystem)
        assert fsspec.filesystem("ahi", target=target) is files
        assert len(files.cat_file(frames[0])) > 100
        assert files.unstrip_protocol(frames[0]) == f"ahi://{frames[0]}"

    def test_by_id_with_credentials_from_the_environment(
        self, opened: DataStore, image_sets: list[str], frames: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in opened.environment().items():
            monkeypatch.setenv(name, value)
        with fsspec.open(f"ahi://{opened.datastore_id}/{image_sets[0]}/metadata.json") as file:
            assert json.load(file)["ImageSetID"] == image_sets[0]
        files = AhiFileSystem(skip_instance_cache=True)
        assert opened.datastore_id in files.ls("", detail=False)
        assert len(files.cat(frames)) == len(frames)
        assert not files.exists(ABSENT)
        one = AhiFileSystem(opened.datastore_id, skip_instance_cache=True)
        assert one.ls("", detail=False) == [opened.datastore_id]
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        for ask in (lambda: "", lambda: opened.datastore_id, lambda: f"{opened.datastore_id}/{image_sets[0]}"):
            with pytest.raises(PermissionError) as caught:
                AhiFileSystem(skip_instance_cache=True).ls(ask())
            assert isinstance(caught.value.__cause__, AccessDeniedError)
        denied = AhiFileSystem(skip_instance_cache=True)
        with pytest.raises(PermissionError):
            denied.cat_file(f"{opened.datastore_id}/{image_sets[0]}/metadata.json")
        with pytest.raises(PermissionError):
            denied.exists(opened.datastore_id)  # not "no"


class TestReadingMany:
    def test_each_frame_is_fetched_once(self, files: AhiFileSystem, store: DataStore, frames: list[str]) -> None:
        paths = [*frames, *frames, frames[0]]
        with counted(store) as requests:
            found = files.cat_ranges([f"ahi://{path}" for path in paths], list(range(len(paths))), 40)
        assert requests == {"GetImageFrame": len(frames)}
        for number, (path, part) in enumerate(zip(paths, found, strict=True)):
            assert part == files.cat_file(path)[number:40]
        with counted(store) as requests:
            whole = files.cat(frames)
            assert files.cat_ranges(frames, None, None) == [whole[path] for path in frames]
        assert not requests
        assert list(whole) == sorted(frames)

    def test_ranges_are_python_slices(self, files: AhiFileSystem, frames: list[str]) -> None:
        starts, ends = [None, -5, 3, 0, 5, -7], [None, None, -2, 10**9, 2, -3]
        data = files.cat_file(frames[0])
        parts = files.cat_ranges([frames[0]] * len(starts), starts, ends)
        assert parts == [data[start:end] for start, end in zip(starts, ends, strict=True)]

    def test_documents_and_frames_together(
        self, files: AhiFileSystem, store: DataStore, image_sets: list[str], frames: list[str]
    ) -> None:
        documents = [f"{store.datastore_id}/{each}/metadata.json" for each in image_sets]
        with counted(store) as requests:
            found = files.cat(documents + frames)
        assert requests == {"GetImageSetMetadata": SERIES, "GetImageFrame": len(frames)}
        assert [json.loads(found[path])["ImageSetID"] for path in documents] == image_sets
        below = files.cat(f"{store.datastore_id}/{image_sets[0]}", recursive=True)
        assert set(below) == set(files.find(f"{store.datastore_id}/{image_sets[0]}"))
        assert below[frames[0]] == found[frames[0]]
        assert files.cat(f"{store.datastore_id}/{image_sets[0]}/frames/*").keys() == set(frames[:SLICES])
        assert files.cat(frames[0]) == found[frames[0]]
        assert files.cat([frames[0]]) == {frames[0]: found[frames[0]]}

    def test_errors_stand_in_their_places(self, files: AhiFileSystem, store: DataStore, frames: list[str]) -> None:
        folder = frames[0].rpartition("/")[0]
        absent, malformed = f"{folder}/{ABSENT}", f"{folder}/NO-ID"
        paths = [absent, frames[0], folder, malformed, absent]
        found = files.cat_ranges(paths, 0, 4)
        assert [type(each) for each in found] == [
            FileNotFoundError,
            bytes,
            IsADirectoryError,
            FileNotFoundError,
            FileNotFoundError,
        ]
        assert isinstance(found[0].__cause__, NotFoundError)
        assert found[0].filename == absent
        for each in (absent, folder, malformed):
            with pytest.raises(OSError):
                files.cat_ranges([frames[0], each], 0, 4, on_error="raise")
            with pytest.raises(OSError):
                files.cat([frames[0], each])
        assert files.cat([frames[0], absent], on_error="omit").keys() == {frames[0]}
        assert isinstance(files.cat([frames[0], absent], on_error="return")[absent], FileNotFoundError)
        with pytest.raises(ValueError, match="2 paths, 1 starts"):
            files.cat_ranges(frames[:2], [0], 4)
        with pytest.raises(TypeError):
            files.cat_ranges(frames[0], 0, 4)  # type: ignore[arg-type]
        with pytest.raises(NotImplementedError):
            files.cat_ranges(frames[:2], 0, 4, max_gap=3)

    def test_threads_share_one(self, files: AhiFileSystem, store: DataStore, frames: list[str]) -> None:
        expected = {path: store.reader.fetch(*path.split("/")[1::2]) for path in frames}

        def read(number: int) -> bool:
            mine = frames[number:] + frames[:number]
            parts = files.cat_ranges(mine, number, None)
            listed = files.ls(mine[0].rpartition("/")[0], detail=False)
            files.invalidate_cache()
            return mine[0] in listed and parts == [expected[path][number:] for path in mine]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(16)))


class FakeStore:
    """A store whose frames come when the test lets them."""

    datastore_id = "d" * 32

    def __init__(self, cache: FrameCache) -> None:
        self.cache = cache
        self.reader = self
        self.asked: dict[str, Future[bytes]] = {}
        self.changed = threading.Condition()

    def request(self, image_set_id: str, frame_id: str) -> Future[bytes]:
        with self.changed:
            self.asked[frame_id] = Future()
            self.changed.notify_all()
            return self.asked[frame_id]


class TestManyAtOnce:
    PLACES = tuple(Place.of(f"{'d' * 32}/{'e' * 32}/frames/{number:032}") for number in range(300))

    def test_requests_are_under_way_together(self, tmp_path: Path) -> None:
        store: Any = FakeStore(FrameCache(tmp_path))
        found: list[Any] = []
        reading = threading.Thread(target=lambda: found.extend(contents(self.PLACES, lambda place: store)))
        reading.start()
        with store.changed:
            assert store.changed.wait_for(lambda: len(store.asked) >= 100, 20), "one by one"
        held = len(store.asked)
        assert held < 200, "all of them in memory at once"
        while reading.is_alive():
            for frame_id, future in list(store.asked.items()):
                if not future.done():
                    future.set_result(frame_id.encode())
        reading.join()
        assert found == [place.frame_id.encode() for place in self.PLACES]
        assert store.cache.stats()["writes"] == len(self.PLACES)
        store.asked.clear()
        assert list(contents(self.PLACES, lambda place: store)) == found
        assert not store.asked

    def test_who_stops_cancels_the_rest(self, tmp_path: Path) -> None:
        store: Any = FakeStore(FrameCache(tmp_path))
        reading = contents(self.PLACES, lambda place: store)
        store.request("", f"{0:032}")

        class Done(FakeStore):
            def request(self, image_set_id: str, frame_id: str) -> Future[bytes]:
                future = super().request(image_set_id, frame_id)
                if frame_id == f"{0:032}":
                    future.set_exception(ConnectionFailedError("gone"))
                return future

        store = Done(FrameCache(tmp_path))
        assert isinstance(next(reading), ConnectionFailedError)
        reading.close()
        waiting = list(store.asked.values())[1:]
        assert waiting
        assert all(future.cancelled() for future in waiting)


class TestAbsentAndRefused:
    @pytest.mark.parametrize(
        "path",
        [
            "no-id",
            "../etc",
            "{ds}/no-id",
            "{ds}/{absent}",
            "{ds}/{absent}/metadata.json",
            "{ds}/{absent}/frames",
            "{ds}/{absent}/versions",
            "{ds}/{absent}/frames/{absent}",
            "{ds}/{set}/other.json",
            "{ds}/{set}/frames/{absent}",
            "{ds}/{set}/frames/{set}/more",
            "{ds}/{set}/versions/9",
            "{ds}/{set}/versions/9/metadata.json",
            "{ds}/{set}/versions/one/metadata.json",
            "{ds}/{set}/versions/99999999999999999999",
            "{absent}",
            "{absent}/{set}/metadata.json",
        ],
    )
    def test_what_is_not_there(self, files: AhiFileSystem, image_sets: list[str], store: DataStore, path: str) -> None:
        path = path.format(ds=store.datastore_id, set=image_sets[0], absent=ABSENT)
        for ask in (files.info, files.ls, files.cat_file, files.open):
            with pytest.raises(FileNotFoundError) as caught:
                ask(f"ahi://{path}")
            assert caught.value.errno == errno.ENOENT
            assert caught.value.filename == path
        assert not files.exists(path)
        assert not files.isdir(path)
        assert not files.isfile(path)
        assert files.find(path) == []

    def test_ids_that_cannot_be_are_never_sent(self, files: AhiFileSystem, store: DataStore) -> None:
        with counted(store) as requests:
            assert not files.exists(f"{store.datastore_id}/NO-ID/metadata.json")
        assert not requests

    def test_directories_are_not_read(self, files: AhiFileSystem, store: DataStore) -> None:
        for read in (files.open, files.cat_file):
            with pytest.raises(IsADirectoryError):
                read(store.datastore_id)

    @pytest.mark.parametrize(
        "write",
        [
            lambda files, path: files.open(path, "wb"),
            lambda files, path: files.open(path, "w"),
            lambda files, path: files.open(path, "ab"),
            lambda files, path: files.pipe_file(path, b"x"),
            lambda files, path: files.pipe({path: b"x"}),
            lambda files, path: files.write_bytes(path, b"x"),
            lambda files, path: files.write_text(path, "x"),
            lambda files, path: files.put(__file__, path),
            lambda files, path: files.put_file(__file__, path),
            lambda files, path: files.upload(__file__, path),
            lambda files, path: files.touch(path),
            lambda files, path: files.mkdir(path),
            lambda files, path: files.makedirs(path, exist_ok=True),
            lambda files, path: files.rmdir(path),
            lambda files, path: files.rm(path, recursive=True),
            lambda files, path: files.rm_file(path),
            lambda files, path: files.delete(path),
            lambda files, path: files.cp(path, path),
            lambda files, path: files.mv(path, path),
            lambda files, path: files.rename(path, path),
        ],
    )
    def test_nothing_is_written(
        self, files: AhiFileSystem, store: DataStore, frames: list[str], write: Callable[[Any, str], Any]
    ) -> None:
        with counted(store) as requests, pytest.raises(OSError) as caught:
            write(files, frames[0])
        assert caught.value.errno == errno.EROFS
        assert caught.value.filename == frames[0]
        assert not requests

    def test_options_that_nobody_knows_are_refused(self, store: DataStore) -> None:
        for name in ("key", "secret", "token", "cache"):
            with pytest.raises(ConfigError, match=name):
                AhiFileSystem("somewhere", **{name: "SECRET"})
        with pytest.raises(ConfigError, match="store="):
            AhiFileSystem("somewhere", store=store)

    def test_a_folder_that_is_not_there_is_not_made(self, tmp_path: Path) -> None:
        files = AhiFileSystem(tmp_path / "mistyped")  # nothing happens yet
        with pytest.raises(ConfigError, match="mistyped"):
            files.ls("")
        assert not (tmp_path / "mistyped").exists()

    def test_other_errors_stay_what_they_are(self, store: DataStore, image_sets: list[str]) -> None:
        gone: Any = SimpleNamespace(datastore_id=store.datastore_id, client=None)

        class Client:
            def get_image_set(self, **request: Any) -> Any:
                raise ConnectionFailedError("no network")

        gone.client = Client()
        with pytest.raises(ConnectionFailedError):
            AhiFileSystem(store=gone).exists(f"{store.datastore_id}/{image_sets[0]}")


def read_elsewhere(files: AhiFileSystem, path: str) -> bytes:
    return files.cat_file(path)  # type: ignore[no-any-return]


class TestTravelling:
    @pytest.mark.parametrize("by", ["target", "store"])
    @pytest.mark.parametrize("method", ["spawn", "fork"])
    def test_to_workers(self, opened: DataStore, frames: list[str], by: str, method: str) -> None:
        files = (
            AhiFileSystem(store=opened) if by == "store" else AhiFileSystem(os.fspath(opened._target.folder))  # type: ignore[arg-type]
        )
        expected = files.cat_file(frames[0])
        context = multiprocessing.get_context(method)
        with context.Pool(1) as pool:
            assert pool.apply(read_elsewhere, (files, frames[0])) == expected
            assert pool.apply(read_elsewhere, (files, frames[1])) == files.cat_file(frames[1])

    def test_no_key_travels(self, opened: DataStore, frames: list[str]) -> None:
        for files in (AhiFileSystem(store=opened), AhiFileSystem(os.fspath(opened._target.folder))):  # type: ignore[arg-type]
            with files.open(frames[0]) as file:
                pickled = pickle.dumps(files) + pickle.dumps(file)
            for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
                assert opened.environment()[name].encode() not in pickled
            assert len(pickled) < 3000

    def test_two_stores_have_two_file_systems(self, opened: DataStore, tmp_path: Path) -> None:
        folder = opened._target.folder
        assert folder is not None
        with ahi_ml.connect(folder, cache=tmp_path / "a") as one, ahi_ml.connect(folder, cache=tmp_path / "b") as other:
            assert repr(one) == repr(other)
            first, second = fsspec.filesystem("ahi", store=one), fsspec.filesystem("ahi", store=other)
            assert first is not second
            assert first != second
            assert first == fsspec.filesystem("ahi", store=one)


class TestInstalled:
    def test_fsspec_finds_the_protocol_by_itself(self, entry_points_folder: Path) -> None:
        code = "import sys, fsspec; print('ahi_ml' in sys.modules, fsspec.get_filesystem_class('ahi').protocol)"
        paths = os.pathsep.join([str(entry_points_folder), str(Path(ahi_ml.__file__).parents[1])])
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
        )
        assert done.stdout.split() == ["False", "ahi"], done.stderr


def test_nobody_is_named(
    files: AhiFileSystem, store: DataStore, image_sets: list[str], frames: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for logger in ("ahi_ml", "fsspec"):  # botocore logs whole answers when it is told to; we never tell it
        caplog.set_level("DEBUG", logger)
    said = [repr(files), str(files)]
    path = f"{store.datastore_id}/{image_sets[0]}"
    said += [repr(files.ls(each)) for each in ("", store.datastore_id, path, f"{path}/versions", f"{path}/frames")]
    said += [repr(files.info(each)) for each in (store.datastore_id, path, f"{path}/metadata.json", frames[0])]
    with files.open(f"{path}/metadata.json") as file:
        said += [repr(file), str(file), repr(file.info())]
        assert NAME.encode() in file.read()
    for absent in (f"{store.datastore_id}/{ABSENT}", f"{path}/frames/{ABSENT}"):
        with pytest.raises(FileNotFoundError) as caught:
            files.info(absent)
        said += [str(caught.value), str(caught.value.__cause__)]
    kept = b"".join(each.read_bytes() for each in store.cache.folder.rglob("*") if each.is_file())
    for canary in (NAME, NAME.split("^")[0], BIRTH_DATE, PATIENT_ID, ACCESSION):
        assert not [text for text in said if canary in text]
        assert canary not in caplog.text
        assert canary.encode() not in kept
