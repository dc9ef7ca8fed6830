"""Work that is promised: done in order, in any case, and not for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ahi_ml.local.accesses import Accesses
from ahi_ml.local.catalog import Catalog
from ahi_ml.local.injector import Injector
from ahi_ml.local.operations import context as contexts
from ahi_ml.local.operations.context import Context
from ahi_ml.local.settling import Settling

PATIENCE_S = 10.0


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    catalog, settling, nothing = Catalog(tmp_path / "catalog.sqlite"), Settling(), None
    unused: Any = nothing
    yield Context(catalog, unused, unused, "r", "a", b"s", settling, Injector(), Accesses(catalog, settling))
    settling.close()
    catalog.close()


def test_what_is_due_first_comes_first() -> None:
    settling, done = Settling(), []
    settling.submit(lambda: done.append("later"), 60)
    settling.submit(lambda: done.append("soon"), 0.01)
    settling.submit(lambda: done.append("now"))
    settling.close()
    assert done == ["now", "soon", "later"]
    settling.submit(lambda: done.append("too late"))
    assert done == ["now", "soon", "later"]


def test_a_failed_write_is_settled_as_soon_as_it_can_be(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "_AGAIN_S", 0.01)
    attempts, settled = [], threading.Event()

    def fail() -> None:
        raise OSError("disk full")

    def settle() -> None:
        attempts.append(len(attempts))
        if len(attempts) < 3:
            fail()
        settled.set()

    context.later(fail, settle)
    assert settled.wait(PATIENCE_S)
    assert attempts == [0, 1, 2]


def test_closing_does_not_wait_for_what_never_succeeds(context: Context) -> None:
    tried = threading.Event()

    def fail() -> None:
        tried.set()
        raise OSError("disk full")

    context.later(fail, fail)
    assert tried.wait(PATIENCE_S)
    closing = threading.Thread(target=context.settling.close, daemon=True)
    closing.start()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
