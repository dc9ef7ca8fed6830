"""Odd and hostile pixel data, made by a seed: exact pixels, a warning with its code, or a reason."""

from __future__ import annotations

import itertools
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.config import IGNORE
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    HTJ2K,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from ahi_ml import codec
from ahi_ml.local.blobs import BlobStore
from ahi_ml.local.catalog import Datastore
from ahi_ml.local.ingest.frames import pixel_format
from ahi_ml.local.ingest.image_sets import Instance
from ahi_ml.local.ingest.instances import Refusal, read_instance
from ahi_ml.local.settings import Limits
from ahi_ml.local.uris import InputFile

STORE = Datastore("0" * 32, "pixels", "ACTIVE", "HTJ2K", 0.0, 0.0)
NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
Read = Callable[[Dataset], Instance | Refusal]


@pytest.fixture(autouse=True)
def _quiet_pydicom() -> Iterator[None]:
    """It remarks on odd values, which are the point here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pydicom")
        yield


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def read(blobs: BlobStore) -> Read:
    def read(dataset: Dataset | bytes) -> Instance | Refusal:
        file = dataset if isinstance(dataset, bytes) else written(dataset)
        return read_instance(InputFile("file.dcm", len(file), lambda: BytesIO(file)), STORE, blobs, Limits())

    return read


@pytest.fixture
def pixels_of(blobs: BlobStore) -> Callable[[Instance, Dataset], np.ndarray]:
    def pixels_of(instance: Instance, dataset: Dataset) -> np.ndarray:
        """The frames as a reader gets them."""
        described = pixel_format(dataset)
        syntax = instance.stored_syntax
        return np.stack([codec.decode(blobs.read(row.blob), syntax, described) for row in instance.rows])

    return pixels_of


def written(dataset: Dataset) -> bytes:
    file = BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def random(shape: Sequence[int], bits: int = 16) -> np.ndarray:
    made = np.random.default_rng(5).integers(0, 1 << bits, shape)
    return made.astype("u1" if bits <= 8 else "u2")


def image(shape: Sequence[int], syntax: str = ExplicitVRLittleEndian, *, bits: int = 16, samples: int = 1) -> Dataset:
    """An instance of so many frames, rows and columns; its pixel data is yet to come."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    for number, keyword in enumerate(("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")):
        setattr(dataset, keyword, f"1.2.826.0.1.3680043.10.7.{number}")
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = shape
    dataset.SamplesPerPixel = samples
    dataset.PhotometricInterpretation = "RGB" if samples == 3 else "MONOCHROME2"
    if samples == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit = bits - 1
    dataset.PixelRepresentation = 0
    return dataset


def filled(dataset: Dataset, data: bytes, *, vr: str = "OW", undefined: bool = False) -> Dataset:
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = vr
    dataset["PixelData"].is_undefined_length = undefined
    return dataset


def items(*fragments: bytes, table: Sequence[int] = ()) -> bytes:
    """Fragments as they are encapsulated, behind a Basic Offset Table."""
    first = struct.pack(f"<{len(table)}I", *table)
    return b"".join(b"\xfe\xff\x00\xe0" + struct.pack("<I", len(item)) + item for item in (first, *fragments))


def even(stream: bytes) -> bytes:
    return stream + b"\0" * (len(stream) % 2)


def rle(frame: np.ndarray) -> bytes:
    planes = frame.astype(">u2").tobytes()
    segments = []
    for byte in range(2):
        runs = (planes[byte::2][at : at + 128] for at in range(0, frame.size, 128))
        segments.append(even(b"".join(bytes([len(run) - 1]) + run for run in runs)))
    return struct.pack("<16I", 2, 64, 64 + len(segments[0]), *[0] * 13) + b"".join(segments)


ENCODERS = {
    RLELossless: rle,
    JPEG2000Lossless: lambda frame: imagecodecs.jpeg2k_encode(frame, reversible=True, codecformat="J2K"),
    HTJ2K: lambda frame: imagecodecs.htj2k_encode(frame, reversible=True),
    JPEGLSLossless: imagecodecs.jpegls_encode,
    JPEGLosslessSV1: imagecodecs.ljpeg_encode,
}


