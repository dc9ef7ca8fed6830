"""Native pixel data as stored frames: exactly what pydicom reads, and refused where pydicom refuses it."""

from __future__ import annotations

from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.utils import pixel_array
from pydicom.uid import CTImageStorage, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ahi_ml import codec
from ahi_ml.codec.syntaxes import HTJ2K_LOSSLESS_RPCL
from ahi_ml.local.blobs import BlobStore
from ahi_ml.local.catalog import Datastore
from ahi_ml.local.ingest import instances
from ahi_ml.local.ingest.frames import PixelFailure, pixel_format, stored_frames
from ahi_ml.local.ingest.instances import Refusal, read_instance
from ahi_ml.local.settings import Limits
from ahi_ml.local.uris import InputFile


def image(syntax: str = ExplicitVRLittleEndian, *, allocated: int = 16, stored: int = 12, **elements: Any) -> Dataset:
    """Random samples, noise in the unused bits included; None leaves an element out."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2", "1.2.1"
    described = {
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": 67,
        "Columns": 71,
        "NumberOfFrames": 3,
        "BitsAllocated": allocated,
        "BitsStored": stored,
        "HighBit": stored - 1,
        "PixelRepresentation": 0,
        **elements,
    }
    for keyword, value in described.items():
        if value is not None:
            setattr(dataset, keyword, value)
    size = 67 * 71 * 3 * described["SamplesPerPixel"] * allocated // 8
    dataset.PixelData = np.random.default_rng(0).bytes(size + size % 2)
    dataset["PixelData"].VR = "OW"
    return dataset


def written(dataset: Dataset) -> bytes:
    file = BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize(("allocated", "stored"), [(8, 8), (8, 5), (16, 16), (16, 12), (32, 32), (32, 20)])
def test_frames_are_what_pydicom_reads(syntax: str, signed: int, allocated: int, stored: int) -> None:
    data = written(image(syntax, allocated=allocated, stored=stored, PixelRepresentation=signed))
    dataset = pydicom.dcmread(BytesIO(data))
    pixels = pixel_format(dataset)
    expected = pixel_array(BytesIO(data), raw=True)
    frames = list(stored_frames(dataset, pixels, "HTJ2K"))
    assert len(frames) == 3
    for frame, samples in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(codec.decode(frame.data, HTJ2K_LOSSLESS_RPCL, pixels), samples)
        assert (frame.minimum, frame.maximum) == (samples.min(), samples.max())


@pytest.mark.parametrize(
    "elements",
    [
        {"SamplesPerPixel": None},
        {"BitsStored": None},
        {"PixelRepresentation": None},
        {"PixelRepresentation": 2},
        {"PhotometricInterpretation": "MONOCHROME9"},
    ],
)
def test_what_pydicom_refuses_is_refused(elements: dict[str, Any]) -> None:
    dataset = pydicom.dcmread(BytesIO(written(image())))
    for keyword, value in elements.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    with pytest.raises(PixelFailure, match=r"frame 1 of 3 cannot be read: the pixel data is not what"):
        list(stored_frames(dataset, pixel_format(dataset), "HTJ2K"))


def test_a_frame_too_few_is_refused() -> None:
    dataset = pydicom.dcmread(BytesIO(written(image())))
    dataset.PixelData = dataset.PixelData[: 67 * 71 * 2 * 2]
    with pytest.raises(PixelFailure, match=r"ends after 19028 bytes, but its 3 frames take 28542"):
        list(stored_frames(dataset, pixel_format(dataset), "HTJ2K"))


@pytest.mark.filterwarnings("ignore:The number of bytes of pixel data is sufficient")
def test_a_frame_too_many_is_refused() -> None:
    dataset = pydicom.dcmread(BytesIO(written(image())))
    dataset.NumberOfFrames = 2
    with pytest.raises(PixelFailure, match=r"NumberOfFrames is 2, but the pixel data holds 3 frames"):
        list(stored_frames(dataset, pixel_format(dataset), "HTJ2K"))


def test_a_large_file_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives what the same file gives when it is read at once."""
    blobs = BlobStore(tmp_path / "blobs")
    store = Datastore("0" * 32, "default", "ACTIVE", "HTJ2K", 0.0, 0.0)
    data = written(image())
    reads: list[int] = []

    class Stream(BytesIO):
        def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
            reads.append(-1 if size is None else size)
            return super().read(size)

    file = InputFile("image.dcm", len(data), partial(Stream, data))
    at_once = read_instance(file, store, blobs, Limits())
    assert reads == [-1]
    monkeypatch.setattr(instances, "_READ_WHOLE", len(data) - 1)
    reads.clear()
    in_pieces = read_instance(file, store, blobs, Limits())
    assert len(reads) > 10
    assert -1 not in reads
    assert not isinstance(at_once, Refusal)
    assert not isinstance(in_pieces, Refusal)
    assert at_once.levels == in_pieces.levels
    assert [row.blob for row in at_once.rows] == [row.blob for row in in_pieces.rows]
