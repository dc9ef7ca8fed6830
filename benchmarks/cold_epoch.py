"""A cold epoch: every frame over the network, 30 ms away, the server on the same cores.

`FrameLoader`, and torch's DataLoader over `FrameDataset`, against the plain DataLoader of
`loaders.PlainDataset` at its best number of workers. The package's own ways verify every frame; the
plain one does not. The first round sweeps the numbers of workers, the others repeat what the ratios
are made of.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ahi_ml
from benchmarks import floors
from benchmarks.data import prepared_store
from benchmarks.loaders import Asked, Epochs, frame_loader, plain_loader, torch_loader
from benchmarks.runner import Measurement, Ratio, fresh_process, result, take_turns

__all__ = ["run"]

_LATENCY_MS = 30.0
_IN_FLIGHT = 48


@dataclass(frozen=True)
class _Size:
    frames: int
    rounds: int
    batch_size: int
    torch_workers: tuple[int, ...]
    plain_workers: tuple[int, ...]
    repeat: int  # of the package's own second epoch, which is short


_SIZES = {
    "toy": _Size(16, 1, 4, (0, 2), (0, 2), 1),
    "small": _Size(164, 2, 32, (0, 2, 4), (0, 2, 8), 4),
    "full": _Size(512, 4, 32, (0, 2, 4), (0, 2, 4, 8, 16), 2),
}


def run(size: str = "small", rounds: int | None = None) -> dict[str, Any]:
    """Measure; see the module. `rounds` overrides how often everything is repeated."""
    asked = _SIZES[size]
    if rounds:
        asked = replace(asked, rounds=rounds)
    with prepared_store(asked.frames) as prepared:
        faults = {"latency_ms": _LATENCY_MS}
        with ahi_ml.connect(prepared.folder, cache=prepared.folder.parent / "no-cache", faults=faults):
            own = Asked(prepared.folder, prepared.index, asked.batch_size, asked.repeat)
            works = {"FrameLoader": partial(fresh_process, frame_loader, own)}
            for workers in asked.torch_workers:
                works[f"DataLoader({workers}), FrameDataset"] = partial(fresh_process, torch_loader, own, workers)
            for workers in asked.plain_workers:
                plain = replace(own, repeat=min(workers, 1))
                works[_plain(workers)] = partial(fresh_process, plain_loader, plain, workers)
            outcomes: dict[str, list[Epochs]] = take_turns(works, 1)
            if asked.rounds > 1:
                again = _that_matter(outcomes)
                more = take_turns({name: works[name] for name in again}, asked.rounds - 1)
                outcomes = {name: [*first, *more.get(name, ())] for name, first in outcomes.items()}
            floor = [fresh_process(_floor, prepared.folder, prepared.index) for _ in range(asked.rounds)]
    checksums = {epochs.checksum for each in outcomes.values() for epochs in each}
    if len(checksums) != 1:
        raise RuntimeError("not all loaders give the same pixels")
    parameters = {
        "frames": prepared.frames,
        "source": prepared.source,
        "latency_ms": _LATENCY_MS,
        "batch_size": asked.batch_size,
        "rounds": asked.rounds,
        "in_flight_floor": _IN_FLIGHT,
    }
    return result("cold_epoch", size, parameters, *_summary(outcomes, floor))


def _that_matter(outcomes: dict[str, list[Epochs]]) -> list[str]:
    """After a sweep: what the ratios are made of, fastest plain and fastest torch loader among them."""

    def fastest(kind: str) -> str:
        return min((name for name in outcomes if kind in name), key=lambda name: outcomes[name][0].second_s)

    return list(dict.fromkeys(["FrameLoader", fastest("plain"), fastest("FrameDataset"), _plain(2)]))


def _plain(workers: int) -> str:
    return f"plain DataLoader({workers})"


def _floor(folder: Any, path: Any) -> dict[str, float]:
    """CPU milliseconds of each step alone."""
    index = ahi_ml.DatasetIndex.load(path)
    with ahi_ml.connect(folder, cache=folder.parent / "no-cache") as store:
        requests = floors.signed_requests(store, index)
        client = floors.LeanClient(_IN_FLIGHT)
        client.fetch(requests[:_IN_FLIGHT])
        start = time.process_time()
        bodies = client.fetch(requests)
        request = (time.process_time() - start) / len(requests) * 1e3
        client.close()
    return {"request": request, **floors.convert_cpu_ms(bodies, index.profile(0).modality.intercept)}


def _summary(outcomes: dict[str, list[Epochs]], floor: list[dict[str, float]]) -> tuple[list[Measurement], list[Ratio]]:
    def each(name: str, title: str, unit: str, value: Any) -> Measurement:
        return Measurement(f"{name}: {title}", unit, [value(epochs) for epochs in outcomes[name]])

    first = {name: each(name, "first epoch", "frames/s", lambda e: e.frames / e.first_s) for name in outcomes}
    running = {name: each(name, "running", "frames/s", lambda e: e.frames / e.second_s) for name in outcomes}
    cpu = {name: each(name, "client CPU", "ms/frame", lambda e: e.cpu_ms) for name in outcomes}
    begin = each("FrameLoader", "first batch", "ms", lambda e: e.first_batch_s * 1e3)
    steps = [Measurement(f"floor: {name}", "ms CPU/frame", [turn[name] for turn in floor]) for name in floor[0]]

    most = len(outcomes["FrameLoader"])
    # In doubt against the package: any plain loader counts, of its own only what held up when repeated.
    plain = [name for name in outcomes if name.startswith("plain")]
    torch = [name for name in outcomes if name.endswith("FrameDataset") and len(outcomes[name]) == most]
    best_first = max(first[name].p50 for name in plain)
    best = max(running[name].p50 for name in plain)
    ours = running["FrameLoader"].p50
    best_torch = max(running[name].p50 for name in torch)
    least = sum(step.p50 for step in steps)
    ratios = [
        Ratio("first epoch: FrameLoader / best plain", first["FrameLoader"].p50 / best_first, at_least=4),
        Ratio("first epoch: FrameLoader / plain(2)", first["FrameLoader"].p50 / first[_plain(2)].p50, at_least=15),
        Ratio("running: FrameLoader / best plain", ours / best, at_least=4),
        Ratio("running: FrameLoader / plain(2)", ours / running[_plain(2)].p50, at_least=15),
        Ratio("running: best DataLoader over FrameDataset / it", best_torch / ours, at_least=0.65),
        Ratio("client CPU: FrameLoader / floor", cpu["FrameLoader"].p50 / least, at_most=1.15),
        Ratio("first batch, ms", begin.p50, at_most=100 + _LATENCY_MS),
    ]  # fmt: skip
    return [*first.values(), *running.values(), *cpu.values(), begin, *steps], ratios
