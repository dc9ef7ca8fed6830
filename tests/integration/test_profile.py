"""Where the time of loading goes: counts are exact, and what is slowed down is what the report names."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom.data import get_testdata_file
from torch.utils.data import DataLoader

import ahi_ml
from ahi_ml.codec import Prepared
from ahi_ml.datasets import FrameDataset, FrameLoader, LoadingStats
from ahi_ml.errors import DataError
from ahi_ml.index import DatasetIndex
from ahi_ml.store import DataStore

FRAMES = 10
EPOCH = list(range(FRAMES)) * 4


@pytest.fixture(scope="module")
def filled(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataStore]:
    with ahi_ml.connect(store_folder, cache=tmp_path_factory.mktemp("cache")) as store:
        store.progress = False
        source = tmp_path_factory.mktemp("dicom")
        (source / "mr.dcm").write_bytes(Path(get_testdata_file("emri_small.dcm", download=False)).read_bytes())
        assert store.import_dicom(source).imported == 1
        yield store


@pytest.fixture(scope="module")
def index(filled: DataStore) -> DatasetIndex:
    found = filled.search().index()
    assert len(found) == FRAMES
    return found


@pytest.fixture
def store(filled: DataStore, store_folder: Path, tmp_path: Path) -> Iterator[DataStore]:
    """With an empty cache of its own."""
    with ahi_ml.connect(store_folder, cache=tmp_path / "cache") as own:
        yield own


def run(loader: Any, body_s: float = 0.0) -> None:
    for _ in loader:
        time.sleep(body_s)


def consistent(stats: LoadingStats) -> None:
    assert sum(stats.shares.values()) == pytest.approx(1)
    assert min(stats.shares.values()) >= 0


class TestCounts:
    def test_of_a_cold_and_a_warm_epoch(self, store: DataStore, index: DatasetIndex) -> None:
        loader = FrameLoader(FrameDataset(store, index), 4, sampler=range(FRAMES))
        run(loader)
        cold = loader.stats()
        assert (cold.frames, cold.batches, cold.hits, cold.misses, cold.requests) == (10, 3, 0, 10, 10)
        assert (cold.verified, cold.unverified, cold.refetched, cold.retried, cold.throttled) == (10, 0, 0, 0, 0)
        assert cold.bytes_fetched == store.reader.stats()["bytes_fetched"] > 10_000
        run(loader)
        warm = loader.stats()
        assert (warm.frames, warm.hits, warm.misses, warm.requests, warm.verified) == (20, 10, 10, 10, 20)
        assert warm.elapsed_s > cold.elapsed_s > 0
        assert warm.decode_busy_s > cold.decode_busy_s > 0
        consistent(warm)

    def test_unverified(self, store: DataStore, index: DatasetIndex) -> None:
        loader = FrameLoader(FrameDataset(store, index, verify=False), 4)
        run(loader)
        assert (loader.stats().verified, loader.stats().unverified) == (0, 10)

    def test_results_from_the_cache(self, store: DataStore, index: DatasetIndex) -> None:
        loader = FrameLoader(FrameDataset(store, index, cache_decoded=True), 5)
        run(loader)
        with loader.profile() as profile:
            run(loader)
        warm = profile.total
        assert (warm.frames, warm.hits, warm.misses, warm.verified) == (10, 10, 0, 10)
        assert warm.decode_busy_s == 0 < warm.read_busy_s

    def test_of_others_do_not_count(self, store: DataStore, index: DatasetIndex) -> None:
        first, second = (FrameLoader(FrameDataset(store, index, cache=None), 5) for _ in range(2))
        run(first)
        run(second)
        assert first.stats().requests == second.stats().requests == 10
        assert first.stats().misses == second.stats().misses == 10

    @pytest.mark.usefixtures("filled")
    def test_retries_and_throttling(self, store_folder: Path, index: DatasetIndex, tmp_path: Path) -> None:
        faults = {"error_rate": 0.3, "seed": 5, "operations": ["GetImageFrame"]}
        with ahi_ml.connect(store_folder, cache=tmp_path / "cache", faults=faults) as store:
            loader = FrameLoader(FrameDataset(store, index, cache=None), 5)
            run(loader)
            stats = loader.stats()
        assert stats.retried > 0
        assert stats.requests == stats.misses + stats.retried == 10 + stats.retried
        assert stats.throttled == 0

    def test_skipped(self, store: DataStore, index: DatasetIndex) -> None:
        dataset = FrameDataset(store, index, cache=None, on_error="skip")
        fetch = store.reader._transport.fetch
        wrong = index.sources([3])[0].frame_id

        def fetch_but_one(image_set_id: str, frame_id: str, *arguments: Any) -> Any:
            return fetch(image_set_id, "0" * 32 if frame_id == wrong else frame_id, *arguments)

        store.reader._transport.fetch = fetch_but_one  # type: ignore[method-assign]
        loader = FrameLoader(dataset, 5)
        run(loader)
        assert (loader.stats().frames, loader.stats().skipped) == (10, 1)


class TestShares:
    """What is made slow takes most of the time, and the advice is about it."""

    @pytest.mark.usefixtures("filled")
    def test_the_network(self, store_folder: Path, index: DatasetIndex, tmp_path: Path) -> None:
        faults = {"latency_ms": 300, "operations": ["GetImageFrame"]}
        with ahi_ml.connect(store_folder, cache=tmp_path / "cache", faults=faults) as store:
            loader = FrameLoader(FrameDataset(store, index, cache=None), 5)
            run(loader)
            stats = loader.stats()
        consistent(stats)
        assert max(stats.shares, key=lambda name: stats.shares[name]) == "network"
        assert "network bounds it" in stats.advice

    def test_the_loop(self, store: DataStore, index: DatasetIndex) -> None:
        loader = FrameLoader(FrameDataset(store, index), 5, sampler=EPOCH)
        run(loader)
        with loader.profile() as profile:
            run(loader, 0.1)
        consistent(profile.total)
        assert profile.total.consumer_s > 0.7
        assert "Your loop bounds it" in profile.total.advice

    def test_the_transform(self, store: DataStore, index: DatasetIndex) -> None:
        def slow(item: dict[str, Any]) -> dict[str, Any]:
            time.sleep(0.03)
            return item

        loader = FrameLoader(FrameDataset(store, index, transform=slow, seed=None), 5, sampler=EPOCH)
        run(loader)
        stats = loader.stats()
        consistent(stats)
        assert stats.transform_s > 40 * 0.03
        assert "Your transform bounds it" in stats.advice

    def test_decoding(self, store: DataStore, index: DatasetIndex, monkeypatch: pytest.MonkeyPatch) -> None:
        decode = Prepared.__call__

        def slow(self: Prepared, out: Any = None) -> Any:
            time.sleep(0.03)
            return decode(self, out)

        monkeypatch.setattr(Prepared, "__call__", slow)
        loader = FrameLoader(FrameDataset(store, index), 5, sampler=EPOCH)
        run(loader)
        assert "Decoding bounds it" in loader.stats().advice
        assert loader.stats().decode_busy_s > 40 * 0.03

    def test_the_accounts_rate(self) -> None:
        stats = LoadingStats(frames=9, processes=1, elapsed_s=10, network_s=9, requests=100, throttled=5)
        assert "request rate bounds it" in stats.advice
        assert "network bounds it" in LoadingStats(frames=9, processes=1, elapsed_s=10, network_s=9).advice

    def test_nothing(self, store: DataStore, index: DatasetIndex) -> None:
        with FrameDataset(store, index).profile() as profile:
            pass
        assert profile.total.advice == "Nothing was read."
        assert str(profile)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_of_workers(store: DataStore, index: DatasetIndex, method: str) -> None:
    dataset = FrameDataset(store, index, cache=None)
    loader: Any = DataLoader(dataset, 2, num_workers=2, multiprocessing_context=method, persistent_workers=True)
    with dataset.profile() as profile:
        run(loader)
        run(loader)
    run(loader)  # after it
    assert set(profile.workers) == {0, 1}
    assert [stats.frames for stats in profile.workers.values()] == [12, 8]
    assert profile.total.frames == profile.total.misses == profile.total.verified == 20
    assert profile.total.requests == 20
    assert profile.total.processes == 2
    assert profile.total.elapsed_s == profile.workers[0].elapsed_s
    consistent(profile.total)
    assert "worker 1: 8 frames" in str(profile)


def test_a_dataset_stays_small(store: DataStore, index: DatasetIndex) -> None:
    assert len(pickle.dumps(FrameDataset(store, index))) < 10_000


def test_errors_end_an_iteration_that_is_counted(store: DataStore, index: DatasetIndex) -> None:
    def refuse(item: dict[str, Any]) -> dict[str, Any]:
        raise DataError("no")

    loader = FrameLoader(FrameDataset(store, index, transform=refuse), 5)
    with pytest.raises(DataError):
        run(loader)
    once = loader.stats().elapsed_s
    time.sleep(0.02)
    assert loader.stats().elapsed_s == once > 0
