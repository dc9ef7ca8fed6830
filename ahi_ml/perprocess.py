"""State that each process makes for itself: threads, sockets and held locks do not survive a fork. Floor 1."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["PerProcess"]

Made = TypeVar("Made")


class PerProcess(Generic[Made]):
    """Something made on first use in each process.

    Parameters
    ----------
    make : callable
        Makes it.
    """

    def __init__(self, make: Callable[[], Made]) -> None:
        self._make = make
        self._made: tuple[int, Made] | None = None

    def get(self) -> Made:
        """This process's own. I/O: whatever making it does, the first time."""
        pid = os.getpid()
        if self._made is None or self._made[0] != pid:
            self._made = (pid, self._make())
        return self._made[1]

    def take(self) -> Made | None:
        """This process's own if it was made, and forget it. I/O: none."""
        made, self._made = self._made, None
        return made[1] if made is not None and made[0] == os.getpid() else None
