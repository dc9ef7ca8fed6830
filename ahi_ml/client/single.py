"""Calls of a boto3 client that send one request each, whatever the client would do by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["SingleCalls"]


class SingleCalls:
    """Handlers on a client that keep calls of some threads to one request, sent only if it is still wanted.

    Botocore pauses and repeats inside a call, where nothing can stop it and nobody counts with it. Calls that others
    make with the client stay as they are.
    """

    def __init__(self) -> None:
        self._here = threading.local()

    def attend(self, events: Any) -> None:
        """Register the handlers. I/O: none."""
        events.register_first("before-send.medical-imaging", self._before)
        events.register_first("needs-retry.medical-imaging", self._after)  # the first answer is the one that counts

    @contextmanager
    def call(self, check: Callable[[], None]) -> Iterator[None]:
        """Keep calls of this thread, in the block, to one request. I/O: none.

        Parameters
        ----------
        check : callable
            Called when the request has had its turn and is about to be sent; what it raises comes out of the call.
        """
        self._here.check = check
        try:
            yield
        finally:
            del self._here.check

    def _before(self, **_: Any) -> None:
        check = getattr(self._here, "check", None)
        if check is not None:
            check()

    def _after(self, **_: Any) -> bool | None:
        return False if hasattr(self._here, "check") else None
