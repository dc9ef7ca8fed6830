"""Batches of DataLoader workers: in memory that is used again, and always what torch's own copies would be."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_datasets import assert_same, write_ct
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from ahi_ml.datasets import FrameDataset
from ahi_ml.index import DatasetIndex
from ahi_ml.store import DataStore, connect

FRAMES, SIZE = 44, 4
SEGMENTS = 8  # as many as a worker keeps

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is Linux's")


@pytest.fixture(scope="module")
def store(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataStore]:
    files = tmp_path_factory.mktemp("dicom")
    write_ct(files, "large", FRAMES, 1, (512, 514))  # a batch of two is worth a segment
    with connect(store_folder, cache=tmp_path_factory.mktemp("cache")) as made:
        made.progress = False
        made.import_dicom(files)
        yield made


@pytest.fixture(scope="module")
def index(store: DataStore) -> DatasetIndex:
    return store.search().index()


@pytest.fixture(scope="module")
def dataset(store: DataStore, index: DatasetIndex) -> FrameDataset:
    return FrameDataset(store, index)


@pytest.fixture(scope="module")
def expected(dataset: FrameDataset) -> list[dict[str, Any]]:
    singles = [dataset[row] for row in range(FRAMES)]
    return [default_collate(singles[start : start + SIZE]) for start in range(0, FRAMES, SIZE)]


def by_workers(dataset: Dataset[Any], workers: int = 1, method: str = "fork", **options: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset, SIZE, num_workers=workers, multiprocessing_context=method, persistent_workers=True, **options
    )


def segments() -> int:
    """How many the worker with the most has made and still has."""
    counts = [0]
    for child in multiprocessing.active_children():
        descriptors = [f"/proc/{child.pid}/fd/{name}" for name in os.listdir(f"/proc/{child.pid}/fd")]
        own = [each for each in descriptors if f"ahi-ml-batch-{child.pid} " in os.readlink(each)]
        counts.append(len({os.stat(each).st_ino for each in own}))
    return max(counts)


def copied(batch: dict[str, Any]) -> bool:
    """Whether it came in memory of torch's."""
    return bool(batch["image"].is_shared())


@pytest.mark.parametrize(("workers", "method"), [(1, "fork"), (2, "fork"), (2, "spawn"), (1, "forkserver")])
def test_they_are_what_items_are(
    dataset: FrameDataset, expected: list[dict[str, Any]], workers: int, method: str
) -> None:
    loader = by_workers(dataset, workers, method)
    for _ in range(3):
        for batch, other in zip(loader, expected, strict=True):
            assert_same([batch], [other])
            assert type(batch["image"]) is torch.Tensor
            assert not copied(batch)
            assert batch["image"].is_contiguous()
            batch["image"].fill_(-7)  # the consumer's to change
            del batch


def test_memory_is_used_again(dataset: FrameDataset) -> None:
    loader = by_workers(dataset)
    counts = []
    for _ in range(3):
        for batch in loader:
            del batch
        counts.append(segments())
    assert 0 < max(counts) <= 5, counts


@pytest.mark.parametrize(
    "part",
    [
        lambda batch: batch["image"],
        lambda batch: batch["image"][1:, :, 5:9],
        lambda batch: batch["image"][0].numpy(),
        lambda batch: batch["image"].numpy()[:, 0, ::2],
        lambda batch: batch["image"].detach().view(torch.int32),
        lambda batch: memoryview(batch["image"].numpy()),
        lambda batch: list(batch["image"]),
    ],
    ids=["batch", "slice", "numpy", "strided numpy", "reinterpreted", "buffer", "rows"],
)
def test_what_is_kept_stays(dataset: FrameDataset, expected: list[dict[str, Any]], part: Callable[[Any], Any]) -> None:
    """More than a worker has segments for."""
    loader = by_workers(dataset)
    kept = []
    for _ in range(2):
        for batch in loader:
            kept.append(part(batch))
            del batch
            gc.collect(0)
    assert segments() == SEGMENTS
    for value, other in zip(kept, [part(batch) for batch in expected] * 2, strict=True):
        np.testing.assert_array_equal(np.asarray(value), np.asarray(other))


def test_a_loop_that_ends_early_does_no_harm(dataset: FrameDataset, expected: list[dict[str, Any]]) -> None:
    loader = by_workers(dataset, 2)
    for _ in range(6):
        for batch in loader:
            assert_same([batch], expected[:1])
            break
    assert_same(list(loader), expected)


def test_pinning_is_a_copy_like_any_other(dataset: FrameDataset, expected: list[dict[str, Any]]) -> None:
    first, second = (list(by_workers(dataset, pin_memory=torch.cuda.is_available())) for _ in range(2))
    assert_same(first, expected)
    assert_same(second, expected)


class Remembering:
    """A transform that keeps the image before, and tells its sum when it has had time to change."""

    def __init__(self) -> None:
        self.before: list[torch.Tensor] = []

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        sums = [float(image.sum(dtype=torch.float64)) for image in self.before]
        self.before.append(item["image"])
        return {**item, "before": sums[0] if sums else 0.0}


