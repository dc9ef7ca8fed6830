"""Data sets as metadata documents: against pydicom's own reading of the same files, and by hand."""

from __future__ import annotations

import base64
import json
import math
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom import datadict
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pydicom.valuerep import PersonName

from ahi_ml.local.ingest.document import Levels, read_levels
from ahi_ml.local.ingest.levels import LEVEL_OF, PATIENT, SERIES, STUDY

NUMBERS = ("US", "SS", "UL", "SL", "FL", "FD", "SV", "UV")
BINARY = ("OB", "OW", "OF", "OD", "OL", "OV", "UN", "OB or OW")


@pytest.fixture(autouse=True)
def _quiet_pydicom() -> Iterator[None]:
    """It remarks on odd values, which are the point here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pydicom")
        yield


def written(dataset: Dataset, syntax: str = ExplicitVRLittleEndian) -> Dataset:
    """The data set as a file would give it: every element still raw."""
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    file = BytesIO()
    little = syntax != ExplicitVRBigEndian
    pydicom.dcmwrite(
        file,
        dataset,
        implicit_vr=syntax == ImplicitVRLittleEndian,
        little_endian=little,
        enforce_file_format=False,
    )
    file.seek(0)
    return pydicom.dcmread(file, force=True)


def raw_element(tag: int, vr: str, value: bytes) -> Dataset:
    """A data set of one element with exactly these bytes."""
    dataset = Dataset()
    dataset._dict[Tag(tag)] = RawDataElement(BaseTag(tag), vr, len(value), value, 0, False, True)
    return dataset


def only(levels: Levels) -> Any:
    """The value of the only element that is not file meta."""
    merged = {**levels.patient, **levels.study, **levels.series, **levels.instance}
    (value,) = (value for key, value in merged.items() if not key.startswith(("FileMeta", "Transfer", "Impl")))
    return value


def same(got: Any, element: DataElement, dataset: Dataset) -> bool:
    """Whether a document's value says what pydicom says."""
    value = element.value
    if element.VR == "SQ":
        items = list(value or [])
        return (got or []) == [] == items or (
            len(got) == len(items) and all(agrees(mine, item) for mine, item in zip(got, items, strict=True))
        )
    if value is None or value == "" or value == b"" or (element.VM == 0):
        return got is None or got == ""
    if element.VR in BINARY or isinstance(value, bytes):
        return isinstance(got, str) and (
            base64.b64decode(got) == value or element.VR not in ("OB", "UN")  # words may be swapped
        )
    values = list(value) if element.VM > 1 else [value]
    listed = got if isinstance(got, list) else [got]
    if len(values) != len(listed):
        return False
    if element.VR == "AT":
        return listed == [f"{int(each):08X}" for each in values]
    if element.VR in NUMBERS:
        return all(
            each == other or math.isclose(each, other, rel_tol=1e-6) for each, other in zip(listed, values, strict=True)
        )
    if element.VR in ("DS", "IS"):
        pairs = [(each.strip(), str(other)) for each, other in zip(listed, values, strict=True)]
        return all(each == other or float(each) == float(other) for each, other in pairs)
    # A name may end in "=": an empty component group, which pydicom leaves out.
    return [each.strip().rstrip("=") for each in listed] == [str(each).strip(" \0\r\n") for each in values]


def key_of(tag: BaseTag) -> str:
    """An element's key: its keyword, or its digits when it is private or of a repeating group."""
    return (datadict.dictionary_has_tag(tag) and datadict.keyword_for_tag(tag)) or f"{tag:08X}"


def shown_tags(dataset: Dataset) -> list[BaseTag]:
    """Tags of what a document shows: neither pixels, padding nor group lengths."""
    return [tag for tag in sorted(dataset._dict) if tag not in (0x7FE00010, 0xFFFCFFFC) and tag.element]


