"""A warm epoch: every frame from the cache of encoded frames on disk, through `FrameLoader`.

The baseline decodes the same frames from memory with OpenJPH on as many threads, straight into a
batch used over and over, and does nothing else; for float32 it converts as well. Epochs at lower
resolutions are compared with the full one, and with decoding alone at that resolution; those of unsigned frames
that use all 16 bits, which such a resolution overshoots, with their own full one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

import ahi_ml
from ahi_ml.cache import FrameCache
from benchmarks import floors
from benchmarks.data import Prepared, prepared_store
from benchmarks.runner import Measurement, Ratio, fresh_process, result, take_turns

__all__ = ["run"]


@dataclass(frozen=True)
class _Size:
    frames: int
    rounds: int
    batch_size: int
    repeat: int


_SIZES = {"toy": _Size(16, 2, 4, 1), "small": _Size(164, 7, 32, 3), "full": _Size(512, 9, 32, 3)}
_OUTPUTS = {"float32": "modality", "stored": "stored"}
_AT_LEAST = {1: 3.5, 2: 10.0}  # how much faster an epoch is so many resolution levels lower,
_AT_LEAST_UNSIGNED = {1: 2.9, 2: 7.5}  # and one of unsigned frames


def run(size: str = "small", rounds: int | None = None) -> dict[str, Any]:
    """Measure; see the module. `rounds` overrides how often everything is repeated."""
    asked = _SIZES[size]
    if rounds:
        asked = replace(asked, rounds=rounds)
    with prepared_store(asked.frames) as prepared:
        turns, threads = fresh_process(_take_turns, prepared, asked)
    with prepared_store(asked.frames, unsigned=True) as others:
        turns.update(fresh_process(_take_turns_unsigned, others, asked))
    done = prepared.frames * asked.repeat
    speeds = {name: Measurement(name, "frames/s", [done / wall for wall, _ in took]) for name, took in turns.items()}
    cpu = {
        name: Measurement(f"{name}, CPU", "ms/frame", [each / done * 1e3 for _, each in took])
        for name, took in turns.items()
    }
    ratios = [
        Ratio(
            "float32: FrameLoader / decode and convert", _over(speeds, "float32", "decode and convert"), at_least=0.93
        ),
        Ratio("stored: FrameLoader / decode", _over(speeds, "stored", "decode"), at_least=0.93),
        Ratio("stored: FrameLoader / decode and CRC", _over(speeds, "stored", "decode and CRC")),
        *(
            Ratio(f"{name}: reduce={level} / full", _over(speeds, name, _FULL, _at(level)), at_least=budget)
            for name, budgets in [
                *((name, _AT_LEAST) for name in _OUTPUTS),
                *((f"unsigned, {name}", _AT_LEAST_UNSIGNED) for name in _OUTPUTS),
            ]
            for level, budget in budgets.items()
        ),
        *(
            Ratio(f"stored: reduce={level} / decode, reduce={level}", _over(speeds, "stored", each, _at(level)))
            for level, each in ((level, f"decode, reduce={level}") for level in _AT_LEAST)
        ),
        Ratio("float32, CPU: decode and convert / FrameLoader", 1 / _over(cpu, "float32", "decode and convert")),
        Ratio("stored, CPU: decode / FrameLoader", 1 / _over(cpu, "stored", "decode")),
    ]
    parameters = {
        "frames": prepared.frames,
        "source": prepared.source,
        "batch_size": asked.batch_size,
        "rounds": asked.rounds,
        "epochs_a_round": asked.repeat,
        "threads": threads,
    }
    return result("warm_epoch", size, parameters, [*speeds.values(), *cpu.values()], ratios)


_FULL = "FrameLoader"


def _at(level: int) -> str:
    return f"{_FULL}, reduce={level}" if level else _FULL


def _over(measured: dict[str, Measurement], output: str, baseline: str, ours: str = _FULL) -> float:
    return measured[f"{output}: {ours}"].p50 / measured[f"{output}: {baseline}"].p50


def _take_turns(prepared: Prepared, asked: _Size) -> tuple[dict[str, list[tuple[float, float]]], int]:
    from ahi_ml.config import decode_threads

    threads = decode_threads()
    index = ahi_ml.DatasetIndex.load(prepared.index)
    cache = FrameCache(prepared.folder.parent / "cache")
    with ahi_ml.connect(prepared.folder, cache=cache.folder) as store:
        loaders = _loaders(store, index, cache, asked.batch_size)
        sources = index.sources()
        for loader in loaders.values():  # the first fills the cache; all make their buffers
            _epoch(loader)
        bodies, half, quarter = (
            [bytes(_entry(cache, store, source.frame_id, level)) for source in sources] * asked.repeat
            for level in (0, *_AT_LEAST)
        )
        shape = sources[0].profile.pixels.shape
        floating = np.zeros((asked.batch_size, *shape), np.float32)
        stored = np.zeros((asked.batch_size, *shape), np.int16)
        intercept = sources[0].profile.modality.intercept
        works = {
            **{name: partial(_epochs, loader, asked.repeat) for name, loader in loaders.items()},
            "float32: decode and convert": partial(floors.decode_all, bodies, floating, intercept, threads),
            "stored: decode": partial(floors.decode_all, bodies, stored, None, threads),
            "stored: decode and CRC": partial(floors.decode_all, bodies, stored, None, threads, verify=True),
            **{
                f"stored: decode, reduce={level}": partial(
                    floors.decode_all, parts, _smaller(stored, level), None, threads, skipped=level
                )
                for level, parts in zip(_AT_LEAST, (half, quarter), strict=True)
            },
        }
        outcomes = take_turns({name: partial(_with_cpu, work) for name, work in works.items()}, asked.rounds)
        if store.reader.stats()["fetched"] > len(sources):
            raise RuntimeError("a warm epoch went to the network")
    return outcomes, threads


def _take_turns_unsigned(prepared: Prepared, asked: _Size) -> dict[str, list[tuple[float, float]]]:
    cache = FrameCache(prepared.folder.parent / "cache")
    index = ahi_ml.DatasetIndex.load(prepared.index)
    with ahi_ml.connect(prepared.folder, cache=cache.folder) as store:
        loaders = _loaders(store, index, cache, asked.batch_size)
        for loader in loaders.values():
            _epoch(loader)
        works = {
            f"unsigned, {name}": partial(_with_cpu, partial(_epochs, loader, asked.repeat))
            for name, loader in loaders.items()
        }
        return take_turns(works, asked.rounds)


def _loaders(
    store: ahi_ml.DataStore, index: ahi_ml.DatasetIndex, cache: FrameCache, batch_size: int
) -> dict[str, ahi_ml.FrameLoader]:
    return {
        f"{name}: {_at(level)}": ahi_ml.FrameLoader(
            ahi_ml.FrameDataset(store, index, output=output, cache=cache, reduce=level), batch_size
        )
        for level in (0, *_AT_LEAST)  # full frames first: they are verified when they are cached
        for name, output in _OUTPUTS.items()
    }


def _smaller(batch: Any, level: int) -> Any:
    rows, columns = (-(-side >> level) for side in batch.shape[1:])
    return np.zeros((len(batch), rows, columns), batch.dtype)


def _entry(cache: FrameCache, store: ahi_ml.DataStore, frame_id: str, reduce: int) -> memoryview:
    entry = cache.get(store.datastore_id, frame_id, reduce)
    if entry is None:
        raise RuntimeError(f"frame {frame_id} is not in the cache after an epoch")
    return entry.data


def _with_cpu(work: Callable[[], float]) -> tuple[float, float]:
    """Seconds, and seconds of CPU: the second is the steadier one on a machine that others use too."""
    start = time.process_time()
    return work(), time.process_time() - start


def _epoch(loader: ahi_ml.FrameLoader) -> int:
    return sum(len(batch["image"]) for batch in loader)


def _epochs(loader: ahi_ml.FrameLoader, repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        _epoch(loader)
    return time.perf_counter() - start
