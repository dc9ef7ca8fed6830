"""How fast requests may go: the account's budget, kept by all processes of a node together.

Each operation has a bucket of tokens, kept as the time at which the next request would be due if none had been saved
up (the generic cell rate algorithm). Requests get times, in order; whoever has one waits until then. So a killed
process takes along the few tokens it had, and nothing has to be given back. When the service throttles, the rate of
all halves and grows back slowly.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ahi_ml.client.failures import is_throttling
from ahi_ml.client.ledger import Ledger, Record, open_ledger
from ahi_ml.config import QUOTAS, Quota, node_share

__all__ = ["Counts", "Governor", "Pace"]

_LOG = logging.getLogger(__name__)
_PLACES = {operation: place for place, operation in enumerate(sorted(QUOTAS))}
_OF_BURST = 0.75  # the rest is for what differs in the ways of requests: the service counts when they arrive
_WINDOW_S = 1.0  # what is under way when the rate is halved was sent at the old rate, and is no reason to do it again
_RECOVERY_S = 120.0  # from nothing to the whole budget, so a minute from half of it
_LEAST = 1 / 64
_LONGEST_S = 600.0  # nobody queues for so long: such a record is damaged
_FRESH: Record = (0.0, 1.0, -math.inf)

_AHEAD_S = 0.05  # tokens for so long are taken at once
_MOST = 32
_KEPT_S = 1.0


@dataclass(slots=True)
class Counts:
    """What one operation has seen.

    Parameters
    ----------
    requests : int
        Sent.
    retried : int
        Of them, those that repeat one.
    throttled : int
        Answers that said: too many.
    delayed : int
        Requests that had to wait for the budget.
    wait_s : float
        How long, in seconds; the time of requests that a thread holds back together counts once.
    """

    requests: int = 0
    retried: int = 0
    throttled: int = 0
    delayed: int = 0
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Limit:
    rate: float
    tolerance: float  # seconds of the rate that may be saved up

    @classmethod
    def of(cls, quota: Quota, share: float) -> _Limit:
        rate, burst = (each * share for each in quota)
        return cls(rate, (max(burst * _OF_BURST, 1.0) - 1.0) / rate)


class Governor:
    """The budget of an account, as one connection sees it.

    I/O: none until a limited operation is used; then the small file of `ledger`.

    Parameters
    ----------
    limits : mapping of str to Quota, optional
        By operation, of the whole account; operations that are missing or infinite go as fast as they can.
    account : callable, optional
        Names whose budget it is, in a text that is hashed before it goes anywhere.
    folder : Path, optional
        Of the file.
    clock : callable
        Monotonic seconds, the same in all processes of the machine.
    """

    def __init__(
        self,
        limits: Mapping[str, Quota] | None = None,
        account: Callable[[], str] = str,
        *,
        folder: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        share = node_share()
        self._limits = {
            operation: _Limit.of(quota, share) for operation, quota in (limits or {}).items() if math.isfinite(quota[0])
        }
        self._account = account
        self._folder = folder
        self._clock = clock
        self._ledger: Ledger | None = None
        self._lock = threading.Lock()
        self._counts: dict[str, list[Counts]] = {}  # each pace counts for itself, without a lock
        self._of_client: dict[str, Counts] = {}

    def rate(self, operation: str) -> float:
        """Requests a second that this node may send, unless throttled; infinity without a limit. I/O: none."""
        limit = self._limits.get(operation)
        return math.inf if limit is None else limit.rate

    def reserve(self, operation: str, count: int, now: float) -> tuple[float, float] | None:
        """Take tokens.

        I/O: that of `Ledger.update`.

        Parameters
        ----------
        operation : str
            Which is limited.
        count : int
            How many.
        now : float
            By the clock.

        Returns
        -------
        tuple of float, or None
            When the first may be used (in the past when tokens were saved up), and how long each further one comes
            after that; None when nothing is limited.
        """
        limit = self._limits.get(operation)
        ledger = self._opened() if limit is not None else None
        if limit is None or ledger is None:
            return None
        rate, longest = limit.rate, now + limit.tolerance + _LONGEST_S

        def book(record: Record) -> Record:
            due, share, since = _sound(record, now, longest)
            return max(due, now) + count / (rate * _grown(share, since, now)), share, since

        due, share, since = ledger.update(_PLACES[operation], book)
        step = 1 / (rate * _grown(share, since, now))
        return due - count * step - limit.tolerance, step

    def cut(self, operation: str) -> None:
        """Halve the rate of an operation, unless that was done just now. I/O: that of `Ledger.update`."""
        limit = self._limits.get(operation)
        ledger = self._opened() if limit is not None else None
        if limit is None or ledger is None:
            return
        now = self._clock()
        longest = now + limit.tolerance + _LONGEST_S

        def halve(record: Record) -> Record:
            due, share, since = _sound(record, now, longest)
            if now - since < _WINDOW_S:
                return due, share, since
            # The service's bucket is empty: ours too.
            return max(due, now + limit.tolerance), max(_grown(share, since, now) / 2, _LEAST), now

        _, share, since = ledger.update(_PLACES[operation], halve)
        if since == now:
            _LOG.info("%s is throttled: at most %.3g requests a second from here", operation, limit.rate * share)

    def _opened(self) -> Ledger | None:
        if self._ledger is None:
            try:
                account = self._account()
            except Exception as error:  # of credentials: the request meets the same, and says so
                _LOG.debug("whose budget it is could not be told: %s", type(error).__name__)
                return None
            self._ledger = open_ledger(account, self._folder)
        return self._ledger

    def pace(self, operation: str) -> Pace:
        """Return what one thread asks before it sends requests of an operation. I/O: none."""
        pace = Pace(self, operation)
        with self._lock:
            self._counts.setdefault(operation, []).append(pace.counts)
        return pace

    def stats(self, operation: str) -> dict[str, float]:
        """Return the counts of an operation; see `Counts`. I/O: none."""
        with self._lock:
            counts = [self._of_client.get(operation, Counts()), *self._counts.get(operation, [])]
        each = [asdict(one) for one in counts]
        return {name: sum(one[name] for one in each) for name in each[0]}

    # Requests of a boto3 client

    def attend(self, events: Any) -> None:
        """Let a boto3 client's requests wait for their turn, each attempt of them. I/O: none."""
        events.register_first("request-created.medical-imaging", self._before)  # before it is signed: that ages
        events.register("response-received.medical-imaging", self._after)

    def again(self, operation: str) -> None:
        """Count a request that repeats another call of the client. I/O: none."""
        self._count(operation, retried=1)

    def _before(self, request: Any, operation_name: str, **_: Any) -> None:
        retries = request.context.get("retries") or {}
        self._count(operation_name, requests=1, retried=int(retries.get("attempt", 1) > 1))
        now = self._clock()
        slot = self.reserve(operation_name, 1, now)
        wait_s = slot[0] - now if slot is not None else 0.0
        if wait_s > 0:
            time.sleep(wait_s)
            self._count(operation_name, delayed=1, wait_s=wait_s)

    def _after(self, parsed_response: Any, event_name: str, **_: Any) -> None:
        answer = parsed_response or {}
        code = str(answer.get("Error", {}).get("Code", ""))
        if is_throttling(code, int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))):
            operation = event_name.rpartition(".")[2]
            self._count(operation, throttled=1)
            self.cut(operation)

    def _count(self, operation: str, **more: float) -> None:
        with self._lock:
            counts = self._of_client.setdefault(operation, Counts())
            for name, value in more.items():
                setattr(counts, name, getattr(counts, name) + value)


