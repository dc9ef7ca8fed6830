"""Canaries in every identifying attribute: none may sing outside the data store itself."""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

import ahi_ml
from ahi_ml.cli import main
from ahi_ml.errors import AhiError, ConfigError
from ahi_ml.imports import ImportReport
from ahi_ml.index import DatasetIndex
from ahi_ml.metadata import parse_document
from ahi_ml.store import DataStore

CANARY = "CANARY"
BIRTH_DATE, BIRTH_TIME, TELEPHONE = "19030507", "112358", "5550199"
SONGS = (CANARY, BIRTH_DATE, BIRTH_TIME, TELEPHONE)

NAMES = (
    "PatientName",
    "PatientBirthName",
    "PatientMotherBirthName",
    "OtherPatientNames",
    "ResponsiblePerson",
    "ReferringPhysicianName",
    "ConsultingPhysicianName",
    "PhysiciansOfRecord",
    "NameOfPhysiciansReadingStudy",
    "PerformingPhysicianName",
    "OperatorsName",
    "RequestingPhysician",
)
TEXTS = (
    "PatientID",
    "IssuerOfPatientID",
    "OtherPatientIDs",
    "PatientAddress",
    "PatientComments",
    "AdditionalPatientHistory",
    "MedicalRecordLocator",
    "MilitaryRank",
    "Occupation",
    "EthnicGroup",
    "CountryOfResidence",
    "RegionOfResidence",
    "PatientReligiousPreference",
    "AccessionNumber",
    "StudyID",
    "StudyDescription",
    "SeriesDescription",
    "ProtocolName",
    "InstitutionName",
    "InstitutionAddress",
    "InstitutionalDepartmentName",
    "ReferringPhysicianAddress",
    "StationName",
    "DeviceSerialNumber",
    "AdmissionID",
    "CurrentPatientLocation",
    "RequestedProcedureDescription",
    "PerformedProcedureStepDescription",
    "ImageComments",
    "StudyComments",
    "DerivationDescription",
    "ContentDescription",
)
TELEPHONES = ("PatientTelephoneNumbers", "ReferringPhysicianTelephoneNumbers")


