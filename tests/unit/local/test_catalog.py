"""The catalog: transactions, pages, and one connection under many threads."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ahi_ml.errors import LocalStoreError
from ahi_ml.local.catalog import Catalog, Datastore, FrameRow, ImageSet, Job, Version

STORE = Datastore("d" * 32, "default", "ACTIVE", "HTJ2K", 1.0, 1.0, "token")
JOB = Job("j1", STORE.id, None, "SUBMITTED", "role", "s3://in/", "s3://out/", 1.0, client_token="t1")
IMAGE_SET = ImageSet(
    id="i" * 32,
    datastore_id=STORE.id,
    is_primary=True,
    version=1,
    created=1.0,
    updated=1.0,
    accessed=1.0,
    deleted=None,
    patient_id="P1",
    accession_number=None,
    study_id="S1",
    study_uid="1.2",
    series_uid="1.2.3",
    study_moment="20240101000000.000000",
    study_key="study",
    series_key="series",
    tags={"DICOMPatientId": "P1", "DICOMPatientName": "Jérôme=山田"},
)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(tmp_path / "catalog.sqlite")
    yield opened
    opened.close()


class TestRows:
    def test_they_come_back_as_they_were(self, catalog: Catalog) -> None:
        job = replace(JOB, ended=2.5, message="m", configuration="{}")
        version = Version(IMAGE_SET.id, 1, "ACTIVE", "CREATED", 1.25, None, False, True)
        frame = FrameRow("f" * 32, "blob", "image/jph")
        catalog.save_datastore(STORE)
        catalog.save_job(job)
        catalog.save_image_set(IMAGE_SET)
        catalog.save_version(version)
        catalog.save_document(IMAGE_SET.id, 1, b"\x1f\x8b")
        catalog.add_frames(IMAGE_SET.id, [frame])
        assert catalog.datastore(STORE.id) == catalog.datastore_by_token("token") == STORE
        assert catalog.job(STORE.id, "j1") == catalog.job_by_token(STORE.id, "t1") == job
        assert catalog.image_set(STORE.id, IMAGE_SET.id) == IMAGE_SET
        assert catalog.version(IMAGE_SET.id, 1) == version
        assert catalog.document(IMAGE_SET.id, 1) == b"\x1f\x8b"
        assert catalog.frame(STORE.id, IMAGE_SET.id, frame.frame_id) == frame
        assert catalog.frames(IMAGE_SET.id) == [frame]
        assert catalog.blobs() == {"blob"}

    def test_what_is_unknown_is_none(self, catalog: Catalog) -> None:
        assert catalog.datastore("x") is None
        assert catalog.datastore_by_token("x") is None
        assert catalog.job(STORE.id, "x") is None
        assert catalog.image_set(STORE.id, "x") is None
        assert catalog.version("x", 1) is None
        assert catalog.document("x", 1) is None
        assert catalog.frame(STORE.id, "x", "y") is None
        assert catalog.count_image_sets(STORE.id) == 0

    def test_another_store_does_not_see_them(self, catalog: Catalog) -> None:
        catalog.save_job(JOB)
        catalog.save_image_set(IMAGE_SET)
        catalog.add_frames(IMAGE_SET.id, [FrameRow("f", "blob", "image/jph")])
        assert catalog.job("other", "j1") is None
        assert catalog.job_by_token("other", "t1") is None
        assert catalog.image_set("other", IMAGE_SET.id) is None
        assert catalog.frame("other", IMAGE_SET.id, "f") is None
        assert catalog.series_image_sets("other", "1.2.3") == []
        assert catalog.primaries("other", study_uid="1.2") == []
        assert catalog.jobs("other") == []

    def test_updates_replace(self, catalog: Catalog) -> None:
        catalog.save_job(JOB)
        updated = catalog.update_job(JOB, status="COMPLETED", ended=3.0)
        assert (updated.status, updated.ended) == ("COMPLETED", 3.0)
        assert catalog.jobs(STORE.id) == [updated]

    def test_a_version_without_a_document_shows_the_one_before(self, catalog: Catalog) -> None:
        catalog.save_document("i", 1, b"one")
        catalog.save_document("i", 3, b"three")
        assert [catalog.document("i", version) for version in (1, 2, 3, 4)] == [
            b"one",
            b"one",
            b"three",
            b"three",
        ]
        assert catalog.document("i", 0) is None

    def test_deleted_image_sets(self, catalog: Catalog) -> None:
        catalog.save_image_set(IMAGE_SET)
        catalog.add_frames(IMAGE_SET.id, [FrameRow("f", "blob", "image/jph")])
        catalog.save_document(IMAGE_SET.id, 1, b"x")
        catalog.save_version(Version(IMAGE_SET.id, 1, "ACTIVE", "CREATED", 1.0, None, None, True))
        catalog.save_image_set(replace(IMAGE_SET, deleted=2.0))
        assert catalog.frame(STORE.id, IMAGE_SET.id, "f") is None
        assert catalog.count_image_sets(STORE.id) == 0
        assert catalog.series_image_sets(STORE.id, "1.2.3") == []
        assert find(catalog) == []
        assert catalog.image_set(STORE.id, IMAGE_SET.id) is not None
        catalog.forget(IMAGE_SET.id)
        assert catalog.blobs() == set()
        assert catalog.document(IMAGE_SET.id, 1) is None
        assert catalog.version(IMAGE_SET.id, 1) is not None

    def test_primaries(self, catalog: Catalog) -> None:
        catalog.save_image_set(IMAGE_SET)
        catalog.save_image_set(replace(IMAGE_SET, id="second", is_primary=False, created=2.0))
        assert [found.id for found in catalog.primaries(STORE.id, study_uid="1.2")] == [IMAGE_SET.id]
        found = catalog.series_image_sets(STORE.id, "1.2.3")
        assert [each.id for each in found] == [IMAGE_SET.id, "second"]

    def test_tags(self, catalog: Catalog) -> None:
        catalog.set_tags("arn", {"b": "1", "a": "2"})
        catalog.set_tags("arn", {"b": "3"})
        assert list(catalog.tags("arn").items()) == [("a", "2"), ("b", "3")]
        catalog.drop_tags("arn", ["a", "absent"])
        assert catalog.tags("arn") == {"b": "3"}
        assert catalog.tags("other") == {}

    def test_touch(self, catalog: Catalog) -> None:
        catalog.save_image_set(IMAGE_SET)
        catalog.touch(IMAGE_SET.id, 9.0)
        assert catalog.image_set(STORE.id, IMAGE_SET.id) == replace(IMAGE_SET, accessed=9.0)


class TestTransactions:
    def test_a_failure_leaves_nothing(self, catalog: Catalog) -> None:
        with suppress(KeyError), catalog.transaction():
            catalog.save_datastore(STORE)
            catalog.add_frames("i", [FrameRow("f", "b", "t")])
            raise KeyError
        assert catalog.datastores() == []
        assert catalog.frames("i") == []

    def test_an_inner_failure_undoes_the_outer_too(self, catalog: Catalog) -> None:
        with suppress(KeyError), catalog.transaction():
            catalog.save_datastore(STORE)
            catalog.set_tags("arn", {"a": "b"})  # one of its own inside
            raise KeyError
        assert catalog.datastores() == []
        assert catalog.tags("arn") == {}

    def test_an_interrupt_leaves_nothing(self, catalog: Catalog) -> None:
        with suppress(KeyboardInterrupt), catalog.transaction():
            catalog.save_datastore(STORE)
            raise KeyboardInterrupt
        assert catalog.datastores() == []

    def test_the_next_one_works(self, catalog: Catalog) -> None:
        with pytest.raises(sqlite3.IntegrityError), catalog.transaction():
            catalog._do("INSERT INTO datastores(id) VALUES('x')")
        with catalog.transaction():
            catalog.save_datastore(STORE)
        assert catalog.datastores() == [STORE]

    def test_a_full_disk_says_so_and_leaves_nothing(self, catalog: Catalog) -> None:
        (pages,) = catalog._db.execute("PRAGMA page_count").fetchone()
        catalog._db.execute(f"PRAGMA max_page_count={pages + 5}")

        def write() -> None:
            with catalog.transaction():
                catalog.save_datastore(STORE)
                catalog.save_document(IMAGE_SET.id, 1, bytes(2**20))

        with pytest.raises(sqlite3.OperationalError, match="full"):
            write()
        assert catalog.datastore(STORE.id) is None
        with catalog.transaction():
            catalog.save_datastore(STORE)
        assert catalog.datastore(STORE.id) == STORE

    def test_a_commit_that_fails_leaves_nothing(self, catalog: Catalog) -> None:
        catalog._db.executescript(
            "PRAGMA foreign_keys=ON; CREATE TABLE one(id INTEGER PRIMARY KEY);"
            "CREATE TABLE two(one INTEGER REFERENCES one DEFERRABLE INITIALLY DEFERRED);"
        )

        def write() -> None:
            with catalog.transaction():
                catalog.save_datastore(STORE)
                catalog._db.execute("INSERT INTO two VALUES(1)")

        with pytest.raises(sqlite3.IntegrityError):
            write()
        assert catalog.datastore(STORE.id) is None
        with catalog.transaction():
            catalog.save_datastore(STORE)
        assert catalog.datastore(STORE.id) == STORE

    def test_what_was_committed_outlives_the_connection(self, tmp_path: Path) -> None:
        path = tmp_path / "catalog.sqlite"
        first = Catalog(path)
        with first.transaction():
            first.save_datastore(STORE)
        first.close()
        second = Catalog(path)
        assert second.datastores() == [STORE]
        second.close()
        assert [file.name for file in tmp_path.iterdir()] == ["catalog.sqlite"]

    def test_threads_wait_for_each_other(self, catalog: Catalog) -> None:
        catalog.save_datastore(replace(STORE, updated=0.0))
        failures: list[BaseException] = []

        def count() -> None:
            try:
                for _ in range(50):
                    with catalog.transaction():
                        found = catalog.datastore(STORE.id)
                        assert found is not None
                        catalog.save_datastore(replace(found, updated=found.updated + 1))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=count) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        found = catalog.datastore(STORE.id)
        assert found is not None
        assert found.updated == 400

    def test_nobody_reads_half_a_transaction(self, catalog: Catalog) -> None:
        inside, seen = threading.Event(), []
        reader = threading.Thread(target=lambda: (inside.wait(), seen.append(catalog.datastores())))
        reader.start()
        with suppress(KeyError), catalog.transaction():
            catalog.save_datastore(STORE)
            inside.set()
            reader.join(0.1)
            raise KeyError
        reader.join()
        assert seen == [[]]

    def test_reads_in_a_steady_moment_see_one_state(self, catalog: Catalog) -> None:
        writer = threading.Thread(target=catalog.save_datastore, args=(STORE,))
        with catalog.steady():
            before = catalog.datastores()
            writer.start()
            writer.join(0.1)
            assert (catalog.datastores(), before) == ([], [])
        writer.join()
        assert catalog.datastores() == [STORE]


def find(catalog: Catalog, *, order: str = "updated", down: bool = False, **asked: Any) -> list[str]:
    asked = {"after": None, "limit": 50, **asked}
    found = catalog.search(STORE.id, order=order, descending=down, **asked)
    return [each.id for each in found]


class TestPages:
    @pytest.fixture
    def full(self, catalog: Catalog) -> Catalog:
        """Seven image sets; some share their moments, one has no study date."""
        for number, moment in enumerate(["b", "a", "b", None, "c", "b", "a"]):
            catalog.save_image_set(
                replace(
                    IMAGE_SET,
                    id=f"i{number}",
                    created=10.0 - number,
                    updated=float(number // 2),
                    study_moment=moment,
                    patient_id="odd" if number % 2 else "even",
                )
            )
        catalog.save_image_set(replace(IMAGE_SET, id="deleted", deleted=1.0))
        catalog.save_image_set(replace(IMAGE_SET, id="elsewhere", datastore_id="other"))
        return catalog

    def test_orders(self, full: Catalog) -> None:
        ids = [f"i{number}" for number in range(7)]
        assert find(full) == ids
        assert find(full, down=True) == ids[::-1]
        assert find(full, order="created") == ids[::-1]
        assert find(full, order="study_moment") == ["i3", "i1", "i6", "i0", "i2", "i5", "i4"]

    @pytest.mark.parametrize("order", ["updated", "created", "study_moment"])
    @pytest.mark.parametrize("down", [False, True])
    @pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
    def test_pages_join_to_the_whole(self, full: Catalog, order: str, down: bool, size: int) -> None:
        whole = find(full, order=order, down=down)
        paged: list[str] = []
        after = None
        while page := full.search(STORE.id, order=order, descending=down, after=after, limit=size):
            assert len(page) <= size
            paged += [each.id for each in page]
            value = getattr(page[-1], order)
            after = ("" if value is None else value, page[-1].id)
        assert paged == whole

    def test_conditions(self, full: Catalog) -> None:
        odd, late = [("patient_id", "odd")], [("updated", 1.0, 2.0)]
        assert find(full, equal=odd) == ["i1", "i3", "i5"]
        assert find(full, equal=odd, between=late) == ["i3", "i5"]
        assert find(full, equal=[("patient_id", "odd' OR 1=1 --")]) == []
        assert find(full, equal=odd, after=(0.0, "i1"), limit=1) == ["i3"]
        full.save_image_set(replace(full.image_set_of("i4"), is_primary=False))
        assert find(full, equal=[("is_primary", False)]) == ["i4"]
        assert find(full, equal=[("is_primary", True)]) == ["i0", "i1", "i2", "i3", "i5", "i6"]

    @pytest.mark.parametrize("few", [1, 3, 1000])
    @pytest.mark.parametrize("order", ["updated", "created", "study_moment"])
    def test_wide_and_narrow_ranges_answer_alike(
        self, full: Catalog, monkeypatch: pytest.MonkeyPatch, few: int, order: str
    ) -> None:
        monkeypatch.setattr("ahi_ml.local.catalog._FEW", few)
        for low, high, expected in (("a", "b", "01256"), ("b", "c", "0245"), ("a", "z", "012456"), ("x", "z", "")):
            found = find(full, order=order, between=[("study_moment", low, high)])
            assert sorted(found) == [f"i{number}" for number in expected]
            assert found == [each for each in find(full, order=order) if each in found]

    def test_jobs_come_newest_first(self, catalog: Catalog) -> None:
        for number in range(4):
            catalog.save_job(
                replace(
                    JOB,
                    id=f"j{number}",
                    submitted=float(number // 2),
                    client_token=None,
                    status="FAILED" if number == 2 else "COMPLETED",
                )
            )
        assert [job.id for job in catalog.jobs(STORE.id)] == ["j3", "j2", "j1", "j0"]
        assert [job.id for job in catalog.jobs(STORE.id, limit=2)] == ["j3", "j2"]
        assert [job.id for job in catalog.jobs(STORE.id, after=(1.0, "j2"))] == ["j1", "j0"]
        assert [job.id for job in catalog.jobs(STORE.id, "COMPLETED", (1.0, "j3"), 1)] == ["j1"]
        assert [job.id for job in catalog.jobs(status="FAILED")] == ["j2"]

    def test_data_stores_come_oldest_first(self, catalog: Catalog) -> None:
        for number in range(4):
            status = "DELETED" if number == 1 else "ACTIVE"
            catalog.save_datastore(
                replace(STORE, id=f"d{number}", created=float(number // 2), status=status, client_token=None)
            )
        assert [store.id for store in catalog.datastores()] == ["d0", "d1", "d2", "d3"]
        assert [store.id for store in catalog.datastores("ACTIVE", (0.0, "d0"), 1)] == ["d2"]
        assert [store.id for store in catalog.datastores(after=(1.0, "d2"))] == ["d3"]

    def test_versions_come_newest_first(self, catalog: Catalog) -> None:
        for number in range(1, 12):
            state = "LOCKED" if number == 11 else "ACTIVE"
            catalog.save_version(Version("i", number, state, "UPDATED", float(number), None, None, True))
        assert [each.version for each in catalog.versions("i", limit=3)] == [11, 10, 9]
        assert [each.version for each in catalog.versions("i", before=3)] == [2, 1]
        assert [each.version for each in catalog.unsettled_versions()] == [11]

    def test_searches_use_an_index(self, full: Catalog) -> None:
        plan = full._all(
            "EXPLAIN QUERY PLAN SELECT * FROM image_sets WHERE datastore_id=? AND deleted IS NULL "
            "AND (updated, id) > (?, ?) ORDER BY updated ASC, id ASC LIMIT 50",
            (STORE.id, 0.0, ""),
        )
        assert "image_sets_updated" in str(plan)
        assert "TEMP B-TREE" not in str(plan)


class TestFile:
    def test_a_newer_schema_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "catalog.sqlite"
        Catalog(path).close()
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA user_version=99")
        db.close()
        with pytest.raises(LocalStoreError, match="schema version 99"):
            Catalog(path)

    def test_another_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "catalog.sqlite"
        path.write_bytes(b"no database at all, but long enough to look at" * 100)
        with pytest.raises(LocalStoreError, match="cannot open the catalog"):
            Catalog(path)
        with pytest.raises(LocalStoreError, match="cannot open the catalog"):
            Catalog(tmp_path / "absent" / "catalog.sqlite")

    def test_one_process_holds_it(self, tmp_path: Path) -> None:
        path = tmp_path / "catalog.sqlite"
        holder = Catalog(path)
        holder.save_datastore(STORE)
        other = sqlite3.connect(path, timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("SELECT * FROM datastores")
        other.close()
        holder.close()

    def test_an_older_schema_is_brought_up_to_date(self, tmp_path: Path) -> None:
        path = tmp_path / "catalog.sqlite"
        catalog = Catalog(path)
        catalog.save_datastore(STORE)
        catalog.save_image_set(IMAGE_SET)
        catalog.close()
        with sqlite3.connect(path) as db:
            now = db.execute("SELECT name, sql FROM sqlite_master WHERE type='index' AND sql NOT NULL").fetchall()
            for name, _ in now:
                if name.startswith("image_sets_"):
                    db.execute(f"DROP INDEX {name}")
            for name in ("updated", "created", "moment", "patient", "accession", "study_id", "study", "series"):
                db.execute(f"CREATE INDEX image_sets_{name} ON image_sets(datastore_id, id)")
            db.execute("PRAGMA user_version=1")
        db.close()
        catalog = Catalog(path)
        assert find(catalog) == [IMAGE_SET.id]
        catalog.close()
        with sqlite3.connect(path) as db:
            then = db.execute("SELECT name, sql FROM sqlite_master WHERE type='index' AND sql NOT NULL").fetchall()
        db.close()
        assert sorted(then) == sorted(now)
