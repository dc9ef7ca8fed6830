"""The bound of the frame cache: what is used longest ago goes, whoever writes."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ahi_ml.cache import FrameCache, eviction
from ahi_ml.cache.bound import MOST_BYTES, Watch, default_bound
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


def test_what_is_read_all_the_time_stays_though_the_cache_turns_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FrameCache(tmp_path / "cache", max_bytes=100_000)
    fill(cache, 0, 80)
    for _ in range(5):  # mapped by then
        assert cache.get(STORE, f"{0:032x}") is not None
    age(cache, 0, 900)  # a quarter of an hour goes by
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 900)
    for number in range(1, 80):
        age(cache, number, 450)
    assert cache.get(STORE, f"{0:032x}") is not None
    fill(cache, 80, 120)
    assert cache.has(STORE, f"{0:032x}")
    assert cache.stats()["evictions"] > 10


def test_large_frames_stay_in_a_cache_that_is_not_full(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path / "cache", max_bytes=4 * 10**9)
    fill(cache, 0, 5, 15_000_000)  # each about as much as one folder's share
    assert cache.size()[0] == 5
    assert cache.stats()["evictions"] == 0


class Holes:
    """Entries of any size that take no space, and what is there."""

    def __init__(self, folder: Path) -> None:
        self.entries = f"{folder}{os.sep}"
        self._names = random.Random(1)

    def add(self, size: int, name: str = "") -> None:
        name = name or f"{self._names.getrandbits(128):032x}"
        os.makedirs(f"{self.entries}{name[:2]}", exist_ok=True)
        with open(f"{self.entries}{name[:2]}/{name[2:]}", "wb") as file:
            file.truncate(size)

    def total(self) -> int:
        return sum(found.size for each in os.listdir(self.entries) for found in eviction.found_in(self.entries + each))


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were listed."""
    folders: list[str] = []
    found_in = eviction.found_in

    def noted(folder: str) -> Iterator[eviction.Found]:
        folders.append(folder)
        return found_in(folder)

    monkeypatch.setattr(eviction, "found_in", noted)
    return folders


SIZES = {
    "equal, large": [40_000_000],
    "equal, small": [10_000],
    "of every kind": [20_000, 20_000, 20_000, 20_000, 150_000, 500_000, 500_000, 2_000_000, 8_000_000, 50_000_000],
    "many small, few large": [10_000] * 200 + [20_000_000],
}


class TestAnySizes:
    """A bound must hold, and hold nothing back, whatever the sizes of entries."""

    @pytest.fixture(params=SIZES.values(), ids=SIZES.keys())
    def sizes(self, request: pytest.FixtureRequest) -> list[int]:
        return list(request.param)

    @staticmethod
    def bound(sizes: list[int]) -> int:
        """Of so many entries as are quickly made."""
        return min(10**10, 6_000 * sum(sizes) // len(sizes))

    def test_nothing_goes_before_it_is_full(self, tmp_path: Path, sizes: list[int]) -> None:
        holes, bound, chance, held = Holes(tmp_path), self.bound(sizes), random.Random(2), 0
        watch = Watch(holes.entries, bound)
        while held < 0.8 * bound:
            size = chance.choice(sizes)
            holes.add(size)
            held += size
            assert not watch.wrote(size)

    def test_several_writers_stay_below_it(self, tmp_path: Path, sizes: list[int]) -> None:
        holes, bound, chance, written = Holes(tmp_path), self.bound(sizes), random.Random(2), 0
        watches = [Watch(holes.entries, bound) for _ in range(2)]
        fullest = 0
        for turn in range(100_000):
            size = chance.choice(sizes)
            holes.add(size)
            watches[turn % 2].wrote(size)
            written += size
            if turn % 400 == 0:
                fullest = max(fullest, holes.total())
            if written > 1.6 * bound:
                break
        assert fullest <= bound
        assert holes.total() > 0.82 * bound, "no more goes than must"

    def test_a_look_is_at_few_folders_when_entries_are_many(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked: list[str]
    ) -> None:
        holes = Holes(tmp_path)
        for _ in range(10_000):
            holes.add(10_000)
        monkeypatch.setattr(eviction, "_ENOUGH", 400)
        watch = Watch(holes.entries, 10_000 * 10_000 * 2)
        most = 0
        for _ in range(2 * 10_000 // 32):
            before = len(looked)
            assert not watch.wrote(10_000)
            most = max(most, len(looked) - before)
        assert 8 <= most <= 14
        assert 240 <= len(looked) <= 280, "each once while a 32nd of the bound is written"
        assert len(set(looked)) >= 240

    def test_a_large_entry_owes_more_than_one_look(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        holes, bound = Holes(tmp_path), 10_000 * 10_000
        for _ in range(8_800):
            holes.add(10_000)
        monkeypatch.setattr(eviction, "_ENOUGH", 1)  # looks at one or two folders
        watch = Watch(holes.entries, bound)
        for _ in range(60):
            holes.add(1_000_000)
            watch.wrote(1_000_000)
            assert holes.total() <= bound


class TestDefaultBound:
    DISK = 500_000_000

    @pytest.fixture
    def holes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Holes:
        """Entries that take space on a disk where nothing else lies."""
        (tmp_path / "cache").mkdir(mode=0o700)
        (tmp_path / "cache" / "frames").mkdir()
        holes = Holes(tmp_path / "cache" / "frames")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=self.DISK - holes.total()))
        return holes

    def test_it_is_exact_for_a_few_large_entries(self, tmp_path: Path, holes: Holes) -> None:
        for name in ("00" * 16, "37" * 16):
            holes.add(40_000_000, name)
            cache = FrameCache(tmp_path / "cache")
            cache.put(STORE, "0", b"x", verified=True)
            cache.drop(STORE, "0")
            assert cache._folder.state().most_bytes == self.DISK // 2

    def test_it_is_about_right_for_many(self, holes: Holes, monkeypatch: pytest.MonkeyPatch, looked: list[str]) -> None:
        for _ in range(12_000):
            holes.add(15_000)
        monkeypatch.setattr(eviction, "_ENOUGH", 1000)
        looked.clear()
        assert default_bound("", holes.entries) == pytest.approx(self.DISK / 2, rel=0.05)
        assert len(looked) < 256 + 40, "all for what is free here, and a part"

    def test_nothing_is_listed_where_there_is_plenty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * MOST_BYTES))
        monkeypatch.setattr(eviction, "found_in", None)
        assert default_bound("", "") == MOST_BYTES


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
