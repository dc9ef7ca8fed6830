"""Both tiers of the cache behind datasets: one download a frame, results read again, wherever they are wanted."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import ahi_ml
from ahi_ml.cache import FrameCache
from ahi_ml.errors import ConfigError
from ahi_ml.pixels import Window

NAMES = ["CT_small.dcm", "MR_small.dcm", "SC_rgb_rle_2frame.dcm", "examples_palette.dcm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pydicom_file: Callable[[str], Path]) -> Path:
    """The folder of a store with a few series."""
    folder = tmp_path_factory.mktemp("tiers")
    (folder / "in").mkdir()
    for name in NAMES:
        shutil.copy(pydicom_file(name), folder / "in")
    with ahi_ml.connect(folder / "store", cache=folder / "unused") as store:
        assert store.import_dicom(folder / "in").imported == len(NAMES)
    return folder / "store"


@pytest.fixture
def store(folder: Path, tmp_path: Path) -> Iterator[ahi_ml.DataStore]:
    with ahi_ml.connect(folder, cache=tmp_path / "cache") as opened:
        yield opened


def images(dataset: Any) -> list[torch.Tensor]:
    return [item["image"] for item in dataset.__getitems__(list(range(len(dataset))))]


def requests(store: ahi_ml.DataStore) -> Counter[str]:
    """Counts requests of this process's reader by frame, from now on."""
    counts: Counter[str] = Counter()
    transport = store.reader._transport
    fetch = transport.fetch

    def counted(image_set_id: str, frame_id: str, part: Any = None) -> Any:
        counts[frame_id] += 1
        return fetch(image_set_id, frame_id)

    transport.fetch = counted  # type: ignore[method-assign]
    return counts


@pytest.mark.parametrize("options", [{}, {"output": "stored"}, {"output": "display"}, {"transform": Window(40, 400)}])
def test_results_are_those_of_decoding(store: ahi_ml.DataStore, options: dict[str, Any]) -> None:
    index = store.search(primary=None).index()
    plain = images(ahi_ml.FrameDataset(store, index, cache=None, **options))
    kept = ahi_ml.FrameDataset(store, index, cache_decoded=True, **options)
    counts = requests(store)
    for _ in range(3):
        for image, expected in zip(images(kept), plain, strict=True):
            assert image.dtype == expected.dtype
            assert torch.equal(image, expected)
    assert set(counts.values()) == {1}
    stats = store.cache.stats()
    assert (stats["derived_misses"], stats["derived_hits"]) == (len(index), 2 * len(index))
    assert store.reader.stats()["unverified"] == 0


def test_results_need_no_encoded_frame(store: ahi_ml.DataStore) -> None:
    index = store.search(primary=None).index()
    kept = ahi_ml.FrameDataset(store, index, cache_decoded=True)
    first = images(kept)
    for frame_id in index.frames["frame_id"]:
        store.cache.drop(store.datastore_id, frame_id)
    counts = requests(store)
    assert all(torch.equal(one, other) for one, other in zip(images(kept), first, strict=True))
    assert not counts


def test_other_options_are_other_results(store: ahi_ml.DataStore) -> None:
    index = store.search(primary=None).where(modality="CT").index()
    for center in (0, 40, 80):
        for window in (Window(center, 400), Window(center, 100)):
            plain = images(ahi_ml.FrameDataset(store, index, transform=window, cache=None))
            for _ in range(2):
                kept = images(ahi_ml.FrameDataset(store, index, transform=window, cache_decoded=True))
                assert torch.equal(kept[0], plain[0])


def test_another_rescale_is_another_result(store: ahi_ml.DataStore) -> None:
    index = store.search(primary=None).where(modality="CT").index()
    before = images(ahi_ml.FrameDataset(store, index, cache_decoded=True))[0]
    ids = {"datastoreId": store.datastore_id, "imageSetId": str(index.frames["image_set_id"].iloc[0])}
    client = store.client
    (series,) = index.frames["series_instance_uid"].unique()
    (uid,) = index.frames["sop_instance_uid"].unique()
    tree = {"Study": {"Series": {str(series): {"Instances": {str(uid): {"DICOM": {"RescaleIntercept": "-2000"}}}}}}}
    import json

    text = json.dumps({"SchemaVersion": 1.1, **tree}).encode()
    version = client.get_image_set(**ids)["versionId"]
    updates = {"DICOMUpdates": {"updatableAttributes": text}}
    client.update_image_set_metadata(**ids, latestVersionId=version, updateImageSetMetadataUpdates=updates)
    while client.get_image_set(**ids)["imageSetState"] == "LOCKED":
        pass
    edited = store.search(primary=None).where(modality="CT").index()
    after = images(ahi_ml.FrameDataset(store, edited, cache_decoded=True))[0]
    np.testing.assert_allclose((before - after).numpy(), 2000 - 1024)


