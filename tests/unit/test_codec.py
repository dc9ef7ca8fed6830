"""Encoded frames to stored values: real codestreams, round trips, second opinions, and hostile bytes."""

from __future__ import annotations

import csv
import hashlib
import re
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import openjpeg
import pytest
from pydicom.uid import UID

from ahi_ml import codec
from ahi_ml.codec import EXPLICIT_LE, HTJ2K_LOSSLESS_RPCL, SYNTAXES, PixelFormat, decoders, jpeg2000
from ahi_ml.errors import DecodeError, UnsupportedTransferSyntaxError

J2K = "1.2.840.10008.1.2.4.90"
JPEG_LS = "1.2.840.10008.1.2.4.80"
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
RLE = "1.2.840.10008.1.2.5"

DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4")
SHAPES = ((1, 1), (1, 9), (9, 1), (5, 3), (64, 64), (65, 129), (200, 131), (33, 17, 3), (1, 1, 3))
ENCODERS = {HTJ2K_LOSSLESS_RPCL: jpeg2000.encode_htj2k, J2K: jpeg2000.encode_j2k}


def format_of(image: np.ndarray, bits: int | None = None) -> PixelFormat:
    """The `PixelFormat` that describes an array."""
    samples = image.shape[2] if image.ndim == 3 else 1
    return PixelFormat(
        rows=image.shape[0],
        columns=image.shape[1],
        samples=samples,
        bits_allocated=8 * image.itemsize,
        bits_stored=bits or 8 * image.itemsize,
        signed=image.dtype.kind == "i",
        photometric="RGB" if samples == 3 else "MONOCHROME2",
    )


