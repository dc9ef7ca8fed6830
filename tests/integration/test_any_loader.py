"""Any DataLoader: an epoch's frames once each, stopped and resumed anywhere, augmented alike, in flat memory."""

# ruff: noqa: NPY002  # transforms of users draw from numpy's old generator too

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pydicom
import pytest
import torch
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MultiFrameGrayscaleWordSecondaryCaptureImageStorage, generate_uid
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from ahi_ml.datasets import FrameDataset, FrameLoader, ResumableSampler, sample_seed
from ahi_ml.errors import ConfigError, SnapshotDriftError
from ahi_ml.index import DatasetIndex
from ahi_ml.index.schema import FRAMES, INSTANCES, PLANES, PROFILES, SERIES
from ahi_ml.index.tables import Tables
from ahi_ml.reader import Batch
from ahi_ml.store import DataStore, connect

SERIES_COUNT, FRAMES_EACH = 7, 9
COUNT = SERIES_COUNT * FRAMES_EACH
METHODS = ["fork", "spawn", "forkserver"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),  # there is no accelerator
    pytest.mark.filterwarnings("ignore:.*set_vital.*:UserWarning"),  # torchdata's, with this torch
]


def write_series(path: Path, number: int) -> None:
    """One multi-frame image; a pixel's value tells its frame."""
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = MultiFrameGrayscaleWordSecondaryCaptureImageStorage
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        setattr(dataset, keyword, generate_uid(entropy_srcs=["sampler", keyword, str(number)]))
    dataset.PatientID = f"phantom-{number}"
    dataset.Modality = "OT"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames = 8, 8, FRAMES_EACH
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    pixels = np.arange(FRAMES_EACH, dtype=np.uint16)[:, None, None] + np.zeros((8, 8), np.uint16) + 100 * number
    dataset.PixelData = pixels.tobytes()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.save_as(path, enforce_file_format=True)


@pytest.fixture(scope="module")
def store(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataStore]:
    scans = tmp_path_factory.mktemp("dicom")
    for number in range(SERIES_COUNT):
        write_series(scans / f"{number}.dcm", number)
    with connect(store_folder, cache=tmp_path_factory.mktemp("cache")) as made:
        made.progress = False
        assert made.import_dicom(scans).imported == SERIES_COUNT
        yield made


@pytest.fixture(scope="module")
def index(store: DataStore) -> DatasetIndex:
    return store.search().index()


@pytest.fixture
def dataset(store: DataStore, index: DatasetIndex) -> FrameDataset:
    return FrameDataset(store, index)


@pytest.fixture(scope="module")
def keys(store: DataStore, index: DatasetIndex) -> list[str]:
    return [item["key"] for item in FrameDataset(store, index)]


