"""Many clients of one embedded store at once: readers in other processes, and writers that are in each other's way."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from driver import PATIENCE_S, ROLE, Driver, code_of
from readers import read_until
from scans import FAMILIES, Scan, make_scan, write_scan
from service_model import Change, ImageSet, Json, Model, Store, series_of

from ahi_ml.local.process import Lease, environment

CLIENTS = 32


@pytest.fixture(scope="module")
def clients(lease: Lease, client_of: Callable[..., Any]) -> list[Any]:
    """One client for each thread."""
    return [client_of(lease) for _ in range(CLIENTS)]


@pytest.fixture
def driver(client: Any, tmp_path: Path) -> Driver:
    """A driver with one empty data store."""
    made = Driver(client, Model(), tmp_path)
    made.create_store(random.Random(0))
    return made


def each_in_a_thread(work: Callable[[int], Any], count: int = CLIENTS) -> list[Any]:
    """What `work` returns in so many threads that begin at once."""
    begin = threading.Barrier(count)

    def one(number: int) -> Any:
        begin.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def settled(client: Any, where: Json) -> Json:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found: Json = client.get_image_set(**where)
        if found["imageSetState"] != "LOCKED":
            return found
        assert time.monotonic() < deadline, f"{found} stays LOCKED"
        time.sleep(0.002)


def ended(client: Any, datastore_id: str, job_id: str) -> Json:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        job: Json = client.get_dicom_import_job(datastoreId=datastore_id, jobId=job_id)["jobProperties"]
        if "endedAt" in job:
            return job
        assert time.monotonic() < deadline, f"a job is still {job['jobStatus']}"
        time.sleep(0.01)


def start_import(client: Any, datastore_id: str, scans: Iterable[Scan], folder: Path, token: str = "") -> str:
    folder.mkdir(exist_ok=True)
    for scan in scans:
        write_scan(scan, folder)
    return str(
        client.start_dicom_import_job(
            datastoreId=datastore_id,
            dataAccessRoleArn=ROLE,
            clientToken=token or os.urandom(8).hex(),
            inputS3Uri=f"s3://this-machine{folder}/",
            outputS3Uri=f"s3://this-machine{folder}-report/",
        )["jobId"]
    )


def body_of(change: Change) -> Json:
    trees = {"updatableAttributes": change.put, "removableAttributes": change.remove}
    return {
        "DICOMUpdates": {
            name: json.dumps({"SchemaVersion": 1.1, **tree}).encode() for name, tree in trees.items() if tree
        }
    }


def taken(request: Callable[..., Json], **arguments: Any) -> Json | None:
    """An answer; None when the request was in conflict with another."""
    code = ""
    try:
        return request(**arguments)
    except ClientError as error:
        code = code_of(error)
    assert code == "ConflictException"
    return None


class TestReaders:
    def test_other_processes_read_while_an_import_runs(self, lease: Lease, driver: Driver, tmp_path: Path) -> None:
        (store,) = driver.stores()
        client = driver.client
        context = multiprocessing.get_context("spawn")
        begin, stop, results = context.Barrier(4), context.Event(), context.Queue()
        variables = environment(lease.endpoint, lease.keys)
        readers = [
            context.Process(target=read_until, args=(begin, stop, results, variables, store.id, seed), daemon=True)
            for seed in range(3)
        ]
        for reader in readers:
            reader.start()
        begin.wait(PATIENCE_S)
        try:
            jobs = []
            for part in range(6):  # more instances of each series, and the earlier ones with other pixels
                scans = [
                    make_scan(family, series, number, seed=part, side=24)
                    for family in FAMILIES
                    for series in range(2)
                    for number in range(3 * part + 3)
                ]
                jobs.append(start_import(client, store.id, scans, tmp_path / f"part-{part}"))
            updates = 0
            for job in jobs:
                assert ended(client, store.id, job)["jobStatus"] == "COMPLETED"
                for summary in client.search_image_sets(datastoreId=store.id)["imageSetsMetadataSummaries"][:3]:
                    change = Change(put={"Study": {"DICOM": {"StudyDescription": f"D{updates}"}}})
                    answer = taken(
                        client.update_image_set_metadata,
                        datastoreId=store.id,
                        imageSetId=summary["imageSetId"],
                        latestVersionId=str(summary["version"]),
                        updateImageSetMetadataUpdates=body_of(change),
                    )
                    updates += answer is not None
        finally:
            stop.set()
        answers = [results.get(timeout=PATIENCE_S) for _ in readers]
        for reader in readers:
            reader.join(PATIENCE_S)
        for counts, error in answers:
            assert error is None, error
            assert min(counts.values()) > 0, counts
        assert updates
        found = client.search_image_sets(datastoreId=store.id)["imageSetsMetadataSummaries"]
        assert {each["DICOMTags"]["DICOMNumberOfStudyRelatedInstances"] for each in found} == {18}
        assert len(found) == 8


class TestConflicts:
    def test_one_of_many_updates_of_a_version_wins(self, clients: list[Any], driver: Driver) -> None:
        (store,) = driver.stores()
        driver.run_import(random.Random(0), [make_scan((0, 0), 0, 0, seed=0)])
        (target,) = store.live()
        where = {"datastoreId": store.id, "imageSetId": target.id}

        for turn in range(8):
            latest = target.version

            def attempt(number: int, turn: int = turn, latest: str = latest) -> tuple[bool, Change]:
                change = Change(put={"Patient": {"DICOM": {"PatientComments": f"{turn} {number}"}}})
                answer = taken(
                    clients[number].update_image_set_metadata,
                    **where,
                    latestVersionId=latest,
                    updateImageSetMetadataUpdates=body_of(change),
                )
                assert answer is None or answer["latestVersionId"] == str(int(latest) + 1)
                return answer is not None, change

            outcomes = each_in_a_thread(attempt)
            (change,) = (change for won, change in outcomes if won)
            settled(driver.client, where)
            driver.model.update([target], change, force=False)
            driver.check_set(store, target)
        driver.check_set(store, target, every=True, frames=True)

    def test_mixed_clients_get_right_answers(self, clients: list[Any], driver: Driver, tmp_path: Path) -> None:
        (store,) = driver.stores()
        for family in FAMILIES[:3]:
            driver.run_import(random.Random(0), [make_scan(family, 0, number, seed=0) for number in range(3)])
        crowd = _Crowd(clients, store, tmp_path)
        each_in_a_thread(crowd.work)
        assert not crowd.unexpected, crowd.unexpected[:3]
        assert min(crowd.counts[name] for name in ("read", "frame", "search", "update", "copy", "import", "lost")) > 0
        crowd.replay(driver)
        tags = driver.client.list_tags_for_resource(resourceArn=crowd.arn)["tags"]
        assert tags == {f"client-{number}": "was here" for number in range(CLIENTS)}

    def test_a_token_makes_one_thing_whoever_sends_it(self, clients: list[Any], driver: Driver, tmp_path: Path) -> None:
        def create(number: int) -> str:
            return str(clients[number].create_datastore(datastoreName="one", clientToken=token)["datastoreId"])

        for _ in range(12):
            token = os.urandom(8).hex()
            made = set(each_in_a_thread(create))
            assert len(made) == 1
            (store_id,) = made
            assert driver.client.get_datastore(datastoreId=store_id)["datastoreProperties"]["datastoreName"] == "one"
        scans = [make_scan((0, 0), 0, 0, seed=0)]
        start_import(driver.client, driver.stores()[0].id, scans, tmp_path / "one")  # writes the files, elsewhere

        def start(number: int) -> str:
            return start_import(clients[number], store_id, [], tmp_path / "one", token=token)

        jobs = set(each_in_a_thread(start))
        assert len(jobs) == 1
        assert ended(driver.client, store_id, *jobs)["jobStatus"] == "COMPLETED"
        assert len(driver.client.list_dicom_import_jobs(datastoreId=store_id)["jobSummaries"]) == 1
        (summary,) = driver.client.search_image_sets(datastoreId=store_id)["imageSetsMetadataSummaries"]
        assert summary["version"] == 1


class _Crowd:
    """Clients that read and write a few image sets, and what each of them was told."""

    TURNS = 14

    def __init__(self, clients: list[Any], store: Store, folder: Path) -> None:
        self.clients, self.store, self.folder = clients, store, folder
        self.targets = store.live()
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.unexpected: list[str] = []
        self.documents: dict[tuple[str, str], bytes] = {}
        self.winners: dict[tuple[str, int], Callable[[Driver, ImageSet], None]] = {}
        self.arn = f"arn:aws:medical-imaging:us-east-1:123456789012:datastore/{store.id}/imageset/{self.targets[0].id}"

    def work(self, number: int) -> None:
        """One client's turns."""
        rng, client = random.Random(number), self.clients[number]
        seen: dict[str, int] = {}
        try:
            client.tag_resource(resourceArn=self.arn, tags={f"client-{number}": "was here"})
            for turn in range(self.TURNS):
                target = rng.choice(self.targets)
                where = {"datastoreId": self.store.id, "imageSetId": target.id}
                latest = int(client.get_image_set(**where)["versionId"])
                assert latest >= seen.get(target.id, 0), "a version went back"
                seen[target.id] = latest
                names = ["read", "frame", "search", "update", "update", "copy"]
                name = "import" if number < 3 and turn % 5 == 4 else rng.choice(names)
                getattr(self, f"_{name}")(client, rng, target, where, latest)
                self._count(name)
        except Exception as error:  # told together
            self.unexpected.append(repr(error))

    def _count(self, name: str) -> None:
        with self.lock:
            self.counts[name] += 1

    def _won(self, target: ImageSet, version: int, write: Callable[[Driver, ImageSet], None]) -> None:
        with self.lock:
            assert (target.id, version) not in self.winners, f"two made version {version}"
            self.winners[target.id, version] = write

    def _document(self, client: Any, where: Json, version: int) -> Json:
        body = client.get_image_set_metadata(**where, versionId=str(version))["imageSetMetadataBlob"].read()
        return json.loads(gzip.decompress(body))  # type: ignore[no-any-return]

    def _read(self, client: Any, rng: random.Random, target: ImageSet, where: Json, latest: int) -> None:
        """A version that is settled never changes."""
        version = str(rng.randint(1, latest))
        if client.get_image_set(**where, versionId=version)["imageSetState"] == "ACTIVE":
            body = client.get_image_set_metadata(**where, versionId=version)["imageSetMetadataBlob"].read()
            with self.lock:
                assert self.documents.setdefault((target.id, version), body) == body

    def _frame(self, client: Any, rng: random.Random, target: ImageSet, where: Json, latest: int) -> None:
        _, series = series_of(self._document(client, where, latest))
        frame = rng.choice([frame for each in series["Instances"].values() for frame in each["ImageFrames"]])
        answer = client.get_image_frame(**where, imageFrameInformation={"imageFrameId": frame["ID"]})
        assert len(answer["imageFrameBlob"].read()) == frame["FrameSizeInBytes"]

    def _search(self, client: Any, rng: random.Random, target: ImageSet, where: Json, latest: int) -> None:
        uid = series_of(target.versions[0].document)[0]
        filters = [
            {"operator": "EQUAL", "values": [{"DICOMSeriesInstanceUID": uid}]},
            {"operator": "EQUAL", "values": [{"isPrimary": True}]},
        ]
        (found,) = client.search_image_sets(datastoreId=self.store.id, searchCriteria={"filters": filters})[
            "imageSetsMetadataSummaries"
        ]
        assert found["imageSetId"] == target.id
        assert found["version"] >= latest

    def _update(self, client: Any, rng: random.Random, target: ImageSet, where: Json, latest: int) -> None:
        series_uid, series = series_of(target.versions[0].document)
        sop_uid, word = rng.choice(list(series["Instances"])), f"{rng.randrange(10**6)}"
        instance = {"Instances": {sop_uid: {"DICOM": {"AcquisitionNumber": word}}}}
        change = rng.choice(
            [
                Change(put={"Patient": {"DICOM": {"PatientComments": word}}}),
                Change(put={"Study": {"DICOM": {"StudyDescription": word}, "Series": {series_uid: instance}}}),
                Change(remove={"Patient": {"DICOM": {"PatientName": "another"}}}),  # fails, with a version
            ]
        )
        answer = taken(
            client.update_image_set_metadata,
            **where,
            latestVersionId=str(latest),
            updateImageSetMetadataUpdates=body_of(change),
        )
        if answer is None:
            self._count("lost")
            return
        assert answer["latestVersionId"] == str(latest + 1)
        self._won(target, latest + 1, lambda driver, each: driver.model.update([each], change, force=False))

    def _copy(self, client: Any, rng: random.Random, target: ImageSet, where: Json, latest: int) -> None:
        """A copy is of the version that was asked for, whatever is written meanwhile; then it is deleted."""
        answer = taken(
            client.copy_image_set,
            datastoreId=self.store.id,
            sourceImageSetId=target.id,
            copyImageSetInformation={"sourceImageSet": {"latestVersionId": str(latest)}},
        )
        if answer is None:
            self._count("lost")
            return
        made = {"datastoreId": self.store.id, "imageSetId": answer["destinationImageSetProperties"]["imageSetId"]}
        assert settled(client, made)["imageSetWorkflowStatus"] == "COPIED"
        copied = self._document(client, made, 1)
        assert copied == {**self._document(client, where, latest), "ImageSetID": made["imageSetId"]}
        client.delete_image_set(**made)
        assert settled(client, made)["imageSetState"] == "DELETED"

    def _import(self, client: Any, rng: random.Random, target: ImageSet, where: Json, latest: int) -> None:
        """One instance again, with other pixels."""
        scan = make_scan(target.family, 0, rng.randrange(3), seed=rng.randrange(10**6))
        job_id = start_import(client, self.store.id, [scan], self.folder / os.urandom(6).hex())
        job = ended(client, self.store.id, job_id)
        assert job["jobStatus"] == "COMPLETED"
        output = Path(job["outputS3Uri"].removeprefix("s3://this-machine"))
        (summary,) = json.loads((output / "job-output-manifest.json").read_text())["jobSummary"]["imageSetsSummary"]
        assert (summary["imageSetId"], summary["isPrimary"]) == (target.id, True)

        def write(driver: Driver, each: ImageSet) -> None:
            driver.model.commit(driver.model.stores[self.store.id], [scan], each.id)

        self._won(target, summary["imageSetVersion"], write)

    def replay(self, driver: Driver) -> None:
        """Every version is what its one writer made of the version before, and there is no other."""
        for target in self.targets:
            where = {"datastoreId": self.store.id, "imageSetId": target.id}
            settled(driver.client, where)
            numbers = sorted(version for set_id, version in self.winners if set_id == target.id)
            assert numbers == list(range(2, len(numbers) + 2))
            for number in numbers:
                self.winners[target.id, number](driver, target)
            target.tags = {}
            driver.check_set(self.store, target, every=True, frames=True)
        found = driver.client.search_image_sets(datastoreId=self.store.id)["imageSetsMetadataSummaries"]
        assert {each["imageSetId"]: each["version"] for each in found} == {
            each.id: len(each.versions) for each in self.targets
        }
