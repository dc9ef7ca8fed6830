"""FrameDataset and FrameLoader on an embedded store: every way to load gives the same tensors, each frame once."""

from __future__ import annotations

import copy
import gc
import hashlib
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)
from torch.utils.data import DataLoader, Subset, default_collate, random_split

from ahi_ml.cache import FrameCache
from ahi_ml.datasets import FrameDataset, FrameLoader, list_collate, pad_collate
from ahi_ml.errors import ChecksumError, ConfigError, DataError
from ahi_ml.index import DatasetIndex
from ahi_ml.pixels import Scale, Window
from ahi_ml.store import DataStore, connect

ROWS, COLUMNS = 24, 20
PATIENCE_S = 30.0
START_METHODS = [(0, None), (2, "fork"), (2, "spawn"), (2, "forkserver")]


def write_image(path: Path, pixels: np.ndarray, **attributes: Any) -> str:
    """Write one DICOM image and return its SOP instance UID."""
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[path.name, str(attributes)])
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    if pixels.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return str(dataset.SOPInstanceUID)


def ids(patient: int, series: str) -> dict[str, Any]:
    return {
        "PatientID": f"phantom-{patient}",
        "StudyInstanceUID": generate_uid(entropy_srcs=[f"study {patient}"]),
        "SeriesInstanceUID": generate_uid(entropy_srcs=[series]),
    }


def write_ct(folder: Path, series: str, count: int, patient: int, shape: tuple[int, int] = (ROWS, COLUMNS)) -> None:
    rng = np.random.default_rng(patient)
    for number in range(count):
        write_image(
            folder / f"{series}-{number:03}.dcm",
            rng.integers(-2000, 3000, shape, np.int16),
            **ids(patient, series),
            SOPClassUID=CTImageStorage,
            Modality="CT",
            InstanceNumber=number + 1,
            ImagePositionPatient=[0, 0, 2.5 * number],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            PixelSpacing=[0.7, 0.8],
            RescaleSlope=1,
            RescaleIntercept=-1024,
        )


