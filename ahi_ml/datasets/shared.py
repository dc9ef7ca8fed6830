"""Numbers that a process and its DataLoader workers share, persistent workers too. Floor 6."""

from __future__ import annotations

from contextlib import suppress

import torch

from ahi_ml.types import AnyArray

__all__ = ["SharedNumbers"]


class SharedNumbers:
    """A tensor in shared memory. It survives fork, and the pickling that starts workers; any other copy is its own.

    I/O: none.

    Parameters
    ----------
    values : tensor
        Moved to shared memory.

    """

    def __init__(self, values: torch.Tensor) -> None:
        self._share(values)

    def _share(self, values: torch.Tensor) -> None:
        if not values.is_shared():  # type: ignore[no-untyped-call]
            with suppress(RuntimeError):  # without shared memory there are no workers either
                values.share_memory_()  # type: ignore[no-untyped-call]
        self._values = values

    @property
    def array(self) -> AnyArray:
        """The numbers, to read and to write."""
        return self._values.numpy()  # each time: torch may move a tensor that it shares with another process

    def __getstate__(self) -> torch.Tensor:
        return self._values

    def __setstate__(self, values: torch.Tensor) -> None:
        self._share(values)
