"""State that each process makes for itself: threads, sockets and held locks do not survive a fork. Floor 1."""

from __future__ import annotations

import os
import threading
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
    left : callable, optional
        Told of the one that was made, when another process does without it: see `leave`.
    """

    def __init__(self, make: Callable[[], Made], left: Callable[[Made], None] | None = None) -> None:
        self._make = make
        self._left = left
        self._made: tuple[int, Made] | None = None
        self._locks: dict[int, threading.Lock] = {}  # one a process: a forked child may inherit a held one

    def __reduce__(self) -> tuple[type[PerProcess[Made]], tuple[Callable[[], Made], Callable[[Made], None] | None]]:
        return PerProcess, (self._make, self._left)  # where it is unpickled, it is made anew

    def get(self) -> Made:
        """This process's own. I/O: whatever making it does, the first time."""
        pid = os.getpid()
        made = self._made
        if made is None or made[0] != pid:
            with self._locks.setdefault(pid, threading.Lock()):
                made = self._made
                if made is None or made[0] != pid:
                    self.leave()  # in a forked child: its parent's
                    made = self._made = (pid, self._make())
        return made[1]

    def leave(self) -> None:
        """Tell `left` of what was made, if anything was: it does not go to the process that this goes to. I/O: none."""
        if self._made is not None and self._left is not None:
            self._left(self._made[1])

    def take(self) -> Made | None:
        """This process's own if it was made, and forget it. I/O: none."""
        made, self._made = self._made, None
        return made[1] if made is not None and made[0] == os.getpid() else None