def write_all(folder: Path) -> None:
    """Two CT series of one shape (40 and 23 frames), 5 frames of unsigned 16-bit MR, 4 of colour."""
    write_ct(folder, "ct-a", 40, 1)
    write_ct(folder, "ct-b", 23, 2)
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = rng.integers(0, 65536, (16, 18), np.uint16)
        write_image(
            folder / f"mr-{number}.dcm",
            pixels,
            **ids(3, "mr"),
            SOPClassUID=MRImageStorage,
            Modality="MR",
            InstanceNumber=number + 1,
        )
    for number in range(4):
        pixels = rng.integers(0, 256, (10, 12, 3), np.uint8)
        write_image(folder / f"rgb-{number}.dcm", pixels, **ids(4, "rgb"), Modality="OT", InstanceNumber=number + 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dicom")
    write_all(folder)
    return folder


@pytest.fixture(scope="module")
def store(store_folder: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataStore]:
    with connect(store_folder, cache=tmp_path_factory.mktemp("cache")) as made:
        made.progress = False
        report = made.import_dicom(files)
        assert (report.imported, len(report.failed)) == (72, 0)
        yield made


@pytest.fixture(scope="module")
def index(store: DataStore) -> DatasetIndex:
    return store.search().index()


@pytest.fixture(scope="module")
def ct(index: DatasetIndex) -> DatasetIndex:
    return index.where(Modality="CT")


@pytest.fixture(scope="module")
def truth(files: Path) -> dict[str, np.ndarray]:
    """Stored values by SOP instance UID, read by pydicom."""
    read = (pydicom.dcmread(path) for path in files.iterdir())
    return {str(dataset.SOPInstanceUID): dataset.pixel_array for dataset in read}


@pytest.fixture(scope="module")
def dataset(store: DataStore, ct: DatasetIndex) -> FrameDataset:
    return FrameDataset(store, ct)


@pytest.fixture(scope="module")
def singles(dataset: FrameDataset) -> list[dict[str, Any]]:
    """Each item, read by itself."""
    return [dataset[row] for row in range(len(dataset))]


def assert_same(batches: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    """Demand equal batches, bit for bit."""
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        assert batch["key"] == other["key"]
        assert batch["image"].dtype == other["image"].dtype
        assert torch.equal(batch["image"], other["image"])
        assert batch["meta"].keys() == other["meta"].keys()
        for name, value in batch["meta"].items():
            assert torch.equal(value, other["meta"][name]) if torch.is_tensor(value) else value == other["meta"][name]


def keys_of(batches: Sequence[dict[str, Any]]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def negative(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "image": -item["image"]}


def row_sum(item: dict[str, Any]) -> float:
    return float(item["image"].sum())


@contextmanager
def damaged_store(folder: Path, files: Path, count: int) -> Iterator[tuple[DataStore, DatasetIndex, list[str]]]:
    """A store of its own in which the blobs of CT frames 10 and on are damaged; their ids come last."""
    with connect(folder / "damaged", cache=folder / "cache") as store:
        store.progress = False
        store.import_dicom(files)
        index = store.search().index().where(Modality="CT")
        sources = index.sources(range(10, 10 + count))
        for source in sources:
            blob = store.reader.fetch(source.image_set_id, source.frame_id)
            digest = hashlib.blake2b(blob, digest_size=20).hexdigest()
            path = folder / "damaged" / "blobs" / digest[:1] / digest[1:]
            middle = len(blob) * 2 // 3
            path.write_bytes(blob[:middle] + bytes([blob[middle] ^ 0x5A]) + blob[middle + 1 :])
        yield store, index, [source.frame_id for source in sources]


class Rows:
    """What DistributedSampler does: this rank's share of a seeded order."""

    def __init__(self, size: int, replicas: int, rank: int, seed: int = 0) -> None:
        order = np.random.default_rng(seed).permutation(size)
        self.rows = [int(row) for row in order[rank::replicas]]

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class TestItems:
    def test_an_item(self, dataset: FrameDataset, ct: DatasetIndex, truth: dict[str, np.ndarray]) -> None:
        frames = ct.frames
        for row in (0, 17, 62):
            item = dataset[row]
            known = frames.iloc[row]
            assert set(item) == {"image", "key", "meta"}
            assert item["image"].shape == (1, ROWS, COLUMNS)
            assert item["image"].dtype == torch.float32
            expected = truth[known["sop_instance_uid"]].astype(np.float32) - 1024
            np.testing.assert_array_equal(item["image"][0].numpy(), expected)
            assert item["meta"] == {
                name: known[name]
                for name in ("image_set_id", "version_id", "series_instance_uid", "sop_instance_uid", "frame_number")
            }
            assert isinstance(item["key"], str)
            assert not any("phantom" in str(value) for value in [item["key"], *item["meta"].values()])

    def test_keys_are_unique(self, singles: list[dict[str, Any]]) -> None:
        assert len({item["key"] for item in singles}) == len(singles) == 63

    def test_a_negative_row_counts_from_the_end(self, dataset: FrameDataset) -> None:
        assert dataset[-1]["key"] == dataset[62]["key"]
        assert dataset[-63]["key"] == dataset[0]["key"]

    @pytest.mark.parametrize("row", [63, -64, 10**9])
    def test_rows_beyond_are_an_index_error(self, dataset: FrameDataset, row: int) -> None:
        with pytest.raises(IndexError, match="63"):
            dataset[row]
        with pytest.raises(IndexError):
            dataset.__getitems__([0, row])

    def test_rows_are_whole_numbers(self, dataset: FrameDataset) -> None:
        for row in (1.0, "3", None):
            with pytest.raises(TypeError):
                dataset[row]
        with pytest.raises(TypeError, match="whole numbers"):
            dataset.__getitems__([1.0, 2.5])
        assert dataset.__getitems__([]) == []
        assert [item["key"] for item in dataset[range(4, 1, -1)]] == [dataset[row]["key"] for row in (4, 3, 2)]
        assert dataset[np.array(3)]["key"] == dataset[torch.tensor(3)]["key"] == dataset[3]["key"]

    def test_slices_masks_and_row_numbers_select(self, dataset: FrameDataset, ct: DatasetIndex) -> None:
        mask = ct.frames["InstanceNumber"].to_numpy(np.int64) % 2 == 0
        cases: list[tuple[Any, list[int]]] = [
            (slice(5, 9), [5, 6, 7, 8]),
            (slice(None, None, -20), [62, 42, 22, 2]),
            (mask, np.flatnonzero(mask).tolist()),
            (torch.from_numpy(mask), np.flatnonzero(mask).tolist()),
            ([3, 3, -1], [3, 3, 62]),
            (slice(7, 7), []),
        ]
        for key, rows in cases:
            part = dataset[key]
            assert isinstance(part, FrameDataset)
            assert len(part) == len(rows)
            assert [item["key"] for item in part.__getitems__(range(len(part)))] == [
                dataset[row]["key"] for row in rows
            ]

    def test_iterating_gives_each_item_once(self, dataset: FrameDataset, singles: list[dict[str, Any]]) -> None:
        assert [item["key"] for item in dataset] == [item["key"] for item in singles]

    @pytest.mark.parametrize(
        "rows", [[0], [], [5, 2, 60, 2, 2, 5], list(range(62, -1, -1)), [-1, 0, -63], [1] * 40], ids=len
    )
    def test_getitems_equals_singles(
        self, dataset: FrameDataset, singles: list[dict[str, Any]], rows: list[int]
    ) -> None:
        items = dataset.__getitems__(rows)
        assert [item["key"] for item in items] == [singles[row]["key"] for row in rows]
        for item, row in zip(items, rows, strict=True):
            assert torch.equal(item["image"], singles[row]["image"])
            assert item["meta"] == singles[row]["meta"]

    def test_items_are_of_their_own_memory(self, dataset: FrameDataset, singles: list[dict[str, Any]]) -> None:
        items = dataset.__getitems__([4, 4, 5])
        items[0]["image"].zero_()
        assert torch.equal(items[1]["image"], singles[4]["image"])
        assert torch.equal(dataset[4]["image"], singles[4]["image"])

    def test_numpy_rows_are_taken(self, dataset: FrameDataset, singles: list[dict[str, Any]]) -> None:
        assert dataset[np.int64(3)]["key"] == singles[3]["key"]
        assert [item["key"] for item in dataset.__getitems__(np.array([3, 1]))] == [
            singles[3]["key"],
            singles[1]["key"],
        ]


class TestOptions:
    def test_making_one_sends_nothing(self, tmp_path: Path, ct: DatasetIndex) -> None:
        nowhere = connect("0" * 32, region="us-east-1", endpoint_url="http://127.0.0.1:9", cache=tmp_path)
        dataset = FrameDataset(nowhere, ct, target="Modality", cache=tmp_path / "cache")
        assert len(dataset) == 63
        assert "63 frames" in repr(dataset)
        assert len(FrameLoader(dataset, batch_size=10)) == 7
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize(("modality", "dtype"), [("MR", torch.int32), ("CT", torch.int16), ("OT", torch.uint8)])
    def test_stored_values_come_in_types_torch_can_add(
        self, store: DataStore, index: DatasetIndex, truth: dict[str, np.ndarray], modality: str, dtype: Any
    ) -> None:
        dataset = FrameDataset(store, index.where(Modality=modality), output="stored")
        for batch in (DataLoader(dataset, 3), FrameLoader(dataset, 3)):
            for part in batch:
                assert part["image"].dtype == dtype
                for image, uid in zip(part["image"], part["meta"]["sop_instance_uid"], strict=True):
                    stored = truth[uid]
                    expected = stored.transpose(2, 0, 1) if stored.ndim == 3 else stored[None]
                    np.testing.assert_array_equal(image.numpy(), expected)
                assert (part["image"] + 1).dtype == dtype

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_batch_of_several_types_holds_them_all(self, tmp_path: Path, workers: int) -> None:
        (tmp_path / "store").mkdir(mode=0o700)
        write_image(tmp_path / "in" / "0.dcm", np.full((600, 600), -5, np.int16), **ids(5, "mixed"), InstanceNumber=1)
        write_image(
            tmp_path / "in" / "1.dcm", np.full((600, 600), 60_000, np.uint16), **ids(5, "mixed"), InstanceNumber=2
        )
        with connect(tmp_path / "store", cache=tmp_path / "cache") as store:
            store.import_dicom(tmp_path / "in")
            for transform in (None, negative):
                dataset = FrameDataset(store, store.search(primary=None).index(), output="stored", transform=transform)
                singles = [dataset[row]["image"] for row in range(2)]
                for loader in (FrameLoader(dataset, 2), DataLoader(dataset, 2, num_workers=workers)):
                    (batch,) = loader
                    assert batch["image"].dtype == torch.int32
                    assert all(
                        torch.equal(image, single.int()) for image, single in zip(batch["image"], singles, strict=True)
                    )

    def test_colour_comes_channels_first(
        self, store: DataStore, index: DatasetIndex, truth: dict[str, np.ndarray]
    ) -> None:
        dataset = FrameDataset(store, index.where(Modality="OT"))
        item = dataset[2]
        assert item["image"].shape == (3, 10, 12)
        assert item["image"].dtype == torch.float32
        stored = truth[item["meta"]["sop_instance_uid"]]
        np.testing.assert_array_equal(item["image"].numpy(), stored.transpose(2, 0, 1))

    def test_a_callable_with_an_apply_method_is_called(
        self, dataset: FrameDataset, store: DataStore, ct: DatasetIndex
    ) -> None:
        class Augmentation:
            def apply(self, image: Any) -> None:
                raise AssertionError("this is another library's")

            def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
                return negative(item)

        assert torch.equal(FrameDataset(store, ct, transform=Augmentation())[3]["image"], -dataset[3]["image"])

    def test_an_rng_of_the_callers_own_is_left_to_them(self, store: DataStore, ct: DatasetIndex) -> None:
        def draw(item: dict[str, Any], rng: Any) -> dict[str, Any]:
            return {**item, "drawn": rng}

        assert FrameDataset(store, ct, transform=partial(draw, rng="mine"))[0]["drawn"] == "mine"

    @pytest.mark.parametrize("target", [3, ["Modality"], object()])
    def test_targets_that_are_none(self, store: DataStore, ct: DatasetIndex, target: Any) -> None:
        with pytest.raises(ConfigError, match="target"):
            FrameDataset(store, ct, target=target)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float32])
    def test_dtypes_of_torch(
        self, store: DataStore, ct: DatasetIndex, singles: list[dict[str, Any]], dtype: torch.dtype, tmp_path: Path
    ) -> None:
        made = FrameDataset(store, ct, dtype=dtype, cache=tmp_path, cache_decoded=True)
        for _ in range(2):
            assert made[1]["image"].dtype == dtype
            assert torch.equal(made[1]["image"], singles[1]["image"].to(dtype))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, "float33", "U3", ">f4"])
    def test_dtypes_that_cannot_work_are_refused_at_once(self, store: DataStore, ct: DatasetIndex, dtype: Any) -> None:
        with pytest.raises(ConfigError, match=r"dtype|numpy"):
            FrameDataset(store, ct, dtype=dtype)

    def test_display_in_bytes(self, store: DataStore, index: DatasetIndex) -> None:
        for modality, shape in (("CT", (1, ROWS, COLUMNS)), ("OT", (3, 10, 12))):
            part = index.where(Modality=modality)
            image = FrameDataset(store, part, output="display", window="lung", dtype=torch.uint8)[0]["image"]
            shown = FrameDataset(store, part, output="display", window="lung")[0]["image"]
            assert (image.dtype, image.shape) == (torch.uint8, shape)
            assert torch.equal(image, (shown * 255 + 0.5).floor().to(torch.uint8))

    def test_results_of_either_polarity_are_kept_apart(self, store: DataStore, ct: DatasetIndex) -> None:
        plain, other = (
            FrameDataset(store, ct, normalize_polarity=normalize).options.recipe() for normalize in (False, True)
        )
        assert None not in (plain, other)
        assert plain != other

    def test_dtype_is_the_callers(self, store: DataStore, ct: DatasetIndex, singles: list[dict[str, Any]]) -> None:
        item = FrameDataset(store, ct, dtype="float64")[1]
        assert item["image"].dtype == torch.float64
        assert torch.equal(item["image"].float(), singles[1]["image"])

    def test_a_pixel_step_equals_a_callable(self, store: DataStore, ct: DatasetIndex) -> None:
        window = Window(40, 400)

        def by_hand(item: dict[str, Any]) -> dict[str, Any]:
            image = item["image"].numpy()
            window.apply(image)
            return {**item, "image": torch.from_numpy(image) * 2}

        stepped = list(FrameLoader(FrameDataset(store, ct, transform=window), 16))
        called = list(FrameLoader(FrameDataset(store, ct, transform=by_hand), 16))
        plain = list(DataLoader(FrameDataset(store, ct, transform=by_hand), 16))
        assert_same(called, plain)
        for batch, other in zip(stepped, called, strict=True):
            assert torch.equal(2 * batch["image"], other["image"])
            assert 0 <= batch["image"].min() < batch["image"].max() <= 1

    def test_steps_run_in_order(self, store: DataStore, ct: DatasetIndex, singles: list[dict[str, Any]]) -> None:
        item = FrameDataset(store, ct, transform=[Scale(-1000, 1000), Scale(0.25, 0.75)])[0]
        expected = (((singles[0]["image"] + 1000) / 2000).clamp(0, 1) - 0.25) / 0.5
        torch.testing.assert_close(item["image"], expected.clamp(0, 1))

    def test_targets(self, store: DataStore, ct: DatasetIndex, singles: list[dict[str, Any]]) -> None:
        numbers = ct.frames["InstanceNumber"].tolist()
        by_column = list(FrameLoader(FrameDataset(store, ct, target="InstanceNumber"), 20))
        assert torch.cat([batch["target"] for batch in by_column]).tolist() == numbers
        series = ct.series.index.tolist()
        by_series = FrameDataset(store, ct, target={uid: place for place, uid in enumerate(series)})
        by_uid = FrameDataset(store, ct, target={singles[3]["meta"]["sop_instance_uid"]: torch.ones(2)})
        by_key = FrameDataset(store, ct, target={singles[3]["key"]: "yes"})
        assert [by_series[row]["target"] for row in (0, 62)] == [
            series.index(singles[row]["meta"]["series_instance_uid"]) for row in (0, 62)
        ]
        assert torch.equal(by_uid[3]["target"], torch.ones(2))
        assert by_key[3]["target"] == "yes"
        with pytest.raises(ConfigError, match="row 4"):
            by_key[4]
        called = FrameDataset(store, ct, target=row_sum)
        assert called[5]["target"] == row_sum(singles[5])

    def test_a_target_that_is_the_image_survives_recycling(self, store: DataStore, ct: DatasetIndex) -> None:
        kept: list[torch.Tensor] = []

        def itself(item: dict[str, Any]) -> torch.Tensor:
            kept.append(item["image"])
            return item["image"]

        for batch in FrameLoader(FrameDataset(store, ct, target=itself), 4, frames_ahead=4):
            assert torch.equal(batch["image"], batch["target"])
        for row, image in enumerate(kept):
            assert torch.equal(image, FrameDataset(store, ct)[row]["image"])

    def test_a_target_column_selects_with_its_rows(self, store: DataStore, ct: DatasetIndex) -> None:
        part = FrameDataset(store, ct, target="InstanceNumber")[::-7]
        assert [item["target"] for item in part] == ct.frames["InstanceNumber"].tolist()[::-7]

    @pytest.mark.parametrize(
        "options",
        [
            {"on_error": "ignore"},
            {"output": "raw"},
            {"transform": 5},
            {"transform": [negative]},
            {"target": "InstanceNumbr"},
            {"output": "stored", "transform": Window(1, 2)},
        ],
    )
    def test_options_that_cannot_work_are_refused(
        self, store: DataStore, ct: DatasetIndex, options: dict[str, Any]
    ) -> None:
        with pytest.raises(ConfigError):
            FrameDataset(store, ct, **options)

    def test_caches(self, store: DataStore, ct: DatasetIndex, tmp_path: Path) -> None:
        part = ct[:4]
        cached = FrameDataset(store, part, cache=tmp_path / "own")
        uncached = FrameDataset(store, part, cache=None)

        def fetched(dataset: FrameDataset) -> int:
            before = store.reader.stats()["fetched"]
            dataset.__getitems__(range(4))
            return store.reader.stats()["fetched"] - before

        assert [fetched(each) for each in (cached, cached, uncached, uncached)] == [4, 0, 4, 4]
        assert FrameCache(tmp_path / "own").size()[0] == 4


