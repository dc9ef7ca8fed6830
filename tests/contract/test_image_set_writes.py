"""Updates, copies and deletions of image sets, through the boto3 client."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pydicom
import pytest
from botocore.exceptions import ClientError
from model_check import hold_to_the_model
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

import ahi_ml
from ahi_ml import DataStore
from ahi_ml.local.ingest import commit
from ahi_ml.local.operations import writes

Json = dict[str, Any]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DataStore]:
    """A store with one study of two series: three CT slices, and one slice."""
    scans = tmp_path / "scans"
    scans.mkdir()
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    for number in range(4):
        dataset.SeriesInstanceUID = f"1.2.3.{'1' if number < 3 else '2'}"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.9.{number}"
        dataset.InstanceNumber = number + 1
        dataset.save_as(scans / f"{number}.dcm")
    with ahi_ml.connect(tmp_path / "store", cache=tmp_path / "cache") as opened:
        opened.progress = False
        assert opened.import_dicom(scans).imported == 4
        hold_to_the_model(opened.client)
        yield opened
    shutil.rmtree(tmp_path / "store", ignore_errors=True)


def image_set_of(store: DataStore, series: str = "1.2.3.1") -> str:
    return next(iter(store.search(series_instance_uid=series))).image_set_id


def settled(store: DataStore, image_set: str) -> Json:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found: Json = store.client.get_image_set(datastoreId=store.datastore_id, imageSetId=image_set)
        if found["imageSetState"] != "LOCKED":
            return found
        time.sleep(0.01)
    raise AssertionError(f"image set stays LOCKED: {found}")


def document(store: DataStore, image_set: str, **version: str) -> Json:
    answer = store.client.get_image_set_metadata(datastoreId=store.datastore_id, imageSetId=image_set, **version)
    return json.loads(gzip.decompress(answer["imageSetMetadataBlob"].read()))  # type: ignore[no-any-return]


def update(store: DataStore, image_set: str, latest: str = "1", **options: Any) -> Json:
    changes: Json = {}
    for name in ("updatableAttributes", "removableAttributes"):
        if name in options:
            changes[name] = json.dumps({"SchemaVersion": 1.1, **options.pop(name)}).encode()
    body = {"revertToVersionId": options.pop("revert")} if "revert" in options else {"DICOMUpdates": changes}
    return store.client.update_image_set_metadata(  # type: ignore[no-any-return]
        datastoreId=store.datastore_id,
        imageSetId=image_set,
        latestVersionId=latest,
        updateImageSetMetadataUpdates=body,
        **options,
    )


def copied(store: DataStore, image_set: str) -> str:
    """A copy, not primary, of the first version of an image set."""
    information = {"sourceImageSet": {"latestVersionId": "1"}}
    answer = store.client.copy_image_set(
        datastoreId=store.datastore_id, sourceImageSetId=image_set, copyImageSetInformation=information
    )
    made = str(answer["destinationImageSetProperties"]["imageSetId"])
    settled(store, image_set)
    assert settled(store, made)["imageSetWorkflowStatus"] == "COPIED"
    return made


def refused(code: str, call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(ClientError) as caught:
        call(*arguments, **options)
    error = caught.value.response["Error"]
    assert error["Code"] == code, error
    return str(error["Message"])


def test_an_update_locks_answers_and_makes_a_version(store: DataStore) -> None:
    image_set = image_set_of(store)
    answer = update(store, image_set, updatableAttributes={"Study": {"DICOM": {"StudyDescription": "CHEST"}}})
    assert (answer["imageSetState"], answer["imageSetWorkflowStatus"]) == ("LOCKED", "UPDATING")
    assert answer["latestVersionId"] == "2"
    found = settled(store, image_set)
    assert (found["imageSetState"], found["imageSetWorkflowStatus"], found["versionId"]) == ("ACTIVE", "UPDATED", "2")
    assert document(store, image_set)["Study"]["DICOM"]["StudyDescription"] == "CHEST"
    assert document(store, image_set, versionId="1")["Study"]["DICOM"].get("StudyDescription") != "CHEST"
    summary = next(iter(store.search(series_instance_uid="1.2.3.1")))
    assert summary.version_id == "2"
    refused(
        "ConflictException", update, store, image_set, updatableAttributes={"Patient": {"DICOM": {"PatientSex": "F"}}}
    )


def test_removals_must_name_the_present_value(store: DataStore) -> None:
    image_set = image_set_of(store)
    sex = document(store, image_set)["Patient"]["DICOM"]["PatientSex"]
    update(store, image_set, removableAttributes={"Patient": {"DICOM": {"PatientSex": "X"}}})
    failed = settled(store, image_set)
    assert failed["imageSetWorkflowStatus"] == "UPDATE_FAILED"
    assert "PatientSex" in failed["message"]
    assert document(store, image_set)["Patient"]["DICOM"]["PatientSex"] == sex
    update(store, image_set, "2", removableAttributes={"Patient": {"DICOM": {"PatientSex": sex}}})
    assert settled(store, image_set)["imageSetWorkflowStatus"] == "UPDATED"
    assert "PatientSex" not in document(store, image_set)["Patient"]["DICOM"]
    versions = store.client.list_image_set_versions(datastoreId=store.datastore_id, imageSetId=image_set)
    listed = [(each["versionId"], each["ImageSetWorkflowStatus"]) for each in versions["imageSetPropertiesList"]]
    assert listed == [("3", "UPDATED"), ("2", "UPDATE_FAILED"), ("1", "CREATED")]


def test_instances_are_removed_with_force_and_stay_in_old_versions(store: DataStore) -> None:
    image_set = image_set_of(store)
    tree = {"Study": {"Series": {"1.2.3.1": {"Instances": {"1.2.3.9.1": {}}}}}}
    message = refused("ValidationException", update, store, image_set, removableAttributes=tree)
    assert "force" in message
    update(store, image_set, removableAttributes=tree, force=True)
    found = settled(store, image_set)
    assert found["overrides"] == {"forced": True}
    instances = document(store, image_set)["Study"]["Series"]["1.2.3.1"]["Instances"]
    assert set(instances) == {"1.2.3.9.0", "1.2.3.9.2"}
    old = document(store, image_set, versionId="1")["Study"]["Series"]["1.2.3.1"]["Instances"]["1.2.3.9.1"]
    frame = store.client.get_image_frame(
        datastoreId=store.datastore_id,
        imageSetId=image_set,
        imageFrameInformation={"imageFrameId": old["ImageFrames"][0]["ID"]},
    )
    assert len(frame["imageFrameBlob"].read()) == old["ImageFrames"][0]["FrameSizeInBytes"]


@pytest.mark.parametrize(
    ("tree", "word"),
    [
        ({"Study": {"DICOM": {"PatientName": "A"}}}, "level"),
        ({"Patient": {"DICOM": {"NoSuchKeyword": "A"}}}, "no DICOM attribute"),
        ({"Study": {"DICOM": {"StudyDate": "yesterday"}}}, "VR"),
        ({"Study": {"DICOM": {"StudyID": "7"}}}, "force"),
        ({"Study": {"DICOM": {"StudyInstanceUID": "1.9"}}}, "primary"),
        ({"Study": {"Series": {"1.2.3.1": {"Instances": {"1.2.3.9.0": {"ImageFrames": []}}}}}}, "cannot be changed"),
        ({"DatastoreID": {}}, "cannot be changed"),
    ],
)
def test_what_may_not_be_changed_is_refused_by_name(store: DataStore, tree: Json, word: str) -> None:
    assert word in refused("ValidationException", update, store, image_set_of(store), updatableAttributes=tree)


def test_accesses_are_noted(store: DataStore) -> None:
    """Reading metadata or frames, updating and copying are accesses; searches and properties are none."""
    image_set = image_set_of(store)
    frame = next(iter(document(store, image_set)["Study"]["Series"]["1.2.3.1"]["Instances"].values()))["ImageFrames"][0]

    def last() -> Any:
        return store.client.get_image_set(datastoreId=store.datastore_id, imageSetId=image_set)["lastAccessedAt"]

    def read_frame() -> None:
        store.client.get_image_frame(
            datastoreId=store.datastore_id, imageSetId=image_set, imageFrameInformation={"imageFrameId": frame["ID"]}
        )["imageFrameBlob"].read()

    for access in (
        lambda: document(store, image_set),
        read_frame,
        lambda: copied(store, image_set),
        lambda: update(store, image_set, updatableAttributes={"Patient": {"DICOM": {"PatientComments": "x"}}}),
    ):
        before = last()
        time.sleep(0.01)
        access()
        settled(store, image_set)
        assert last() > before
        found = store.client.search_image_sets(
            datastoreId=store.datastore_id,
            searchCriteria={"filters": [{"operator": "EQUAL", "values": [{"DICOMSeriesInstanceUID": "1.2.3.1"}]}]},
        )["imageSetsMetadataSummaries"]
        assert last() in [each["lastAccessedAt"] for each in found]


def test_failures_say_what_the_model_allows(store: DataStore) -> None:
    """Each answer is held against the model, and so are the messages of failures."""
    made = copied(store, image_set_of(store))
    removals: list[Json] = [
        {"Study": {"Series": {"1.2.3.1": {}}}},
        {"Study": {"Series": {"1.2.3.1": {"Instances": {"1.2.3.9.7": {}}}}}},
        {"Study": {"Series": {"1.2.3.7": {}}}},
        {"Patient": {"DICOM": {"PatientName": "NOBODY"}}},
    ]
    for number, tree in enumerate(removals, 1):
        update(store, made, str(number), removableAttributes=tree, force=True)
        assert settled(store, made)["imageSetWorkflowStatus"] == "UPDATE_FAILED"
    update(store, made, "5", updatableAttributes={"Patient": {"DICOM": {"PatientName": "OTHER"}}})
    settled(store, made)
    for latest, source in ("6", image_set_of(store)), ("7", image_set_of(store, "1.2.3.2")):
        store.client.copy_image_set(
            datastoreId=store.datastore_id,
            sourceImageSetId=source,
            copyImageSetInformation={
                "sourceImageSet": {"latestVersionId": "1"},
                "destinationImageSet": {"imageSetId": made, "latestVersionId": latest},
            },
        )
        assert settled(store, made)["imageSetWorkflowStatus"] == "COPY_FAILED"
        settled(store, source)
    answer = store.client.list_image_set_versions(datastoreId=store.datastore_id, imageSetId=made)
    assert len([each for each in answer["imageSetPropertiesList"] if "message" in each]) == 6


def test_messages_of_writes_cut_short_are_the_models() -> None:
    shape = botocore.session.get_session().get_service_model("medical-imaging").shape_for("Message")
    for message in (commit._CUT_SHORT, writes._CUT_SHORT):
        assert re.fullmatch(shape.metadata["pattern"], message, re.ASCII)


@pytest.mark.parametrize("vrs", [{"001910F9": 7}, {"001910F9": "QQ"}, {"Name": "LO"}, {"001910F9": None}])
def test_a_vr_is_one(store: DataStore, vrs: Json) -> None:
    element = {"1.2.3.9.0": {"DICOM": {"001910F9": "97"}, "DICOMVRs": vrs}}
    tree = {"Study": {"Series": {"1.2.3.1": {"Instances": element}}}}
    message = refused("ValidationException", update, store, image_set_of(store), updatableAttributes=tree, force=True)
    assert "DICOMVRs" in message


@pytest.mark.parametrize("value", [None, "", "1.2.x", "1 2", {"a": 1}, ["1.2"], 12, True, "1" * 257])
def test_a_uid_stays_one(store: DataStore, value: Any) -> None:
    """Searches show UIDs, and documents have them for keys: not even force makes them anything else."""
    made = copied(store, image_set_of(store))
    instance = {"1.2.3.9.0": {"DICOM": {"SOPInstanceUID": value}}}
    for study in (
        {"DICOM": {"StudyInstanceUID": value}},
        {"Series": {"1.2.3.1": {"DICOM": {"SeriesInstanceUID": value}}}},
        {"Series": {"1.2.3.1": {"Instances": instance}}},
    ):
        for member in ("updatableAttributes", "removableAttributes"):
            assert "InstanceUID" in refused(
                "ValidationException", update, store, made, force=True, **{member: {"Study": study}}
            )


def test_a_message_names_no_patient(store: DataStore) -> None:
    for tree in ({"Patient": {"DICOM": {"DOE^JANE": "A"}}}, {"DOE^JANE": {}}):
        message = refused("ValidationException", update, store, image_set_of(store), updatableAttributes=tree)
        assert "a name of the request" in message
        assert "DOE" not in message


def test_private_elements_go_in_with_force(store: DataStore) -> None:
    image_set = image_set_of(store)
    tree = {
        "Study": {
            "Series": {
                "1.2.3.1": {"Instances": {"1.2.3.9.0": {"DICOM": {"001910F9": "97"}, "DICOMVRs": {"001910F9": "DS"}}}}
            }
        }
    }
    refused("ValidationException", update, store, image_set, updatableAttributes=tree)
    update(store, image_set, updatableAttributes=tree, force=True)
    settled(store, image_set)
    instance = document(store, image_set)["Study"]["Series"]["1.2.3.1"]["Instances"]["1.2.3.9.0"]
    assert instance["DICOM"]["001910F9"] == "97"
    assert instance["DICOMVRs"]["001910F9"] == "DS"


def test_a_revert_makes_a_new_version_equal_to_the_old(store: DataStore) -> None:
    image_set = image_set_of(store)
    before = document(store, image_set)
    update(store, image_set, updatableAttributes={"Study": {"DICOM": {"StudyDescription": "CHEST"}}})
    settled(store, image_set)
    answer = update(store, image_set, "2", revert="1")
    assert answer["latestVersionId"] == "3"
    settled(store, image_set)
    assert document(store, image_set) == before
    refused("ValidationException", update, store, image_set, "3", revert="9")


def test_a_study_changes_as_a_whole_or_not_at_all(store: DataStore) -> None:
    first, second = image_set_of(store, "1.2.3.1"), image_set_of(store, "1.2.3.2")
    update(store, first, updatableAttributes={"Patient": {"DICOM": {"PatientID": "P-2"}}}, includeStudyImageSets=True)
    for image_set in (first, second):
        assert settled(store, image_set)["imageSetWorkflowStatus"] == "UPDATED"
        assert document(store, image_set)["Patient"]["DICOM"]["PatientID"] == "P-2"
    assert store.search(patient_id="P-2").count() == 2


def test_copies_and_the_repair_recipe(store: DataStore) -> None:
    source = image_set_of(store)
    part = {"SchemaVersion": "1.1", "Study": {"Series": {"1.2.3.1": {"Instances": {"1.2.3.9.0": {}, "1.2.3.9.2": {}}}}}}
    information = {"sourceImageSet": {"latestVersionId": "1", "DICOMCopies": {"copiableAttributes": json.dumps(part)}}}
    copy = store.client.copy_image_set(
        datastoreId=store.datastore_id, sourceImageSetId=source, copyImageSetInformation=information
    )
    assert copy["sourceImageSetProperties"]["imageSetWorkflowStatus"] == "COPYING_WITH_READ_ONLY_ACCESS"
    assert copy["sourceImageSetProperties"]["latestVersionId"] == "1"
    made = copy["destinationImageSetProperties"]["imageSetId"]
    found = settled(store, made)
    assert (found["imageSetWorkflowStatus"], found["isPrimary"]) == ("COPIED", False)
    assert settled(store, source)["versionId"] == "1"
    copied = document(store, made)
    assert copied["ImageSetID"] == made
    assert set(copied["Study"]["Series"]["1.2.3.1"]["Instances"]) == {"1.2.3.9.0", "1.2.3.9.2"}
    frame = copied["Study"]["Series"]["1.2.3.1"]["Instances"]["1.2.3.9.0"]["ImageFrames"][0]["ID"]
    store.client.get_image_frame(
        datastoreId=store.datastore_id, imageSetId=made, imageFrameInformation={"imageFrameId": frame}
    )

    # A copy's UIDs may change; a second copy into it fails because the instances are there.
    again = {**information, "destinationImageSet": {"imageSetId": made, "latestVersionId": "1"}}
    store.client.copy_image_set(datastoreId=store.datastore_id, sourceImageSetId=source, copyImageSetInformation=again)
    failed = settled(store, made)
    assert failed["imageSetWorkflowStatus"] == "COPY_FAILED"
    assert "exist" in failed["message"]
    uid = str(generate_uid(entropy_srcs=["new"]))
    update(store, made, "2", updatableAttributes={"Study": {"DICOM": {"StudyInstanceUID": uid}}}, force=True)
    settled(store, made)
    assert store.search(study_instance_uid=uid, primary=None).count() == 1

    # Promotion needs the place of the primary to be free.
    whole = {"sourceImageSet": {"latestVersionId": "3"}}
    arguments = {"datastoreId": store.datastore_id, "sourceImageSetId": made, "copyImageSetInformation": whole}
    refused("ConflictException", store.client.copy_image_set, promoteToPrimary=True, **arguments)
    store.client.delete_image_set(datastoreId=store.datastore_id, imageSetId=source)
    assert settled(store, source)["imageSetState"] == "DELETED"
    promoted = store.client.copy_image_set(promoteToPrimary=True, **arguments)["destinationImageSetProperties"][
        "imageSetId"
    ]
    assert promoted not in (made, source)
    assert settled(store, promoted)["isPrimary"] is True


def test_a_deleted_image_set_is_gone_but_says_so(store: DataStore) -> None:
    image_set = image_set_of(store)
    frame = document(store, image_set)["Study"]["Series"]["1.2.3.1"]["Instances"]["1.2.3.9.0"]["ImageFrames"][0]["ID"]
    answer = store.client.delete_image_set(datastoreId=store.datastore_id, imageSetId=image_set)
    assert (answer["imageSetState"], answer["imageSetWorkflowStatus"]) == ("LOCKED", "DELETING")
    found = settled(store, image_set)
    assert (found["imageSetState"], found["imageSetWorkflowStatus"]) == ("DELETED", "DELETED")
    assert found["deletedAt"]
    where = {"datastoreId": store.datastore_id, "imageSetId": image_set}
    refused("ResourceNotFoundException", store.client.get_image_set_metadata, **where)
    refused(
        "ResourceNotFoundException",
        store.client.get_image_frame,
        imageFrameInformation={"imageFrameId": frame},
        **where,
    )
    refused("ResourceNotFoundException", store.client.delete_image_set, **where)
    assert store.search(series_instance_uid="1.2.3.1", primary=None).count() == 0
    refused("ConflictException", store.client.delete_datastore, datastoreId=store.datastore_id)
    store.client.delete_image_set(datastoreId=store.datastore_id, imageSetId=image_set_of(store, "1.2.3.2"))
    deadline = time.monotonic() + 10
    while store.search(primary=None).count() and time.monotonic() < deadline:
        time.sleep(0.01)
    answer = store.client.delete_datastore(datastoreId=store.datastore_id)
    assert answer["datastoreStatus"] == "DELETING"
    refused("ResourceNotFoundException", store.client.search_image_sets, datastoreId=store.datastore_id)
