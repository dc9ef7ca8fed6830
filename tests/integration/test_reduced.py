"""Lower resolutions through readers, datasets and volumes: the codec's low-pass image, where it belongs in space."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ahi_ml
from ahi_ml import codec
from ahi_ml.errors import ConfigError

NAMES = ["CT_small.dcm", "MR_small.dcm", "SC_rgb_rle_2frame.dcm", "examples_palette.dcm", "liver_1frame.dcm"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, pydicom_file: Callable[[str], Path]) -> Iterator[ahi_ml.DataStore]:
    folder = tmp_path_factory.mktemp("reduced")
    (folder / "in").mkdir()
    for name in NAMES:
        shutil.copy(pydicom_file(name), folder / "in")
    with ahi_ml.connect(folder / "store", cache=folder / "cache") as opened:
        assert opened.import_dicom(folder / "in").imported == len(NAMES)
        yield opened


@pytest.mark.parametrize("level", [1, 2, 3])
def test_stored_values_are_the_codecs(store: ahi_ml.DataStore, level: int) -> None:
    index = store.search(primary=None).index()
    reduced = ahi_ml.FrameDataset(store, index, output="stored", dtype=np.int64, reduce=level, cache=None)
    items = reduced.__getitems__(list(range(len(index))))
    assert len(items) >= 6
    for source, item in zip(index.sources(), items, strict=True):
        data = store.reader.fetch(source.image_set_id, source.frame_id)
        pixels = source.profile.pixels
        expected = codec.decode(data, source.profile.syntax, pixels, reduce=level)
        assert expected.shape[:2] == (-(-pixels.rows // 2**level), -(-pixels.columns // 2**level))
        image = item["image"].numpy()
        np.testing.assert_array_equal(image[0] if expected.ndim == 2 else np.moveaxis(image, 0, -1), expected)


@pytest.mark.parametrize("output", ["stored", "modality"])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_frames_that_are_read_again_stay_the_same(
    tmp_path: Path, store: ahi_ml.DataStore, level: int, output: Any
) -> None:
    """From the third time on they are mapped, and how to decode them is not worked out again."""
    index = store.search(primary=None).index()
    rows = range(len(index))
    fresh = ahi_ml.FrameDataset(store, index, output=output, reduce=level, cache=None).__getitems__(rows)
    cache = ahi_ml.cache.FrameCache(tmp_path / "cache")
    cached = ahi_ml.FrameDataset(store, index, output=output, reduce=level, cache=cache)
    for _ in range(5):
        for item, expected in zip(cached.__getitems__(rows), fresh, strict=True):
            assert torch.equal(item["image"], expected["image"])
    entries = cache.get_many(store.datastore_id, list(index.frames["frame_id"]), level)
    assert all(entry is not None and entry.notes and "prepared" in entry.notes for entry in entries)


@pytest.mark.parametrize("output", ["modality", "display"])
def test_conversions_apply_at_lower_resolution(store: ahi_ml.DataStore, output: Any) -> None:
    index = store.search(primary=None).index()
    full = ahi_ml.FrameDataset(store, index, output=output, cache=None)
    half = ahi_ml.FrameDataset(store, index, output=output, reduce=1, cache=None)
    for large, small in zip(full.__getitems__(range(len(full))), half.__getitems__(range(len(half))), strict=True):
        assert small["image"].dtype == large["image"].dtype
        sampled = large["image"][:, ::2, ::2]
        assert small["image"].shape == sampled.shape
        spread = float(large["image"].max() - large["image"].min())
        assert float((small["image"] - sampled).abs().mean()) < 0.1 * spread + 1e-6  # the same picture


def test_verified_says_what_was_compared(tmp_path: Path, store: ahi_ml.DataStore) -> None:
    index = store.search(primary=None).where(modality="CT").index()
    cache = ahi_ml.cache.FrameCache(tmp_path / "cache")

    def counts(reduce: int) -> tuple[int, int]:
        before = store.reader.stats()
        ahi_ml.FrameDataset(store, index, reduce=reduce, cache=cache).__getitems__([0])
        after = store.reader.stats()
        return after["verified"] - before["verified"], after["unverified"] - before["unverified"]

    assert counts(1) == (0, 1)  # the checksum is of the full frame
    assert counts(0) == (1, 0)  # from the cache, where it lies unverified: compared now
    cache.drop(store.datastore_id, str(index.frames["frame_id"].iloc[0]))
    assert counts(0) == (1, 0)
    assert counts(1) == (1, 0)  # cached as a verified frame


def test_kept_results_know_their_level(tmp_path: Path, store: ahi_ml.DataStore) -> None:
    index = store.search(primary=None).where(modality="CT").index()
    cache = ahi_ml.cache.FrameCache(tmp_path / "cache")
    for _ in range(2):
        shapes = [
            tuple(ahi_ml.FrameDataset(store, index, reduce=level, cache=cache, cache_decoded=True)[0]["image"].shape)
            for level in (0, 1, 2)
        ]
        assert shapes == [(1, 128, 128), (1, 64, 64), (1, 32, 32)]


def test_a_volume_keeps_its_place(store: ahi_ml.DataStore) -> None:
    index = store.search(primary=None).where(modality="CT").index()
    full = ahi_ml.open_volume(store, index)
    half = ahi_ml.open_volume(store, index, reduce=1)
    assert half.shape == (1, 64, 64)
    assert (half.attrs["reduce"], full.attrs["reduce"]) == (1, 0)
    scale = np.diag([1, 2, 2, 1])
    np.testing.assert_allclose(half.attrs["affine"], full.attrs["affine"] @ scale)
    for axis in ("y", "x"):
        np.testing.assert_allclose(half[axis].values, full[axis].values[::2])
    np.testing.assert_allclose(half["z"].values, full["z"].values)
    one = ahi_ml.FrameDataset(store, index, reduce=1)[0]["image"].numpy()
    np.testing.assert_array_equal(half.values, one)
    np.testing.assert_array_equal(half[0, 10:20, 5].values, one[0, 10:20, 5])


def test_real_slices(shared_data: Path, tmp_path: Path) -> None:
    with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache") as store:
        store.import_dicom(shared_data / "ct-abdomen-41")
        full = ahi_ml.open_volume(store, store.search().index())
        half = ahi_ml.open_volume(store, store.search().index(), reduce=1)
        assert half.shape == (41, 256, 256)
        apart = [float(np.abs(half.values - full.values[:, j::2, i::2]).mean()) for j in (0, 1) for i in (0, 1)]
        assert apart[0] < 15  # HU
        assert apart[0] == min(apart), "low-pass samples sit on the even ones"


@pytest.mark.parametrize("level", [-1, 9, True, 1.0, "1"])
def test_levels_that_cannot_be(store: ahi_ml.DataStore, level: Any) -> None:
    with pytest.raises(ConfigError, match="reduce"):
        ahi_ml.FrameDataset(store, store.search(primary=None).index(), reduce=level)


def test_batches(store: ahi_ml.DataStore) -> None:
    index = store.search(primary=None).where(modality="CT").index()
    (batch,) = ahi_ml.FrameLoader(ahi_ml.FrameDataset(store, index, reduce=1), batch_size=4)
    assert batch["image"].shape == (1, 1, 64, 64)
    assert batch["image"].dtype == torch.float32
