"""Work that an answer promises and that is done afterwards: at once, or later in slow mode."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable

__all__ = ["Settling"]


class Settling:
    """One thread that runs pieces of work when they are due, in that order.

    I/O: none of its own. The thread starts with the first piece. What raises ends the thread's
    piece only if it guards itself: pieces are expected to.
    """

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], None], delay_s: float = 0.0) -> None:
        """Run `work` once, after so many seconds; not any more once it is closing."""
        with self._changed:
            if self._closing:
                return
            heapq.heappush(self._due, (time.monotonic() + delay_s, next(self._number), work))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ahi-ml-settle", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Run what is left without waiting for its time, and end the thread: what was promised is done."""
        with self._changed:
            self._closing = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closing and (not self._due or self._due[0][0] > time.monotonic()):
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if not self._due:
                    return
                _, _, work = heapq.heappop(self._due)
            work()
