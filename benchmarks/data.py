"""The input of the benchmarks: a folder of CT slices, and an embedded store that holds them.

The slices are those of a real series of 41 when the folder of real data is there
(``AHI_ML_TEST_DATA``, else ``shared/data`` beside the repository), repeated under new UIDs; else a
phantom about as compressible. Repeated slices are shifted by some rows: equal frames would be
stored once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

import ahi_ml

__all__ = ["Prepared", "make_slices", "prepared_store"]

_SERIES = "ct-abdomen-41"
_PHANTOM_SLICES = 41
_SIDE = 512
_SHIFT = 11  # rows a copy is shifted by: no divisor of the height


@dataclass(frozen=True)
class Prepared:
    """An embedded store that holds the slices, and the saved index of its frames.

    Parameters
    ----------
    folder, index : Path
        For `ahi_ml.connect` and `DatasetIndex.load`.
    frames : int
        How many.
    source : str
        Where the slices are from: "series" or "phantom".
    """

    folder: Path
    index: Path
    frames: int
    source: str


@contextmanager
def prepared_store(frames: int, *, unsigned: bool = False) -> Iterator[Prepared]:
    """Make an embedded store with so many frames, of slices as `make_slices` makes them; it is gone afterwards.

    Its server runs until then: the store is held open.
    """
    with tempfile.TemporaryDirectory(prefix="ahi-ml-benchmark-") as name:
        work = Path(name)
        source = make_slices(work / "dicom", frames, unsigned=unsigned)
        with ahi_ml.connect(work / "store", cache=work / "no-cache") as store:
            store.progress = False
            report = store.import_dicom(work / "dicom")
            if report.imported != frames:
                raise RuntimeError(f"the store took {report.imported} of {frames} slices")
            index = store.search().index()
            yield Prepared(work / "store", index.save(work / "frames.index"), len(index), source)


def make_slices(folder: Path, count: int, seed: int = 0, *, unsigned: bool = False) -> str:
    """Write so many CT slices, one file each; return where they are from.

    Unsigned, each has a pixel of 0 and one of 65,535: what lower resolutions overshoot to needs more than 16 bits.
    """
    folder.mkdir(parents=True)
    real = _real_slices()
    originals = [dcmread(path) for path in real[:count]] if real else list(_phantom(min(count, _PHANTOM_SLICES), seed))
    if unsigned:
        for original in originals:
            _make_unsigned(original)
    pixels = [slice_.pixel_array for slice_ in originals]
    for number in range(count):
        copy, place = divmod(number, len(originals))
        dataset = originals[place]
        if copy:
            dataset.PixelData = np.roll(pixels[place], copy * _SHIFT, axis=0).tobytes()
            dataset.SOPInstanceUID = _uid("instance", seed, number)
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            dataset.SeriesInstanceUID = _uid("series", seed, copy)
        dataset.save_as(folder / f"{number:06d}.dcm", enforce_file_format=True)
    return "series" if real else "phantom"


def _make_unsigned(dataset: Dataset) -> None:
    pixels = dataset.pixel_array.astype(np.int32)
    pixels -= pixels.min()
    pixels[0, :2] = 0, 65535
    dataset.PixelData, dataset.PixelRepresentation = pixels.astype(np.uint16).tobytes(), 0
    dataset.BitsStored, dataset.HighBit = 16, 15
    for keyword in ("PixelPaddingValue", "SmallestImagePixelValue", "LargestImagePixelValue"):
        if keyword in dataset:
            del dataset[keyword]


def _uid(*entropy: object) -> str:
    return str(generate_uid(entropy_srcs=["ahi_ml benchmarks", *map(str, entropy)]))


def _real_slices() -> list[Path]:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("AHI_ML_TEST_DATA") or beside)
    return sorted((folder / _SERIES).rglob("*.dcm"))


def _phantom(count: int, seed: int) -> Iterator[Dataset]:
    random = np.random.default_rng(seed)
    study, series, frame = (_uid(level, seed) for level in ("study", "series-phantom", "reference"))
    for number in range(count):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = _uid("phantom", seed, number)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = (
            study,
            series,
            frame,
        )
        dataset.PatientID, dataset.PatientName, dataset.StudyID = "PHANTOM", "Phantom^CT", "1"
        dataset.AccessionNumber, dataset.StudyDate, dataset.StudyTime = "PHANTOM", "20240101", "120000"
        dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.SeriesNumber, dataset.InstanceNumber = 1, number + 1
        dataset.ImagePositionPatient = [-200.0, -200.0, 5.0 * number]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing, dataset.SliceThickness = [0.78125, 0.78125], 5.0
        dataset.Rows = dataset.Columns = _SIDE
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = (
            16,
            16,
            15,
            1,
        )
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
        dataset.WindowCenter, dataset.WindowWidth = 40, 400
        dataset.PixelData = _slice(random, number / max(count - 1, 1)).tobytes()
        yield dataset


def _slice(random: np.random.Generator, height: float) -> NDArray[np.int16]:
    """Stored values of a body with organs: air, an ellipse of tissue, noise inside, nothing outside."""
    y, x = np.mgrid[-1 : 1 : _SIDE * 1j, -1 : 1 : _SIDE * 1j]
    body = (x / (0.75 + 0.05 * np.sin(6 * height))) ** 2 + (y / 0.55) ** 2 < 1
    image = np.where(body, 1064.0, 24.0)
    shapes = [
        (-0.35, -0.05, 0.25, 0.3, -850),
        (0.35, -0.05, 0.25, 0.3, -850),
        (0.0, 0.33, 0.09, 0.1, 600),
        (0.1, -0.25, 0.2, 0.15, 60),
    ]
    for left, top, width, depth, value in shapes:
        scale = 0.7 + 0.5 * np.sin(np.pi * (height + 0.2))
        inside = ((x - left) / (width * scale)) ** 2 + ((y - top) / (depth * scale)) ** 2 < 1
        image[inside & body] += value
    noise = random.normal(0.0, 18.0, image.shape)
    image += np.where(body, noise, noise * 0.25)
    image[x**2 + y**2 > 1] = -2000
    return image.astype("<i2")
