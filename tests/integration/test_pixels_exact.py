"""Pixels are exact: every real file there is, imported and read back, is bit for bit what pydicom reads.

Files of `shared_data`, of pydicom and of pydicom-data go through the public API: import, search,
fetch, decode. pydicom is the oracle, with whichever of its decoding plugins reads a file first, and
the inventory of `shared_data` a second one. Each file must end as exact pixels or as a failure with
a reason; the table of outcomes is printed. Image sets hold one instance of a UID, so files that
share one go into data stores of their own.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pydicom.data
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_fragments, generate_frames
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import UID, SecondaryCaptureImageStorage, generate_uid

import ahi_ml
from ahi_ml.codec import SYNTAXES, jpeg2000
from ahi_ml.errors import UnsupportedTransferSyntaxError
from ahi_ml.reader import ReadOptions

_PLUGINS = ("gdcm", "pylibjpeg", "pyjpegls", "pillow", "pydicom", "")
"""Oracles in the order they are asked; "" is pydicom itself, which needs none for native pixel data."""

_WITHIN_2 = frozenset({"50", "51", "91", "203"})
"""Ends of the lossy syntaxes whose decoders may differ by rounding (JPEG, JPEG 2000)."""

_UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")

# The only readers of 12-bit JPEG that pydicom knows come with pylibjpeg-libjpeg, which is optional;
# the last file nobody else reads at all (its scan header breaks the rules of sequential JPEG).
_WITHOUT_LIBJPEG = frozenset({"JPGExtended.dcm", "CTImage_JPEGProcess2_4_1.2.840.10008.1.2.4.51.dcm"})
_NO_ORACLE = frozenset({"JPEG-lossy.dcm"})

_REFUSED = frozenset({"TC0265_depth_100.dcm"})
"""Files that are not imported though pydicom reads their pixels: a hundred nested sequences are an attack."""

_NO_FILES = frozenset({".py", ".pyc", ".json", ".csv", ".md", ".gz", ".txt"})


@dataclass(repr=False)
class _File:
    """A file, what pydicom makes of it, and what became of it."""

    name: str
    path: Path
    dataset: Dataset | None
    outcome: str = "unaccounted"
    difference: int | None = None
    note: str = ""
    warning: str = ""
    frames: list[Any] = field(default_factory=list)
    encoded: list[bytes] = field(default_factory=list)

    @property
    def syntax(self) -> str:
        return str(self.dataset.file_meta.get("TransferSyntaxUID", "")) if self.dataset is not None else ""

    @property
    def has_pixels(self) -> bool:
        return self.dataset is not None and "PixelData" in self.dataset

    @property
    def kept(self) -> bool:
        return self.syntax in SYNTAXES and SYNTAXES[self.syntax].kept

    def __repr__(self) -> str:
        return f"<{self.row()}>"

    def row(self) -> str:
        bits = "-"
        if self.has_pixels:
            sign = "s" if self.dataset.get("PixelRepresentation") == 1 else "u"
            bits = f"{self.dataset.get('BitsStored')}/{self.dataset.get('BitsAllocated')}{sign}"
            bits += f"x{self.dataset.get('SamplesPerPixel')}"
        syntax = self.syntax.removeprefix("1.2.840.10008.") or "-"
        difference = "-" if self.difference is None else str(self.difference)
        line = f"{self.outcome:<11} {difference:>4} {syntax:<10} {bits:<10} {len(self.frames):>4} {self.name}"
        return f"{line}  | {self.note}" if self.note else line


def _read(path: Path) -> Dataset | None:
    try:
        dataset = pydicom.dcmread(path)
        if not len(dataset):  # a delimiter is missing where the file ends, which to pydicom is nothing read
            dataset = pydicom.dcmread(io.BytesIO(path.read_bytes() + b"\xfe\xff\xdd\xe0\0\0\0\0"))
        _ = dataset.get("SOPInstanceUID")
    except Exception:  # what pydicom cannot read has no pixels to compare
        return None
    return dataset


def _collect(folder: Path) -> list[_File]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in _NO_FILES)
    return [_File(str(path.relative_to(folder)), path, _read(path)) for path in paths]


def _complete(files: list[_File], folder: Path) -> list[_File]:
    """Copies of images that lack a UID an import asks for, with one: their pixels count as well."""
    copies = []
    for file in files:
        missing = [keyword for keyword in _UIDS if file.has_pixels and not file.dataset.get(keyword)]
        if not missing or not file.syntax:
            continue
        dataset = pydicom.dcmread(file.path)
        for keyword in missing:
            uid = SecondaryCaptureImageStorage if keyword == "SOPClassUID" else generate_uid(None, [file.name, keyword])
            setattr(dataset, keyword, uid)
        path = folder / f"with-uids-{len(copies)}-{file.path.name}"
        dataset.save_as(path)
        copies.append(_File(f"{file.name} (UIDs added)", path, _read(path)))
    return copies


def _rounds(files: list[_File]) -> list[dict[str, _File]]:
    """The fewest groups without two files of one SOP Instance UID."""
    rounds: list[dict[str, _File]] = []
    for number, file in enumerate(files):
        uid = str(file.dataset.get("SOPInstanceUID") or "").strip() if file.dataset is not None else ""
        key = uid or f"file {number}"
        free = next((group for group in rounds if key not in group), None)
        if free is None:
            free = {}
            rounds.append(free)
        free[key] = file
    return rounds


def _survey(files: list[_File], folder: Path) -> None:
    """Import files, read all their frames back and note what became of each."""
    for number, group in enumerate(_rounds(files)):
        source = folder / f"round-{number}"
        source.mkdir()
        names = {}
        for place, file in enumerate(group.values()):
            link = source / f"{place:04d}"
            link.symlink_to(file.path)
            names[link.name] = file
        store = ahi_ml.connect(folder / "store", datastore=f"round-{number}")
        try:
            report = store.import_dicom(source, progress=False)
            assert (report.status, report.scanned) == ("COMPLETED", len(group))
            assert report.imported + len(report.failed) == report.scanned
            for failure in report.failed:
                file = names[Path(failure.input_file).name]
                file.outcome, file.note = "failed", failure.reason
            for remark in report.warnings:
                names[Path(remark.input_file).name].warning = remark.reason
            _read_back(store, group)
        finally:
            store.close()
        imported = [file for file in group.values() if file.outcome != "failed"]
        assert len(imported) == report.imported
        for file in imported:
            if not file.frames and not file.has_pixels:
                file.outcome = "no image"


def _read_back(store: Any, group: dict[str, _File]) -> None:
    index = store.search(primary=None).index()
    sources, places = index.sources(), index.details()
    outcomes = store.reader.submit(sources, ReadOptions(output="stored")).outcomes()
    for place, source, outcome in zip(places, sources, outcomes, strict=True):
        file = group[place["sop_instance_uid"]]
        assert place["frame_number"] == len(file.frames) + 1
        file.outcome = "read"
        file.frames.append(outcome)
        if file.kept:
            file.encoded.append(store.reader.fetch(source.image_set_id, source.frame_id))
    stats = store.reader.stats()
    errors = sum(isinstance(outcome, BaseException) for outcome in outcomes)
    with_checksum = sum(source.checksum is not None for source in sources)
    assert with_checksum == len(sources), "every frame that is imported here has a checksum"
    assert (stats["verified"], stats["unverified"]) == (with_checksum - errors, 0)
    assert stats["refetched"] == 0


def _oracle(dataset: Dataset) -> np.ndarray | None:
    """All frames as pydicom gives them, or None when no plugin can."""
    uid = dataset.file_meta.TransferSyntaxUID
    try:
        available = get_decoder(uid).available_plugins or ("",)
    except NotImplementedError:
        return None
    for plugin in sorted(available, key=_PLUGINS.index):
        try:
            pixels = pixel_array(dataset, raw=True, decoding_plugin=plugin)
        except Exception:  # the next one is asked
            continue
        frames = int(dataset.get("NumberOfFrames") or 1)
        pixels = pixels if frames > 1 else pixels[None]
        return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    return None


def _judge(file: _File, sha256: str | None = None) -> None:
    """Turn "read" into what the comparison says."""
    wrong = next((frame for frame in file.frames if isinstance(frame, BaseException)), None)
    if wrong is not None:
        file.outcome, file.note = "unreadable", str(wrong)
        return
    found = np.stack(file.frames)
    if file.kept:
        assert file.encoded == _encoded(file.dataset), f"{file.name}: the stored bytes are others"
    within_2 = file.syntax.rpartition(".")[2] in _WITHIN_2 and SYNTAXES[file.syntax].codec != "native"
    reference = _oracle(file.dataset)
    if reference is None and not (sha256 and not within_2):
        file.outcome = "no oracle"
        return
    if sha256 and not within_2 and hashlib.sha256(found).hexdigest() != sha256:
        file.outcome, file.note = "different", "not the pixels of the inventory"
        return
    if reference is None:
        file.outcome, file.difference = "exact", 0
        return
    if (found.shape, found.dtype) != (reference.shape, reference.dtype):
        file.outcome = "different"
        file.note = f"{found.dtype}{found.shape}, pydicom: {reference.dtype}{reference.shape}"
        return
    if np.array_equal(found, reference):
        file.outcome, file.difference = "exact", 0
        return
    file.difference = int(np.abs(found.astype(np.int64) - reference.astype(np.int64)).max())
    file.outcome = "within 2" if within_2 and file.difference <= 2 else "different"


def _encoded(dataset: Dataset) -> list[bytes]:
    count = int(dataset.get("NumberOfFrames") or 1)
    if count == 1:
        _, *fragments = generate_fragments(dataset.PixelData)  # the first item is the offset table
        return [b"".join(fragments)]
    return list(generate_frames(dataset.PixelData, number_of_frames=count))


def _inventory(folder: Path) -> dict[str, str]:
    with (folder / "INVENTORY.csv").open(encoding="utf-8", newline="") as file:
        return {row["path"]: row["pixels_sha256"] for row in csv.DictReader(file) if row["decode"] == "ok"}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """pydicom warns of what is odd in a file, and here that is the point of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _folder(collection: str, request: pytest.FixtureRequest) -> Path:
    if collection == "shared":
        return Path(request.getfixturevalue("shared_data"))  # skips when it is not there
    if collection == "pydicom":
        return Path(pydicom.data.__file__).parent
    spec = importlib.util.find_spec("data_store")
    if spec is None or spec.origin is None:
        pytest.skip("pydicom-data is not installed")
    return Path(spec.origin).parent / "data"