class TestPickling:
    def test_it_pickles_small(self, store: DataStore, ct: DatasetIndex, singles: list[dict[str, Any]]) -> None:
        dataset = FrameDataset(store, ct, target="InstanceNumber", transform=Window(40, 400))
        data = pickle.dumps(dataset)
        assert len(data) < 10_000
        again = pickle.loads(data)
        assert len(again) == 63
        assert again[7]["key"] == singles[7]["key"]
        assert again[7]["target"] == dataset[7]["target"]
        assert torch.equal(again[7]["image"], dataset[7]["image"])
        again.store.close()

    def test_a_selection_pickles_as_itself(self, dataset: FrameDataset) -> None:
        part = dataset[[9, 4, 4]]
        again = pickle.loads(pickle.dumps(part))
        assert [item["key"] for item in again] == [item["key"] for item in part]
        again.store.close()

    def test_another_sharing_strategy_chosen_later(self, store: DataStore, ct: DatasetIndex, tmp_path: Path) -> None:
        """Torch moves a shared tensor when it shares it in another way; what was an array of it is no memory then."""
        ct.save(tmp_path / "ct.arrow")
        script = tmp_path / "script.py"
        script.write_text(
            "import sys, torch, ahi_ml\n"
            "from torch.utils.data import DataLoader\n"
            "if __name__ == '__main__':\n"
            "    with ahi_ml.connect(sys.argv[1], cache=sys.argv[3]) as store:\n"
            "        dataset = ahi_ml.FrameDataset(store, ahi_ml.DatasetIndex.load(sys.argv[2]))\n"
            "        torch.multiprocessing.set_sharing_strategy('file_system')\n"
            "        count = len(list(DataLoader(dataset, 8, num_workers=1, multiprocessing_context='spawn')))\n"
            "        dataset.set_epoch(1)\n"
            "        print(count, dataset._epoch.value, int(dataset.meters.total('frames')))\n"
        )
        command = [sys.executable, script, store._target.folder, tmp_path / "ct.arrow", tmp_path / "cache"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout.split()) == (0, ["8", "1", "63"]), done.stderr

    def test_a_copy_reads(self, dataset: FrameDataset, singles: list[dict[str, Any]]) -> None:
        again = copy.copy(dataset)
        assert again[1]["key"] == singles[1]["key"]