def agrees(got: dict[str, Any], dataset: Dataset) -> bool:
    """Whether a level has exactly the elements of a data set, with the same values."""
    left = dict(got)
    for tag in shown_tags(dataset):
        key = key_of(tag)
        value, raw = left.pop(key), dataset.get_item(tag)
        if tag.is_private and not tag.is_private_creator and raw.VR == "UN" and isinstance(raw.value, bytes):
            assert value == base64.b64encode(raw.value).decode()  # its VR is not guessed
            continue
        element = dataset[tag]
        assert same(value, element, dataset), f"{key}: {value!r} and {element.value!r}"
    assert not left
    return True


def names(files: str) -> list[str]:
    folder = Path(pydicom.__file__).parent / "data"
    return sorted(path.name for path in folder.glob(f"{files}/*.dcm"))


class TestAgainstPydicom:
    @pytest.mark.parametrize("name", names("test_files") + names("charset_files"))
    def test_every_element(self, pydicom_files: list[Path], name: str) -> None:
        (path,) = (path for path in pydicom_files if path.name == name)
        try:
            levels = read_levels(pydicom.dcmread(path))
            dataset = pydicom.dcmread(path)
        except InvalidDicomError:
            pytest.skip("no file meta")
        merged = {**levels.patient, **levels.study, **levels.series, **levels.instance}
        meta = {key_of(tag): merged.pop(key_of(tag)) for tag in shown_tags(dataset.file_meta)}
        assert levels.discarded == []
        assert agrees(merged, dataset)
        assert agrees(meta, dataset.file_meta)
        assert json.loads(json.dumps(merged, allow_nan=False)) == merged
        for keywords, level in ((PATIENT, "patient"), (STUDY, "study"), (SERIES, "series")):
            assert getattr(levels, level).keys() <= keywords
        assert not levels.instance.keys() & LEVEL_OF.keys()
        assert levels.vrs.keys() == {key_of(tag) for tag in shown_tags(dataset) if key_of(tag) == f"{tag:08X}"}

    @pytest.mark.parametrize("name", names("test_files") + names("charset_files"))
    def test_converted_elements_read_the_same(self, pydicom_files: list[Path], name: str) -> None:
        (path,) = (path for path in pydicom_files if path.name == name)
        try:
            raw, converted = read_levels(pydicom.dcmread(path)), pydicom.dcmread(path)
        except InvalidDicomError:
            pytest.skip("no file meta")
        for _ in converted.iterall():  # converts every element
            pass
        levels = read_levels(converted)
        assert levels.instance.keys() == raw.instance.keys()
        assert levels.vrs.keys() == raw.vrs.keys()
        names = {key: value for key, value in raw.patient.items() if isinstance(value, str)}
        for key, value in names.items():
            assert levels.patient[key].rstrip("=") == value.rstrip("=")


