"""Batches made of items, also of items whose images differ in shape. Floor 6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch.nn.functional import pad
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

from ahi_ml.errors import DataError

__all__ = ["collate", "list_collate", "pad_collate", "stack_as_anywhere"]

_LISTED = 4  # shapes that a message names


def collate(items: Sequence[Any]) -> Any:
    """Make a batch as torch does; what it cannot stack is said by key and shape. I/O: none.

    Raises
    ------
    DataError
        Images, or other tensors of one name, differ in shape.
    """
    for name in _tensors(items):
        if len({item[name].shape for item in items}) > 1:
            raise DataError(
                f"a batch holds {_shapes(items, name)}: select frames of one shape (index.where('Rows == 512')), "
                "resize in a transform, or pass collate_fn=pad_collate or list_collate, both of ahi_ml.datasets"
            )
    return default_collate(list(items))


def pad_collate(items: Sequence[Mapping[str, Any]], *, value: float = 0.0) -> dict[str, Any]:
    """Make a batch of items that differ in shape: smaller ones are padded at the end of each axis.

    A ``collate_fn`` for `FrameLoader` and torch's DataLoader; for another value, ``functools.partial(pad_collate,
    value=-1024)``. I/O: none.

    Parameters
    ----------
    items : sequence of mapping
        As data sets give them.
    value : float
        What padded places hold, in every tensor that is padded: of the image, and of targets that differ in shape.

    Returns
    -------
    dict
        As torch's default collation makes it, and ``"shape"``: how much of each image is its own,
        ``(n, dimensions)`` int64.

    Raises
    ------
    DataError
        Tensors of one name differ in dimensions, or images in channels.
    """
    padded = [dict(item) for item in items]
    for name in _tensors(items):
        shapes = [item[name].shape for item in items]
        if len({len(shape) for shape in shapes}) > 1:
            raise DataError(f"a batch holds {_shapes(items, name)}: padding adds no dimensions")
        if name == "image" and len({shape[0] for shape in shapes}) > 1:
            raise DataError(
                f"a batch holds {_shapes(items, name)}: padding adds no channels; select one kind of frames"
            )
        most = [max(sizes) for sizes in zip(*shapes, strict=True)]
        for item, shape in zip(padded, shapes, strict=True):
            if list(shape) != most:  # torch counts axes from the last, and wants what to add before and after
                missing = [size - own for size, own in zip(most, shape, strict=True)][::-1]
                item[name] = pad(item[name], [each for size in missing for each in (0, size)], value=value)
    batch: dict[str, Any] = default_collate(padded)
    return {**batch, "shape": torch.tensor([item["image"].shape for item in items])}


def list_collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Make a batch whose tensors are lists, one an item, whatever their shapes; the rest as torch does. I/O: none.

    A ``collate_fn`` for `FrameLoader` and torch's DataLoader.
    """
    tensors = _tensors(items)
    rest: dict[str, Any] = default_collate([{key: item[key] for key in item if key not in tensors} for item in items])
    return {key: [item[key] for item in items] if key in tensors else rest[key] for key in items[0]}


def _tensors(items: Sequence[Any]) -> list[str]:
    """The names under which all items have tensors; none of items that are something else than mappings."""
    if not all(isinstance(item, Mapping) for item in items):
        return []
    return [name for name in items[0] if all(isinstance(item.get(name), torch.Tensor) for item in items)]


def _shapes(items: Sequence[Mapping[str, Any]], name: str) -> str:
    """What a message says of tensors that differ."""
    first = {item[name].shape: item.get("key") for item in reversed(items)}  # of each shape
    listed = [f"{key}: {tuple(shape)}" for shape, key in reversed(first.items())]
    more = ", ..." if len(listed) > _LISTED else ""
    return f"{name}s of {len(first)} shapes ({', '.join(listed[:_LISTED])}{more})"


def stack_as_anywhere() -> None:
    """Have torch's collation give in this process, a worker, the dtype that it gives in the main one.

    There, torch stacks tensors of several dtypes into what holds them all; in a worker it writes them into shared
    memory of the first one's dtype, and values wrap. I/O: none.
    """
    default_collate_fn_map[torch.Tensor] = _stack


def _stack(tensors: Sequence[torch.Tensor], *, collate_fn_map: Any = None) -> torch.Tensor:
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        common = reduce(torch.promote_types, dtypes)
        tensors = [tensor.to(common) for tensor in tensors]
    return collate_tensor_fn(tensors, collate_fn_map=collate_fn_map)  # type: ignore[no-any-return]
