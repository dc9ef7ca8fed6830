"""Threads that wait for the remote tier, so that no thread that decodes does: one request each, many at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

__all__ = ["Lookups"]

Look = Callable[[], bytes | None]


class Lookups:
    """Calls that wait on the network, made by threads of their own in the order they were asked for.

    One a process. The threads start when there is something to look up and end when there is not. They are daemons:
    nothing interrupts a request of fsspec's, and the end of the interpreter does not wait for one.

    Parameters
    ----------
    at_once : int
        How many at most.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._threads = 0
        self._waiting: deque[tuple[Look, Future[bytes | None]]] = deque()
        self._lock = threading.Lock()

    def start(self, look: Look) -> Future[bytes | None]:
        """Have a call made.

        I/O: that of the call, in the background.

        Returns
        -------
        Future
            Pending until the call has returned, so that it can be cancelled until then: whoever waits need not wait
            for the network. A call that has begun goes on, and what it brings is dropped.
        """
        future: Future[bytes | None] = Future()
        with self._lock:
            self._waiting.append((look, future))
            if self._threads == self._at_once:
                return future
            self._threads += 1
        try:
            threading.Thread(target=self._work, name="ahi-ml-remote-lookup", daemon=True).start()
        except RuntimeError:  # the system has no more of them, or the interpreter ends: slowly, then
            self._work()
        return future

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                look, future = self._waiting.popleft()
            if future.cancelled():
                continue
            try:
                found = look()
            except BaseException as error:  # whatever it is, somebody waits for an answer
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            else:
                if future.set_running_or_notify_cancel():
                    future.set_result(found)
            del look, future  # what was found is not kept while waiting for the next