def _judged(folder: Path, tmp_path: Path) -> list[_File]:
    """The files of a collection, imported, read back and judged."""
    hashes = _inventory(folder) if (folder / "INVENTORY.csv").is_file() else {}
    found = _collect(folder)
    found += _complete(found, tmp_path)
    _survey(found, tmp_path)
    for file in found:
        if file.outcome == "read":
            _judge(file, hashes.get(file.name))
            file.frames = [None] * len(file.frames)  # the pixels have been looked at
            file.encoded.clear()
    return found


@pytest.mark.parametrize("collection", ["shared", "pydicom", "pydicom-data"])
def test_every_file_is_exact_or_explained(
    collection: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = _judged(_folder(collection, request), tmp_path)
    sys.stdout.write("\n".join(file.row() for file in files))  # every row: for -rP, and when the test fails
    with capsys.disabled():
        sys.stderr.write(_table(collection, files))  # pytest's workers have no other way to the terminal

    outcomes = defaultdict(list)
    for file in files:
        outcomes[file.outcome].append(file)
    assert not outcomes["unaccounted"], "neither read back nor among the failures"
    assert not outcomes["unreadable"], "imported, but not to be read"
    assert not outcomes["different"], "not the pixels that pydicom reads"
    assert {file.path.name for file in outcomes["no oracle"]} - _WITHOUT_LIBJPEG <= _NO_ORACLE
    assert len(outcomes["exact"]) >= 50

    for file in outcomes["failed"]:
        _assert_for_users(file, file.note)
        if file.has_pixels and file.syntax in SYNTAXES and not re.match(r"DICOM attribute \w+UID ", file.note):
            refused = file.path.name in _REFUSED or _oracle(file.dataset) is None
            assert refused, f"{file.name} can be read, but is not imported: {file.note}"
    for file in files:
        if file.warning:
            _assert_for_users(file, file.warning)


def _table(name: str, files: list[_File]) -> str:
    counts = Counter(file.outcome for file in files)
    frames = sum(len(file.frames) for file in files)
    lines = [
        f"\n{name}: {len(files)} files, {frames} frames: " + ", ".join(f"{n} {what}" for what, n in counts.items())
    ]
    lines += [file.row() for file in files if file.outcome not in ("exact", "no image")]
    return "\n".join(lines) + "\n"


_IDENTIFYING = (
    *("PatientName", "PatientID", "PatientBirthDate", "StudyDate", "StudyTime", "AccessionNumber", "StudyID"),
    *("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "InstitutionName", "ReferringPhysicianName"),
    *("StudyDescription", "SeriesDescription", "PatientComments", "OperatorsName", "StationName"),
)


def _assert_for_users(file: _File, text: str) -> None:
    """A reason is words about the file: no Python in it, and nothing that tells whose image it is."""
    assert len(text.split()) >= 3, text
    assert text.isprintable(), text
    assert len(text) < 400, text
    python = re.search(r"\w+(Error|Exception)\b|Traceback|<class|object has no attribute|0x[0-9a-f]{6}|\.py\b", text)
    assert not python, text
    for keyword in _IDENTIFYING if file.dataset is not None else ():
        value = str(file.dataset.get(keyword) or "").strip()
        assert len(value) < 4 or value not in text, f"{keyword} is in the reason of {file.name}"


# Images made here: what the collections have no example of, with the array itself as the oracle.


def _image(bits: int, allocated: int, signed: bool, samples: int, frames: int) -> np.ndarray:
    """Noise over the whole range of stored values, its extremes included; frames differ."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    random = np.random.default_rng([bits, allocated, signed, samples, frames])
    shape = (frames, 19, 34, samples) if samples > 1 else (frames, 19, 34)
    image = random.integers(low, high, shape, f"i{8}", endpoint=True)
    image[:, 0, :2] = np.array([low, high]).reshape((2, 1) if samples > 1 else 2)
    return image.astype(f"{'i' if signed else 'u'}{allocated // 8}")


def _dataset(image: np.ndarray, bits: int, syntax: str, pixel_data: bytes, planar: int = 0) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(None, ["study"]), generate_uid()
    dataset.PatientID = "phantom"
    samples = image.shape[3] if image.ndim == 4 else 1
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = image.shape[:3]
    dataset.SamplesPerPixel = samples
    dataset.PhotometricInterpretation = "RGB" if samples > 1 else "MONOCHROME2"
    if samples > 1:
        dataset.PlanarConfiguration = planar
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 * image.itemsize, bits, bits - 1
    dataset.PixelRepresentation = int(image.dtype.kind == "i")
    dataset.PixelData = pixel_data
    dataset["PixelData"].VR = "OB" if SYNTAXES[syntax].encapsulated or image.itemsize == 1 else "OW"
    dataset["PixelData"].is_undefined_length = SYNTAXES[syntax].encapsulated
    return dataset


def _rle(frame: np.ndarray) -> bytes:
    """Literal runs only (PS3.5 annex G): a segment for each byte of each sample, most significant first."""
    planes = frame.reshape(frame.shape[0], frame.shape[1], -1)
    big = np.ascontiguousarray(planes.astype(planes.dtype.newbyteorder(">")))
    columns = big.view(np.uint8).reshape(-1, planes.shape[2] * planes.itemsize).T
    segments = []
    for column in columns:
        raw = column.tobytes()
        runs = b"".join(bytes([len(raw[at : at + 128]) - 1]) + raw[at : at + 128] for at in range(0, len(raw), 128))
        segments.append(runs + b"\0" * (len(runs) % 2))
    offsets = np.cumsum([64, *map(len, segments[:-1])])
    header = np.zeros(16, "<u4")
    header[0], header[1 : 1 + len(offsets)] = len(segments), offsets
    return header.tobytes() + b"".join(segments)


def _jpeg_ls(frame: np.ndarray) -> bytes:
    """JPEG-LS has no sign: two's complement over the whole container."""
    return bytes(imagecodecs.jpegls_encode(frame.view(f"u{frame.itemsize}")))


def _made() -> Iterator[tuple[str, np.ndarray, Dataset]]:
    """Name, array and data set for each combination of syntax, depth, sign, colour and frames."""
    jpeg = "1.2.840.10008.1.2.4."
    for bits, allocated in ((8, 8), (5, 8), (12, 16), (16, 16), (9, 16), (32, 32), (20, 32)):
        for signed in (False, True):
            for samples, frames in ((1, 1), (1, 3), (3, 2)):
                image = _image(bits, allocated, signed, samples, frames)
                name = f"{bits}/{allocated}{'s' if signed else 'u'}x{samples}, {frames} frames"
                yield f"native {name}", image, _dataset(image, bits, "1.2.840.10008.1.2.1", image.tobytes())
                if samples == 3:
                    planes = np.ascontiguousarray(image.transpose(0, 3, 1, 2)).tobytes()
                    yield f"planar {name}", image, _dataset(image, bits, "1.2.840.10008.1.2.1", planes, planar=1)
                encoders = {"1.2.840.10008.1.2.5": _rle, f"{jpeg}201": jpeg2000.encode_htj2k}
                encoders[f"{jpeg}202"] = jpeg2000.encode_htj2k
                if allocated <= 16:
                    encoders[f"{jpeg}90"] = jpeg2000.encode_j2k
                if allocated <= 16 and not (signed and samples == 3):
                    encoders[f"{jpeg}80"] = _jpeg_ls
                if allocated == 16 and bits == 16 and not signed and samples == 1:
                    encoders[f"{jpeg}70"] = imagecodecs.ljpeg_encode
                for syntax, encode in encoders.items():
                    # More than one fragment a frame and no offset table would be ambiguous: one each.
                    data = encapsulate([bytes(encode(frame)) for frame in image], has_bot=frames != 2)
                    yield f"{SYNTAXES[syntax].name} {name}", image, _dataset(image, bits, syntax, data)


def test_images_of_every_lossless_syntax_and_depth_survive(tmp_path: Path) -> None:
    source = tmp_path / "made"
    source.mkdir()
    expected = {}
    for number, (name, image, dataset) in enumerate(_made()):
        dataset.save_as(source / f"{number:04d}.dcm", enforce_file_format=True)
        expected[str(dataset.SOPInstanceUID)] = (name, image)
    store = ahi_ml.connect(tmp_path / "store")
    try:
        report = store.import_dicom(source, progress=False)
        assert not report.failed
        index = store.search(primary=None).index()
        frames = defaultdict(list)
        for place, frame in zip(
            index.details(), store.reader.read(index.sources(), ReadOptions(output="stored")), strict=True
        ):
            frames[place["sop_instance_uid"]].append(frame)
        assert store.reader.stats()["verified"] == len(index)
    finally:
        store.close()
    assert len(expected) > 150
    wrong = []
    for uid, (name, image) in expected.items():
        found = np.stack(frames[uid])
        if found.dtype != image.dtype or not np.array_equal(found, image):
            wrong.append(name)
    assert not wrong


def test_a_video_is_kept_as_one_stream_without_its_offset_table(tmp_path: Path) -> None:
    stream = np.random.default_rng(0).bytes(3000)
    source = tmp_path / "source"
    source.mkdir()
    image = _image(8, 8, False, 3, 5)
    names = {}
    for table, count in ((False, 1), (True, 1), (False, 3)):  # offset table, fragments
        data = encapsulate([stream], fragments_per_frame=count, has_bot=table)
        dataset = _dataset(image, 8, "1.2.840.10008.1.2.4.102", data)
        dataset.save_as(source / f"{table}-{count}.dcm", enforce_file_format=True)
        names[str(dataset.SOPInstanceUID)] = f"{table}-{count}"
    store = ahi_ml.connect(tmp_path / "store")
    try:
        assert not store.import_dicom(source, progress=False).failed
        index = store.search().index()
        assert len(index) == 3
        for place, source_of in zip(index.details(), index.sources(), strict=True):
            kept = store.reader.fetch(source_of.image_set_id, source_of.frame_id)
            assert kept == stream, names[place["sop_instance_uid"]]
        (outcome, *_) = store.reader.submit(index.sources(), ReadOptions(output="stored")).outcomes()
        assert isinstance(outcome, UnsupportedTransferSyntaxError)
        assert "video" in str(outcome)
    finally:
        store.close()


def test_a_reason_never_quotes_a_value(tmp_path: Path) -> None:
    """Values that stand where numbers belong may be a name that slipped into the wrong field."""
    planted = "Planted^Jane"
    image = _image(8, 8, False, 1, 1)
    source = tmp_path / "source"
    source.mkdir()
    for keyword in ("NumberOfFrames", "BitsAllocated", "BitsStored", "Rows", "SamplesPerPixel", "PixelRepresentation"):
        dataset = _dataset(image, 8, "1.2.840.10008.1.2.1", image.tobytes())
        vr = "IS" if keyword == "NumberOfFrames" else "LO"
        buffer = io.BytesIO()
        del dataset[keyword]
        dataset.save_as(buffer, enforce_file_format=True)
        _splice(buffer, pydicom.datadict.tag_for_keyword(keyword), vr, planted, source / f"{keyword}.dcm")
    dataset = _dataset(image, 8, "1.2.840.10008.1.2.1", image.tobytes())
    dataset.PhotometricInterpretation = planted
    dataset.save_as(source / "PhotometricInterpretation.dcm", enforce_file_format=True)
    meta = _dataset(image, 8, "1.2.840.10008.1.2.1", image.tobytes())
    buffer = io.BytesIO()
    meta.save_as(buffer, enforce_file_format=True)
    wrong = buffer.getvalue().replace(b"1.2.840.10008.1.2.1\0", planted.encode().ljust(20), 1)
    (source / "TransferSyntaxUID.dcm").write_bytes(wrong)

    store = ahi_ml.connect(tmp_path / "store")
    try:
        report = store.import_dicom(source, progress=False)
    finally:
        store.close()
    assert len(report.failed) >= 6
    for line in (*report.failed, *report.warnings):
        assert "Planted" not in line.reason, line.input_file
        assert "Jane" not in line.reason, line.input_file
        assert not re.search(r"\w+Error|object has no attribute", line.reason), line.reason


def _splice(buffer: io.BytesIO, tag: int | None, vr: str, value: str, path: Path) -> None:
    """Write a file with one more element, whatever its VR, at its place."""
    assert tag is not None
    data = buffer.getvalue()
    element = bytes.fromhex(f"{tag >> 16:04x}{tag & 0xFFFF:04x}")
    element = element[1::-1] + element[:1:-1] + vr.encode() + len(value).to_bytes(2, "little") + value.encode()
    pixels = data.rindex(b"\xe0\x7f\x10\x00O")
    path.write_bytes(data[:pixels] + element + data[pixels:])
