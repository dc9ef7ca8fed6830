"""The reader with a cache whose remote tier is slow: who waits, who is asked, and what is counted."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_reader import PATIENCE_S, STORE, STORED, Served, random_image, raw_frames, source_of

from ahi_ml.cache import FrameCache
from ahi_ml.codec import HTJ2K_LOSSLESS_RPCL, jpeg2000
from ahi_ml.errors import DataError
from ahi_ml.index import FrameSource
from ahi_ml.reader import Reader


class SlowFiles(MemoryFileSystem):
    """Objects in memory, each request of which may take long: whatever `meanwhile` does with the object's name."""

    protocol = "slowly"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    asked: ClassVar[Counter[str]] = Counter()
    meanwhile: ClassVar[Callable[[str], object]] = staticmethod(lambda name: None)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("slowly://", "memory://")))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        name = path.rpartition("/frames/")[2].replace("/", "")
        self.asked[name] += 1
        self.meanwhile(name)
        return bytes(super().cat_file(path, start, end, **options))


@pytest.fixture
def files() -> Iterator[type[SlowFiles]]:
    fsspec.register_implementation("slowly", SlowFiles, clobber=True)
    yield SlowFiles
    SlowFiles.store.clear()
    SlowFiles.asked.clear()
    SlowFiles.meanwhile = staticmethod(lambda name: None)


@pytest.fixture
def cache_of(tmp_path: Path, files: type[SlowFiles]) -> Callable[..., FrameCache]:
    """Makes caches in folders of their own, with one remote tier."""

    def make(name: str, **options: Any) -> FrameCache:
        return FrameCache(tmp_path / name, remote=f"slowly://{tmp_path.name}", **options)

    return make


@pytest.fixture
def reader_of() -> Iterator[Callable[..., Reader]]:
    """Makes readers of transports with two threads; they end with the test."""
    made: list[Reader] = []

    def make(transport: Any) -> Reader:
        made.append(Reader(transport, STORE, threads=2))
        return made[-1]

    yield make
    for reader in made:
        reader.close()


def fill(cache: FrameCache, blobs: dict[str, bytes], **options: Any) -> None:
    """Put frames into a remote tier, by way of a cache with another folder."""
    for name, blob in blobs.items():
        cache.put(STORE, name, blob, **{"verified": True, **options})
    cache.flush()