def noise(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values over the whole range of a dtype, its extremes among them."""
    limits = np.iinfo(dtype)
    image = np.random.default_rng(list(shape)).integers(limits.min, limits.max, shape, dtype, endpoint=True)
    image.flat[0] = limits.min
    image.flat[-1] = limits.max
    return image


def checkered(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The extremes of a dtype in turn: the largest wavelet coefficients there are."""
    limits = np.iinfo(dtype)
    return np.where(np.indices(shape).sum(0) % 2, limits.max, limits.min).astype(dtype)


def smooth(rows: int = 150, columns: int = 140, dtype: str = "u2") -> np.ndarray:
    """A slope of distinct values."""
    return np.arange(rows * columns).reshape(rows, columns).astype(dtype)


def jp2(codestream: bytes, image: np.ndarray, *, long_length: bool = False) -> bytes:
    """A codestream in the boxes of a JP2 file (T.800 annex I)."""

    def box(kind: bytes, payload: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(payload), kind) + payload

    components = image.shape[2] if image.ndim == 3 else 1
    depth = 8 * image.itemsize - 1 | (0x80 if image.dtype.kind == "i" else 0)
    header = struct.pack(">IIHBBBB", *image.shape[:2], components, depth, 7, 0, 0)
    colour = struct.pack(">BBBI", 1, 0, 0, 16 if components == 3 else 17)
    boxes = box(b"jP  ", bytes.fromhex("0d0a870a")) + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
    boxes += box(b"jp2h", box(b"ihdr", header) + box(b"colr", colour))
    if long_length:
        return boxes + struct.pack(">I4sQ", 1, b"jp2c", 16 + len(codestream)) + codestream
    return boxes + struct.pack(">I4s", 0, b"jp2c") + codestream  # 0: to the end, as the service writes it


def markers(stream: bytes) -> list[int]:
    """The markers of a codestream, tile-part headers included (T.800 annex A)."""
    found, at, begin = [], 2, 0
    while at + 2 <= len(stream):
        (marker,) = struct.unpack_from(">H", stream, at)
        found.append(marker)
        if marker == 0xFFD9:
            break
        if marker == 0xFF90:
            begin, psot = at, struct.unpack_from(">I", stream, at + 6)[0]
        if marker == 0xFF93:  # SOD: to the next tile-part
            at = begin + psot
            continue
        at += 2 + struct.unpack_from(">H", stream, at + 2)[0]
    return found


class TestReferenceStreams:
    """HTJ2K codestreams by other encoders."""

    @pytest.mark.parametrize("boxed", [False, True], ids=["raw", "JP2"])
    @pytest.mark.parametrize("name", ["CT1", "MR4", "NM1", "US1"])
    def test_decode_to_their_reference(self, shared_data: Path, name: str, boxed: bool) -> None:
        folder = shared_data / "htj2k" / "codestreams"
        stream = (folder / f"{name}.j2c").read_bytes()
        with (shared_data / "INVENTORY.csv").open(encoding="utf-8", newline="") as file:
            row = next(row for row in csv.DictReader(file) if row["path"] == f"htj2k/codestreams/{name}.j2c")
        shape = tuple(map(int, row["shape"].split("x")))
        expected = np.fromfile(folder / f"{name}.RAW", np.dtype(row["dtype"])).reshape(shape)
        found = codec.decode(jp2(stream, expected) if boxed else stream, HTJ2K_LOSSLESS_RPCL, format_of(expected))
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
        assert hashlib.sha256(found).hexdigest() == row["pixels_sha256"]

    def test_odd_sizes(self, shared_data: Path) -> None:
        """The second stream's image begins in column 1 of its reference grid: it is 16 wide, not 17."""
        folder = shared_data / "htj2k" / "openjph-odd-sizes"
        header, pixels = (folder / "tall_narrow.ppm").read_bytes().split(b"\n255\n", 1)
        assert header.split()[0] == b"P6"
        expected = np.frombuffer(pixels, np.uint8).reshape(256, 16, 3)
        for name in ("simple_enc_rev53_tall_narrow.j2c", "simple_enc_rev53_tall_narrow1.j2c"):
            stream = (folder / name).read_bytes()
            assert np.array_equal(codec.decode(stream, HTJ2K_LOSSLESS_RPCL, format_of(expected)), expected)


class TestRoundTrips:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_htj2k_keeps_every_bit(self, dtype: str, shape: tuple[int, ...]) -> None:
        for image in (noise(dtype, shape), checkered(dtype, shape), np.full(shape, np.iinfo(dtype).min, dtype)):
            stream = jpeg2000.encode_htj2k(image)
            for data in (stream, memoryview(stream), jp2(stream, image), jp2(stream, image, long_length=True)):
                found = codec.decode(data, HTJ2K_LOSSLESS_RPCL, format_of(image))
                assert (found.dtype, found.shape) == (image.dtype, image.shape)
                assert np.array_equal(found, image)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES[:4])
    def test_j2k_keeps_every_bit_of_16(self, dtype: str, shape: tuple[int, ...]) -> None:
        for image in (noise(dtype, shape), checkered(dtype, shape)):
            found = codec.decode(jpeg2000.encode_j2k(image), J2K, format_of(image))
            assert found.dtype == image.dtype
            assert np.array_equal(found, image)

    @pytest.mark.parametrize("syntax", ENCODERS)
    @pytest.mark.parametrize("dtype", DTYPES[:4])
    def test_saturated_colour_edges(self, syntax: str, dtype: str) -> None:
        """Opposite colours along the taps of the filter: the largest colour differences there are."""
        limits = np.iinfo(dtype)
        taps = np.array([0, 0, 1, 1, 1, 0, 0, 1])
        edges = np.array([taps[row % 8] ^ taps[np.arange(91) % 8] for row in range(70)])
        for first in (edges, 1 - edges):
            image = np.stack([first, 1 - first, first], axis=2)
            image = np.where(image, limits.max, limits.min).astype(dtype)
            assert np.array_equal(codec.decode(ENCODERS[syntax](image), syntax, format_of(image)), image)

    def test_views_of_larger_arrays_are_encoded_as_they_look(self) -> None:
        whole = noise("i2", (90, 80))
        for view in (whole[::2, 5:70], whole.T, whole[::-1]):
            image = np.ascontiguousarray(view)
            assert np.array_equal(
                codec.decode(jpeg2000.encode_htj2k(image), HTJ2K_LOSSLESS_RPCL, format_of(image)), view
            )
            assert codec.crc32(view) == codec.crc32(image.tobytes())

    @pytest.mark.parametrize("bits", range(1, 25))
    def test_single_bits(self, bits: int) -> None:
        mask = np.random.default_rng(bits).integers(0, 2, (bits, 13), np.uint8)
        pixels = PixelFormat(bits, 13, 1, 1, 1)
        found = codec.decode(codec.pack_bits(mask), EXPLICIT_LE, pixels)
        assert found.dtype == np.uint8
        assert np.array_equal(found, mask)
        assert codec.pack_bits(np.array([[1, 0, 0, 0, 0, 0, 0, 0, 1]])) == b"\x01\x01"

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_native(self, dtype: str) -> None:
        image = noise(dtype, (7, 5, 3))
        padded = image.tobytes() + b"\0"
        assert np.array_equal(codec.decode(padded, EXPLICIT_LE, format_of(image)), image)

    def test_unused_bits_of_native_frames_are_cleared(self) -> None:
        raw = np.array([[0xF123, 0x0FFF, 0x0800]], np.uint16)
        unsigned = codec.decode(raw.tobytes(), EXPLICIT_LE, PixelFormat(1, 3, 1, 16, 12))
        assert unsigned.tolist() == [[0x123, 0xFFF, 0x800]]
        signed = codec.decode(raw.tobytes(), EXPLICIT_LE, PixelFormat(1, 3, 1, 16, 12, signed=True))
        assert signed.tolist() == [[0x123, -1, -2048]]

    def test_rle_colour_of_two_bytes(self) -> None:
        image = noise("u2", (6, 8, 3))
        segments = []
        for sample in range(3):
            for shift in (8, 0):  # PS3.5 annex G: most significant byte first
                raw = (image[..., sample] >> shift).astype(np.uint8).tobytes()
                segments.append(bytes([len(raw) - 1]) + raw + b"\x80")  # a literal run, and a byte that says nothing
        offsets = np.cumsum([64, *map(len, segments[:-1])])
        header = np.zeros(16, "<u4")
        header[0], header[1:7] = len(segments), offsets
        data = header.tobytes() + b"".join(segments)
        assert np.array_equal(codec.decode(data, RLE, format_of(image)), image)

    @pytest.mark.parametrize("dtype", ["i1", "i2"])
    def test_jpeg_ls_signed(self, dtype: str) -> None:
        image = noise(dtype, (20, 30))
        data = imagecodecs.jpegls_encode(image.view(f"u{image.itemsize}"))
        assert np.array_equal(codec.decode(data, JPEG_LS, format_of(image)), image)

    def test_jpeg_ls_extends_the_sign_from_its_own_precision(self) -> None:
        jpeg_ls = pytest.importorskip("jpeg_ls", reason="pyjpegls is not installed")
        image = np.clip(noise("i2", (20, 30)), -2048, 2047)
        data = jpeg_ls.encode_array((image & 0xFFF).astype(np.uint16))
        assert decoders._jpegls_precision(data) == 12
        assert np.array_equal(codec.decode(bytes(data), JPEG_LS, format_of(image, bits=12)), image)

    def test_colour_jpeg_is_not_converted(self) -> None:
        image = np.full((16, 16, 3), (90, 160, 60), np.uint8)
        data = imagecodecs.jpeg8_encode(image, level=100, colorspace="YCBCR", outcolorspace="YCBCR")
        found = codec.decode(data, JPEG_BASELINE, replace(format_of(image), photometric="YBR_FULL"))
        assert np.abs(found.astype(int) - image).max() <= 2