def codes(instance: Instance | Refusal) -> list[int]:
    assert isinstance(instance, Instance), instance
    return [warning["warning_reason_code"] for warning in instance.warnings]


def reason(refusal: Instance | Refusal) -> str:
    assert isinstance(refusal, Refusal)
    assert not refusal.server
    return refusal.reason


@pytest.mark.parametrize("syntax", NATIVE)
class TestNative:
    @pytest.mark.parametrize("shape", [(4, 3, 5), (9, 7, 7), (3, 1, 1), (2, 8, 8)])
    def test_single_bits_whose_frames_begin_within_bytes(
        self, syntax: str, shape: tuple[int, int, int], read: Read, pixels_of: Any
    ) -> None:
        mask = random(shape, 1)
        dataset = filled(image(shape, syntax, bits=1), np.packbits(mask.ravel(), bitorder="little").tobytes(), vr="OB")
        instance = read(dataset)
        assert codes(instance) == []
        assert np.array_equal(pixels_of(instance, dataset), mask)

    def test_frames_of_subsampled_colour(self, syntax: str, read: Read, pixels_of: Any) -> None:
        pairs = random((2, 4, 3, 4), 8)  # two luminances, two colour differences
        whole = np.stack([pairs[..., [0, 2, 3]], pairs[..., [1, 2, 3]]], axis=3).reshape(2, 4, 6, 3)
        dataset = filled(image((2, 4, 6), syntax, bits=8, samples=3), pairs.tobytes(), vr="OB")
        dataset.PhotometricInterpretation = "YBR_FULL_422"
        instance = read(dataset)
        assert codes(instance) == []
        assert np.array_equal(pixels_of(instance, dataset), whole)

    def test_colour_that_is_not_subsampled_as_it_says(self, syntax: str, read: Read, pixels_of: Any) -> None:
        whole = random((2, 4, 6, 3), 8)
        dataset = filled(image((2, 4, 6), syntax, bits=8, samples=3), whole.tobytes(), vr="OB")
        dataset.PhotometricInterpretation = "YBR_FULL_422"
        assert np.array_equal(pixels_of(read(dataset), dataset), whole)

    @pytest.mark.parametrize("planar", [0, 1])
    def test_planes(self, syntax: str, planar: int, read: Read, pixels_of: Any) -> None:
        whole = random((2, 5, 7, 3))
        layout = whole.transpose(0, 3, 1, 2) if planar else whole
        order = ">u2" if syntax == ExplicitVRBigEndian else "<u2"
        dataset = filled(image((2, 5, 7), syntax, samples=3), layout.astype(order).tobytes())
        dataset.PlanarConfiguration = planar
        assert np.array_equal(pixels_of(read(dataset), dataset), whole)