class TestText:
    @pytest.mark.parametrize("name", names("charset_files"))
    def test_names_are_unicode(self, pydicom_files: list[Path], name: str) -> None:
        (path,) = (path for path in pydicom_files if path.name == name)
        dataset = pydicom.dcmread(path)
        levels = read_levels(pydicom.dcmread(path))
        expected = dataset.get("PatientName")
        if expected is not None:
            assert levels.patient["PatientName"].rstrip("=") == str(expected)
            assert "\x1b" not in levels.patient["PatientName"]

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("chrArab.dcm", "قباني^لنزار"),
            ("chrFren.dcm", "Buc^Jérôme"),
            ("chrGreek.dcm", "Διονυσιος"),
            ("chrH31.dcm", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
            ("chrH32.dcm", "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう"),
            ("chrI2.dcm", "Hong^Gildong=洪^吉洞=홍^길동"),
            ("chrRuss.dcm", "Люкceмбypг"),
            ("chrX1.dcm", "Wang^XiaoDong=王^小東="),
            ("chrX2.dcm", "Wang^XiaoDong=王^小东="),
        ],
    )
    def test_known_names(self, pydicom_files: list[Path], name: str, expected: str) -> None:
        (path,) = (path for path in pydicom_files if path.name == name)
        assert read_levels(pydicom.dcmread(path)).patient["PatientName"] == expected

    def test_code_extensions_end_at_delimiters(self) -> None:
        # ISO 2022: Greek after an escape, back to Latin after the caret and after a line break.
        for tag, vr, delimiter in ((0x00100010, "PN", b"^"), (0x00104000, "LT", b"\r\n")):
            dataset = raw_element(tag, vr, b"\x1b-F\xe4\xe9" + delimiter + b"\xe4\xe9 ")
            dataset.SpecificCharacterSet = ["ISO 2022 IR 100", "ISO 2022 IR 126"]
            assert only_patient(read_levels(dataset)) == f"δι{delimiter.decode()}äé"

    def test_items_may_have_their_own_character_set(self) -> None:
        item = Dataset()
        item.SpecificCharacterSet = "ISO_IR 144"
        item.PatientComments = "Люк"
        plain = Dataset()
        plain.PatientComments = "Jérôme"
        dataset = Dataset()
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.ReferencedPatientSequence = Sequence([item, plain])
        got = read_levels(written(dataset)).patient["ReferencedPatientSequence"]
        assert [each["PatientComments"] for each in got] == ["Люк", "Jérôme"]

    def test_latin_9(self) -> None:
        dataset = Dataset()
        dataset.SpecificCharacterSet = "ISO_IR 203"
        dataset.add_new(0x00081030, "LO", "Š 5 €".encode("iso8859_15"))
        assert read_levels(written(dataset)).study["StudyDescription"] == "Š 5 €"

    def test_unknown_character_sets_lose_no_file(self) -> None:
        dataset = raw_element(0x00100010, "PN", b"J\xe9r\xf4me")
        dataset.SpecificCharacterSet = "ISO_IR 9999"
        levels = read_levels(dataset)
        assert levels.discarded == []
        assert levels.patient["PatientName"].startswith("J")

    @pytest.mark.parametrize(
        ("tag", "vr", "raw", "expected"),
        [
            (0x00180060, "DS", b"120 ", "120 "),
            (0x00200013, "IS", b" 1", " 1"),
            (0x00281050, "DS", b"40\\400 ", ["40", "400 "]),
            (0x00281050, "DS", b"40", ["40"]),
            (0x00281050, "DS", b"", None),
            (0x00180060, "DS", b"  ", None),  # nothing but pad
            (0x00281050, "DS", b"40\\ ", ["40", ""]),
            (0x00080060, "CS", b"CT", "CT"),
            (0x00080060, "CS", b"M ", "M"),
            (0x00080008, "CS", b"ORIGINAL\\PRIMARY\\\\0015", ["ORIGINAL", "PRIMARY", "", "0015"]),
            (0x00080018, "UI", b"1.2.3\0", "1.2.3"),
            (0x00080020, "DA", b"20240131", "20240131"),
            (0x00104000, "LT", b"a\\b ", "a\\b"),  # no list in texts that may hold backslashes
            (0x00080060, "CS", b"CT\\MR", ["CT", "MR"]),  # more than the dictionary allows
            (0x00280010, "US", struct.pack("<H", 512), 512),
            (0x00281101, "US", struct.pack("<3H", 256, 0, 16), [256, 0, 16]),
            (0x00189073, "FD", struct.pack("<d", 1.0), 1),
            (0x00189073, "FD", struct.pack("<d", 0.1), 0.1),
            (0x00189073, "FD", struct.pack("<d", math.inf), "Infinity"),
            (0x00189073, "FD", struct.pack("<d", math.nan), "NaN"),
            (0x00720074, "FD", b"", None),
            (0x00186024, "SL", struct.pack("<i", -5), -5),
            (0x00289110, "FL", struct.pack("<f", 0.1), 0.1),
            (0x00280009, "AT", struct.pack("<2H", 0x18, 0x1065), ["00181065"]),
            (0x00282000, "OB", b"\0\x01", "AAE="),
            (0x00420011, "OB", b"", None),
            (0x7FDD1090, "UN", b"", ""),
            (0x7FDD1090, "UN", b"\x01\x02", "AQI="),
        ],
    )
    def test_values(self, tag: int, vr: str, raw: bytes, expected: Any) -> None:
        got = only(read_levels(raw_element(tag, vr, raw)))
        assert got == expected
        assert type(got) is type(expected)


