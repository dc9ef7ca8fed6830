"""Where the time of loading goes: counters that workers share, and the report made of them. Floor 6."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from ahi_ml.datasets.shared import SharedNumbers
from ahi_ml.types import AnyArray

__all__ = ["LoadingStats", "Meters", "Profile"]

_MOST_WORKERS = 32  # a dataset's pickle stays small; further ones share rows, and may miss each other's counts


@dataclass(frozen=True, slots=True)
class LoadingStats:
    """What loading took, of one process or of several together.

    Parameters
    ----------
    frames, batches : int
        Read and handed out.
    processes : int
        How many read: the main process, or DataLoader workers.
    elapsed_s : float
        From the first batch's request to the end, or until now.
    network_s : float
        Of which (of each process's, added up) the loop waited for frames that had not come from the data store.
    decode_s : float
        Of which it waited for frames that had come, or were cached, and were being decoded (or read, or converted).
    transform_s : float
        In the user's transform and target.
    collate_s : float
        In asking for frames, and making items and batches of them.
    read_busy_s, decode_busy_s, convert_busy_s : float
        Seconds of the decoding threads in cache files, in decoding and verifying, and in the conversion to what
        was asked for: there are as many in a second as `threads`.
    threads : int
        Decoding threads.
    hits, misses : int
        Frames from the cache, and from the data store.
    bytes_fetched : int
        Encoded bytes from the data store.
    verified, unverified : int
        Whether their pixels were compared with a checksum, now or when they were cached.
    refetched : int
        Frames fetched again since the first bytes were wrong.
    requests, retried, throttled : int
        Requests sent for frames; of which repeated; of which refused because of the account's rate.
    delayed_s : float
        Seconds that requests waited for the account's rate budget, summed over requests.
    skipped : int
        Frames that could not be read, and were replaced.
    """

    frames: int = 0
    batches: int = 0
    processes: int = 0
    elapsed_s: float = 0.0
    network_s: float = 0.0
    decode_s: float = 0.0
    transform_s: float = 0.0
    collate_s: float = 0.0
    read_busy_s: float = 0.0
    decode_busy_s: float = 0.0
    convert_busy_s: float = 0.0
    threads: int = 0
    hits: int = 0
    misses: int = 0
    bytes_fetched: int = 0
    verified: int = 0
    unverified: int = 0
    refetched: int = 0
    requests: int = 0
    retried: int = 0
    throttled: int = 0
    delayed_s: float = 0.0
    skipped: int = 0

    @property
    def consumer_s(self) -> float:
        """Seconds that were not the loader's: the loop's own work, such as training, or a worker's idle time."""
        own = self.network_s + self.decode_s + self.transform_s + self.collate_s
        return max(self.processes * self.elapsed_s - own, 0.0)

    @property
    def shares(self) -> dict[str, float]:
        """Parts of the elapsed time, adding up to 1: network, decode, transform, collate, consumer."""
        whole = self.processes * self.elapsed_s or 1.0
        names = ("network", "decode", "transform", "collate", "consumer")
        return {name: getattr(self, f"{name}_s") / whole for name in names}

    @property
    def advice(self) -> str:
        """What bounds the loop, and what to change."""
        if not self.frames:
            return "Nothing was read."
        shares = self.shares
        bound = max(shares, key=lambda name: shares[name])
        if bound == "network" and (self.throttled > 0.01 * self.requests or self.delayed_s > self.network_s):
            return (
                "The account's request rate bounds it: ask AWS for a higher quota of GetImageFrame (and say so with "
                "rate_limit=), or read from the cache (`ahi-ml fetch` fills it)."
            )
        if bound == "decode" and self.read_busy_s > self.decode_busy_s + self.convert_busy_s:
            bound = "read"
        return _ADVICE[bound]

    def __str__(self) -> str:
        shares = {name: f"{share:.0%}" for name, share in self.shares.items()}
        busy = self.read_busy_s + self.decode_busy_s + self.convert_busy_s
        speed = self.frames / self.elapsed_s if self.elapsed_s else 0.0
        return "\n".join(
            [
                f"{self.frames:,} frames in {self.batches:,} batches, {self.elapsed_s:.1f} s, {speed:,.0f} frames/s",
                f"waiting: network {shares['network']}, decode {shares['decode']}; "
                f"working: transform {shares['transform']}, collate {shares['collate']}; "
                f"the loop itself {shares['consumer']}",
                f"{self.threads} decoding threads: {busy / (self.threads * self.elapsed_s or 1.0):.0%} busy "
                f"(reading {self.read_busy_s:.1f} s, decoding {self.decode_busy_s:.1f} s, "
                f"converting {self.convert_busy_s:.1f} s)",
                f"cache: {self.hits:,} hits, {self.misses:,} misses ({self.bytes_fetched / 1e6:,.1f} MB fetched)",
                f"pixels: {self.verified:,} verified, {self.unverified:,} unverified; {self.refetched:,} fetched again",
                f"requests: {self.requests:,}, of which {self.retried:,} repeated, {self.throttled:,} throttled; "
                f"{self.skipped:,} frames skipped",
                self.advice,
            ]
        )


_ADVICE = {
    "network": (
        "The network bounds it: read from the cache (`ahi-ml fetch` fills it), keep more on the way (frames_ahead=, "
        "workers of a DataLoader), or fetch less (reduce=)."
    ),
    "decode": (
        "Decoding bounds it: keep decoded images (cache_decoded=True), read a lower resolution (reduce=1), or use more "
        "cores."
    ),
    "read": "Reading the cache's files bounds it: put it on a faster disk, or free memory for the system's file cache.",
    "transform": (
        "Your transform bounds it: it runs in the loop's thread. Use the package's pixel steps, which run in the "
        "decoding threads, or a torch DataLoader with workers."
    ),
    "collate": (
        "Making batches bounds it: let FrameLoader collate (no collate_fn of your own), with frames of one shape, or "
        "use larger batches."
    ),
    "consumer": "Your loop bounds it: frames are there before it asks for them.",
}
_NAMES = tuple(each.name for each in fields(LoadingStats))
_PLACES = {name: place for place, name in enumerate(_NAMES)}
_WHOLE = frozenset(each.name for each in fields(LoadingStats) if each.type == "int")


class Meters:
    """Counters of a dataset, a row for the main process and one for each DataLoader worker, in shared memory.

    A worker writes to its own row alone, so there is no lock.

    I/O: none.
    """

    def __init__(self) -> None:
        self._numbers = SharedNumbers(torch.zeros((1 + _MOST_WORKERS, len(_NAMES)), dtype=torch.float64))
        self._requests: tuple[int, dict[str, float]] = (0, {})

    @property
    def _row(self) -> AnyArray:
        worker = get_worker_info()
        row: AnyArray = self._numbers.array[0 if worker is None else 1 + worker.id % _MOST_WORKERS]
        return row

    def add(self, **amounts: float) -> None:
        """Add to the counts of this process. I/O: none."""
        row = self._row
        for name, amount in amounts.items():
            row[_PLACES[name]] += amount

    @property
    def counts_requests(self) -> bool:
        """Whether this process has told the counts of its requests yet."""
        return self._requests[0] == os.getpid()

    def add_requests(self, totals: Mapping[str, float]) -> None:
        """Add what these counts have grown by since they were last told here; the first time, nothing. I/O: none."""
        pid, before = self._requests
        if pid == os.getpid():
            row = self._row
            for name, total in totals.items():
                row[_PLACES[name]] += max(total - before[name], 0.0)
        self._requests = os.getpid(), dict(totals)

    def set_threads(self, threads: int) -> None:
        """Say how many decoding threads this process has. I/O: none."""
        self._row[_PLACES["threads"]] = threads

    def total(self, name: str) -> float:
        """A count of all processes. I/O: none."""
        return float(self._numbers.array[:, _PLACES[name]].sum())

    def read(self) -> AnyArray:
        """A copy of all rows. I/O: none."""
        rows: AnyArray = self._numbers.array.copy()
        return rows


@dataclass(eq=False)
class Profile:
    """The time that loading took while a ``with`` block ran.

    Parameters
    ----------
    meters : Meters
        Of the dataset.

    Attributes
    ----------
    workers : dict of int to LoadingStats
        By number of the DataLoader worker; -1 is the main process. Those that read nothing are left out.
    total : LoadingStats
        All of them together.
    """

    meters: Meters
    _before: AnyArray = field(init=False)
    _after: AnyArray | None = None
    _started: float = field(init=False)
    _elapsed_s: float | None = None

    def __post_init__(self) -> None:
        self._before, self._started = self.meters.read(), perf_counter()

    @classmethod
    @contextmanager
    def of(cls, meters: Meters) -> Iterator[Profile]:
        """Profile what runs inside. I/O: none."""
        profile = cls(meters)
        try:
            yield profile
        finally:
            profile.end()

    def end(self) -> None:
        """Count no further."""
        self._after, self._elapsed_s = self.meters.read(), perf_counter() - self._started

    @property
    def workers(self) -> dict[int, LoadingStats]:
        """See the class. I/O: none."""
        rows = (self.meters.read() if self._after is None else self._after) - self._before
        elapsed_s = perf_counter() - self._started if self._elapsed_s is None else self._elapsed_s
        used = np.flatnonzero(rows[:, _PLACES["frames"]])
        return {int(row) - 1: self._stats(rows[row], int(row), elapsed_s) for row in used}

    def _stats(self, row: AnyArray, number: int, elapsed_s: float) -> LoadingStats:
        values: dict[str, Any] = {
            name: int(value) if name in _WHOLE else float(value) for name, value in zip(_NAMES, row, strict=True)
        }
        threads = int((self.meters.read() if self._after is None else self._after)[number, _PLACES["threads"]])
        return LoadingStats(**{**values, "processes": 1, "threads": threads, "elapsed_s": elapsed_s})

    @property
    def total(self) -> LoadingStats:
        """See the class. I/O: none."""
        each = list(self.workers.values())
        added = LoadingStats(**{name: sum(getattr(one, name) for one in each) for name in _NAMES})
        return replace(added, elapsed_s=each[0].elapsed_s if each else 0.0)

    def __str__(self) -> str:
        workers = self.workers
        lines = [str(self.total)]
        if len(workers) > 1 or -1 not in workers:
            for number, stats in workers.items():
                shares = ", ".join(f"{name} {share:.0%}" for name, share in stats.shares.items())
                lines.append(
                    f"  {'main process' if number < 0 else f'worker {number}'}: {stats.frames:,} frames; {shares}"
                )
        return "\n".join(lines)
