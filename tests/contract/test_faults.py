"""Faults on demand, seen by clients of the embedded store; and that the reader gets right pixels through them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from botocore.exceptions import ClientError, ConnectionClosedError, ConnectionError, ResponseStreamingError

import ahi_ml
from ahi_ml.errors import ChecksumError, ConflictError, ServiceError
from ahi_ml.local.process import Lease, attach

CT, MR = "CT_small.dcm", "MR_small.dcm"


@pytest.fixture(scope="module")
def filled(
    store_folder: Path, client: Any, datastore_id: str, import_folder: Any, pydicom_file: Any, tmp_path_factory: Any
) -> dict[str, Any]:
    """One CT file in the module's store: its ids."""
    folder = tmp_path_factory.mktemp("dicom")
    shutil.copy(pydicom_file(CT), folder)
    image_set_id = import_folder(client, datastore_id, folder).image_set_of(CT)
    return {"datastoreId": datastore_id, "imageSetId": image_set_id}


@pytest.fixture
def with_faults(store_folder: Path, filled: Any, client_of: Any) -> Iterator[Callable[..., Any]]:
    """Makes a client of the module's store while faults are in force."""
    leases: list[Lease] = []

    def make(**faults: Any) -> Any:
        leases.append(attach(store_folder, faults=faults))
        return client_of(leases[-1])

    yield make
    for lease in leases:
        lease.close()
    time.sleep(0.05)  # the server notices that a lease is gone


def frame_id(client: Any, ids: dict[str, Any]) -> str:
    import gzip
    import json

    body = client.get_image_set_metadata(**ids)["imageSetMetadataBlob"].read()
    (series,) = json.loads(gzip.decompress(body))["Study"]["Series"].values()
    (instance,) = series["Instances"].values()
    return str(instance["ImageFrames"][0]["ID"])


def code_of(error: pytest.ExceptionInfo[ClientError]) -> tuple[str, int]:
    response: Any = error.value.response
    return response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"]


def test_throttling_by_the_quota_table(with_faults: Any, filled: Any) -> None:
    client = with_faults(throttle=0.1)  # a burst of 5, and 2.5 a second

    def answers(n: int) -> list[int]:
        seen = []
        for _ in range(n):
            try:
                seen.append(client.get_image_set(**filled)["ResponseMetadata"]["HTTPStatusCode"])
            except client.exceptions.ThrottlingException as error:
                seen.append(error.response["ResponseMetadata"]["HTTPStatusCode"])
        return seen

    assert answers(5) == [200] * 5
    assert 429 in answers(20)


def test_5xx(with_faults: Any, filled: Any) -> None:
    client = with_faults(error_rate=1)
    seen = set()
    for _ in range(20):
        with pytest.raises(ClientError) as error:
            client.get_image_set(**filled)
        seen.add(code_of(error))
    assert seen == {("InternalServerException", 500), ("ServiceUnavailableException", 503)}


def test_connection_resets(with_faults: Any, filled: Any) -> None:
    client = with_faults(reset_rate=1)
    for _ in range(5):
        with pytest.raises((ConnectionClosedError, ConnectionError)):
            client.get_image_set(**filled)


def test_a_reset_can_come_after_the_work(with_faults: Any, client: Any) -> None:
    faulty = with_faults(reset_rate=1, operations=["CreateDatastore"])
    before = len(client.list_datastores()["datastoreSummaries"])
    # Either way round a client that asks again with its token gets one data store.
    for _ in range(12):
        with pytest.raises((ConnectionClosedError, ConnectionError)):
            faulty.create_datastore(datastoreName="twice", clientToken="one-token")
    assert len(client.list_datastores()["datastoreSummaries"]) <= before + 1


def test_truncated_bodies(with_faults: Any, filled: Any) -> None:
    client = with_faults(truncate_rate=1, operations=["GetImageSetMetadata"])
    answer = client.get_image_set_metadata(**filled)
    with pytest.raises(ResponseStreamingError):
        answer["imageSetMetadataBlob"].read()


def test_corrupted_frames(with_faults: Any, client: Any, filled: Any) -> None:
    asked = {**filled, "imageFrameInformation": {"imageFrameId": frame_id(client, filled)}}
    right = client.get_image_frame(**asked)["imageFrameBlob"].read()
    wrong = with_faults(corrupt_rate=1).get_image_frame(**asked)["imageFrameBlob"].read()
    assert len(wrong) == len(right)
    assert sum(a != b for a, b in zip(wrong, right, strict=True)) == 1


