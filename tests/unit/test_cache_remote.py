"""The remote tier: frames are found there when the folder has none, and its trouble is nobody's."""

from __future__ import annotations

import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ahi_ml.cache import FrameCache, remote
from ahi_ml.config import cache_folder, cache_places
from ahi_ml.errors import ConfigError
from ahi_ml.store import DataStore, Target

STORE, FRAME = "d" * 32, "0" * 32
DATA = bytes(range(256)) * 40
PATIENCE_S = 20.0


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    yield f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").store.clear()


def machine(tmp_path: Path, name: str, url: str, **options: Any) -> FrameCache:
    return FrameCache(tmp_path / name, remote=url, **options)


def brought(cache: FrameCache, frames: list[str]) -> int:
    """How many frames the remote tier gave that the folder has not, asked for all at once."""
    assert cache.get_many(STORE, frames) == [None] * len(frames)
    asked = [cache.ask(STORE, frame) for frame in frames]
    answers = [each.result(PATIENCE_S) if each is not None else None for each in asked]
    found = [cache.accept(STORE, frame, answer) for frame, answer in zip(frames, answers, strict=True)]
    return len(found) - found.count(None)


def counts(cache: FrameCache) -> dict[str, int]:
    return {name: count for name, count in cache.stats().items() if count}


def objects() -> dict[str, Any]:
    return fsspec.filesystem("memory").store


