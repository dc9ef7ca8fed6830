"""What an item is to be learned as: a column of the index, a mapping, or what a callable says. Floor 6."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ahi_ml.errors import ConfigError, DataError
from ahi_ml.index import DatasetIndex

__all__ = ["Targets"]


class Targets:
    """The targets of the frames of an index.

    I/O: none.

    Parameters
    ----------
    target : str, mapping or callable
        A column of ``index.frames``; a mapping from key, SOP instance UID or series UID; or a callable that takes the
        item.
    index : DatasetIndex
        Of the dataset.

    Raises
    ------
    ConfigError
        Something else, or no such column.
    """

    def __init__(self, target: Any, index: DatasetIndex) -> None:
        if not (isinstance(target, str | Mapping) or callable(target)):
            raise ConfigError(f"target is a column, a mapping or a callable, not {type(target).__name__}")
        self._target = target
        self._column = index.column(target) if isinstance(target, str) else None

    @property
    def sees_items(self) -> bool:
        """Whether a callable of the user's gets each item."""
        return callable(self._target)

    def for_rows(self, index: DatasetIndex) -> Targets:
        """The same, of another index."""
        return Targets(self._target, index)

    def __getstate__(self) -> Any:
        return self._target  # the column is in the index, whose file travels, not its values

    def __setstate__(self, target: Any) -> None:
        self._target, self._column = target, None

    def of(self, row: int, item: Mapping[str, Any]) -> Any:
        """The target of an item.

        Raises
        ------
        DataError
            The column has no value there.
        ConfigError
            The mapping has no entry for it.
        """
        if self._column is not None:
            value = self._column[row].as_py()
            if value is None:
                raise DataError(
                    f"the target {self._target} of row {row} is empty: select rows that have one "
                    f"(index.where('{self._target} is not None')), or pass a callable"
                )
            return value
        if callable(self._target):
            return self._target(item)
        meta = item["meta"]
        for key in (item["key"], meta["sop_instance_uid"], meta["series_instance_uid"]):
            if key in self._target:
                return self._target[key]
        raise ConfigError(
            f"the target mapping has no entry for the frame in row {row} (by key, SOP instance UID or series UID)"
        )
