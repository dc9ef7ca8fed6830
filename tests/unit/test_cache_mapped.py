"""Entries mapped into memory: the same bytes as the file has, never more than allowed, gone when the entry is."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ahi_ml.cache import DerivedTier, FrameCache, folder, mapped, recipe
from ahi_ml.cache.entries import ENCODED_START
from ahi_ml.cache.mapped import MappedEntries, map_file, may_map

STORE = "d" * 32
DATA = bytes(range(256)) * 40
IMAGE = np.arange(60 * 70, dtype=np.int16).reshape(60, 70) - 2000
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
        monkeypatch.setattr(mapped, "_MOST", 3)
        assert not entries.room(10**6), "as many entries"
        entries.add(9, "9", 9, 1, 10**6)
        assert [entries.get(number) for number in (1, 2, 3, 4, 9)] == [None, None, 3, 44, 9]
        entries.forget("3")
        entries.forget("none")
        assert entries.get(3) is None
        assert entries.room(10**6)
        entries.clear()
        assert entries.get(44) is None
        assert entries.room(1)

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

    def test_where_entries_are_not_mapped(
        self, cache: FrameCache, tier: DerivedTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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

        monkeypatch.setattr(folder, "map_file", slowly)
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
        self, cache: FrameCache, tier: DerivedTier, no_files: Any
    ) -> None:
        for number, frame in enumerate(FRAMES):
            tier.write(frame, IMAGE + number, number % 2 == 0)
        batch = np.zeros((len(FRAMES), *IMAGE.shape), IMAGE.dtype)
        for _ in range(2):
            tier.read_many(FRAMES, batch)
        no_files()
        batch[:] = 0
        assert tier.read_many(FRAMES, batch) == [True, False] * 6
        np.testing.assert_array_equal(batch, [IMAGE + number for number in range(len(FRAMES))])

    def test_recipes_do_not_mix(self, cache: FrameCache, tier: DerivedTier) -> None:
        other = cache.derived(STORE, recipe(output="stored", reduce=1) or "")
        tier.write(FRAMES[0], IMAGE, True)
        other.write(FRAMES[0], IMAGE + 1, True)
        for _ in range(4):
            for each, wanted in ((tier, IMAGE), (other, IMAGE + 1)):
                out = np.zeros_like(IMAGE)
                assert each.read_into(FRAMES[0], out)
                np.testing.assert_array_equal(out, wanted)

    def test_arrays_of_another_kind_are_a_miss(self, tier: DerivedTier) -> None:
        tier.write(FRAMES[0], IMAGE, True)
        for _ in range(3):
            assert tier.read_into(FRAMES[0], np.zeros_like(IMAGE))
        assert tier.read_into(FRAMES[0], np.zeros(IMAGE.shape, np.uint16)) is None
        assert tier.read_into(FRAMES[0], np.zeros(IMAGE.size, np.int16)) is None
        assert tier.read_into(FRAMES[0], np.zeros_like(IMAGE))

    def test_what_is_written_again_is_read_again(self, tier: DerivedTier) -> None:
        out = np.zeros_like(IMAGE)
        tier.write(FRAMES[0], IMAGE, True)
        for _ in range(3):
            tier.read_into(FRAMES[0], out)
        tier.write(FRAMES[0], IMAGE + 1, False)
        for _ in range(3):
            assert tier.read_into(FRAMES[0], out) is False
            np.testing.assert_array_equal(out, IMAGE + 1)

    def test_damage_is_noticed_when_it_is_looked_for(
        self, cache: FrameCache, tier: DerivedTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = np.zeros_like(IMAGE)
        tier.write(FRAMES[0], IMAGE, True)
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
