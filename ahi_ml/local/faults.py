"""Slowness and failure on demand: the knobs. What they do in a running server is `injector`'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ahi_ml.config import QUOTAS
from ahi_ml.errors import ConfigError

__all__ = ["Faults"]

_SECONDS = ("unready_s", "manifest_lag_s", "slow_s")
_RATES = ("error_rate", "reset_rate", "truncate_rate", "corrupt_rate", "quota_rate")
_LONGEST_MS = 600_000


@dataclass(frozen=True, slots=True)
class Faults:
    """Knobs of the fault injector; all off by default.

    Parameters
    ----------
    latency_ms : float
        Time added to every request.
    jitter_ms : float
        Up to this much more, uniformly, by `seed`.
    throttle : float or bool
        Holds clients to the service's request rates and bursts (`QUOTAS`) times this number; True is 1.
        What is over them gets ThrottlingException (429).
    error_rate : float
        Share of requests answered InternalServerException (500) or ServiceUnavailable (503), half each.
    reset_rate : float
        Share of requests whose connection is reset instead of answered: half of them before, half of
        them after the operation was done.
    truncate_rate : float
        Share of answers whose body ends before its Content-Length.
    corrupt_rate : float
        Share of frames that are sent with one wrong byte.
    quota_rate : float
        Share of the requests that a quota can refuse which get ServiceQuotaExceededException (402).
    unready_s : float
        For so long after an import GetImageSetMetadata answers ConflictException (409).
    manifest_lag_s : float
        The manifest of an import job appears so long after the job is COMPLETED.
    slow_s : float
        How long each change of state takes that is asynchronous on the service: LOCKED, CREATING, SUBMITTED,
        IN_PROGRESS and their like last that long.
    operations : sequence of str
        The operations that the shares above are of; all of them when empty.
    seed : int
        Of everything random; requests draw in the order in which they arrive.
    """

    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    throttle: float = 0.0
    error_rate: float = 0.0
    reset_rate: float = 0.0
    truncate_rate: float = 0.0
    corrupt_rate: float = 0.0
    quota_rate: float = 0.0
    unready_s: float = 0.0
    manifest_lag_s: float = 0.0
    slow_s: float = 0.0
    operations: tuple[str, ...] = ()
    seed: int = 0

    @classmethod
    def parse(cls, knobs: Mapping[str, Any] | None) -> Faults:
        """Build from plain data, such as a JSON object.

        Raises
        ------
        ConfigError
            An unknown knob, or a value out of range.
        """
        knobs = dict(knobs or {})
        known = {field.name for field in fields(cls)}
        if unknown := set(knobs) - known:
            raise ConfigError(f"unknown faults {sorted(unknown)}: known are {sorted(known)}")
        if isinstance(knobs.get("throttle"), bool):
            knobs["throttle"] = float(knobs["throttle"])
        named = knobs.get("operations", ())
        if isinstance(named, str) or not all(name in QUOTAS for name in named):
            raise ConfigError(f"faults['operations'] is a list of operations of the service: {', '.join(QUOTAS)}")
        knobs["operations"] = tuple(named)
        faults = cls(**knobs)
        for name, most, what in (
            *((name, _LONGEST_MS, "a number of milliseconds") for name in ("latency_ms", "jitter_ms")),
            *((name, _LONGEST_MS / 1000, "a number of seconds") for name in _SECONDS),
            *((name, 1, "a share") for name in _RATES),
            ("throttle", 1_000_000, "True, or a factor"),
        ):
            value = getattr(faults, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise ConfigError(f"faults[{name!r}] must be {what} from 0 to {most:,.0f}")
        if isinstance(faults.seed, bool) or not isinstance(faults.seed, int):
            raise ConfigError("faults['seed'] must be a whole number")
        return faults