class TestNativeOddities:
    def test_big_endian_bytes_in_words(self, read: Read, pixels_of: Any) -> None:
        whole = random((2, 3, 5), 8)
        dataset = filled(image((2, 3, 5), ExplicitVRBigEndian, bits=8), whole.ravel().view("u2").byteswap().tobytes())
        assert np.array_equal(pixels_of(read(dataset), dataset), whole)

    def test_a_colour_space_that_is_younger_than_pydicom(self, read: Read, pixels_of: Any) -> None:
        whole = random((1, 4, 6, 3), 8)
        dataset = filled(image((1, 4, 6), bits=8, samples=3), whole.tobytes(), vr="OB")
        dataset.PhotometricInterpretation = "XYB"
        assert np.array_equal(pixels_of(read(dataset), dataset), whole)

    def test_blanks_around_a_colour_space_mean_nothing(self, read: Read, pixels_of: Any) -> None:
        whole = random((1, 4, 6))
        dataset = filled(image(whole.shape), whole.tobytes())
        dataset["PhotometricInterpretation"] = DataElement(0x00280004, "CS", " MONOCHROME2 ", validation_mode=IGNORE)
        assert np.array_equal(pixels_of(read(dataset), dataset), whole)

    @pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
    @pytest.mark.parametrize("name", ["DOE^JANE", "monochrome1"])
    def test_colour_spaces_that_are_none(self, name: str, syntax: str, read: Read) -> None:
        whole = random((1, 4, 6))
        native = syntax == ExplicitVRLittleEndian
        data = whole.tobytes() if native else items(rle(whole[0]))
        dataset = filled(image(whole.shape, syntax), data, vr="OW" if native else "OB", undefined=not native)
        dataset["PhotometricInterpretation"] = DataElement(0x00280004, "CS", name, validation_mode=IGNORE)
        assert reason(read(dataset)) == "PhotometricInterpretation is no term that DICOM defines"

    def test_more_frames_than_it_says(self, read: Read, pixels_of: Any) -> None:
        whole = random((3, 4, 6))
        dataset = filled(image((2, 4, 6)), whole.tobytes())
        instance = read(dataset)
        assert codes(instance) == [0xB111]
        assert np.array_equal(pixels_of(instance, dataset), whole)

    def test_bytes_behind_the_last_frame(self, read: Read, pixels_of: Any) -> None:
        whole = random((2, 4, 6))
        dataset = filled(image((2, 4, 6)), whole.tobytes() + bytes(100))
        instance = read(dataset)
        assert codes(instance) == [0xB006]
        assert np.array_equal(pixels_of(instance, dataset), whole)

    @pytest.mark.parametrize("held", [1, 2])
    def test_no_frames_is_not_what_it_means(self, held: int, read: Read, pixels_of: Any) -> None:
        whole = random((held, 4, 6))
        dataset = filled(image((0, 4, 6)), whole.tobytes())
        instance = read(dataset)
        assert set(codes(instance)) == {0xB111}
        assert np.array_equal(pixels_of(instance, dataset), whole)

    def test_fewer_frames_than_it_says(self, read: Read) -> None:
        dataset = filled(image((4, 4, 6)), random((3, 4, 6)).tobytes())
        assert reason(read(dataset)) == "the pixel data ends after 144 bytes, but its 4 frames take 192"

    def test_encapsulated_pixel_data_is_not_taken_for_pixels(self, read: Read) -> None:
        dataset = filled(image((1, 8, 8), RLELossless), items(rle(random((8, 8)))), vr="OB", undefined=True)
        lying = written(dataset).replace(RLELossless.encode(), ExplicitVRLittleEndian.encode())  # as long
        assert "is encapsulated" in reason(read(lying))

    @pytest.mark.parametrize(("shift", "taken"), [(0, True), (4, False)])
    def test_high_bit(self, shift: int, taken: bool, read: Read, pixels_of: Any) -> None:
        whole = random((1, 4, 6), 12)
        dataset = filled(image((1, 4, 6)), (whole << shift).tobytes())
        dataset.BitsStored, dataset.HighBit = 12, 15
        found = read(dataset)
        if taken:
            assert np.array_equal(pixels_of(found, dataset), whole)
        else:
            assert "HighBit is 15" in reason(found)

    @pytest.mark.parametrize(
        ("keyword", "value", "words"),
        [
            ("PixelRepresentation", None, "DICOM attribute PixelRepresentation does not exist"),
            ("PixelRepresentation", 2, "PixelRepresentation is 2"),
            ("PlanarConfiguration", None, "DICOM attribute PlanarConfiguration does not exist"),
            ("PlanarConfiguration", 5, "PlanarConfiguration is neither 0 nor 1"),
        ],
    )
    def test_attributes_that_no_one_may_guess(self, keyword: str, value: int | None, words: str, read: Read) -> None:
        dataset = filled(image((1, 4, 6), samples=3), random((1, 4, 6, 3)).tobytes())
        setattr(dataset, keyword, value)
        assert words in reason(read(dataset))


