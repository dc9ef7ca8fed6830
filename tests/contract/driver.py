"""Operations on a running store and on its model, side by side: every answer must be the model's.

A `Driver` draws an operation's arguments from a `random.Random`, sends it, waits until the image sets
it locked are settled, and compares. When the server dies meanwhile the operation raises `Cut`; once
the server runs again `Cut.resolve` looks at what came of it, accepts only what was promised, and
brings the model up to date.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from botocore.exceptions import BotoCoreError, ClientError
from scans import BROKEN, FAMILIES, ROOT, Scan, draw_scans, make_scan, write_broken, write_scan
from service_model import Change, ImageSet, Json, Model, Store, Version, frames_of, moment_text, series_of, summary_of

ROLE = "arn:aws:iam::123456789012:role/import"
NOBODY = "0" * 32
PATIENCE_S = 30.0
CUT_SHORT = "cut short"
"""What the message of an attempt says that a killed server left behind."""

Resolve = Callable[[], None]


class Cut(Exception):
    """The server died under an operation; `resolve` finds out, later, what came of it."""

    def __init__(self, what: str, resolve: Resolve) -> None:
        super().__init__(f"the server was gone during {what}")
        self.what, self.resolve = what, resolve


def code_of(error: ClientError) -> str:
    return str(error.response["Error"]["Code"])


def seconds(value: datetime) -> float:
    return round(value.timestamp(), 3)


def as_datetime(value: float) -> datetime:
    return datetime.fromtimestamp(value, UTC)


class Driver:
    """Does one thing at a time to some families of scans of a store.

    Parameters
    ----------
    client : boto3 client
        Replaced after a restart.
    model : Model
    lock : lock
        Taken whenever the model is looked at or changed: drivers of other families share it.
    folder : Path
        For the files that are imported, and the reports.
    families : sequence
        What this driver may touch. Data stores themselves are touched by those who may touch all.
    most_scans : int
        Files of an import.
    """

    def __init__(
        self,
        client: Any,
        model: Model,
        folder: Path,
        *,
        lock: Any = None,
        families: Sequence[tuple[int, int]] = FAMILIES,
        most_scans: int = 4,
    ) -> None:
        self.client, self.model, self.folder, self.most_scans = client, model, folder, most_scans
        self.lock = lock or threading.RLock()
        self.families = tuple(families)
        self.log: list[str] = []

    # How an operation is asked for, and what may come of it

    @contextmanager
    def _operation(self, what: str) -> Iterator[list[Resolve]]:
        """Raise `Cut` when the server goes away; the last resolve put into the list is kept."""
        self.log.append(what)
        resolve: list[Resolve] = [lambda: None]
        try:
            yield resolve
        except (BotoCoreError, OSError) as error:
            raise Cut(what, resolve[-1]) from error
        except AssertionError as error:
            error.add_note("the last operations:\n" + "\n".join(self.log[-20:]))
            raise

    def _call(self, operation: str, **request: Any) -> tuple[Json, str]:
        """An answer, or the code of a fault."""
        try:
            return getattr(self.client, operation)(**request), ""
        except ClientError as error:
            return {}, code_of(error)

    def _ask(self, operation: str, faults: set[str], **request: Any) -> Json | None:
        """Send a request: an answer when the model has no objection, else one of its faults."""
        answer, code = self._call(operation, **request)
        objections = sorted(faults) or "no objection"
        assert (code in faults) if faults else not code, f"{operation}: {code or 'an answer'}, the model: {objections}"
        return None if code else answer

    def _pages(self, operation: str, key: str, size: int | None = None, **request: Any) -> list[Json]:
        found: list[Json] = []
        if size is not None:
            request["maxResults"] = size
        while True:
            page = getattr(self.client, operation)(**request)
            assert len(page[key]) <= (size or 50)
            found += page[key]
            if not page.get("nextToken"):
                return found
            assert len(page[key]) == (size or 50), "only the last page is short"
            request["nextToken"] = page["nextToken"]

    def _settled(self, store: Store, set_id: str, during: str, *, readable: bool = True) -> Json:
        """Wait until an image set is not LOCKED; while it is, it says why and can be read."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found: Json = self.client.get_image_set(datastoreId=store.id, imageSetId=set_id)
            if found["imageSetState"] != "LOCKED":
                return found
            assert found["imageSetWorkflowStatus"] == during, found
            if readable:  # gone when the lock's end was a deletion, as before when it was not
                _, code = self._call("get_image_set_metadata", datastoreId=store.id, imageSetId=set_id)
                assert code in ("", "ResourceNotFoundException")
            assert time.monotonic() < deadline, f"{set_id} stays LOCKED"

    # What is there to work on

    def stores(self) -> list[Store]:
        return [each for each in self.model.stores.values() if not each.deleted]

    def _store(self, rng: random.Random) -> Store | None:
        return rng.choice(stores) if (stores := self.stores()) else None

    def live(self, store: Store) -> list[ImageSet]:
        return [each for each in store.live() if each.family in self.families]

    def _target(self, rng: random.Random, store: Store) -> ImageSet | None:
        """Mostly an image set that is there; now and then a deleted one."""
        mine = [each for each in list(store.sets.values()) if each.family in self.families]
        live = [each for each in mine if not each.deleted]
        return rng.choice(mine if mine and (not live or rng.random() < 0.1) else live) if mine else None

    def _latest(self, rng: random.Random, target: ImageSet) -> str:
        stale = rng.random() < 0.1
        return str(len(target.versions) + rng.choice([-1, 1])) if stale else target.version

    # Data stores

    def create_store(self, rng: random.Random) -> None:
        if len(self.stores()) >= 3:
            return
        made = Store(
            "",
            rng.choice(["a", "b"]),
            rng.choice(["HTJ2K", "JPEG_2000_LOSSLESS"]),
            os.urandom(8).hex(),
            {"made": "by the model"} if rng.random() < 0.5 else {},
        )
        with self._operation("create_store") as resolve:
            resolve.append(lambda: self._create(made))  # once more: its token makes it once
            self._create(made)
            resolve.append(lambda: None)
            again = self.client.create_datastore(**self._creation(made))
            assert again["datastoreId"] == made.id
            self._ask("create_datastore", {"ConflictException"}, **{**self._creation(made), "datastoreName": "other"})
            self.check_store(made)

    @staticmethod
    def _creation(made: Store) -> Json:
        names = {"datastoreName": made.name, "losslessStorageFormat": made.format}
        return {**names, "clientToken": made.token, "tags": dict(made.tags)}

    def _create(self, made: Store) -> None:
        made.id = self.client.create_datastore(**self._creation(made))["datastoreId"]
        self._store_settled(made, "CREATING", "ACTIVE")
        with self.lock:
            assert made.id not in self.model.stores
            self.model.stores[made.id] = made

    def delete_store(self, rng: random.Random) -> None:
        if (store := self._store(rng)) is None or (not store.live() and rng.random() < 0.7):
            return
        faults = {"ConflictException"} if store.live() else set()

        acknowledged = False

        def look() -> None:
            found = self.client.get_datastore(datastoreId=store.id)["datastoreProperties"]
            store.deleted = found["datastoreStatus"] == "DELETED"
            assert store.deleted or not acknowledged, "an acknowledged deletion was forgotten"

        with self._operation("delete_store") as resolve:
            resolve.append(look)
            if self._ask("delete_datastore", faults, datastoreId=store.id) is not None:
                acknowledged = True
                self._store_settled(store, "DELETING", "DELETED")
                store.deleted = True
                resolve.append(lambda: None)
                self._ask("search_image_sets", {"ResourceNotFoundException"}, datastoreId=store.id)

    def _store_settled(self, store: Store, during: str, end: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = self.client.get_datastore(datastoreId=store.id)["datastoreProperties"]["datastoreStatus"]
            if found == end:
                return
            assert found == during
            assert time.monotonic() < deadline, f"a data store stays {found}"

    def check_store(self, store: Store) -> None:
        """A data store's own properties and tags."""
        found = self.client.get_datastore(datastoreId=store.id)["datastoreProperties"]
        shown = (found["datastoreName"], found["losslessStorageFormat"], found["datastoreStatus"])
        assert shown == (store.name, store.format, "DELETED" if store.deleted else "ACTIVE")
        if not store.deleted:
            assert self.client.list_tags_for_resource(resourceArn=found["datastoreArn"])["tags"] == store.tags

    def list_stores(self, rng: random.Random) -> None:
        with self._operation("list_stores"):
            listed = self._pages("list_datastores", "datastoreSummaries", rng.choice([1, 2, 50]))
            stated = {each["datastoreId"]: each["datastoreStatus"] for each in listed}
            assert len(stated) == len(listed)
            for store in self.model.stores.values():
                assert stated[store.id] == ("DELETED" if store.deleted else "ACTIVE")
            moments = [each["createdAt"] for each in listed]
            assert moments == sorted(moments)

    # Imports

    def run_import(self, rng: random.Random, scans: Sequence[Scan] | None = None) -> None:
        if (store := self._store(rng)) is None:
            return
        if scans is None:
            scans = draw_scans(rng, self.families, self.most_scans)
        broken = [kind for kind in BROKEN if rng.random() < 0.15]
        source = self.folder / os.urandom(6).hex()
        source.mkdir()
        for scan in scans:
            write_scan(scan, source)
        failing = {write_broken(kind, source): BROKEN[kind] for kind in broken}
        request = {
            "datastoreId": store.id,
            "dataAccessRoleArn": ROLE,
            "clientToken": os.urandom(8).hex(),
            "inputS3Uri": f"s3://this-machine{source}/",
            "outputS3Uri": f"s3://this-machine{source}-report/",
        }
        with self._operation(f"import of {sorted(scan.name for scan in scans)}") as resolve:
            resolve.append(lambda: self._resolve_import(store, scans, request, None))
            job_id = self.client.start_dicom_import_job(**request)["jobId"]
            resolve.append(lambda: self._resolve_import(store, scans, request, job_id))
            job = self._ended(store, job_id)
            assert job["jobStatus"] == "COMPLETED", job
            with self.lock:
                touched = self._read_report(store, job, scans, failing)
                self._learn(store, touched, resolve)
            assert self.client.start_dicom_import_job(**request)["jobId"] == job_id
            for target in touched:
                self.check_set(store, target)
        shutil.rmtree(source)

    def _ended(self, store: Store, job_id: str) -> Json:
        deadline = time.monotonic() + PATIENCE_S
        seen = ["SUBMITTED", "IN_PROGRESS", "COMPLETED"]
        while True:
            job: Json = self.client.get_dicom_import_job(datastoreId=store.id, jobId=job_id)["jobProperties"]
            assert job["jobStatus"] in seen, job
            seen = seen[seen.index(job["jobStatus"]) :]  # a status never goes back
            if job["jobStatus"] == "COMPLETED":
                assert job["endedAt"] >= job["submittedAt"]
                return job
            assert time.monotonic() < deadline, f"an import job is still {job['jobStatus']}"

    def _read_report(self, store: Store, job: Json, scans: Sequence[Scan], failing: dict[str, str]) -> list[ImageSet]:
        """Do in the model what a job says it did, where that is what it should have done."""
        output = Path(job["outputS3Uri"].removeprefix("s3://this-machine"))

        def lines(name: str) -> dict[str, Json]:
            text = (output / name.upper() / f"{name}.ndjson").read_text()
            return {Path(each["inputFile"]).name: each for each in map(json.loads, text.splitlines())}

        store.jobs[job["jobId"]] = "COMPLETED"
        successes, failures = lines("success"), lines("failure")
        assert set(successes) == {scan.name for scan in scans}
        assert {name: failures[name]["exception"]["message"][: len(text)] for name, text in failing.items()} == failing
        assert set(failures) == set(failing)
        touched = []
        summaries = []
        for group in self.model.groups(scans):
            responses = [successes[scan.name]["importResponse"] for scan in group]
            set_id = responses[0]["imageSetId"]
            known = set_id in store.sets
            target = self.model.commit(store, group, set_id)
            assert known or len(target.versions) == 1
            response = {
                "imageSetId": set_id,
                "imageSetVersion": len(target.versions),
                "isPrimary": target.latest.primary,
            }
            assert all(each == response for each in responses)
            summaries.append({**response, "numberOfMatchedSOPInstances": len({scan.sop_uid for scan in group})})
            touched.append(target)
        manifest = json.loads((output / "job-output-manifest.json").read_text())["jobSummary"]
        assert manifest["imageSetsSummary"] == summaries
        assert manifest["numberOfScannedFiles"] == len(scans) + len(failing)
        assert manifest["numberOfImportedFiles"] == len(scans)
        assert manifest["numberOfFilesWithCustomerError"] == len(failing)
        shutil.rmtree(output)
        return touched

    def _resolve_import(self, store: Store, scans: Sequence[Scan], request: Json, job_id: str | None) -> None:
        """A job that a crash met is there, if it was acknowledged; a beginning of its groups is in the store, each
        of them whole."""
        listed = self._pages("list_dicom_import_jobs", "jobSummaries", datastoreId=store.id)
        new = [each for each in listed if each["jobId"] not in store.jobs]
        properties = [
            self.client.get_dicom_import_job(datastoreId=store.id, jobId=each["jobId"])["jobProperties"] for each in new
        ]
        jobs = [each for each in properties if each["inputS3Uri"] == request["inputS3Uri"]]
        if job_id is None:
            assert len(jobs) <= 1
        else:
            assert [each["jobId"] for each in jobs] == [job_id]
        groups = self.model.groups(scans)
        missing = 0
        strangers = self._strangers(store, scans[0].family)
        for group in groups:
            target, primary = self.model.home(store, group[0])
            if target is not None:
                found = self.client.get_image_set(datastoreId=store.id, imageSetId=target.id)
                there = int(found["versionId"]) > len(target.versions)
                if there and CUT_SHORT in found.get("message", ""):
                    self.model.cut_import_short(target)
                    self._learn(store, [target])
                    there = False
                set_id = target.id
            else:
                mine = [each for each in strangers if self._is_of(each, group, primary)]
                assert len(mine) <= 1
                there = bool(mine)
                set_id = mine[0]["imageSetId"] if mine else ""
            if not there:
                missing += 1
                continue
            assert not missing, "a later group of a job is in the store, and an earlier one is not"
            strangers = [each for each in strangers if each["imageSetId"] != set_id]
            self._learn(store, [self.model.commit(store, group, set_id)])
        assert not strangers, f"the store holds image sets that nobody made: {strangers}"
        if not jobs:
            assert missing == len(groups)
            return
        store.jobs[jobs[0]["jobId"]] = jobs[0]["jobStatus"]
        assert jobs[0]["jobStatus"] in ("COMPLETED", "FAILED"), jobs
        assert "endedAt" in jobs[0]
        if jobs[0]["jobStatus"] == "COMPLETED":
            assert not missing
        else:
            assert "server stopped" in jobs[0]["message"]

    @staticmethod
    def _is_of(summary: Json, group: Sequence[Scan], primary: bool) -> bool:
        levels, tags = group[0].levels, summary["DICOMTags"]
        shown = (tags["DICOMSeriesInstanceUID"], tags["DICOMSeriesNumber"], tags["DICOMPatientId"])
        wanted = (
            levels["Series"]["SeriesInstanceUID"],
            int(levels["Series"]["SeriesNumber"]),
            levels["Patient"]["PatientID"],
        )
        return shown == wanted and summary["isPrimary"] is primary

    def _strangers(self, store: Store, family: tuple[int, int]) -> list[Json]:
        """Image sets of a family that the model does not know."""
        found = self._pages("search_image_sets", "imageSetsMetadataSummaries", datastoreId=store.id)
        mark = f"{ROOT}.{family[0]}.{family[1]}."
        return [
            each
            for each in found
            if each["imageSetId"] not in store.sets and mark in f"{each['DICOMTags']['DICOMSeriesInstanceUID']}."
        ]

    # Updates

    def draw_change(self, rng: random.Random, target: ImageSet) -> tuple[Change, bool]:
        """A change, and whether it is asked for the whole study."""
        document = target.document
        series_uid, series = series_of(document)
        sop_uid = rng.choice(list(series["Instances"]))
        study = rng.random() < 0.25
        word = f"W{rng.randrange(100)}"

        def at(level: str, node: Json) -> Json:
            if level in ("Patient", "Study"):
                return {level: node}
            inner = node if level == "Series" else {"Instances": {sop_uid: node}}
            return {"Study": {"Series": {series_uid: inner}}}

        def dicom(level: str, **elements: Any) -> Json:
            return at(level, {"DICOM": elements})

        present = {
            "Patient": document["Patient"]["DICOM"],
            "Study": document["Study"]["DICOM"],
            "Series": series["DICOM"],
            "Instance": series["Instances"][sop_uid]["DICOM"],
        }
        removable = [
            (level, name)
            for level, elements in present.items()
            for name, value in elements.items()
            if isinstance(value, str) and not name.endswith(("UID", "Version", "StudyID"))
        ]
        level, name = rng.choice(removable)
        misplaced = level == "Instance" and name in SHARED  # shown there where an instance says it otherwise
        changes: list[Callable[[], Change]] = [
            lambda: Change(put=dicom("Patient", PatientComments=word, PatientSex=rng.choice(["F", "M", None]))),
            lambda: Change(put=dicom("Patient", PatientID=rng.choice(["P0", "P1", word]))),
            lambda: Change(put=dicom("Study", StudyDescription=word, AccessionNumber=rng.choice([word, "A00"]))),
            lambda: Change(put=dicom("Study", StudyDate=rng.choice(["20230101", "20240130"]), StudyTime="1201")),
            lambda: Change(put=dicom("Series", BodyPartExamined=word, SeriesNumber=rng.choice(["77", "00"]))),
            lambda: Change(put=dicom("Instance", AcquisitionNumber="12", InstanceNumber="99")),
            lambda: Change(put=dicom("Study", StudyID=word), needs_force=True),
            lambda: Change(
                put=at("Instance", {"DICOM": {"001910F9": word}, "DICOMVRs": {"001910F9": "LO"}}), needs_force=True
            ),
            lambda: Change(
                put=dicom("Study", StudyInstanceUID=f"{ROOT}.99.{rng.randrange(10**9)}"), needs_force=True, of_uid=True
            ),
            lambda: Change(
                put=dicom(
                    "Series", SeriesInstanceUID=f"{ROOT}.{target.family[0]}.{target.family[1]}.{rng.randrange(4)}"
                ),
                needs_force=True,
                of_uid=True,
            ),
            lambda: Change(put=dicom("Study", PatientName=word), never=True),
            lambda: Change(put=at("Instance", {"ImageFrames": {}}), never=True),
            lambda: Change(put=dicom("Patient", PatientSex="lower case"), needs_force=True),
            lambda: Change(remove=dicom(level, **{name: present[level][name]}), never=misplaced),
            lambda: Change(remove=dicom(level, **{name: "another value"}), never=misplaced),
            lambda: Change(remove=at("Instance", {}), needs_force=True),
            lambda: Change(
                remove={"Study": {"Series": {series_uid: {"Instances": {f"{ROOT}.404": {}}}}}}, needs_force=True
            ),
            lambda: Change(revert=str(rng.randint(0, len(target.versions) + 1))),
            lambda: Change(revert=str(rng.randint(1, max(1, len(target.versions) - 1)))),
        ]
        if study:
            changes = [*changes[:4], *changes[:4], changes[6], changes[13], changes[14], changes[18]]
        return rng.choice(changes)(), study

    def update(self, rng: random.Random) -> None:
        if (store := self._store(rng)) is None:
            return
        with self.lock:
            if (target := self._target(rng, store)) is None:
                return
            change, study = self.draw_change(rng, target)
            force = rng.random() < (0.8 if change.needs_force else 0.2)
            latest = self._latest(rng, target)
            faults = (
                {"ResourceNotFoundException"}
                if target.deleted
                else self.model.update_faults(target, latest, change, force=force, study=study)
            )
            targets = self.model.update_targets(store, target, study=study)
        if change.revert is not None:
            body: Json = {"revertToVersionId": change.revert}
        else:
            trees = {"updatableAttributes": change.put, "removableAttributes": change.remove}
            body = {
                "DICOMUpdates": {
                    name: json.dumps({"SchemaVersion": 1.1, **tree}).encode()
                    for name, tree in trees.items()
                    if tree is not None
                }
            }
        request = {
            "datastoreId": store.id,
            "imageSetId": target.id,
            "latestVersionId": latest,
            "force": force,
            "updateImageSetMetadataUpdates": body,
            **({"includeStudyImageSets": True} if study else {}),
        }
        number = str(len(target.versions) + 1)
        acknowledged = False

        def look() -> None:
            found = self.client.get_image_set(datastoreId=store.id, imageSetId=target.id)
            if faults or found["versionId"] == target.version:
                assert not acknowledged, "an acknowledged update is gone"
                return
            cut_short = CUT_SHORT in found.get("message", "")
            self.model.update(targets, change, force=force, cut_short=cut_short)
            self._learn(store, targets)

        with self._operation(f"update of {target.id} {latest} {change} force={force} study={study}") as resolve:
            resolve.append(look)
            answer = self._ask("update_image_set_metadata", faults, **request)
            if answer is None:
                resolve.append(lambda: None)
                return
            acknowledged = True
            shown = (answer["latestVersionId"], answer["imageSetState"], answer["imageSetWorkflowStatus"])
            assert shown == (number, "LOCKED", "UPDATING")
            self._settled(store, target.id, "UPDATING")
            for each in targets[1:]:
                self._settled(store, each.id, "UPDATING_FOR_STUDY_CONSISTENCY")
            with self.lock:
                self.model.update(targets, change, force=force)
                self._learn(store, targets, resolve)
            for each in targets:
                self.check_set(store, each)

    # Copies and deletions

    def copy(self, rng: random.Random) -> None:
        if (store := self._store(rng)) is None:
            return
        with self.lock:
            if (source := self._target(rng, store)) is None:
                return
            into: ImageSet | None = None
            if rng.random() < 0.6:  # mostly one that goes together
                uid = series_of(source.document)[0]
                others = [each for each in self.live(store) if each is not source]
                alike = [each for each in others if series_of(each.document)[0] == uid]
                chosen = (alike or others) if rng.random() < 0.9 else [*others, source]
                into = rng.choice(chosen) if chosen else None
            instances = list(series_of(source.document)[1]["Instances"])
            uids: list[str] | None = None
            if rng.random() < 0.6:
                uids = rng.sample(instances, rng.randint(1, len(instances)))
                if rng.random() < 0.1:
                    uids.append(f"{ROOT}.404")
            promote, force = rng.random() < 0.15, rng.random() < 0.4
            latest = self._latest(rng, source)
            into_latest = self._latest(rng, into) if into is not None else ""
            faults = {"ResourceNotFoundException"} if source.deleted or (into is not None and into.deleted) else set()
            faults |= self.model.copy_faults(store, source, latest, uids, into, into_latest, promote=promote)
        information: Json = {"sourceImageSet": {"latestVersionId": latest}}
        if uids is not None:
            tree = {series_of(source.document)[0]: {"Instances": {uid: {} for uid in uids}}}
            text = json.dumps({"SchemaVersion": "1.1", "Study": {"Series": tree}})
            information["sourceImageSet"]["DICOMCopies"] = {"copiableAttributes": text}
        if into is not None:
            information["destinationImageSet"] = {"imageSetId": into.id, "latestVersionId": into_latest}
        request = {
            "datastoreId": store.id,
            "sourceImageSetId": source.id,
            "copyImageSetInformation": information,
            "force": force,
            "promoteToPrimary": promote,
        }
        made: str | None = None

        def look() -> None:
            if into is not None:
                found = self.client.get_image_set(datastoreId=store.id, imageSetId=into.id)
                if faults or found["versionId"] == into.version:
                    assert made is None, "an acknowledged copy is gone"
                    return
                cut_short = CUT_SHORT in found.get("message", "")
                self.model.copy_into(source, uids, into, force=force, cut_short=cut_short)
                self._learn(store, [into])
                return
            strangers = self._strangers(store, source.family)
            assert len(strangers) <= (0 if faults else 1), strangers
            if strangers:
                assert made in (None, strangers[0]["imageSetId"])
                set_id = strangers[0]["imageSetId"]
                self.model.copy_new(store, source, uids, set_id, promote=promote, force=force)
                self._learn(store, [store.sets[set_id]])
            elif made is not None:  # it left a tombstone that says so
                found = self.client.get_image_set(datastoreId=store.id, imageSetId=made)
                assert found["imageSetState"] == "DELETED"
                assert CUT_SHORT in found["message"]

        with self._operation(f"copy of {source.id} {latest} {uids} into {into and into.id}") as resolve:
            resolve.append(look)
            answer = self._ask("copy_image_set", faults, **request)
            if answer is None:
                resolve.append(lambda: None)
                return
            read, written = answer["sourceImageSetProperties"], answer["destinationImageSetProperties"]
            made = written["imageSetId"]
            reading = "COPYING_WITH_READ_ONLY_ACCESS"
            assert (read["imageSetId"], read["latestVersionId"]) == (source.id, source.version)
            assert (read["imageSetState"], read["imageSetWorkflowStatus"]) == ("LOCKED", reading)
            assert (written["imageSetState"], written["imageSetWorkflowStatus"]) == ("LOCKED", "COPYING")
            self._settled(store, source.id, reading)
            self._settled(store, made, "COPYING", readable=into is not None)
            with self.lock:
                if into is None:
                    assert made not in store.sets
                    self.model.copy_new(store, source, uids, made, promote=promote, force=force)
                else:
                    assert made == into.id
                    self.model.copy_into(source, uids, into, force=force)
                self._learn(store, [store.sets[made]], resolve)
            self.check_set(store, source)
            self.check_set(store, store.sets[made])

    def delete(self, rng: random.Random) -> None:
        if (store := self._store(rng)) is None:
            return
        with self.lock:
            if (target := self._target(rng, store)) is None:
                return
            faults = {"ResourceNotFoundException"} if target.deleted else set()
        acknowledged = False

        def look() -> None:
            found = self.client.get_image_set(datastoreId=store.id, imageSetId=target.id)
            if found["imageSetState"] == "DELETED":
                self._gone(target)
            else:
                assert not acknowledged, "an acknowledged deletion was forgotten"

        with self._operation(f"deletion of {target.id}") as resolve:
            resolve.append(look)
            if self._ask("delete_image_set", faults, datastoreId=store.id, imageSetId=target.id) is not None:
                acknowledged = True
                assert self._settled(store, target.id, "DELETING")["imageSetState"] == "DELETED"
                with self.lock:
                    self._gone(target)
            resolve.append(lambda: None)
            self.check_set(store, target)

    @staticmethod
    def _gone(target: ImageSet) -> None:
        target.deleted, target.tags = True, {}

    # Tags

    def tag(self, rng: random.Random) -> None:
        if (store := self._store(rng)) is None:
            return
        target = self._target(rng, store)
        if target is None and self.families != FAMILIES:
            return
        owner: Any = target if target is not None else store
        arn = f"arn:aws:medical-imaging:us-east-1:123456789012:datastore/{store.id}"
        arn += f"/imageset/{target.id}" if target is not None else ""
        faults = {"ResourceNotFoundException"} if target is not None and target.deleted else set()
        names = rng.sample(["a", "b", "c/d"], rng.randint(1, 2))
        tagging = rng.random() < 0.6
        wanted = (
            {**owner.tags, **dict.fromkeys(names, str(rng.randrange(9)))}
            if tagging
            else {name: value for name, value in owner.tags.items() if name not in names}
        )

        def look() -> None:
            if not faults:
                found = self.client.list_tags_for_resource(resourceArn=arn)["tags"]
                assert found in (owner.tags, wanted)
                owner.tags = found

        with self._operation(f"tags of {arn[-32:]}") as resolve:
            resolve.append(look)
            if tagging:
                answer = self._ask("tag_resource", faults, resourceArn=arn, tags={name: wanted[name] for name in names})
            else:
                answer = self._ask("untag_resource", faults, resourceArn=arn, tagKeys=names)
            if answer is not None:
                owner.tags = wanted
            resolve.append(lambda: None)
            found = self._ask("list_tags_for_resource", faults, resourceArn=arn)
            assert found is None or found["tags"] == owner.tags

    # Reads

    def _learn(self, store: Store, targets: Sequence[ImageSet], resolve: list[Resolve] | None = None) -> None:
        """Take over the moments of new latest versions, which are the store's to choose."""
        if resolve is not None:
            resolve.append(lambda: self._learn(store, targets))
        for target in targets:
            found = self.client.get_image_set(datastoreId=store.id, imageSetId=target.id)
            assert found["versionId"] == target.version, (found, target.version)
            created, updated = seconds(found["createdAt"]), seconds(found["updatedAt"])
            assert target.created in (None, created)
            before = target.versions[-2].updated if len(target.versions) > 1 else created
            assert before is None or before <= updated
            assert -600 < updated - time.time() <= 0.01
            target.created, target.latest.updated = created, updated
        if resolve is not None:
            resolve.append(lambda: None)

    def check_set(self, store: Store, target: ImageSet, *, every: bool = False, frames: bool = False) -> None:
        """An image set's properties, versions and documents, and its frames."""
        where = {"datastoreId": store.id, "imageSetId": target.id}
        found = self.client.get_image_set(**where)
        assert found["versionId"] == target.version
        listed = self._pages("list_image_set_versions", "imageSetPropertiesList", 50 if every else 2, **where)
        assert [each["versionId"] for each in listed] == [str(n) for n in range(len(target.versions), 0, -1)]
        if target.deleted:
            assert found["imageSetState"] == "DELETED"
            assert "deletedAt" in found
            assert {each["imageSetState"] for each in listed} == {"DELETED"}
            for operation in ("get_image_set_metadata", "delete_image_set"):
                self._ask(operation, {"ResourceNotFoundException"}, **where)
            for symbol in sorted(target.frames() & set(self.model.ids))[:2]:
                self._ask_frame(store, target, symbol, there=False)
            return
        for shown, version in zip(reversed(listed), target.versions, strict=True):
            self._check_version(target, version, {**shown, "imageSetWorkflowStatus": shown["ImageSetWorkflowStatus"]})
        self._check_version(target, target.latest, found)
        numbers = range(1, len(target.versions) + 1) if every else range(len(target.versions), len(target.versions) + 1)
        for number in numbers:
            version = target.versions[number - 1]
            body = self.client.get_image_set_metadata(**where, versionId=str(number))["imageSetMetadataBlob"].read()
            self._check_document(json.loads(gzip.decompress(body)), version.document)
            if every:
                again = self.client.get_image_set(**where, versionId=str(number))
                self._check_version(target, version, again)
        symbols = sorted(target.frames()) if frames else frames_of(target.document)[:1]
        for symbol in symbols:
            if symbol in self.model.ids:  # an instance that came twice in one job shows one of its frames only
                self._ask_frame(store, target, symbol, there=True)

    @staticmethod
    def _check_version(target: ImageSet, version: Version, shown: Json) -> None:
        assert (shown["imageSetState"], shown["imageSetWorkflowStatus"]) == ("ACTIVE", version.workflow), shown
        assert shown["isPrimary"] is version.primary
        assert shown.get("overrides", {}).get("forced") is version.forced
        assert ("message" in shown) is version.failed
        assert seconds(shown["createdAt"]) == target.created
        assert version.updated is None or seconds(shown["updatedAt"]) == version.updated

    def _check_document(self, found: Json, wanted: Json) -> None:
        """A document is the model's; ids of frames not seen before are learnt."""
        _, series = series_of(found)
        expected = series_of(wanted)[1]["Instances"]
        assert set(series["Instances"]) == set(expected)
        with self.lock:
            owners = {frame_id: symbol for symbol, frame_id in self.model.ids.items()}
            for sop_uid, instance in series["Instances"].items():
                frames = expected[sop_uid]["ImageFrames"]
                for frame, mine in zip(instance["ImageFrames"], frames, strict=True):
                    assert frame.pop("FrameSizeInBytes") > 0
                    symbol = owners.setdefault(frame["ID"], mine["ID"])
                    assert self.model.ids.setdefault(symbol, frame["ID"]) == frame["ID"]
                    frame["ID"] = symbol
        assert found == wanted

    def _ask_frame(self, store: Store, target: ImageSet, symbol: str, *, there: bool) -> None:
        answer = self._ask(
            "get_image_frame",
            set() if there else {"ResourceNotFoundException"},
            datastoreId=store.id,
            imageSetId=target.id,
            imageFrameInformation={"imageFrameId": self.model.ids[symbol]},
        )
        if answer is not None:
            pixels = imagecodecs.jpeg2k_decode(answer["imageFrameBlob"].read())
            np.testing.assert_array_equal(pixels, self.model.pixels[symbol])

    def read(self, rng: random.Random) -> None:
        """Any image set at any version, with all its frames; what is not there is not found."""
        if (store := self._store(rng)) is None or (target := self._target(rng, store)) is None:
            return
        gone = {"ResourceNotFoundException"}
        with self._operation(f"read of {target.id}"):
            self.check_set(store, target, every=True, frames=True)
            where = {"datastoreId": store.id, "imageSetId": target.id}
            for number in ("0", str(len(target.versions) + 1)):
                self._ask("get_image_set", gone, **where, versionId=number)
                self._ask("get_image_set_metadata", gone, **where, versionId=number)
            for unknown in ({**where, "imageSetId": NOBODY}, {**where, "datastoreId": NOBODY}):
                for operation in ("get_image_set", "get_image_set_metadata", "list_image_set_versions"):
                    self._ask(operation, gone, **unknown)
            for other in self.stores():
                if other is not store:
                    self._ask("get_image_set", gone, datastoreId=other.id, imageSetId=target.id)
            others = [symbol for each in self.live(store) for symbol in each.frames() - target.frames()]
            known = sorted(symbol for symbol in others if symbol in self.model.ids)
            if known:
                self._ask_frame(store, target, rng.choice(known), there=False)

    def draw_filter(self, rng: random.Random, store: Store) -> tuple[Json, tuple[str, Any]]:
        """A filter as the client takes it and as the model does."""
        name = rng.choice([*EQUAL_POOL, "isPrimary", "createdAt", "updatedAt", "DICOMStudyDateAndTime"])
        if name == "isPrimary":
            value: Any = rng.random() < 0.5
            return {"operator": "EQUAL", "values": [{name: value}]}, (name, value)
        if name in EQUAL_POOL:
            present = [summary_of(each.document).get(name) for each in self.live(store)]
            value = rng.choice([*(each for each in present if each is not None), EQUAL_POOL[name]])
            return {"operator": "EQUAL", "values": [{name: value}]}, (name, value)
        if name == "DICOMStudyDateAndTime":
            pool = ["20230101", "20240130", "20240131", "20240132"]
            times = [None, "12", "215500", "215500.25", "235959.999999"]
            bounds = [(rng.choice(pool), rng.choice(times)) for _ in range(2)]
            values = [
                {name: {"DICOMStudyDate": date, **({"DICOMStudyTime": time} if time else {})}} for date, time in bounds
            ]
            lower, upper = (moment_text(date, time) for date, time in bounds)
            return {"operator": "BETWEEN", "values": values}, (name, (lower, upper))
        known = [each.created if name == "createdAt" else each.latest.updated for each in self.live(store)]
        moments = [each for each in known if each is not None] + [0.0, 4e9]
        pair = (rng.choice(moments), rng.choice(moments))
        values = [{name: as_datetime(each)} for each in (pair if rng.random() < 0.2 else sorted(pair))]
        lower, upper = (seconds(each[name]) for each in values)
        return {"operator": "BETWEEN", "values": values}, (name, (lower, upper))

    def search(self, rng: random.Random) -> None:
        if (store := self._store(rng)) is None:
            return
        drawn = [self.draw_filter(rng, store) for _ in range(rng.randint(0, 2))]
        sort = (rng.choice(["updatedAt", "createdAt", "DICOMStudyDateAndTime"]), rng.choice(["ASC", "DESC"]))
        criteria: Json = {"sort": {"sortField": sort[0], "sortOrder": sort[1]}}
        if drawn:
            criteria["filters"] = [each[0] for each in drawn]
        size = rng.choice([1, 2, 3, None])
        with self._operation(f"search for {criteria}"):
            found = self._pages(
                "search_image_sets",
                "imageSetsMetadataSummaries",
                size,
                datastoreId=store.id,
                searchCriteria=criteria,
            )
            self._check_summaries(found, self.model.search(store, [each[1] for each in drawn], sort))

    @staticmethod
    def _check_summaries(found: list[Json], wanted: list[ImageSet]) -> None:
        assert [each["imageSetId"] for each in found] == [each.id for each in wanted]
        for summary, target in zip(found, wanted, strict=True):
            assert summary["version"] == len(target.versions)
            assert summary["isPrimary"] is target.latest.primary
            assert summary["DICOMTags"] == summary_of(target.document)
            assert (seconds(summary["createdAt"]), seconds(summary["updatedAt"])) == (
                target.created,
                target.latest.updated,
            )

    def check_listings(self) -> None:
        """Every store's search and jobs."""
        for store in self.stores():
            found = self._pages("search_image_sets", "imageSetsMetadataSummaries", datastoreId=store.id)
            self._check_summaries(found, self.model.search(store, [], ("updatedAt", "DESC")))

    def clear(self) -> None:
        """Delete every image set and data store of the model."""
        for store in self.stores():
            for target in store.live():
                self._ask("delete_image_set", set(), datastoreId=store.id, imageSetId=target.id)
            for target in store.live():
                self._settled(store, target.id, "DELETING", readable=False)
                self._gone(target)
            self._ask("delete_datastore", set(), datastoreId=store.id)
            store.deleted = True

    def check_everything(self) -> None:
        """All that the store can be asked for."""
        for store in self.model.stores.values():
            self.check_store(store)
            listed = self._pages("list_dicom_import_jobs", "jobSummaries", 3, datastoreId=store.id)
            assert {each["jobId"]: each["jobStatus"] for each in listed} == store.jobs
            moments = [each["submittedAt"] for each in listed]
            assert moments == sorted(moments, reverse=True)
            if not store.deleted:
                for target in store.sets.values():
                    self.check_set(store, target, every=True, frames=True)
        self.check_listings()


SHARED = {"PatientComments", "BodyPartExamined"} | {
    name
    for level, elements in make_scan(FAMILIES[0], 0, 0, seed=0).levels.items()
    for name in elements
    if level != "Instance"
}
"""Elements of the levels above the instance."""
EQUAL_POOL = {
    "DICOMPatientId": "nobody",
    "DICOMAccessionNumber": "none",
    "DICOMStudyId": "none",
    "DICOMStudyInstanceUID": "1.2.404",
    "DICOMSeriesInstanceUID": "1.2.404",
}
"""Attributes of EQUAL filters, each with a value that nothing has."""
