"""Slowness and failure on demand: what the embedded store does to its answers when asked to."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ahi_ml.errors import ConfigError

__all__ = ["Faults"]


@dataclass(frozen=True, slots=True)
class Faults:
    """Knobs of the fault injector; all off by default.

    Parameters
    ----------
    latency_ms : float
        Time added to every request.
    jitter_ms : float
        Up to this much more, uniformly, by `seed`.
    seed : int
        Of everything random.
    """

    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    seed: int = 0

    @classmethod
    def parse(cls, knobs: Mapping[str, Any] | None) -> Faults:
        """Build from plain data, such as a JSON object.

        Raises
        ------
        ConfigError
            An unknown knob, or a value out of range.
        """
        known = {field.name for field in fields(cls)}
        if unknown := set(knobs or {}) - known:
            raise ConfigError(f"unknown faults {sorted(unknown)}: known are {sorted(known)}")
        faults = cls(**(knobs or {}))
        for name in ("latency_ms", "jitter_ms"):
            value = getattr(faults, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 600_000:
                raise ConfigError(f"faults[{name!r}] must be a number of milliseconds from 0 to 600,000")
        return faults

    def randomness(self) -> random.Random:
        """A fresh source of this injector's random numbers."""
        return random.Random(self.seed)

    def delay_s(self, source: random.Random) -> float:
        """How long to hold the next answer back, in seconds."""
        extra = source.uniform(0, self.jitter_ms) if self.jitter_ms else 0.0
        return (self.latency_ms + extra) / 1000