def counts(cache: FrameCache, *names: str) -> list[int]:
    stats = cache.stats()
    return [stats[name] for name in names or ("hits", "misses", "remote_hits", "corrupt")]


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class TestWaiting:
    @pytest.mark.parametrize("full", [True, False])
    def test_all_frames_of_a_batch_are_looked_up_at_once(
        self, reader_of: Callable[..., Reader], cache_of: Callable[..., FrameCache], files: type[SlowFiles], full: bool
    ) -> None:
        images, sources, blobs = raw_frames(48)
        if full:
            fill(cache_of("one"), blobs)
        together = threading.Barrier(48, timeout=PATIENCE_S)  # one fewer at a time, and it breaks
        files.meanwhile = staticmethod(lambda name: together.wait())
        served, cache = Served(blobs), cache_of("other")
        for array, image in zip(reader_of(served).read(sources, STORED, cache=cache), images.values(), strict=True):
            np.testing.assert_array_equal(array, image)
        assert not together.broken
        assert sorted(served.requests) == ([] if full else sorted(blobs))
        assert counts(cache) == ([48, 0, 48, 0] if full else [0, 48, 0, 0])
        assert set(files.asked.values()) == {1}

    def test_batches_submitted_ahead_are_looked_up_with_the_first(
        self, reader_of: Callable[..., Reader], cache_of: Callable[..., FrameCache], files: type[SlowFiles]
    ) -> None:
        images, sources, blobs = raw_frames(32)
        fill(cache_of("one"), blobs)
        together = threading.Barrier(32, timeout=PATIENCE_S)
        files.meanwhile = staticmethod(lambda name: together.wait())
        reader, cache = reader_of(Served({})), cache_of("other")
        batches = [reader.submit(sources[start : start + 4], STORED, cache=cache) for start in range(0, 32, 4)]
        read = [array for batch in batches for array in batch.wait(PATIENCE_S)]
        for array, image in zip(read, images.values(), strict=True):
            np.testing.assert_array_equal(array, image)

    def test_threads_decode_what_is_here_meanwhile(
        self, reader_of: Callable[..., Reader], cache_of: Callable[..., FrameCache], files: type[SlowFiles]
    ) -> None:
        images, sources, blobs = raw_frames(20)
        cache, go = cache_of("one"), threading.Event()
        for source in sources[10:]:
            cache.put(STORE, source.frame_id, blobs[source.frame_id], verified=True)
        cache.flush()
        files.store.clear()
        files.meanwhile = staticmethod(lambda name: go.wait(PATIENCE_S))
        reader = reader_of(Served(blobs))
        batch = reader.submit(sources, STORED, cache=cache)
        until(lambda: batch.stats.cached == 10)
        again = reader.submit(sources[10:], STORED, cache=cache)
        assert len(again.wait(PATIENCE_S)) == 10
        assert not go.is_set()
        go.set()
        for array, image in zip(batch.wait(PATIENCE_S), images.values(), strict=True):
            np.testing.assert_array_equal(array, image)
        assert len(files.asked) == 10

    def test_a_frame_goes_on_when_its_own_answer_is_there(
        self, reader_of: Callable[..., Reader], cache_of: Callable[..., FrameCache], files: type[SlowFiles]
    ) -> None:
        _, sources, blobs = raw_frames(8)
        blobs_there = {name: blob for name, blob in blobs.items() if name != sources[7].frame_id}
        fill(cache_of("one"), blobs_there)
        cache, go = cache_of("other"), threading.Event()
        first = cache.name(STORE, sources[0].frame_id)
        files.meanwhile = staticmethod(lambda name: name != first or go.wait(PATIENCE_S))
        batch = reader_of(Served(blobs)).submit(sources, STORED, cache=cache)
        until(lambda: batch.stats.cached == 6 and batch.stats.fetched == 1)
        go.set()
        batch.wait(PATIENCE_S)
        assert batch.stats.cached == 7

    def test_cancelling_waits_for_nobody(
        self, reader_of: Callable[..., Reader], cache_of: Callable[..., FrameCache], files: type[SlowFiles]
    ) -> None:
        images, sources, blobs = raw_frames(100)
        fill(cache_of("one"), blobs)
        cache, go = cache_of("other"), threading.Event()
        files.meanwhile = staticmethod(lambda name: go.wait(PATIENCE_S))
        served = Served(blobs)
        reader = reader_of(served)
        batch = reader.submit(sources, STORED, cache=cache)
        until(lambda: len(files.asked) == 64)  # the others wait for a thread
        until(lambda: len(batch.requests) == 100)
        batch.cancel()
        outcomes = batch.outcomes(1.0)
        assert all(isinstance(outcome, DataError) for outcome in outcomes)
        assert cache.size() == (0, 0)
        go.set()
        for array, image in zip(reader.read(sources, STORED, cache=cache), images.values(), strict=True):
            np.testing.assert_array_equal(array, image)
        assert not served.requests

    def test_a_program_that_ends_waits_for_nobody(self, tmp_path: Path) -> None:
        program = """
import sys, time
from pathlib import Path
import fsspec
from test_reader import STORE, STORED, Served, raw_frames
from test_reader_remote import SlowFiles
from ahi_ml.cache import FrameCache
from ahi_ml.reader import Reader

fsspec.register_implementation("slowly", SlowFiles)
SlowFiles.meanwhile = staticmethod(lambda name: time.sleep(60))
_, sources, blobs = raw_frames(4)
reader = Reader(Served(blobs), STORE)
batch = reader.submit(sources, STORED, cache=FrameCache(Path(sys.argv[1]), remote="slowly://x"))
while len(SlowFiles.asked) < 4:
    time.sleep(0.01)
batch.cancel()
"""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "cache")], env=environment, timeout=40, check=True
        )