@pytest.mark.parametrize("decoded", [False, True])
def test_what_nobody_verified_is_not_given_to_whoever_verifies(store: ahi_ml.DataStore, decoded: bool) -> None:
    index = store.search(primary=None).where(modality="CT").index()
    expected = images(ahi_ml.FrameDataset(store, index, cache=None, output="stored"))[0]
    transport = store.reader._transport
    fetch = transport.fetch

    def damaged(image_set_id: str, frame_id: str, part: Any = None) -> Any:
        data = bytearray(fetch(image_set_id, frame_id).result())
        data[len(data) // 2] ^= 0x55
        future: Future[bytes] = Future()
        future.set_result(bytes(data))
        return future

    transport.fetch = damaged  # type: ignore[method-assign]
    lax = images(ahi_ml.FrameDataset(store, index, output="stored", cache_decoded=True, verify=False))[0]
    assert not torch.equal(lax, expected)
    transport.fetch = fetch  # type: ignore[method-assign]
    for _ in range(3):
        found = images(ahi_ml.FrameDataset(store, index, output="stored", cache_decoded=decoded))[0]
        assert torch.equal(found, expected)


def test_a_step_of_others_is_not_kept(store: ahi_ml.DataStore, caplog: pytest.LogCaptureFixture) -> None:
    class Noise:
        def apply(self, image: Any) -> None:
            image += 1

    index = store.search(primary=None).where(modality="CT").index()
    with caplog.at_level(logging.WARNING, "ahi_ml"):
        dataset = ahi_ml.FrameDataset(store, index, transform=[Noise()], cache_decoded=True)
    assert "no fingerprint" in caplog.text
    images(dataset)
    assert store.cache.stats()["derived_misses"] == 0


def test_it_needs_a_cache(store: ahi_ml.DataStore) -> None:
    with pytest.raises(ConfigError, match="cache_decoded"):
        ahi_ml.FrameDataset(store, store.search(primary=None).index(), cache=None, cache_decoded=True)


def test_one_request_for_a_frame_wanted_many_times(folder: Path, tmp_path: Path) -> None:
    with ahi_ml.connect(folder, cache=tmp_path / "cache", faults={"latency_ms": 100}) as store:
        index = store.search(primary=None).index()
        dataset = ahi_ml.FrameDataset(store, index, cache_decoded=False)
        counts = requests(store)
        rows = list(range(len(index))) * 5
        pending = [dataset.submit(dataset.look_up(rows)) for _ in range(4)]
        for each in pending:
            items = dataset.items(each)
            for item, row in zip(items, rows, strict=True):
                assert torch.equal(item["image"], items[row]["image"])
        assert set(counts.values()) == {1}
        assert len(counts) == len(index)


def test_a_download_that_fails_lets_the_next_one_try(store: ahi_ml.DataStore) -> None:
    index = store.search(primary=None).where(modality="CT").index()
    dataset = ahi_ml.FrameDataset(store, index)
    transport, asked = store.reader._transport, []
    fetch = transport.fetch

    def failing(image_set_id: str, frame_id: str, part: Any = None) -> Any:
        asked.append(frame_id)
        return fetch(image_set_id, frame_id if len(asked) > 1 else "0" * 32)

    transport.fetch = failing  # type: ignore[method-assign]
    batch = store.reader.submit(dataset.index.sources([0, 0, 0]), dataset.options, cache=store.cache)
    outcomes = batch.outcomes(30)
    assert sum(isinstance(outcome, BaseException) for outcome in outcomes) == 1
    assert len(asked) == 2


def test_a_cancelled_download_lets_others_go_on(folder: Path, tmp_path: Path) -> None:
    with ahi_ml.connect(folder, cache=tmp_path / "cache", faults={"latency_ms": 150}) as store:
        dataset = ahi_ml.FrameDataset(store, store.search(primary=None).index())
        first, second = dataset.submit(dataset.look_up([0, 1])), dataset.submit(dataset.look_up([0, 1]))
        first.batch.cancel()
        assert len(dataset.items(second)) == 2


def _count(folder: Path, cache: Path, rounds: int, start: Any, results: Any) -> None:
    with ahi_ml.connect(folder, cache=cache) as store:
        index = store.search(primary=None).index()
        dataset = ahi_ml.FrameDataset(store, index)
        counts = requests(store)
        start.wait(60)
        for _ in range(rounds):
            images(dataset)
        results.put(dict(counts))


def test_one_request_for_a_frame_wanted_by_many_processes(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(4), context.Queue()
    with ahi_ml.connect(folder, cache=tmp_path / "other", faults={"latency_ms": 300}) as store:
        n = len(store.search(primary=None).index())
        workers = [
            context.Process(target=_count, args=(folder, tmp_path / "cache", 2, start, results)) for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        total: Counter[str] = Counter()
        for _ in workers:
            total.update(results.get(timeout=100))
        for worker in workers:
            worker.join(30)
    assert len(total) == n
    assert set(total.values()) == {1}


class TestPrefetch:
    def test_it_fills_the_cache_and_says_what_it_found(self, store: ahi_ml.DataStore) -> None:
        index = store.search(primary=None).where(modality="CT").index()
        store.cache.clear()
        first = store.prefetch(index, progress=False)
        assert (first.frames, first.stats.fetched, first.stats.verified, first.errors) == (
            len(index),
            len(index),
            len(index),
            (),
        )
        again = store.prefetch(index, progress=False)
        assert (again.stats.fetched, again.stats.cached, again.stats.verified) == (0, len(index), len(index))
        before = store.reader.stats()["fetched"]
        assert len(list(ahi_ml.FrameDataset(store, index))) == len(index)
        assert store.reader.stats()["fetched"] == before
        assert f"{len(index)} frames" in repr(again)

    def test_frames_that_cannot_be_read_are_told(self, store: ahi_ml.DataStore) -> None:
        index = store.search(primary=None).where(modality="CT").index()
        store.cache.clear()
        transport = store.reader._transport
        fetch, wrong = transport.fetch, index.sources([0])[0].frame_id

        def failing(image_set_id: str, frame_id: str, part: Any = None) -> Any:
            return fetch(image_set_id, "0" * 32 if frame_id == wrong else frame_id, part)

        transport.fetch = failing  # type: ignore[method-assign]
        try:
            found = store.prefetch(index, progress=False)
        finally:
            transport.fetch = fetch  # type: ignore[method-assign]
        assert [type(error).__name__ for error in found.errors] == ["NotFoundError"]
        assert found.stats.fetched == len(index) - 1

    def test_into_another_cache_encrypted(self, store: ahi_ml.DataStore, tmp_path: Path) -> None:
        index = store.search(primary=None).where(modality="CT").index()
        cache = FrameCache(tmp_path / "sealed", encrypt=_turned, decrypt=_turned)
        store.prefetch(index, cache=cache, progress=False)
        plain = ahi_ml.FrameDataset(store, index, cache=None)[0]["image"]
        for options in ({}, {"cache_decoded": True}, {"cache_decoded": True}):
            before = store.reader.stats()["fetched"]
            item = ahi_ml.FrameDataset(store, index, cache=cache, **options)[0]
            assert (item["image"] == plain).all()
            assert store.reader.stats()["fetched"] == before


@pytest.mark.parametrize("by", ["prefetch", "loader"])
def test_frames_that_only_the_remote_tier_has(
    store: ahi_ml.DataStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    index = store.search(primary=None).index()
    url = f"memory://{tmp_path.name}"
    store.prefetch(index, cache=FrameCache(tmp_path / "one", remote=url), progress=False)
    other = FrameCache(tmp_path / "other", remote=url)
    together, give = threading.Barrier(len(index), timeout=20), MemoryFileSystem.cat_file

    def wait_and_give(*arguments: Any, **options: Any) -> bytes:
        together.wait()  # until as many are asked for at once as there are
        return bytes(give(*arguments, **options))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", wait_and_give)
    counts = requests(store)
    if by == "prefetch":
        found = store.prefetch(index, cache=other, progress=False)
        assert (found.stats.cached, found.stats.fetched, found.errors) == (len(index), 0, ())
    else:
        loader = ahi_ml.FrameLoader(ahi_ml.FrameDataset(store, index, cache=other), batch_size=1)
        plain = images(ahi_ml.FrameDataset(store, index, cache=None))
        counts.clear()
        assert all(torch.equal(batch["image"][0], image) for batch, image in zip(loader, plain, strict=True))
    assert not counts
    assert not together.broken
    stats = other.stats()
    assert (stats["remote_hits"], stats["hits"], stats["misses"]) == (len(index), len(index), 0)


def _turned(data: bytes) -> bytes:
    return bytes(255 - each for each in data)