class TestEncoderSecondOpinion:
    """What another decoder and the standard say of our streams."""

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES[:4])  # OpenJPEG's HT decoder goes no deeper
    def test_openjpeg_reads_the_same(self, dtype: str, shape: tuple[int, ...]) -> None:
        image = noise(dtype, shape)
        found = openjpeg.decode(jpeg2000.encode_htj2k(image), 0)
        assert found.dtype == image.dtype
        assert np.array_equal(found.reshape(shape), image)

    @pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 65), (512, 512), (513, 300), (1025, 2000), (300, 200, 3)])
    def test_layout_is_the_data_stores(self, shape: tuple[int, ...]) -> None:
        """PS3.5 A.4.4: RPCL, TLM, a base resolution with a side of at most 64; and a tile-part a resolution."""
        stream = jpeg2000.encode_htj2k(noise("u2", shape) >> 4)
        info = jpeg2000.inspect(stream)
        assert (info.rows, info.columns, info.components) == (*shape[:2], shape[2] if len(shape) == 3 else 1)
        assert info.high_throughput
        assert info.reversible
        assert info.progression == 2
        assert -(-min(shape[:2]) // 2**info.levels) <= 64
        found = markers(stream)
        assert found[0] == 0xFF51
        assert 0xFF50 in found, "CAP"
        assert 0xFF55 in found, "TLM"
        assert found.count(0xFF90) == info.levels + 1, "tile-parts"
        assert found[-1] == 0xFFD9, "EOC"
        tlm = stream.index(b"\xff\x55") + 2
        (length,) = struct.unpack_from(">H", stream, tlm)
        lengths = [struct.unpack_from(">I", stream, at + 2)[0] for at in range(tlm + 4, tlm + length, 6)]
        assert sum(lengths) == len(stream) - stream.index(b"\xff\x90") - 2

    def test_same_image_same_bytes(self) -> None:
        image = noise("i2", (100, 90))
        assert len({jpeg2000.encode_htj2k(image) for _ in range(5)}) == 1


class TestOut:
    @pytest.mark.parametrize("syntax", ENCODERS)
    def test_is_written_to_and_returned(self, syntax: str) -> None:
        image = noise("i2", (70, 66))
        out = np.zeros_like(image)
        assert codec.decode(ENCODERS[syntax](image), syntax, format_of(image), out=out) is out
        assert np.array_equal(out, image)

    @pytest.mark.parametrize("syntax", ENCODERS)
    @pytest.mark.parametrize("signed", [False, True])
    def test_takes_the_sign_of_the_metadata(self, syntax: str, signed: bool) -> None:
        """A codestream of the other sign has the same bits, in `out` as without."""
        image = noise("u2" if signed else "i2", (70, 66))
        wanted = image.view("i2" if signed else "u2")
        pixels = replace(format_of(image), signed=signed)
        out = np.zeros_like(wanted)
        data = ENCODERS[syntax](image)
        assert np.array_equal(codec.decode(data, syntax, pixels), wanted)
        assert codec.decode(data, syntax, pixels, out=out) is out
        assert np.array_equal(out, wanted)

    def test_takes_the_depth_of_the_metadata(self) -> None:
        image = noise("u1", (20, 30))
        out = np.zeros((20, 30), np.uint16)
        codec.decode(jpeg2000.encode_htj2k(image), HTJ2K_LOSSLESS_RPCL, PixelFormat(20, 30, 1, 16, 8), out=out)
        assert np.array_equal(out, image)

    def test_may_be_part_of_a_larger_array(self) -> None:
        image = noise("i2", (20, 30))
        volume = np.zeros((3, 20, 30), np.int16)
        wide = np.zeros((20, 60), np.int16)
        data = jpeg2000.encode_htj2k(image)
        for out in (volume[1], wide[:, ::2]):
            assert codec.decode(data, HTJ2K_LOSSLESS_RPCL, format_of(image), out=out) is out
            assert np.array_equal(out, image)
        assert not volume[::2].any()
        assert not wide[:, 1::2].any()

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # OpenJPH's own
    @pytest.mark.parametrize("tile", [None, (32, 48)])
    @pytest.mark.parametrize("shape", [(70, 66), (1, 130), (65, 66, 3)])
    def test_nothing_of_what_it_held_is_left(self, shape: tuple[int, ...], tile: tuple[int, int] | None) -> None:
        """Buffers are used again: a sample that is not written would be another patient's."""
        image = noise("i2" if len(shape) == 2 else "u1", shape)
        whole = imagecodecs.htj2k_encode(image, reversible=True, tile=tile, planar=False if len(shape) == 3 else None)
        body = whole.index(b"\xff\x93")
        random = np.random.default_rng(len(whole))
        streams = [whole, *(whole[:at] for at in random.integers(body + 20, len(whole), 20))]
        for _ in range(30):
            damaged = bytearray(whole)
            damaged[random.integers(body + 2, len(whole) - 2)] ^= int(random.integers(1, 256))
            streams.append(bytes(damaged))
        compared = ended = 0
        for data in streams:
            outs = [np.full_like(image, held) for held in (0, 0x55)]
            try:
                for out in outs:
                    assert jpeg2000.decode_htj2k(data, jpeg2000.inspect(whole), out=out) is out
            except DecodeError:
                ended += 1
                continue
            except (RuntimeError, ValueError):
                continue
            assert np.array_equal(*outs)
            compared += 1
        assert compared > 10
        assert ended > 0  # where imagecodecs returns an image, and what was there before in its lower part
        assert np.array_equal(codec.decode(whole, HTJ2K_LOSSLESS_RPCL, format_of(image), out=outs[1]), image)

    @pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "i4"])
    def test_any_last_sample_is_possible(self, dtype: str) -> None:
        for last in (0, *jpeg2000._MARKS[np.dtype(dtype).itemsize]):
            image = noise(dtype, (20, 30))
            image[-1, -1] = last
            out = np.full_like(image, last)
            data = jpeg2000.encode_htj2k(image)
            assert np.array_equal(jpeg2000.decode_htj2k(data, jpeg2000.inspect(data), out=out), image)

    @pytest.mark.parametrize("wrong", [((20, 30), "u2"), ((20, 30), "i4"), ((30, 20), "i2"), ((1, 20, 30), "i2")])
    def test_of_another_kind_is_refused(self, wrong: tuple[tuple[int, ...], str]) -> None:
        image = noise("i2", (20, 30))
        out = np.full(*wrong[:1], 7, wrong[1])
        with pytest.raises(DecodeError, match="decode into"):
            codec.decode(jpeg2000.encode_htj2k(image), HTJ2K_LOSSLESS_RPCL, format_of(image), out=out)
        assert (out == 7).all()


