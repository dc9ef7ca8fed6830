"""A warm epoch from a disk cache: stored values, batches of 32, beside other projects' caches.

`FrameLoader` from the cache of decoded frames, against LitData, MosaicML Streaming, MONAI's
PersistentDataset, torch's DataLoader over ``.npy`` files and WebDataset, each from its own format, uncompressed, in the
page cache, and at its fastest of several numbers of workers and of torch's threads. MONAI's CacheDataset is
shown too: it holds every frame in memory, so it is no disk cache and in no budget. The first round sweeps, the
others repeat what was fast. All must give the same pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

import ahi_ml
from ahi_ml.cache import FrameCache
from benchmarks.data import Prepared, prepared_store
from benchmarks.peer_loaders import PEERS, Column, Warm, Way, load, measure, write
from benchmarks.runner import Measurement, Ratio, fresh_process, result, take_turns

__all__ = ["run"]

_OURS = "FrameLoader"
_SHARDS = 8
_REPEATED = 2  # ways of a peer, after the sweep
_BUDGETED = (
    "LitData",
    "MosaicML Streaming",
    "MONAI PersistentDataset",
    "DataLoader over .npy",
    "DataLoader over .npy, mapped",
)
_AT_LEAST = 3.0


@dataclass(frozen=True)
class _Size:
    frames: int
    rounds: int
    batch_size: int
    workers: tuple[int, ...]
    threads: tuple[int | None, ...]  # of torch, without workers
    epochs: int


_SIZES = {
    "toy": _Size(16, 1, 4, (0, 2), (1,), 2),
    "small": _Size(256, 3, 32, (0, 2), (None, 1), 8),
    "full": _Size(1024, 7, 32, (0, 2, 4), (None, 1), 4),
}


def run(size: str = "small", rounds: int | None = None) -> dict[str, Any]:
    """Measure; see the module. `rounds` overrides how often everything is repeated."""
    asked = _SIZES[size]
    if rounds:
        asked = replace(asked, rounds=rounds)
    absent = [name for name, peer in PEERS.items() if not peer.installed]
    if absent:
        print(f"not installed, and left out: {', '.join(absent)}; see benchmarks/README.md", file=sys.stderr)
    with prepared_store(asked.frames) as prepared:
        files = fresh_process(_write_npy, prepared)
        works = {_OURS: partial(fresh_process, _frame_loader, prepared, asked.batch_size, asked.epochs)}
        peers: dict[str, list[str]] = {}
        for number, (name, peer) in enumerate(PEERS.items()):
            if not peer.installed:
                continue
            folder = prepared.folder.parent / f"peer-{number}"
            fresh_process(write, name, folder, files, max(1, asked.frames // _SHARDS))
            ways = {_title(name, way, asked): way for way in _ways(asked, peer.halves)}
            peers[name] = list(ways)
            for title, way in ways.items():
                works[title] = partial(fresh_process, load, name, folder, files, way, asked.epochs)
        outcomes: dict[str, list[Warm]] = take_turns(works, 1)
        if asked.rounds > 1:
            again = [_OURS, *(title for titles in peers.values() for title in _fastest(titles, outcomes)[:_REPEATED])]
            more = take_turns({title: works[title] for title in again}, asked.rounds - 1)
            outcomes = {title: [*first, *more.get(title, ())] for title, first in outcomes.items()}
    if len({(warm.frames, warm.checksum) for each in outcomes.values() for warm in each}) != 1:
        raise RuntimeError("not all loaders give the same pixels")
    parameters = {
        "frames": prepared.frames,
        "source": prepared.source,
        "batch_size": asked.batch_size,
        "rounds": asked.rounds,
        "epochs_a_round": asked.epochs,
        "absent": absent,
    }
    return result("peers", size, parameters, *_summary(outcomes, peers))


@contextmanager
def _opened(prepared: Prepared, batch_size: int) -> Iterator[tuple[ahi_ml.DataStore, Column]]:
    cache = FrameCache(prepared.folder.parent / "cache")
    with ahi_ml.connect(prepared.folder, cache=cache.folder) as store:
        index = ahi_ml.DatasetIndex.load(prepared.index)
        dataset = ahi_ml.FrameDataset(store, index, output="stored", cache=cache, cache_decoded=True)
        yield store, Column(ahi_ml.FrameLoader(dataset, batch_size), "image")


def _write_npy(prepared: Prepared) -> list[str]:
    """Decode all frames into the cache of decoded frames and into files, in order."""
    folder = prepared.folder.parent / "npy"
    folder.mkdir()
    files: list[str] = []
    with _opened(prepared, 32) as (_, batches):
        for image in (image for batch in batches for image in batch):
            files.append(f"{folder}/{len(files):06}.npy")
            np.save(files[-1], image.numpy())
    return files


def _frame_loader(prepared: Prepared, batch_size: int, epochs: int) -> Warm:
    with _opened(prepared, batch_size) as (store, batches):
        warm = measure(batches, epochs)
        if store.cache.stats()["derived_misses"]:
            raise RuntimeError("a warm epoch did not find its frames decoded")
        return warm


def _ways(asked: _Size, halves: bool) -> list[Way]:
    # Without workers torch copies a batch on all of its threads, which wait actively: one may be faster. With
    # workers each has one.
    sizes = (asked.batch_size, asked.batch_size // 2) if halves else (asked.batch_size,)
    return [
        Way(batch_size, workers, threads)
        for batch_size in sizes
        for workers in asked.workers
        for threads in ((None,) if workers else asked.threads)
    ]


def _title(name: str, way: Way, asked: _Size) -> str:
    batches = "" if way.batch_size == asked.batch_size else f", batches of {way.batch_size}"
    threads = f", {way.threads} thread" if way.threads else ""
    return f"{name}: {way.workers} workers{threads}{batches}"


def _fastest(titles: list[str], outcomes: dict[str, list[Warm]]) -> list[str]:
    return sorted(titles, key=lambda title: outcomes[title][0].seconds)


def _summary(outcomes: dict[str, list[Warm]], peers: dict[str, list[str]]) -> tuple[list[Measurement], list[Ratio]]:
    speeds = {
        title: Measurement(title, "frames/s", [warm.frames / warm.seconds for warm in each])
        for title, each in outcomes.items()
    }
    cpu = {
        title: Measurement(f"{title}, CPU", "ms/frame", [warm.cpu_ms for warm in each])
        for title, each in outcomes.items()
    }
    # In doubt against the package: a way counts even when only the sweep has tried it.
    best = {name: max(speeds[title].p50 for title in titles) for name, titles in peers.items()}
    least = {name: min(cpu[title].p50 for title in titles) for name, titles in peers.items()}
    ours = speeds[_OURS].p50
    judged = [name for name in _BUDGETED if name in peers]
    budget = _AT_LEAST if len(judged) == len(_BUDGETED) else None  # of some of them it would say nothing
    ratios = [
        Ratio("FrameLoader / best of the disk caches in the budget", ours / max(best[name] for name in judged), budget),
        *(Ratio(f"FrameLoader / {name}", ours / speed) for name, speed in best.items()),
        *(Ratio(f"CPU: {name} / FrameLoader", each / cpu[_OURS].p50) for name, each in least.items()),
    ]
    return [*speeds.values(), *cpu.values()], ratios