def keys_of(batches: Any) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def order(epoch: int, seed: int = 0) -> list[int]:
    sampler = ResumableSampler(COUNT, seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def of_rows(keys: list[str], rows: list[int]) -> list[str]:
    return [keys[row] for row in rows]


def jitter(item: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {**item, "image": item["image"] + float(rng.random())}


def global_jitter(item: dict[str, Any]) -> dict[str, Any]:
    draws = torch.tensor([torch.rand(()), float(np.random.rand()), np.random.standard_normal(), random.random()])
    return {**item, "image": item["image"] + draws.sum(), "draws": draws}


def double(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, "image": 2 * item["image"]}


class TestPlainDataLoader:
    @pytest.mark.parametrize(("workers", "method"), [(0, None), *((2, method) for method in METHODS)])
    def test_stopped_and_resumed(
        self, dataset: FrameDataset, keys: list[str], workers: int, method: str | None
    ) -> None:
        sampler = ResumableSampler(dataset, seed=3)
        options: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": method, "pin_memory": True}
        got = []
        for number, batch in enumerate(DataLoader(dataset, 4, sampler=sampler, prefetch_factor=None, **options), 1):
            got.append(batch)
            if number == 6:
                state = json.loads(json.dumps(sampler.state_dict(taken=4 * number)))
                break
        assert (state["epoch"], state["consumed"]) == (0, 24)
        # Another number of workers, another batch size.
        again = ResumableSampler(dataset)
        again.load_state_dict(state)
        loader = DataLoader(
            dataset, 7, sampler=again, num_workers=2 - workers, multiprocessing_context=None if workers else "fork"
        )
        assert keys_of(got) + keys_of(loader) == of_rows(keys, order(0, seed=3))
        assert keys_of(loader) == of_rows(keys, order(1, seed=3))

    def test_workers_draw_ahead_of_the_loop(self, dataset: FrameDataset) -> None:
        """Why a plain DataLoader's loop has to say how far it is."""
        sampler = ResumableSampler(dataset)
        next(iter(DataLoader(dataset, 4, sampler=sampler, num_workers=2, multiprocessing_context="fork")))
        assert sampler.state_dict()["consumed"] > 4
        assert sampler.state_dict(taken=4)["consumed"] == 4

    def test_persistent_workers_over_epochs(self, dataset: FrameDataset, keys: list[str]) -> None:
        loader = DataLoader(
            dataset,
            batch_sampler=BatchSampler(ResumableSampler(dataset), 10, False),
            num_workers=2,
            multiprocessing_context="fork",
            persistent_workers=True,
            pin_memory=True,
        )
        for epoch in range(3):
            assert keys_of(loader) == of_rows(keys, order(epoch))

    def test_a_state_of_other_frames_is_refused(self, store: DataStore, index: DatasetIndex) -> None:
        state = ResumableSampler(FrameDataset(store, index[:20])).state_dict()
        ResumableSampler(FrameDataset(store, index[:20])).load_state_dict(state)
        ResumableSampler(20).load_state_dict(state)  # of a length alone no more is known
        for rows in (slice(1, 21), slice(19, None, -1)):
            with pytest.raises(SnapshotDriftError):
                ResumableSampler(FrameDataset(store, index[rows])).load_state_dict(state)


class TestFrameLoader:
    def test_only_what_the_loop_got_counts(self, dataset: FrameDataset, keys: list[str]) -> None:
        loader = FrameLoader(dataset, 4, shuffle=True, seed=2)
        assert loader.state_dict()["consumed"] == 0
        for number, _ in enumerate(loader, 1):
            state = loader.state_dict()
            assert (state["epoch"], state["consumed"]) == (0, min(4 * number, COUNT))
            assert len(json.dumps(state)) < 1000
        state = loader.state_dict()
        assert (state["epoch"], state["consumed"]) == (1, 0)

    @pytest.mark.parametrize("stop", [1, 7, 15, 16])
    def test_stopped_and_resumed(self, dataset: FrameDataset, keys: list[str], stop: int) -> None:
        loader = FrameLoader(dataset, 4, shuffle=True, seed=2)
        got = keys_of(islice(loader, stop))
        state = pickle.loads(pickle.dumps(loader.state_dict()))
        again = FrameLoader(dataset, 5, shuffle=True)
        again.load_state_dict(state)
        again.set_epoch(state["epoch"])  # as trainers do
        assert again.state_dict() == state
        assert got + keys_of(again) == of_rows(keys, order(0, seed=2))
        assert keys_of(again) == of_rows(keys, order(1, seed=2))
        assert len(again) == 13

    def test_another_world(self, dataset: FrameDataset, keys: list[str]) -> None:
        """1 to 2 to 3 to 1 ranks, then the next epoch."""
        state: dict[str, Any] | None = None
        done: list[str] = []
        for world, batches in ((1, 3), (2, 4), (3, 2), (1, 100)):
            parts = []
            for rank in range(world):
                sampler = ResumableSampler(dataset, num_replicas=world, rank=rank)
                loader = FrameLoader(dataset, 3, sampler=sampler)
                if state is not None:
                    loader.load_state_dict(state)
                parts.append((loader, [keys_of([batch]) for batch in islice(loader, batches)]))
            done += [key for step in zip(*(got for _, got in parts), strict=True) for key in chain.from_iterable(step)]
            states = [loader.state_dict() for loader, _ in parts]
            assert all(each == states[0] for each in states)
            state = states[0]
        assert Counter(done) == Counter(keys)
        assert set(done[:9]) == set(of_rows(keys, order(0)[:9]))
        assert state is not None
        assert (state["epoch"], state["consumed"]) == (1, 0)

    def test_states_pass_between_loaders(self, dataset: FrameDataset, keys: list[str]) -> None:
        loader = FrameLoader(dataset, 8, shuffle=True)
        got = keys_of(islice(loader, 3))
        sampler = ResumableSampler(dataset)
        sampler.load_state_dict(loader.state_dict())
        assert got + keys_of(DataLoader(dataset, 8, sampler=sampler)) == of_rows(keys, order(0))

    def test_with_another_sampler_samples_are_counted(self, dataset: FrameDataset, keys: list[str]) -> None:
        def make() -> FrameLoader:
            sampler: Any = DistributedSampler(dataset, num_replicas=2, rank=1, seed=4)
            return FrameLoader(dataset, 4, sampler=sampler)

        whole = []
        loader = make()
        for epoch in range(2):
            loader.set_epoch(epoch)
            whole.append(keys_of(loader))
        assert whole[0] != whole[1]
        loader = make()
        loader.set_epoch(1)
        got = keys_of(islice(loader, 3))
        state = loader.state_dict()
        assert state == {"epoch": 1, "taken": 12}
        again = make()
        again.load_state_dict(state)
        assert again.state_dict() == state
        assert got + keys_of(again) == whole[1]
        assert again.state_dict() == {"epoch": 2, "taken": 0}
        with pytest.raises(ConfigError):
            again.load_state_dict(FrameLoader(dataset).state_dict())
        with pytest.raises(ConfigError):
            FrameLoader(dataset).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 2])