class Pace:
    """The turns of one thread's requests, with as few looks into the shared file as can be.

    It takes tokens for some 50 ms at once, by how fast it has used the last ones; those it has not used soon after
    they were due are void, or they would add to the burst. While tokens are scarce all take as many, and so get equal
    shares of the budget. Not thread-safe.

    Parameters
    ----------
    governor : Governor
        Of the connection.
    operation : str
        Of all its requests.
    """

    def __init__(self, governor: Governor, operation: str) -> None:
        self.counts = Counts()
        self._governor = governor
        self._operation = operation
        self._limited = governor.rate(operation) < math.inf
        self._most = min(_MOST, int(governor.rate(operation) * _AHEAD_S)) if self._limited else 0
        self._booked = self._void = self._next = -math.inf
        self._step = 0.0
        self._left = self._used = 0
        self._scarce = False
        self._held: float | None = None

    def due(self, wanted: int, now: float) -> float:
        """When the next request may be sent; not after `now` means at once. I/O: as `Governor.reserve`, at times.

        Parameters
        ----------
        wanted : int
            How many requests wait, this one included.
        now : float
            By the clock.
        """
        if not self._limited:
            return now
        if not self._left or now > self._void:
            self._book(wanted, now)
        if self._next > now and self._held is None:
            self._held = now
        return self._next

    def take(self, now: float) -> None:
        """Use the turn that is due. I/O: none."""
        self.counts.requests += 1
        if self._left:
            self._left -= 1
            self._used += 1
            self._next += self._step
            if self._held is not None:
                self.counts.delayed += 1
                self.counts.wait_s += now - self._held
                self._held = None

    def throttled(self) -> None:
        """Hear that the service has throttled a request. I/O: as `Governor.cut`."""
        self.counts.throttled += 1
        self._governor.cut(self._operation)

    def _book(self, wanted: int, now: float) -> None:
        lately = self._used / max(now - self._booked, 0.001)
        most = self._most if self._scarce and not self._left else min(self._most, int(lately * _AHEAD_S))
        count = max(1, min(wanted, most))
        slots = self._governor.reserve(self._operation, count, now)
        self._booked, self._used = now, 0
        if slots is None:
            self._left, self._next = 0, now
            return
        self._left = count
        self._next, self._step = slots
        last = self._next + (count - 1) * self._step
        self._scarce = last > now
        self._void = max(last, now) + _KEPT_S


def _sound(record: Record, now: float, longest: float) -> Record:
    """The record, or a fresh one for what is none: never written, damaged, of another boot."""
    due, share, since = record
    return record if 0 <= due <= longest and _LEAST <= share <= 1 and since <= now else _FRESH


def _grown(share: float, since: float, now: float) -> float:
    """The share of the budget that is used, some time after it was halved."""
    return min(1.0, share + (now - since) / _RECOVERY_S)
