"""Small DICOM files made by a seed, and what documents must say about them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from service_model import Scan

ROOT = "1.2.826.0.1.3680043.10.7"
CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
FAMILIES = tuple((patient, study) for patient in range(2) for study in range(2))
"""Patient and study: what is done to one of them touches no other's image sets."""

BROKEN = {
    "text": "DICOM attribute TransferSyntaxUID does not exist",
    "no uid": "DICOM attribute SOPInstanceUID does not exist",
    "cut": "",  # some reason
}


def make_scan(
    family: tuple[int, int],
    series: int,
    number: int,
    *,
    seed: int,
    oddity: str = "",
    frames: int = 1,
    side: int = 6,
) -> Scan:
    """An instance.

    Parameters
    ----------
    oddity : {"", "other patient", "other number", "other name", "no weight"}
        What differs from the rest of its series: the first two contradict the primary image set, the
        others are elements that one instance may say otherwise.
    """
    patient, study = family
    study_uid = f"{ROOT}.{patient}.{study}"
    series_uid = f"{study_uid}.{series}"
    sop_uid = f"{series_uid}.{number}"
    levels: dict[str, dict[str, Any]] = {
        "Patient": {
            "PatientName": "Other^Name" if oddity == "other name" else f"Phantom^{patient}",
            "PatientID": f"P{patient}" + ("X" if oddity == "other patient" else ""),
            "PatientBirthDate": "19700101",
            "PatientSex": "O",
        },
        "Study": {
            "StudyDate": f"2024013{study}",
            "StudyTime": ["2155", "215500.25"][study],
            "AccessionNumber": f"A{patient}{study}",
            "StudyDescription": "MODEL",
            "StudyInstanceUID": study_uid,
            "StudyID": f"S{study}",
        },
        "Series": {
            "Modality": "CT",
            "SeriesInstanceUID": series_uid,
            "SeriesNumber": "77" if oddity == "other number" else f"{series:02}",
        },
        "Instance": {
            "MediaStorageSOPClassUID": CT_STORAGE,
            "MediaStorageSOPInstanceUID": sop_uid,
            "TransferSyntaxUID": ExplicitVRLittleEndian,
            "ImplementationClassUID": ROOT,
            "ImplementationVersionName": "MODEL",
            "FileMetaInformationVersion": "AAE=",
            "SOPClassUID": CT_STORAGE,
            "SOPInstanceUID": sop_uid,
            "InstanceNumber": f"{number:02}",  # no pad blanks: texts of even length
            "ImagePositionPatient": ["00", "00", f"{number:02}"],
        },
    }
    if oddity != "no weight":
        levels["Study"]["PatientWeight"] = "61.5"
    if frames:
        levels["Instance"] |= {
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "NumberOfFrames": f"{frames:02}",
            "Rows": side,
            "Columns": side + 2,
            "BitsAllocated": 16,
            "BitsStored": 12,
            "HighBit": 11,
            "PixelRepresentation": 0,
        }
    values = np.random.default_rng([seed, number, series, patient, study])
    images = tuple(values.integers(0, 4096, (side, side + 2), np.uint16) for _ in range(frames))
    return Scan(f"{patient}{study}-{series}-{number}-{oddity or 'plain'}.dcm".replace(" ", "-"), levels, images, family)


def write_scan(scan: Scan, folder: Path) -> None:
    """The DICOM file of a scan."""
    meta, dataset = FileMetaDataset(), Dataset()
    for level, elements in scan.levels.items():
        for keyword, value in elements.items():
            if keyword == "FileMetaInformationVersion":
                meta.FileMetaInformationVersion = b"\0\1"
            elif level == "Instance" and keyword.startswith(("Media", "Transfer", "Implementation")):
                setattr(meta, keyword, value)
            else:
                setattr(dataset, keyword, value)
    if scan.frames:
        dataset.PixelData = b"".join(image.astype("<u2").tobytes() for image in scan.frames)
    dataset.file_meta = meta
    dataset.save_as(folder / scan.name, enforce_file_format=True)


def write_broken(kind: str, folder: Path) -> str:
    """A file that fails to import; its name."""
    path = folder / f"broken {kind}.dcm"
    if kind == "text":
        path.write_text("not a DICOM file")
        return path.name
    scan = make_scan((0, 0), 0, 9, seed=0)
    if kind == "no uid":
        del scan.levels["Instance"]["SOPInstanceUID"]
        write_scan(Scan(path.name, scan.levels, scan.frames), folder)
        return path.name
    write_scan(Scan(path.name, scan.levels, scan.frames), folder)
    path.write_bytes(path.read_bytes()[:-20])
    return path.name


def draw_scans(rng: random.Random, families: Sequence[tuple[int, int]], most: int = 4) -> list[Scan]:
    """A few instances of one or two families, no two with one file name."""
    found: dict[str, Scan] = {}
    family = rng.choice(families)
    for _ in range(rng.randint(1, most)):
        oddity = rng.choice(["", "", "", "", "other patient", "other number", "other name", "no weight"])
        scan = make_scan(
            family,
            rng.randrange(2),
            rng.randrange(3),
            seed=rng.randrange(1000),
            oddity=oddity,
            frames=rng.choice([1, 1, 1, 2, 0]),
        )
        found[scan.name] = scan
    return list(found.values())
