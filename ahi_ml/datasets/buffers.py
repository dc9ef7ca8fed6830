"""Memory that batches are decoded into, used again: page faults cost as much as decoding's rest. Floor 6."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np
import torch

from ahi_ml.types import AnyArray

__all__ = ["BufferPool"]

_WORTH = 1 << 20  # bytes: smaller arrays the allocator gives again without new pages


class BufferPool:
    """Batch buffers, used again once no tensor refers to them. Threads may share it.

    Parameters
    ----------
    most : int
        How many are kept for later.
    """

    def __init__(self, most: int) -> None:
        self._free: deque[AnyArray] = deque(maxlen=most)  # of shapes that no longer come, the oldest go first

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> AnyArray:
        """An array of this form, recycled when there is one."""
        others: deque[AnyArray] = deque()
        found = None
        # Without a lock: a batch may come back, by a finalizer, at any step of this very thread. What was used last may
        # still be in the processor's cache.
        while found is None and self._free:
            try:
                array = self._free.pop()
            except IndexError:  # another thread has it
                break
            if array.shape == shape and array.dtype == dtype:
                found = array
            else:
                others.appendleft(array)
        self._free.extend(others)
        return np.empty(shape, dtype) if found is None else found

    def lend(self, array: AnyArray) -> torch.Tensor:
        """The array as a tensor; it comes back when the last tensor over it is gone."""
        if array.nbytes < _WORTH:
            return torch.from_numpy(array)
        view = array.view()  # torch keeps this very object alive through every slice of the tensor
        tensor = torch.from_numpy(view)
        weakref.finalize(view, self._give_back, array)
        return tensor

    def _give_back(self, array: AnyArray) -> None:
        self._free.append(array)
