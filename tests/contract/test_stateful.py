"""Random operations on an embedded store and on a model of the service: every answer is the model's.

`StoreMachine` does one thing after the other. `CrashMachine` kills the store's server with SIGKILL, at a
random moment while threads work on it or at a random statement, starts it again, and accepts what was
promised and no more: what was acknowledged is there, what was locked ended as a success or as a failure,
what was not acknowledged is there whole or not at all, nothing stays LOCKED, and unused blobs are swept.

A few examples run with the other tests, always the same ones. Many more, different each time::

    pytest -n 0 -m slow tests/contract/test_stateful.py
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from crashes import CrashingStore
from driver import Driver
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from model_check import hold_to_the_model
from service_model import Model

from ahi_ml.local.process import Lease

RANDOMS = st.randoms(use_true_random=True)  # seeded by hypothesis; its own numbers keep to a few values
_MORE_EXAMPLES = 20


class StoreMachine(RuleBasedStateMachine):
    """Any operation, one after the other."""

    client: ClassVar[Any]
    folder: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self.driver = self.make_driver()
        self.well = True

    def make_driver(self) -> Driver:
        return Driver(self.client, Model(), self.folder)

    def _do(self, operation: str, rng: random.Random) -> None:
        self.well = False
        getattr(self.driver, operation)(rng)
        self.well = True

    @initialize(rng=RANDOMS)
    def begin(self, rng: random.Random) -> None:
        for operation in ("create_store", "run_import", "run_import"):
            self._do(operation, rng)

    @rule(rng=RANDOMS)
    def create_store(self, rng: random.Random) -> None:
        self._do("create_store", rng)

    @rule(rng=RANDOMS)
    def delete_store(self, rng: random.Random) -> None:
        self._do("delete_store", rng)

    @rule(rng=RANDOMS)
    def list_stores(self, rng: random.Random) -> None:
        self._do("list_stores", rng)

    @rule(rng=RANDOMS)
    def import_files(self, rng: random.Random) -> None:
        self._do("run_import", rng)

    @rule(rng=RANDOMS)
    def update(self, rng: random.Random) -> None:
        self._do("update", rng)

    @rule(rng=RANDOMS)
    def update_again(self, rng: random.Random) -> None:
        self._do("update", rng)

    @rule(rng=RANDOMS)
    def copy(self, rng: random.Random) -> None:
        self._do("copy", rng)

    @rule(rng=RANDOMS)
    def delete(self, rng: random.Random) -> None:
        self._do("delete", rng)

    @rule(rng=RANDOMS)
    def tag(self, rng: random.Random) -> None:
        self._do("tag", rng)

    @rule(rng=RANDOMS)
    def read(self, rng: random.Random) -> None:
        self._do("read", rng)

    @rule(rng=RANDOMS)
    def search(self, rng: random.Random) -> None:
        self._do("search", rng)

    @invariant()
    def listings(self) -> None:
        self.driver.check_listings()

    def teardown(self) -> None:
        if self.well:
            self.driver.check_everything()
            self.driver.clear()


class CrashMachine(StoreMachine):
    """The same with crashes, on a store of each example's own."""

    client_of: ClassVar[Callable[[Lease], Any]]
    list_stores = search = tag = update_again = None  # a store under test for crashes is written to

    def make_driver(self) -> Driver:
        self.here = Path(tempfile.mkdtemp(dir=self.folder))
        self.store: CrashingStore | None = None
        return Driver(None, Model(), self.here)  # until `begin`

    @initialize(rng=RANDOMS, slow_s=st.sampled_from([0.0, 0.02]))
    def begin(self, rng: random.Random, slow_s: float) -> None:
        self.rng = rng
        self.store = CrashingStore(self.here, type(self).client_of, slow_s=slow_s)
        self.driver = self.store.driver
        for operation in ("create_store", "run_import", "run_import"):
            self._do(operation, rng)

    @rule(
        seed=st.integers(0, 2**32 - 1),
        workers=st.integers(1, 4),
        delay_ms=st.floats(0, 50),
        again_after_ms=st.none() | st.floats(200, 900),
    )
    def crash(self, seed: int, workers: int, delay_ms: float, again_after_ms: float | None) -> None:
        assert self.store is not None
        self.well = False
        again = None if again_after_ms is None else again_after_ms / 1000
        self.store.crash_under_load(seed, workers=workers, delay_s=delay_ms / 1000, again_after_s=again)
        self.well = True

    @rule(
        seed=st.integers(0, 2**32 - 1),
        left=st.integers(0, 24),
        left_in_recovery=st.none() | st.integers(0, 8),
    )
    def crash_at_statement(self, seed: int, left: int, left_in_recovery: int | None) -> None:
        assert self.store is not None
        self.well = False
        self.store.crash_at_statement(seed, left=left, left_in_recovery=left_in_recovery)
        self.well = True

    @rule(seed=st.integers(0, 2**32 - 1), left=st.integers(0, 24))
    def crash_soon(self, seed: int, left: int) -> None:
        self.crash_at_statement(seed, left, None)

    @rule(seed=st.integers(0, 2**32 - 1), left=st.integers(0, 8))
    def crash_early(self, seed: int, left: int) -> None:
        self.crash_at_statement(seed, left, None)

    def teardown(self) -> None:
        if self.store is not None:
            if self.well:
                self.crash(self.rng.randrange(2**32), 3, self.rng.uniform(0, 50), None)
            self.store.close()
        shutil.rmtree(self.here)


def run(machine: type[StoreMachine], examples: int, steps: int, *, derandomize: bool, **attributes: Any) -> None:
    """Run a machine; a failure's operations are told, not shrunk: moments never repeat themselves."""
    run_state_machine_as_test(
        type(machine.__name__, (machine,), attributes),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=derandomize,
            phases=[Phase.generate],
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_every_answer_is_the_models(client: Any, tmp_path: Path) -> None:
    run(StoreMachine, 12, 30, derandomize=True, client=hold_to_the_model(client), folder=tmp_path)


def test_nothing_acknowledged_is_lost(client_of: Callable[..., Any], tmp_path: Path) -> None:
    run(CrashMachine, 5, 11, derandomize=True, client_of=staticmethod(client_of), folder=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_answer_is_the_models_at_length(client: Any, tmp_path: Path) -> None:
    run(StoreMachine, 12 * _MORE_EXAMPLES, 50, derandomize=False, client=hold_to_the_model(client), folder=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_acknowledged_is_lost_at_length(client_of: Callable[..., Any], tmp_path: Path) -> None:
    run(CrashMachine, 4 * _MORE_EXAMPLES, 20, derandomize=False, client_of=staticmethod(client_of), folder=tmp_path)


EVERY_WRITE = ("create_store", "run_import", "update", "copy", "delete", "tag", "delete_store")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("operation", "seeds"),
    [("create_store", 1), ("delete", 1), *(pytest.param(each, 6, marks=pytest.mark.slow) for each in EVERY_WRITE)],
)
def test_a_crash_before_any_statement_loses_nothing(
    client_of: Callable[..., Any], tmp_path: Path, operation: str, seeds: int
) -> None:
    store = CrashingStore(tmp_path, client_of)
    try:
        for seed in range(seeds):
            store.driver.clear()
            for prepare in ("create_store", "run_import", "run_import"):
                getattr(store.driver, prepare)(random.Random(seed))
            left = 0
            while store.crash_at_statement(
                seed, left=left, left_in_recovery=left % 3 or None, operations=[operation], most=1
            ):
                left += 1
    finally:
        store.close()
    assert store.cuts