def test_quota(with_faults: Any) -> None:
    with pytest.raises(ClientError) as error:
        with_faults(quota_rate=1).create_datastore(datastoreName="x", clientToken=os.urandom(4).hex())
    assert code_of(error) == ("ServiceQuotaExceededException", 402)


def test_not_ready_after_an_import(with_faults: Any, filled: Any) -> None:
    client = with_faults(unready_s=600)
    with pytest.raises(ClientError) as error:
        client.get_image_set_metadata(**filled)
    assert code_of(error) == ("ConflictException", 409)
    assert client.get_image_set(**filled)["imageSetState"] == "ACTIVE"


def test_slow_states_of_a_data_store(with_faults: Any) -> None:
    client = with_faults(slow_s=0.4)
    made = client.create_datastore(datastoreName="slow", clientToken=os.urandom(4).hex())["datastoreId"]

    def status() -> str:
        return str(client.get_datastore(datastoreId=made)["datastoreProperties"]["datastoreStatus"])

    arn = client.get_datastore(datastoreId=made)["datastoreProperties"]["datastoreArn"]
    client.tag_resource(resourceArn=arn, tags={"a": "b"})  # the operations on tags declare no conflict
    assert client.list_tags_for_resource(resourceArn=arn)["tags"] == {"a": "b"}
    assert status() == "CREATING"
    with pytest.raises(ClientError) as error:
        client.search_image_sets(datastoreId=made)
    assert code_of(error) == ("ConflictException", 409)
    assert until(status, "CREATING") == "ACTIVE"
    client.delete_datastore(datastoreId=made)
    assert status() == "DELETING"
    client.untag_resource(resourceArn=arn, tagKeys=["a"])
    assert until(status, "DELETING") == "DELETED"
    with pytest.raises(ClientError) as error:
        client.list_tags_for_resource(resourceArn=arn)
    assert code_of(error) == ("ResourceNotFoundException", 404)


def until(state: Callable[[], str], passing: str) -> str:
    deadline = time.monotonic() + 20
    while (now := state()) == passing:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return now


def test_slow_writes_and_imports(
    with_faults: Any, client: Any, new_datastore: Any, pydicom_file: Any, tmp_path: Path
) -> None:
    datastore_id = new_datastore("slow-writes")
    shutil.copy(pydicom_file(CT), tmp_path)
    slow = with_faults(slow_s=0.4)
    asked = {
        "datastoreId": datastore_id,
        "dataAccessRoleArn": "arn:aws:iam::123456789012:role/import",
        "inputS3Uri": f"s3://this-machine{tmp_path}/",
        "outputS3Uri": "s3://reports/",
    }

    def import_once() -> tuple[list[str], list[tuple[str, str]]]:
        job_id = slow.start_dicom_import_job(**asked, clientToken=os.urandom(4).hex())["jobId"]
        seen: list[str] = []
        sets: list[tuple[str, str]] = []
        while not seen or seen[-1] not in ("COMPLETED", "FAILED"):
            job = slow.get_dicom_import_job(datastoreId=datastore_id, jobId=job_id)["jobProperties"]
            if not seen or seen[-1] != job["jobStatus"]:
                seen.append(job["jobStatus"])
            for summary in slow.search_image_sets(datastoreId=datastore_id)["imageSetsMetadataSummaries"]:
                found = slow.get_image_set(datastoreId=datastore_id, imageSetId=summary["imageSetId"])
                state = (found["imageSetState"], found["imageSetWorkflowStatus"])
                if not sets or sets[-1] != state:
                    sets.append(state)
            time.sleep(0.02)
        return seen, sets

    states, _ = import_once()
    assert states == ["SUBMITTED", "IN_PROGRESS", "COMPLETED"]
    _, sets = import_once()  # into the image set that is there now
    assert sets == [("ACTIVE", "CREATED"), ("LOCKED", "IMPORTING"), ("ACTIVE", "IMPORTED")]

    (summary,) = client.search_image_sets(datastoreId=datastore_id)["imageSetsMetadataSummaries"]
    ids = {"datastoreId": datastore_id, "imageSetId": summary["imageSetId"]}

    def state() -> str:
        return str(client.get_image_set(**ids)["imageSetState"])

    tree = b'{"SchemaVersion": 1.1, "Study": {"DICOM": {"StudyDescription": "SLOW"}}}'
    update = {"updateImageSetMetadataUpdates": {"DICOMUpdates": {"updatableAttributes": tree}}}
    slow.update_image_set_metadata(**ids, latestVersionId="2", **update)
    assert state() == "LOCKED"
    assert frame_id(client, ids)  # reads go on
    for write in (
        lambda: slow.update_image_set_metadata(**ids, latestVersionId="3", **update),
        lambda: slow.delete_image_set(**ids),
    ):
        with pytest.raises(ClientError) as error:
            write()
        assert code_of(error) == ("ConflictException", 409)
    assert until(state, "LOCKED") == "ACTIVE"
    assert client.get_image_set(**ids)["imageSetWorkflowStatus"] == "UPDATED"
    slow.delete_image_set(**ids)
    assert state() == "LOCKED"
    assert until(state, "LOCKED") == "DELETED"


