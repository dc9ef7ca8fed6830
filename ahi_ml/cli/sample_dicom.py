"""A patient of the sample data as DICOM files: MR slices and their segmentation.

Bytes are deterministic: UIDs come from names, dates stay empty, and what highdicom takes from the clock
is replaced.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ahi_ml.types import AnyArray, FloatArray

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset
    from pydicom.uid import UID

__all__ = ["GREY_MATTER", "WHITE_MATTER", "Grid", "Profile", "write_patient", "write_whole"]

GREY_MATTER, WHITE_MATTER = 1, 2
"""Values of a mask. Grey and white are also the segment numbers in the DICOM Segmentations."""

# Part of every UID: change it whenever the same names would stand for other pixels.
_EDITION = "ahi_ml sample data, edition 1"


@dataclass(frozen=True)
class Grid:
    """Where a series' voxels lie: axial, rows towards the left, columns towards the back.

    `origin` is the centre of voxel (0, 0, 0) in LPS, mm; `spacing` is (dz, dy, dx), mm.
    """

    shape: tuple[int, int, int]
    origin: tuple[float, float, float]
    spacing: tuple[float, float, float]

    def axes_ras(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """RAS coordinates, mm, of the slices (z), the rows (y) and the columns (x)."""
        x, y, z = self.origin
        dz, dy, dx = self.spacing
        planes, rows, columns = (np.arange(n, dtype=np.float64) for n in self.shape)
        return z + dz * planes, -(y + dy * rows), -(x + dx * columns)


@dataclass(frozen=True)
class Profile:
    """A patient to write: names and place, all known before any pixel is computed."""

    key: str
    patient_id: str
    patient_name: str
    description: str
    derivation: str
    grid: Grid

    def image_names(self) -> list[str]:
        return [f"{self.key}/mr-{number:03d}.dcm" for number in range(1, self.grid.shape[0] + 1)]

    def segmentation_name(self) -> str:
        return f"{self.key}/seg.dcm"

    def uid(self, *parts: object) -> UID:
        from pydicom.uid import generate_uid

        return generate_uid(entropy_srcs=[_EDITION, self.key, *map(str, parts)])


def write_patient(folder: Path, profile: Profile, image: AnyArray, mask: AnyArray) -> int:
    slices = list(_slices(profile, image))
    segmentation = _segmentation(profile, slices, mask)
    names = [*profile.image_names(), profile.segmentation_name()]
    for name, dataset in zip(names, [*slices, segmentation], strict=True):
        write_whole(folder / name, partial(dataset.save_as, enforce_file_format=True))
    return len(names)


def _slices(profile: Profile, image: AnyArray) -> Iterator[Dataset]:
    """MR Image Storage datasets, one a slice. Dates stay empty: nobody was scanned on any day."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

    dz, dy, dx = profile.grid.spacing
    x, y, z = profile.grid.origin
    brightest = int(np.percentile(image[image > 0], 99.5))
    for index, frame in enumerate(image):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = profile.uid("mr", index)
        meta.TransferSyntaxUID = ExplicitVRLittleEndian

        ds = Dataset()
        ds.file_meta = meta
        ds.SpecificCharacterSet = "ISO_IR 192"
        ds.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
        ds.SOPClassUID = MRImageStorage
        ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID

        ds.PatientName = profile.patient_name
        ds.PatientID = profile.patient_id
        ds.PatientBirthDate = ds.PatientSex = ""
        ds.PatientIdentityRemoved = "YES"
        ds.DeidentificationMethod = "Average of many people; shows no person"
        ds.StudyInstanceUID = profile.uid("study")
        ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.ReferringPhysicianName = ""
        ds.StudyID = "1"
        ds.StudyDescription = "ahi_ml sample"

        ds.Modality = "MR"
        ds.SeriesInstanceUID = profile.uid("mr series")
        ds.SeriesNumber = 1
        ds.SeriesDescription = profile.description
        ds.BodyPartExamined = "BRAIN"
        ds.PatientPosition = "HFS"
        ds.FrameOfReferenceUID = profile.uid("frame of reference")
        ds.PositionReferenceIndicator = ""
        ds.Manufacturer = ""

        ds.ScanningSequence = "RM"
        ds.SequenceVariant = "NONE"
        ds.ScanOptions = ""
        ds.MRAcquisitionType = "3D"
        ds.RepetitionTime = ds.EchoTime = ds.EchoTrainLength = None
        ds.DerivationDescription = profile.derivation

        ds.InstanceNumber = index + 1
        ds.ImagePositionPatient = [x, y, z + index * dz]
        ds.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        ds.PixelSpacing = [dy, dx]
        ds.SliceThickness = dz
        ds.SpacingBetweenSlices = dz

        ds.SamplesPerPixel = 1
        ds.PhotometricInterpretation = "MONOCHROME2"
        ds.Rows, ds.Columns = frame.shape
        ds.BitsAllocated = 16
        ds.BitsStored = 12
        ds.HighBit = 11
        ds.PixelRepresentation = 0
        ds.WindowCenter = brightest // 2
        ds.WindowWidth = brightest
        ds.LossyImageCompression = "00"
        ds.PixelData = np.ascontiguousarray(frame, dtype="<u2").tobytes()
        yield ds


def _segmentation(profile: Profile, slices: list[Dataset], mask: AnyArray) -> Dataset:
    """BINARY DICOM Segmentation of the slices; what highdicom takes from clock and chance is replaced."""
    import highdicom
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="Tissue map above one half", family=codes.DCM.HistogramAnalysis, version="1"
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=label,
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=kind,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, label, kind in (
            (GREY_MATTER, "Grey matter", codes.SCT.GrayMatter),
            (WHITE_MATTER, "White matter", codes.SCT.WhiteMatter),
        )
    ]
    segmentation: Dataset = highdicom.seg.Segmentation(
        source_images=slices,
        pixel_array=mask,
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=profile.uid("seg series"),
        series_number=2,
        sop_instance_uid=profile.uid("seg"),
        instance_number=1,
        manufacturer="ahi_ml",
        manufacturer_model_name="sample data",
        software_versions="1",
        device_serial_number="1",
        content_label="TISSUE",
        content_description="Grey and white matter",
        series_description="Grey and white matter",
    )
    # A date is required here; it is the template's year, not a day anything was done on.
    segmentation.ContentDate = "20090101"
    segmentation.ContentTime = "000000"
    organization = profile.uid("dimensions")

    def settle(dataset: Dataset, element: DataElement) -> None:
        if element.keyword == "DimensionOrganizationUID":
            element.value = organization
        elif element.keyword in ("InstanceCreationDate", "InstanceCreationTime", "ContributionDateTime"):
            del dataset[element.tag]

    segmentation.walk(settle)
    return segmentation


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a neighbour of `path`, then put it in place: nobody meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    try:
        write(Path(name))
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
