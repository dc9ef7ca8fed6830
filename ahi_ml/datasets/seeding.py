"""Randomness of a user's transform: a function of seed, epoch and sample, wherever and whenever it runs. Floor 6."""

from __future__ import annotations

import hashlib
import inspect
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator

from ahi_ml.datasets.shared import SharedNumbers
from ahi_ml.errors import ConfigError

__all__ = ["SeededTransform", "SharedEpoch", "sample_seed"]

_LOG = logging.getLogger(__name__)
_WARNED = -(2**62)


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """A seed of 63 bits for one sample in one epoch: the same in any process, order and year.

    I/O: none.

    Parameters
    ----------
    seed : int
        Of the run.
    epoch : int
        Which epoch.
    key : str
        Of the sample, such as ``item["key"]``.

    Examples
    --------
    >>> sample_seed(0, 1, "a/b/1")
    4052358274690877305
    """
    digest = hashlib.blake2b(f"{seed}\0{epoch}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class SharedEpoch:
    """The epoch of a dataset, in memory that its DataLoader workers share; see `SharedNumbers`. I/O: none."""

    def __init__(self, epoch: int = 0) -> None:
        self._numbers = SharedNumbers(torch.tensor([epoch, 0]))  # the second counts items, see `stands_still`

    @property
    def value(self) -> int:
        """The epoch, here and in every worker."""
        return int(self._numbers.array[0])

    def set(self, epoch: int) -> None:
        """Make it another epoch, in every worker too. I/O: none."""
        self._numbers.array[:] = epoch, 0

    def stands_still(self, read: int, length: int) -> bool:
        """Count items; whether a second epoch is well under way that nobody announced, told once. I/O: none."""
        numbers = self._numbers.array
        numbers[1] += read
        if numbers[1] <= 1.5 * length + 64:
            return False
        numbers[1] = _WARNED
        return True


class SeededTransform:
    """A user's transform, given randomness that depends on seed, epoch and the item's key alone.

    A transform with a parameter ``rng`` gets a `numpy.random.Generator`. Any other finds the generators that
    transforms usually draw from (torch's on the CPU, ``numpy.random``, ``random``) seeded, and they are put
    back afterwards, so that a model's dropout draws as if no transform had run.

    I/O: none.

    Parameters
    ----------
    transform : callable
        Takes an item and returns it.
    seed : int or None
        None leaves all randomness as it is.

    Raises
    ------
    ConfigError
        A transform that takes ``rng``, without a seed; a negative seed.
    """

    def __init__(self, transform: Callable[..., Any], seed: int | None) -> None:
        if seed is not None and seed < 0:
            raise ConfigError(f"seed is 0 or more, not {seed}")
        self._transform, self._seed = transform, seed
        self._takes_rng = _takes_rng(transform)
        if self._takes_rng and seed is None:
            raise ConfigError("a transform that takes rng needs a seed")
        self._numpy: tuple[np.random.MT19937, np.random.RandomState] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_numpy": None}

    def __call__(self, item: dict[str, Any], epoch: int, *, stands_still: bool = False) -> Any:
        """The item, transformed; `stands_still` warns if that drew at random. I/O: the transform's."""
        if self._seed is None:
            return self._transform(item)
        seed = sample_seed(self._seed, epoch, item["key"])
        if self._takes_rng:
            rng = np.random.default_rng(seed)
            before: Any = rng.bit_generator.state
            done = self._transform(item, rng=rng)
            drew = stands_still and rng.bit_generator.state != before
        else:
            with self._seeded(seed):
                before = self._states() if stands_still else None
                done = self._transform(item)
                drew = stands_still and self._states() != before
        if drew:
            _LOG.warning(
                "random transforms repeat: this dataset is read again, but its epoch still is %d. Use a "
                "ResumableSampler or FrameLoader, or call set_epoch before each epoch",
                epoch,
            )
        return done

    @contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        if self._numpy is None:
            bits = np.random.MT19937(0)
            self._numpy = bits, np.random.RandomState(bits)
        bits, state = self._numpy
        state.seed(seed & 0xFFFFFFFF)
        # numpy's generator is exchanged: to save it and put it back takes 60 microseconds, this one.
        before = get_bit_generator(), torch.default_generator.get_state(), random.getstate()
        try:
            set_bit_generator(bits)
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            yield
        finally:
            set_bit_generator(before[0])
            torch.default_generator.set_state(before[1])
            random.setstate(before[2])

    @staticmethod
    def _states() -> tuple[Any, ...]:
        return (
            torch.default_generator.get_state().numpy().tobytes(),
            get_bit_generator().state["state"]["pos"],
            random.getstate(),
        )


def _takes_rng(transform: Any) -> bool:
    called = transform.forward if isinstance(transform, torch.nn.Module) else transform
    if isinstance(called, partial) and "rng" in called.keywords:  # one of the user's own
        return False
    try:
        return "rng" in inspect.signature(called).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False
