"""The frame cache: whole entries or none, private, shared by processes, never in the way."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from ahi_ml.cache import CacheEntry, FrameCache
from ahi_ml.config import cache_folder
from ahi_ml.errors import CacheError

STORE, FRAME = "d" * 32, "0" * 32
DATA = bytes(range(256)) * 40
HEADER = 72


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    return FrameCache(tmp_path / "cache")


def only_file(cache: FrameCache) -> Path:
    (path,) = (path for path in cache.folder.rglob("*") if path.is_file())
    return path


def counts(cache: FrameCache) -> dict[str, int]:
    """The counts that are not nought."""
    return {name: count for name, count in cache.stats().items() if count}


def get(cache: FrameCache, frame: str = FRAME, reduce: int = 0) -> CacheEntry:
    entry = cache.get(STORE, frame, reduce)
    assert entry is not None
    return entry


class TestEntries:
    @pytest.mark.parametrize("verified", [True, False])
    @pytest.mark.parametrize("data", [b"", b"x", DATA, bytes(3_000_000)], ids=len)
    def test_a_round_trip(self, cache: FrameCache, data: bytes, verified: bool) -> None:
        assert cache.get(STORE, FRAME) is None
        cache.put(STORE, FRAME, data, verified=verified)
        entry = get(cache)
        assert bytes(entry.data) == data
        assert entry.verified is verified
        assert counts(cache) == {"hits": 1, "misses": 1, "writes": 1} | ({"bytes": len(data)} if data else {})
        assert cache.size() == (1, HEADER + len(data))

    def test_any_buffer_may_be_stored(self, cache: FrameCache) -> None:
        for number, data in enumerate([bytearray(DATA), memoryview(DATA)[3:]]):
            cache.put(STORE, str(number), data, verified=True)
            assert get(cache, str(number)).data == data

    def test_store_and_frame_both_count(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, DATA, verified=True)
        assert cache.get("e" * 32, FRAME) is None
        assert cache.get(STORE, "1" * 32) is None

    def test_the_newest_wins(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, b"old", verified=True)
        cache.put(STORE, FRAME, b"new", verified=False)
        assert (bytes(get(cache).data), get(cache).verified) == (b"new", False)
        assert cache.size()[0] == 1

    def test_the_header(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, DATA, verified=True)
        raw = only_file(cache).read_bytes()
        header = b"AHIF" + b"".join(
            value.to_bytes(size, "little")
            for value, size in ((2, 2), (1, 2), (zlib.crc32(DATA), 4), (len(DATA), 8), (0, 48))
        )
        assert raw == header + zlib.crc32(header).to_bytes(4, "little") + DATA

    def test_names_say_nothing(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, DATA, verified=True)
        relative = only_file(cache).relative_to(cache.folder).as_posix()
        assert STORE[:6] not in relative
        assert FRAME[:6] not in relative

    def test_drop(self, cache: FrameCache) -> None:
        cache.drop(STORE, FRAME)
        cache.put(STORE, FRAME, DATA, verified=True)
        cache.drop(STORE, FRAME)
        assert cache.get(STORE, FRAME) is None

    def test_clear(self, cache: FrameCache) -> None:
        for number in range(5):
            cache.put(STORE, str(number), DATA, verified=True)
        temporary = cache.folder / "parts"
        (temporary / "young.1.2.part").write_bytes(b"x")
        (temporary / "old.1.2.part").write_bytes(b"x")
        os.utime(temporary / "old.1.2.part", (0, 0))
        assert cache.size()[0] == 5
        assert cache.clear(older_than_s=3600) == 1
        assert cache.clear() == 5
        assert cache.size() == (0, 0)
        assert (temporary / "young.1.2.part").exists()  # somebody writes it just now

    def test_clear_removes_what_was_used_in_the_future(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, DATA, verified=True)
        os.utime(only_file(cache), (time.time() + 5000,) * 2)
        assert cache.clear(older_than_s=1) == 0
        assert cache.clear() == 1
        assert cache.size() == (0, 0)

    def test_two_may_clear_at_once(self, cache: FrameCache) -> None:
        for number in range(300):
            cache.put(STORE, str(number), b"x", verified=True)
        errors: list[BaseException] = []

        def clear() -> None:
            try:
                cache.clear()
                cache.size()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=clear) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert cache.size() == (0, 0)

    def test_nothing_happens_before_it_is_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = FrameCache(tmp_path / "absent")
        assert "0 hits" in repr(cache)
        assert cache.get(STORE, FRAME) is None
        assert cache.size() == (0, 0)
        assert cache.clear() == 0
        assert not cache.folder.exists()
        monkeypatch.setenv("AHI_ML_CACHE", str(tmp_path / "named"))
        assert cache_folder() == tmp_path / "named"
        assert cache_folder(tmp_path / "argument") == tmp_path / "argument"


def test_new_folders_on_windows_are_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ahi_ml.cache.private import restrict_on_windows

    ran: list[list[str]] = []

    def run(command: list[str], **options: Any) -> None:
        ran.append(command)
        raise FileNotFoundError  # no such program here: never more than an effort

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("USERNAME", "somebody")
    restrict_on_windows(tmp_path)
    assert ran == [["icacls", str(tmp_path), "/inheritance:r", "/grant:r", "somebody:(OI)(CI)F"]]


class TestPrefixes:
    """A lower resolution needs the first part of a frame, and reads no more."""

    PREFIXES = (4000, 1200, 300)

    @pytest.fixture
    def kept(self, cache: FrameCache) -> FrameCache:
        cache.put(STORE, FRAME, DATA, verified=True, prefixes=self.PREFIXES)
        return cache

    @pytest.mark.parametrize(("reduce", "size"), [(0, len(DATA)), (1, 4000), (2, 1200), (3, 300), (4, 300), (8, 300)])
    def test_what_is_read(self, kept: FrameCache, reduce: int, size: int) -> None:
        entry = kept.get(STORE, FRAME, reduce)
        assert entry is not None
        assert (entry.data, entry.verified, entry.whole) == (DATA[:size], True, reduce == 0)
        assert kept.stats()["bytes"] == size

    def test_more_levels_than_the_header_has_room_for(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, DATA, verified=True, prefixes=range(900, 0, -100))
        assert [len(get(cache, reduce=reduce).data) for reduce in (1, 6, 7, 8)] == [900, 400, 400, 400]

    def test_without_prefixes_all_is_read(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, DATA, verified=True)
        assert (get(cache, reduce=2).data, get(cache, reduce=2).whole) == (DATA, True)

    def test_damage_in_the_part_is_noticed(self, kept: FrameCache) -> None:
        path = only_file(kept)
        raw = path.read_bytes()
        path.write_bytes(raw[: HEADER + 500] + bytes([raw[HEADER + 500] ^ 1]) + raw[HEADER + 501 :])
        assert get(kept, reduce=3).data == DATA[:300]  # before the damage
        assert kept.get(STORE, FRAME, 2) is None
        assert not path.exists()
        assert kept.stats()["corrupt"] == 1

    def test_a_file_cut_behind_the_part_is_noticed(self, kept: FrameCache) -> None:
        path = only_file(kept)
        path.write_bytes(path.read_bytes()[:-1])
        assert kept.get(STORE, FRAME, 3) is None

    def test_the_first_part_alone(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, DATA[:1200], verified=False, whole=False, prefixes=self.PREFIXES)
        assert cache.get(STORE, FRAME) is None
        assert cache.get(STORE, FRAME, 1) is None
        assert counts(cache) == {"misses": 2, "writes": 1}
        assert (get(cache, reduce=2).data, get(cache, reduce=2).whole) == (DATA[:1200], False)
        assert get(cache, reduce=3).data == DATA[:300]
        assert cache.verify()["corrupt"] == 0
        cache.put(STORE, FRAME, DATA, verified=True, prefixes=self.PREFIXES)  # the frame itself takes its place
        assert get(cache).data == DATA


class TestDamage:
    def test_every_flipped_byte_of_the_header_is_noticed(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, DATA, verified=False)
        path = only_file(cache)
        whole = path.read_bytes()
        for place in [*range(HEADER), HEADER, len(whole) // 2, len(whole) - 1]:
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            before = cache.stats()["corrupt"]
            assert cache.get(STORE, FRAME) is None
            assert cache.stats()["corrupt"] == before + 1
            assert not path.exists()
            assert cache.stats()["hits"] == 0

    @pytest.mark.parametrize("size", [0, 1, HEADER - 1, HEADER, HEADER + 1, HEADER + len(DATA) - 1])
    def test_torn_entries_are_dropped(self, cache: FrameCache, size: int) -> None:
        cache.put(STORE, FRAME, DATA, verified=True)
        path = only_file(cache)
        path.write_bytes(path.read_bytes()[:size])
        assert cache.get(STORE, FRAME) is None
        assert counts(cache) == {"misses": 1, "writes": 1, "corrupt": 1}
        assert not path.exists()
        cache.put(STORE, FRAME, DATA, verified=True)
        assert get(cache).data == DATA

    def test_an_entry_with_a_tail_is_dropped(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, DATA, verified=True)
        with only_file(cache).open("ab") as file:
            file.write(b"tail")
        assert cache.get(STORE, FRAME) is None

    def test_a_killed_writer_leaves_whole_entries(self, cache: FrameCache) -> None:
        """Writers are killed at any instant; what can be read afterwards is whole."""
        code = (
            "import sys\nfrom pathlib import Path\nfrom ahi_ml.cache import FrameCache\n"
            "cache = FrameCache(Path(sys.argv[1]))\nprint('up', flush=True)\n"
            "while True:\n"
            "    for number in range(20):\n"
            "        cache.put('d', str(number), bytes([number]) * 400_000, verified=True)\n"
        )
        for round_ in range(4):
            writer = subprocess.Popen([sys.executable, "-c", code, str(cache.folder)], stdout=subprocess.PIPE)
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"up\n"
            time.sleep(0.03 + 0.013 * round_)
            writer.send_signal(signal.SIGKILL)
            writer.wait(10)
            writer.stdout.close()
            for number in range(20):
                entry = cache.get("d", str(number))
                assert entry is None or entry.data == bytes([number]) * 400_000
        assert cache.stats()["corrupt"] == 0
        assert cache.stats()["hits"] > 0


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
class TestPrivacy:
    def test_mode_bits(self, cache: FrameCache) -> None:
        old = os.umask(0)
        try:
            cache.put(STORE, FRAME, DATA, verified=True)
        finally:
            os.umask(old)
        path = only_file(cache)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert self.modes(cache) == {0o700}

    @staticmethod
    def modes(cache: FrameCache) -> set[int]:
        folders = [cache.folder, *(path for path in cache.folder.rglob("*") if path.is_dir())]
        assert len(folders) == 4  # frames, one of its folders, and parts
        return {stat.S_IMODE(folder.stat().st_mode) for folder in folders}

    def test_mode_bits_after_somebody_deleted_everything(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, DATA, verified=True)
        shutil.rmtree(cache.folder)
        cache.put(STORE, FRAME, DATA, verified=True)
        assert cache.get(STORE, FRAME) is not None
        assert self.modes(cache) == {0o700}

    @pytest.mark.parametrize("mode", [0o750, 0o705, 0o770, 0o701])
    def test_a_folder_others_can_read_is_refused(self, tmp_path: Path, mode: int) -> None:
        folder = tmp_path / "shared"
        folder.mkdir()
        folder.chmod(mode)
        cache = FrameCache(folder)
        for _ in range(2):
            with pytest.raises(CacheError, match="AHI_ML_CACHE"):
                cache.put(STORE, FRAME, DATA, verified=True)
        assert list(folder.iterdir()) == []


class TestTrouble:
    def warned_once(self, cache: FrameCache, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "ahi_ml"):
            for number in range(5):
                cache.put(STORE, str(number), DATA, verified=True)
                cache.get(STORE, "absent")
        assert len(caplog.records) == 1
        assert "is not used from here on" in caplog.text
        assert cache.stats()["writes"] == 0
        assert not [path for path in cache.folder.rglob("*.part") if path.is_file()]

    @pytest.mark.parametrize("call", ["open", "replace"])
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
    def test_a_disk_that_refuses_costs_one_warning(
        self,
        cache: FrameCache,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        call: str,
        number: int,
    ) -> None:
        cache.put(STORE, "before", DATA, verified=True)
        cache = FrameCache(cache.folder)

        real = os.open

        def refuse(*arguments: Any, **options: Any) -> Any:
            if call == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
                return real(*arguments, **options)
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, call, refuse)
        self.warned_once(cache, caplog)
        assert get(cache, "before").data == DATA  # reading goes on

    def test_a_file_in_the_place_of_the_folder(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "file").write_text("x")
        self.warned_once(FrameCache(tmp_path / "file"), caplog)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="limits are POSIX's")
    def test_a_write_cut_short_leaves_no_entry(self, cache: FrameCache) -> None:
        """The system writes what fits and says so only at the next write."""
        code = (
            "import resource, sys, logging\nfrom pathlib import Path\nfrom ahi_ml.cache import FrameCache\n"
            "logging.basicConfig()\n"
            "cache = FrameCache(Path(sys.argv[1]))\n"
            "cache.put('d', 'small', b'x', verified=True)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
            "cache.put('d', 'large', bytes(400_000), verified=True)\n"
            "assert cache.get('d', 'large') is None\n"
            "assert cache.get('d', 'small') is not None\n"
            "print(*[cache.stats()[name] for name in ('hits', 'misses', 'writes')])\n"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, str(cache.folder)], capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == "1 1 1"
        assert run.stderr.count("is not used from here on") == 1
        assert cache.size()[0] == 1


def _write_often(cache: FrameCache, letter: bytes, queue: Any) -> None:
    wrong = 0
    for _ in range(150):
        cache.put(STORE, FRAME, letter * 20_000, verified=True)
        entry = cache.get(STORE, FRAME)
        wrong += entry is None or bytes(entry.data) not in (b"a" * 20_000, b"b" * 20_000)
    queue.put((wrong, cache.stats()["corrupt"]))


class TestProcesses:
    def test_pickled_it_is_its_folder(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, DATA, verified=True)
        data = pickle.dumps(cache)
        assert len(data) < 1000
        again = pickle.loads(data)
        assert again.folder == cache.folder
        assert counts(again) == {}
        assert get(again).data == DATA

    @pytest.mark.parametrize("method", ["spawn", "fork"])
    def test_two_write_the_same_entry(self, cache: FrameCache, method: str) -> None:
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        processes = [context.Process(target=_write_often, args=(cache, letter, queue)) for letter in (b"a", b"b")]
        for process in processes:
            process.start()
        assert [queue.get(timeout=60) for _ in processes] == [(0, 0), (0, 0)]
        for process in processes:
            process.join(60)
        assert cache.size()[0] == 1
        assert not list(cache.folder.rglob("*.part"))

    def test_threads_count_right(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, DATA, verified=True)

        def read() -> None:
            for _ in range(200):
                cache.get(STORE, FRAME)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert cache.stats()["hits"] == 800


class TestSampling:
    """Bytes are checked when a process first reads them, and then now and then."""

    def damage(self, cache: FrameCache) -> None:
        path = only_file(cache)
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    def test_damage_is_found_by_sampling(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, DATA, verified=True)
        assert cache.get(STORE, FRAME) is not None
        self.damage(cache)
        reads = 0
        while cache.get(STORE, FRAME) is not None:
            reads += 1
            assert reads < 5000
        assert cache.stats()["corrupt"] == 1

    def test_another_process_checks_for_itself(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, DATA, verified=True)
        assert cache.get(STORE, FRAME) is not None
        self.damage(cache)
        assert FrameCache(cache.folder).get(STORE, FRAME) is None

    def test_what_is_put_again_is_checked_again(self, cache: FrameCache) -> None:
        for _ in range(20):
            cache.put(STORE, FRAME, DATA, verified=True)
            assert cache.get(STORE, FRAME) is not None
            cache.put(STORE, FRAME, DATA, verified=True)
            self.damage(cache)
            assert cache.get(STORE, FRAME) is None

    def test_a_damaged_header_is_found_at_once(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, DATA, verified=False)
        for place in range(HEADER):
            assert cache.get(STORE, FRAME) is not None
            path = only_file(cache)
            whole = path.read_bytes()
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert cache.get(STORE, FRAME) is None
            cache.put(STORE, FRAME, DATA, verified=False)

    def test_a_file_cut_short_is_found_at_once(self, cache: FrameCache) -> None:
        cache.put(STORE, FRAME, DATA, verified=True)
        assert cache.get(STORE, FRAME) is not None
        path = only_file(cache)
        path.write_bytes(path.read_bytes()[:-1])
        assert cache.get(STORE, FRAME) is None

    @pytest.mark.parametrize("size", [1, 200_000, 262_072, 262_073, 900_000])
    def test_sizes_around_what_is_read_at_first(self, cache: FrameCache, size: int) -> None:
        for number in range(4):
            data = bytes([number]) * (size // (number + 1) + 1)
            cache.put(STORE, str(number), data, verified=True)
            for _ in range(3):
                assert get(cache, str(number)).data == data