def identified(series: str, number: int, **changes: Any) -> pydicom.Dataset:
    """A CT slice that names its patient wherever DICOM lets it."""
    made = pydicom.Dataset()
    made.preamble, made.file_meta = bytes(128), FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for name in NAMES:
        setattr(made, name, f"{CANARY}^{name}")
    for name in TEXTS:
        setattr(
            made,
            name,
            f"{CANARY}{name}"[:16]
            if name in ("AccessionNumber", "StudyID", "StationName", "EthnicGroup", "Occupation")
            else f"{CANARY} {name}",
        )
    for name in TELEPHONES:
        setattr(made, name, TELEPHONE)
    made.PatientBirthDate, made.PatientBirthTime = BIRTH_DATE, BIRTH_TIME
    other = pydicom.Dataset()
    other.PatientID, other.IssuerOfPatientID = f"{CANARY} other id", f"{CANARY} other issuer"
    made.OtherPatientIDsSequence = Sequence([other])
    request = pydicom.Dataset()
    request.RequestedProcedureDescription = f"{CANARY} requested"
    made.RequestAttributesSequence = Sequence([request])
    private = made.private_block(0x0099, f"{CANARY} CREATOR", create=True)
    private.add_new(1, "LO", f"{CANARY} private")
    private.add_new(2, "OB", f"{CANARY} private".encode())
    made.SOPClassUID, made.SOPInstanceUID = CTImageStorage, f"{series}.{number}"
    made.SeriesInstanceUID, made.StudyInstanceUID = series, "2.25.77"
    made.StudyDate, made.StudyTime, made.Modality, made.InstanceNumber = "20240101", "120000", "CT", number
    made.Rows = made.Columns = 16
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 16, 15, 1
    made.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    made.ImagePositionPatient, made.ImageOrientationPatient = [0, 0, 2.0 * number], [1, 0, 0, 0, 1, 0]
    made.PixelSpacing, made.RescaleSlope, made.RescaleIntercept = [1, 1], 1, 0
    made.PixelData = np.random.default_rng(number).integers(-100, 100, (16, 16), np.int16).tobytes()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def write_files(folder: Path) -> None:
    """A series of three good slices, and files that fail each in its own way."""
    folder.mkdir()
    for number in range(1, 4):
        identified("2.25.5", number).save_as(folder / f"good{number}.dcm", enforce_file_format=True)
    identified("2.25.8", 1).save_as(folder / "whole.dcm", enforce_file_format=True)
    whole = (folder / "whole.dcm").read_bytes()
    cuts = {"head": 200, "half": len(whole) // 2, "pixels": len(whole) - 100}
    for name, size in cuts.items():
        (folder / f"cut-{name}.dcm").write_bytes(whole[:size])
    (folder / "text.dcm").write_text(f"{CANARY} {BIRTH_DATE}")
    (folder / "syntax.dcm").write_bytes(whole.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.9.9.9\0"))
    (folder / "odd-vr.dcm").write_bytes(whole.replace(b"\x10\x00\x20\x00LO", b"\x10\x00\x20\x00UL", 1))
    (folder / "odd-length.dcm").write_bytes(
        whole.replace(b"\x28\x00\x10\x00US\x02\x00", b"\x28\x00\x10\x00US\xff\x7f", 1)
    )
    bad = {
        "no-class": {"SOPClassUID": None},
        "no-series": {"SeriesInstanceUID": None},
        "long-series": {"SeriesInstanceUID": f"{CANARY}" * 50},
        "odd-series": {"SeriesInstanceUID": "1.2.odd"},
        "few-pixels": {"PixelData": b"12"},
        "no-rows": {"Rows": None},
        "odd-photometric": {"PhotometricInterpretation": CANARY},
        "other-patient": {"PatientID": f"{CANARY} somebody else"},
    }
    for number, (name, changes) in enumerate(bad.items(), 10):
        identified("2.25.6", number, **changes).save_as(folder / f"{name}.dcm", implicit_vr=False, little_endian=True)


@pytest.fixture(scope="module")
def records() -> Iterator[list[logging.LogRecord]]:
    """Everything the package logs in this process."""
    kept: list[logging.LogRecord] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = kept.append  # type: ignore[method-assign]
    logger = logging.getLogger("ahi_ml")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield kept
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("private")


@pytest.fixture(scope="module")
def store(root: Path, records: list[logging.LogRecord]) -> Iterator[DataStore]:
    opened = ahi_ml.connect(root / "store", cache=root / "cache")
    opened.progress = False
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def report(root: Path, store: DataStore) -> ImportReport:
    with pytest.warns(UserWarning, match="Invalid value"):
        write_files(root / "files")
    return store.import_dicom(root / "files")


@pytest.fixture(scope="module")
def index(store: DataStore, report: ImportReport) -> DatasetIndex:
    return store.search(primary=None).index(patient_key="key")


def silent(text: str | bytes, what: str = "") -> None:
    raw = text if isinstance(text, bytes) else text.encode()
    for song in SONGS:
        for form in (song.encode(), song.encode("utf-16-le")):
            assert form not in raw, f"{song} in {what}: {raw[max(raw.find(form) - 60, 0) : raw.find(form) + 60]!r}"


def test_the_canaries_are_in_the_store(store: DataStore, index: DatasetIndex) -> None:
    """Without this the other tests would prove nothing."""
    name = index.frames["image_set_id"].iloc[0]
    body = store.client.get_image_set_metadata(datastoreId=store.datastore_id, imageSetId=name)
    document = gzip.decompress(body["imageSetMetadataBlob"].read()).decode()
    for keyword in (*NAMES, *TEXTS):
        assert f'"{keyword}":' in document.replace(" ", ""), keyword
    for song in SONGS:
        assert song in document


def test_import_reports(report: ImportReport) -> None:
    assert report.imported >= 4
    assert len(report.failed) >= 6
    for each in (*report.failed, *report.warnings):
        silent(each.reason, each.input_file)
    silent(repr(report))
    silent(report.to_pandas().to_csv())


def test_searches(store: DataStore, report: ImportReport) -> None:
    by_name = store.search(patient_id=f"{CANARY} PatientID", accession_number=f"{CANARY}AccessionNumber"[:16])
    found = list(by_name)
    assert found
    silent(repr(by_name) + repr(found))
    silent(by_name.to_pandas().to_csv())
    silent(by_name.index().notes[0] if by_name.index().notes else "")


@pytest.mark.parametrize(
    "filters",
    [
        {"patient_id": CANARY * 100},
        {"patient_id": CANARY + "\0"},
        {"patient_id": [CANARY]},
        {"study_instance_uid": CANARY * 100},
        {"accession_number": CANARY * 100},
        {"patient_id": CANARY, "study_id": CANARY, "accession_number": CANARY},
    ],
)
def test_searches_that_are_refused(store: DataStore, filters: dict[str, Any]) -> None:
    try:
        assert store.search(**filters).count() == 0
    except AhiError as error:
        silent(f"{error} {error!r}")


def test_an_index(root: Path, index: DatasetIndex) -> None:
    assert len(index) >= 4
    assert index.series["patient_key"].nunique() >= 2  # it tells patients apart all the same
    silent(repr(index))
    silent(index.frames.to_csv())
    silent(index.series.reset_index().to_csv())
    silent(pickle.dumps(index))
    path = index.save(root / "index.arrow")
    for each in (path, path.with_name("index.arrow.key")):
        silent(each.read_bytes(), each.name)
    for part in (index.where("Modality == 'CT'"), index[:2], *index.split({"a": 0.5, "b": 0.5}, by="series").values()):
        silent(part.save(root / "part.arrow").read_bytes())
    for wrong in ("PatientName == 'x'", "Patient"):
        with pytest.raises(ConfigError) as caught:
            index.where(wrong)
        silent(str(caught.value))


def test_identifying_columns_come_only_when_asked_for_aloud(store: DataStore, report: ImportReport) -> None:
    search = store.search()
    for column in ("PatientName", "PatientID", "StudyDescription", "InstitutionName"):
        with pytest.raises(ConfigError, match="phi=True"):
            search.index(columns=[column])
    assert CANARY in search.index(columns=["StudyDescription"], phi=True).series.to_csv()


def test_patient_keys_are_no_plain_hashes(store: DataStore, index: DatasetIndex) -> None:
    keys = [set(store.search().index(patient_key=key).series["patient_key"]) for key in ("key", "another")]
    assert not keys[0] & keys[1]


def _mean(volume: Any) -> dict[str, float]:
    return {"mean": float(volume.mean())}


def _fails(volume: Any) -> dict[str, float]:
    raise RuntimeError("no luck")


def test_reading_and_its_traces(root: Path, store: DataStore, index: DatasetIndex) -> None:
    one = index.where(series_instance_uid="2.25.5")
    volume = ahi_ml.open_volume(store, one)
    silent(repr(volume.attrs) + repr(volume) + volume._repr_html_())
    items = ahi_ml.FrameDataset(store, one)
    silent(repr(items) + repr(items[0]["key"]) + repr(items[0]["meta"]))
    silent(pickle.dumps(items) + pickle.dumps(store))
    for function in (_mean, _fails):
        table = ahi_ml.extract_features(store, index, function, out=root / "features.parquet")
        silent(table.to_csv())
        silent((root / "features.parquet").read_bytes())
        assert len(pd.read_parquet(root / "features.parquet")) == len(table)
    silent(repr(store) + repr(store.cache) + repr(store._target))
    cached = [path for path in (root / "cache").rglob("*") if path.is_file()]
    assert cached
    for path in cached:
        silent(str(path.relative_to(root)))
        silent(path.read_bytes(), path.name)


def test_the_command_line(root: Path, store: DataStore, index: DatasetIndex) -> None:
    index.save(root / "cli.arrow")
    (root / "privacy_features.py").write_text("def mean(volume):\n    return {'mean': float(volume.mean())}\n")
    for words, code in (
        (["import", "store", "files", "--json"], 3),
        (["import", "store", "files"], 3),
        (["search", "store", "--all"], 0),
        (["search", "store", "--all", "--json"], 0),
        (["search", "store", "--patient-id", CANARY * 100], None),
        (["search", "store", "--study-uid", CANARY * 100], None),
        (["index", "store", "--all", "-o", "cli.arrow", "--json"], 0),
        (["split", "cli.arrow", "a=1", "--by", "series", "--json"], 0),
        (["fetch", "store", "cli.arrow"], 0),
        (["features", "store", "cli.arrow", "privacy_features:mean", "--json"], None),
        (["show", "store", "2.25.5"], 0),
        (["show", "store", CANARY * 100], 1),
        (["cache", "--json"], 0),
    ):
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            patch.setattr(sys, "argv", ["ahi-ml", *words])
            patch.setattr(sys, "path", list(sys.path))
            patch.setenv("AHI_ML_CACHE", os.fspath(root / "cache"))
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                try:
                    main()
                    ended: Any = 0
                except SystemExit as end:
                    ended = end.code or 0
        assert code is None or ended == code, (words, out.getvalue())
        silent(out.getvalue(), " ".join(words[:2]))


def test_logs_and_the_servers_own(
    root: Path, store: DataStore, index: DatasetIndex, records: list[logging.LogRecord]
) -> None:
    index.split({"a": 1.0}, by="series")  # it logs its receipt
    assert records
    formatter = logging.Formatter()
    for record in records:
        silent(formatter.format(record))
    silent((root / "store" / "server.log").read_bytes(), "server.log")


def test_files_beside_the_data_itself(root: Path, store: DataStore, index: DatasetIndex) -> None:
    """All of the store's folder, but for its catalog, its blobs and the reports of its jobs."""
    seen = 0
    for path in (root / "store").rglob("*"):
        relative = path.relative_to(root / "store")
        silent(relative.as_posix())
        if path.is_file() and relative.parts[0] not in ("blobs", "s3") and not relative.name.startswith("catalog."):
            silent(path.read_bytes(), relative.as_posix())
            seen += 1
    assert seen


def test_job_reports_name_files_and_reasons_only(root: Path, report: ImportReport) -> None:
    """The reports an import writes quote no value either."""
    reports = [path for path in (root / "store" / "s3").rglob("*") if path.is_file()]
    assert reports
    for path in reports:
        silent(path.read_bytes(), path.name)


def test_errors_of_documents() -> None:
    """A document that cannot be used is not quoted."""
    start = '{"ImageSetID": "a", "DatastoreID": "b", '
    for body in (
        f'{{"Patient": "{CANARY}"',
        f'{start}"Study": "{CANARY}"}}',
        f'{start}"Patient": {{"DICOM": "{CANARY}"}}, "Study": {{"Series": {{"1": {{}}}}}}}}',
        f'{start}"Study": {{"Series": {{"1": {{"DICOM": "{CANARY}"}}}}}}}}',
        f'{start}"Study": {{"Series": {{"1": {{"Instances": {{"2": "{CANARY}"}}}}}}}}}}',
    ):
        with pytest.raises(AhiError) as caught:
            list(parse_document(body.encode()))
        silent(str(caught.value))
