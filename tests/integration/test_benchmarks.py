"""Every benchmark runs at toy size and says what it measured; how fast is not asked here."""

from __future__ import annotations

import importlib
import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

MEASURED = {
    "cold_epoch": {
        "FrameLoader: running": "frames/s",
        "plain DataLoader(2): first epoch": "frames/s",
        "FrameLoader: client CPU": "ms/frame",
        "floor: decode": "ms CPU/frame",
    },
    "warm_epoch": {
        "float32: FrameLoader": "frames/s",
        "float32: decode and convert": "frames/s",
        "unsigned, stored: FrameLoader, reduce=2": "frames/s",
    },
    "embedded_store": {"import": "files/s", "server CPU, 32 in flight, 0 ms latency": "ms/request"},
    "decoded_epoch": {"FrameLoader": "frames/s", "open and preadv": "frames/s"},
    "early_stop": {"drain, 1 MiB saved": "ms/frame", "stop, 1 MiB saved": "ms/frame"},
    "peers": {"FrameLoader": "frames/s", "DataLoader over .npy: 2 workers, CPU": "ms/frame"},
    "catalog_scale": {"GetImageSet, few": "ms, p50 of a round", "GetImageSet, many": "ms, p50 of a round"},
    "import_time": {"import ahi_ml, over it": "s"},
}
BUDGETS = {
    "cold_epoch": 7,
    "warm_epoch": 10,
    "embedded_store": 3,
    "decoded_epoch": 1,
    "early_stop": 3,
    # Judged beside all of them only; without them it measures itself and torch's DataLoader.
    "peers": int(all(map(find_spec, ("litdata", "monai", "streaming", "webdataset")))),
    "catalog_scale": 8,
    "import_time": 1,
}


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("psutil")
    monkeypatch.syspath_prepend(ROOT)  # the wheel leaves them out; spawned processes inherit the path


def _check(outcome: dict[str, Any], name: str) -> None:
    assert outcome["benchmark"] == name
    assert outcome["size"] == "toy"
    units = {each["name"]: each["unit"] for each in outcome["measurements"]}
    assert len(units) == len(outcome["measurements"]), "two measurements of one name"
    assert MEASURED[name].items() <= units.items()
    for each in outcome["measurements"]:
        assert each["n"] == len(each["values"]) >= 1
        assert all(math.isfinite(value) for value in (each["p50"], each["p90"], *each["values"])), each["name"]
    for each in outcome["ratios"]:
        assert math.isfinite(each["value"]), each["name"]
        assert each["at_least"] is None or each["at_most"] is None
        assert (each["met"] is None) == (each["at_least"] is None and each["at_most"] is None)
    assert sum(each["met"] is not None for each in outcome["ratios"]) == BUDGETS[name]


@pytest.mark.parametrize("name", MEASURED)
def test_a_benchmark_says_what_it_measured(name: str) -> None:
    outcome = importlib.import_module(f"benchmarks.{name}").run("toy")

    _check(outcome, name)
    assert "/" not in json.dumps(outcome["parameters"]), "a path in the parameters"


def test_the_fastest_disk_cache_is_the_one_to_beat() -> None:
    peers = importlib.import_module("benchmarks.peers")
    loaders = importlib.import_module("benchmarks.peer_loaders")
    speeds = {"LitData": (40, 50), "MONAI CacheDataset, in memory": (900,), "WebDataset": (80,)}
    speeds |= {name: (10, 20) for name in loaders.PEERS if name not in speeds}
    ways = {name: [f"{name}: way {number}" for number in range(len(each))] for name, each in speeds.items()}
    outcomes = {
        way: [loaders.Warm(1 / speed, 1.0, 1, 0)]
        for name, each in speeds.items()
        for way, speed in zip(ways[name], each, strict=True)
    }
    outcomes["FrameLoader"] = [loaders.Warm(1 / 100, 0.5, 1, 0)]

    _, ratios = peers._summary(outcomes, ways)
    _, without = peers._summary(outcomes, {name: each for name, each in ways.items() if name != "LitData"})

    assert (ratios[0].value, ratios[0].at_least, ratios[0].met) == (pytest.approx(2.0), 3, False)
    assert (without[0].value, without[0].met) == (pytest.approx(5.0), None)
    assert {each.name: each.value for each in ratios}["FrameLoader / WebDataset"] == pytest.approx(1.25)


def test_all_benchmarks_are_listed_and_tested(capsys: pytest.CaptureFixture[str]) -> None:
    runner = importlib.import_module("benchmarks.runner")

    assert runner.main([]) == 0

    listed = capsys.readouterr().out
    assert set(runner.BENCHMARKS) == set(MEASURED)
    assert all(name in listed for name in MEASURED)


def test_the_command_writes_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = importlib.import_module("benchmarks.runner")
    target = tmp_path / "result.json"

    assert runner.main(["import_time", "--size", "toy", "--json", str(target), "--date", "2024-01-01"]) == 0

    written = json.loads(target.read_text(encoding="utf-8"))
    _check(written, "import_time")
    assert written["date"] == "2024-01-01"
    assert {"commit", "versions", "machine", "parameters"} <= written.keys()
    assert written["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    printed = capsys.readouterr().out
    assert all(each["name"] in printed for each in [*written["measurements"], *written["ratios"]])


def test_slices_are_distinct_and_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pydicom

    data = importlib.import_module("benchmarks.data")
    monkeypatch.setenv("AHI_ML_TEST_DATA", str(tmp_path / "absent"))

    assert data.make_slices(tmp_path / "one", 43) == "phantom"
    assert data.make_slices(tmp_path / "two", 43) == "phantom"

    one, two = ([pydicom.dcmread(path) for path in sorted((tmp_path / name).iterdir())] for name in ("one", "two"))
    assert len({slice_.SOPInstanceUID for slice_ in one}) == 43
    assert len({slice_.PixelData for slice_ in one}) == 43
    assert len({slice_.SeriesInstanceUID for slice_ in one}) == 2
    assert [slice_.PixelData for slice_ in one] == [slice_.PixelData for slice_ in two]
    assert [slice_.SOPInstanceUID for slice_ in one] == [slice_.SOPInstanceUID for slice_ in two]
