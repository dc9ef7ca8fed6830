"""Claims: one holder among all threads and processes, and none that outlives its process."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ahi_ml.cache import FrameCache, flight, locks

NAME, OTHER, THIRD = "0123abcd" * 4, "0123abce" * 4, "0123abcf" * 4
SAME_STRIPE = NAME[:8] + "f" * 24

HOLDER = """
import sys, time
from pathlib import Path
from ahi_ml.cache import FrameCache
claims = FrameCache(Path(sys.argv[1])).claims
for name in sys.argv[2:]:
    assert claims.try_claim(name)
print("up", flush=True)
sys.stdin.readline()
for name in sys.argv[2:]:
    claims.release(name)
print("released", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    return FrameCache(tmp_path / "cache")


Process = subprocess.Popen[str]


@pytest.fixture
def holder(cache: FrameCache) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*names: str) -> Process:
        command = [sys.executable, "-c", HOLDER, str(cache.folder), *names]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def test_one_has_it(cache: FrameCache) -> None:
    claims = cache.claims
    assert claims.try_claim(NAME)
    assert not claims.try_claim(NAME)
    assert claims.try_claim(OTHER)
    claims.release(NAME)
    claims.release(NAME)
    assert claims.try_claim(NAME)
    assert not claims.try_claim(OTHER)


def test_releasing_what_nobody_claimed(cache: FrameCache) -> None:
    cache.claims.release(NAME)
    assert not cache.folder.exists()


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_the_file_is_private(cache: FrameCache) -> None:
    cache.claims.try_claim(NAME)
    assert stat.S_IMODE((cache.folder / "locks").stat().st_mode) == 0o600
    assert cache.size() == (0, 0)
    cache.clear()
    assert (cache.folder / "locks").exists()


def test_between_processes(cache: FrameCache, holder: Callable[..., Process]) -> None:
    process = holder(NAME)
    assert not cache.claims.try_claim(NAME)
    assert cache.claims.try_claim(OTHER)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "released\n"
    assert cache.claims.try_claim(NAME)


def test_a_killed_owner_holds_nothing(cache: FrameCache, holder: Callable[..., Process]) -> None:
    for _ in range(3):
        process = holder(NAME, OTHER)
        assert not cache.claims.try_claim(NAME)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert wait_for(lambda: cache.claims.try_claim(NAME))
        assert cache.claims.try_claim(OTHER)
        cache.claims.release(NAME)
        cache.claims.release(OTHER)