class TestAnswers:
    def test_a_frame_wanted_by_many_is_looked_up_once_and_fetched_once(
        self, reader_of: Callable[..., Reader], cache_of: Callable[..., FrameCache], files: type[SlowFiles]
    ) -> None:
        _, sources, blobs = raw_frames(6)
        fill(cache_of("one"), dict(list(blobs.items())[:3]))
        cache, go = cache_of("other"), threading.Event()
        files.meanwhile = staticmethod(lambda name: go.wait(PATIENCE_S))
        served = Served(blobs)
        reader = reader_of(served)
        batches = [reader.submit(sources * 2, STORED, cache=cache) for _ in range(4)]
        until(lambda: len(files.asked) == 6)
        go.set()
        for batch in batches:
            batch.wait(PATIENCE_S)
        assert set(files.asked.values()) == {1}
        assert sorted(served.requests) == sorted(list(blobs)[3:])

    def test_what_was_fetched_is_sent_there(
        self, reader_of: Callable[..., Reader], cache_of: Callable[..., FrameCache], files: type[SlowFiles]
    ) -> None:
        _, sources, blobs = raw_frames(5)
        one, served = cache_of("one"), Served({})
        reader_of(Served(blobs)).read(sources, STORED, cache=one)
        one.flush()
        reader = reader_of(served)
        reader.read(sources, STORED, cache=cache_of("other"))
        assert not served.requests
        stats = reader.stats()
        assert (stats["cached"], stats["fetched"], stats["verified"]) == (5, 0, 5)

    @pytest.mark.parametrize("wrong", [b"short", random_image(99).tobytes()])
    def test_what_is_wrong_there_is_fetched_and_replaced(
        self,
        reader_of: Callable[..., Reader],
        cache_of: Callable[..., FrameCache],
        files: type[SlowFiles],
        wrong: bytes,
    ) -> None:
        images, (source,), blobs = raw_frames(1)
        fill(cache_of("one"), {source.frame_id: wrong}, verified=False)
        cache, served = cache_of("other"), Served(blobs)
        (array,) = reader_of(served).read([source], STORED, cache=cache)
        np.testing.assert_array_equal(array, images[source.frame_id])
        assert served.requests == [source.frame_id]
        cache.flush()
        for folder in ("other", "third"):
            entry = cache_of(folder).get(STORE, source.frame_id)
            assert entry is not None
            assert (bytes(entry.data), entry.verified) == (blobs[source.frame_id], True)

    def test_what_is_wrong_here_comes_from_there(
        self, reader_of: Callable[..., Reader], cache_of: Callable[..., FrameCache], tmp_path: Path
    ) -> None:
        images, (source,), blobs = raw_frames(1)
        fill(cache_of("one"), blobs)
        FrameCache(tmp_path / "other").put(STORE, source.frame_id, random_image(99).tobytes(), verified=False)
        cache, served = cache_of("other"), Served({})
        (array,) = reader_of(served).read([source], STORED, cache=cache)
        np.testing.assert_array_equal(array, images[source.frame_id])
        assert not served.requests
        assert min(cache.stats().values()) == 0

    def test_what_is_damaged_there_is_fetched_and_replaced(
        self, reader_of: Callable[..., Reader], cache_of: Callable[..., FrameCache], files: type[SlowFiles]
    ) -> None:
        images, sources, blobs = raw_frames(6)
        fill(cache_of("one"), blobs)
        for number, (name, file) in enumerate(list(files.store.items())):
            raw = file.getvalue()
            SlowFiles().pipe_file(name, [raw[:-1], b"", raw[:-1] + bytes([raw[-1] ^ 1])][number % 3])
        cache, served = cache_of("other"), Served(blobs)
        for array, image in zip(reader_of(served).read(sources, STORED, cache=cache), images.values(), strict=True):
            np.testing.assert_array_equal(array, image)
        assert sorted(served.requests) == sorted(blobs)
        assert counts(cache) == [0, 6, 0, 6]
        cache.flush()
        third = cache_of("third")
        assert all(third.get(STORE, name) for name in blobs)

    def test_trouble_is_one_warning_and_no_more_requests(
        self,
        reader_of: Callable[..., Reader],
        cache_of: Callable[..., FrameCache],
        files: type[SlowFiles],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def burn(name: str) -> None:
            raise OSError("the bucket is on fire")

        images, sources, blobs = raw_frames(80)
        files.meanwhile = staticmethod(burn)
        cache, served = cache_of("one"), Served(blobs)
        reader = reader_of(served)
        with caplog.at_level(logging.WARNING, "ahi_ml"):
            first = reader.read(sources[:70], STORED, cache=cache)
            asked = files.asked.total()
            assert 1 <= asked <= 70
            second = reader.read(sources[70:], STORED, cache=cache)
        assert files.asked.total() == asked
        for array, image in zip([*first, *second], images.values(), strict=True):
            np.testing.assert_array_equal(array, image)
        assert len(caplog.records) == 1
        assert sorted(served.requests) == sorted(blobs)

    def test_a_folder_that_refuses_leaves_the_remote(
        self, reader_of: Callable[..., Reader], cache_of: Callable[..., FrameCache], tmp_path: Path
    ) -> None:
        images, sources, blobs = raw_frames(5)
        fill(cache_of("one"), blobs)
        (tmp_path / "file").write_text("x")
        served = Served({})
        read = reader_of(served).read(sources, STORED, cache=cache_of("file"))
        for array, image in zip(read, images.values(), strict=True):
            np.testing.assert_array_equal(array, image)
        assert not served.requests

    def test_lower_resolutions_and_results(
        self, reader_of: Callable[..., Reader], cache_of: Callable[..., FrameCache], files: type[SlowFiles]
    ) -> None:
        image = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint16)
        data = jpeg2000.encode_htj2k(image)
        source: FrameSource = source_of("a" * 32, image, checksum=False, StoredTransferSyntaxUID=HTJ2K_LOSSLESS_RPCL)
        one, other = cache_of("one"), cache_of("other")
        fill(one, {source.frame_id: data})
        options = replace(STORED, reduce=1)
        (expected,) = reader_of(Served({source.frame_id: data})).read([source], options)
        served = Served({})
        reader = reader_of(served)
        results = other.derived(STORE, "recipe")
        for _ in range(2):
            (found,) = reader.submit([source], options, cache=other, derived=results).wait(PATIENCE_S)
            assert found.shape == (32, 32)
            np.testing.assert_array_equal(found, expected)
        assert counts(other, "remote_hits", "derived_hits") == [1, 1]
        assert not served.requests

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
    def test_after_a_fork(
        self, reader_of: Callable[..., Reader], cache_of: Callable[..., FrameCache], files: type[SlowFiles]
    ) -> None:
        images, sources, blobs = raw_frames(8)
        fill(cache_of("one"), blobs)
        cache, go = cache_of("other"), threading.Event()
        files.meanwhile = staticmethod(lambda name: go.wait(PATIENCE_S))
        batch = reader_of(Served(blobs)).submit(sources[:4], STORED, cache=cache)
        until(lambda: len(files.asked) == 4)  # its threads are there, and wait
        child = os.fork()
        if child == 0:
            right = False
            try:
                files.meanwhile = staticmethod(lambda name: None)
                read = Reader(Served({}), STORE, threads=2).submit(sources[4:], STORED, cache=cache).wait(PATIENCE_S)
                right = all(map(np.array_equal, read, list(images.values())[4:]))
            finally:
                os._exit(0 if right else 1)
        assert os.waitpid(child, 0)[1] == 0
        go.set()
        batch.wait(PATIENCE_S)
