"""A batch of items on its way: what it is read into, in what form, and what its frames are called. Floor 6."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ahi_ml.index import FrameProfile
from ahi_ml.reader import Batch, ReadOptions
from ahi_ml.types import AnyArray

__all__ = ["PendingBatch", "TensorOptions", "channels_last", "keys_of"]

# torch has no arithmetic for the wider unsigned types.
_TORCH_SAFE: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.uint16): np.dtype(np.int32),
    np.dtype(np.uint32): np.dtype(np.int64),
}


class TensorOptions(ReadOptions):
    """Options whose results torch can hold: wider integers where it has no arithmetic for the stored ones."""

    __slots__ = ()

    def result_dtype(self, profile: FrameProfile) -> np.dtype[Any]:
        dtype = super().result_dtype(profile)
        return dtype if self.dtype is not None else _TORCH_SAFE.get(dtype, dtype)


@dataclass(eq=False)
class PendingBatch:
    """Items under way.

    Parameters
    ----------
    rows : ndarray of int
        Which.
    images : ndarray or list of ndarray
        What they are read into, channels first: one array if they are of one form.
    batch : Batch
        The reader's.
    epoch : int, optional
        If not the dataset's.
    """

    rows: AnyArray
    images: AnyArray | list[AnyArray]
    batch: Batch
    epoch: int | None = None


def keys_of(ids: Mapping[str, list[Any]]) -> list[str]:
    """What names frames in items: unique in a data store, whatever the frame's id."""
    names = zip(ids["image_set_id"], ids["sop_instance_uid"], ids["frame_number"], strict=True)
    return [f"{image_set}/{instance}/{number}" for image_set, instance, number in names]


def channels_last(array: AnyArray) -> AnyArray:
    """The reader's view of ``(..., C, rows, columns)``: ``(..., rows, columns[, C])``."""
    return array[..., 0, :, :] if array.shape[-3] == 1 else np.moveaxis(array, -3, -1)
