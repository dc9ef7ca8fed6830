"""A batch of items on its way: what its frames are called, what it is read into, and in what form. Floor 6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ahi_ml.cache import recipe
from ahi_ml.errors import ConfigError
from ahi_ml.index import DatasetIndex, FrameProfile, FrameSources
from ahi_ml.reader import Batch, ReadOptions
from ahi_ml.types import AnyArray

__all__ = ["KnownRows", "PendingBatch", "TensorOptions", "channels_last"]

# torch has no arithmetic for the wider unsigned types.
_TORCH_SAFE: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.uint16): np.dtype(np.int32),
    np.dtype(np.uint32): np.dtype(np.int64),
}


class TensorOptions(ReadOptions):
    """Options whose results torch can hold: wider integers where it has no arithmetic for the stored ones."""

    __slots__ = ()

    def __post_init__(self) -> None:
        if isinstance(self.dtype, torch.dtype):
            object.__setattr__(self, "dtype", _numpy_dtype(self.dtype))
        super().__post_init__()
        if self.dtype is not None:
            try:
                torch.from_numpy(np.empty(0, self.dtype))
            except (TypeError, ValueError) as error:
                raise ConfigError(f"torch has no tensors of numpy's {self.dtype!r}") from error

    def result_dtype(self, profile: FrameProfile) -> np.dtype[Any]:
        dtype = super().result_dtype(profile)
        return dtype if self.dtype is not None else _TORCH_SAFE.get(dtype, dtype)

    def recipe(self) -> str | None:
        """What tells results of these options from those of others: see `cache.recipe`. I/O: none."""
        return recipe(
            output=self.output,
            dtype=self.dtype,
            steps=self.steps,
            padding=self.padding,
            window=self.window,
            reduce=self.reduce,
            normalize_polarity=self.normalize_polarity,
            verify=self.verify,  # or who verifies would be given what somebody else did not look at
        )


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except (TypeError, RuntimeError) as error:
        raise ConfigError(f"images are read as numpy arrays, which have no {dtype}: convert the batch") from error


@dataclass(frozen=True, eq=False)
class KnownRows:
    """Rows of an index with what it says of them. A slice asks nothing again.

    Parameters
    ----------
    numbers : ndarray of int
        Which.
    sources : FrameSources
        What the reader needs.
    ids : mapping of str to list
        What items carry of their ids, by name.
    keys : list of str
        What names them in items: unique in a data store, whatever the frame's id.
    """

    numbers: AnyArray
    sources: FrameSources
    ids: Mapping[str, list[Any]]
    keys: list[str]

    @classmethod
    def of(cls, index: DatasetIndex, rows: Sequence[int] | AnyArray) -> KnownRows:
        """Look rows up; negative ones count from the end. I/O: none.

        Raises
        ------
        IndexError
            No such row.
        TypeError
            Numbers that are not whole.
        """
        numbers, length = np.asarray(rows), len(index)
        if numbers.dtype.kind not in "iu" and numbers.size:
            raise TypeError(f"rows are whole numbers, not {numbers.dtype}")
        numbers = numbers.astype(np.int64)
        for wrong in numbers[(numbers < -length) | (numbers >= length)]:
            raise IndexError(f"row {wrong} of a dataset of {length} frames")
        numbers = np.where(numbers < 0, numbers + length, numbers)
        ids = index.ids(numbers)
        names = zip(ids["image_set_id"], ids["sop_instance_uid"], ids["frame_number"], strict=True)
        keys = [f"{image_set}/{instance}/{number}" for image_set, instance, number in names]
        return cls(numbers, index.sources(numbers), ids, keys)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, part: slice) -> KnownRows:
        ids = {name: values[part] for name, values in self.ids.items()}
        return KnownRows(self.numbers[part], self.sources[part], ids, self.keys[part])


@dataclass(eq=False)
class PendingBatch:
    """Items under way.

    Parameters
    ----------
    rows : KnownRows
        Which.
    images : ndarray or list of ndarray
        What they are read into, channels first: one array if they are of one form.
    batch : Batch
        The reader's.
    epoch : int, optional
        If not the dataset's.
    submit_s : float
        What submitting it took.
    """

    rows: KnownRows
    images: AnyArray | list[AnyArray]
    batch: Batch
    epoch: int | None = None
    submit_s: float = 0.0


def channels_last(array: AnyArray) -> AnyArray:
    """The reader's view of ``(..., C, rows, columns)``: ``(..., rows, columns[, C])``."""
    return array[..., 0, :, :] if array.shape[-3] == 1 else np.moveaxis(array, -3, -1)
