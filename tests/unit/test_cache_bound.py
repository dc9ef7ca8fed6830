"""The bound of the frame cache: what is used longest ago goes, whoever writes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ahi_ml.cache import FrameCache, folder
from ahi_ml.errors import ConfigError

STORE = "0" * 32


def fill(cache: FrameCache, first: int, last: int, size: int = 1_000) -> None:
    for number in range(first, last):
        cache.put(STORE, f"{number:032x}", os.urandom(size), verified=True)


def age(cache: FrameCache, number: int, seconds: float) -> None:
    path = cache._path(STORE, f"{number:032x}")
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


def test_the_cache_stays_below_its_bound(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path / "cache", max_bytes=100_000)
    fill(cache, 0, 500)
    count, size = cache.size()
    assert size <= 100_000 * (1 + 1 / 32) + 1_100
    assert size >= 80_000, "eviction went further than it says"
    assert cache.stats()["evictions"] == 500 - count


def test_what_was_read_lately_stays(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path / "cache", max_bytes=100_000)
    fill(cache, 0, 80)
    for number in range(80):
        age(cache, number, 1_000 - number)
    for number in range(5):  # the oldest are read again, which makes them young
        assert cache.get(STORE, f"{number:032x}") is not None
    fill(cache, 80, 120)
    kept = [number for number in range(80) if cache.get(STORE, f"{number:032x}") is not None]
    assert kept[:5] == [0, 1, 2, 3, 4]
    assert 5 not in kept
    assert 79 in kept


def test_large_caches_are_bounded_folder_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_WHOLE_BELOW", 0)
    monkeypatch.setattr(folder, "_FOLDERS", 256)
    cache = FrameCache(tmp_path / "cache", max_bytes=256 * 3_300)
    fill(cache, 0, 3_000)
    per_folder = [sum(path.stat().st_size for path in each.iterdir()) for each in (tmp_path / "cache/frames").iterdir()]
    assert max(per_folder) <= 3_300 + 1_100
    assert cache.stats()["evictions"] > 1_000


def test_processes_share_the_bound(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom ahi_ml.cache import FrameCache\n"
        f"cache = FrameCache(Path({str(tmp_path / 'cache')!r}), max_bytes=200_000)\n"
        "for n in range(300): cache.put('0' * 32, f'{os.getpid():016x}{n:016x}', os.urandom(1000), verified=True)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    _, size = FrameCache(tmp_path / "cache").size()
    assert size <= 200_000 * (1 + 3 / 32) + 4_000


def test_the_bound_travels_and_must_make_sense(tmp_path: Path) -> None:
    cache = pickle.loads(pickle.dumps(FrameCache(tmp_path / "cache", max_bytes=7)))
    assert cache.max_bytes == 7
    with pytest.raises(ConfigError, match="cache=None"):
        FrameCache(tmp_path / "cache", max_bytes=0)
