"""Lower resolutions of large frames: the network is read until it is enough, and no further."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

import ahi_ml
from ahi_ml.client import Boto3Transport, Part
from ahi_ml.client.partial import WORTH_BYTES
from ahi_ml.codec import decode
from ahi_ml.index import DatasetIndex
from ahi_ml.reader import Reader, ReadOptions
from ahi_ml.store import DataStore

SIDE = 2048


def options(reduce: int) -> ReadOptions:
    return ReadOptions(output="stored", reduce=reduce)


@pytest.fixture(scope="module")
def filled(store_folder: Path, scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataStore]:
    """A data store of one large frame (some 6 MB) and a small one."""
    with ahi_ml.connect(store_folder, cache=tmp_path_factory.mktemp("cache")) as store:
        store.progress = False
        assert store.import_dicom(scans).imported == 2
        yield store


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DICOM files of one large frame with much noise, and of a small one."""
    source = tmp_path_factory.mktemp("dicom")
    dataset = dcmread(get_testdata_file("CT_small.dcm", download=False))
    dataset.save_as(source / "small.dcm")
    noise = np.random.default_rng(0).integers(-500, 500, (SIDE, SIDE), np.int16)
    noise[300:900, 200:1500] += 1000
    dataset.PixelData = noise.tobytes()
    dataset.Rows = dataset.Columns = SIDE
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(dataset, name, generate_uid(entropy_srcs=["partial", name]))
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(source / "large.dcm")
    return source


@pytest.fixture
def store(filled: DataStore, store_folder: Path, tmp_path: Path) -> Iterator[DataStore]:
    """With an empty cache and counts of its own."""
    with ahi_ml.connect(store_folder, cache=tmp_path / "cache") as own:
        yield own


@pytest.fixture(scope="module")
def index(filled: DataStore) -> DatasetIndex:
    return filled.search().index().where(f"Rows == {SIDE}")


def encoded(store: DataStore, index: DatasetIndex) -> bytes:
    source = index.sources()[0]
    return store.reader.fetch(source.image_set_id, source.frame_id)


def truth(store: DataStore, index: DatasetIndex, reduce: int) -> Any:
    kind = index.profile(0)
    return decode(encoded(store, index), kind.syntax, kind.pixels, reduce=reduce)


@pytest.mark.parametrize(("reduce", "most"), [(1, 0.4), (2, 0.2), (3, 0.15)])
@pytest.mark.parametrize("lean", [True, False])
def test_reading_stops_where_it_is_enough(
    filled: DataStore, index: DatasetIndex, reduce: int, most: float, lean: bool
) -> None:
    """By both transports, and the next request is as good as the first."""
    transport: Any = (
        filled.reader._transport if lean else Boto3Transport(filled.client, filled.datastore_id, in_flight=2)
    )
    reader = Reader(transport, filled.datastore_id)
    size = len(encoded(filled, index))
    assert size > 4 * WORTH_BYTES
    expected = truth(filled, index, reduce)
    for _ in range(3):
        (array,) = reader.read(index.sources(), options(reduce))
        np.testing.assert_array_equal(array, expected)
    stats = reader.stats()
    assert stats["fetched"] == stats["unverified"] == 3
    assert stats["bytes_fetched"] < 3 * most * size
    assert stats["refetched"] == 0
    (whole,) = reader.read(index.sources(), options(0))
    assert whole.shape == (SIDE, SIDE)
    assert reader.stats()["verified"] == 1
    if not lean:
        transport.close()


def test_frames_of_a_j2k_data_store_too(filled: DataStore, store_folder: Path, scans: Path, tmp_path: Path) -> None:
    """They have one tile-part and say no lengths: only their packets tell where a resolution ends."""
    filled.client.create_datastore(datastoreName="j2k", losslessStorageFormat="JPEG_2000_LOSSLESS")
    with ahi_ml.connect(store_folder, datastore="j2k", cache=tmp_path / "cache") as store:
        store.progress = False
        assert store.import_dicom(scans).imported == 2
        index = store.search().index().where(f"Rows == {SIDE}")
        assert index.profile(0).syntax.endswith(".90")
        (whole,) = filled.reader.read(filled.search().index().where(f"Rows == {SIDE}").sources(), options(2))
        (array,) = store.reader.read(index.sources(), options(2), cache=store.cache)
        np.testing.assert_array_equal(array, whole)
        (array,) = store.reader.read(index.sources(), options(3), cache=store.cache)
        np.testing.assert_array_equal(array, truth(store, index, 3))
        stats = store.reader.stats()
        assert (stats["fetched"], stats["cached"]) == (1, 1)
        assert stats["bytes_fetched"] < 0.2 * len(encoded(store, index))


def test_small_frames_are_read_whole(store: DataStore, filled: DataStore) -> None:
    small = filled.search().index().where("Rows == 128")
    source = small.sources()[0]
    store.reader.read([source], options(1), cache=store.cache)
    assert store.reader.stats()["bytes_fetched"] == len(store.reader.fetch(source.image_set_id, source.frame_id))
    store.reader.read([source], options(0), cache=store.cache)
    assert store.reader.stats()["fetched"] == 1


def test_a_cached_part_serves_lower_resolutions_and_is_replaced(store: DataStore, index: DatasetIndex) -> None:
    reader, cache, sources = store.reader, store.cache, index.sources()

    def read(reduce: int) -> dict[str, Any]:
        before = reader.stats()
        (array,) = reader.read(sources, options(reduce), cache=cache)
        np.testing.assert_array_equal(array, truth(store, index, reduce))
        return {name: count - before[name] for name, count in reader.stats().items()}

    assert read(2)["fetched"] == 1
    assert [read(reduce)["cached"] for reduce in (2, 3, 4, 5)] == [1, 1, 1, 1]
    size = cache.size()
    assert read(1)["fetched"] == 1  # needs more: a longer part
    assert cache.size()[0] == size[0]
    assert cache.size()[1] > size[1]
    assert read(2)["cached"] == 1
    last = read(0)  # and then the frame itself
    assert (last["fetched"], last["verified"]) == (1, 1)
    assert [read(reduce)["verified"] for reduce in (0, 1, 2)] == [1, 1, 1]
    assert reader.stats()["fetched"] == 3


def test_volumes_and_datasets_stop_as_well(store: DataStore, index: DatasetIndex) -> None:
    item = ahi_ml.FrameDataset(store, index, output="stored", reduce=2, cache=None)[0]
    np.testing.assert_array_equal(item["image"][0].numpy(), truth(store, index, 2))
    first = store.reader.stats()["bytes_fetched"]
    assert first < 0.2 * len(encoded(store, index))


class TestPart:
    def test_it_asks_until_it_knows(self) -> None:
        asked: list[int] = []

        def needed(head: bytes) -> tuple[int, bool]:
            asked.append(len(head))
            return (700, True) if len(head) >= 200 else (200, False)

        part, total = Part(needed), 10 * WORTH_BYTES
        sizes = [100, 150, 200, 600, 699, 700]
        assert [part.stops(size, total, lambda size=size: bytes(size)) for size in sizes] == [False] * 5 + [True]
        assert asked == [100, 200], "asked with less than it said it takes"
        assert part.stopped
        part.begin()
        assert not part.stopped

    @pytest.mark.parametrize(("left", "stops"), [(WORTH_BYTES, True), (WORTH_BYTES - 1, False)])
    def test_what_is_not_worth_a_connection(self, left: int, stops: bool) -> None:
        part = Part(lambda head: (1000, True))
        assert part.stops(1000, 1000 + left, lambda: b"") is stops
