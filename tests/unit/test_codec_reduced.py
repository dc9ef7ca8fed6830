"""Lower resolutions of frames: exact low-pass values that never wrap, from the shortest prefix that holds them."""

from __future__ import annotations

import csv
import io
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import openjpeg
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.encaps import generate_frames

from ahi_ml import codec
from ahi_ml.codec import EXPLICIT_LE, HTJ2K_LOSSLESS_RPCL, PixelFormat, jpeg2000, progressive, reduced, wavelet
from ahi_ml.codec.layout import layout_of
from ahi_ml.errors import ConfigError, DecodeError

J2K = "1.2.840.10008.1.2.4.90"
J2K_LOSSY = "1.2.840.10008.1.2.4.91"
HTJ2K = "1.2.840.10008.1.2.4.201"
HTJ2K_LOSSY = "1.2.840.10008.1.2.4.203"
JPEG_LS = "1.2.840.10008.1.2.4.80"
ENCODERS = {HTJ2K_LOSSLESS_RPCL: jpeg2000.encode_htj2k, J2K: jpeg2000.encode_j2k}

SHAPES = ((64, 64), (65, 129), (131, 78), (1, 40), (33, 1), (70, 91, 3))
DEPTHS = [("u1", 8), ("i1", 8), ("u2", 12), ("u2", 16), ("i2", 12), ("i2", 15), ("i2", 16), ("u4", 32), ("i4", 24)]


# ---- the wavelet again, by the formulas of T.800 F.4.8.1, one sample after the other ----