class TestEveryWayTheSame:
    @pytest.mark.parametrize(("workers", "method"), START_METHODS)
    def test_torch_loader(
        self,
        dataset: FrameDataset,
        singles: list[dict[str, Any]],
        store: DataStore,
        ct: DatasetIndex,
        tmp_path: Path,
        workers: int,
        method: str | None,
    ) -> None:
        cold = FrameDataset(store, ct, cache=tmp_path / "cache")
        loader = DataLoader(cold, 8, num_workers=workers, multiprocessing_context=method)
        batches = list(loader)
        expected = [default_collate(singles[start : start + 8]) for start in range(0, 63, 8)]
        assert_same(batches, expected)
        assert_same(list(FrameLoader(dataset, 8)), expected)
        keys = keys_of(batches)
        assert len(keys) == len(set(keys)) == 63
        assert set(keys) == {item["key"] for item in singles}
        # Processes shared one cold cache: whole, verified entries, one a frame.
        assert FrameCache(tmp_path / "cache").size()[0] == 63
        assert not list((tmp_path / "cache").rglob("*.part"))
        before = store.reader.stats()
        assert_same(list(FrameLoader(cold, 8)), expected)
        after = store.reader.stats()
        assert after["fetched"] == before["fetched"]
        assert after["verified"] - before["verified"] == 63

    def test_persistent_workers_over_epochs(self, dataset: FrameDataset, singles: list[dict[str, Any]]) -> None:
        loader = DataLoader(
            dataset, 16, shuffle=True, num_workers=2, multiprocessing_context="fork", persistent_workers=True
        )
        orders = []
        for _ in range(3):
            keys = keys_of(list(loader))
            assert sorted(keys) == sorted(item["key"] for item in singles)
            orders.append(keys)
        assert orders[0] != orders[1]

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_transforms_and_targets_in_workers(self, store: DataStore, ct: DatasetIndex, method: str) -> None:
        dataset = FrameDataset(store, ct[:12], transform=negative, target=row_sum)
        here = list(DataLoader(dataset, 5))
        there = list(DataLoader(dataset, 5, num_workers=2, multiprocessing_context=method))
        assert_same(there, here)
        for batch, other in zip(there, here, strict=True):
            assert torch.equal(batch["target"], other["target"])

    def test_a_worker_error_keeps_its_type_and_names_the_frame(self, files: Path, tmp_path: Path) -> None:
        with damaged_store(tmp_path, files, 1) as (store, index, damaged):
            loader = DataLoader(
                FrameDataset(store, index, cache=None), 8, num_workers=2, multiprocessing_context="fork"
            )
            with pytest.raises(ChecksumError, match=damaged[0]):
                list(loader)

    def test_forking_while_the_loader_of_the_parent_runs(
        self, dataset: FrameDataset, store: DataStore, ct: DatasetIndex, singles: list[dict[str, Any]]
    ) -> None:
        uncached = FrameDataset(store, ct, cache=None)
        expected = [default_collate(singles[start : start + 4]) for start in range(0, 63, 4)]
        outer, inner = [], None
        for number, batch in enumerate(FrameLoader(uncached, 4)):
            outer.append(batch)
            if number == 2:
                inner = list(DataLoader(uncached, 4, num_workers=2, multiprocessing_context="fork"))
        assert inner is not None
        assert_same(inner, expected)
        assert_same(outer, expected)

    def test_subset_and_random_split(self, dataset: FrameDataset, singles: list[dict[str, Any]]) -> None:
        subset = Subset(dataset, [8, 3, 50])
        assert keys_of(list(DataLoader(subset, 2))) == [singles[row]["key"] for row in (8, 3, 50)]
        parts = random_split(dataset, [40, 23], torch.Generator().manual_seed(0))
        found = [keys_of(list(DataLoader(part, 10))) for part in parts]
        assert [len(each) for each in found] == [40, 23]
        assert set(found[0]) | set(found[1]) == {item["key"] for item in singles}

    def test_ranks_share_the_frames(self, dataset: FrameDataset, singles: list[dict[str, Any]]) -> None:
        from torch.utils.data.distributed import DistributedSampler

        for loader in (DataLoader, FrameLoader):
            shares = []
            for rank in range(3):
                sampler = DistributedSampler(dataset, num_replicas=3, rank=rank, seed=4)
                shares.append(keys_of(list(loader(dataset, 4, sampler=sampler))))
            assert [len(share) for share in shares] == [21, 21, 21]
            assert set().union(*shares) == {item["key"] for item in singles}