class TestTier:
    def test_one_machine_writes_another_reads(self, tmp_path: Path, url: str) -> None:
        one, other = machine(tmp_path, "one", url), machine(tmp_path, "other", url)
        assert one.get(STORE, FRAME) is None
        one.put(STORE, FRAME, DATA, verified=True)
        one.flush()
        for _ in range(2):
            entry = other.get(STORE, FRAME)
            assert entry is not None
            assert (bytes(entry.data), entry.verified) == (DATA, True)
        assert counts(one) == {"misses": 1, "writes": 1}
        assert counts(other) == {"hits": 2, "remote_hits": 1, "writes": 1, "bytes": 2 * len(DATA)}

    def test_the_verdict_travels(self, tmp_path: Path, url: str) -> None:
        one = machine(tmp_path, "one", url)
        one.put(STORE, FRAME, DATA, verified=False)
        one.flush()
        for _ in range(2):
            entry = machine(tmp_path, "other", url).get(STORE, FRAME)
            assert entry is not None
            assert entry.verified is False

    def test_names_say_nothing(self, tmp_path: Path, url: str) -> None:
        one = machine(tmp_path, "one", url)
        one.put(STORE, FRAME, DATA, verified=True)
        one.flush()
        (name,) = objects()
        assert name.startswith(f"/{tmp_path.name}/frames/")
        assert STORE[:6] not in name
        assert FRAME[:6] not in name

    def test_results_stay_local(self, tmp_path: Path, url: str) -> None:
        cache = machine(tmp_path, "one", url)
        cache.derived(STORE, "recipe").write(FRAME, np.zeros(3), True)
        cache.flush()
        assert not objects()

    def test_many_at_once(self, tmp_path: Path, url: str) -> None:
        one, other = machine(tmp_path, "one", url), machine(tmp_path, "other", url)
        frames = [str(number) for number in range(150)]
        for frame in frames[10:]:
            one.put(STORE, frame, frame.encode() * 100, verified=True)
        one.flush()
        assert brought(other, frames) == 140
        size = sum(len(frame) for frame in frames[10:]) * 100
        assert counts(other) == {"misses": 10, "hits": 140, "remote_hits": 140, "writes": 140, "bytes": size}
        objects().clear()
        for frame in frames[10:]:
            entry = other.get(STORE, frame)
            assert entry is not None
            assert entry.data == frame.encode() * 100

    def test_many_are_written_at_once(self, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        together, keep = threading.Barrier(48, timeout=PATIENCE_S), MemoryFileSystem.pipe_file

        def wait_and_keep(*arguments: Any, **options: Any) -> None:
            together.wait()
            keep(*arguments, **options)

        monkeypatch.setattr(MemoryFileSystem, "pipe_file", wait_and_keep)
        cache = machine(tmp_path, "one", url)
        for number in range(48):
            cache.put(STORE, str(number), DATA, verified=True)
        cache.flush()
        assert len(objects()) == 48

    def test_without_one_there_is_nobody_to_ask(self, tmp_path: Path) -> None:
        assert FrameCache(tmp_path).ask(STORE, FRAME) is None

    @pytest.mark.parametrize("place", [0, 8, 31, 32, -1])
    def test_what_is_damaged_there_is_refused_and_replaced(self, tmp_path: Path, url: str, place: int) -> None:
        one = machine(tmp_path, "one", url)
        one.put(STORE, FRAME, DATA, verified=True)
        one.flush()
        files = fsspec.filesystem("memory")
        (name,) = objects()
        damaged = bytearray(files.cat_file(name))
        damaged[place] ^= 1
        files.pipe_file(name, bytes(damaged))
        other = machine(tmp_path, "other", url)
        assert other.get(STORE, FRAME) is None
        assert counts(other) == {"misses": 1, "corrupt": 1}
        assert other.size() == (0, 0)
        other.put(STORE, FRAME, DATA, verified=True)
        other.flush()
        assert machine(tmp_path, "third", url).get(STORE, FRAME) is not None

    def test_what_is_damaged_here_comes_from_there(self, tmp_path: Path, url: str) -> None:
        cache = machine(tmp_path, "one", url)
        cache.put(STORE, FRAME, DATA, verified=True)
        cache.flush()
        (path,) = cache.folder.glob("frames/*/*")
        path.write_bytes(path.read_bytes()[:-1])
        entry = cache.get(STORE, FRAME)
        assert entry is not None
        assert entry.data == DATA
        assert counts(cache)["corrupt"] == counts(cache)["remote_hits"] == 1

    def test_a_folder_that_refuses_leaves_the_remote(
        self, tmp_path: Path, url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("x")
        cache = machine(tmp_path, "file", url)
        cache.put(STORE, FRAME, DATA, verified=True)
        cache.flush()
        assert cache.get(STORE, FRAME) is not None
        assert len(caplog.records) == 1

    def test_it_travels(self, tmp_path: Path, url: str) -> None:
        cache = machine(tmp_path, "one", url, remote_options={"skip_instance_cache": False})
        cache.put(STORE, FRAME, DATA, verified=True)
        cache.flush()
        again = pickle.loads(pickle.dumps(cache))
        again.clear()
        assert again.get(STORE, FRAME) is not None
        assert url in repr(again)


class _Refusing:
    """A remote that is down."""

    def __init__(self) -> None:
        self.asked = 0

    def refuse(self, *arguments: Any, **options: Any) -> Any:
        self.asked += 1
        raise OSError("the bucket is on fire")

    cat_file = pipe_file = refuse


class TestTrouble:
    def test_it_costs_one_warning_and_is_left_alone_for_a_while(
        self, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache, refusing = machine(tmp_path, "one", url), _Refusing()
        monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **options: (refusing, "root"))
        with caplog.at_level(logging.WARNING, "ahi_ml"):
            for number in range(50):
                cache.put(STORE, str(number), DATA, verified=True)
                cache.flush()
                assert cache.get(STORE, str(number)) is not None
                assert cache.get(STORE, f"absent {number}") is None
            assert cache.ask(STORE, "absent") is None
            assert refusing.asked == 1
            later = time.monotonic() + 61
            monkeypatch.setattr(remote.time, "monotonic", lambda: later)
            assert cache.get(STORE, "absent") is None
            assert refusing.asked == 2
            assert cache.ask(STORE, "absent") is None
            assert refusing.asked == 2
        assert len(caplog.records) == 1
        assert "on fire" in caplog.text

    @pytest.mark.parametrize("call", ["get", "ask", "put"])
    def test_each_call_survives_it(
        self, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
    ) -> None:
        cache, refusing = machine(tmp_path, "one", url), _Refusing()
        monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **options: (refusing, "root"))
        if call == "get":
            assert cache.get(STORE, FRAME) is None
        elif call == "ask":
            assert brought(cache, [FRAME]) == 0
        else:
            cache.put(STORE, FRAME, DATA, verified=True)
            cache.flush()
        assert refusing.asked == 1
        assert len(caplog.records) == 1

    def test_a_slow_one_is_not_waited_for_until_much_is_under_way(
        self, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        go = threading.Event()

        class Slow(_Refusing):
            def pipe_file(self, *arguments: Any) -> None:
                self.asked += 1
                go.wait(30)

        cache, slow = machine(tmp_path, "one", url), Slow()
        monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url, **options: (slow, "root"))
        done = threading.Event()

        def put() -> None:
            for number in range(100):
                cache.put(STORE, str(number), b"x", verified=True)
            done.set()

        thread = threading.Thread(target=put)
        thread.start()
        deadline = time.monotonic() + 20
        while cache.stats()["writes"] < remote._MOST_WAITING and time.monotonic() < deadline:
            time.sleep(0.005)
        assert cache.stats()["writes"] >= remote._MOST_WAITING
        assert not done.wait(0.1), "memory would grow with what waits"
        go.set()
        assert done.wait(20)
        thread.join()
        cache.flush()
        assert slow.asked == 100

    def test_what_cannot_be_opened_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="URL"):
            FrameCache(tmp_path, remote="bucket/prefix")
        cache = FrameCache(tmp_path / "cache", remote="nonsense://bucket")
        with pytest.raises(ConfigError, match="nonsense"):
            cache.get(STORE, FRAME)


