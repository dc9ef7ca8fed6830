"""``import ahi_ml`` in a new interpreter, over an interpreter that imports nothing.

Public names load on first use, so what some of them cost is measured beside it, without a budget.
"""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runner import Measurement, Ratio, result, take_turns

__all__ = ["run"]

_ROUNDS = {"toy": 1, "small": 7, "full": 11}
_BUDGET_S = 0.1
_CODE = {
    "bare interpreter": "pass",
    "import ahi_ml": "import ahi_ml",
    "import ahi_ml; ahi_ml.connect": "import ahi_ml; ahi_ml.connect",
    "import ahi_ml; ahi_ml.FrameLoader": "import ahi_ml; ahi_ml.FrameLoader",
    "import torch": "import torch",
}


def run(size: str = "small", rounds: int | None = None) -> dict[str, Any]:
    """Measure; see the module. `rounds` overrides how often everything is repeated."""
    rounds = rounds or _ROUNDS[size]
    works = {name: partial(_seconds, code) for name, code in _CODE.items()}
    for work in works.values():  # compiles what is not compiled yet
        work()
    took = take_turns(works, rounds)
    bare = np.array(took["bare interpreter"])
    measurements = [Measurement("bare interpreter", "s", list(bare))]
    measurements += [
        Measurement(f"{name}, over it", "s", list(np.array(seconds) - bare))
        for name, seconds in took.items()
        if name != "bare interpreter"
    ]
    ratios = [Ratio("import ahi_ml over the bare interpreter, s", measurements[1].p50, at_most=_BUDGET_S)]
    return result("import_time", size, {"rounds": rounds}, measurements, ratios)


def _seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])
    return time.perf_counter() - start