class TestStatefulDataLoader:
    """torchdata's loader keeps the sampler's state itself, at the batch the loop has got."""

    def make(self, dataset: FrameDataset, workers: int, **options: Any) -> StatefulDataLoader[Any]:
        sampler = ResumableSampler(dataset, seed=6, **options.pop("sampler", {}))
        method = "fork" if workers else None
        return StatefulDataLoader(
            dataset, 5, sampler=sampler, num_workers=workers, multiprocessing_context=method, **options
        )

    @pytest.mark.parametrize("stop", [0, 1, 6, 12, 13])
    def test_stopped_and_resumed(self, dataset: FrameDataset, keys: list[str], workers: int, stop: int) -> None:
        loader = self.make(dataset, workers)
        got = keys_of(islice(loader, stop))
        state = pickle.loads(pickle.dumps(loader.state_dict()))
        again = self.make(dataset, workers)
        again.load_state_dict(state)
        assert got + keys_of(again) == of_rows(keys, order(0, seed=6))
        for epoch in (1, 2):
            assert keys_of(again) == of_rows(keys, order(epoch, seed=6))

    def test_after_a_whole_epoch_comes_the_next(self, dataset: FrameDataset, keys: list[str], workers: int) -> None:
        for persistent in sorted({False, workers > 0}):
            loader = self.make(dataset, workers, persistent_workers=persistent)
            for epoch in range(2):
                assert keys_of(loader) == of_rows(keys, order(epoch, seed=6))
            state = loader.state_dict()
            again = self.make(dataset, workers, persistent_workers=persistent)
            again.load_state_dict(state)
            for epoch in (2, 3):
                assert keys_of(again) == of_rows(keys, order(epoch, seed=6))

    def test_trainers_that_set_the_epoch(self, dataset: FrameDataset, keys: list[str], workers: int) -> None:
        loader = self.make(dataset, workers)
        assert isinstance(loader.sampler, ResumableSampler)
        loader.sampler.set_epoch(3)
        got = keys_of(islice(loader, 4))
        again = self.make(dataset, workers)
        again.load_state_dict(loader.state_dict())
        assert isinstance(again.sampler, ResumableSampler)
        again.sampler.set_epoch(3)
        assert got + keys_of(again) == of_rows(keys, order(3, seed=6))
        again.sampler.set_epoch(4)
        assert keys_of(again) == of_rows(keys, order(4, seed=6))

    def test_another_world(self, dataset: FrameDataset, keys: list[str], workers: int) -> None:
        loader = self.make(dataset, workers)
        got = keys_of(islice(loader, 3))
        for rank in range(2):
            part = self.make(dataset, workers, sampler={"num_replicas": 2, "rank": rank})
            part.load_state_dict(loader.state_dict())
            got += keys_of(part)
        assert Counter(got) == Counter(keys)

    def test_resumed_twice(self, dataset: FrameDataset, keys: list[str], workers: int) -> None:
        got, state = [], None
        for batches in (2, 3, 100):
            loader = self.make(dataset, workers)
            if state is not None:
                loader.load_state_dict(state)
            got += keys_of(islice(loader, batches))
            state = loader.state_dict()
        assert got == of_rows(keys, order(0, seed=6))


