"""The fault injector without a server: its knobs, its shares, the rates it holds clients to."""

from __future__ import annotations

from typing import Any

import botocore.session
import pytest

from ahi_ml.config import QUOTAS
from ahi_ml.errors import ConfigError
from ahi_ml.local.faults import Faults
from ahi_ml.local.injector import Injector
from ahi_ml.local.protocol import ServiceFault


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def injector(clock: Clock | None = None, **knobs: Any) -> Injector:
    made = Injector(clock or Clock())
    made.set(Faults.parse(knobs))
    return made


def admitted(made: Injector, operation: str) -> bool:
    try:
        made.admit(operation)
    except ServiceFault as fault:
        return fault.code != "ThrottlingException"
    return True


def test_quotas_name_every_operation() -> None:
    model = botocore.session.Session().get_service_model("medical-imaging")
    assert set(QUOTAS) == set(model.operation_names)


@pytest.mark.parametrize("operation", ["GetImageFrame", "SearchImageSets", "CopyImageSet"])
@pytest.mark.parametrize("scale", [1, 0.1, 3])
def test_burst_then_rate(operation: str, scale: float) -> None:
    clock = Clock()
    made = injector(clock, throttle=scale)
    rate, burst = (each * scale for each in QUOTAS[operation])
    first = sum(admitted(made, operation) for _ in range(int(burst) + 50))
    assert first == max(int(burst + 1e-9), 1)
    got, seconds = 0, max(200 / rate, 10)
    for _ in range(10_000):  # small steps: a full bucket gains nothing by waiting
        clock.now += seconds / 10_000
        got += sum(admitted(made, operation) for _ in range(int(rate * seconds / 10_000) + 2))
    assert got == pytest.approx(rate * seconds, rel=0.02)


def test_operations_have_buckets_of_their_own() -> None:
    made = injector(throttle=True)
    assert admitted(made, "CopyImageSet")
    assert not admitted(made, "CopyImageSet")
    assert admitted(made, "DeleteImageSet")


def test_an_idle_client_saves_up_no_more_than_the_burst() -> None:
    clock = Clock()
    made = injector(clock, throttle=True)
    clock.now = 1e6
    assert sum(admitted(made, "SearchImageSets") for _ in range(100)) == 50


def shares(made: Injector, operation: str, n: int = 20_000) -> dict[str, float]:
    counts: dict[str, int] = {}
    for _ in range(n):
        try:
            made.admit(operation)
            outcome: str = "reset" if made.resets(operation) else made.fate(operation)
        except ServiceFault as fault:
            outcome = fault.code
        counts[outcome] = counts.get(outcome, 0) + 1
    return {name: count / n for name, count in counts.items()}


def test_shares_are_those_asked_for() -> None:
    assert shares(injector(error_rate=0.2), "GetImageFrame") == {
        "InternalServerException": pytest.approx(0.1, abs=0.01),
        "ServiceUnavailableException": pytest.approx(0.1, abs=0.01),
        "answer": pytest.approx(0.8, abs=0.01),
    }
    assert shares(injector(reset_rate=0.3), "GetImageFrame")["reset"] == pytest.approx(0.3, abs=0.01)
    assert shares(injector(truncate_rate=0.3), "GetImageSet")["truncate"] == pytest.approx(0.3, abs=0.01)
    assert shares(injector(corrupt_rate=0.3), "GetImageFrame")["corrupt"] == pytest.approx(0.3, abs=0.01)
    quota = shares(injector(quota_rate=0.3), "CopyImageSet")
    assert quota["ServiceQuotaExceededException"] == pytest.approx(0.3, abs=0.01)


def test_what_does_not_concern_an_operation() -> None:
    assert shares(injector(corrupt_rate=1), "GetImageSetMetadata") == {"answer": 1}
    assert shares(injector(quota_rate=1), "GetImageSet") == {"answer": 1}
    only = injector(error_rate=1, reset_rate=1, operations=["GetImageSet"])
    assert shares(only, "GetImageFrame") == {"answer": 1}
    assert "answer" not in shares(only, "GetImageSet")


def test_the_same_seed_gives_the_same_faults() -> None:
    def run(seed: int) -> list[str]:
        made = injector(reset_rate=0.2, truncate_rate=0.2, corrupt_rate=0.2, seed=seed)
        return [made.fate("GetImageFrame") for _ in range(200)]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_corrupt_body_differs_in_one_byte_of_its_second_half() -> None:
    made, body = injector(), bytes(range(256))
    for _ in range(100):
        wrong = made.corrupt(memoryview(body))
        (at,) = (i for i in range(256) if wrong[i] != body[i])
        assert at >= 128
    assert made.corrupt(b"") == b""


@pytest.mark.parametrize(
    "knobs",
    [
        {"nonsense": 1},
        {"error_rate": 1.5},
        {"error_rate": True},
        {"error_rate": "half"},
        {"latency_ms": -1},
        {"slow_s": 601},
        {"throttle": -1},
        {"operations": "GetImageFrame"},
        {"operations": ["GetFrame"]},
        {"seed": 1.5},
    ],
)
def test_bad_knobs(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="fault"):
        Faults.parse(knobs)
