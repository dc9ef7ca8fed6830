"""Batches of DataLoader workers in shared memory that is used again, and found there by the consumer uncopied. Floor 6.

A worker's batch costs more to hand over than to convert: torch copies the items into a new piece of shared memory,
each of whose pages the kernel makes, maps and takes back. So in a worker, frames are decoded into a `Segment`, and what
collates their items by torch's rules (`default_collate`, also within a `collate_fn` of the user's) finds that
they lie in one array already. The consumer maps it and gets an ordinary tensor; when the last tensor, slice or array
over it is gone there, the first bytes of the segment say so to the worker. If the consumer has forked meanwhile, they
say that the worker must not use it again: the new process may have the batch still.

Items are tensors of a subclass that only remembers where they lie, and so is the batch, in the worker. Whatever else
happens to them (an operation, a copy, a pickle) gives ordinary tensors of their own, by torch's own ways.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

from ahi_ml.datasets.buffers import BufferPool
from ahi_ml.types import AnyArray

__all__ = ["SegmentPool"]

_HEAD = mmap.PAGESIZE  # of which the first byte says whether a consumer has the batch
_WORTH = 1 << 20  # bytes: smaller batches cost little to copy
_MOST = 8  # batches that wait or are in use; of further ones torch's copies are handed over
_FREE, _TAKEN, _LOST = b"\0", b"\1", b"\2"


@dataclass(eq=False)
class Segment:
    """Memory that other processes may map.

    Parameters
    ----------
    size : int
        Bytes, of the batch.
    """

    size: int
    busy: bool = False  # here: an array over it lives
    descriptor: int = field(init=False)
    memory: mmap.mmap = field(init=False)

    def __post_init__(self) -> None:
        self.descriptor = os.memfd_create(f"ahi-ml-batch-{os.getpid()}")
        weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, _HEAD + self.size)
        self.memory = mmap.mmap(self.descriptor, _HEAD + self.size)

    @property
    def free(self) -> bool:
        """Whether nobody has anything that lies here."""
        return not self.busy and self.memory[:1] == _FREE

    @property
    def lost(self) -> bool:
        """Whether nobody can tell any more who has something that lies here."""
        return self.memory[:1] == _LOST

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> AnyArray:
        """Its bytes in this form; busy until the last view of them is gone."""
        self.busy = True
        whole = np.frombuffer(self.memory, np.uint8, prod(shape) * dtype.itemsize, _HEAD)
        weakref.finalize(whole, self._idle)  # the base of all views of it, of tensors too
        return whole.view(dtype).reshape(shape)

    def holds(self, array: AnyArray) -> bool:
        """Whether an array that `array` gave lies here."""
        return bool(np.may_share_memory(np.frombuffer(self.memory, np.uint8), array))

    def _idle(self) -> None:
        self.busy = False


class SegmentPool:
    """Batch buffers of a DataLoader worker; like `BufferPool`, which has those that need no handing over.

    Parameters
    ----------
    private : BufferPool
        For small batches, single items, and when so many are under way that all segments are in use.
    """

    def __init__(self, private: BufferPool) -> None:
        self._private = private
        self._segments: list[Segment] = []
        # Of this process alone, a worker: what becomes of these types, which nobody else makes.
        default_collate_fn_map[_Row] = _collate_rows
        reduction.ForkingPickler.register(_SharedBatch, _hand_over)
        reduction.ForkingPickler.register(_Row, _copied)

    @staticmethod
    def possible() -> bool:
        """Whether this system has memory without a name, which goes when its last user does, however that ends."""
        return hasattr(os, "memfd_create")

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> AnyArray:
        """An array of this form, in a segment that is free if that is worth it."""
        size = prod(shape) * dtype.itemsize
        segment = self._free_one(size) if shape[0] > 1 and size >= _WORTH else None
        return self._private.take(shape, dtype) if segment is None else segment.array(shape, dtype)

    def _free_one(self, size: int) -> Segment | None:
        self._segments = [segment for segment in self._segments if not segment.lost]
        free = [segment for segment in self._segments if segment.free]
        for segment in free:
            if segment.size >= size:
                return segment
        if len(self._segments) == _MOST:
            if not free:
                return None
            self._segments.remove(free[0])
        self._segments.append(Segment(size))
        return self._segments[-1]

    def lend(self, array: AnyArray) -> Sequence[torch.Tensor] | torch.Tensor:
        """The rows of an array that was taken, as tensors; it comes back when nothing refers to them any more."""
        for segment in self._segments:
            if segment.holds(array):
                return _Lease(segment, torch.from_numpy(array)).rows(array)
        return self._private.lend(array)


@dataclass(eq=False)
class _Lease:
    """A batch in a segment, and how far it has come: it is collated once, and handed over once."""

    segment: Segment
    batch: torch.Tensor
    collated: bool = False
    sent: bool = False
    _kept: list[weakref.ref[Any]] = field(default_factory=list)

    def rows(self, array: AnyArray) -> list[torch.Tensor]:
        """Its items, each over a view of its own, which lives as long as anything of the item."""
        rows: list[torch.Tensor] = []
        for view in array:
            self._kept.append(weakref.ref(view))
            row = torch.from_numpy(view).as_subclass(_Row)
            row.lease = self
            rows.append(row)
        return rows

    def is_made_of(self, rows: Sequence[torch.Tensor]) -> bool:
        """Whether these are its items, all of them in order, whatever their pixels are now."""
        return len(rows) == len(self.batch) and all(map(_same, rows, self.batch))

    def can_go(self, batch: torch.Tensor) -> bool:
        """Whether the consumer may have the memory itself: nothing here would see what it does to the batch."""
        return (
            not self.sent
            and all(view() is None for view in self._kept)
            and _same(batch, self.batch)
            and self.segment.holds(self.batch.numpy())  # torch moves what it hands over in its own way
        )


class _Placed(torch.Tensor):
    """A tensor that knows where it lies; what is made of it is an ordinary tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    lease: _Lease

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class _Row(_Placed):
    pass