class TestFrameLoader:
    def test_an_epoch_has_each_frame_once(self, dataset: FrameDataset, singles: list[dict[str, Any]]) -> None:
        for size in (1, 7, 63, 64, 1000):
            loader = FrameLoader(dataset, size, shuffle=True)
            batches = list(loader)
            assert len(batches) == len(loader) == -(-63 // size)
            assert sorted(keys_of(batches)) == sorted(item["key"] for item in singles)

    def test_images_belong_to_their_keys(self, dataset: FrameDataset, singles: list[dict[str, Any]]) -> None:
        by_key = {item["key"]: item["image"] for item in singles}
        for batch in FrameLoader(dataset, 8, shuffle=True, seed=3, frames_ahead=1):
            for key, image in zip(batch["key"], batch["image"], strict=True):
                assert torch.equal(image, by_key[key])

    def test_the_order_is_of_seed_and_epoch(self, dataset: FrameDataset) -> None:
        def orders(seed: int, size: int, epochs: int = 2, first: int = 0) -> list[list[str]]:
            loader = FrameLoader(dataset, size, shuffle=True, seed=seed)
            loader.set_epoch(first)
            return [keys_of(list(loader)) for _ in range(epochs)]

        first = orders(1, 8)
        assert first == orders(1, 8)
        assert first == orders(1, 16)
        assert first[0] != first[1]
        assert first[1:] == orders(1, 8, epochs=1, first=1)
        assert first[0] != orders(2, 8)[0]

    def test_without_shuffle_the_order_is_the_index(self, dataset: FrameDataset, singles: list[dict[str, Any]]) -> None:
        loader = FrameLoader(dataset, 10)
        for _ in range(2):
            assert keys_of(list(loader)) == [item["key"] for item in singles]

    def test_drop_last(self, dataset: FrameDataset) -> None:
        loader = FrameLoader(dataset, 10, drop_last=True)
        sizes = [len(batch["key"]) for batch in loader]
        assert sizes == [10] * 6
        assert len(loader) == 6
        assert len(list(FrameLoader(dataset, 64, drop_last=True))) == 0

    def test_a_sampler_gives_the_rows(self, dataset: FrameDataset, singles: list[dict[str, Any]]) -> None:
        loader = FrameLoader(dataset, 4, sampler=Rows(63, 4, 1))
        assert len(loader) == 4
        assert keys_of(list(loader)) == [singles[row]["key"] for row in Rows(63, 4, 1)]
        twice = FrameLoader(dataset, 2, sampler=[5, 5, 1])
        assert keys_of(list(twice)) == [singles[row]["key"] for row in (5, 5, 1)]

    def test_collate_fn_gets_the_items(self, dataset: FrameDataset, singles: list[dict[str, Any]]) -> None:
        batches = list(FrameLoader(dataset, 20, collate_fn=list))
        items = [item for batch in batches for item in batch]
        assert [len(batch) for batch in batches] == [20, 20, 20, 3]
        for item, single in zip(items, singles, strict=True):
            assert torch.equal(item["image"], single["image"])

    def test_a_state_of_the_last_batch_is_one_of_a_finished_epoch(self, dataset: FrameDataset) -> None:
        loader = FrameLoader(dataset, 10, drop_last=True, shuffle=True)
        states = [loader.state_dict() for _ in loader]
        assert len(states) == 6
        for number, state in enumerate(states, 1):
            again = FrameLoader(dataset, 10, drop_last=True, shuffle=True)
            again.load_state_dict(state)
            assert len(list(again)) == (6 - number or 6), number
            assert again.epoch == (1 if number < 6 else 2)

    def test_its_epochs_are_its_own(self, store: DataStore, ct: DatasetIndex) -> None:
        dataset = FrameDataset(store, ct)
        dataset.set_epoch(7)
        loader = FrameLoader(dataset, 10, shuffle=True)
        for _ in range(2):
            list(loader)
        assert dataset._epoch.value == 7, "others may be reading it"

    def test_two_loops_over_one_loader(self, dataset: FrameDataset, singles: list[dict[str, Any]]) -> None:
        loader = FrameLoader(dataset, 8)
        expected = [default_collate(singles[start : start + 8]) for start in range(0, 63, 8)]
        pairs = list(zip(loader, loader, strict=True))
        assert_same([first for first, _ in pairs], expected)
        assert_same([second for _, second in pairs], expected)

    def test_an_empty_dataset_gives_no_batches(self, store: DataStore, ct: DatasetIndex) -> None:
        loader = FrameLoader(FrameDataset(store, ct[:0]), 4, shuffle=True)
        assert len(loader) == 0
        assert list(loader) == []

    @pytest.mark.parametrize("options", [{"batch_size": 0}, {"frames_ahead": 0}, {"shuffle": True, "sampler": [1]}])
    def test_options_that_cannot_work_are_refused(self, dataset: FrameDataset, options: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            FrameLoader(dataset, **options)

    def test_mixed_shapes_are_refused_by_key(self, store: DataStore, index: DatasetIndex) -> None:
        dataset = FrameDataset(store, index)
        rows = [0, len(index) - 1]
        for transform in (None, negative):
            dataset = FrameDataset(store, index, transform=transform)
            with pytest.raises(DataError, match="collate_fn") as caught:
                list(FrameLoader(dataset, 2, sampler=rows))
            for row in rows:
                assert dataset[row]["key"] in str(caught.value)
                assert str(tuple(dataset[row]["image"].shape)) in str(caught.value)
        batches = list(FrameLoader(dataset, 2, sampler=rows, collate_fn=list))
        assert len(batches[0]) == 2

    @pytest.mark.parametrize("workers", [0, 2])
    def test_mixed_shapes_padded_or_listed(self, store: DataStore, index: DatasetIndex, workers: int) -> None:
        dataset = FrameDataset(store, index)[[0, 1, 63, 64, 5]]  # CT and MR
        singles = [dataset[row] for row in range(5)]
        for fn in (pad_collate, list_collate):
            expected = [fn(singles[:3]), fn(singles[3:])]
            for loader in (
                FrameLoader(dataset, 3, collate_fn=fn),
                DataLoader(dataset, 3, collate_fn=fn, num_workers=workers),
            ):
                for batch, other in zip(loader, expected, strict=True):
                    assert batch.keys() == other.keys()
                    assert batch["key"] == other["key"]
                    assert len(batch["image"]) == len(other["image"])
                    assert all(map(torch.equal, batch["image"], other["image"]))


class TestRecycledBuffers:
    @pytest.fixture(autouse=True)
    def _small_ones_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ahi_ml.datasets.buffers._WORTH", 0)

    def fresh(self, dataset: FrameDataset, rows: Sequence[int], size: int) -> list[torch.Tensor]:
        items = [dataset[row]["image"] for row in rows]
        return [torch.stack(items[start : start + size]) for start in range(0, len(items), size)]

    def test_keeping_every_batch(self, dataset: FrameDataset) -> None:
        loader = FrameLoader(dataset, 4, frames_ahead=1)
        kept = [list(loader) for _ in range(3)]
        expected = self.fresh(dataset, range(63), 4)
        for batches in kept:
            assert all(torch.equal(batch["image"], other) for batch, other in zip(batches, expected, strict=True))

    @pytest.mark.parametrize(
        "part",
        [
            lambda image: image[1:3, :, 4:9],
            lambda image: image[0].numpy(),
            lambda image: image.numpy()[:, 0, ::2],
            lambda image: image.reshape(-1)[5:50],
            lambda image: image.permute(2, 3, 1, 0)[..., 0],
            lambda image: memoryview(image[:1].numpy()),
            lambda image: image.detach().view(torch.int32),
        ],
        ids=["slice", "numpy", "strided numpy", "flat", "permuted", "buffer", "reinterpreted"],
    )
    def test_keeping_parts_of_batches_only(self, dataset: FrameDataset, part: Callable[[Any], Any]) -> None:
        loader = FrameLoader(dataset, 3, frames_ahead=1)
        kept = []
        for _ in range(2):
            for batch in loader:
                kept.append(part(batch["image"]))
                del batch
                gc.collect(0)
        expected = [part(image) for image in self.fresh(dataset, range(63), 3)] * 2
        for value, other in zip(kept, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(value), np.asarray(other))

    def test_keeping_parts_of_items_only(self, dataset: FrameDataset) -> None:
        """Of torch's own loader, whose batches are made of items that lie in a buffer."""
        loader: Any = torch.utils.data.DataLoader(dataset, 3, collate_fn=list)
        kept = []
        for _ in range(2):
            for items in loader:
                kept.append(items[1]["image"][0, 1:3])
                del items
                gc.collect(0)
        expected = [images[1][0, 1:3] for images in self.fresh(dataset, range(63), 3)] * 2
        assert all(torch.equal(value, other) for value, other in zip(kept, expected, strict=True))

    def test_buffers_of_items_do_come_back(self, dataset: FrameDataset) -> None:
        places = {dataset.__getitems__(range(start, start + 3))[0]["image"].data_ptr() for start in range(0, 60, 3)}
        assert len(places) < 5

    def test_buffers_do_come_back(self, dataset: FrameDataset) -> None:
        loader = FrameLoader(dataset, 3, frames_ahead=1)
        places = set()
        for batch in loader:
            places.add(batch["image"].data_ptr())
            del batch
        assert len(places) < 10

    def test_what_is_left_of_an_abandoned_epoch_does_no_harm(self, dataset: FrameDataset) -> None:
        loader = FrameLoader(dataset, 4)
        expected = self.fresh(dataset, range(63), 4)
        for _ in range(10):
            for batch in loader:
                assert torch.equal(batch["image"], expected[0])
                break
        assert all(torch.equal(b["image"], other) for b, other in zip(loader, expected, strict=True))


class TestLeavingEarly:
    @pytest.fixture
    def slow(self, files: Path, tmp_path: Path) -> Iterator[tuple[DataStore, DatasetIndex]]:
        with connect(tmp_path / "slow", cache=tmp_path / "cache", faults={"latency_ms": 60}) as store:
            store.progress = False
            store.import_dicom(files)
            yield store, store.search().index().where(Modality="CT")

    def test_requests_stop_within_a_second_and_threads_end(self, slow: tuple[DataStore, DatasetIndex]) -> None:
        store, index = slow
        loader = FrameLoader(FrameDataset(store, index, cache=None), 8, sampler=list(range(63)) * 20)
        before = set(threading.enumerate())
        start = time.monotonic()
        for batch in loader:
            assert len(batch["key"]) == 8
            break
        at_once = store.reader.stats()["fetched"]
        assert time.monotonic() - start < PATIENCE_S
        time.sleep(1)
        done = store.reader.stats()
        assert done["fetched"] - at_once < 16  # what was being decoded; 128 were on their way
        time.sleep(0.3)
        assert store.reader.stats() == done
        store.close()
        for thread in set(threading.enumerate()) - before:
            thread.join(PATIENCE_S)
        assert not {thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("ahi")}

    def test_the_next_epoch_is_whole(self, slow: tuple[DataStore, DatasetIndex]) -> None:
        store, index = slow
        loader = FrameLoader(FrameDataset(store, index), 8, shuffle=True)
        next(iter(loader))
        keys = keys_of(list(loader))
        assert len(set(keys)) == len(keys) == 63

    def test_an_error_in_the_loop_leaves_it_too(self, slow: tuple[DataStore, DatasetIndex]) -> None:
        store, index = slow
        loader = FrameLoader(FrameDataset(store, index, cache=None), 8)

        def broken_loop() -> None:
            for _ in loader:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            broken_loop()
        gc.collect()
        time.sleep(1)
        done = store.reader.stats()["fetched"]
        time.sleep(0.2)
        assert store.reader.stats()["fetched"] == done


class TestErrors:
    def test_raise_names_the_frame(self, files: Path, tmp_path: Path) -> None:
        with damaged_store(tmp_path, files, 1) as (store, index, damaged):
            dataset = FrameDataset(store, index)
            for read in (
                lambda: dataset[10],
                lambda: dataset.__getitems__(range(63)),
                lambda: list(FrameLoader(dataset, 8)),
                lambda: list(DataLoader(dataset, 8)),
            ):
                with pytest.raises(ChecksumError, match=damaged[0]):
                    read()
            assert dataset[9]["image"].shape == (1, ROWS, COLUMNS)

    def test_skip_takes_the_next_readable_frame(self, files: Path, tmp_path: Path) -> None:
        with damaged_store(tmp_path, files, 2) as (store, index, _):
            dataset = FrameDataset(store, index, on_error="skip")
            good = FrameDataset(store, index)
            (item,) = dataset.__getitems__([10])
            assert item["key"] == good[12]["key"]
            assert torch.equal(item["image"], good[12]["image"])
            dataset = FrameDataset(store, index, on_error="skip", target="InstanceNumber")
            batches = list(FrameLoader(dataset, 8))
            expected = [row if row not in (10, 11) else 12 for row in range(63)]
            assert keys_of(batches) == [good[row]["key"] for row in expected]
            images = torch.cat([batch["image"] for batch in batches])
            assert torch.equal(images, torch.stack([good[row]["image"] for row in expected]))
            numbers = index.frames["InstanceNumber"].tolist()
            assert torch.cat([batch["target"] for batch in batches]).tolist() == [numbers[row] for row in expected]

    def test_too_many_skips_raise(self, files: Path, tmp_path: Path) -> None:
        with damaged_store(tmp_path, files, 8) as (store, index, _):
            dataset = FrameDataset(store, index, on_error="skip")
            with pytest.raises(DataError, match="1%") as caught:
                list(FrameLoader(dataset, 8))
            assert isinstance(caught.value.__cause__, ChecksumError)

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_too_many_skips_of_all_workers_together_raise(self, files: Path, tmp_path: Path, method: str) -> None:
        with damaged_store(tmp_path, files, 8) as (store, index, _):
            dataset = FrameDataset(store, index, on_error="skip")
            with pytest.raises(DataError, match="1%"):
                list(DataLoader(dataset, 4, num_workers=4, multiprocessing_context=method))
            assert dataset.meters.total("skipped") > 5

    def test_skips_count_over_epochs(self, files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "ahi_ml.datasets")
        with damaged_store(tmp_path, files, 3) as (store, index, damaged):
            dataset = FrameDataset(store, index, on_error="skip")
            assert len(list(DataLoader(dataset, 8, num_workers=2))) == 8
            with pytest.raises(DataError, match="1%"):
                list(FrameLoader(dataset, 8))
            assert dataset.meters.total("skipped") == 6
        list(FrameLoader(FrameDataset(store, index[:10], on_error="skip"), 8))
        said = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
        assert said
        assert all(message.startswith("row 1") for message in said)
        assert any(damaged[0] in message for message in said)

    def test_skip_takes_a_frame_of_the_same_form(self, files: Path, tmp_path: Path) -> None:
        with damaged_store(tmp_path, files, 1) as (store, ct, _):
            others = store.search().index().where("Modality != 'CT'")
            rows = store.search().index().where("Modality == 'CT' or Modality == 'MR' or Modality == 'OT'")
            frames = rows.frames
            bad = int(np.flatnonzero(frames["frame_id"] == ct.frames["frame_id"].iloc[10])[0])
            apart = int(np.flatnonzero(frames["Modality"] != "CT")[0])
            order = [
                bad,
                apart,
                *[row for row in range(len(rows)) if frames["Modality"].iloc[row] == "CT" and row != bad],
            ]
            dataset = FrameDataset(store, rows, on_error="skip")[order]
            good = FrameDataset(store, rows)[order]
            assert good[1]["image"].shape != good[2]["image"].shape
            (item,) = dataset.__getitems__([0])
            assert item["key"] == good[2]["key"]
            assert torch.equal(item["image"], good[2]["image"])
            assert len(others) == 9

    def test_what_a_transform_raises_names_the_row(self, store: DataStore, ct: DatasetIndex) -> None:
        def wrong(item: dict[str, Any]) -> dict[str, Any]:
            raise KeyError("label")

        dataset = FrameDataset(store, ct, transform=wrong)
        with pytest.raises(KeyError, match="label") as caught:
            dataset[5]
        assert any("row 5" in note for note in caught.value.__notes__)
        with pytest.raises(KeyError, match="row 0"):
            list(DataLoader(dataset, 4, num_workers=1, multiprocessing_context="fork"))

    def test_an_empty_target_is_an_error(self, store: DataStore, ct: DatasetIndex) -> None:
        dataset = FrameDataset(store, ct, target="KVP")
        for loader in (FrameLoader(dataset, 4), DataLoader(dataset, 4)):
            with pytest.raises(DataError, match=r"the target KVP of row 0 is empty: .*KVP is not None"):
                list(loader)
        assert len(ct.where("KVP is not None")) == 0

    def test_a_mistake_of_the_caller_is_not_skipped(self, store: DataStore, ct: DatasetIndex) -> None:
        def wrong(item: dict[str, Any]) -> dict[str, Any]:
            raise KeyError("label")

        with pytest.raises(KeyError):
            FrameDataset(store, ct, transform=wrong, on_error="skip")[0]


def test_training_on_the_loader_learns(store: DataStore, ct: DatasetIndex) -> None:
    """A loop as users write it: the mean of the image from the image."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dataset = FrameDataset(store, ct, transform=Scale(-3024, 1976), target=row_sum)
    net = torch.nn.Linear(ROWS * COLUMNS, 1)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    losses = []
    for _ in range(3):
        for batch in FrameLoader(dataset, 9, shuffle=True, seed=1):
            loss = (net(batch["image"].flatten(1))[:, 0] - batch["target"].float() / 480).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    torch.set_num_threads(threads)
    assert losses[-1] < losses[0] / 3


def test_a_forked_child_may_read_by_itself(dataset: FrameDataset, singles: list[dict[str, Any]]) -> None:
    """Bare fork, as gunicorn or joblib's multiprocessing do: the child connects for itself."""
    dataset[0]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            same = torch.equal(dataset[5]["image"], singles[5]["image"])
            os.write(writing, b"same" if same else b"different")
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"same"
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(dataset[6]["image"], singles[6]["image"])
