"""The embedded store: how fast it imports, and what a GetImageFrame costs its server.

Import: files a second of an import job, against reading with pydicom, encoding with OpenJPH, decoding
again and comparing, on as many threads and with nothing stored. Frames: CPU time of the server's
process a request, asked by a lean client with 16 and 32 requests in flight.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pydicom import dcmread

import ahi_ml
from ahi_ml.codec import HTJ2K_LOSSLESS_RPCL, PixelFormat, decode
from ahi_ml.codec.jpeg2000 import encode_htj2k
from benchmarks import floors
from benchmarks.data import make_slices
from benchmarks.runner import Measurement, Ratio, result, take_turns

__all__ = ["run"]

_IN_FLIGHT = (16, 32)
_LATENCIES_MS = (0, 30)
_BUDGET_MS = 0.3


@dataclass(frozen=True)
class _Size:
    frames: int
    rounds: int
    requests: int


_SIZES = {"toy": _Size(16, 1, 32), "small": _Size(164, 3, 1500), "full": _Size(512, 5, 4000)}


def run(size: str = "small", rounds: int | None = None) -> dict[str, Any]:
    """Measure; see the module. `rounds` overrides how often everything is repeated."""
    asked = _SIZES[size]
    if rounds:
        asked = replace(asked, rounds=rounds)
    with tempfile.TemporaryDirectory(prefix="ahi-ml-benchmark-") as name:
        work = Path(name)
        source = make_slices(work / "dicom", asked.frames)
        files = sorted((work / "dicom").iterdir())
        threads = os.cpu_count() or 1
        _work_alone(files[:4], threads)  # OpenJPH fills its tables
        seconds = take_turns(
            {"import": partial(_import, work), "work alone": partial(_work_alone, files, threads)}, asked.rounds
        )
        with _store(work / "store") as store:
            store.import_dicom(work / "dicom", progress=False)
            index = store.search().index()
            server = _server_cpu(work / "store", store, index, asked)
    speeds = {
        name: Measurement(name, "files/s", [asked.frames / each for each in took]) for name, took in seconds.items()
    }
    worst = max(measurement.p50 for measurement in server if "30 ms" not in measurement.name)
    ratios = [
        Ratio("import / work alone", speeds["import"].p50 / speeds["work alone"].p50, at_least=0.8),
        Ratio("server CPU a GetImageFrame, no latency, ms", worst, at_most=_BUDGET_MS),
        Ratio(
            "server CPU a GetImageFrame, 30 ms latency, ms",
            max(measurement.p50 for measurement in server if "30 ms" in measurement.name),
            at_most=_BUDGET_MS,
        ),
    ]
    parameters = {
        "files": asked.frames,
        "source": source,
        "rounds": asked.rounds,
        "threads": threads,
        "requests_a_round": asked.requests,
    }
    return result("embedded_store", size, parameters, [*speeds.values(), *server], ratios)


@contextmanager
def _store(folder: Path, faults: dict[str, Any] | None = None) -> Iterator[ahi_ml.DataStore]:
    with ahi_ml.connect(folder, cache=folder.parent / "no-cache", faults=faults) as store:
        store.progress = False
        yield store


def _import(work: Path) -> float:
    # A new folder each time, deleted at the end: some file systems look for long past inodes deleted just before.
    folder = Path(tempfile.mkdtemp(prefix="import-", dir=work)) / "store"
    with _store(folder) as store:
        start = time.perf_counter()
        report = store.import_dicom(work / "dicom", progress=False)
        took = time.perf_counter() - start
        server = _server(folder)
    if report.failed:
        raise RuntimeError(f"{len(report.failed)} files were not imported")
    server.wait(30)  # it ends by itself, and its CPU time is nobody else's
    return took


def _work_alone(files: list[Path], threads: int) -> float:
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        encoded = sum(pool.map(_encode, files))
        took = time.perf_counter() - start
    if not encoded:
        raise RuntimeError("nothing was encoded")
    return took


def _encode(path: Path) -> int:
    dataset = dcmread(path)
    image = dataset.pixel_array
    data = encode_htj2k(image)
    pixels = PixelFormat(*image.shape, bits_stored=dataset.BitsStored, signed=bool(dataset.PixelRepresentation))
    if not np.array_equal(decode(data, HTJ2K_LOSSLESS_RPCL, pixels), image):
        raise RuntimeError(f"{path.name} does not survive encoding")
    return len(data)


def _server(folder: Path) -> psutil.Process:
    return psutil.Process(json.loads((folder / "endpoint.json").read_text(encoding="utf-8"))["pid"])


def _server_cpu(folder: Path, plain: ahi_ml.DataStore, index: ahi_ml.DatasetIndex, asked: _Size) -> list[Measurement]:
    requests = floors.signed_requests(plain, index)
    requests = (requests * (asked.requests // len(requests) + 1))[: asked.requests]
    server = _server(folder)

    def one(in_flight: int, latency_ms: int) -> float:
        with _store(folder, {"latency_ms": latency_ms} if latency_ms else None):
            client = floors.LeanClient(in_flight)
            client.fetch(requests[:in_flight])
            before = server.cpu_times()
            client.fetch(requests)
            after = server.cpu_times()
            client.close()
        return max(after.user + after.system - before.user - before.system, 0.0) / len(requests) * 1e3

    works = {
        f"server CPU, {in_flight} in flight, {latency} ms latency": partial(one, in_flight, latency)
        for latency in _LATENCIES_MS
        for in_flight in _IN_FLIGHT
    }
    return [Measurement(name, "ms/request", took) for name, took in take_turns(works, asked.rounds).items()]