def test_what_slow_mode_promised_is_done_when_the_store_closes(tmp_path: Path, pydicom_file: Any) -> None:
    shutil.copytree(pydicom_file(CT).parent, tmp_path / "in", ignore=lambda _, names: {n for n in names if n != CT})
    with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache") as store:
        (image_set_id,) = store.import_dicom(tmp_path / "in").image_sets
        with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache", faults={"slow_s": 500}) as slow:
            slow.client.delete_image_set(datastoreId=slow.datastore_id, imageSetId=image_set_id)
            pid = slow._here.lease.endpoint.pid  # type: ignore[union-attr]
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1]:
        assert time.monotonic() < deadline, "the server does not end"
        time.sleep(0.05)
    with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache") as store:
        found = store.client.get_image_set(datastoreId=store.datastore_id, imageSetId=image_set_id)
        assert found["imageSetState"] == "DELETED"


def test_the_reader_gets_right_pixels_through_all_of_it(tmp_path: Path, pydicom_file: Any) -> None:
    names = [CT, MR, "rtdose.dcm", "SC_rgb_rle_2frame.dcm"]
    (tmp_path / "in").mkdir()
    for name in names:
        shutil.copy(pydicom_file(name), tmp_path / "in")
    with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache") as store:
        assert store.import_dicom(tmp_path / "in").imported == len(names)
        index = store.search(primary=None).index()
        faults = {
            "error_rate": 0.1,
            "reset_rate": 0.1,
            "truncate_rate": 0.1,
            "corrupt_rate": 0.1,
            "latency_ms": 1,
            "jitter_ms": 5,
            "operations": ["GetImageFrame"],
            "seed": 3,
        }
        truth = {}
        for name in names:
            dataset = pydicom.dcmread(pydicom_file(name))
            shape = (-1, dataset.Rows, dataset.Columns, dataset.SamplesPerPixel)
            frames = np.moveaxis(dataset.pixel_array.reshape(shape), -1, 1)
            truth |= {(dataset.SOPInstanceUID, number): frame for number, frame in enumerate(frames, 1)}
        with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache", faults=faults) as faulty:
            dataset = ahi_ml.FrameDataset(faulty, index, output="stored", cache=None)
            rows = index.frames.reset_index(drop=True)
            epochs = 0
            for _ in range(40):
                try:
                    images = dataset.__getitems__(list(range(len(dataset))))
                except ChecksumError:  # the same frame had a wrong byte twice: then no pixels are the right ones
                    continue
                for at, image in enumerate(images):
                    expected = truth[rows.sop_instance_uid[at], rows.frame_number[at]]
                    np.testing.assert_array_equal(image["image"].numpy(), expected)
                epochs += 1
                if epochs == 4:
                    break
            assert epochs == 4
            stats = faulty.reader.stats()
    assert stats["refetched"] > 0
    assert stats["unverified"] == 0


def test_the_client_waits_for_a_manifest_that_lags(tmp_path: Path, pydicom_file: Any) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(pydicom_file(CT), tmp_path / "in")
    with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache", faults={"manifest_lag_s": 1.2}) as store:
        report = store.import_dicom(tmp_path / "in")
        assert (report.status, report.imported) == ("COMPLETED", 1)


def test_an_import_says_that_a_quota_is_used_up(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    faults = {"quota_rate": 1, "operations": ["StartDICOMImportJob"]}
    with (
        ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache", faults=faults) as store,
        pytest.raises(ServiceError, match="ServiceQuotaExceededException"),
    ):
        store.import_dicom(tmp_path / "in")


def test_metadata_that_is_not_ready_is_a_conflict(tmp_path: Path, pydicom_file: Any) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(pydicom_file(CT), tmp_path / "in")
    with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache", faults={"unready_s": 600}) as store:
        store.import_dicom(tmp_path / "in")
        client = store.client
        (summary,) = client.search_image_sets(datastoreId=store.datastore_id)["imageSetsMetadataSummaries"]
        with pytest.raises(client.exceptions.ConflictException):
            client.get_image_set_metadata(datastoreId=store.datastore_id, imageSetId=summary["imageSetId"])
    assert issubclass(ConflictError, ServiceError)
