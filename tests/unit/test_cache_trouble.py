"""The cache in trouble: writers killed, disks full or read-only, many that fill it at once. On real disks."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ahi_ml.cache import FrameCache

STORE, RECIPE = "d" * 32, "recipe"
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

PROLOGUE = """
import logging, os, random, signal, sys, time
from pathlib import Path
import numpy as np
from ahi_ml.cache import FrameCache
logging.basicConfig(level=logging.INFO)
folder = Path(sys.argv[1])
IMAGE = np.arange(40_000, dtype=np.int16)

def fill(cache, numbers):
    tier = cache.derived("d" * 32, "recipe")
    for number in numbers:
        cache.put("d" * 32, str(number), bytes([number % 251]) * 80_000, verified=True)
        tier.write(str(number), IMAGE + number, True)

def check(cache, numbers):
    '''How many entries are there; each must be right.'''
    tier, out, there = cache.derived("d" * 32, "recipe"), np.empty_like(IMAGE), 0
    for number in numbers:
        entry = cache.get("d" * 32, str(number))
        if entry is not None:
            assert entry.data == bytes([number % 251]) * 80_000
            there += 1
        if tier.read_into(str(number), out) is not None:
            assert (out == IMAGE + number).all()
            there += 1
    return there

def parts(folder):
    return [path for path in folder.rglob("*.part") if path.is_file()]
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROLOGUE + code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def fill(cache: FrameCache, first: int, last: int) -> None:
    """Two entries of 10 kB a number, one of each tier."""
    tier = cache.derived(STORE, RECIPE)
    for number in range(first, last):
        cache.put(STORE, str(number), bytes(9_968), verified=True)
        tier.write(str(number), np.full(4_968, number, np.int16), True)


def there(cache: FrameCache, numbers: range) -> int:
    tier, out = cache.derived(STORE, RECIPE), np.empty(4_968, np.int16)
    encoded = sum(cache.get(STORE, str(number)) is not None for number in numbers)
    return encoded + sum(tier.read_into(str(number), out) is not None for number in numbers)


@FORKS
class TestKilled:
    def test_at_any_instant(self, tmp_path: Path) -> None:
        done = run(
            """
cache = FrameCache(folder, max_bytes=3_000_000)  # so that some are killed while they evict
random.seed(0)
most = 0
for turn in range(50):
    child = os.fork()
    if child == 0:
        fill(cache, range(20))
        while True:
            fill(cache, random.sample(range(20), 20))
    time.sleep(random.uniform(0.001, 0.03) * (1 if turn < 45 else 20))  # the last ones get far on a busy machine too
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    fresh = FrameCache(folder, max_bytes=3_000_000)
    most = max(most, check(fresh, range(20)))
    assert fresh.stats()["corrupt"] == 0
assert most > 20
fresh = FrameCache(folder, max_bytes=100_000_000)
fill(fresh, range(20))
assert check(fresh, range(20)) == 40
for path in parts(folder):
    os.utime(path, (time.time() - 3700,) * 2)
fill(FrameCache(folder), [1])
assert parts(folder) == []
assert fresh.verify()["corrupt"] == 0
""",
            tmp_path / "cache",
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""

    def test_an_unfinished_file_is_swept_after_an_hour(self, tmp_path: Path) -> None:
        done = run(
            """
os.replace = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
fill(FrameCache(folder), [1])
""",
            tmp_path / "cache",
        )
        assert done.returncode == -signal.SIGKILL
        (part,) = (tmp_path / "cache").rglob("*.part")
        cache = FrameCache(tmp_path / "cache")
        assert cache.get(STORE, "1") is None
        cache.put(STORE, "2", b"x", verified=True)
        assert part.exists(), "somebody may be writing it"
        os.utime(part, (time.time() - 3700,) * 2)
        FrameCache(tmp_path / "cache").put(STORE, "3", b"x", verified=True)
        assert not part.exists()
        assert cache.size()[0] == 2


@pytest.fixture(scope="module")
def on_a_disk() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code on a disk of its own, then more on it write-protected: ``on_a_disk(folder, options, code, more)``."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")

    def start(folder: Path, options: str, code: str, read_only: str = "") -> subprocess.CompletedProcess[str]:
        folder.mkdir(exist_ok=True)
        script = (
            'set -e; mount -t tmpfs -o "$2,mode=700" tmpfs "$1"; "$3" -c "$4" "$1/cache"; '
            'if [ -n "$5" ]; then mount -o remount,ro "$1"; "$3" -c "$5" "$1/cache"; fi'
        )
        arguments = [str(folder), options, sys.executable, PROLOGUE + code, read_only and PROLOGUE + read_only]
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no disks of one's own here")
    return start