class TestAugmentation:
    def run(self, loader: Any, epochs: int = 2) -> list[dict[str, torch.Tensor]]:
        return [
            {key: image for batch in loader for key, image in zip(batch["key"], batch["image"], strict=True)}
            for _ in range(epochs)
        ]

    def assert_same(self, one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> None:
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)

    @pytest.mark.parametrize("transform", [jitter, global_jitter])
    @pytest.mark.parametrize("method", [None, *METHODS])
    def test_it_is_of_seed_epoch_and_sample_alone(
        self, store: DataStore, index: DatasetIndex, transform: Any, method: str | None
    ) -> None:
        dataset = FrameDataset(store, index, transform=transform, seed=1)
        expected = self.run(FrameLoader(dataset, 8, shuffle=True, seed=5))
        for key, image in expected[0].items():
            assert not torch.equal(image, expected[1][key])
        assert len({float(image[0, 0, 0]) % 1 for image in expected[0].values()}) > COUNT // 2
        torch.manual_seed(random.randrange(1000))
        other = FrameDataset(store, index, transform=transform, seed=1)
        options: dict[str, Any] = {} if method is None else {"num_workers": 2, "multiprocessing_context": method}
        loader = DataLoader(
            other, 5, sampler=ResumableSampler(other, seed=9), persistent_workers=method is not None, **options
        )
        self.assert_same(self.run(loader), expected)
        changed = FrameDataset(store, index, transform=transform, seed=2)
        (first,) = self.run(FrameLoader(changed, 8), 1)
        assert not any(torch.equal(image, expected[0][key]) for key, image in first.items())

    def test_the_rng_is_that_of_the_sample_seed(self, store: DataStore, index: DatasetIndex) -> None:
        dataset = FrameDataset(store, index, transform=jitter, seed=7)
        dataset.set_epoch(3)
        item, plain = dataset[11], FrameDataset(store, index)[11]
        drawn = np.random.default_rng(sample_seed(7, 3, plain["key"])).random()
        assert torch.equal(item["image"], plain["image"] + float(drawn))
        assert sample_seed(0, 1, "a/b/1") == 4052358274690877305  # states of runs depend on it

    def test_set_epoch_reaches_persistent_workers(self, store: DataStore, index: DatasetIndex) -> None:
        for method in METHODS:
            dataset = FrameDataset(store, index, transform=jitter)
            loader = DataLoader(dataset, 9, num_workers=2, multiprocessing_context=method, persistent_workers=True)
            seen = []
            for epoch in (5, 0, 5):
                dataset.set_epoch(epoch)
                seen += self.run(loader, 1)
            self.assert_same(seen[:1], seen[2:])
            assert not any(torch.equal(seen[0][key], seen[1][key]) for key in seen[0])
            self.assert_same(seen[1:2], self.run(FrameLoader(dataset, 9), 1))

    def test_a_resumed_run_is_the_run(self, store: DataStore, index: DatasetIndex) -> None:
        def make() -> FrameLoader:
            return FrameLoader(FrameDataset(store, index, transform=global_jitter), 8, shuffle=True)

        whole = [[batch["image"] for batch in loader] for loader in [make()] for _ in range(3)]
        loader = make()
        next(iter(loader))
        list(islice(loader, 3))  # of epoch 1
        state = loader.state_dict()
        again = make()
        again.load_state_dict(state)
        for rest, expected in ((list(again), whole[1][3:]), (list(again), whole[2])):
            assert all(torch.equal(batch["image"], image) for batch, image in zip(rest, expected, strict=True))

    def test_two_epochs_at_a_time(self, store: DataStore, index: DatasetIndex) -> None:
        """Items belong to the epoch they were asked for in, however far another loop has got."""
        dataset = FrameDataset(store, index, transform=jitter)
        expected = self.run(FrameLoader(dataset, 8))
        loader = FrameLoader(dataset, 8)
        pairs = list(zip(loader, loader, strict=True))
        found = [self.run([pair[number] for pair in pairs], 1)[0] for number in (0, 1)]
        self.assert_same(found, expected)

    def test_the_callers_generators_are_left_alone(self, store: DataStore, index: DatasetIndex) -> None:
        def draw() -> list[float]:
            return [float(torch.rand(())), float(np.random.rand()), random.random()]

        def seed() -> None:
            torch.manual_seed(1)
            np.random.seed(1)
            random.seed(1)

        seed()
        expected = [draw(), draw()]
        seed()
        first = draw()
        dataset = FrameDataset(store, index, transform=global_jitter)
        assert dataset[0]["draws"].tolist() == dataset[0]["draws"].tolist()
        assert [first, draw()] == expected

        def broken(item: dict[str, Any]) -> dict[str, Any]:
            raise ZeroDivisionError

        seed()
        first = draw()
        with pytest.raises(ZeroDivisionError):
            FrameDataset(store, index, transform=broken)[0]
        assert [first, draw()] == expected

    def test_without_a_seed_randomness_is_the_callers(self, store: DataStore, index: DatasetIndex) -> None:
        dataset = FrameDataset(store, index, transform=global_jitter, seed=None)
        torch.manual_seed(1)
        expected = float(torch.rand(()))
        torch.manual_seed(1)
        assert float(dataset[0]["draws"][0]) == expected
        for transform, seed in ((jitter, None), (double, -1)):
            with pytest.raises(ConfigError, match="seed"):
                FrameDataset(store, index, transform=transform, seed=seed)

    def test_modules_get_rng_too(self, store: DataStore, index: DatasetIndex) -> None:
        class Module(torch.nn.Module):
            def forward(self, item: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
                return jitter(item, rng)

        one, other = (FrameDataset(store, index, transform=transform) for transform in (Module(), jitter))
        assert torch.equal(one[3]["image"], other[3]["image"])

    def test_selections_and_copies_count_for_themselves(self, store: DataStore, index: DatasetIndex) -> None:
        dataset = FrameDataset(store, index, transform=jitter)
        dataset.set_epoch(2)
        part, copied = dataset[5:9], pickle.loads(pickle.dumps(dataset))
        for other, row in ((part, 0), (copied, 5)):
            assert torch.equal(other[row]["image"], dataset[5]["image"])
            before = dataset[5]["image"]
            other.set_epoch(3)
            assert torch.equal(dataset[5]["image"], before)
            assert not torch.equal(other[row]["image"], before)
        copied.store.close()

    def test_an_epoch_that_stands_still_is_told_once(
        self, store: DataStore, index: DatasetIndex, caplog: pytest.LogCaptureFixture
    ) -> None:
        def warnings(dataset: FrameDataset, loader: Any) -> int:
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                self.run(loader, 6)
            return sum("repeat" in record.message for record in caplog.records)

        for transform, told in ((jitter, 1), (global_jitter, 1), (double, 0)):
            dataset = FrameDataset(store, index, transform=transform)
            assert warnings(dataset, DataLoader(dataset, 9)) == told
            for loader in (
                DataLoader(dataset, 9, sampler=ResumableSampler(dataset)),
                FrameLoader(dataset, 9),
                FrameLoader(dataset, 9, sampler=range(COUNT)),
            ):
                assert warnings(dataset, loader) == 0


class TestAsTrainersDo:
    """What Lightning does with a loader, replayed: it replaces samplers, sets epochs, saves stateful loaders."""

    def prepared(self, loader: Any, world: int, rank: int) -> Any:
        """Its sampler for several ranks: every one but a DistributedSampler is replaced or wrapped."""
        if not isinstance(loader, DataLoader) or isinstance(loader.sampler, DistributedSampler):
            return loader
        assert isinstance(loader.sampler, RandomSampler | SequentialSampler), "would be sharded a second time"
        return DataLoader(
            loader.dataset, loader.batch_size, sampler=DistributedSampler(loader.dataset, world, rank, seed=0)
        )

    def set_epoch(self, loader: Any, epoch: int) -> None:
        samplers = [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
        for sampler in {id(sampler): sampler for sampler in samplers}.values():
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(epoch)

    def make(self, kind: str, dataset: FrameDataset, rank: int) -> Any:
        sampler = ResumableSampler(dataset, num_replicas=2, rank=rank, pad=False)
        if kind == "FrameLoader":
            return FrameLoader(dataset, 4, sampler=sampler)
        return StatefulDataLoader(dataset, 4, sampler=sampler)

    @pytest.mark.parametrize("kind", ["FrameLoader", "StatefulDataLoader"])
    def test_fit_interrupted_and_resumed(self, dataset: FrameDataset, keys: list[str], kind: str) -> None:
        got: list[str] = []
        states = []
        for rank in range(2):
            loader = self.prepared(self.make(kind, dataset, rank), 2, rank)
            self.set_epoch(loader, 0)
            self.set_epoch(loader, 0)
            assert len(loader) == 8
            got += keys_of(islice(loader, 3))
            assert hasattr(loader, "state_dict")
            states.append(loader.state_dict())
        for rank in range(2):
            loader = self.prepared(self.make(kind, dataset, rank), 2, rank)
            loader.load_state_dict(states[0])
            self.set_epoch(loader, 0)
            got += keys_of(loader)
            self.set_epoch(loader, 1)
            got += keys_of(loader)
        assert Counter(got) == Counter(dict.fromkeys(keys, 2))

    def test_a_default_loader_is_sharded_by_the_trainer(self, dataset: FrameDataset, keys: list[str]) -> None:
        shares = [self.prepared(DataLoader(dataset, 4, shuffle=True), 3, rank) for rank in range(3)]
        assert Counter(chain.from_iterable(keys_of(share) for share in shares)) == Counter(keys)


SCRIPT = '''
"""Trains for some batches from a state on, as torchrun starts it; rank 0 writes what all ranks got, and the state."""
import json, os, sys
from pathlib import Path

import torch.distributed as dist
from torch.utils.data import DataLoader

import ahi_ml as ahi

folder, cache, index, state_file, out, workers, batches = sys.argv[1:]
if __name__ == "__main__":
    with ahi.connect(folder, cache=cache) as store:
        dataset = ahi.FrameDataset(store, ahi.DatasetIndex.load(index))
        sampler = ahi.ResumableSampler(dataset, seed=8, pad=False)  # before the process group is there
        dist.init_process_group("gloo")
        del os.environ["RANK"]  # not every launcher sets it; the process group knows
        if Path(state_file).exists():
            sampler.load_state_dict(json.loads(Path(state_file).read_text()))
        loader = DataLoader(dataset, 3, sampler=sampler, num_workers=int(workers))
        got, left = [], int(batches)
        while left:
            for number, batch in enumerate(loader, 1):
                got.append((sampler.epoch, batch["key"]))
                state = sampler.state_dict(taken=3 * number)
                left -= 1
                if not left:
                    break
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, got)
        if dist.get_rank() == 0:
            Path(state_file).write_text(json.dumps(state))
            Path(out).write_text(json.dumps(everyone))
        dist.barrier()
        dist.destroy_process_group()
'''


def test_torchrun(store: DataStore, store_folder: Path, index: DatasetIndex, keys: list[str], tmp_path: Path) -> None:
    """Two processes stop within an epoch, one goes on into the next, two finish that."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    saved = index[:].save(tmp_path / "index.arrow")

    def run(processes: int, batches: int, workers: int) -> list[list[tuple[int, list[str]]]]:
        out = tmp_path / "out.json"
        arguments = [store_folder, tmp_path / "cache", saved, tmp_path / "state.json", out, workers, batches]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, script]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [str(each) for each in (*command, *arguments)], env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[:6000]
        return json.loads(out.read_text())  # type: ignore[no-any-return]

    def flat(everyone: list[list[tuple[int, list[str]]]]) -> list[tuple[int, str]]:
        return [(epoch, key) for got in everyone for epoch, part in got for key in part]

    first = run(2, 4, 2)
    assert [len(got) for got in first] == [4, 4]
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["epoch"], state["consumed"]) == (0, 24)
    assert {key for _, key in flat(first)} == set(of_rows(keys, order(0, seed=8)[:24]))
    second = run(1, 13 + 5, 1)
    assert len(second) == 1
    assert [key for _, key in flat(second)] == of_rows(keys, order(0, seed=8)[24:] + order(1, seed=8)[:15])
    third = run(2, 8, 0)
    assert Counter(flat(first) + flat(second) + flat(third)) == Counter(
        (epoch, key) for epoch in (0, 1) for key in keys
    )


class InstantReader:
    """A reader whose frames are there at once."""

    threads = 1

    def submit(self, sources: Any, options: Any, *, outs: Any = None, **caches: Any) -> Batch:
        for source, out in zip(sources, outs, strict=True):
            out[...] = source.checksum
        batch = Batch(sources, options, outs)
        batch.finish_many(list(enumerate(outs)))
        return batch

    def requests(self) -> dict[str, float]:
        return {}

    def share_cores(self, processes: int) -> None:
        pass


class CheapStore:
    cache = None
    reader = InstantReader()


def synthetic_index(frames: int, each: int = 200) -> DatasetIndex:
    """An index of image sets of `each` frames, without their images."""

    def table(schema: pa.Schema, rows: int, **columns: Any) -> pa.Table:
        made = [
            pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(rows, field.type)
            for field in schema
        ]
        return pa.Table.from_arrays(made, schema=schema)

    count = -(-frames // each)
    numbers = np.arange(frames)
    uids = [f"1.2.{number}" for number in range(count)]
    series = table(
        SERIES,
        count,
        image_set_id=[f"{number:032x}" for number in range(count)],
        version_id=["1"] * count,
        is_primary=[True] * count,
        study_instance_uid=uids,
        series_instance_uid=uids,
    )
    instances = table(INSTANCES, frames, series=numbers // each, sop_instance_uid=[f"1.2.3.{n}" for n in range(frames)])
    profile = {"Rows": 2, "Columns": 2, "SamplesPerPixel": 1, "BitsAllocated": 16, "BitsStored": 16}
    profiles = table(PROFILES, 1, **{name: [value] for name, value in profile.items()}, PixelRepresentation=[0])
    planes = table(PLANES, frames, x=np.zeros(frames), y=np.zeros(frames), z=numbers.astype(float))
    ids = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), frames, [None, pa.py_buffer(np.random.default_rng(0).bytes(16 * frames))]
    )
    made = table(
        FRAMES.remove(0),
        frames,
        instance=numbers,
        frame_number=np.ones(frames),
        profile=np.zeros(frames),
        plane=numbers,
        checksum=numbers,
    ).add_column(0, FRAMES.field(0), ids)
    return DatasetIndex(Tables(series, instances, profiles, planes, made))


def memory_over_epochs(shuffle: Any, folder: Path) -> tuple[list[list[int]], list[int]]:
    """Private memory of two persistent workers after each of five epochs over 200,000 rows, and of this process."""
    index = DatasetIndex.load(synthetic_index(200_000).save(folder / "index.arrow"))
    store: Any = CheapStore()
    dataset = FrameDataset(store, index, cache=None, output="stored")
    loader = DataLoader(
        dataset,
        500,
        sampler=ResumableSampler(dataset, shuffle=shuffle),
        num_workers=2,
        multiprocessing_context="fork",
        persistent_workers=True,
        collate_fn=total,
    )
    used, here = [], []
    for _ in range(5):
        assert sum(loader) == 199_999 * 200_000 // 2
        workers = [child.pid for child in multiprocessing.active_children()]
        assert len(workers) == 2
        used.append([psutil.Process(pid).memory_full_info().uss for pid in workers])
        here.append(psutil.Process().memory_info().rss)  # what of it is shared with workers changes
    return used, here


@pytest.mark.skipif(sys.platform != "linux", reason="private memory is measured on Linux")
@pytest.mark.parametrize("shuffle", ["global", "block"])
def test_memory_of_workers_is_flat(shuffle: Any, tmp_path: Path) -> None:
    """After the first epoch, workers keep nothing.

    In a process of its own: forked workers allocate in the holes of the heap they inherit, and each page of it that
    they touch is theirs from then on. What other tests have left behind here is no matter of this one.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        used, here = pool.submit(memory_over_epochs, shuffle, tmp_path).result()
    # A full collection in the third epoch touches, once, what the parent has loaded; nothing grows after it.
    assert (np.array(used[-1]) - used[0]).max() < 4 * 2**20, used
    assert (np.array(used[-1]) - used[2]).max() < 2**19, used
    assert here[-1] - here[0] < 4 * 2**20, here


BATCHES_MADE = count()


def total(items: list[dict[str, Any]]) -> int:
    if next(BATCHES_MADE) == 500:  # in the third epoch of each worker
        gc.collect()
    return sum(int(item["image"][0, 0, 0]) for item in items)
