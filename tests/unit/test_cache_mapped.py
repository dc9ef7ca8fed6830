"""Entries mapped into memory: the same bytes as the file has, never more than allowed, gone when the entry is."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ahi_ml.cache import DerivedTier, FrameCache, folder, frames, mapped, pages, recipe
from ahi_ml.cache.entries import ENCODED_START
from ahi_ml.cache.mapped import MappedEntries, may_map
from ahi_ml.cache.pages import Shelf, map_file
from ahi_ml.types import AnyArray

STORE = "d" * 32
DATA = bytes(range(256)) * 40
IMAGE = np.arange(60 * 70, dtype=np.int16).reshape(60, 70) - 2000
ROWS = np.random.default_rng(0).integers(-2000, 2000, (12, 64, 64), np.int16)  # whole pages: they lie side by side
FRAMES = [f"{number:032x}" for number in range(12)]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="entries are mapped on Linux only")


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    if not may_map(str(tmp_path)):
        pytest.skip("temporary files lie on a file system that is not mapped")
    return FrameCache(tmp_path / "cache")


@pytest.fixture
def tier(cache: FrameCache) -> DerivedTier:
    return cache.derived(STORE, recipe(output="stored", reduce=0) or "")


@pytest.fixture(params=["by itself", "side by side"])
def image(request: pytest.FixtureRequest) -> AnyArray:
    return IMAGE if request.param == "by itself" else ROWS[0]


@pytest.fixture(autouse=True)
def no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("frames", "derived", "marks"):
        monkeypatch.setattr(f"ahi_ml.cache.{module}.SAMPLE_BITS", 60)


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function after whose call nobody can open a file."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a file was opened")

    return lambda: monkeypatch.setattr(os, "open", refuse)


def mappings(of: Path) -> int:
    return Path("/proc/self/maps").read_text().count(f" {of}{os.sep}")


def put(cache: FrameCache, frames: list[str] = FRAMES[:1], data: bytes = DATA) -> None:
    for number, frame in enumerate(frames):
        cache.put(STORE, frame, bytes([number]) + data, verified=True)


def read(cache: FrameCache, frame: str = FRAMES[0], times: int = 1) -> bytes:
    for _ in range(times):
        entry = cache.get(STORE, frame)
        assert entry is not None
        assert (entry.verified, entry.whole) == (True, True)
    return bytes(entry.data)


class TestFiles:
    def test_the_bytes_outlive_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(DATA)
        descriptor = os.open(path, os.O_RDONLY)
        array = map_file(descriptor, len(DATA))
        os.close(descriptor)
        path.unlink()
        part = array[100:300]
        assert mappings(tmp_path) == 1
        del array
        assert part.tobytes() == DATA[100:300]
        with pytest.raises(ValueError):
            part[0] = 0
        del part
        assert mappings(tmp_path) == 0

    def test_a_refusal_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        descriptor = os.open(tmp_path / "file", os.O_RDONLY)
        with pytest.raises(OSError):
            map_file(descriptor, 0)
        os.close(descriptor)
        with pytest.raises(OSError):
            map_file(descriptor, 10)

    def test_network_file_systems_are_not_mapped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not may_map("/proc")
        assert not may_map(str(tmp_path / "none"))
        monkeypatch.setattr(mapped, "_LOCAL", frozenset())
        assert not may_map(str(tmp_path))


class TestBound:
    def test_the_oldest_go(self, monkeypatch: pytest.MonkeyPatch) -> None:
        entries: MappedEntries[int] = MappedEntries()
        monkeypatch.setattr(mapped, "_TAKE_PLACE", 0.0)
        assert entries.room(40)
        for number in range(5):
            entries.add(number, str(number), number, 10, 45)
        assert [entries.get(number) for number in range(5)] == [None, 1, 2, 3, 4]
        assert not entries.room(40), "as many bytes"
        entries.add(4, "4", 44, 10, 45)
        assert [entries.get(number) for number in range(1, 5)] == [1, 2, 3, 44]
        monkeypatch.setattr(mapped, "is_full", lambda: True)
        assert not entries.room(10**6), "as many entries"
        entries.add(9, "9", 9, 1, 10**6)
        assert [entries.get(number) for number in (1, 2, 3, 4, 9)] == [None, 2, 3, 44, 9], "one for one"
        monkeypatch.setattr(mapped, "_TAKE_PLACE", 1.0)
        assert entries.room(10**6)
        assert not MappedEntries().room(10**6), "it has none to give"
        monkeypatch.setattr(mapped, "_TAKE_PLACE", 0.0)
        monkeypatch.setattr(mapped, "is_full", lambda: False)
        entries.forget("3")
        entries.forget("none")
        assert entries.get(3) is None
        assert entries.room(10**6)
        entries.clear()
        assert entries.get(44) is None
        assert entries.room(1)

    @pytest.mark.parametrize("rows", [ROWS, ROWS[:, :60, :61]])
    def test_all_caches_of_a_process_together(
        self, cache: FrameCache, monkeypatch: pytest.MonkeyPatch, rows: AnyArray
    ) -> None:
        rows, before = np.ascontiguousarray(rows), len(pages._MAPPED)
        monkeypatch.setattr(pages, "_most_files", lambda: before + 8)
        caches = [cache, FrameCache(cache.folder), FrameCache(cache.folder.parent / "other")]
        tiers = [each.derived(STORE, "recipe") for each in caches]
        for tier in tiers:
            for number, row in enumerate(rows):
                tier.write(FRAMES[number], row, True)
        put(caches[0], FRAMES)
        for _ in range(40):
            for tier in tiers:
                out = np.zeros_like(rows)
                assert tier.read_many(FRAMES, out) == [True] * 12
                np.testing.assert_array_equal(out, rows)
            assert read(caches[0], FRAMES[3])[1:] == DATA
        assert len(pages._MAPPED) == before + 8
        assert mappings(cache.folder.parent) == 8
        del tier
        for each in caches:
            each.clear()
            each._folder.state().mapped.clear()
        assert mappings(cache.folder.parent) == 0
        assert len(pages._MAPPED) == before

    def test_half_of_what_the_system_allows(self) -> None:
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
        assert 1000 < pages._most_files() <= most // 4, "each is two mappings"

    def test_what_does_not_fit_is_seldom_mapped(self) -> None:
        entries: MappedEntries[int] = MappedEntries()
        entries.add(0, "0", 0, 10, 10)
        assert 0 < sum(entries.room(10) for _ in range(3000)) < 300

    def test_a_cache_maps_a_quarter_of_its_bound(self, cache: FrameCache, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mapped, "_TAKE_PLACE", 0.0)
        cache = FrameCache(cache.folder, max_bytes=(ENCODED_START + 1 + len(DATA)) * 4 * 5)
        put(cache, FRAMES)
        for frame in FRAMES * 4:
            read(cache, frame)
        assert mappings(cache.folder) == 5

    @pytest.mark.parametrize("asked", [False, True])
    def test_where_entries_are_not_mapped(
        self, cache: FrameCache, tier: DerivedTier, monkeypatch: pytest.MonkeyPatch, asked: bool
    ) -> None:
        if asked:
            cache = pickle.loads(pickle.dumps(FrameCache(cache.folder, mapped=False)))
            tier = cache.derived(STORE, "recipe")
        else:
            monkeypatch.setattr(folder, "may_map", lambda _: False)
        put(cache)
        tier.write(FRAMES[0], IMAGE, True)
        for _ in range(4):
            out = np.zeros_like(IMAGE)
            assert read(cache)[1:] == DATA
            assert tier.read_into(FRAMES[0], out)
            np.testing.assert_array_equal(out, IMAGE)
        assert mappings(cache.folder) == 0


class TestFrames:
    def test_from_the_third_time_on_no_file_is_opened(self, cache: FrameCache, no_files: Any) -> None:
        put(cache, FRAMES)
        for frame in FRAMES * 2:
            read(cache, frame)
        assert mappings(cache.folder) == len(FRAMES)
        no_files()
        found = cache.get_many(STORE, FRAMES)
        assert [bytes(entry.data) for entry in found if entry] == [bytes([n]) + DATA for n in range(12)]
        assert cache.stats()["hits"] == 3 * len(FRAMES)

    def test_what_is_put_again_is_read_again(self, cache: FrameCache) -> None:
        put(cache)
        read(cache, times=3)
        put(cache, data=b"other")
        assert read(cache) == b"\0other"
        assert read(cache, times=3) == b"\0other"

    def test_a_part_is_replaced_by_the_whole(self, cache: FrameCache, no_files: Any) -> None:
        other = FrameCache(cache.folder)
        cache.put(STORE, FRAMES[0], DATA[:100], verified=False, whole=False, prefixes=[0, 100, 50])
        for _ in range(3):
            entry = cache.get(STORE, FRAMES[0], 3)
            assert entry is not None
            assert (bytes(entry.data), entry.whole) == (DATA[:50], False)
        assert cache.get(STORE, FRAMES[0]) is None
        other.put(STORE, FRAMES[0], DATA, verified=True, prefixes=[1000, 100, 50])
        for _ in range(3):
            whole, half = cache.get(STORE, FRAMES[0]), cache.get(STORE, FRAMES[0], 1)
            assert whole is not None
            assert half is not None
            assert (bytes(whole.data), whole.whole, bytes(half.data)) == (DATA, True, DATA[:1000])
        no_files()
        assert cache.get(STORE, FRAMES[0]) is not None
        assert cache.get(STORE, FRAMES[0], 1) is not None

    def test_damage_is_noticed_by_sampling(self, cache: FrameCache, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("frames", "marks"):
            monkeypatch.setattr(f"ahi_ml.cache.{module}.SAMPLE_BITS", 6)
        reads = []
        for _ in range(30):
            put(cache)
            read(cache, times=3)
            (path,) = (path for path in cache.folder.rglob("*") if path.is_file())
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x55")
            number = 0
            while cache.get(STORE, FRAMES[0]) is not None:
                number += 1
                assert number < 3000
            reads.append(number)
        assert 20 < np.mean(reads) < 150, "one read in 64"

    def test_what_another_process_deletes_is_let_go_of_by_sampling(
        self, cache: FrameCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ahi_ml.cache.frames.SAMPLE_BITS", 6)
        put(cache)
        read(cache, times=3)
        (path,) = (path for path in cache.folder.rglob("*") if path.is_file())
        path.unlink()
        assert any(cache.get(STORE, FRAMES[0]) is None for _ in range(3000))
        assert not cache._folder.state().mapped._places

    def test_what_shares_a_mark_with_another_is_checked_all_the_same(self, cache: FrameCache) -> None:
        put(cache, FRAMES[:2])
        for frame in FRAMES[:2]:
            cache._folder.state().marks.note(hash((cache.name(STORE, frame), 0)))
        path = Path(cache._path(STORE, FRAMES[0]))
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x55")
        assert cache.get(STORE, FRAMES[0]) is None
        assert cache.get(STORE, FRAMES[1]) is not None
        assert cache.stats()["corrupt"] == 1
        assert not path.exists()

    @pytest.mark.parametrize("how", ["deleted", "replaced"])
    def test_what_goes_while_it_is_mapped_is_not_kept(
        self, cache: FrameCache, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        put(cache)
        read(cache)

        def slowly(descriptor: int, size: int) -> Any:
            array = map_file(descriptor, size)
            cache.drop(STORE, FRAMES[0])
            if how == "replaced":
                put(cache, data=b"other")
            return array

        monkeypatch.setattr(frames, "map_file", slowly)
        cache.get(STORE, FRAMES[0])
        monkeypatch.undo()
        assert mappings(cache.folder) == 0
        entry = cache.get(STORE, FRAMES[0])
        assert (entry and bytes(entry.data)) == (b"\0other" if how == "replaced" else None)

    def test_what_verify_deletes_is_gone(self, cache: FrameCache, tier: DerivedTier) -> None:
        put(cache)
        tier.write(FRAMES[1], IMAGE, True)
        out = np.zeros_like(IMAGE)
        for _ in range(3):
            read(cache)
            assert tier.read_into(FRAMES[1], out)
        assert mappings(cache.folder) == 2
        for path in [path for path in cache.folder.rglob("*") if path.is_file()]:
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x55")
        assert cache.verify()["corrupt"] == 2
        assert mappings(cache.folder) == 0
        assert cache.get(STORE, FRAMES[0]) is None
        assert tier.read_into(FRAMES[1], out) is None

    @pytest.mark.parametrize("how", ["drop", "clear", "evict"])
    def test_deleted_entries_take_no_space(self, cache: FrameCache, how: str) -> None:
        put(cache)
        read(cache, times=3)
        assert mappings(cache.folder) == 1
        if how == "drop":
            cache.drop(STORE, FRAMES[0])
        elif how == "clear":
            cache.clear()
        else:
            small = FrameCache(cache.folder, max_bytes=50_000)
            put(small)
            read(small, times=3)
            for frame in FRAMES:
                small.put(STORE, frame, DATA, verified=True)
            assert small.stats()["evictions"]
            cache.drop(STORE, FRAMES[0])
        assert mappings(cache.folder) == 0
        assert cache.get(STORE, FRAMES[0]) is None

    def test_encrypted_frames_are_not_kept_open(self, tmp_path: Path) -> None:
        cache = FrameCache(tmp_path / "cache", encrypt=lambda data: data[::-1], decrypt=lambda data: data[::-1])
        put(cache)
        assert read(cache, times=4)[1:] == DATA
        assert mappings(cache.folder) == 0


class TestResults:
    def test_from_the_third_time_on_no_file_is_opened(
        self, cache: FrameCache, tier: DerivedTier, no_files: Any, image: AnyArray
    ) -> None:
        for number, frame in enumerate(FRAMES):
            tier.write(frame, image + number, number % 2 == 0)
        batch = np.zeros((len(FRAMES), *image.shape), image.dtype)
        for _ in range(2):
            tier.read_many(FRAMES, batch)
        no_files()
        batch[:] = 0
        assert tier.read_many(FRAMES, batch) == [True, False] * 6
        np.testing.assert_array_equal(batch, [image + number for number in range(len(FRAMES))])

    def test_recipes_do_not_mix(self, cache: FrameCache, tier: DerivedTier, image: AnyArray) -> None:
        other = cache.derived(STORE, recipe(output="stored", reduce=1) or "")
        tier.write(FRAMES[0], image, True)
        other.write(FRAMES[0], image + 1, True)
        for _ in range(4):
            for each, wanted in ((tier, image), (other, image + 1)):
                out = np.zeros_like(image)
                assert each.read_into(FRAMES[0], out)
                np.testing.assert_array_equal(out, wanted)

    def test_arrays_of_another_kind_are_a_miss(self, tier: DerivedTier, image: AnyArray) -> None:
        tier.write(FRAMES[0], image, True)
        for _ in range(3):
            assert tier.read_into(FRAMES[0], np.zeros_like(image))
        assert tier.read_into(FRAMES[0], np.zeros(image.shape, np.uint16)) is None
        assert tier.read_into(FRAMES[0], np.zeros(image.size, np.int16)) is None
        assert tier.read_into(FRAMES[0], np.zeros_like(image))

    def test_what_is_written_again_is_read_again(self, tier: DerivedTier, image: AnyArray) -> None:
        out = np.zeros_like(image)
        tier.write(FRAMES[0], image, True)
        for _ in range(3):
            tier.read_into(FRAMES[0], out)
        tier.write(FRAMES[0], image + 1, False)
        for _ in range(3):
            assert tier.read_into(FRAMES[0], out) is False
            np.testing.assert_array_equal(out, image + 1)

    def test_damage_is_noticed_when_it_is_looked_for(
        self, cache: FrameCache, tier: DerivedTier, monkeypatch: pytest.MonkeyPatch, image: AnyArray
    ) -> None:
        out = np.zeros_like(image)
        tier.write(FRAMES[0], image, True)
        for _ in range(3):
            assert tier.read_into(FRAMES[0], out)
        (path,) = (path for path in cache.folder.rglob("*") if path.is_file())
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x55")
        monkeypatch.setattr("ahi_ml.cache.derived.SAMPLE_BITS", 0)
        assert tier.read_into(FRAMES[0], out) is None
        assert cache.stats()["corrupt"] == 1
        assert not path.exists()
        assert mappings(cache.folder) == 0

    def test_what_shares_a_mark_with_another_is_checked_all_the_same(
        self, cache: FrameCache, tier: DerivedTier, image: AnyArray
    ) -> None:
        tier.write(FRAMES[0], image, True)
        tier._marks.get().note(hash(tier._name(FRAMES[0])))
        path = Path(tier._folder.place(tier._name(FRAMES[0])))
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x55")
        assert tier.read_into(FRAMES[0], np.zeros_like(image)) is None
        assert cache.stats()["corrupt"] == 1
        assert not path.exists()

    def test_what_another_process_deletes_is_let_go_of_by_sampling(
        self, cache: FrameCache, tier: DerivedTier, monkeypatch: pytest.MonkeyPatch, image: AnyArray
    ) -> None:
        monkeypatch.setattr("ahi_ml.cache.derived.SAMPLE_BITS", 6)
        out = np.zeros_like(image)
        tier.write(FRAMES[0], image, True)
        for _ in range(3):
            assert tier.read_into(FRAMES[0], out)
        Path(tier._folder.place(tier._name(FRAMES[0]))).unlink()
        assert any(tier.read_into(FRAMES[0], out) is None for _ in range(3000))
        assert mappings(cache.folder) == 0


def side_by_side(tier: DerivedTier, rows: AnyArray = ROWS) -> None:
    """Write results and read them until they are mapped."""
    for number, row in enumerate(rows):
        tier.write(FRAMES[number], row, True)
    out = np.empty_like(rows)
    for _ in range(2):
        assert tier.read_many(FRAMES[: len(rows)], out) == [True] * len(rows)


class TestSideBySide:
    @pytest.fixture
    def by_one_call(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many rows each call takes."""
        counts: list[int] = []
        take = Shelf.take

        def counting(self: Shelf, rows: Any, out: AnyArray) -> None:
            counts.append(len(rows))
            take(self, rows, out)

        monkeypatch.setattr(Shelf, "take", counting)
        return counts

    def test_any_order_by_one_call(self, tier: DerivedTier, by_one_call: list[int], no_files: Any) -> None:
        side_by_side(tier)
        no_files()
        order = [7, 0, 0, 11, 3, 3, 3, 5]
        out = np.zeros((8, 64, 64), np.int16)
        assert tier.read_many([FRAMES[number] for number in order], out) == [True] * 8
        np.testing.assert_array_equal(out, ROWS[order])
        assert by_one_call == [8]

    @pytest.mark.parametrize("missing", [[0], [2, 5], [11], range(1, 10)])
    def test_some_that_are_not_there(self, tier: DerivedTier, by_one_call: list[int], missing: Any) -> None:
        side_by_side(tier)
        other = DerivedTier(*tier.__reduce__()[1])
        for number in missing:
            tier.drop(FRAMES[number])
        out = np.zeros_like(ROWS)
        there = [number not in missing for number in range(12)]
        assert tier.read_many(FRAMES, out) == [known or None for known in there]
        np.testing.assert_array_equal(out[there], ROWS[there])
        for number in missing:
            other.write(FRAMES[number], ROWS[number] + 1, False)
        assert tier.read_many(FRAMES, out) == there
        np.testing.assert_array_equal(out, [row + (not known) for row, known in zip(ROWS, there, strict=True)])
        assert by_one_call == ([] if len(missing) > 6 else [12, 12])

    def test_forms_of_one_size_do_not_mix(self, cache: FrameCache, tier: DerivedTier) -> None:
        side_by_side(tier)
        others = cache.derived(STORE, recipe(output="stored", reduce=1) or "")
        side_by_side(others, ROWS.view(np.uint16))
        shelves = [tier._folder.state().mapped.shelf(np.dtype(kind), (64, 64), 64) for kind in (np.int16, np.uint16)]
        assert shelves[0] is not shelves[1]
        for out in (np.zeros((12, 64, 64), np.uint16), np.zeros((12, 32, 128), np.int16)):
            assert tier.read_many(FRAMES, out) == [None] * 12

    def test_rows_of_a_list_of_arrays_are_copied_one_by_one(self, tier: DerivedTier, by_one_call: list[int]) -> None:
        side_by_side(tier)
        out = np.zeros_like(ROWS)
        assert tier.read_many(FRAMES, list(out)) == [True] * 12
        np.testing.assert_array_equal(out, ROWS)
        assert not by_one_call

    def test_arrays_that_cannot_be_written_are_refused(self, tier: DerivedTier) -> None:
        side_by_side(tier)
        with pytest.raises(ValueError, match="contiguous"):
            tier.read_many(FRAMES, np.zeros((12, 64, 128), np.int16)[:, :, ::2])
        fixed = np.zeros_like(ROWS)
        fixed.flags.writeable = False
        with pytest.raises(ValueError, match="read-only"):
            tier.read_many(FRAMES, fixed)
        with pytest.raises(ValueError, match="12 arrays for 11"):
            tier.read_many(FRAMES[1:], np.zeros_like(ROWS))

    def test_damage_is_noticed_by_sampling(
        self, cache: FrameCache, tier: DerivedTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        side_by_side(tier)
        path = Path(tier._folder.place(tier._name(FRAMES[4])))
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x55")
        out = np.zeros_like(ROWS)
        monkeypatch.setattr("ahi_ml.cache.derived.SAMPLE_BITS", 3)
        reads = 0
        while (verdicts := tier.read_many(FRAMES, out))[4]:
            reads += 1
            assert reads < 200, "one read in 8"
        assert verdicts == [number != 4 or None for number in range(12)]
        assert cache.stats()["corrupt"] == 1
        np.testing.assert_array_equal(np.delete(out, 4, 0), np.delete(ROWS, 4, 0))

    def test_what_does_not_fit_on_the_shelf_lies_by_itself(
        self, cache: FrameCache, tier: DerivedTier, monkeypatch: pytest.MonkeyPatch, by_one_call: list[int]
    ) -> None:
        monkeypatch.setattr(pages, "_MOST_PLACES", 8)
        side_by_side(tier)
        assert mappings(cache.folder) == 12
        out = np.zeros_like(ROWS)
        assert tier.read_many(FRAMES, out) == [True] * 12
        np.testing.assert_array_equal(out, ROWS)
        assert by_one_call == [12]

    def test_eviction_lets_go_of_what_it_removes_alone(self, cache: FrameCache) -> None:
        bound = ROWS.nbytes * 5
        cache = FrameCache(cache.folder, max_bytes=bound)
        tier = cache.derived(STORE, "recipe")
        side_by_side(tier)
        before = cache.stats()["evictions"]
        number = 0
        while cache.stats()["evictions"] == before:
            tier.write(f"other {number}", ROWS[0], True)
            number += 1
        gone = cache.stats()["evictions"] - before
        assert 0 < gone < 12
        assert mappings(cache.folder) == 12 - gone, "the oldest were the mapped ones"

    def test_where_addresses_are_few_they_lie_by_themselves(
        self, cache: FrameCache, tier: DerivedTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        resource = pytest.importorskip("resource")
        monkeypatch.setattr(pages, "_most_addresses", lambda: 1 << 36)
        before = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), before[1]))
        try:
            side_by_side(tier)
            out = np.zeros_like(ROWS)
            assert tier.read_many(FRAMES, out) == [True] * 12
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
        np.testing.assert_array_equal(out, ROWS)
        assert mappings(cache.folder) == 12
        assert not len(tier._folder.state().mapped._shelves)

    def test_a_limit_of_addresses_is_left_to_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        resource = pytest.importorskip("resource")
        free = len(Shelf(np.dtype(np.float32), (512, 512), 64)._free)
        monkeypatch.setattr(resource, "getrlimit", lambda _: (40 << 30, 40 << 30))
        shelf = Shelf(np.dtype(np.float32), (512, 512), 64)
        assert 100 < len(shelf._free) < free
        assert len(shelf._free) * shelf._place <= (40 << 30) // 64

    def test_places_are_used_again_and_addresses_given_back(
        self, cache: FrameCache, tier: DerivedTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pages, "_MOST_PLACES", 12)
        known = tier._folder.state().mapped
        side_by_side(tier)
        shelf = known.shelf(ROWS.dtype, (64, 64), 64)
        assert shelf is not None
        assert not shelf._free
        for number in range(6):
            tier.drop(FRAMES[number])
        assert mappings(cache.folder) == 6
        assert len(shelf._free) == 6
        side_by_side(tier)
        assert not shelf._free
        first = f"{shelf._first:x}-"
        del shelf
        cache.clear()
        assert mappings(cache.folder) == 0
        assert first not in Path("/proc/self/maps").read_text()

    def test_a_shelf_keeps_its_place_when_a_file_cannot_be_mapped(self, tmp_path: Path) -> None:
        shelf = Shelf(np.dtype(np.int16), (64, 64), 64)
        free = len(shelf._free)
        with (tmp_path / "file").open("wb") as file, pytest.raises(OSError):
            shelf.put(file.fileno())  # it is not open for reading
        assert len(shelf._free) == free

    @pytest.mark.parametrize("shape", [(60, 70), (0, 64), (1 << 19, 1 << 20)])
    def test_forms_that_no_shelf_has(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError):
            Shelf(np.dtype(np.int16), shape, 64)

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [
            ((512, 512), np.uint8),
            ((512, 512), np.int16),
            ((512, 512), np.float32),
            ((16, 16), np.int16),
            ((400, 400), np.int16),
            ((16, 16, 3), np.float32),
            ((3328, 2560), np.uint16),
        ],
    )
    def test_forms_that_lie_side_by_side(self, tmp_path: Path, shape: tuple[int, ...], dtype: Any) -> None:
        row = np.zeros(shape, dtype)
        shelf = Shelf(row.dtype, shape, 64)
        kept = []
        for number in range(3):
            row[...] = number + 1
            (tmp_path / "file").write_bytes(bytes(64) + row.tobytes())
            with (tmp_path / "file").open("rb") as file:
                kept.append(shelf.put(file.fileno()))
            (tmp_path / "file").unlink()
        out = np.zeros((3, *shape), dtype)
        assert shelf.fits(out)
        shelf.take([put[1] for put in reversed(kept) if put], out)
        for number in range(3):
            assert (out[number] == 3 - number).all()

    def test_others_delete_and_write_meanwhile(self, cache: FrameCache, tier: DerivedTier) -> None:
        side_by_side(tier)
        ended = threading.Event()

        def disturb(seed: int) -> None:
            random = np.random.default_rng(seed)
            while not ended.is_set():
                number = int(random.integers(12))
                what = random.integers(20)
                if what == 0:
                    cache.clear()
                elif what < 10:
                    tier.drop(FRAMES[number])
                else:
                    tier.write(FRAMES[number], ROWS[number], True)

        def read_all(seed: int) -> int:
            random, hits = np.random.default_rng(seed), 0
            out = np.zeros_like(ROWS)
            for _ in range(1500):
                order = random.integers(0, 12, 12)
                found = tier.read_many([FRAMES[number] for number in order], out)
                there = np.array([verdict is not None for verdict in found])
                np.testing.assert_array_equal(out[there], ROWS[order[there]])
                hits += int(there.sum())
            return hits

        with ThreadPoolExecutor(4) as pool:
            disturbing = [pool.submit(disturb, seed) for seed in range(2)]
            reading = [pool.submit(read_all, seed) for seed in range(2)]
            try:
                assert all(each.result() > 1000 for each in reading)
            finally:
                ended.set()
            for each in disturbing:
                each.result()

    def test_a_forked_child_reads_them_too(self, tier: DerivedTier) -> None:
        side_by_side(tier)
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
            assert pool.submit(_reads_right, tier).result(60)
        assert _reads_right(tier)


def _reads_right(tier: DerivedTier) -> bool:
    out = np.zeros_like(ROWS)
    return all(tier.read_many(FRAMES, out) == [True] * 12 and bool((out == ROWS).all()) for _ in range(4))