def low_band(signal: list[int]) -> list[int]:
    """Low-pass samples of the 5/3 wavelet; the signal is mirrored at its ends."""
    n = len(signal)
    if n == 1:
        return signal

    def x(i: int) -> int:
        i = abs(i)
        return signal[i if i < n else 2 * (n - 1) - i]

    def high(i: int) -> int:
        i = abs(i)
        i = i if i < n else 2 * (n - 1) - i
        return x(i) - (x(i - 1) + x(i + 1)) // 2

    return [x(i) + (high(i - 1) + high(i + 1) + 2) // 4 for i in range(0, n, 2)]


def low_plane(plane: np.ndarray, reduce: int) -> np.ndarray:
    rows = plane.astype(object)
    for _ in range(reduce):
        rows = np.array([low_band(list(column)) for column in rows.T], object).T
        rows = np.array([low_band(list(row)) for row in rows], object)
    return rows


def low_image(image: np.ndarray, reduce: int, *, differences: bool = False) -> np.ndarray:
    """Low-pass band in Python's own integers, by way of the reversible colour transform (T.800 G.2) if asked."""
    if image.ndim == 2:
        return low_plane(image, reduce)
    red, green, blue = np.moveaxis(image.astype(object), 2, 0)
    if not differences:
        return np.stack([low_plane(plane, reduce) for plane in (red, green, blue)], axis=2)
    y, u, v = (low_plane(p, reduce) for p in ((red + 2 * green + blue) // 4, blue - green, red - green))
    green = y - (u + v) // 4
    return np.stack([v + green, green, u + green], axis=2)


def clipped(low: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    least = -(2 ** (pixels.bits_stored - 1)) if pixels.signed else 0
    return np.clip(low, least, least + 2**pixels.bits_stored - 1).astype(pixels.dtype)


def format_of(image: np.ndarray, bits: int | None = None) -> PixelFormat:
    return PixelFormat(
        rows=image.shape[0],
        columns=image.shape[1],
        samples=image.shape[2] if image.ndim == 3 else 1,
        bits_allocated=8 * image.itemsize,
        bits_stored=bits or 8 * image.itemsize,
        signed=image.dtype.kind == "i",
        photometric="RGB" if image.ndim == 3 else "MONOCHROME2",
    )


def patterns(dtype: str, bits: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Images of `bits` bits whose low-pass bands overshoot as far as they can, and noise."""
    least = -(2 ** (bits - 1)) if dtype[0] == "i" else 0
    most = least + 2**bits - 1
    random = np.random.default_rng([bits, *shape])
    on = np.indices(shape[:2])
    # The signs of the filter's taps, low-pass of low-pass: what adds up to the largest sums.
    taps = np.array([0, 0, 1, 1, 1, 0, 0, 1])
    worst = taps[on[0] % 8] ^ taps[on[1] % 8]
    if len(shape) == 3:
        worst = np.stack([worst, 1 - worst, worst], axis=2)
    yield np.where(worst, most, least).astype(dtype)
    yield np.where(worst, least, most).astype(dtype)
    yield random.choice([least, most], shape).astype(dtype)
    yield random.integers(least, most, shape, endpoint=True).astype(dtype)


def largest_sum(reduce: int) -> np.ndarray:
    """Where an image must be high for the largest low-pass value: the signs of the filter's taps of both axes."""
    taps = np.ones(1)
    for step in range(reduce):
        spread = np.zeros(4 * 2**step + 1)
        spread[:: 2**step] = (-1, 2, 6, 2, -1)
        taps = np.convolve(taps, spread)
    side = 2**reduce * (len(taps) // 2 ** (reduce + 1) + 2)
    signs = np.zeros(2 * side, bool)
    signs[side - len(taps) // 2 : side + len(taps) // 2 + 1] = taps > 0
    return ~(signs[:, None] ^ signs[None, :])


def stated(stream: bytes, depth: int) -> bytes:
    """The same stream with another depth and sign (Ssiz) of its components."""
    made = bytearray(stream)
    (components,) = struct.unpack_from(">H", made, 40)
    made[42 : 42 + 3 * components : 3] = bytes([depth]) * components
    return bytes(made)


def blobs(shape: tuple[int, ...]) -> np.ndarray:
    """Black and white areas and a little noise: they overshoot, and OpenJPEG through Pillow can encode them."""
    random = np.random.default_rng(list(shape))
    areas = random.choice([0, 250], [-(-n // 9) for n in shape[:2]] + list(shape[2:]))
    image = areas.repeat(9, axis=0).repeat(9, axis=1)[: shape[0], : shape[1]]
    return (image + random.integers(0, 6, shape)).astype(np.uint8)


def slope(rows: int = 150, columns: int = 140, dtype: str = "i2") -> np.ndarray:
    return (np.arange(rows * columns).reshape(rows, columns) // 2).astype(dtype)


def boxed(stream: bytes) -> bytes:
    """A codestream in a JP2 file as the data store writes it: the last box reaches to the end."""
    header = b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x14ftypjp2 \0\0\0\0jp2 " + b"\0\0\0\x2djp2h" + bytes(37)
    return header + b"\0\0\0\0jp2c" + stream


def with_signalling(stream: bytes, *, tlm: bool = True, total: int | None = None, open_end: bool = False) -> bytes:
    """The same stream without TLM, with another number of tile-parts in SOT, or with a last one "to the end"."""
    made = bytearray(stream)
    at = made.index(b"\xff\x90")
    if not tlm:
        begin = made.index(b"\xff\x55")
        size = 2 + struct.unpack_from(">H", made, begin + 2)[0]
        del made[begin : begin + size]
        at -= size
    while made[at : at + 2] == b"\xff\x90":
        last, psot = at, struct.unpack_from(">I", made, at + 6)[0]
        if total is not None:
            made[at + 11] = total
        at += psot
    if open_end:
        struct.pack_into(">I", made, last + 6, 0)
    return bytes(made)


def in_tile_part_header(stream: bytes, segment: bytes) -> bytes:
    """The same stream with a marker segment more in its first tile-part header."""
    made = bytearray(with_signalling(stream, tlm=False))
    at = made.index(b"\xff\x90")
    struct.pack_into(">I", made, at + 6, struct.unpack_from(">I", made, at + 6)[0] + len(segment))
    made[at + 12 : at + 12] = segment
    return bytes(made)


def part_a_packet(stream: bytes) -> bytes:
    """The packets of a single tile-part with PLT, each in a tile-part of its own, their number unsaid."""
    at = stream.index(b"\xff\x90")
    sod = stream.index(b"\xff\x93", at)
    (size,) = struct.unpack_from(">H", stream, at + 14)
    assert sod == at + 14 + size
    made, begin, length = bytearray(stream[:at]), sod + 2, 0
    number = 0
    for byte in stream[at + 17 : sod]:
        length = length << 7 | byte & 0x7F
        if byte & 0x80:
            continue
        made += struct.pack(">HHHIBBH", 0xFF90, 10, 0, length + 14, number, 0, 0xFF93) + stream[begin : begin + length]
        begin, length, number = begin + length, 0, number + 1
    assert stream[begin:] == b"\xff\xd9"
    return bytes(made) + b"\xff\xd9"


def in_one_part(stream: bytes) -> bytes:
    """The tile-parts of an image of one component and one precinct, a packet each, as a single one with PLT."""
    at, sod = stream.index(b"\xff\x90"), 14
    ends = resolutions_end(stream)
    begins = [at, *ends[:-1]]
    sizes = b""
    for begin, end in zip(begins, ends, strict=True):
        left = end - begin - sod
        sizes += bytes(0x80 | left >> 7 * n & 0x7F for n in (3, 2, 1)) + bytes([left & 0x7F])
    plt = b"\xff\x58" + struct.pack(">HB", 3 + len(sizes), 0) + sizes + b"\xff\x93"
    packets = b"".join(stream[begin + sod : end] for begin, end in zip(begins, ends, strict=True))
    sot = struct.pack(">HHHIBB", 0xFF90, 10, 0, 12 + len(plt) + len(packets), 0, 1)
    return with_signalling(stream, tlm=False)[: stream.index(b"\xff\x55")] + sot + plt + packets + b"\xff\xd9"


def resolutions_end(stream: bytes) -> list[int]:
    """Where each tile-part ends."""
    ends, at = [], stream.index(b"\xff\x90")
    while stream[at : at + 2] == b"\xff\x90":
        at += struct.unpack_from(">I", stream, at + 6)[0]
        ends.append(at)
    return ends


def by_openjpeg(image: np.ndarray, **options: object) -> bytes:
    """JPEG 2000 with options that the other encoder lacks: orders, precincts, layers, PLT."""
    file = io.BytesIO()
    settings_ = {"irreversible": False, "num_resolutions": 4, "mct": int(image.ndim == 3), **options}
    Image.fromarray(image).save(file, "JPEG2000", **settings_)
    return file.getvalue()


def reduced_by_openjpeg(stream: bytes, reduce: int) -> np.ndarray:
    """OpenJPEG's own reduced decode, which clips to the depth of the stream.

    Pillow rounds the sides to nearest, so it can only be asked where that is upwards.
    """
    image = Image.open(io.BytesIO(stream))
    image.reduce = reduce  # type: ignore[method-assign]
    return np.array(image)


def ask(frame: bytes, syntax: str, pixels: PixelFormat, reduce: int, first: int = 1) -> tuple[int | None, int]:
    """Ask for the prefix as a reader on the network does: its length, and how many bytes were read to know."""
    size = first
    while True:
        found = codec.prefix(frame[:size], syntax, pixels, reduce)
        if found.known:
            return found.size, min(size, len(frame))
        assert found.size is not None
        assert found.size > size, "asks for no more than it has"
        assert size < len(frame), "asks beyond the frame"
        size = found.size


@pytest.fixture(scope="module")
def head_ct(shared_data: Path) -> list[np.ndarray]:
    """Slices of a 12-bit unsigned CT whose air is 0: edges of bone overshoot downwards."""
    paths = sorted((shared_data / "ct-head-phantom-tilt-20").glob("**/*.dcm"))
    return [pydicom.dcmread(path).pixel_array for path in paths[2:5]]


def frame_of(path: Path) -> tuple[bytes, str, PixelFormat]:
    """First frame of a DICOM file with its syntax and format."""
    file = pydicom.dcmread(path)
    syntax = file.file_meta.TransferSyntaxUID
    pixels = PixelFormat(
        file.Rows,
        file.Columns,
        file.SamplesPerPixel,
        file.BitsAllocated,
        file.BitsStored,
        file.PixelRepresentation == 1,
        file.PhotometricInterpretation,
    )
    if syntax.is_encapsulated:
        return next(generate_frames(file.PixelData, number_of_frames=1)), str(syntax), pixels
    return file.PixelData, EXPLICIT_LE, pixels


class TestFormat:
    def test_sides_are_halved_and_rounded_up(self) -> None:
        pixels = PixelFormat(513, 300, 3, 16, 12, True, "RGB")
        shapes = [pixels.reduced(level).shape for level in (0, 1, 2, 3, 9, 10, 40)]
        assert shapes == [(513, 300, 3), (257, 150, 3), (129, 75, 3), (65, 38, 3), (2, 1, 3), (1, 1, 3), (1, 1, 3)]
        assert pixels.reduced(2) == replace(pixels, rows=129, columns=75)

    def test_negative_levels_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="-1"):
            PixelFormat(5, 5).reduced(-1)
        with pytest.raises(ConfigError, match="-1"):
            codec.decode(bytes(50), EXPLICIT_LE, PixelFormat(5, 5), reduce=-1)

    def test_what_must_not_be_blended(self) -> None:
        assert PixelFormat(2, 2).blends
        assert PixelFormat(2, 2, 1, 8, 8).blends
        for pixels in (
            PixelFormat(2, 2, 1, 1, 1),
            PixelFormat(2, 2, 1, 8, 1),
            PixelFormat(2, 2, 1, 8, 8, photometric="PALETTE COLOR"),
            PixelFormat(2, 2, 1, 16, 16, labels=True),
        ):
            assert not pixels.blends


class TestWavelet:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 23), st.integers(1, 23), st.integers(1, 4), st.booleans(), st.integers(0, 2**32 - 1))
    def test_is_that_of_the_standard(self, rows: int, columns: int, reduce: int, colour: bool, seed: int) -> None:
        shape = (rows, columns, 3) if colour else (rows, columns)
        image = np.random.default_rng(seed).integers(-(2**15), 2**15, shape, np.int16)
        for differences in {colour, False}:
            found = wavelet.low_pass(image, reduce, colour_transform=differences)
            assert np.array_equal(found, low_image(image, reduce, differences=differences))

    @pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "u4", "i4"])
    def test_has_room_for_extremes(self, dtype: str) -> None:
        bits = 8 * np.dtype(dtype).itemsize
        for image in patterns(dtype, bits, (31, 30)):
            assert np.array_equal(wavelet.low_pass(image, 2), low_image(image, 2))

    @pytest.mark.parametrize("reduce", [0, 1, 2, 3])
    @pytest.mark.parametrize("shape", [(1, 1), (1, 6), (2, 3), (7, 8), (9, 5), (16, 17)])
    def test_what_has_part_in_a_sample(self, shape: tuple[int, int], reduce: int) -> None:
        for place in np.ndindex(shape):
            image = np.zeros(shape, np.int32)
            image[place] = 1 << 24
            changed = wavelet.low_pass(image, reduce) != 0
            told = wavelet.reached(image != 0, reduce)
            assert told.shape == changed.shape
            assert not (changed & ~told).any()
            if reduce < 2:  # later steps may cancel each other
                assert np.array_equal(told, changed)

    def test_of_several_samples(self) -> None:
        mask = np.random.default_rng(0).random((23, 30)) < 0.02
        before = mask.copy()
        each = [
            wavelet.reached(np.eye(1, mask.size, place, dtype=bool).reshape(mask.shape), 2)
            for place in np.flatnonzero(mask)
        ]
        assert np.array_equal(wavelet.reached(mask, 2), np.any(each, axis=0))
        assert np.array_equal(mask, before)

    def test_leaves_the_image_alone(self) -> None:
        image = slope(20, 30, "i4")
        wavelet.low_pass(image, 2)
        assert np.array_equal(image, slope(20, 30, "i4"))

    @pytest.mark.parametrize("reduce", [1, 2, 3, 4, 5, 6])
    def test_range_holds_what_the_filter_can_give(self, reduce: int) -> None:
        low, high = -300, 21_000
        least, most = wavelet.low_pass_range(low, high, reduce)
        image = np.where(largest_sum(reduce), high, low)
        for plane in (image, low + high - image, np.where(image == high, high, low).T):
            found = wavelet.low_pass(plane, reduce)
            assert least <= found.min() <= found.max() <= most
        reached = wavelet.low_pass(image, reduce).max() - high
        assert reached > 0.93 * (most - high), "much wider than it need be"

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.booleans(), st.integers(0, 2**32 - 1))
    def test_range_holds_small_images_and_colour(
        self, rows: int, columns: int, reduce: int, colour: bool, seed: int
    ) -> None:
        random = np.random.default_rng(seed)
        low, high = sorted(random.integers(-40, 40, 2).tolist())
        image = random.choice([low, high], (rows, columns, 3)).astype(np.int16)
        least, most = wavelet.low_pass_range(low, high, reduce)
        found = wavelet.low_pass(image, reduce, colour_transform=colour)
        assert least <= found.min() <= found.max() <= most


class TestExactness:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize(("dtype", "bits"), DEPTHS)
    def test_low_pass_values_are_clipped_and_never_wrap(self, dtype: str, bits: int, shape: tuple[int, ...]) -> None:
        left = 0
        for image in patterns(dtype, bits, shape):
            pixels = format_of(image, bits)
            for reduce in (1, 2, 4):
                for syntax, encode in ENCODERS.items():
                    if syntax == J2K and image.itemsize == 4:
                        continue
                    differences = image.ndim == 3 and syntax == HTJ2K_LOSSLESS_RPCL
                    truth = low_image(image, reduce, differences=differences)
                    expected = clipped(truth, pixels)
                    left += int((truth != expected).sum())
                    found = codec.decode(encode(image), syntax, pixels, reduce=reduce)
                    assert (found.dtype, found.shape) == (pixels.dtype, pixels.reduced(reduce).shape)
                    assert np.array_equal(found, expected)
        assert left or min(shape[:2]) == 1, "nothing overshoots: the test says nothing"

    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(1, 150),
        st.integers(1, 150),
        st.sampled_from([("u1", 8), ("u2", 12), ("u2", 16), ("i2", 13), ("i2", 16)]),
        st.booleans(),
        st.integers(1, 4),
        st.integers(1, 6),
        st.integers(0, 2**32 - 1),
    )
    def test_levels_of_the_stream_make_no_difference(
        self, rows: int, columns: int, depth: tuple[str, int], colour: bool, stream: int, reduce: int, seed: int
    ) -> None:
        """A stream with fewer levels than asked is continued to the very values of one that has them."""
        dtype, bits = depth
        least = -(2 ** (bits - 1)) if dtype[0] == "i" else 0
        shape = (rows, columns, 3) if colour else (rows, columns)
        image = np.random.default_rng(seed).choice([least, least + 2**bits - 1], shape).astype(dtype)
        pixels = format_of(image, bits)

        def encoded(resolutions: int) -> bytes:
            return imagecodecs.htj2k_encode(
                image, reversible=True, tlm=True, tilepart=1, resolutions=resolutions, planar=False if colour else None
            )

        found = codec.decode(encoded(stream), HTJ2K_LOSSLESS_RPCL, pixels, reduce=reduce)
        assert np.array_equal(found, codec.decode(encoded(6), HTJ2K_LOSSLESS_RPCL, pixels, reduce=reduce))
        assert np.array_equal(found, clipped(wavelet.low_pass(image, reduce, colour_transform=colour), pixels))

    def test_head_ct_as_the_decoder_alone_gives_it_wraps(self, head_ct: list[np.ndarray]) -> None:
        for image in head_ct:
            stream = jpeg2000.encode_htj2k(image)
            pixels = format_of(image, 12)
            for reduce in (1, 2, 3):
                truth = wavelet.low_pass(image, reduce)
                plain = imagecodecs.htj2k_decode(stream, skipres=reduce)
                assert (plain > 60_000).sum() > 20
                assert np.array_equal(plain, truth.astype(np.uint16)), "it is the wrapped low-pass band"
                found = codec.decode(stream, HTJ2K_LOSSLESS_RPCL, pixels, reduce=reduce)
                assert np.array_equal(found, np.clip(truth, 0, 4095))
            assert np.array_equal(
                codec.decode(stream, HTJ2K_LOSSLESS_RPCL, pixels, reduce=1), clipped(low_image(image, 1), pixels)
            )

    @pytest.mark.parametrize("dtype", ["u1", "u2"])
    def test_colour_without_the_transform(self, dtype: str) -> None:
        """Each component has a wavelet of its own."""
        for image in patterns(dtype, 8, (150, 140, 3)):
            pixels = format_of(image)
            stream = imagecodecs.htj2k_encode(
                image, reversible=True, tlm=True, tilepart=1, resolutions=2, rgb=False, planar=False
            )
            assert not jpeg2000.inspect(stream).colour_transform
            assert np.array_equal(codec.decode(stream, HTJ2K, pixels), image)
            for reduce in (1, 2, 3):
                expected = clipped(wavelet.low_pass(image, reduce), pixels)
                for extremes in (None, (0, 255)):
                    found = codec.decode(stream, HTJ2K, pixels, reduce=reduce, extremes=extremes)
                    assert np.array_equal(found, expected)

    @pytest.mark.parametrize("name", ["CT1", "MR4", "NM1", "US1"])
    def test_streams_by_another_encoder(self, shared_data: Path, name: str) -> None:
        """One tile-part each, whose packets alone tell where to cut."""
        folder = shared_data / "htj2k" / "codestreams"
        stream = (folder / f"{name}.j2c").read_bytes()
        with (shared_data / "INVENTORY.csv").open(encoding="utf-8", newline="") as file:
            row = next(row for row in csv.DictReader(file) if row["path"] == f"htj2k/codestreams/{name}.j2c")
        image = np.fromfile(folder / f"{name}.RAW", row["dtype"]).reshape(tuple(map(int, row["shape"].split("x"))))
        pixels = format_of(image)
        assert codec.levels(stream, HTJ2K, pixels) == 5
        for reduce in range(1, 8):
            expected = clipped(wavelet.low_pass(image, reduce, colour_transform=image.ndim == 3), pixels)
            size, read = ask(stream, HTJ2K, pixels, reduce)
            assert size is not None
            assert size < 0.5 / reduce * len(stream)
            assert read <= max(size, 4096)
            for data in (stream, boxed(stream), stream[:size]):
                assert np.array_equal(codec.decode(data, HTJ2K, pixels, reduce=reduce), expected)

    @pytest.mark.parametrize("name", ["CT1", "MR1", "MR4", "NM1", "US1", "VL1"])
    def test_dicom_files_by_another_encoder(self, shared_data: Path, name: str) -> None:
        """A tile-part a resolution: the prefix decodes to the same as the whole, and to the low-pass band."""
        frame, syntax, pixels = frame_of(shared_data / "htj2k" / "dicom" / f"{name}_JPH.dcm")
        image = codec.decode(frame, syntax, pixels)
        ends = resolutions_end(frame)
        assert codec.levels(frame, syntax, pixels) == len(ends) - 1
        for reduce in range(1, len(ends) + 2):
            size, read = ask(frame, syntax, pixels, reduce, first=300)
            assert size == ends[max(len(ends) - 1 - reduce, 0)]
            assert read == 300, "TLM says it all"
            expected = clipped(wavelet.low_pass(image, reduce, colour_transform=image.ndim == 3), pixels)
            assert np.array_equal(codec.decode(frame[:size], syntax, pixels, reduce=reduce), expected)
            assert np.array_equal(codec.decode(frame, syntax, pixels, reduce=reduce), expected)

    def test_openjpeg_reduces_to_the_same(self, shared_data: Path) -> None:
        """J2K by another encoder, lossless and lossy; 16-bit signed and 8-bit colour, which overshoots."""
        paths = sorted((shared_data / "transfer-syntaxes-ctimage").glob("*JPEG2000*.dcm"))
        paths += sorted((shared_data / "colour-testcard-pm5644").glob("JPEG2000*.dcm"))
        assert len(paths) == 5
        for path in paths:
            frame, syntax, pixels = frame_of(path)
            for reduce in (1, 2, 5):
                expected = reduced_by_openjpeg(frame, reduce)
                if pixels.signed:
                    expected = expected.astype(int) - 2**15  # Pillow has no signed 16 bits
                assert np.array_equal(codec.decode(frame, syntax, pixels, reduce=reduce), expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"progression": "RPCL"},
            {"progression": "RLCP", "precinct_size": (128, 128)},
            {"progression": "LRCP"},
            {"progression": "LRCP", "quality_layers": [40, 20, 1]},
            {"progression": "PCRL"},
            {"progression": "CPRL"},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("shape", [(199, 135), (199, 135, 3)], ids=str)
    def test_every_progression(self, options: dict[str, object], shape: tuple[int, ...]) -> None:
        image = blobs(shape)
        stream = by_openjpeg(image, **options)
        for reduce in (1, 2, 3):
            found = codec.decode(stream, J2K, format_of(image), reduce=reduce)
            assert np.array_equal(found, reduced_by_openjpeg(stream, reduce))

    def test_irreversible_streams(self, head_ct: list[np.ndarray], shared_data: Path) -> None:
        """The decoder's own low-pass band of the 9/7 wavelet; where it leaves the stored range it is clipped."""
        colour = pydicom.dcmread(shared_data / "htj2k" / "dicom" / "VL1_UNC.dcm").pixel_array
        assert head_ct[0].max() < 4096
        for image, bits in ((np.minimum(head_ct[0] * 3, 4095).astype(np.uint16), 12), (colour, 8)):
            pixels = format_of(image, bits)
            planar = False if image.ndim == 3 else None
            high = imagecodecs.htj2k_encode(
                image, 0.001, reversible=False, tlm=True, tilepart=1, resolutions=3, planar=planar
            )
            old = bytes(imagecodecs.jpeg2k_encode(image, 50, reversible=False, codecformat="J2K", resolutions=4))
            for reduce in (1, 2, 3):
                plain = imagecodecs.htj2k_decode(high, skipres=reduce)
                size, _ = ask(high, HTJ2K_LOSSY, pixels, reduce)
                assert size
                found = codec.decode(high[:size], HTJ2K_LOSSY, pixels, reduce=reduce)
                assert np.array_equal(found, np.clip(plain, 0, 2**bits - 1))
                found = codec.decode(old, J2K_LOSSY, pixels, reduce=reduce).astype(int)
                expected = np.clip(reduced_by_openjpeg(old, reduce).astype(int), 0, 2**bits - 1)
                assert np.abs(found - expected).max() <= 1  # two builds of OpenJPEG round a float in two ways
                assert (found != expected).mean() < 1e-4
            beyond = codec.decode(high, HTJ2K_LOSSY, pixels, reduce=5)
            assert beyond.shape == pixels.reduced(5).shape
            small = wavelet.low_pass(imagecodecs.htj2k_decode(high, skipres=3), 2)
            assert np.array_equal(beyond, np.clip(small, 0, 2**bits - 1))

    def test_every_lossless_syntax_gives_the_same(self, shared_data: Path) -> None:
        folder = shared_data / "transfer-syntaxes-ctimage"
        reference, _, pixels = frame_of(next(folder.glob("*_1.2.840.10008.1.2.1.dcm")))
        image = codec.decode(reference, EXPLICIT_LE, pixels)
        seen = set()
        for path in sorted(folder.glob("*.dcm")):
            uid = path.stem.rsplit("_", 1)[1]
            if not uid.endswith((".4.57", ".4.70", ".4.80", ".4.90", ".2.5", "10008.1.2.1")):
                continue
            frame, syntax, pixels = frame_of(path)
            for reduce in (1, 3):
                found = codec.decode(frame, syntax, pixels, reduce=reduce)
                assert np.array_equal(found, clipped(wavelet.low_pass(image, reduce), pixels))
                size, _ = ask(frame, syntax, pixels, reduce)
                assert (size is not None) == (syntax == J2K)
                assert np.array_equal(codec.decode(frame[:size], syntax, pixels, reduce=reduce), found)
            seen.add(uid)
        assert len(seen) == 6


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each HTJ2K decode took the stream as it is, and its 16 bits."""
    found: list[bool] = []
    decoder = imagecodecs.htj2k_decode

    def spy(data: object, **options: object) -> np.ndarray:
        found.append(bool(options["skipres"]))
        return decoder(data, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(imagecodecs, "htj2k_decode", spy)
    return found


class TestExtremes:
    """With the extremes of a frame its low-pass values come out of 16 bits, and are the same."""

    @pytest.mark.parametrize("shape", [*SHAPES, (257, 300)], ids=str)
    @pytest.mark.parametrize(
        ("dtype", "bits", "low", "high"),
        [
            ("i2", 16, -2000, 2202),
            ("i2", 16, -1024, 3071),
            ("i2", 12, -2048, 2047),
            ("i2", 14, -8192, 8191),
            ("i2", 16, 11_000, 32_767),
            ("i2", 16, -32_768, -12_000),
            ("u2", 12, 0, 4095),
            ("u2", 14, 0, 16_383),
            ("u2", 16, 0, 22_000),
            ("u2", 16, 43_600, 65_535),
            ("u2", 16, 20_000, 41_000),
            ("u2", 16, 7, 7),
        ],
    )
    def test_values_are_those_of_the_wavelet(
        self, calls: list[bool], dtype: str, bits: int, low: int, high: int, shape: tuple[int, ...]
    ) -> None:
        random = np.random.default_rng([*shape, high - low])
        on = np.indices(shape[:2])
        taps = np.array([0, 0, 1, 1, 1, 0, 0, 1])
        checks = [on[0] + on[1] & 1, taps[on[0] % 8] ^ taps[on[1] % 8], on[0] // 5 + on[1] // 3 & 1]
        if len(shape) == 3:
            checks = [np.stack([check, 1 - check, check], axis=2) for check in checks]
        for choice in (*checks, random.integers(0, 2, shape), random.random(shape)):
            image = (low + np.round(choice * (high - low))).astype(dtype)
            pixels = format_of(image, bits)
            stream = jpeg2000.encode_htj2k(image)
            sizes = codec.prefixes(stream, HTJ2K_LOSSLESS_RPCL, pixels)
            for reduce in range(1, 6):
                expected = clipped(wavelet.low_pass(image, reduce, colour_transform=image.ndim == 3), pixels)
                calls.clear()
                whole = codec.decode(stream, HTJ2K_LOSSLESS_RPCL, pixels, reduce=reduce, extremes=(low, high))
                assert calls == [True], "took the long way"
                assert (whole.dtype, whole.shape) == (pixels.dtype, expected.shape)
                assert np.array_equal(whole, expected)
                out = np.full((3, *expected.shape), 7, dtype)
                cut = memoryview(stream)[: sizes[min(reduce, len(sizes)) - 1]]
                narrow = tuple(np.array([low, high], dtype))
                strided = np.full((2 * len(expected), *expected.shape[1:]), 7, dtype)[::2]
                for data, place in ((cut, out[1]), (boxed(stream), strided)):
                    found = codec.decode(data, HTJ2K_LOSSLESS_RPCL, pixels, out=place, reduce=reduce, extremes=narrow)
                    assert found is place
                    assert np.array_equal(found, expected)
                assert (out[::2] == 7).all()

    @pytest.mark.parametrize("reduce", [1, 2, 3, 4, 5])
    @pytest.mark.parametrize(("dtype", "least", "most"), [("i2", -(2**15), 2**15 - 1), ("u2", 0, 2**16 - 1)])
    def test_at_the_limit_of_what_16_bits_hold(
        self, calls: list[bool], dtype: str, least: int, most: int, reduce: int
    ) -> None:
        """The widest frames that are decoded so, with the largest overshoot there is; wider ones go the other way."""
        choice = largest_sum(reduce)
        bounds = [wavelet.low_pass_range(0, span, reduce) for span in range(32_000)]
        span = sum(high - low < 2**16 for low, high in bounds) - 1
        for low in (least, (least + most - span) // 2, most - span):
            for width, narrow in ((span, True), (span + 1, False)):
                high = min(low + width, most)
                start = high - width
                for image in (np.where(choice, start, high), np.where(choice, high, start)):
                    stream = jpeg2000.encode_htj2k(image.astype(dtype))
                    pixels = format_of(image.astype(dtype))
                    calls.clear()
                    found = codec.decode(stream, HTJ2K_LOSSLESS_RPCL, pixels, reduce=reduce, extremes=(start, high))
                    assert calls == [narrow]
                    assert np.array_equal(found, clipped(wavelet.low_pass(image, reduce), pixels))

    @pytest.mark.parametrize("bits", [9, 10, 12, 13])
    @pytest.mark.parametrize("signed", [False, True])
    def test_streams_of_the_stored_depth(self, calls: list[bool], bits: int, signed: bool) -> None:
        """As other encoders write them: the depth of the stream is Bits Stored."""
        half = 1 << bits - 1
        for centred in patterns("i2", bits, (130, 141)):
            stream = stated(jpeg2000.encode_htj2k(centred), (0x80 if signed else 0) | bits - 1)
            image = centred if signed else (centred + half).astype("u2")
            pixels = format_of(image, bits)
            assert jpeg2000.inspect(stream).precision == bits
            assert np.array_equal(codec.decode(stream, HTJ2K, pixels), image)
            for reduce in range(1, 5):
                expected = clipped(wavelet.low_pass(image, reduce), pixels)
                calls.clear()
                extremes = (int(image.min()), int(image.max()))
                found = codec.decode(stream, HTJ2K, pixels, reduce=reduce, extremes=extremes)
                assert calls == [True]
                assert np.array_equal(found, expected)
                assert np.array_equal(codec.decode(stream, HTJ2K, pixels, reduce=reduce), expected)

    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(1, 150),
        st.integers(1, 150),
        st.sampled_from([("u1", 8), ("i1", 8), ("u2", 12), ("u2", 16), ("i2", 13), ("i2", 16), ("i4", 20)]),
        st.sampled_from([HTJ2K_LOSSLESS_RPCL, J2K]),
        st.booleans(),
        st.integers(1, 6),
        st.integers(0, 2**32 - 1),
    )
    def test_make_no_difference(
        self, rows: int, columns: int, depth: tuple[str, int], syntax: str, colour: bool, reduce: int, seed: int
    ) -> None:
        dtype, bits = depth
        random = np.random.default_rng(seed)
        least = -(2 ** (bits - 1)) if dtype[0] == "i" else 0
        extremes = sorted(random.integers(least, least + 2**bits, 2).tolist())
        shape = (rows, columns, 3) if colour else (rows, columns)
        image = random.choice(extremes, shape).astype(dtype)
        if syntax == J2K and image.itemsize == 4:
            return
        pixels = format_of(image, bits)
        stream = ENCODERS[syntax](image)
        found = codec.decode(stream, syntax, pixels, reduce=reduce, extremes=tuple(extremes))
        assert np.array_equal(found, codec.decode(stream, syntax, pixels, reduce=reduce))
        differences = colour and syntax == HTJ2K_LOSSLESS_RPCL
        assert np.array_equal(found, clipped(wavelet.low_pass(image, reduce, colour_transform=differences), pixels))

    @pytest.mark.parametrize("dtype", ["i2", "u2"])
    def test_that_are_wrong_harm_nothing_but_values(self, calls: list[bool], dtype: str) -> None:
        *_, image = patterns(dtype, 16, (150, 140))
        pixels = format_of(image)
        stream = jpeg2000.encode_htj2k(image)
        right = codec.decode(stream, HTJ2K_LOSSLESS_RPCL, pixels, reduce=2)
        for extremes in ((0, 0), (3, 5), (30_000, 30_001)):
            found = codec.decode(stream, HTJ2K_LOSSLESS_RPCL, pixels, reduce=2, extremes=extremes)
            assert (found.shape, found.dtype) == (right.shape, right.dtype)
        for impossible in ((5, 3), (-40_000, -39_000), (70_000, 70_001), (-(10**9), 10**9)):
            calls.clear()
            found = codec.decode(stream, HTJ2K_LOSSLESS_RPCL, pixels, reduce=2, extremes=impossible)
            assert calls == [False]
            assert np.array_equal(found, right)

    @pytest.mark.parametrize(("dtype", "depth"), [("u1", 8), ("i1", 8), ("i4", 17), ("i4", 20)])
    def test_of_depths_that_are_not_decoded_in_16_bits(self, calls: list[bool], dtype: str, depth: int) -> None:
        for image in patterns(dtype, min(depth, 12), (130, 140)):
            pixels = format_of(image, depth)
            stream = jpeg2000.encode_htj2k(image)
            if depth > 8:
                stream = stated(stream, 0x80 | depth - 1)
            extremes = (int(image.min()), int(image.max()))
            for reduce in (1, 2):
                calls.clear()
                found = codec.decode(stream, HTJ2K_LOSSLESS_RPCL, pixels, reduce=reduce, extremes=extremes)
                assert calls == [False]
                assert np.array_equal(found, clipped(wavelet.low_pass(image, reduce), pixels))

    def test_of_a_single_tile_part(self, calls: list[bool]) -> None:
        """A part that goes on behind the cut is for the smaller stream; one that is here whole is not."""
        image = slope(150, 140)
        pixels = format_of(image)
        frame = in_one_part(jpeg2000.encode_htj2k(image))
        sizes = codec.prefixes(frame, HTJ2K, pixels)
        assert len(sizes) == 2
        for reduce, size in enumerate(sizes, start=1):
            expected = clipped(wavelet.low_pass(image, reduce), pixels)
            for data in (frame, frame[:size]):
                calls.clear()
                assert np.array_equal(codec.decode(data, HTJ2K, pixels, reduce=reduce, extremes=(0, 10_499)), expected)
                assert calls == [data is frame]
            unmarked = imagecodecs.htj2k_encode(image, reversible=True, resolutions=2)
            calls.clear()
            found = codec.decode(unmarked, HTJ2K, pixels, reduce=reduce, extremes=(0, 10_499))
            assert np.array_equal(found, expected)
            assert calls == [True]

    def test_of_streams_without_room_change_nothing(self, head_ct: list[np.ndarray]) -> None:
        """One tile-part cut by packet lengths, irreversible ones, and ones that end too early."""
        image = head_ct[0].astype(np.uint16)
        pixels = format_of(image, 12)
        high = imagecodecs.htj2k_encode(image, 0.001, reversible=False, tlm=True, tilepart=1, resolutions=3)
        single = imagecodecs.htj2k_encode(image, reversible=True)
        stream = jpeg2000.encode_htj2k(image)
        for frame, syntax in ((high, HTJ2K_LOSSY), (single, HTJ2K), (stream, HTJ2K_LOSSLESS_RPCL)):
            for reduce in (1, 2, 3, 7):
                plain = codec.decode(frame, syntax, pixels, reduce=reduce)
                assert np.array_equal(codec.decode(frame, syntax, pixels, reduce=reduce, extremes=(0, 4095)), plain)
        for reduce, size in enumerate(codec.prefixes(stream, HTJ2K_LOSSLESS_RPCL, pixels), start=1):
            with pytest.raises(DecodeError, match="ends before"):
                codec.decode(
                    stream[: size - 1], HTJ2K_LOSSLESS_RPCL, pixels, reduce=reduce, extremes=(0, int(image.max()))
                )


class TestOut:
    @pytest.mark.parametrize("syntax", [*ENCODERS, EXPLICIT_LE])
    @pytest.mark.parametrize("dtype", ["u2", "i2"])
    def test_is_written_to_and_returned(self, syntax: str, dtype: str) -> None:
        *_, image = patterns(dtype, 16, (70, 67))
        data = ENCODERS.get(syntax, np.ndarray.tobytes)(image)
        expected = clipped(wavelet.low_pass(image, 1), format_of(image))
        batch = np.full((3, 35, 34), 7, dtype)
        wide = np.full((35, 68), 7, dtype)
        for out in (batch[1], wide[:, ::2]):
            assert codec.decode(data, syntax, format_of(image), out=out, reduce=1) is out
            assert np.array_equal(out, expected)
        assert (batch[::2] == 7).all()
        assert (wide[:, 1::2] == 7).all()

    def test_of_the_full_shape_is_refused(self) -> None:
        image = slope()
        with pytest.raises(DecodeError, match="decode into"):
            codec.decode(
                jpeg2000.encode_htj2k(image), HTJ2K_LOSSLESS_RPCL, format_of(image), out=np.empty_like(image), reduce=1
            )


class TestNotBlended:
    """A value between two names is no name: every 2**r-th sample is taken."""

    def test_masks(self) -> None:
        mask = np.random.default_rng(0).integers(0, 2, (37, 50), np.uint8)
        pixels = PixelFormat(37, 50, 1, 1, 1)
        for reduce in (1, 2, 7):
            found = codec.decode(codec.pack_bits(mask), EXPLICIT_LE, pixels, reduce=reduce)
            assert np.array_equal(found, mask[:: 2**reduce, :: 2**reduce])

    @pytest.mark.parametrize("change", [{"photometric": "PALETTE COLOR"}, {"labels": True}], ids=str)
    @pytest.mark.parametrize("syntax", ENCODERS)
    def test_labels_and_indices(self, syntax: str, change: dict[str, object]) -> None:
        image = np.random.default_rng(0).choice(np.array([0, 7, 200], np.uint8), (90, 75))
        pixels = replace(format_of(image), **change)
        data = ENCODERS[syntax](image)
        out = np.empty((23, 19), np.uint8)
        assert codec.decode(data, syntax, pixels, reduce=2, out=out) is out
        assert np.array_equal(out, image[::4, ::4])
        assert codec.levels(data, syntax, pixels) == 0
        assert codec.prefix(data, syntax, pixels, 2) == codec.Prefix(None, True)
        with pytest.raises(DecodeError):
            codec.decode(data[: len(data) // 2], syntax, pixels, reduce=2)


class TestPrefix:
    @pytest.mark.parametrize("box", [False, True], ids=["raw", "JP2"])
    @pytest.mark.parametrize(
        "signalling",
        [{}, {"tlm": False}, {"tlm": False, "total": 0}, {"tlm": False, "total": 0, "open_end": True}],
        ids=str,
    )
    @pytest.mark.parametrize("shape", [(150, 140), (257, 513), (260, 131, 3)], ids=str)
    def test_is_exact_and_as_short_as_can_be(
        self, shape: tuple[int, ...], signalling: dict[str, object], box: bool
    ) -> None:
        *_, image = patterns("u2", 12, shape)
        stream = with_signalling(jpeg2000.encode_htj2k(image), **signalling)  # type: ignore[arg-type]
        frame = boxed(stream) if box else stream
        pixels = format_of(image, 12)
        levels = codec.levels(frame, HTJ2K_LOSSLESS_RPCL, pixels)
        ends = [at + len(frame) - len(stream) for at in resolutions_end(jpeg2000.encode_htj2k(image))]
        ends = [at - (len(jpeg2000.encode_htj2k(image)) - len(stream)) for at in ends]
        assert codec.prefix(frame, HTJ2K_LOSSLESS_RPCL, pixels, 0) == codec.Prefix(None, True)
        for reduce in range(1, levels + 2):
            end = ends[max(levels - reduce, 0)]
            size, read = ask(frame, HTJ2K_LOSSLESS_RPCL, pixels, reduce)
            assert size == end
            assert read <= max(end, 4096)
            expected = clipped(wavelet.low_pass(image, reduce, colour_transform=image.ndim == 3), pixels)
            for length in (end, end + 1, len(frame) - 1, len(frame)):
                cut = memoryview(frame)[:length]
                assert np.array_equal(codec.decode(cut, HTJ2K_LOSSLESS_RPCL, pixels, reduce=reduce), expected)
            for length in {end - 1, end - 13, end // 2, 200, 20, 0}:
                if length < end:
                    with pytest.raises(DecodeError):
                        codec.decode(frame[:length], HTJ2K_LOSSLESS_RPCL, pixels, reduce=reduce)

    @pytest.mark.parametrize(
        "options",
        [
            {"progression": "RPCL"},
            {"progression": "RPCL", "precinct_size": (64, 64), "codeblock_size": (16, 16)},
            {"progression": "RLCP", "precinct_size": (128, 128)},
            {"progression": "LRCP"},
            {"progression": "RPCL", "quality_layers": [40, 20, 1]},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("shape", [(335, 263), (335, 263, 3)], ids=str)
    def test_from_packet_lengths(self, options: dict[str, object], shape: tuple[int, ...]) -> None:
        """A single tile-part with PLT, by OpenJPEG."""
        image = blobs(shape)
        frame = by_openjpeg(image, plt=True, **options)
        pixels = format_of(image)
        sizes = []
        for reduce in (1, 2, 3):
            size, read = ask(frame, J2K, pixels, reduce)
            assert size is not None
            assert size < len(frame) / 2
            assert read < size + 4096
            sizes.append(size)
            whole = codec.decode(frame, J2K, pixels, reduce=reduce)
            assert np.array_equal(whole, reduced_by_openjpeg(frame, reduce))
            assert np.array_equal(codec.decode(frame[:size], J2K, pixels, reduce=reduce), whole)
            with pytest.raises(DecodeError):
                codec.decode(frame[: size - 1], J2K, pixels, reduce=reduce)
            packets = frame.index(b"\xff\x93") + 2
            for first in range(frame.index(b"\xff\x90") + 4, packets + 8, 5):
                read = first if first >= packets else packets + 2
                assert ask(frame, J2K, pixels, reduce, first=first) == (size, read)
        assert sizes == sorted(sizes, reverse=True)

    def test_of_streams_that_cannot_be_cut(self, shared_data: Path) -> None:
        """The whole frame is asked for, decodes to the low-pass band of its pixels, and is refused when cut."""
        image = slope(200, 131, "u1") // 3
        odd = (shared_data / "htj2k" / "openjph-odd-sizes" / "simple_enc_rev53_tall_narrow1.j2c").read_bytes()
        high = jpeg2000.encode_htj2k(image)
        other_sign = replace(format_of(image), signed=True)
        cases = [
            (by_openjpeg(image, progression="PCRL", plt=True), J2K, format_of(image)),
            (by_openjpeg(image, progression="LRCP", quality_layers=[20, 1], plt=True), J2K, format_of(image)),
            (by_openjpeg(image, progression="RPCL", tile_size=(64, 64)), J2K, format_of(image)),
            (imagecodecs.htj2k_encode(image, reversible=True, tile=(64, 64)), HTJ2K, format_of(image)),
            (high, HTJ2K_LOSSLESS_RPCL, other_sign),
            (odd, HTJ2K, PixelFormat(256, 16, 3, 8, 8, photometric="RGB")),  # begins in column 1
        ]
        for frame, syntax, pixels in cases:
            assert ask(frame, syntax, pixels, 1)[0] is None
            full = codec.decode(frame, syntax, pixels)
            expected = wavelet.low_pass(full, 1, colour_transform=pixels.samples == 3)
            assert np.array_equal(codec.decode(frame, syntax, pixels, reduce=1), clipped(expected, pixels))
            for length in (len(frame) // 2, len(frame) - 10):
                with pytest.raises(DecodeError):
                    codec.decode(frame[:length], syntax, pixels, reduce=1)

    def test_tile_parts_that_may_be_something_else(self) -> None:
        """Colour of an unsaid number of tile-parts: one a resolution is the data store's habit, not everyone's."""
        *_, image = patterns("u1", 8, (150, 140, 3))
        pixels = format_of(image)
        by_component = with_signalling(jpeg2000.encode_htj2k(image), tlm=False, total=9)
        unsaid = with_signalling(jpeg2000.encode_htj2k(image), tlm=False, total=0)
        expected = clipped(wavelet.low_pass(image, 1, colour_transform=True), pixels)
        for frame in (by_component, unsaid):
            assert ask(frame, HTJ2K, pixels, 1)[0] is None
            assert np.array_equal(codec.decode(frame, HTJ2K, pixels, reduce=1), expected)
        assert ask(by_component, HTJ2K_LOSSLESS_RPCL, pixels, 1)[0] is None
        assert ask(unsaid, HTJ2K_LOSSLESS_RPCL, pixels, 1)[0] is not None

    def test_tile_parts_in_the_middle_of_resolutions(self) -> None:
        """With the whole frame at hand nothing is left out by their count."""
        image = blobs((199, 135, 3))
        frame = part_a_packet(by_openjpeg(image, plt=True, progression="RPCL", no_jp2=True))
        for reduce in (1, 2, 3):
            expected = clipped(wavelet.low_pass(image, reduce, colour_transform=True), format_of(image))
            for syntax in (J2K, HTJ2K_LOSSLESS_RPCL):
                assert np.array_equal(codec.decode(frame, syntax, format_of(image), reduce=reduce), expected)

    def test_headers_of_tile_parts(self) -> None:
        """Comments change nothing; a coding style or an order of their own means that nothing can be left out."""
        image = slope()
        pixels = format_of(image)
        stream = jpeg2000.encode_htj2k(image)
        at = stream.index(b"\xff\x5c")
        own_steps = stream[at : at + 2 + struct.unpack_from(">H", stream, at + 2)[0]]
        expected = clipped(wavelet.low_pass(image, 1), pixels)
        for segment, cut in ((b"\xff\x64\0\x06\0\1hm", True), (own_steps, False)):
            frame = in_tile_part_header(stream, segment)
            size, _ = ask(frame, HTJ2K_LOSSLESS_RPCL, pixels, 1)
            assert (size is not None) == cut
            assert np.array_equal(codec.decode(frame[:size], HTJ2K_LOSSLESS_RPCL, pixels, reduce=1), expected)

    @pytest.mark.parametrize("offset", [(1, 0), (0, 1)])
    def test_images_that_begin_beside_the_origin_are_not_cut(self, offset: tuple[int, int]) -> None:
        """Their low-pass samples sit on other samples of the image."""
        stream = bytearray(jpeg2000.encode_htj2k(slope()))
        for at in (8, 16, 24):  # extent, image origin, tile size
            for axis in (0, 1):
                (value,) = struct.unpack_from(">I", stream, at + 4 * axis)
                struct.pack_into(">I", stream, at + 4 * axis, value + offset[axis])
        assert codec.levels(stream, HTJ2K_LOSSLESS_RPCL, format_of(slope())) == 0
        assert codec.prefix(stream, HTJ2K_LOSSLESS_RPCL, format_of(slope()), 1) == codec.Prefix(None, True)

    def test_of_bytes_that_are_no_stream(self) -> None:
        pixels = PixelFormat(64, 64)
        for data in (b"\0" * 5000, b"\xff\x4f\xff\x51" + b"\xff" * 5000, jpeg2000.encode_htj2k(slope())[:100] * 60):
            assert codec.prefix(data, HTJ2K_LOSSLESS_RPCL, pixels, 1) == codec.Prefix(None, True)
        assert not codec.prefix(b"", HTJ2K_LOSSLESS_RPCL, pixels, 1).known
        assert codec.prefix(b"", EXPLICIT_LE, pixels, 1) == codec.Prefix(None, True)

    @pytest.mark.parametrize("box", [False, True], ids=["raw", "JP2"])
    @pytest.mark.parametrize("shape", [(150, 140), (257, 513), (260, 131, 3)], ids=str)
    def test_all_at_once(self, shape: tuple[int, ...], box: bool) -> None:
        *_, image = patterns("u2", 12, shape)
        pixels = format_of(image, 12)
        stream = jpeg2000.encode_htj2k(image)
        for signalling in ({}, {"tlm": False}, {"tlm": False, "total": 0}, {"total": 0, "open_end": True}):
            frame = with_signalling(stream, **signalling)  # type: ignore[arg-type]
            frame = boxed(frame) if box else frame
            sizes = codec.prefixes(frame, HTJ2K_LOSSLESS_RPCL, pixels)
            assert len(sizes) == codec.levels(frame, HTJ2K_LOSSLESS_RPCL, pixels) > 0
            assert [codec.Prefix(size, True) for size in sizes] == [
                codec.prefix(frame, HTJ2K_LOSSLESS_RPCL, pixels, reduce) for reduce in range(1, len(sizes) + 1)
            ]
            for reduce in range(1, len(sizes) + 3):
                cut = frame[: sizes[min(reduce, len(sizes)) - 1]]
                for extremes in (None, (0, 4095)):
                    found = codec.decode(cut, HTJ2K_LOSSLESS_RPCL, pixels, reduce=reduce, extremes=extremes)
                    assert np.array_equal(found, codec.decode(frame, HTJ2K_LOSSLESS_RPCL, pixels, reduce=reduce))
            assert codec.prefixes(frame[: sizes[0] - 1], HTJ2K_LOSSLESS_RPCL, pixels) == ()

    def test_all_at_once_from_packet_lengths(self) -> None:
        image = blobs((335, 263))
        frame = by_openjpeg(image, plt=True, progression="RPCL")
        sizes = codec.prefixes(frame, J2K, format_of(image))
        assert list(sizes) == [ask(frame, J2K, format_of(image), reduce)[0] for reduce in (1, 2, 3)]

    def test_all_at_once_of_what_is_needed_whole(self) -> None:
        image = slope(200, 131, "u1") // 3
        pixels = format_of(image)
        stream = jpeg2000.encode_htj2k(image)
        unsaid = part_a_packet(
            by_openjpeg(blobs((199, 135)), plt=True, progression="RPCL", no_jp2=True, precinct_size=(32, 32))
        )
        cases = [
            (stream, HTJ2K_LOSSLESS_RPCL, replace(pixels, signed=True)),
            (stream, HTJ2K_LOSSLESS_RPCL, replace(pixels, labels=True)),
            (stream, HTJ2K_LOSSLESS_RPCL, replace(pixels, rows=199)),
            (image.tobytes(), EXPLICIT_LE, pixels),
            (b"", HTJ2K_LOSSLESS_RPCL, pixels),
            (b"\0" * 5000, HTJ2K_LOSSLESS_RPCL, pixels),
            (unsaid, HTJ2K_LOSSLESS_RPCL, format_of(blobs((199, 135)))),
        ]
        for frame, syntax, given_pixels in cases:
            assert codec.prefixes(frame, syntax, given_pixels) == ()

    def test_headers_alike_are_told_apart(self) -> None:
        """What was read of one frame is used for the next that begins so: never where they differ."""
        image = slope()
        pixels = format_of(image)
        plain = jpeg2000.encode_htj2k(image)
        sot, tlm = plain.index(b"\xff\x90"), plain.index(b"\xff\x55")

        def comment(text: bytes) -> bytes:
            return b"\xff\x64" + struct.pack(">H", 4 + len(text)) + b"\0\1" + text

        def with_order(stream: bytes) -> bytes:
            at = stream.index(b"\xff\x52")
            return stream[:at] + b"\xff\x5f\0\x09" + bytes(7) + stream[at:]  # POC: an order of its own

        streams = [
            plain,
            plain[:tlm] + comment(b"markers \xff\x90 and \xff\x55\0\4 in it") + plain[tlm:],
            plain[:tlm] + comment(b"\xff\x55\0\x1c" + bytes(20)) + plain[tlm:],
            plain[:sot] + comment(b"behind") + plain[sot:],
            plain[:sot] + plain[tlm:sot].replace(b"\xff\x55\0\x1c\0", b"\xff\x55\0\x1c\1") + plain[sot:],
            plain[:tlm] + comment(b"\xff\x55\0\2") + plain[sot:],
            plain[:tlm] + comment(b"\xff\x55\0\6text") + plain[sot:],
            plain[:sot] + comment(bytes(3000)) + plain[sot:],
        ]
        expected = clipped(wavelet.low_pass(image, 1), pixels)
        for _ in range(2):
            for stream in streams:
                layout = layout_of(stream)
                assert layout is not None
                at = len(stream) - len(plain[sot:])
                assert layout.body == at
                begins, ends = zip(*((begin, begin + size) for _, begin, size in layout.segments), strict=True)
                assert (*begins[1:], at) == ends
                for marker, begin, size in layout.segments:
                    assert struct.unpack_from(">H", stream, begin) == (marker,)
                    if marker != 0xFF55:
                        assert layout.header[begin : begin + size] == stream[begin : begin + size]
                for extremes in (None, (0, 10_499)):
                    found = codec.decode(stream, HTJ2K_LOSSLESS_RPCL, pixels, reduce=1, extremes=extremes)
                    assert np.array_equal(found, expected)
                assert layout_of(with_order(stream)) is None
                with pytest.raises(DecodeError):
                    layout_of(stream[: at - 3])

    def test_levels(self) -> None:
        image = slope(300, 260)
        pixels = format_of(image)
        for levels in (1, 2, 5):
            stream = imagecodecs.htj2k_encode(image, reversible=True, tilepart=1, resolutions=levels)
            assert codec.levels(stream, HTJ2K_LOSSLESS_RPCL, pixels) == levels
            assert codec.levels(boxed(stream)[:400], HTJ2K_LOSSLESS_RPCL, pixels) == levels
        assert codec.levels(image.tobytes(), EXPLICIT_LE, pixels) == 0
        assert codec.levels(imagecodecs.jpegls_encode(image.view("u2")), JPEG_LS, pixels) == 0
        with pytest.raises(DecodeError):
            codec.levels(stream[:30], HTJ2K_LOSSLESS_RPCL, pixels)


class TestSmallerStream:
    """What is left of a stream is a stream: the second decoder, which minds what is missing, reads it too."""

    @pytest.mark.parametrize("reduce", [1, 2])
    @pytest.mark.parametrize("shape", [(150, 140), (150, 140, 3)], ids=str)
    def test_is_complete_in_itself(self, shape: tuple[int, ...], reduce: int) -> None:
        *_, image = patterns("i2", 14, shape)
        frame = boxed(jpeg2000.encode_htj2k(image))
        layout = layout_of(frame)
        assert layout is not None
        end = progressive.resolution_end(frame, layout, reduce)
        assert end is not None
        made = bytes(reduced.smaller_stream(frame, layout, reduce, end))
        info = jpeg2000.inspect(made)
        assert (info.rows, info.columns, info.levels) == (*format_of(image).reduced(reduce).shape[:2], 2 - reduce)
        assert b"\xff\x55" not in made[: made.index(b"\xff\x90")], "TLM of what is no longer there"
        at = made.index(b"\xff\x5c")
        assert struct.unpack_from(">H", made, at + 2)[0] == 3 + 3 * info.levels + 1, "a step a subband"
        ends = resolutions_end(made)
        assert len(ends) == info.levels + 1
        assert made[ends[-1] :] == b"\xff\xd9"
        assert {made[begin + 11] for begin in [made.index(b"\xff\x90"), *ends[:-1]]} == {len(ends)}
        expected = wavelet.low_pass(image, reduce, colour_transform=image.ndim == 3)
        assert np.array_equal(openjpeg.decode(made, 0), expected)
        assert np.array_equal(imagecodecs.htj2k_decode(made), expected)


class TestAgain:
    """What is worked out for the first decoding holds for the next ones."""

    @pytest.mark.parametrize("reduce", [1, 2])
    @pytest.mark.parametrize("extremes", [None, (0, 65535), (0, 4000)], ids=str)
    @pytest.mark.parametrize("shape", [(150, 140), (150, 140, 3)], ids=str)
    def test_a_prepared_frame_is_decoded_again(
        self, shape: tuple[int, ...], extremes: tuple[int, int] | None, reduce: int
    ) -> None:
        top = 4000 if extremes == (0, 4000) else 65535
        image = np.random.default_rng(reduce).choice([0, 1, top - 1, top], shape).astype(np.uint16)
        pixels = format_of(image)
        frame = boxed(jpeg2000.encode_htj2k(image))
        prepared = codec.prepare(frame, HTJ2K_LOSSLESS_RPCL, pixels, reduce=reduce, extremes=extremes)
        expected = clipped(low_image(image, reduce, differences=image.ndim == 3), pixels)
        for _ in range(3):
            out = np.full(expected.shape, 77, np.uint16)
            prepared(out)
            np.testing.assert_array_equal(out, expected)


class TestHostileBytes:
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # OpenJPH, of damaged blocks
    def test_damaged_headers_never_end_the_process(self) -> None:
        random = np.random.default_rng(11)
        image = slope(150, 140, "u1")
        pixels = format_of(image)
        streams = [
            (jpeg2000.encode_htj2k(image), HTJ2K_LOSSLESS_RPCL),
            (jpeg2000.encode_j2k(image), J2K),
            (by_openjpeg(image, plt=True, progression="RPCL", precinct_size=(64, 64)), J2K),
            (jpeg2000.encode_htj2k(image.astype(np.uint16)), HTJ2K_LOSSLESS_RPCL),
        ]
        for stream, syntax in streams:
            pixels = format_of(image.astype(f"u{1 if stream is not streams[-1][0] else 2}"))
            for _ in range(300):
                damaged = bytearray(stream)
                for at in random.integers(2, stream.index(b"\xff\x93"), random.integers(1, 4)):
                    damaged[at] = random.integers(256)
                reduce = int(random.integers(1, 5))
                found = codec.prefix(damaged, syntax, pixels, reduce)
                assert found.size is None or found.size > 0
                try:
                    low = codec.decode(bytes(damaged), syntax, pixels, reduce=reduce, extremes=(0, 255))
                except DecodeError:
                    continue
                assert (low.shape, low.dtype) == (pixels.reduced(reduce).shape, pixels.dtype)
