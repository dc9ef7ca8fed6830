"""The threads that decode, fed from one queue.

What `concurrent.futures` asks for each piece of work (a future, its locks, a wake-up) costs a twentieth of
decoding a frame. So its threads run a loop here that takes work while there is any: an executor still starts
them, and ends them with the interpreter.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

__all__ = ["DecodePool"]

Work = Callable[[bool], None]


class DecodePool:
    """Threads that work through a queue in order.

    Work is a callable that is told whether to be dropped instead of done, which it must be once the pool is
    closed. It does not raise.

    Parameters
    ----------
    threads : int
        How many at most; they start when there is work.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.closed = False
        self._executor = ThreadPoolExecutor(threads, "ahi-ml-decode")
        self._queue: deque[Work] = deque()
        self._busy = 0
        self._lock = threading.Lock()

    def put(self, work: Work, hands: int = 1) -> None:
        """Have work done by one thread, or by several at once. I/O: none."""
        with self._lock:
            self._queue.extend([work] * hands)
            for _ in range(min(hands, self.threads - self._busy)):
                try:
                    self._executor.submit(self._run)
                except RuntimeError:  # closed, or the interpreter ends
                    self.closed = True
                    break
                self._busy += 1
        if self.closed:
            self._run_dry(dropped=True)

    def close(self) -> None:
        """Drop what waits; what is under way goes on to its end. I/O: none."""
        with self._lock:
            self.closed = True
        self._run_dry(dropped=True)
        self._executor.shutdown(wait=False)

    def _run(self) -> None:
        while True:
            self._run_dry(dropped=False)
            with self._lock:
                if not self._queue:
                    self._busy -= 1
                    return

    def _run_dry(self, *, dropped: bool) -> None:
        while True:
            try:
                work = self._queue.popleft()
            except IndexError:
                return
            work(dropped or self.closed)
