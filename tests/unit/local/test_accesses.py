"""When an image set was last used: shown at once, written later, archived after thirty days."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_catalog import IMAGE_SET

from ahi_ml.local.accesses import Accesses
from ahi_ml.local.catalog import Catalog

DAY_S = 86_400.0


class Later:
    """Work that waits until it is told to be done."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def submit(self, work: Callable[[], None], delay_s: float = 0.0) -> None:
        assert delay_s > 0
        self.work.append(work)


@pytest.fixture
def parts(tmp_path: Path) -> Any:
    catalog, later, now = Catalog(tmp_path / "catalog.sqlite"), Later(), [1_000.0]
    catalog.save_image_set(replace(IMAGE_SET, accessed=now[0]))
    yield Accesses(catalog, later, lambda: now[0]), catalog, later.work, now  # type: ignore[arg-type]
    catalog.close()


def test_an_access_is_shown_at_once_and_written_later(parts: Any) -> None:
    accesses, catalog, work, now = parts
    for now[0] in (1_001.0, 1_002.0, 1_003.0):
        accesses.note(IMAGE_SET.id)
    before = catalog.image_set_of(IMAGE_SET.id)
    assert before.accessed == 1_000.0
    assert accesses.shown(before)["lastAccessedAt"] == 1_003.0
    assert len(work) == 1
    work.pop()()
    after = catalog.image_set_of(IMAGE_SET.id)
    assert after.accessed == accesses.shown(after)["lastAccessedAt"] == 1_003.0
    assert not work
    now[0] = 1_004.0
    accesses.note(IMAGE_SET.id)
    assert len(work) == 1


def test_an_access_in_between_is_written_next_time(parts: Any) -> None:
    accesses, catalog, work, now = parts
    accesses.note(IMAGE_SET.id)
    touch = catalog.touch

    def meanwhile(image_set_id: str, moment: float) -> None:
        touch(image_set_id, moment)
        now[0] += 1
        accesses.note(image_set_id)

    catalog.touch = meanwhile
    work.pop()()
    catalog.touch = touch
    assert accesses.shown(catalog.image_set_of(IMAGE_SET.id))["lastAccessedAt"] == now[0]
    work.pop()()
    assert catalog.image_set_of(IMAGE_SET.id).accessed == now[0]
    assert not work


def test_what_nobody_reads_is_archived_until_it_is_read(parts: Any) -> None:
    accesses, catalog, _, now = parts
    found = catalog.image_set_of(IMAGE_SET.id)
    now[0] += 30 * DAY_S
    assert accesses.shown(found)["storageTier"] == "FREQUENT_ACCESS"
    now[0] += 1
    assert accesses.shown(found)["storageTier"] == "ARCHIVE_INSTANT_ACCESS"
    accesses.note(IMAGE_SET.id)
    assert accesses.shown(found)["storageTier"] == "FREQUENT_ACCESS"
