"""Files by the book: read as pydicom reads them, or left to it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.errors import InvalidDicomError
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from ahi_ml.local.ingest.document import read_levels
from ahi_ml.local.ingest.plain import read_plain

SEEDS, ROUNDS = 4, 150
CONVERTED = (0x00080005,)  # by pydicom, as it reads
BY_THE_BOOK = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless)


@pytest.fixture(autouse=True)
def _quiet_pydicom() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pydicom")
        yield


def example(syntax: str, *, undefined: bool = True) -> bytes:
    """A small file with sequences in sequences, private elements, empty values and pixel data."""
    inner = Dataset()
    inner.CodeValue, inner.CodeMeaning = "T-D4000", "Abdomen"
    inner.is_undefined_length_sequence_item = undefined
    outer = Dataset()
    outer.ReferencedSOPInstanceUID = "1.2.3"
    outer.PurposeOfReferenceCodeSequence = Sequence([inner])
    outer["PurposeOfReferenceCodeSequence"].is_undefined_length = undefined
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3.4"
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.PatientName, dataset.PatientID, dataset.AccessionNumber = "Jérôme", "1", ""
    dataset.ReferencedImageSequence = Sequence([outer, Dataset()])
    dataset["ReferencedImageSequence"].is_undefined_length = undefined
    dataset.ProcedureCodeSequence = Sequence([])
    block = dataset.private_block(0x0019, "A MAKER", create=True)
    block.add_new(1, "DS", "1.5")
    block.add_new(2, "SQ", Sequence([inner]))
    dataset.Rows, dataset.Columns, dataset.BitsAllocated, dataset.BitsStored = 2, 2, 16, 12
    dataset.PixelRepresentation, dataset.SmallestImagePixelValue = 0, 0
    dataset.PixelData = encapsulate([b"\1\2\3\4", b"\5\6"]) if syntax == RLELossless else bytes(range(8))
    dataset["PixelData"].is_undefined_length = syntax == RLELossless
    file = BytesIO()
    little, implicit = syntax != ExplicitVRBigEndian, syntax == ImplicitVRLittleEndian
    pydicom.dcmwrite(file, dataset, implicit_vr=implicit, little_endian=little, enforce_file_format=True)
    return file.getvalue()


def told(read: Callable[[], Dataset]) -> Any:
    """What an import takes from a data set; None where that fails."""
    try:
        dataset = read()
        levels = repr(read_levels(read()))
    except Exception:  # whatever the parser raises over a damaged file
        return None
    raw = {
        int(tag): (element.value, element.VR, element.length, element.is_little_endian, element.is_implicit_VR)
        for tag, element in dataset.items()
        if isinstance(element, RawDataElement) and element.VR not in ("SQ", None) and tag not in CONVERTED
    }
    return list(dataset.keys()), raw, levels, dataset.original_encoding


def agree(data: bytes) -> bool | None:
    """Whether pydicom reads the same; None where the file is left to it."""
    if (plain := read_plain(data)) is None:
        return None
    return bool(told(lambda: deepcopy(plain)) == told(lambda: pydicom.dcmread(BytesIO(data))))


@pytest.mark.parametrize("undefined", [True, False])
@pytest.mark.parametrize("syntax", BY_THE_BOOK)
def test_files_by_the_book_are_read_as_pydicom_reads_them(syntax: str, undefined: bool) -> None:
    data = example(syntax, undefined=undefined)
    plain, other = read_plain(data), pydicom.dcmread(BytesIO(data))
    assert plain is not None
    assert plain == Dataset(other)
    assert plain.file_meta == other.file_meta
    assert agree(data)


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, "1.2.3"])
def test_other_encodings_are_left_to_pydicom(syntax: str) -> None:
    assert read_plain(example(syntax)) is None


def test_every_file_at_hand(pydicom_files: list[Path]) -> None:
    plain = 0
    for path in pydicom_files:
        same = agree(path.read_bytes())
        plain += same is not None
        assert same is not False, path.name
    assert plain > len(pydicom_files) / 2


def test_every_real_file(shared_data: Path) -> None:
    plain = series = 0
    for path in sorted(shared_data.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        in_series = path.suffix == ".dcm" and path.relative_to(shared_data).parts[0].startswith(("ct-", "mr-"))
        series += in_series
        same = agree(data)
        plain += in_series and same is not None
        assert same is not False, path.name
    assert plain == series


@pytest.mark.parametrize("syntax", BY_THE_BOOK)
def test_cut_files(syntax: str) -> None:
    data = example(syntax)
    for end in range(len(data)):
        assert agree(data[:end]) is not False, end


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("syntax", BY_THE_BOOK)
def test_damaged_files(syntax: str, seed: int) -> None:
    chance = random.Random(f"{syntax} {seed}")
    whole = example(syntax, undefined=seed % 2 == 0)
    for _ in range(ROUNDS):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 2])):
            where = chance.randrange(128, len(data))
            data[where] = chance.choice([chance.randrange(256), data[where] ^ 1 << chance.randrange(8), 0xFF])
        assert agree(bytes(data)) is not False, bytes(data)


def test_files_that_are_none() -> None:
    for data in (b"", b"DICM", b"\0" * 128 + b"DICM", b"\0" * 500):
        assert read_plain(data) is None
        with pytest.raises((InvalidDicomError, AssertionError)):
            assert len(pydicom.dcmread(BytesIO(data)))


def test_nesting_without_end_is_left_to_pydicom() -> None:
    """A sequence in a sequence, a thousand deep: no recursion error."""
    whole = example(ExplicitVRLittleEndian)
    opening = b"\x40\x00\x60\xa1SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    head = whole[: whole.index(b"\xe0\x7f\x10\x00")]
    assert read_plain(head + opening * 1000) is None


def test_what_a_sequence_hides_is_told_of_every_instance() -> None:
    """Items are remembered; what could not be read of them is told each time."""
    item = Dataset()
    item.add_new(0x00101010, "AS", "030Y")
    item.add_new(0x00280010, "US", 5)
    dataset = Dataset()
    dataset.ReferencedPatientSequence = Sequence([item])
    file = BytesIO()
    pydicom.dcmwrite(file, dataset, implicit_vr=False, little_endian=True, enforce_file_format=False)
    data = file.getvalue().replace(b"US\x02\x00\x05\x00", b"AT\x02\x00\x05\x00")  # a tag has four bytes
    first, second = (read_levels(pydicom.dcmread(BytesIO(data), force=True)) for _ in range(2))
    assert first.discarded == second.discarded == ["Rows"]
    assert first.patient == second.patient == {"ReferencedPatientSequence": [{"PatientAge": "030Y"}]}
