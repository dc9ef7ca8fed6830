"""Batch buffers that are used again, by one thread or by many."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ahi_ml.datasets import buffers
from ahi_ml.datasets.buffers import BufferPool

DTYPE = np.dtype(np.int16)


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_WORTH", 0)


@pytest.fixture
def many_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_what_came_back_is_taken_again_by_its_form() -> None:
    pool = BufferPool(3)
    arrays = [pool.take((2, size), DTYPE) for size in (3, 4, 5)]
    addresses = [array.ctypes.data for array in arrays]
    for array in arrays:
        pool.lend(array)
    assert pool.take((2, 4), DTYPE).ctypes.data == addresses[1]
    assert pool.take((2, 4), DTYPE).ctypes.data not in addresses
    assert pool.take((2, 3), np.dtype(np.int8)).ctypes.data not in addresses
    assert [array.shape for array in pool._free] == [(2, 3), (2, 5)], "in their order"


def test_the_oldest_go() -> None:
    pool = BufferPool(2)
    for size in (3, 4, 5):
        pool.lend(pool.take((2, size), DTYPE))
    assert [array.shape for array in pool._free] == [(2, 4), (2, 5)]


def test_threads_never_share_one(many_switches: None) -> None:
    pool = BufferPool(4)

    def work(number: int) -> bool:
        for turn in range(1500):
            array = pool.take((8, 1 + turn % 3), DTYPE)
            array[:] = number
            tensor = pool.lend(array)
            if not (tensor == number).all():
                return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))
    assert len(pool._free) <= 4