def only_patient(levels: Levels) -> Any:
    (value,) = levels.patient.values()
    return value


class TestNumbers:
    @pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
    def test_byte_order_and_implicit_vrs(self, syntax: str) -> None:
        dataset = Dataset()
        dataset.Rows = 515
        dataset.PixelRepresentation = 1
        dataset.add_new("SmallestImagePixelValue", "SS", -1024)
        dataset.FrameIncrementPointer = 0x00181065
        dataset.DiffusionBValue = 0.25
        dataset.RedPaletteColorLookupTableData = struct.pack("<2H" if syntax != ExplicitVRBigEndian else ">2H", 1, 513)
        dataset["RedPaletteColorLookupTableData"].VR = "OW"
        levels = read_levels(written(dataset, syntax))
        assert levels.instance["Rows"] == 515
        assert levels.instance["SmallestImagePixelValue"] == -1024
        assert levels.instance["FrameIncrementPointer"] == ["00181065"]
        assert levels.instance["DiffusionBValue"] == 0.25
        words = base64.b64decode(levels.instance["RedPaletteColorLookupTableData"])
        assert struct.unpack("<2H", words) == (1, 513)
        assert levels.vrs == {}

    @pytest.mark.parametrize("signed", [0, 1])
    def test_the_sign_of_ambiguous_elements_reaches_into_items(self, signed: int) -> None:
        item = Dataset()
        item.add_new("RealWorldValueFirstValueMapped", "SS" if signed else "US", -3 if signed else 65_000)
        dataset = Dataset()
        dataset.PixelRepresentation = signed
        dataset.RealWorldValueMappingSequence = Sequence([item])
        (got,) = read_levels(written(dataset, ImplicitVRLittleEndian)).instance["RealWorldValueMappingSequence"]
        assert got == {"RealWorldValueFirstValueMapped": -3 if signed else 65_000}


