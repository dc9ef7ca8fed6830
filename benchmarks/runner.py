"""What all benchmarks share: repeated interleaved runs, medians, ratios within one run, tables, JSON.

Speeds of one machine drift by a tenth and more within minutes. So candidates and baselines take
turns in one run, and what is compared with a budget is the ratio of their medians.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import psutil

__all__ = [
    "BENCHMARKS",
    "SIZES",
    "Measurement",
    "Ratio",
    "cpu_s",
    "fresh_process",
    "main",
    "record",
    "result",
    "table",
    "take_turns",
]

BENCHMARKS = {
    "cold_epoch": "an epoch over the network, against a plain torch DataLoader with boto3 and OpenJPEG",
    "warm_epoch": "an epoch from the cache of encoded frames, against decoding alone",
    "decoded_epoch": "an epoch from the cache of decoded frames, against reading such files alone",
    "early_stop": "stopping a download where it is enough, against reading on and keeping the connection",
    "embedded_store": "import speed and server time a frame of the embedded store",
    "peers": "an epoch from the cache of decoded frames, against the caches of other projects",
    "catalog_scale": "reads of the embedded store with many image sets, against the same with few",
    "import_time": "import ahi_ml, over the bare interpreter",
}
SIZES = ("toy", "small", "full")

_PACKAGES = (
    "ahi_ml", "boto3", "botocore", "imagecodecs", "litdata", "monai", "mosaicml-streaming", "numpy", "pyarrow",
    "pycurl", "pydicom", "pylibjpeg-openjpeg", "torch", "uvicorn", "webdataset",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One quantity, measured a few times.

    Parameters
    ----------
    name, unit : str
        What was measured.
    values : sequence of float
        One a round.
    """

    name: str
    unit: str
    values: Sequence[float]

    @property
    def p50(self) -> float:
        """The median."""
        return float(np.percentile(self.values, 50))

    @property
    def p90(self) -> float:
        """The nine-in-ten value: of a speed, what nine in ten runs exceed."""
        return float(np.percentile(self.values, 10 if self.unit.endswith("/s") else 90))

    def to_dict(self) -> dict[str, Any]:
        """As it goes into the JSON."""
        rounded = [float(f"{value:.5g}") for value in self.values]
        p50, p90 = (float(f"{value:.5g}") for value in (self.p50, self.p90))
        return {
            "name": self.name,
            "unit": self.unit,
            "n": len(rounded),
            "p50": p50,
            "p90": p90,
            "values": rounded,
        }


@dataclass(frozen=True)
class Ratio:
    """Two medians of one run, one over the other, and what the project wants of it.

    Parameters
    ----------
    name : str
        What over what.
    value : float
        The ratio, or for a budget without a baseline the figure itself.
    at_least, at_most : float, optional
        The budget.
    """

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the budget is kept; None when there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        low = -np.inf if self.at_least is None else self.at_least
        high = np.inf if self.at_most is None else self.at_most
        return bool(low <= self.value <= high)

    def to_dict(self) -> dict[str, Any]:
        """As it goes into the JSON."""
        value = float(f"{self.value:.4g}")
        return {
            "name": self.name,
            "value": value,
            "at_least": self.at_least,
            "at_most": self.at_most,
            "met": self.met,
        }


def result(
    name: str,
    size: str,
    parameters: Mapping[str, Any],
    measurements: Sequence[Measurement],
    ratios: Sequence[Ratio],
) -> dict[str, Any]:
    """What a benchmark's ``run`` returns."""
    return {
        "benchmark": name,
        "size": size,
        "parameters": dict(parameters),
        "measurements": [each.to_dict() for each in measurements],
        "ratios": [each.to_dict() for each in ratios],
    }


def take_turns(works: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Run each work once a round, in turn, and gather what they return."""
    outcomes: dict[str, list[Any]] = {name: [] for name in works}
    for number in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            outcomes[name].append(work())
            took = time.perf_counter() - start
            print(f"round {number + 1} of {rounds}: {name}, {took:.1f} s in all", file=sys.stderr, flush=True)
    return outcomes


def fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module's function in a new interpreter: no threads, caches or sockets of earlier runs."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_platform_start_method) as pool:
        return pool.submit(function, *arguments).result()


def _platform_start_method() -> None:
    # A spawned process would spawn its own children too; a user's forks them where the platform does.
    multiprocessing.set_start_method(None, force=True)


def cpu_s(others: Iterable[psutil.Process] = ()) -> float:
    """User and system time of this process and of others, such as its workers."""
    return time.process_time() + sum(each.user + each.system for each in (other.cpu_times() for other in others))


def record(outcome: Mapping[str, Any], date: str | None = None) -> dict[str, Any]:
    """A result with where it was made: commit, versions, machine and date."""
    return {
        **outcome,
        "commit": _commit(),
        "date": date or datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpus": _cpus(),
            "cpu": _cpu_model(),
        },
    }


def _commit() -> str:
    folder = Path(__file__).resolve().parent
    asked = {
        "commit": ["git", "rev-parse", "--short=12", "HEAD"],
        "changes": ["git", "status", "--porcelain", "--", "../ahi_ml"],
    }
    try:
        said = {
            name: subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for name, command in asked.items()
        }
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said["commit"] + ("+changes" if said["changes"] else "")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(outcome: Mapping[str, Any]) -> str:
    """A result as plain text: measurements, then ratios beside their budgets."""
    width = max(len(each["name"]) for each in [*outcome["measurements"], *outcome["ratios"]])
    parameters = ", ".join(f"{name}={value}" for name, value in outcome["parameters"].items())
    lines = [f"{outcome['benchmark']} ({outcome['size']}): {parameters}", ""]
    lines.append(f"{'':{width}}  {'p50':>9}  {'p90':>9}  {'n':>3}")
    for each in outcome["measurements"]:
        p50, p90 = _figure(each["p50"]), _figure(each["p90"])
        lines.append(f"{each['name']:{width}}  {p50:>9}  {p90:>9}  {each['n']:>3}  {each['unit']}")
    lines += ["", f"{'':{width}}  {'value':>9}  {'budget':>9}"]
    for each in outcome["ratios"]:
        budget = ""
        if each["at_least"] is not None:
            budget = f">= {each['at_least']:g}"
        elif each["at_most"] is not None:
            budget = f"<= {each['at_most']:g}"
        verdict = {True: "met", False: "MISSED", None: ""}[each["met"]]
        lines.append(f"{each['name']:{width}}  {_figure(each['value']):>9}  {budget:>9}  {verdict}".rstrip())
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure ahi_ml beside its baselines.")
    parser.add_argument("name", nargs="?", choices=BENCHMARKS, help="which one; without it they are listed")
    parser.add_argument("--size", choices=SIZES, default="small", help="how much data (default: small)")
    parser.add_argument("--rounds", type=int, help="how often everything is repeated (default: by size)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--date", help="date to write down (default: today, UTC)")
    asked = parser.parse_args(arguments)
    if asked.name is None:
        width = max(map(len, BENCHMARKS))
        print("\n".join(f"{name:{width}}  {text}" for name, text in BENCHMARKS.items()))
        return 0
    outcome = record(importlib.import_module(f"benchmarks.{asked.name}").run(asked.size, asked.rounds), asked.date)
    print(table(outcome))
    print(
        f"\ncommit {outcome['commit']}, {outcome['date']}, {outcome['machine']['cpus']} x {outcome['machine']['cpu']}"
    )
    if asked.json:
        asked.json.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    return 0