FORKER = """
import os, sys, time
from pathlib import Path
from ahi_ml.cache import FrameCache
claims = FrameCache(Path(sys.argv[1])).claims
assert claims.try_claim(sys.argv[2])
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_worker_does_not_keep_its_dead_parents_claims(cache: FrameCache) -> None:
    command = [sys.executable, "-c", FORKER, str(cache.folder), NAME]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert not cache.claims.try_claim(NAME)
        process.kill()
        process.wait(10)
        os.kill(child, 0)  # it lives
        assert wait_for(lambda: cache.claims.try_claim(NAME))
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def _try(cache: FrameCache, queue: Any, released: Any) -> None:
    queue.put([cache.claims.try_claim(NAME), cache.claims.try_claim(OTHER)])
    cache.claims.release(NAME)  # not its own
    queue.put(cache.claims.try_claim(NAME))
    cache.claims.release(OTHER)
    released.wait(30)
    queue.put(cache.claims.try_claim(THIRD))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_inherits_no_claims_and_its_end_takes_none(cache: FrameCache, holder: Callable[..., Process]) -> None:
    assert cache.claims.try_claim(NAME)
    assert cache.claims.try_claim(THIRD)
    context = multiprocessing.get_context("fork")
    queue, released = context.Queue(), context.Event()
    process = context.Process(target=_try, args=(cache, queue, released))
    process.start()
    assert queue.get(timeout=30) == [False, True]
    assert queue.get(timeout=30) is False
    cache.claims.release(THIRD)
    released.set()
    assert queue.get(timeout=30) is True, "the child thinks it has what its parent had"
    process.join(30)  # closes its copy of the descriptor
    probe = [sys.executable, "-c", HOLDER, str(cache.folder), NAME]
    assert subprocess.run(probe, capture_output=True, check=False).returncode != 0, "the parent lost its claim"
    cache.claims.release(NAME)
    holder(NAME)


def test_caches_of_one_folder_in_one_process(cache: FrameCache, tmp_path: Path, holder: Callable[..., Process]) -> None:
    """Closing any descriptor of the file would drop every lock of the process."""
    (tmp_path / "link").symlink_to(cache.folder, target_is_directory=True)
    assert cache.claims.try_claim(NAME)
    for folder in (cache.folder, tmp_path / "link"):
        other = FrameCache(folder)
        assert not other.claims.try_claim(NAME)
        assert other.claims.try_claim(OTHER)
        other.claims.release(OTHER)
        del other
    probe = [sys.executable, "-c", HOLDER, str(cache.folder), NAME]
    assert subprocess.run(probe, capture_output=True, check=False).returncode != 0


def test_names_of_one_stripe(cache: FrameCache, holder: Callable[..., Process]) -> None:
    claims = cache.claims
    assert claims.try_claim(NAME)
    assert claims.try_claim(SAME_STRIPE)  # within a process, names are known
    claims.release(NAME)
    probe = [sys.executable, "-c", HOLDER, str(cache.folder), SAME_STRIPE]
    assert subprocess.run(probe, capture_output=True, check=False).returncode != 0
    claims.release(SAME_STRIPE)
    holder(NAME)
    assert not claims.try_claim(SAME_STRIPE)


def test_many_threads_one_holder(cache: FrameCache) -> None:
    names = [f"{number:08x}" * 4 for number in range(5)]
    inside = dict.fromkeys(names, 0)
    taken: list[int] = []
    wrong: list[str] = []

    def work(seed: int) -> None:
        for turn in range(400):
            name = names[(seed + turn) % len(names)]
            if cache.claims.try_claim(name):
                inside[name] += 1
                if inside[name] != 1:
                    wrong.append(name)
                taken.append(1)
                inside[name] -= 1
                cache.claims.release(name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(taken) > 400


def _count_up(cache: FrameCache, path: Path, turns: int) -> None:
    for _ in range(turns):
        while not cache.claims.try_claim(NAME):
            time.sleep(0)
        number = int(path.read_text())
        path.write_text(str(number + 1))
        cache.claims.release(NAME)


def test_processes_take_turns(cache: FrameCache, tmp_path: Path) -> None:
    path = tmp_path / "number"
    path.write_text("0")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_count_up, args=(cache, path, 150)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert path.read_text() == "450"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS])
def test_without_locks_every_claim_succeeds(
    cache: FrameCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
    holder: Callable[..., Process],
) -> None:
    holder(NAME)

    def refuse(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "_lock", refuse)
    monkeypatch.setattr(locks, "_unlock", refuse)
    with caplog.at_level(logging.INFO, "ahi_ml"):
        for name in (NAME, OTHER):
            assert cache.claims.try_claim(name)
            assert not cache.claims.try_claim(name), "within the process they still count"
            cache.claims.release(name)
    assert len(caplog.records) == 1
    assert "no locks" in caplog.text


def test_a_folder_that_cannot_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("x")
    claims = FrameCache(tmp_path / "file").claims
    with caplog.at_level(logging.INFO, "ahi_ml"):
        assert claims.try_claim(NAME)
        assert claims.try_claim(OTHER)
        claims.release(NAME)
    assert len(caplog.records) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no process can be stopped here")
def test_a_stopped_owner_keeps_nobody_waiting_for_ever(
    cache: FrameCache, holder: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight, "_PATIENCE_S", 0.5)
    holder(NAME).send_signal(signal.SIGSTOP)
    flights, asked = cache.flights, time.monotonic()
    again: list[float] = []

    def look_again() -> None:
        again.append(time.monotonic() - asked)

    assert not flights.join(NAME, look_again)
    assert wait_for(lambda: bool(again))
    assert again[0] > 0.5, "as long as a download may take, it is waited for"
    assert flights.join(NAME, look_again)
    assert not flights.join(NAME, look_again), "once is enough, within this process"
    flights.land(NAME)
    assert wait_for(lambda: len(again) == 2)
    assert not flights.join(NAME, look_again), "the next one waits for its owner again"
    assert wait_for(lambda: len(again) == 3)