@pytest.mark.parametrize("syntax", ENCODERS)
class TestFragments:
    SHAPE = (3, 19, 23)

    def streams(self, syntax: str) -> tuple[np.ndarray, list[bytes]]:
        whole = random(self.SHAPE)
        return whole, [even(ENCODERS[syntax](frame)) for frame in whole]

    @pytest.mark.parametrize(
        ("change", "warned"),
        [
            (lambda right: right, False),
            (lambda right: [], False),
            (lambda right: [0] * 3, True),
            (lambda right: [offset + 1 for offset in right], True),
            (lambda right: right[::-1], True),
            (lambda right: right[:2], True),
            (lambda right: [*right, 2**31], True),
            (lambda right: [0, 2**32 - 1, 2**32 - 8], True),
            (lambda right: [offset + 500 for offset in right], True),
        ],
    )
    def test_offset_tables(self, syntax: str, change: Any, warned: bool, read: Read, pixels_of: Any) -> None:
        whole, streams = self.streams(syntax)
        right = [0, *itertools.accumulate(len(stream) + 8 for stream in streams[:2])]
        data = items(*streams, table=change(right))
        dataset = filled(image(self.SHAPE, syntax), data, vr="OB", undefined=True)
        instance = read(dataset)
        assert codes(instance) == ([0xB112] if warned else [])
        assert np.array_equal(pixels_of(instance, dataset), whole)

    @pytest.mark.parametrize("table", [struct.pack("<3Q", 0, 1, 2), struct.pack("<2Q", 0, 1000), b"odd"])
    def test_extended_offset_tables(self, syntax: str, table: bytes, read: Read, pixels_of: Any) -> None:
        whole, streams = self.streams(syntax)
        dataset = filled(image(self.SHAPE, syntax), items(*streams), vr="OB", undefined=True)
        dataset.ExtendedOffsetTable = dataset.ExtendedOffsetTableLengths = table
        instance = read(dataset)
        assert codes(instance) == [0xB112]
        assert np.array_equal(pixels_of(instance, dataset), whole)

    def test_frames_in_pieces(self, syntax: str, read: Read, pixels_of: Any) -> None:
        whole, streams = self.streams(syntax)
        pieces = [piece for stream in streams for piece in (stream[:200], b"", stream[200:])]
        dataset = filled(image(self.SHAPE, syntax), items(*pieces), vr="OB", undefined=True)
        instance = read(dataset)
        assert codes(instance) == []
        assert np.array_equal(pixels_of(instance, dataset), whole)

    @pytest.mark.parametrize("said", [1, 2])
    def test_more_frames_than_it_says(self, syntax: str, said: int, read: Read, pixels_of: Any) -> None:
        whole, streams = self.streams(syntax)
        dataset = filled(image((said, *self.SHAPE[1:]), syntax), items(*streams), vr="OB", undefined=True)
        instance = read(dataset)
        assert codes(instance) == [0xB111]
        assert np.array_equal(pixels_of(instance, dataset), whole)

    @pytest.mark.parametrize("said", [4, 10**9])
    def test_fewer_frames_than_it_says(self, syntax: str, said: int, read: Read) -> None:
        _, streams = self.streams(syntax)
        dataset = filled(image((said, *self.SHAPE[1:]), syntax), items(*streams), vr="OB", undefined=True)
        assert reason(read(dataset)) == f"NumberOfFrames is {said}, but the pixel data holds 3 frames"

    def test_a_stream_that_is_cut_short(self, syntax: str, read: Read) -> None:
        _, streams = self.streams(syntax)
        streams[1] = streams[1][: len(streams[1]) // 4 * 2]
        dataset = filled(image(self.SHAPE, syntax), items(*streams), vr="OB", undefined=True)
        assert reason(read(dataset)).startswith("frame 2 of 3 cannot be read: ")

    def test_a_file_without_the_last_delimiter(self, syntax: str, read: Read, pixels_of: Any) -> None:
        whole, streams = self.streams(syntax)
        dataset = filled(image(self.SHAPE, syntax), items(*streams), vr="OB", undefined=True)
        file = written(dataset)
        instance = read(file[:-8])
        assert codes(instance) == [0xB007]
        assert np.array_equal(pixels_of(instance, dataset), whole)
        assert reason(read(file[: -8 - len(streams[2]) // 2])).startswith("frame 3 of 3 cannot be read: ")
        assert reason(read(file[: -16 - len(streams[2])])) == "NumberOfFrames is 3, but the pixel data holds 2 frames"

    def test_frames_of_another_size(self, syntax: str, read: Read) -> None:
        _, streams = self.streams(syntax)
        dataset = filled(image((3, 19, 24), syntax), items(*streams), vr="OB", undefined=True)
        assert re.search(r"the metadata says \(19, 24\)$", reason(read(dataset)))

    def test_a_table_that_was_left_out(self, syntax: str, read: Read, pixels_of: Any) -> None:
        whole, streams = self.streams(syntax)
        dataset = filled(image(self.SHAPE, syntax), items(*streams)[8:], vr="OB", undefined=True)
        instance = read(dataset)
        assert codes(instance) == [0xB112]
        assert np.array_equal(pixels_of(instance, dataset), whole)

    def test_no_fragments(self, syntax: str, read: Read) -> None:
        dataset = filled(image((1, 19, 23), syntax), items(), vr="OB", undefined=True)
        assert reason(read(dataset)) == "the pixel data holds no fragments"


@pytest.mark.parametrize("padding", [b"\0\0", b"\0" * 6, b"\x05padding"])
def test_padding_behind_run_length_segments(padding: bytes, read: Read, pixels_of: Any) -> None:
    whole = random((2, 19, 23))
    dataset = filled(
        image(whole.shape, RLELossless), items(*(rle(frame) + padding for frame in whole)), vr="OB", undefined=True
    )
    instance = read(dataset)
    assert codes(instance) == []
    assert np.array_equal(pixels_of(instance, dataset), whole)


@pytest.mark.parametrize("shape", [(1, 9, 5), (2, 9, 5)])
def test_encoded_single_bits_are_packed(shape: tuple[int, int, int], read: Read, pixels_of: Any) -> None:
    mask = random(shape, 1)
    streams = [even(imagecodecs.jpeg2k_encode(frame, reversible=True, codecformat="J2K")) for frame in mask]
    dataset = filled(image(shape, JPEG2000Lossless, bits=1), items(*streams), vr="OB", undefined=True)
    instance = read(dataset)
    assert isinstance(instance, Instance)
    assert instance.stored_syntax == ExplicitVRLittleEndian
    assert np.array_equal(pixels_of(instance, dataset), mask)


class TestHostile:
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # OpenJPH's own
    @pytest.mark.parametrize("at", [400, 1450, 2800])
    def test_a_high_throughput_stream_with_a_wrong_byte(self, at: int, read: Read) -> None:
        rows, columns = np.mgrid[:64, :64]
        smooth = (np.sin(rows / 9) * 500 + columns + 1000 + random((64, 64), 4)).astype("u2")
        stream = bytearray(even(imagecodecs.htj2k_encode(smooth, reversible=True)))
        stream[at] ^= 0x5A
        dataset = filled(image((1, 64, 64), HTJ2K), items(bytes(stream)), vr="OB", undefined=True)
        assert "a damaged HTJ2K stream" in reason(read(dataset))

    def test_a_jpeg_that_is_cut_short(self, read: Read) -> None:
        stream = even(imagecodecs.jpeg8_encode(random((64, 64), 8))[:-400])
        dataset = filled(image((1, 64, 64), JPEGBaseline8Bit, bits=8), items(stream), vr="OB", undefined=True)
        assert "ends without its end marker" in reason(read(dataset))

    def test_a_small_stream_of_a_huge_image(self, read: Read) -> None:
        stream = bytearray(imagecodecs.jpeg8_encode(np.zeros((64, 64), np.uint8)))
        at = stream.index(b"\xff\xc0")
        stream[at + 5 : at + 9] = struct.pack(">HH", 30_000, 30_000)
        data = items(even(bytes(stream)))
        dataset = filled(image((1, 30_000, 30_000), JPEGBaseline8Bit, bits=8), data, vr="OB", undefined=True)
        assert "is taken for an attack" in reason(read(dataset))

    def test_native_pixel_data_is_not_taken_for_fragments(self, read: Read) -> None:
        dataset = filled(image((1, 8, 8)), random((1, 8, 8)).tobytes())
        lying = written(dataset).replace(ExplicitVRLittleEndian.encode(), RLELossless.encode())
        assert "is not in fragments" in reason(read(lying))

    @pytest.mark.parametrize(("keyword", "bits"), [("FloatPixelData", 32), ("DoubleFloatPixelData", 64)])
    def test_floating_point_pixels(self, keyword: str, bits: int, read: Read) -> None:
        dataset = image((1, 4, 6), bits=bits)
        del dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation
        setattr(dataset, keyword, bytes(4 * 6 * bits // 8))
        assert "Float Pixel Data" in reason(read(dataset))

    def test_a_video_without_a_stream(self, read: Read) -> None:
        syntax = "1.2.840.10008.1.2.4.102"
        dataset = filled(image((30, 480, 640), syntax, bits=8, samples=3), items(), vr="OB", undefined=True)
        assert reason(read(dataset)) == "the pixel data holds no video stream"

    def test_a_deflated_data_set_that_inflates_without_end(self, read: Read) -> None:
        deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        head = written(image((1, 1, 1), DeflatedExplicitVRLittleEndian))[: 132 + 12 + 4 + 200]
        zeros = deflater.compress(bytes(2**20)) + deflater.flush(zlib.Z_FULL_FLUSH)
        (length,) = struct.unpack_from("<I", head, 140)
        found = read(head[: 144 + length] + zeros * 300)
        assert "is taken for an attack" in reason(found)


class TestCutFiles:
    """A file that ends too early is no instance without pixels."""

    @pytest.fixture
    def whole(self) -> Dataset:
        dataset = filled(image((1, 4, 6)), random((1, 4, 6)).tobytes())
        dataset.SeriesDescription = "described"
        return dataset

    def test_within_a_value(self, whole: Dataset, read: Read) -> None:
        file = written(whole)
        assert reason(read(file[: file.index(b"MONOCHROME2") + 4])).endswith("the file ends inside one of them")

    def test_before_the_pixel_data(self, whole: Dataset, read: Read) -> None:
        file = written(whole)
        assert codes(read(file[: file.index(b"\xe0\x7f\x10\0")])) == [0xB007]

    def test_within_a_sequence_of_an_encapsulated_image(self, read: Read) -> None:
        dataset = filled(image((1, 8, 8), RLELossless), items(rle(random((8, 8)))), vr="OB", undefined=True)
        dataset.ReferencedImageSequence = [Dataset()]
        dataset["ReferencedImageSequence"].is_undefined_length = True
        file = written(dataset)
        cut = read(file[: file.index(b"\xfe\xff\xdd\xe0")])
        assert reason(cut) == "DICOM attributes cannot be read: the file ends inside one of them"

    def test_items_outside_of_sequences_are_not_the_end(self, whole: Dataset, read: Read) -> None:
        del whole.PixelData, whole.Rows
        assert codes(read(written(whole) + b"\xfe\xff\0\xe0" + bytes(4))) == []


class TestUids:
    @pytest.mark.parametrize("uid", ["1..2", ".1.2", "1.2.", "../../x", "1.2x"])
    def test_what_is_none_is_told(self, uid: str, read: Read) -> None:
        file = written(filled(image((1, 4, 6)), random((1, 4, 6)).tobytes()))
        old = b"UI\x1a\0" + b"1.2.826.0.1.3680043.10.7.1"
        assert codes(read(file.replace(old, b"UI\x1a\0" + uid.encode().ljust(26, b"\0")))) == [0xB201]

    def test_a_transfer_syntax_that_is_none(self, read: Read) -> None:
        file = written(filled(image((1, 4, 6)), random((1, 4, 6)).tobytes()))
        file = file.replace(ExplicitVRLittleEndian.encode(), b"DOE^JANE".ljust(len(ExplicitVRLittleEndian), b"\0"))
        assert reason(read(file)) == "DICOM attribute TransferSyntaxUID is not a UID"

    def test_several_are_none(self, read: Read) -> None:
        file = written(filled(image((1, 4, 6)), random((1, 4, 6)).tobytes()))
        file = file.replace(b"1.2.826.0.1.3680043.10.7.1", b"1.2.826.0.1\\3680043.10.7.1")
        assert reason(read(file)) == "DICOM attribute SeriesInstanceUID has several values"
