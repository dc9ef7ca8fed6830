"""The tier of results: arrays come back as they were, or not at all, whatever happened to the files."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ahi_ml.cache import DerivedTier, FrameCache, derived, recipe
from ahi_ml.errors import CacheError

STORE, KEY = "d" * 32, "0" * 32
RECIPE = recipe(output="stored", reduce=0) or ""
IMAGE = np.arange(60 * 70, dtype=np.int16).reshape(60, 70) - 2000
HEADER = 64


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    return FrameCache(tmp_path / "cache")


@pytest.fixture
def tier(cache: FrameCache) -> DerivedTier:
    return cache.derived(STORE, RECIPE)


def again(cache: FrameCache) -> DerivedTier:
    """The tier as a process sees it that has read nothing yet."""
    return FrameCache(cache.folder).derived(STORE, RECIPE)


def only_file(cache: FrameCache) -> Path:
    (path,) = (path for path in cache.folder.rglob("*") if path.is_file())
    return path


def counts(cache: FrameCache) -> dict[str, int]:
    return {name: count for name, count in cache.stats().items() if count}


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", ["i2", "u2", ">i2", "f4", "f2", "f8", "u1", "?", "c8", "i8"])
    @pytest.mark.parametrize("shape", [(), (0, 3), (1,), (5, 7), (3, 4, 3), (1, 2, 1, 2, 1, 2)])
    @pytest.mark.parametrize("verified", [True, False])
    def test_every_kind_of_array(self, tier: DerivedTier, dtype: str, shape: tuple[int, ...], verified: bool) -> None:
        array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
        assert tier.write(KEY, array, verified)
        for _ in range(3):  # with doubts, without, without
            out = np.full(shape, 7, dtype)
            assert tier.read_into(KEY, out) is verified
            np.testing.assert_array_equal(out, array)
            assert out.dtype == array.dtype

    def test_rows_of_a_batch(self, cache: FrameCache, tier: DerivedTier) -> None:
        keys = [f"{number:032x}" for number in range(8)]
        for number, key in enumerate(keys):
            if number != 5:
                tier.write(key, IMAGE + number, number % 2 == 0)
        for _ in range(2):
            batch = np.zeros((8, *IMAGE.shape), IMAGE.dtype)
            found = tier.read_many(keys, batch)
            assert found == [True, False, True, False, True, None, True, False]
            for number in (0, 1, 2, 3, 4, 6, 7):
                np.testing.assert_array_equal(batch[number], IMAGE + number)
        assert counts(cache) == {"writes": 7, "derived_hits": 14, "derived_misses": 2, "bytes": 14 * IMAGE.nbytes}

    def test_rows_of_different_kinds(self, tier: DerivedTier) -> None:
        arrays = [IMAGE, IMAGE.astype("f4"), IMAGE[:5].copy(), IMAGE.astype("f4"), IMAGE]
        keys = [str(number) for number in range(5)]
        for key, array in zip(keys, arrays, strict=True):
            tier.write(key, array, True)
        for _ in range(2):
            outs = [np.empty_like(array) for array in arrays]
            assert tier.read_many(keys, outs) == [True] * 5
            for out, array in zip(outs, arrays, strict=True):
                np.testing.assert_array_equal(out, array)

    def test_an_array_that_is_not_contiguous_is_copied(self, tier: DerivedTier) -> None:
        assert tier.write(KEY, IMAGE[::2, ::-3], True)
        out = np.empty(IMAGE[::2, ::-3].shape, IMAGE.dtype)
        assert tier.read_into(KEY, out)
        np.testing.assert_array_equal(out, IMAGE[::2, ::-3])

    @pytest.mark.parametrize(
        "array",
        [np.array([None]), np.array(["x"]), np.zeros(3, "M8[s]"), np.zeros((1,) * 7), np.zeros(2, "i4,f4")],
        ids=str,
    )
    def test_what_is_no_numbers_is_not_kept(self, cache: FrameCache, tier: DerivedTier, array: Any) -> None:
        assert tier.write(KEY, array, True) is False
        assert tier.read_into(KEY, np.zeros_like(array)) is None
        assert cache.size() == (0, 0)

    def test_the_newest_wins(self, tier: DerivedTier) -> None:
        out = np.empty_like(IMAGE)
        for number in range(3):
            tier.write(KEY, IMAGE + number, number == 1)
            assert tier.read_into(KEY, out) is (number == 1)
            np.testing.assert_array_equal(out, IMAGE + number)

    def test_drop(self, tier: DerivedTier) -> None:
        tier.write(KEY, IMAGE, True)
        tier.read_into(KEY, np.empty_like(IMAGE))
        tier.drop(KEY)
        tier.drop(KEY)
        assert tier.read_into(KEY, np.empty_like(IMAGE)) is None


class TestKeys:
    def test_store_recipe_epoch_and_key_all_count(self, cache: FrameCache, monkeypatch: pytest.MonkeyPatch) -> None:
        cache.derived(STORE, RECIPE).write(KEY, IMAGE, True)
        out = np.empty_like(IMAGE)
        assert cache.derived("e" * 32, RECIPE).read_into(KEY, out) is None
        assert cache.derived(STORE, RECIPE + "x").read_into(KEY, out) is None
        assert cache.derived(STORE, RECIPE).read_into("1" * 32, out) is None
        assert cache.derived(STORE, RECIPE).read_into(KEY, out) is True
        monkeypatch.setattr(derived, "DECODER_EPOCH", derived.DECODER_EPOCH + 1)
        assert cache.derived(STORE, RECIPE).read_into(KEY, out) is None

    def test_parts_of_a_key_do_not_run_into_each_other(self, cache: FrameCache) -> None:
        cache.derived("a", "b\0c").write("d", IMAGE, True)
        assert cache.derived("a", "b").read_into("c\0d", np.empty_like(IMAGE)) is None
        assert cache.derived("a\0b", "c").read_into("d", np.empty_like(IMAGE)) is None

    def test_names_say_nothing(self, cache: FrameCache, tier: DerivedTier) -> None:
        tier.write("0123456789abcdef" * 2, IMAGE, True)
        relative = only_file(cache).relative_to(cache.folder).as_posix()
        assert "0123456" not in relative
        assert "stored" not in relative

    def test_an_entry_of_another_kind_is_a_miss_and_stays(self, cache: FrameCache, tier: DerivedTier) -> None:
        tier.write(KEY, IMAGE, True)
        for _ in range(2):
            for out in (IMAGE.astype("u2"), IMAGE[:-1].copy(), IMAGE.ravel().copy(), IMAGE[None].copy()):
                assert tier.read_into(KEY, out) is None
            assert tier.read_into(KEY, np.empty_like(IMAGE)) is True
        assert cache.stats()["corrupt"] == 0


class TestDamage:
    @pytest.mark.parametrize("many", [False, True])
    @pytest.mark.parametrize("verified", [False, True])
    def test_every_flipped_byte_is_noticed_on_the_first_read(
        self, cache: FrameCache, tier: DerivedTier, verified: bool, many: bool
    ) -> None:
        tier.write(KEY, IMAGE, verified)
        path = only_file(cache)
        whole = path.read_bytes()
        for place in [*range(HEADER), HEADER, len(whole) // 2, len(whole) - 1]:
            for flip in (1, 0x80):
                damaged = bytearray(whole)
                damaged[place] ^= flip
                path.write_bytes(damaged)
                fresh = FrameCache(cache.folder)
                new, out = fresh.derived(STORE, RECIPE), np.empty_like(IMAGE)
                assert (new.read_many([KEY], [out])[0] if many else new.read_into(KEY, out)) is None, place
                assert counts(fresh) == {"corrupt": 1, "derived_misses": 1}
                assert not path.exists()

    @pytest.mark.parametrize("size", [0, 1, HEADER - 1, HEADER, HEADER + 1, -1])
    @pytest.mark.parametrize("read_before", [False, True])
    def test_torn_entries_are_dropped(self, cache: FrameCache, tier: DerivedTier, size: int, read_before: bool) -> None:
        tier.write(KEY, IMAGE, True)
        out = np.empty_like(IMAGE)
        if read_before:
            assert tier.read_into(KEY, out)
        path = only_file(cache)
        path.write_bytes(path.read_bytes()[:size])
        assert tier.read_into(KEY, out) is None
        assert cache.stats()["corrupt"] == 1
        assert not path.exists()
        tier.write(KEY, IMAGE, True)
        assert tier.read_into(KEY, out)

    def test_a_damaged_header_is_noticed_on_any_read(self, cache: FrameCache, tier: DerivedTier) -> None:
        tier.write(KEY, IMAGE, False)
        path = only_file(cache)
        whole = path.read_bytes()
        for place in range(HEADER - 12):  # all but its checksums
            tier.write(KEY, IMAGE, False)
            assert tier.read_into(KEY, np.empty_like(IMAGE)) is False
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert tier.read_into(KEY, np.empty_like(IMAGE)) is None, place

    def test_an_entry_with_a_tail_is_dropped(self, cache: FrameCache, tier: DerivedTier) -> None:
        tier.write(KEY, IMAGE, True)
        with only_file(cache).open("ab") as file:
            file.write(b"tail")
        assert tier.read_into(KEY, np.empty_like(IMAGE)) is None

    @pytest.mark.parametrize("many", [False, True])
    def test_later_reads_are_checked_by_sampling(self, cache: FrameCache, tier: DerivedTier, many: bool) -> None:
        reads = []
        for _ in range(30):
            tier.write(KEY, IMAGE, True)
            out = np.empty_like(IMAGE)
            for _ in range(2):  # checked when it is first read, and when it is mapped
                assert tier.read_into(KEY, out)
            path = only_file(cache)
            damaged = bytearray(path.read_bytes())
            damaged[-1] ^= 1
            path.write_bytes(damaged)
            read = 0
            while (tier.read_many([KEY], [out])[0] if many else tier.read_into(KEY, out)) is not None:
                read += 1
                assert read < 3000
            reads.append(read)
        assert 20 < np.mean(reads) < 150, "one read in 64"

    def test_what_was_written_again_is_checked_again(
        self, cache: FrameCache, tier: DerivedTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(derived, "SAMPLE_BITS", 60)
        for _ in range(2):
            tier.write(KEY, IMAGE, True)
            path = only_file(cache)
            damaged = bytearray(path.read_bytes())
            damaged[-1] ^= 1
            path.write_bytes(damaged)
            assert tier.read_into(KEY, np.empty_like(IMAGE)) is None
            tier.write(KEY, IMAGE, True)
            assert tier.read_into(KEY, np.empty_like(IMAGE))

    def test_verify_reads_both_tiers(self, cache: FrameCache, tier: DerivedTier) -> None:
        for number in range(6):
            tier.write(str(number), IMAGE + number, True)
            cache.put(STORE, str(number), bytes([number]) * 1000, verified=True)
        size = cache.size()[1]
        assert cache.verify() == {"entries": 12, "bytes": size, "corrupt": 0, "unreadable": 0}
        paths = [
            path for path in cache.folder.glob("frames/*/*") if path.stat().st_size in (1072, IMAGE.nbytes + HEADER)
        ]
        for path in sorted(paths, key=lambda path: path.stat().st_size)[4:8]:  # two of each
            raw = bytearray(path.read_bytes())
            raw[-1] ^= 1
            path.write_bytes(raw)
        assert cache.verify() == {"entries": 12, "bytes": size, "corrupt": 4, "unreadable": 0}
        assert cache.verify()["entries"] == cache.size()[0] == 8
        assert cache.stats()["corrupt"] == 4


class TestUse:
    def test_reading_makes_young_once_in_ten_minutes(
        self, cache: FrameCache, tier: DerivedTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(derived, "SAMPLE_BITS", 60)
        tier.write(KEY, IMAGE, True)
        path, out = only_file(cache), np.empty_like(IMAGE)

        def age_and_read() -> bool:
            os.utime(path, (1000, 1000))
            assert tier.read_many([KEY], [out]) == [True]
            return path.stat().st_mtime > 1000

        assert age_and_read()
        assert not age_and_read()
        later = time.monotonic() + 601
        monkeypatch.setattr(time, "monotonic", lambda: later)
        assert age_and_read()
        assert not age_and_read()

    def test_nothing_is_made_by_reading(self, cache: FrameCache, tier: DerivedTier) -> None:
        assert tier.read_into(KEY, np.empty_like(IMAGE)) is None
        assert tier.read_many([KEY, "1"], np.empty((2, *IMAGE.shape), IMAGE.dtype)) == [None, None]
        assert not cache.folder.exists()
        assert counts(cache) == {"derived_misses": 3}

    @pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
    def test_a_folder_others_can_read_is_refused_unless_allowed(self, tmp_path: Path) -> None:
        folder = tmp_path / "shared"
        folder.mkdir()
        folder.chmod(0o755)
        tier, out = FrameCache(folder).derived(STORE, RECIPE), np.empty_like(IMAGE)
        for call in (
            lambda: tier.write(KEY, IMAGE, True),
            lambda: tier.read_into(KEY, out),
            lambda: tier.read_many([KEY], [out]),
        ):
            with pytest.raises(CacheError, match="private=False"):
                call()
        assert list(folder.iterdir()) == []
        allowed = pickle.loads(pickle.dumps(FrameCache(folder, private=False))).derived(STORE, RECIPE)
        old = os.umask(0o027)
        try:
            assert allowed.write(KEY, IMAGE, True)
        finally:
            os.umask(old)
        assert allowed.read_into(KEY, out)
        (path,) = folder.glob("frames/*/*")
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o640, 0o750)

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors")
    def test_rows_that_cannot_be_written_raise_and_leak_nothing(self, tier: DerivedTier) -> None:
        tier.write(KEY, IMAGE, True)
        tier.read_into(KEY, np.empty_like(IMAGE))
        before = len(os.listdir("/proc/self/fd"))
        frozen = np.empty_like(IMAGE)
        frozen.flags.writeable = False
        for out in (np.empty((70, 60), np.int16).T, frozen):
            for _ in range(5):
                with pytest.raises((ValueError, TypeError)):
                    tier.read_into(KEY, out)
                with pytest.raises((ValueError, TypeError)):
                    tier.read_many([KEY], [out])
        with pytest.raises(ValueError):
            tier.read_many([KEY, KEY], [np.empty_like(IMAGE)])
        assert len(os.listdir("/proc/self/fd")) == before

    def test_without_preadv(self, cache: FrameCache, tier: DerivedTier, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(derived, "_preadv", None)
        tier.write(KEY, IMAGE, False)
        for _ in range(3):
            out = np.empty_like(IMAGE)
            assert tier.read_into(KEY, out) is False
            assert tier.read_many([KEY], [out]) == [False]
            np.testing.assert_array_equal(out, IMAGE)
        assert cache.stats()["derived_hits"] == 6

    def test_an_entry_that_vanishes_between_two_reads(self, cache: FrameCache, tier: DerivedTier) -> None:
        tier.write(KEY, IMAGE, True)
        out = np.empty_like(IMAGE)
        assert tier.read_into(KEY, out)
        cache.clear()
        assert tier.read_into(KEY, out) is None
        assert tier.read_many([KEY], [out]) == [None]
        assert not cache.stats()["corrupt"]


def _read_many_times(tier: DerivedTier, queue: Any) -> None:
    out = np.empty_like(IMAGE)
    queue.put([tier.read_into(KEY, out) is True and bool((out == IMAGE).all()) for _ in range(5)])


class TestProcesses:
    @pytest.mark.parametrize("method", ["spawn", "fork"])
    def test_a_tier_travels(self, cache: FrameCache, tier: DerivedTier, method: str) -> None:
        tier.write(KEY, IMAGE, True)
        tier.read_into(KEY, np.empty_like(IMAGE))
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=_read_many_times, args=(tier, queue))
        process.start()
        assert queue.get(timeout=60) == [True] * 5
        process.join(60)

    def test_pickled_together_they_count_together(self, cache: FrameCache, tier: DerivedTier) -> None:
        tier.write(KEY, IMAGE, True)
        data = pickle.dumps((cache, tier))
        assert len(data) < 1000
        cache, tier = pickle.loads(data)
        assert tier.read_into(KEY, np.empty_like(IMAGE))
        assert counts(cache) == {"derived_hits": 1, "bytes": IMAGE.nbytes}

    def test_threads_read_and_count_right(self, cache: FrameCache, tier: DerivedTier) -> None:
        keys = [str(number) for number in range(16)]
        for number, key in enumerate(keys):
            tier.write(key, IMAGE + number, True)
        wrong: list[object] = []

        def read() -> None:
            batch = np.empty((16, *IMAGE.shape), IMAGE.dtype)
            for _ in range(20):
                batch[:] = 0
                if tier.read_many(keys, batch) != [True] * 16:
                    wrong.append("verdict")
                if not all((batch[number] == IMAGE + number).all() for number in range(16)):
                    wrong.append("pixels")
                if tier.read_into(keys[3], batch[0]) is not True or not (batch[0] == IMAGE + 3).all():
                    wrong.append("one")

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert cache.stats()["derived_hits"] == 4 * 20 * 17
