"""The future of a frame: whoever asked may take it back until the frame has come."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

__all__ = ["FrameFuture"]


class FrameFuture(Future[bytes]):
    """The encoded bytes of a frame that was asked for.

    It never says that it is running, so that it can be cancelled in flight too: its transport hears of that, and
    ends the request.

    Parameters
    ----------
    on_cancel : callable
        Takes this future when it has been cancelled.

    Attributes
    ----------
    dropped : bool
        Whether it has been cancelled; the transport may look without taking a lock.
    """

    def __init__(self, on_cancel: Callable[[FrameFuture], None]) -> None:
        super().__init__()
        self._on_cancel = on_cancel
        self.dropped = False

    def cancel(self) -> bool:
        """Give the frame up, unless it has come or failed. I/O: none; its request is ended in the background."""
        cancelled = super().cancel()
        if cancelled and not self.dropped:
            self.dropped = True
            self._on_cancel(self)
        return cancelled

    def settle(self, outcome: bytes | Exception | None = None) -> None:
        """Note what has come of it; nothing, for one that was cancelled. Called once, by the transport. I/O: none."""
        if not self.set_running_or_notify_cancel():  # from here it cannot be cancelled
            return
        if isinstance(outcome, bytes):
            self.set_result(outcome)
        else:
            self.set_exception(outcome)