class TestDisks:
    @pytest.mark.parametrize("options", ["size=2m", "size=2100k", "nr_inodes=30", "nr_inodes=6"])
    def test_full(
        self, tmp_path: Path, on_a_disk: Callable[..., subprocess.CompletedProcess[str]], options: str
    ) -> None:
        done = on_a_disk(
            tmp_path / "disk",
            options,
            """
cache = FrameCache(folder, max_bytes=10**9)
fill(cache, range(100))
written = cache.stats()["writes"]
assert written < 30, written
assert parts(folder) == []
assert check(cache, range(100)) == written  # reading goes on
assert cache.claims.try_claim("0" * 32)
fresh = FrameCache(folder, max_bytes=10**9)
assert fresh.verify()["corrupt"] == 0
assert check(fresh, range(100)) == written
""",
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("is not used from here on") == 1, done.stderr
        assert done.stderr.count("No space left") <= 2, done.stderr

    def test_the_default_bound_keeps_half_of_the_disk_free(
        self, tmp_path: Path, on_a_disk: Callable[..., subprocess.CompletedProcess[str]]
    ) -> None:
        done = on_a_disk(
            tmp_path / "disk",
            "size=4m",
            """
cache = FrameCache(folder)
fill(cache, range(100))
assert 1_500_000 < cache.size()[1] < 2_200_000, cache.size()
assert cache.stats()["writes"] == 200
""",
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""

    def test_read_only(self, tmp_path: Path, on_a_disk: Callable[..., subprocess.CompletedProcess[str]]) -> None:
        done = on_a_disk(
            tmp_path / "disk",
            "size=4m",
            """
fill(FrameCache(folder), range(10))
for path in folder.glob("frames/*/*"):
    os.utime(path, (1000, 1000))
damaged = folder / "frames" / "00" / ("0" * 30)
damaged.parent.mkdir(exist_ok=True)
damaged.write_bytes(b"damaged")
""",
            """
cache = FrameCache(folder)
for _ in range(2):
    assert check(cache, range(10)) == 20
    fill(cache, range(10, 20))
    assert check(cache, range(10, 20)) == 0
    assert cache.claims.try_claim("0" * 32)
    cache.claims.release("0" * 32)
assert cache.stats()["writes"] == 0
assert cache.clear() == 0
assert cache.verify()["entries"] == 21
absent = FrameCache(folder.parent / "absent")
fill(absent, range(10))
assert check(absent, range(10)) == 0
""",
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("is not used from here on") == 2, done.stderr
        assert done.stderr.count("no locks on") == 1
        assert "Traceback" not in done.stderr


class TestOpenFiles:
    CODE = """
import resource
cache = FrameCache(folder)
WARM
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
before = cache.stats()["writes"]
assert check(cache, range(20)) == 0
fill(cache, range(10, 20))
assert cache.stats()["writes"] == before
for descriptor in held:
    os.close(descriptor)
fill(cache, range(10, 20))
assert cache.stats()["writes"] == before + 20
assert check(cache, range(10, 20)) == 20
assert cache.claims.try_claim("0" * 32)
assert cache.stats()["corrupt"] == 0
"""

    @pytest.mark.skipif(os.name != "posix", reason="limits are POSIX's")
    @pytest.mark.parametrize("warm", ["pass", "fill(cache, range(10))"])
    def test_too_many_are_no_lasting_trouble(self, tmp_path: Path, warm: str) -> None:
        done = run(self.CODE.replace("WARM", warm), tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("WARNING") == 1, done.stderr
        assert "is not used at times" in done.stderr

    def test_the_whole_machine_s_neither(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = FrameCache(tmp_path / "cache")
        for number, code in enumerate((errno.ENFILE, errno.ENFILE, errno.EIO)):

            def refuse(*paths: str, code: int = code) -> None:
                raise OSError(code, os.strerror(code))

            with monkeypatch.context() as patched:
                patched.setattr(os, "replace", refuse)
                fill(cache, number, number + 1)
            assert cache.stats()["writes"] == 2 * number
            fill(cache, number, number + 1)
        assert cache.stats()["writes"] == 4
        at_times, from_here_on = (record.getMessage() for record in caplog.records)
        assert "is not used at times" in at_times
        assert "is not used from here on" in from_here_on


class TestBound:
    def test_two_processes_stay_at_it_and_keep_what_is_used(self, tmp_path: Path) -> None:
        folder = tmp_path / "cache"
        cache = FrameCache(folder, max_bytes=4_000_000)
        fill(cache, 0, 140)
        for path in folder.glob("frames/*/*"):
            os.utime(path, (time.time() - 5000,) * 2)
        hot = range(0, 50)
        assert there(FrameCache(folder, max_bytes=4_000_000), hot) == 100  # of both tiers, and makes them young
        code = (
            f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "from test_cache_trouble import fill as small\n"
            "cache = FrameCache(folder, max_bytes=4_000_000)\n"
            "print('up', flush=True); sys.stdin.readline()\n"
            "for number in range(int(sys.argv[2]), int(sys.argv[3])): small(cache, number, number + 1)\n"
        )
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", PROLOGUE + code, str(folder), str(first), str(first + 45)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for first in (1000, 2000)
        ]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"up\n"
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write(b"\n")
            writer.stdin.flush()
        largest = 0
        while any(writer.poll() is None for writer in writers):
            largest = max(largest, cache.size()[1])
        for writer in writers:
            writer.communicate()
        assert [writer.returncode for writer in writers] == [0, 0]
        assert 3_400_000 < largest <= 4_000_000 * 33 / 32  # what was written since somebody looked
        assert there(cache, hot) == 100
        assert there(cache, range(1000, 1045)) == there(cache, range(2000, 2045)) == 90
        assert there(cache, range(50, 140)) < 150, "the old ones went"

    @FORKS
    def test_short_runs_look_as_well(self, tmp_path: Path) -> None:
        """Each writes less than one alone looks after."""
        done = run(
            """
for number in range(100):
    child = os.fork()
    if child == 0:
        fill(FrameCache(folder, max_bytes=8_000_000), [number])  # 160 kB
        os._exit(0)
    os.waitpid(child, 0)
size = FrameCache(folder).size()[1]
assert 6_000_000 < size < 9_000_000, size
""",
            tmp_path / "cache",
        )
        assert done.returncode == 0, done.stderr
