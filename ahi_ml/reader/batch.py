"""What a caller submits together, on its way: outcomes by slot, and one task a frame."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass

from ahi_ml.cache import DerivedTier, Flights
from ahi_ml.index import FrameSource
from ahi_ml.reader.options import ReadOptions
from ahi_ml.types import AnyArray

__all__ = ["Batch", "ReaderStats", "Task"]


@dataclass(slots=True)
class ReaderStats:
    """Counts of frames since the reader was made.

    Parameters
    ----------
    cached, fetched : int
        Where the bytes came from.
    verified, unverified : int
        Whether the pixels were compared with a checksum, now or when they were cached.
    refetched : int
        Frames whose first bytes failed the comparison.
    bytes_fetched : int
        Encoded bytes over the network.
    """

    cached: int = 0
    fetched: int = 0
    verified: int = 0
    unverified: int = 0
    refetched: int = 0
    bytes_fetched: int = 0


class Batch:
    """Frames submitted together.

    I/O: `wait` blocks until all are there.
    """

    def __init__(self, count: int) -> None:
        self._outcomes: list[AnyArray | BaseException | None] = [None] * count
        self._left = count
        self._lock = threading.Lock()
        self._done = threading.Event()
        self.cancelled = False
        self.requests: set[Future[bytes]] = set()
        if count == 0:
            self._done.set()

    def finish(self, slot: int, outcome: AnyArray | BaseException) -> None:
        """Note the outcome of one frame. Called by the reader."""
        with self._lock:
            self._outcomes[slot] = outcome
            self._left -= 1
            if self._left == 0:
                self._done.set()

    def cancel(self) -> None:
        """Let frames go that have not been decoded, and requests that have not been sent. I/O: none."""
        self.cancelled = True
        for request in list(self.requests):
            request.cancel()

    def outcomes(self, timeout_s: float | None = None) -> list[AnyArray | BaseException]:
        """Arrays, or the errors in their places, in the order submitted.

        Raises
        ------
        TimeoutError
            Not all are there yet.
        """
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"{self._left} of {len(self._outcomes)} frames are still under way")
        return self._outcomes  # type: ignore[return-value]

    def wait(self, timeout_s: float | None = None) -> list[AnyArray]:
        """Arrays in the order submitted; the first error, if there is one, is raised."""
        arrays = []
        for outcome in self.outcomes(timeout_s):
            if isinstance(outcome, BaseException):
                raise outcome
            arrays.append(outcome)
        return arrays


class Task:
    """One frame on its way."""

    __slots__ = ("batch", "derived", "fetches", "flight", "options", "out", "slot", "source")

    def __init__(
        self, batch: Batch, slot: int, source: FrameSource, out: AnyArray | None, options: ReadOptions
    ) -> None:
        self.batch, self.slot, self.source, self.out, self.options = batch, slot, source, out, options
        self.fetches = 0
        self.derived: tuple[DerivedTier, str] | None = None
        self.flight: tuple[Flights, str] | None = None  # the download that this task has taken on