class TestStructure:
    def test_levels(self) -> None:
        dataset = Dataset()
        dataset.PatientName = PersonName("A^B")
        dataset.PatientWeight = "70"
        dataset.FrameOfReferenceUID = "1.2"
        dataset.PixelSpacing = ["1", "2"]
        dataset.ReferencedImageSequence = Sequence()
        levels = read_levels(written(dataset))
        assert levels.patient == {"PatientName": "A^B"}
        assert levels.study == {"PatientWeight": "70"}
        assert levels.series == {"FrameOfReferenceUID": "1.2"}
        assert levels.instance["PixelSpacing"] == ["1", "2 "]
        assert levels.instance["ReferencedImageSequence"] is None
        assert levels.get("PatientWeight") == "70"
        assert levels.get("TransferSyntaxUID") == ExplicitVRLittleEndian
        assert levels.get("Modality") is None

    def test_pixels_and_padding_are_left_out(self) -> None:
        for tag, vr in (
            (0x7FE00010, "OW"),
            (0x7FE00008, "OF"),
            (0x7FE00009, "OD"),
            (0x7FE00001, "OV"),
            (0xFFFCFFFC, "OB"),
            (0x00080000, "UL"),
        ):
            assert read_levels(raw_element(tag, vr, b"\0" * 8)).instance == {}

    def test_repeating_groups_and_private_elements_are_keyed_by_tag(self) -> None:
        dataset = Dataset()
        dataset.add_new(0x60020010, "US", 4)
        block = dataset.private_block(0x7FDD, "ACME PRIVATE 1.0", create=True)
        block.add_new(0x90, "UN", b"\x01\x02")
        levels = read_levels(written(dataset))
        assert levels.instance["60020010"] == 4
        assert levels.instance["7FDD0010"] == "ACME PRIVATE 1.0"
        assert levels.vrs == {"60020010": "US", "7FDD0010": "LO", "7FDD1090": "UN"}

    @pytest.mark.parametrize("keyword", [entry[4] for entry in datadict.DicomDictionary.values() if len(entry[4]) == 8])
    def test_keywords_of_eight_letters_are_no_tags(self, keyword: str) -> None:
        tag = datadict.tag_for_keyword(keyword)
        assert tag is not None
        levels = read_levels(raw_element(tag, datadict.dictionary_VR(tag)[:2], b""))
        assert levels.vrs == {}

    def test_private_elements_of_items(self) -> None:
        item = Dataset()
        item.private_block(0x0009, "ACME", create=True).add_new(1, "LO", "x")
        dataset = Dataset()
        dataset.ReferencedImageSequence = Sequence([item])
        levels = read_levels(written(dataset))
        assert levels.instance["ReferencedImageSequence"] == [{"00090010": "ACME", "00091001": "x"}]
        assert levels.vrs == {}

    def test_an_unreadable_value_is_told_and_the_rest_read(self) -> None:
        dataset = raw_element(0x00280009, "AT", b"\0\0\0")
        dataset.Modality = "CT"
        levels = read_levels(dataset)
        assert levels.discarded == ["FrameIncrementPointer"]
        assert levels.series == {"Modality": "CT"}
        assert "FrameIncrementPointer" not in levels.instance

    @staticmethod
    def nest(depth: int) -> Dataset:
        dataset = Dataset()
        dataset.Modality = "SR"
        for _ in range(depth):
            outer = Dataset()
            outer.ContentSequence = Sequence([dataset])
            dataset = outer
        return dataset

    def test_deep_sequences(self) -> None:
        value: Any = read_levels(self.nest(32)).instance
        for _ in range(32):
            ((value,),) = value.values()
        assert value == {"Modality": "SR"}
        for depth in (33, 200):
            with pytest.raises(ValueError, match="nested"):
                read_levels(self.nest(depth))

    def test_deep_sequences_of_a_file(self) -> None:
        # Undefined lengths all the way down, as a hostile file may have them.
        sequence = struct.pack("<HH2sHI", 0x0040, 0xA730, b"SQ", 0, 0xFFFFFFFF)
        item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
        body = (sequence + item) * 5_000
        try:
            dataset = pydicom.dcmread(BytesIO(body), force=True)
        except RecursionError:
            return  # the parser itself refuses; the import reports that
        with pytest.raises(ValueError, match="nested"):
            read_levels(dataset)


def test_the_first_frames_encoded_in_threads_are_right() -> None:
    """OpenJPH's tables are filled before threads can meet over them: each fork is a first use."""
    script = """
import os, sys, threading
import imagecodecs, numpy as np, pydicom.encaps, pydicom.pixels
from ahi_ml.codec import jpeg2000
image = np.random.default_rng(1).integers(-1000, 1000, (64, 64)).astype(np.int16)
bad = 0
for _ in range(100):
    pid = os.fork()
    if not pid:
        import ahi_ml.local.ingest.frames
        barrier, right = threading.Barrier(4), []
        def encode():
            barrier.wait()
            right.append(np.array_equal(imagecodecs.htj2k_decode(jpeg2000.encode_htj2k(image)), image))
        threads = [threading.Thread(target=encode) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        os._exit(right != [True] * 4)
    bad += os.waitpid(pid, 0)[1] != 0
sys.exit(bad)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