class TestPlaces:
    @pytest.mark.parametrize(
        "url", ["s3://AKIA:hunter2@bucket/x", "s3://AKIA:hun/ter2@bucket/x", "sftp://me:hunter2@host/x"]
    )
    def test_a_password_in_the_url_is_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str) -> None:
        monkeypatch.setenv("AHI_ML_CACHE", url)
        for make in (
            lambda: FrameCache(tmp_path, remote=url),
            lambda: FrameCache.at(url),
            FrameCache.at,
            lambda: DataStore(Target(STORE, None, cache=url)).cache,
        ):
            with pytest.raises(ConfigError, match="password") as caught:
                make()
            assert not any(part in str(caught.value) for part in ("hun", "ter2", "AKIA"))

    def test_argument_then_environment_then_default(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("AHI_ML_CACHE", raising=False)
        usual = cache_folder()
        assert cache_places() == (usual, None)
        assert cache_places("s3://bucket/x") == (usual, "s3://bucket/x")
        assert cache_places(tmp_path) == (tmp_path, None)
        assert cache_places("~/x") == (Path.home() / "x", None)
        monkeypatch.setenv("AHI_ML_CACHE", str(tmp_path / "named"))
        assert cache_places() == (tmp_path / "named", None)
        assert cache_places("s3://bucket/x") == (tmp_path / "named", "s3://bucket/x")
        assert cache_places("other") == (Path("other"), None)
        monkeypatch.setenv("AHI_ML_CACHE", "s3://bucket/y")
        assert cache_places() == (usual, "s3://bucket/y")
        assert cache_places("s3://bucket/x") == (usual, "s3://bucket/x")
        assert cache_places(tmp_path) == (tmp_path, None)

    def test_a_data_store_takes_either(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("AHI_ML_CACHE", str(tmp_path / "named"))
        for given, folder, url in (
            (None, tmp_path / "named", None),
            (str(tmp_path / "own"), tmp_path / "own", None),
            ("s3://bucket/x", tmp_path / "named", "s3://bucket/x"),
        ):
            cache = DataStore(Target(STORE, None, cache=given)).cache
            assert cache.folder == folder
            assert (url or "s3://") in repr(cache) or url is None


@pytest.fixture(scope="module")
def moto_s3() -> Iterator[str]:
    """The URL of an S3 service on this machine, with a bucket named ``bucket``."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not there")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        boto3.client("s3", endpoint_url=url, region_name="us-east-1", **_KEYS).create_bucket(Bucket="bucket")
        yield url
    finally:
        server.stop()


_KEYS = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}


def _options(endpoint: str) -> dict[str, Any]:
    return {
        "key": "testing",
        "secret": "testing",
        "endpoint_url": endpoint,
        "client_kwargs": {"region_name": "us-east-1"},
    }


def _get(cache: FrameCache) -> bytes | None:
    entry = cache.get(STORE, FRAME)
    return bytes(entry.data) if entry else None


class TestS3:
    def test_through_a_bucket(self, tmp_path: Path, moto_s3: str) -> None:
        url, options = "s3://bucket/some/prefix/", {"remote_options": _options(moto_s3)}
        one, other = machine(tmp_path, "one", url, **options), machine(tmp_path, "other", url, **options)
        frames = [str(number) for number in range(20)]
        assert other.get(STORE, FRAME) is None
        assert brought(other, frames) == 0
        for frame in [FRAME, *frames]:
            one.put(STORE, frame, DATA, verified=True)
        one.flush()
        assert _get(other) == DATA
        assert brought(other, frames) == 20
        assert counts(other) == {
            "misses": 21,
            "hits": 21,
            "remote_hits": 21,
            "writes": 21,
            "bytes": 21 * len(DATA),
        }
        listed = boto3.client("s3", endpoint_url=moto_s3, region_name="us-east-1", **_KEYS).list_objects_v2(
            Bucket="bucket"
        )
        assert len(listed["Contents"]) == 21
        assert all(item["Key"].startswith("some/prefix/frames/") for item in listed["Contents"])

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
    def test_after_a_fork(self, tmp_path: Path, moto_s3: str) -> None:
        options = {"remote_options": _options(moto_s3)}
        one = machine(tmp_path, "one", "s3://bucket/fork", **options)
        other = machine(tmp_path, "other", "s3://bucket/fork", **options)
        one.put(STORE, FRAME, DATA, verified=True)
        one.flush()
        assert other.get(STORE, "absent") is None  # its threads and connections are there
        child = os.fork()
        if child == 0:
            right = False
            try:
                right = _get(other) == DATA
            finally:
                os._exit(0 if right else 1)
        assert os.waitpid(child, 0)[1] == 0

    def test_a_frame_is_one_request(self, tmp_path: Path, moto_s3: str, caplog: pytest.LogCaptureFixture) -> None:
        options = {"remote_options": _options(moto_s3)}
        one = machine(tmp_path, "one", "s3://bucket/count", **options)
        other = machine(tmp_path, "other", "s3://bucket/count", **options)
        assert other.get(STORE, "absent") is None  # connects

        def requests(call: Callable[[], object]) -> int:
            caplog.clear()
            with caplog.at_level(logging.INFO, "werkzeug"):
                call()
            return sum("/bucket/count" in record.getMessage() for record in caplog.records)

        def put() -> None:
            one.put(STORE, FRAME, DATA, verified=True)
            one.flush()

        assert requests(put) == 1
        assert requests(lambda: other.get(STORE, FRAME)) == 1
        assert requests(lambda: other.get(STORE, FRAME)) == 0
        assert requests(lambda: other.get(STORE, "absent")) == 1
        assert requests(lambda: brought(other, ["1", "2", "3"])) == 3

    def test_a_bucket_that_is_not_there(self, tmp_path: Path, moto_s3: str, caplog: pytest.LogCaptureFixture) -> None:
        cache = machine(tmp_path, "one", "s3://absent/x", remote_options=_options(moto_s3))
        with caplog.at_level(logging.WARNING, "ahi_ml"):
            for number in range(5):
                cache.put(STORE, str(number), DATA, verified=True)
                cache.flush()
                assert cache.get(STORE, str(number)) is not None
        assert len([record for record in caplog.records if record.name.startswith("ahi_ml")]) == 1

    def test_as_many_connections_as_requests(self, tmp_path: Path) -> None:
        pytest.importorskip("s3fs")
        together = threading.Barrier(48, timeout=PATIENCE_S)

        class NothingThere(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with suppress(threading.BrokenBarrierError):
                    together.wait()  # until that many have come
                self.send_response(404)
                self.end_headers()

            def log_message(self, *arguments: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            request_queue_size = 64

        with Server(("127.0.0.1", 0), NothingThere) as server:
            threading.Thread(target=server.serve_forever).start()
            try:
                options = _options(f"http://127.0.0.1:{server.server_port}")
                cache = machine(tmp_path, "one", "s3://bucket/x", remote_options=options)
                assert brought(cache, [str(number) for number in range(48)]) == 0
            finally:
                server.shutdown()
        assert not together.broken

    def test_other_settings_of_connections_stay(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("s3fs")

        def connections(**options: Any) -> dict[str, Any]:
            tier = remote.RemoteTier("s3://bucket/x", {**_options("http://127.0.0.1:9"), **options})
            return dict(tier._process.get().files.config_kwargs)

        most = {"max_pool_connections": remote._AT_ONCE + remote._WRITERS}
        assert connections() == most
        assert connections(config_kwargs={"read_timeout": 3}) == {**most, "read_timeout": 3}
        assert connections(config_kwargs={"max_pool_connections": 3}) == {"max_pool_connections": 3}
        monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 4}})
        assert connections() == {**most, "read_timeout": 4}