def test_what_a_worker_keeps_the_consumer_does_not_change(store: DataStore, index: DatasetIndex) -> None:
    loader = by_workers(FrameDataset(store, index, transform=Remembering(), seed=None))
    first = float(FrameDataset(store, index)[0]["image"].sum(dtype=torch.float64))
    for number, batch in enumerate([batch for _ in range(2) for batch in change_each(loader)]):
        assert batch["before"].tolist()[1:] == [first] * 3, number


def change_each(loader: Any) -> Iterator[dict[str, Any]]:
    for batch in loader:
        batch["image"].fill_(0)
        yield batch


def as_list(items: list[dict[str, Any]]) -> Any:
    return items


def corners(items: list[dict[str, Any]]) -> Any:
    return [item["image"][0, :9, :9] for item in items]


def halved(items: list[dict[str, Any]]) -> Any:
    batch = default_collate(items)
    return {**batch, "image": batch["image"].half()}


def twice(items: list[dict[str, Any]]) -> Any:
    return [default_collate(items)["image"], default_collate(items)["image"]]


def reversed_(items: list[dict[str, Any]]) -> Any:
    return default_collate(items[::-1])


def without_the_first(items: list[dict[str, Any]]) -> Any:
    return default_collate(items[1:])


def without_the_last(items: list[dict[str, Any]]) -> Any:
    return default_collate(items[:-1])


def changed_in_place(items: list[dict[str, Any]]) -> Any:
    for item in items:
        item["image"].add_(1)
    batch = default_collate(items)
    batch["image"].mul_(2)
    return batch


def part_first(items: list[dict[str, Any]]) -> Any:
    batch = default_collate(items)["image"]
    return {"part": batch[0], "whole": batch}


def item_first(items: list[dict[str, Any]]) -> Any:
    return {"item": items[0]["image"], "whole": default_collate(items)["image"]}


def flattened(items: list[dict[str, Any]]) -> Any:
    for item in items:
        item["image"].squeeze_(0)
    return default_collate(items)["image"]


def with_copies(items: list[dict[str, Any]]) -> Any:
    import copy
    import pickle

    batch = default_collate(items)["image"]
    return [copy.deepcopy(batch), copy.copy(items[1]["image"]), pickle.loads(pickle.dumps(batch)), batch]


@pytest.mark.parametrize(
    "collate",
    [
        as_list,
        corners,
        halved,
        twice,
        reversed_,
        without_the_first,
        without_the_last,
        changed_in_place,
        part_first,
        item_first,
        flattened,
        with_copies,
    ],
)
def test_any_collate(dataset: FrameDataset, collate: Callable[[list[dict[str, Any]]], Any]) -> None:
    """What a collate function gives, kept over two epochs, is what it gives here."""
    here = list(DataLoader(dataset, SIZE, collate_fn=collate))
    loader = by_workers(dataset, collate_fn=collate)
    there = [batch for _ in range(2) for batch in loader]
    assert_equal(there, here * 2)
    assert all(type(tensor) is torch.Tensor for tensor in tensors(there))


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors(each)


def assert_equal(some: Any, other: Any) -> None:
    for one, two in zip(tensors(some), tensors(other), strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


class Doubled(Dataset[Any]):
    """A data set of somebody's that asks for items one by one."""

    def __init__(self, inner: FrameDataset) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.as_tensor(self.inner[row]["image"] * 2)


def test_data_sets_around_it(dataset: FrameDataset, expected: list[dict[str, Any]]) -> None:
    doubled = list(by_workers(Doubled(dataset)))
    assert segments() == 0
    assert_equal(doubled, [batch["image"] * 2 for batch in expected])
    part = by_workers(Subset(dataset, range(4, 16)))
    assert_same(list(part), expected[1:4])
    assert not any(map(copied, part))


def test_results_that_differ_in_form(store: DataStore, index: DatasetIndex, expected: Sequence[dict[str, Any]]) -> None:
    """Segments that are too small make room; smaller batches lie in larger segments."""
    sizes = [2, 4, 3, 6, 2, 8, 3, 8, 8]
    ends = np.cumsum(sizes)
    batches = [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
    dataset = FrameDataset(store, index)
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=1, multiprocessing_context="fork", persistent_workers=True
    )
    images = torch.cat([batch["image"] for batch in expected])
    for _ in range(4):
        for rows, batch in zip(batches, loader, strict=True):
            assert torch.equal(batch["image"], images[rows])
    assert segments() <= SEGMENTS


def test_a_process_that_was_forked_keeps_what_it_has(dataset: FrameDataset, expected: list[dict[str, Any]]) -> None:
    fork = multiprocessing.get_context("fork")
    ask, (answer, say) = fork.Event(), fork.Pipe(duplex=False)

    def look(image: torch.Tensor) -> None:
        ask.wait(60)
        # Not by torch: its threads are not there in a forked process, and it would wait for them.
        say.send(np.array_equal(image.numpy(), expected[0]["image"].numpy()))

    loader = by_workers(dataset)
    batches = iter(loader)
    batch = next(batches)
    process = fork.Process(target=look, args=(batch["image"],))
    process.start()
    process._args = ()  # type: ignore[attr-defined]  # of this process: it lets go of the batch, the other does not
    del batch
    for _ in range(2):
        for _ in batches:
            pass
        batches = iter(loader)
    ask.set()
    assert answer.poll(60)
    assert answer.recv()
    process.join(60)
    assert process.exitcode == 0
