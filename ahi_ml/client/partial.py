"""When a transport may stop reading a frame: the service has no partial reads, but whoever asked can hang up.

That costs a new connection (and, over TLS, a handshake of some round trips), so it is done only where it saves
more than `WORTH_BYTES`; `benchmarks/README.md` has the measurement.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["WORTH_BYTES", "Part"]

WORTH_BYTES = 1 << 20
"""Bytes not read, from which on stopping pays."""


class Part:
    """The first part of one frame, where no more is wanted. Of one request at a time.

    Parameters
    ----------
    needed : callable
        Takes the first bytes of the frame, says how many are enough, and True; or with how many to ask again while that
        cannot be told from them, and False.

    Attributes
    ----------
    stopped : bool
        Whether reading was stopped: what came is not the whole frame.
    """

    __slots__ = ("_certain", "_needed", "_size", "stopped")

    def __init__(self, needed: Callable[[bytes], tuple[int, bool]]) -> None:
        self._needed = needed
        self.begin()

    def begin(self) -> None:
        """Forget an answer that is asked for again. I/O: none."""
        self.stopped = False
        self._size, self._certain = 0, False

    def stops(self, have: int, total: int, head: Callable[[], bytes]) -> bool:
        """Whether to stop reading now. I/O: none.

        Parameters
        ----------
        have, total : int
            Bytes that have come, and bytes of the frame.
        head : callable
            Gives what has come.
        """
        if total < WORTH_BYTES:
            return False
        if not self._certain and have >= self._size:
            self._size, self._certain = self._needed(head())
        self.stopped = self._certain and have >= self._size and total - have >= WORTH_BYTES
        return self.stopped
