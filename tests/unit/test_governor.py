"""The shared budget of requests: exact in a simulated time, and safe from whatever happens to its file."""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import os
import pickle
import random
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import botocore.session
import pytest
from botocore.config import Config

from ahi_ml import connect
from ahi_ml.client import AccessKeys, Service, ledger, make_connection
from ahi_ml.client.governor import Governor, Pace
from ahi_ml.client.ledger import Ledger, open_ledger
from ahi_ml.client.sessions import Connection
from ahi_ml.config import QUOTAS, Quota, node_share, rate_limits, shared_folder
from ahi_ml.errors import ConfigError
from ahi_ml.local.faults import Faults
from ahi_ml.local.injector import Injector
from ahi_ml.local.protocol import ServiceFault

FRAME = "GetImageFrame"
START = 1000.0
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX record locks")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No budget, rank or file of the machine's."""
    for name in ("AHI_ML_RATE_LIMIT", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


def governor(clock: Callable[[], float], rate: float, burst: float, **options: Any) -> Governor:
    return Governor({FRAME: (rate, burst)}, lambda: "account", clock=clock, **options)


def times(slots: tuple[float, float] | None, count: int) -> list[float]:
    assert slots is not None
    first, step = slots
    return [first + number * step for number in range(count)]


def ledger_file(folder: Path) -> Path:
    (path,) = (folder / shared_folder().name).iterdir()
    return path


class TestBucket:
    def test_the_burst_then_the_rate(self) -> None:
        due = times(governor(Clock(), 10, 8).reserve(FRAME, 9, START), 9)
        assert [each < START + 0.01 for each in due] == [True] * 6 + [False] * 3  # three quarters of 8
        assert due[6:] == pytest.approx([START + 0.1, START + 0.2, START + 0.3])

    def test_it_fills_again_and_not_beyond_the_burst(self) -> None:
        bucket = governor(Clock(), 10, 8)
        bucket.reserve(FRAME, 6, START)
        later = START + 0.35
        assert sum(each < later + 0.01 for each in times(bucket.reserve(FRAME, 4, later), 4)) == 3
        later = START + 1000
        assert sum(each < later + 0.01 for each in times(bucket.reserve(FRAME, 20, later), 20)) == 6

    def test_a_burst_of_one(self) -> None:
        due = times(governor(Clock(), 0.25, 1).reserve(FRAME, 3, START), 3)
        assert due == pytest.approx([START, START + 4, START + 8])

    def test_operations_have_budgets_of_their_own(self) -> None:
        both = Governor({FRAME: (1, 1), "SearchImageSets": (1, 1)}, lambda: "account", clock=Clock())
        for operation in (FRAME, "SearchImageSets"):
            assert times(both.reserve(operation, 1, START), 1) == [START]
        assert both.reserve("GetImageSet", 1, START) is None

    def test_accounts_too(self) -> None:
        for name in ("one", "other"):
            made = Governor({FRAME: (1, 1)}, lambda name=name: name, clock=Clock())  # type: ignore[misc]
            assert times(made.reserve(FRAME, 1, START), 1) == [START]

    def test_connections_of_one_account_share(self) -> None:
        clock = Clock()
        due = [times(governor(clock, 1, 1).reserve(FRAME, 1, START), 1)[0] for _ in range(3)]
        assert due == pytest.approx([START, START + 1, START + 2])

    def test_a_node_has_its_share(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "16")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        bucket = governor(Clock(), 1000, 2000)
        assert bucket.rate(FRAME) == 250
        assert sum(each < START + 1e-6 for each in times(bucket.reserve(FRAME, 1000, START), 1000)) == 375

    @pytest.mark.parametrize(
        ("here", "everywhere", "share"), [("8", "8", 1), ("1", "3", 1 / 3), ("4", "2", 1), ("x", "2", 1), ("0", "0", 1)]
    )
    def test_shares(self, here: str, everywhere: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", everywhere)
        assert node_share() == 1
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        assert node_share() == share

    def test_infinity_is_no_limit(self) -> None:
        made = Governor({FRAME: (math.inf, math.inf)}, clock=Clock())
        assert made.reserve(FRAME, 1, START) is None
        assert made.pace(FRAME).due(100, START) == START

    def test_unknown_credentials_limit_nothing_yet(self) -> None:
        known: list[str] = []
        made = Governor({FRAME: (1, 1)}, lambda: known[0], clock=Clock())
        assert made.reserve(FRAME, 1, START) is None
        made.cut(FRAME)
        known.append("account")
        assert times(made.reserve(FRAME, 2, START), 2) == [START, START + 1]


class TestThrottling:
    def step(self, bucket: Governor, now: float) -> float:
        slots = bucket.reserve(FRAME, 1, now)
        assert slots is not None
        return slots[1]

    def test_the_rate_halves_once_in_a_second_and_for_all(self) -> None:
        clock = Clock()
        bucket, other = governor(clock, 10, 20), governor(clock, 10, 20)
        assert self.step(bucket, START) == pytest.approx(0.1)
        for _ in range(5):
            bucket.cut(FRAME)
            other.cut(FRAME)
        assert self.step(other, START) == pytest.approx(0.2)
        clock.now += 1
        other.cut(FRAME)
        assert self.step(bucket, clock.now) == pytest.approx(1 / (10 * (0.5 + 1 / 120) / 2))

    def test_what_was_saved_up_is_gone(self) -> None:
        clock = Clock()
        bucket = governor(clock, 10, 20)
        bucket.cut(FRAME)
        assert times(bucket.reserve(FRAME, 2, START), 2) == pytest.approx([START, START + 0.2])

    def test_it_grows_back_within_a_minute(self) -> None:
        clock = Clock()
        bucket = governor(clock, 10, 20)
        bucket.cut(FRAME)
        assert self.step(bucket, START + 30) == pytest.approx(1 / 7.5)
        assert self.step(bucket, START + 60) == pytest.approx(0.1)
        assert self.step(bucket, START + 600) == pytest.approx(0.1)

    def test_it_never_stops(self) -> None:
        clock = Clock()
        bucket = governor(clock, 64, 128)
        for _ in range(20):
            bucket.cut(FRAME)
            clock.now += 1
        assert self.step(bucket, clock.now) == pytest.approx(1 / (1 + 64 / 120))


class Simulation:
    """Clients that send as fast as they may to a server that throttles, in a time of their own."""

    def __init__(self, clients: int, quota: Quota, factor: float, *, in_flight: int = 56, seed: int = 0) -> None:
        self.clock = Clock()
        self.server = Injector(self.clock)
        self.server.set(Faults(throttle=factor))
        self.random = random.Random(seed)
        self.paces = [governor(self.clock, *quota).pace(FRAME) for _ in range(clients)]
        self.free = [in_flight] * clients
        self.awake = [-math.inf] * clients
        self.events: list[tuple[float, int, str, int]] = []
        self.count = itertools.count()
        self.admitted: list[float] = []
        self.throttled: list[float] = []
        self.books = 0
        for client in range(clients):
            self.later(self.random.random() * 0.01, "wake", client)

    def later(self, after_s: float, what: str, client: int) -> None:
        heapq.heappush(self.events, (self.clock.now + after_s, next(self.count), what, client))

    def run(self, seconds: float) -> None:
        end = self.clock.now + seconds
        while self.events and self.events[0][0] < end:
            now, _, what, client = heapq.heappop(self.events)
            self.clock.now = now
            getattr(self, what)(client)

    def wake(self, client: int) -> None:
        pace, now = self.paces[client], self.clock.now
        while self.free[client]:
            due = pace.due(1000, now)
            if due > now:
                if self.awake[client] <= now:
                    self.awake[client] = due
                    self.later(due - now, "wake", client)
                return
            pace.take(now)
            self.free[client] -= 1
            self.later(self.random.uniform(0.01, 0.06), "arrive", client)

    def arrive(self, client: int) -> None:
        try:
            self.server.admit(FRAME)
        except ServiceFault:
            self.throttled.append(self.clock.now)
            self.later(0.01, "refuse", client)
        else:
            self.admitted.append(self.clock.now)
            self.later(self.random.uniform(0.01, 0.04), "answer", client)

    def refuse(self, client: int) -> None:
        self.paces[client].throttled()
        self.later(self.random.random(), "answer", client)

    def answer(self, client: int) -> None:
        self.free[client] += 1
        self.wake(client)

    def rate(self, since_s: float) -> float:
        since = START + since_s
        return sum(each >= since for each in self.admitted) / (self.clock.now - since)


class TestSimulated:
    def test_eight_clients_use_the_quota_and_stay_below_it(self) -> None:
        run = Simulation(8, QUOTAS[FRAME], 1)
        run.run(12)
        assert len(run.throttled) < 0.01 * len(run.admitted)
        assert run.rate(3) == pytest.approx(1000, rel=0.02)
        shares = [pace.counts.requests for pace in run.paces]
        assert min(shares) > 0.9 * max(shares)
        assert all(pace.counts.delayed > 0 and 6 < pace.counts.wait_s < 12 for pace in run.paces)

    def test_a_server_that_grants_half(self) -> None:
        run = Simulation(4, (1000, 2000), 0.5, seed=1)
        run.run(300)
        assert sum(each > START + 5 for each in run.throttled) < 0.01 * len(run.admitted)
        assert 350 < run.rate(5) <= 501  # a saw between a half and all of 500

    def test_one_token_costs_a_fraction_of_a_look_into_the_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looks: list[int] = []
        update = Ledger.update
        monkeypatch.setattr(Ledger, "update", lambda self, *given: looks.append(1) or update(self, *given))
        run = Simulation(1, (1000, 2000), 1)
        run.run(5)
        assert len(run.admitted) > 4000
        assert len(looks) < len(run.admitted) / 20

    def test_a_few_requests_take_few_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock()
        taken: list[int] = []
        reserve = Governor.reserve

        def noted(self: Governor, operation: str, count: int, now: float) -> Any:
            taken.append(count)
            return reserve(self, operation, count, now)

        monkeypatch.setattr(Governor, "reserve", noted)
        pace = governor(clock, 1000, 2000).pace(FRAME)
        for _ in range(200):  # ten a second
            assert pace.due(1000, clock.now) <= clock.now
            pace.take(clock.now)
            clock.now += 0.1
        assert sum(taken) == 200

    def test_old_tokens_are_void(self) -> None:
        clock = Clock()
        pace = governor(clock, 100, 200).pace(FRAME)
        for _ in range(3):
            pace.take(pace.due(100, clock.now))
        clock.now += 100
        governor(clock, 100, 200).reserve(FRAME, 150 + 100, clock.now)
        assert pace.due(100, clock.now) > clock.now + 0.9


LOOP = """
import sys, time
from pathlib import Path
from ahi_ml.client import ledger
made = ledger.open_ledger("account", Path(sys.argv[1]))
def more(record):
    {inside}
    return record[0] + 1, record[1], record[2]
print("up", flush=True)
for _ in range(int(sys.argv[2])):
    made.update(3, more)
print(made.update(3, lambda record: record)[0], flush=True)
"""


def start(folder: Path, times: int, inside: str = "pass") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LOOP.replace("{inside}", inside), str(folder), str(times)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def value(made: Ledger, place: int = 3) -> float:
    return made.update(place, lambda record: record)[0]


def one_more(record: ledger.Record) -> ledger.Record:
    return record[0] + 1, record[1], record[2]


class TestLedger:
    @posix
    def test_no_count_is_lost_between_processes_and_threads(self, tmp_path: Path) -> None:
        made = open_ledger("account", tmp_path / "shared")
        made.update(3, one_more)
        processes = [start(tmp_path / "shared", 2000) for _ in range(3)]
        threads = [
            threading.Thread(target=lambda: [made.update(3, one_more) for _ in range(1000)])  # type: ignore[func-returns-value]
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [process.wait(60) for process in processes] == [0] * 3
        assert value(made) == 1 + 3 * 2000 + 2 * 1000

    @posix
    def test_a_process_killed_in_the_middle_holds_nobody_up(self, tmp_path: Path) -> None:
        made = open_ledger("account", tmp_path / "shared")
        made.update(3, one_more)
        process = start(tmp_path / "shared", 1, "print('in', flush=True); time.sleep(60)")
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        began = time.monotonic()
        assert made.update(3, one_more)[0] == 2
        assert time.monotonic() - began < 0.04  # less than waiting in vain takes

    @posix
    def test_a_process_stopped_in_the_middle_holds_nobody_up_for_long(self, tmp_path: Path) -> None:
        made = open_ledger("account", tmp_path / "shared")
        made.update(3, one_more)
        process = start(tmp_path / "shared", 1, "print('in', flush=True); time.sleep(60)")
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        assert made.update(3, one_more)[0] == 2
        assert made.update(4, one_more)[0] == 1
        process.kill()
        process.communicate()

    @posix
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_forked_child_opens_its_own(self, tmp_path: Path) -> None:
        made = open_ledger("account", tmp_path / "shared")
        made.update(3, one_more)
        with made._lock:  # held while the fork happens, as by another thread
            pid = os.fork()
            if pid == 0:
                os._exit(0 if open_ledger("account", tmp_path / "shared").update(3, one_more)[0] == 2 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert value(made) == 2

    @posix
    def test_it_is_private_and_its_name_tells_nothing(self, tmp_path: Path) -> None:
        governor(Clock(), 1, 1).reserve(FRAME, 1, START)
        path = ledger_file(tmp_path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert "account" not in path.name
        assert b"account" not in path.read_bytes()

    @posix
    @pytest.mark.parametrize(
        "content", [b"", b"x", b"garbage " * 200, b"\xff" * 2000, struct.pack("<3d", 1e9, 1, 0) * 9]
    )
    def test_a_damaged_file_is_a_fresh_one(self, content: bytes, tmp_path: Path) -> None:
        clock = Clock()
        bucket = governor(clock, 10, 8)
        bucket.reserve(FRAME, 100, START)
        ledger_file(tmp_path).write_bytes(content)
        due = times(bucket.reserve(FRAME, 7, START), 7)
        assert sum(each < START + 0.01 for each in due) == 6
        bucket.cut(FRAME)
        assert times(bucket.reserve(FRAME, 2, START), 2)[1] < START + 10

    @posix
    def test_a_file_that_was_deleted_is_made_again(self, tmp_path: Path) -> None:
        clock = Clock()
        bucket = governor(clock, 10, 8)
        bucket.reserve(FRAME, 1, START)
        ledger_file(tmp_path).unlink()
        bucket.reserve(FRAME, 1, START)
        assert ledger_file(tmp_path).stat().st_size > 0

    @posix
    @pytest.mark.parametrize("trouble", ["open to all", "no folder", "a folder", "a link"])
    def test_without_a_file_the_process_has_its_own_budget(
        self, trouble: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = tmp_path / shared_folder().name
        if trouble == "open to all":
            folder.mkdir()
            folder.chmod(0o755)
        elif trouble == "no folder":
            folder.write_text("")
        else:
            governor(Clock(), 10, 8).reserve(FRAME, 1, START)
            path = ledger_file(tmp_path)
            path.unlink()
            if trouble == "a folder":
                path.mkdir()
            else:
                path.symlink_to(tmp_path / "elsewhere")
        bucket = governor(Clock(), 10, 8)
        due = [times(bucket.reserve(FRAME, 1, START), 1)[0] for _ in range(7)]
        assert sum(each < START + 0.01 for each in due) == 6
        assert not (tmp_path / "elsewhere").exists()
        (record,) = (each for each in caplog.records if each.levelno >= logging.WARNING)
        assert "not shared" in record.getMessage()

    def test_without_record_locks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ahi_ml.client.ledger.sys", SimpleNamespace(platform="win32"))
        made = Ledger(tmp_path / "shared" / "rates")
        assert [made.update(0, one_more)[0] for _ in range(2)] == [1, 2]
        assert not (tmp_path / "shared").exists()


class TestOptions:
    @pytest.mark.parametrize(
        ("given", "kept"),
        [
            (250, {FRAME: (250, 500)}),
            (0.1, {FRAME: (0.1, 1)}),
            ({FRAME: (300, 400), "GetImageSet": 5}, {FRAME: (300, 400), "GetImageSet": (5, 10)}),
            (math.inf, {FRAME: (math.inf, math.inf)}),
            ({}, {}),
        ],
    )
    def test_given(self, given: Any, kept: dict[str, Quota]) -> None:
        assert rate_limits(given) == kept

    @pytest.mark.parametrize(
        "given", [0, -1, math.nan, True, "fast", {FRAME: 0}, {FRAME: (1, 0)}, {FRAME: (1, 2, 3)}, {FRAME: None}]
    )
    def test_what_is_no_limit(self, given: Any) -> None:
        with pytest.raises(ConfigError, match="rate_limit: GetImageFrame"):
            rate_limits(given)

    def test_unknown_operations(self) -> None:
        with pytest.raises(ConfigError, match="get_image_frame is no operation"):
            connect("0" * 32, rate_limit={"get_image_frame": 5})

    @pytest.mark.parametrize(
        ("text", "kept"),
        [
            ("", None),
            ("250", {FRAME: (250, 500)}),
            ("Infinity", {FRAME: (math.inf, math.inf)}),
            ('{"SearchImageSets": [5, 6]}', {"SearchImageSets": (5, 6)}),
        ],
    )
    def test_from_the_environment(
        self, text: str, kept: dict[str, Quota] | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AHI_ML_RATE_LIMIT", text)
        assert rate_limits() == kept
        assert rate_limits(3) == {FRAME: (3, 6)}

    @pytest.mark.parametrize("text", ["fast", "0", '{"GetImageFrame": "x"}', "null"])
    def test_a_variable_that_is_no_limit(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AHI_ML_RATE_LIMIT", text)
        with pytest.raises(ConfigError, match="AHI_ML_RATE_LIMIT"):
            connect("0" * 32)

    def test_it_travels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AHI_ML_RATE_LIMIT", "250")
        store = pickle.loads(pickle.dumps(connect("0" * 32)))
        monkeypatch.delenv("AHI_ML_RATE_LIMIT")
        assert store._target.limits == {FRAME: (250, 500)}


KEYS = AccessKeys("AKIDEXAMPLE", "secret")


class TestConnections:
    def rates(self, url: str | None, limits: Any = None) -> tuple[float, float]:
        connection = make_connection(Service("us-east-1", None, url, KEYS), limits=limits)
        connection.client.close()
        return connection.governor.rate(FRAME), connection.governor.rate("SearchImageSets")

    @pytest.mark.parametrize("url", [None, "https://vpce-1.medical-imaging.us-east-1.vpce.amazonaws.com"])
    def test_aws_has_the_services_quotas(self, url: str | None) -> None:
        assert self.rates(url) == (1000, 25)
        assert self.rates(url, {FRAME: (1500.0, 3000.0)}) == (1500, 25)

    @pytest.mark.parametrize("url", ["http://127.0.0.1:9", "https://amazonaws.com.example"])
    def test_others_have_none(self, url: str) -> None:
        assert self.rates(url) == (math.inf, math.inf)
        assert self.rates(url, {FRAME: (5.0, 6.0)}) == (5, math.inf)

    def test_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AHI_ML_RATE_LIMIT", "7")
        assert self.rates("http://127.0.0.1:9") == (7, math.inf)

    def test_sessions_of_one_account_share(self, tmp_path: Path) -> None:
        for number in range(2):
            session = botocore.session.Session()
            session.set_credentials(f"ASIA{number}", "secret", "token", account_id="123456789012")
            made = make_connection(Service("us-east-1"))
            made.session._credentials = session.get_credentials()
            made.governor.reserve(FRAME, 1, time.monotonic())
            made.client.close()
        assert ledger_file(tmp_path).exists()

    def test_handlers_of_ours_are_nobodys(self) -> None:
        session = botocore.session.Session()
        session.set_credentials(KEYS.access_key_id, KEYS.secret_access_key)
        client = session.create_client(
            "medical-imaging", "us-east-1", endpoint_url="http://127.0.0.1:9", config=Config(inject_host_prefix=False)
        )
        connection = Connection(client, session)
        assert not connection.hooked
        client.meta.events.register("before-send", lambda **_: None)
        assert connection.hooked
        client.close()


def test_a_pace_without_limits_counts() -> None:
    pace = Pace(Governor(), FRAME)
    pace.take(pace.due(1, START))
    pace.throttled()
    assert (pace.counts.requests, pace.counts.throttled, pace.counts.delayed) == (1, 1, 0)
