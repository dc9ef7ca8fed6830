"""A warm epoch from the cache of decoded frames: stored values, batches of 32, through `FrameLoader`.

The baseline opens a file a frame and reads it with one `preadv` into the rows of batches used over
and over, on as many threads, a whole batch on each, and does nothing else.
"""

from __future__ import annotations

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import ahi_ml
from ahi_ml.cache import FrameCache
from benchmarks.data import Prepared, prepared_store
from benchmarks.runner import Measurement, Ratio, fresh_process, result, take_turns

__all__ = ["run"]

_HEAD = 64


@dataclass(frozen=True)
class _Size:
    frames: int
    rounds: int
    batch_size: int
    repeat: int


_SIZES = {"toy": _Size(16, 2, 4, 1), "small": _Size(164, 7, 32, 6), "full": _Size(512, 9, 32, 6)}


def run(size: str = "small", rounds: int | None = None) -> dict[str, Any]:
    """Measure; see the module. `rounds` overrides how often everything is repeated."""
    asked = _SIZES[size]
    if rounds:
        asked = replace(asked, rounds=rounds)
    with prepared_store(asked.frames) as prepared:
        turns, threads = fresh_process(_take_turns, prepared, asked)
    done = prepared.frames * asked.repeat
    speeds = {name: Measurement(name, "frames/s", [done / wall for wall in took]) for name, took in turns.items()}
    ratio = speeds["FrameLoader"].p50 / speeds["open and preadv"].p50
    parameters = {
        "frames": prepared.frames,
        "source": prepared.source,
        "batch_size": asked.batch_size,
        "rounds": asked.rounds,
        "epochs_a_round": asked.repeat,
        "threads": threads,
    }
    budget = Ratio("FrameLoader / open and preadv", ratio, at_least=0.85)
    return result("decoded_epoch", size, parameters, list(speeds.values()), [budget])


def _take_turns(prepared: Prepared, asked: _Size) -> tuple[dict[str, list[float]], int]:
    from ahi_ml.config import decode_threads

    threads = decode_threads()
    index = ahi_ml.DatasetIndex.load(prepared.index)
    work = prepared.folder.parent
    cache = FrameCache(work / "cache")
    with ahi_ml.connect(prepared.folder, cache=cache.folder) as store:
        dataset = ahi_ml.FrameDataset(store, index, output="stored", cache=cache, cache_decoded=True)
        loader = ahi_ml.FrameLoader(dataset, asked.batch_size)
        frames = np.concatenate([batch["image"].numpy()[:, 0] for batch in loader])
        _epochs(loader, 2)  # the first looks at every checksum, the second makes the buffers
        files = _write(work / "plain", frames)
        batch = np.zeros((2 * threads, asked.batch_size, *frames.shape[1:]), frames.dtype)
        works = {
            "FrameLoader": partial(_epochs, loader, asked.repeat),
            "open and preadv": partial(_read_all, files * asked.repeat, batch, threads),
        }
        outcomes = take_turns(works, asked.rounds)
        if store.cache.stats()["derived_misses"] > len(index):
            raise RuntimeError("a warm epoch did not find what it had made")
    return outcomes, threads


def _write(folder: Path, frames: Any) -> list[str]:
    folder.mkdir()
    files = []
    for number, frame in enumerate(frames):
        path = folder / f"{number:06}"
        path.write_bytes(bytes(_HEAD) + frame.tobytes())
        files.append(os.fspath(path))
    return files


def _read_all(files: list[str], batches: Any, threads: int) -> float:
    """Seconds for reading files into batches, a batch at a time on each thread."""
    size = batches.shape[1]

    def read(number: int) -> None:
        head, rows = bytearray(_HEAD), batches[number % len(batches)]
        for path, row in zip(files[number * size : (number + 1) * size], rows, strict=False):
            descriptor = os.open(path, os.O_RDONLY)
            os.preadv(descriptor, (head, row), 0)
            os.close(descriptor)

    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        for _ in pool.map(read, range(-(-len(files) // size))):
            pass
        return time.perf_counter() - start


def _epochs(loader: ahi_ml.FrameLoader, repeat: int) -> float:
    start = time.perf_counter()
    for _ in itertools.chain.from_iterable(loader for _ in range(repeat)):
        pass
    return time.perf_counter() - start