class _SharedBatch(_Placed):
    pass


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
        and not one.requires_grad
    )


def _collate_rows(rows: list[torch.Tensor], *, collate_fn_map: Any = None) -> torch.Tensor:
    """What `default_collate` makes of items: the batch they lie in, if it is just these; else as of any tensors."""
    lease = rows[0].lease if isinstance(rows[0], _Row) else None
    if lease is None or lease.collated or not lease.is_made_of(rows):
        return collate_tensor_fn(rows, collate_fn_map=collate_fn_map)  # type: ignore[no-any-return]
    lease.collated = True  # another batch of the same items is another tensor
    batch = lease.batch.as_subclass(_SharedBatch)
    batch.lease = lease
    return batch


def _hand_over(batch: _SharedBatch) -> tuple[Any, ...]:
    """What travels to the consumer: where the batch is."""
    lease, plain = batch.lease, batch.as_subclass(torch.Tensor)
    if not lease.can_go(plain):
        return _copied(batch)
    array, descriptor = plain.numpy(), reduction.DupFd(lease.segment.descriptor)
    lease.sent = True
    lease.segment.memory[:1] = _TAKEN
    return _receive, (descriptor, array.shape, array.dtype.str)


def _copied(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What travels otherwise: a copy, by torch's own way."""
    return reduce_tensor(tensor.as_subclass(torch.Tensor))  # type: ignore[no-any-return,no-untyped-call]


def _receive(descriptor: Any, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """In the consumer: the batch, an ordinary tensor."""
    number = descriptor.detach()
    try:
        memory = mmap.mmap(number, 0)
    finally:
        os.close(number)
    whole = np.frombuffer(memory, np.uint8, prod(shape) * np.dtype(dtype).itemsize, _HEAD)
    received = _Received(memory)
    weakref.finalize(whole, received.give_back).atexit = False
    _RECEIVED.add(received)
    return torch.from_numpy(whole.view(dtype).reshape(shape))


@dataclass(eq=False)
class _Received:
    """A batch of a worker's, in the consumer."""

    memory: mmap.mmap
    forked: bool = False

    def give_back(self) -> None:
        """Nothing here refers to it any more."""
        self.memory[:1] = _LOST if self.forked else _FREE


_RECEIVED: weakref.WeakSet[_Received] = weakref.WeakSet()


def _lose_all() -> None:
    """Let no worker write again to what a process that is about to be forked shares with this one from then on."""
    for received in list(_RECEIVED):
        received.forked = True


if SegmentPool.possible():
    os.register_at_fork(before=_lose_all)
