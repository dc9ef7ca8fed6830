"""Segments: when the memory of a batch itself is handed over, and when a copy."""

from __future__ import annotations

import copy
import gc
import os
import sys
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from ahi_ml.datasets import segments
from ahi_ml.datasets.buffers import BufferPool
from ahi_ml.datasets.segments import SegmentPool

SHAPE = (3, 1, 600, 600)
FLOAT = np.dtype(np.float32)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory without a name is Linux's")


@pytest.fixture
def pool() -> Iterator[SegmentPool]:
    yield SegmentPool(BufferPool(2))
    del default_collate_fn_map[segments._Row]  # this process is no worker


def rows_of(pool: SegmentPool, value: float = 1.0) -> list[torch.Tensor]:
    array = pool.take(SHAPE, FLOAT)
    array[:] = np.arange(value, value + 3)[:, None, None, None]
    return list(pool.lend(array))


def made(pool: SegmentPool) -> int:
    return len(pool._segments)


def goes(batch: Any) -> bool:
    """Whether the memory of a batch itself would be handed over."""
    return bool(batch.lease.can_go(batch.as_subclass(torch.Tensor)))


def test_items_that_lie_in_a_batch_are_it(pool: SegmentPool) -> None:
    rows = rows_of(pool)
    place = rows[0].data_ptr()
    batch = default_collate(rows)
    assert batch.data_ptr() == place
    assert torch.equal(batch, torch.stack(rows))
    del rows
    assert goes(batch)


def test_a_second_batch_of_the_same_items_is_another(pool: SegmentPool) -> None:
    rows = rows_of(pool)
    first, second = default_collate(rows), default_collate(rows)
    first.zero_()
    assert second[:, 0, 0, 0].tolist() == [1, 2, 3]


def test_items_of_two_batches(pool: SegmentPool) -> None:
    one, other = rows_of(pool, 1), rows_of(pool, 11)
    mixed = default_collate([one[0], other[1], one[2]])
    assert mixed[:, 0, 0, 0].tolist() == [1, 12, 3]
    assert type(mixed) is torch.Tensor


@pytest.mark.parametrize(
    "keep",
    [
        lambda rows: rows[1],
        lambda rows: rows[1][0, 3],
        lambda rows: rows[2].numpy(),
        lambda rows: rows[2].numpy()[0, ::2],
        lambda rows: rows[0].detach(),
        lambda rows: memoryview(rows[0].numpy()),
    ],
    ids=["item", "part", "array", "part of an array", "detached", "buffer"],
)
def test_while_something_of_an_item_lives_a_copy_goes(pool: SegmentPool, keep: Any) -> None:
    rows = rows_of(pool)
    batch = default_collate(rows)
    kept = keep(rows)
    del rows
    assert not goes(batch)
    del kept
    assert goes(batch)


def test_what_torch_has_moved_goes_its_way(pool: SegmentPool) -> None:
    """A part of it travels first: torch puts all the memory elsewhere, and the segment may be used again."""
    batch = default_collate(rows_of(pool))
    assert goes(batch)
    ForkingPickler.dumps(batch[0])
    assert not goes(batch)


def test_a_batch_goes_once(pool: SegmentPool) -> None:
    batch = default_collate(rows_of(pool))
    assert segments._hand_over(batch)[0] is segments._receive
    assert segments._hand_over(batch)[0] is not segments._receive


def test_it_is_used_again_when_both_sides_are_done(pool: SegmentPool) -> None:
    batch = default_collate(rows_of(pool))
    place = batch.data_ptr()
    receive, arguments = segments._hand_over(batch)
    del batch
    assert rows_of(pool)[0].data_ptr() != place  # the consumer has not even got it
    received = receive(*arguments)
    part = received[1, 0, :5].numpy()
    del received
    assert rows_of(pool)[0].data_ptr() != place
    assert part[:, 0].tolist() == [2] * 5
    del part
    assert rows_of(pool)[0].data_ptr() == place
    assert made(pool) == 2


def test_items_in_use_keep_their_segment(pool: SegmentPool) -> None:
    held = [rows_of(pool)[2] for _ in range(3)]
    assert made(pool) == 3
    del held
    rows_of(pool)
    assert made(pool) == 3


def test_an_array_that_was_taken_in_vain_comes_back(pool: SegmentPool) -> None:
    view = pool.take(SHAPE, FLOAT)[1]  # as one whose frames are still being decoded
    other = pool.take(SHAPE, FLOAT)
    assert not np.may_share_memory(view, other)
    del view, other
    gc.collect()
    pool.take(SHAPE, FLOAT)
    assert made(pool) == 2


@pytest.mark.parametrize("shape", [(1, 1, 2000, 2000), (4, 1, 30, 30)], ids=["a single item", "small"])
def test_what_is_not_worth_it(pool: SegmentPool, shape: tuple[int, ...]) -> None:
    (first, *_) = pool.lend(pool.take(shape, FLOAT))
    assert type(first) is torch.Tensor
    assert made(pool) == 0


def test_what_is_made_of_items_is_ordinary(pool: SegmentPool) -> None:
    (row, *_) = rows_of(pool)
    for tensor in (row + 1, row[0], row.half(), torch.stack([row]), copy.copy(row), copy.deepcopy(row), row.clone()):
        assert type(tensor) is torch.Tensor
    copied = copy.deepcopy(row)
    row.zero_()
    assert copied.max() == 1


def test_as_many_as_are_kept(pool: SegmentPool) -> None:
    held = [rows_of(pool) for _ in range(segments._MOST + 3)]
    assert made(pool) == segments._MOST
    assert type(held[-1][0]) is torch.Tensor
    del held
    (large, *_) = pool.lend(pool.take((9, *SHAPE[1:]), FLOAT))  # one that is too small makes room
    assert type(large) is segments._Row
    assert made(pool) == segments._MOST


def test_what_a_forked_process_may_have_is_not_used_again(pool: SegmentPool) -> None:
    batch = default_collate(rows_of(pool))
    receive, arguments = segments._hand_over(batch)
    del batch
    (shared,) = pool._segments
    received = receive(*arguments)
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    del received
    rows_of(pool)
    assert made(pool) == 1
    assert shared not in pool._segments
