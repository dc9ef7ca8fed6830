"""What a caller submits together, on its way: outcomes by slot, and one task a frame."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from ahi_ml.cache import Flights, ResultTier
from ahi_ml.client import Part
from ahi_ml.index import FrameProfile, FrameSource, FrameSources
from ahi_ml.reader.making import Form
from ahi_ml.reader.options import ReadOptions
from ahi_ml.reader.stats import ReaderStats
from ahi_ml.types import AnyArray

__all__ = ["Batch", "Task"]


class Batch:
    """Frames submitted together.

    I/O: `wait` blocks until all are there.

    Parameters
    ----------
    sources : sequence of FrameSource
        What to read.
    options : ReadOptions
        What to make of it.
    outs : sequence of ndarray, or one ndarray whose rows they are, optional
        Where to; allocated as frames come, without.
    ended : callable, optional
        Called with the batch's counts when all are there, by whichever thread brings the last one.

    Attributes
    ----------
    stats : ReaderStats
        Of its frames so far.
    arrived : float
        When a frame last came from the network, or from another reader's, by `time.perf_counter`; 0 if none did.
    failed : bool
        Whether an outcome so far is an error.
    """

    def __init__(
        self,
        sources: Sequence[FrameSource],
        options: ReadOptions,
        outs: Sequence[AnyArray] | AnyArray | None = None,
        ended: Callable[[ReaderStats], None] | None = None,
    ) -> None:
        self.sources, self.options, self.outs = FrameSources.of(sources), options, outs
        self._forms: dict[int, Form] = {}  # by kind, which the sources keep alive
        self.stats = ReaderStats()
        self.arrived = 0.0
        self._ended = ended
        self._outcomes: list[AnyArray | BaseException | None] = [None] * len(sources)
        self._left = len(sources)
        self._lock = threading.Lock()
        self._done = threading.Lock()  # held until all are there: cheaper to wait for than an event
        self.cancelled = self.failed = False
        self.requests: set[Future[Any]] = set()
        self.results: tuple[ResultTier, Mapping[int, str]] | None = None  # where results are kept, and their keys
        if sources:
            self._done.acquire()

    def form(self, kind: FrameProfile) -> Form:
        """The form of what frames of a kind are made into. I/O: none."""
        form = self._forms.get(id(kind))
        if form is None:
            form = self._forms[id(kind)] = Form.of(kind, self.options)
        return form

    def out(self, slot: int) -> AnyArray:
        """The array that a frame is read into. I/O: none."""
        if self.outs is not None:
            return self.outs[slot]
        form = self.form(self.sources[slot].profile)
        return np.empty(form.shape, form.dtype)

    def keep(self, slot: int, array: AnyArray, *, verified: bool) -> None:
        """Store a frame's result where results are kept. Called by the reader. I/O: one file, if they are."""
        if self.results is not None:
            tier, keys = self.results
            tier.write(keys[slot], array, verified)

    def finish(self, slot: int, outcome: AnyArray | BaseException) -> None:
        """Note the outcome of one frame. Called by the reader."""
        self.finish_many(((slot, outcome),))

    def finish_many(self, outcomes: Collection[tuple[int, AnyArray | BaseException]]) -> None:
        """Note outcomes of frames by their slots. Called by the reader."""
        placed = self._outcomes
        with self._lock:
            for slot, outcome in outcomes:
                placed[slot] = outcome
                if isinstance(outcome, BaseException):
                    self.failed = True
            self._left -= len(outcomes)
            if self._left == 0:
                if self._ended is not None:
                    self._ended(self.stats)
                self._done.release()

    def count(
        self,
        *,
        cached: int = 0,
        fetched: int = 0,
        verified: int = 0,
        unverified: int = 0,
        refetched: int = 0,
        bytes_fetched: int = 0,
        read_s: float = 0.0,
        decode_s: float = 0.0,
        convert_s: float = 0.0,
    ) -> None:
        """Add to the counts, before the frames they are of are finished. Called by the reader."""
        with self._lock:
            stats = self.stats
            stats.cached += cached
            stats.fetched += fetched
            stats.verified += verified
            stats.unverified += unverified
            stats.refetched += refetched
            stats.bytes_fetched += bytes_fetched
            stats.read_s += read_s
            stats.decode_s += decode_s
            stats.convert_s += convert_s

    def sent(self, request: Future[Any]) -> None:
        """Note a request, so that it ends when the batch is cancelled. Called by the reader."""
        self.requests.add(request)
        if self.cancelled:  # just now: who cancelled it may not have seen this one
            request.cancel()

    def cancel(self) -> None:
        """Let frames go that have not been decoded, and end their requests. I/O: none."""
        self.cancelled = True
        for request in list(self.requests):
            request.cancel()

    def outcomes(self, timeout_s: float | None = None) -> list[AnyArray | BaseException]:
        """Arrays, or the errors in their places, in the order submitted. An interrupt cancels those under way.

        Raises
        ------
        TimeoutError
            Not all are there yet.
        """
        try:
            done = self._done.acquire(timeout=-1 if timeout_s is None else max(timeout_s, 0))
        except BaseException:  # an interrupt: nobody will ask for them any more
            self.cancel()
            raise
        if not done:
            raise TimeoutError(f"{self._left} of {len(self._outcomes)} frames are still under way")
        self._done.release()
        return self._outcomes  # type: ignore[return-value]

    def wait(self, timeout_s: float | None = None) -> list[AnyArray]:
        """Arrays in the order submitted; the first error, if there is one, is raised."""
        outcomes = self.outcomes(timeout_s)
        for outcome in outcomes if self.failed else ():
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes  # type: ignore[return-value]


class Task:
    """One frame on its way from the remote tier or the data store."""

    __slots__ = ("batch", "fetches", "flight", "options", "part", "slot", "source")

    def __init__(self, batch: Batch, slot: int) -> None:
        self.batch, self.slot = batch, slot
        self.source: FrameSource = batch.sources[slot]
        self.options = batch.options
        self.fetches = 0
        self.part: Part | None = None  # of the frame, if that is all that was asked for
        self.flight: tuple[Flights, str] | None = None  # the download that this task has taken on