class TestSign:
    """PS3.5 8.2.4: where codestream and metadata disagree, the bits are read with the metadata's sign."""

    @staticmethod
    def _with_sign(stream: bytes, precision: int, signed: bool) -> bytes:
        patched = bytearray(stream)
        patched[42] = precision - 1 | (0x80 if signed else 0)
        return bytes(patched)

    def test_twelve_signed_bits_in_an_unsigned_stream(self) -> None:
        image = np.clip(noise("i2", (40, 50)), -2048, 2047)
        raw = (image & 0xFFF).astype(np.uint16)
        stream = bytes(imagecodecs.jpeg2k_encode(raw, reversible=True, codecformat="J2K", bitspersample=12))
        assert jpeg2000.inspect(stream).precision == 12
        assert not jpeg2000.inspect(stream).signed
        assert np.array_equal(codec.decode(stream, J2K, format_of(image, bits=12)), image)

    @pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2"])
    def test_same_bits(self, dtype: str) -> None:
        image = noise(dtype, (40, 50))
        other = image.view(dtype.translate(str.maketrans("ui", "iu")))
        for syntax, encode in ENCODERS.items():
            assert np.array_equal(codec.decode(encode(image), syntax, format_of(other)), other)


class TestJpegXl:
    SYNTAX = "1.2.840.10008.1.2.4.112"

    @pytest.mark.parametrize(
        ("dtype", "bits", "samples"),
        [("u1", 8, 1), ("u1", 8, 3), ("u2", 10, 1), ("u2", 16, 1), ("u2", 12, 3), ("i1", 8, 1), ("i2", 16, 1)],
    )
    def test_lossless(self, dtype: str, bits: int, samples: int) -> None:
        """It knows no sign: signed samples are stored as their bits."""
        image = noise(dtype, (40, 52) if samples == 1 else (40, 52, samples))
        if dtype == "u2":
            image >>= 16 - bits
        data = imagecodecs.jpegxl_encode(image.view(f"u{image.itemsize}"), lossless=True)
        pixels = format_of(image, bits=bits)
        out = np.empty_like(image)
        assert codec.decode(data, self.SYNTAX, pixels, out=out) is out
        assert np.array_equal(out, image)
        assert codec.decode(data, self.SYNTAX, pixels, reduce=1).shape[:2] == (20, 26)

    @pytest.mark.parametrize(("dtype", "bits"), [("i2", 12), ("u2", 12), ("i1", 6), ("u1", 6)])
    @pytest.mark.parametrize("junk", [0, 1])
    def test_sign_and_unused_bits_are_as_in_raw_frames(self, dtype: str, bits: int, junk: int) -> None:
        """What stands above the stored bits (an old overlay, or nothing) is not part of a value."""
        full = noise(dtype, (40, 52))
        shift = 8 * full.itemsize - bits
        image = full >> shift if dtype[0] == "u" else full << shift >> shift
        raw = image.view(f"u{image.itemsize}") & (1 << bits) - 1 | junk << bits
        pixels = format_of(image, bits=bits)
        found = codec.decode(imagecodecs.jpegxl_encode(raw, lossless=True), self.SYNTAX, pixels)
        assert np.array_equal(found, image)
        assert np.array_equal(found, codec.decode(raw.tobytes(), EXPLICIT_LE, pixels))

    def test_cut_short(self) -> None:
        data = imagecodecs.jpegxl_encode(noise("u2", (64, 64)), lossless=True)
        for end in (len(data) // 8, len(data) // 2, len(data) - 1):
            with pytest.raises(DecodeError):
                codec.decode(data[:end], self.SYNTAX, PixelFormat(64, 64))


class TestHostileBytes:
    @pytest.mark.parametrize("syntax", [uid for uid, known in SYNTAXES.items() if known.codec == "video"])
    def test_video_is_refused_by_name(self, syntax: str) -> None:
        with pytest.raises(UnsupportedTransferSyntaxError, match=r"MPEG|HEVC") as caught:
            codec.decode(b"\0\0\1", syntax, PixelFormat(2, 2))
        assert syntax in str(caught.value)
        assert "fetch()" in str(caught.value)

    def test_unknown_syntaxes_are_refused_by_name(self) -> None:
        with pytest.raises(UnsupportedTransferSyntaxError, match=r"1\.2\.3\.4"):
            codec.decode(b"", "1.2.3.4", PixelFormat(2, 2))
        with pytest.raises(UnsupportedTransferSyntaxError, match="Big Endian"):
            codec.decode(bytes(8), "1.2.840.10008.1.2.2", PixelFormat(2, 2))

    @pytest.mark.parametrize("syntax", [uid for uid, known in SYNTAXES.items() if known.codec != "video"])
    @pytest.mark.parametrize("data", [b"", b"\0", b"\xff\xd8\xff", b"\xff\x4f\xff\x51", bytes(64), b"\xff" * 200])
    def test_bytes_that_are_no_image(self, syntax: str, data: bytes) -> None:
        with pytest.raises(DecodeError):
            codec.decode(data, syntax, PixelFormat(64, 64, 3, 16, 16, photometric="RGB"))

    @pytest.mark.parametrize("boxed", [False, True])
    @pytest.mark.parametrize("syntax", ENCODERS)
    def test_every_truncation_of_the_main_header(self, syntax: str, boxed: bool) -> None:
        image = smooth()
        stream = ENCODERS[syntax](image)
        whole = jp2(stream, image) if boxed else stream
        for end in range(whole.index(b"\xff\x52") + 14):
            with pytest.raises(DecodeError):
                codec.decode(whole[:end], syntax, format_of(image))

    def test_truncated_j2k(self) -> None:
        stream = jpeg2000.encode_j2k(noise("u2", (150, 140)))
        with pytest.raises(DecodeError, match="no decoder accepts"):
            codec.decode(stream[: len(stream) // 2], J2K, PixelFormat(150, 140))

    # Offsets of SIZ: extent 8, image origin 16, tile size 24, tile origin 32, components 40, depth 42, steps 43.
    @pytest.mark.parametrize(
        ("at", "value"),
        [
            (8, struct.pack(">II", 2**32 - 1, 2**32 - 1)),
            (8, struct.pack(">II", 0, 0)),
            (16, struct.pack(">II", 2**31, 2**31)),
            (24, struct.pack(">I", 0)),  # OpenJPH divides by it
            (28, struct.pack(">I", 0)),
            (24, struct.pack(">II", 1, 1) + bytes(8)),
            (32, struct.pack(">I", 1)),
            (36, struct.pack(">I", 2**24)),  # OpenJPH loops over it
            (40, struct.pack(">H", 0)),
            (40, struct.pack(">H", 2**14)),
            (42, b"\x25"),
            (43, b"\x02"),
            (43, b"\x00"),
            (44, b"\xff"),
        ],
    )
    @pytest.mark.parametrize("syntax", ENCODERS)
    @pytest.mark.parametrize("rows", [300, 65_535])
    def test_impossible_sizes_are_refused_without_memory(self, syntax: str, at: int, value: bytes, rows: int) -> None:
        stream = bytearray(ENCODERS[syntax](smooth(300, 260)))
        stream[at : at + len(value)] = value
        tracemalloc.start()
        try:
            with pytest.raises(DecodeError):
                codec.decode(bytes(stream), syntax, PixelFormat(rows, 260 if rows == 300 else rows))
            assert tracemalloc.get_traced_memory()[1] < 2**22
        finally:
            tracemalloc.stop()

    def test_sizes_that_the_metadata_does_not_have(self) -> None:
        stream = jpeg2000.encode_htj2k(smooth(60, 80))
        for rows, columns, samples in ((80, 60, 1), (1, 4800, 1), (20, 80, 3), (60, 79, 1), (61, 80, 1)):
            with pytest.raises(DecodeError, match="metadata says"):
                codec.decode(stream, HTJ2K_LOSSLESS_RPCL, PixelFormat(rows, columns, samples))

    def test_values_that_the_metadata_has_no_room_for(self) -> None:
        small, large = smooth(10, 20), smooth(20, 30)
        for syntax, encode in ENCODERS.items():
            found = codec.decode(encode(small), syntax, PixelFormat(10, 20, 1, 8, 8))
            assert found.dtype == np.uint8
            assert np.array_equal(found, small)
            with pytest.raises(DecodeError, match="cannot hold"):
                codec.decode(encode(large), syntax, PixelFormat(20, 30, 1, 8, 8))

    def test_frames_that_are_too_short(self) -> None:
        for bits, size in ((1, 1), (8, 11), (16, 23), (32, 47)):
            with pytest.raises(DecodeError, match="too few"):
                codec.decode(bytes(size), EXPLICIT_LE, PixelFormat(3, 4, 1, bits, bits))

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # OpenJPH, of damaged blocks
    def test_damaged_headers_never_end_the_process(self) -> None:
        """Flipped bytes give an error or pixels (which checksums catch): no crash, no endless loop."""
        random = np.random.default_rng(7)
        image = smooth()
        for syntax, encode in ENCODERS.items():
            stream = encode(image)
            for _ in range(300):
                damaged = bytearray(stream)
                for at in random.integers(2, stream.index(b"\xff\x93"), random.integers(1, 4)):
                    damaged[at] = random.integers(256)
                try:
                    found = codec.decode(bytes(damaged), syntax, format_of(image))
                except DecodeError:
                    continue
                assert (found.shape, found.dtype) == (image.shape, image.dtype)


@pytest.mark.parametrize(
    ("suffix", "name"),
    [
        ("4.53", "Spectral Selection"),
        ("4.55", "Full Progression"),
        ("4.94", "JPIP Referenced"),
        ("4.95", "JPIP Referenced Deflate"),
        ("4.110", "JPEG XL Lossless"),
        ("4.111", "JPEG XL JPEG Recompression"),
        ("4.204", "JPIP HTJ2K Referenced"),
        ("4.205", "JPIP HTJ2K Referenced Deflate"),
        ("1.98", "Encapsulated Uncompressed"),
        ("4.999", "(unknown)"),
    ],
)
def test_syntaxes_that_nobody_reads_are_named(suffix: str, name: str) -> None:
    uid = f"1.2.840.10008.1.2.{suffix}"
    with pytest.raises(UnsupportedTransferSyntaxError, match=re.escape(name)):
        codec.decode(b"", uid, PixelFormat(4, 4))
    if "JPIP" in name:
        assert codec.describe(uid) == f"{uid} ({UID(uid).name})"


def test_every_kept_syntax_has_a_content_type() -> None:
    for known in SYNTAXES.values():
        assert bool(known.content_type) or not known.kept
        assert codec.describe(known.uid) == f"{known.uid} ({known.name})"
