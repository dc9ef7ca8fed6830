"""Faults in force: which requests of a running server are slowed, refused, cut or spoiled."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Literal

from ahi_ml.config import QUOTAS
from ahi_ml.local.faults import Faults
from ahi_ml.local.protocol import ServiceFault

__all__ = ["Fate", "Injector"]

Fate = Literal["answer", "reset", "truncate", "corrupt"]
"""What becomes of an answer: sent, replaced by a connection reset, cut short, or sent with a wrong byte."""

_QUOTA_BOUND = frozenset({"CreateDatastore", "StartDICOMImportJob", "CopyImageSet", "UpdateImageSetMetadata"})


class Injector:
    """Faults in force, with their state. Not thread-safe: the server's event loop asks.

    Parameters
    ----------
    clock : callable
        Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.set(Faults())

    def set(self, faults: Faults) -> None:
        """Put other faults in force, from the next request on."""
        self.faults = faults
        self._random = random.Random(faults.seed)
        self._left: dict[str, tuple[float, float]] = {}  # requests left, and when that was counted

    def delay_s(self) -> float:
        """How long to hold the next answer back, in seconds."""
        faults = self.faults
        extra = self._random.uniform(0, faults.jitter_ms) if faults.jitter_ms else 0.0
        return (faults.latency_ms + extra) / 1000

    def admit(self, operation: str) -> None:
        """Let a request through, or not.

        Raises
        ------
        ServiceFault
            It is throttled, or fails because a share of requests does.
        """
        faults = self.faults
        if faults.throttle and not self._take(operation):
            raise ServiceFault("ThrottlingException", "Rate exceeded")
        if self._happens(faults.error_rate, operation):
            if self._random.random() < 0.5:
                raise ServiceFault("InternalServerException", "A fault that was asked for", 500)
            raise ServiceFault("ServiceUnavailableException", "A fault that was asked for", 503)
        if operation in _QUOTA_BOUND and self._happens(faults.quota_rate, operation):
            raise ServiceFault("ServiceQuotaExceededException", "A fault that was asked for")

    def resets(self, operation: str) -> bool:
        """Whether the connection is reset here: asked once before and once after an operation."""
        # Twice half the share, less the chance of both, would be less than was asked for.
        rate = self.faults.reset_rate
        return self._happens(1 - (1 - rate) ** 0.5, operation)

    def fate(self, operation: str) -> Fate:
        """What becomes of a good answer."""
        faults = self.faults
        if self.resets(operation):
            return "reset"
        if self._happens(faults.truncate_rate, operation):
            return "truncate"
        if operation == "GetImageFrame" and self._happens(faults.corrupt_rate, operation):
            return "corrupt"
        return "answer"

    def corrupt(self, body: bytes | memoryview) -> bytes:
        """The body with one wrong byte, behind the headers that a codec would notice."""
        body = bytes(body)
        if not body:
            return body
        at = self._random.randrange(len(body) // 2, len(body))
        return body[:at] + bytes([body[at] ^ self._random.randrange(1, 256)]) + body[at + 1 :]

    def _happens(self, rate: float, operation: str) -> bool:
        if not rate or (self.faults.operations and operation not in self.faults.operations):
            return False
        return self._random.random() < rate

    def _take(self, operation: str) -> bool:
        """Take one request from the operation's token bucket."""
        rate, burst = (each * self.faults.throttle for each in QUOTAS[operation])
        now = self._clock()
        left, since = self._left.get(operation, (max(burst, 1.0), now))
        left = min(left + (now - since) * rate, max(burst, 1.0))
        self._left[operation] = (left - 1 if left >= 1 else left, now)
        return left >= 1
