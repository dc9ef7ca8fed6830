"""Where resolutions end in streams of one tile-part that tell no lengths: what the headers of their packets say."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codec_reduced import HTJ2K, HTJ2K_LOSSY, J2K, J2K_LOSSY, ask, blobs, by_openjpeg, format_of, resolutions_end

from ahi_ml import codec
from ahi_ml.codec import PixelFormat, jpeg2000, packets
from ahi_ml.codec.layout import layout_of
from ahi_ml.errors import DecodeError

LRCP, RLCP, RPCL = 0, 1, 2
BYPASS, TERMINATE, HIGH_THROUGHPUT, MIXED = 0x01, 0x04, 0x40, 0x80
SOP, EPH = 0x02, 0x04


def without_lengths(stream: bytes) -> bytes:
    """The same stream of one tile-part without PLT."""
    sot, sod = stream.index(b"\xff\x90"), stream.index(b"\xff\x93")
    assert stream[sot + 12 : sot + 14] == b"\xff\x58"
    made = bytearray(stream[: sot + 12] + stream[sod:])
    psot = struct.unpack_from(">I", made, sot + 6)[0]
    struct.pack_into(">I", made, sot + 6, psot - (sod - sot - 12))
    return bytes(made)


def images(dtype: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Noise, nothing at all, and nothing but a corner: whole code-blocks and packets are empty."""
    limits = np.iinfo(dtype)
    noise = np.random.default_rng(list(shape)).integers(limits.min, limits.max, shape, dtype, endpoint=True)
    yield noise
    yield np.zeros(shape, dtype)
    corner = np.zeros(shape, dtype)
    corner[2 * shape[0] // 3 :, shape[1] // 2 :] = noise[2 * shape[0] // 3 :, shape[1] // 2 :] // 9
    yield corner


def check(frame: bytes, syntax: str, pixels: PixelFormat) -> tuple[int, ...]:
    """Each prefix decodes to the same as the whole, is refused when shorter, and is found step by step as well."""
    sizes = codec.prefixes(frame, syntax, pixels)
    assert len(sizes) == codec.levels(frame, syntax, pixels)
    for reduce, size in enumerate(sizes, start=1):
        whole = codec.decode(frame, syntax, pixels, reduce=reduce)
        for cut in (frame[:size], frame[: size + 1]):
            assert np.array_equal(codec.decode(cut, syntax, pixels, reduce=reduce), whole)
        with pytest.raises(DecodeError, match="ends before"):
            codec.decode(frame[: size - 1], syntax, pixels, reduce=reduce)
        found, read = ask(frame, syntax, pixels, reduce)
        assert found == size
        assert read <= max(4096, size * 9 // 8 + 64)
    return sizes


class TestStreams:
    @pytest.mark.parametrize(
        "options",
        [
            {"progression": "RPCL"},
            {"progression": "RPCL", "precinct_size": (64, 64), "codeblock_size": (16, 16)},
            {"progression": "RPCL", "quality_layers": [40, 20, 1], "precinct_size": (64, 64)},
            {"progression": "RPCL", "irreversible": True, "quality_layers": [30, 10]},
            {"progression": "RLCP", "precinct_size": (32, 32), "codeblock_size": (4, 64)},
            {"progression": "RLCP", "quality_layers": [40, 20, 5, 1], "precinct_size": (128, 128)},
            {"progression": "LRCP"},
            {"progression": "LRCP", "mct": 0},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("shape", [(335, 263), (130, 181, 3), (64, 8)], ids=str)
    def test_packet_headers_say_what_packet_lengths_say(
        self, options: dict[str, object], shape: tuple[int, ...]
    ) -> None:
        for image in (blobs(shape), *images("u1", shape)):
            told = by_openjpeg(image, plt=True, no_jp2=True, **options)
            frame = without_lengths(told)
            sizes = check(frame, J2K, format_of(image))
            assert len(sizes) == 3
            left_out = len(told) - len(frame)
            assert codec.prefixes(told, J2K, format_of(image)) == tuple(size + left_out for size in sizes)

    @pytest.mark.parametrize("dtype", ["u1", "i2", "u2"])
    @pytest.mark.parametrize("shape", [(257, 300), (70, 91, 3), (1, 1), (1, 40), (33, 1), (2, 3, 3)], ids=str)
    @pytest.mark.parametrize("reversible", [True, False])
    def test_high_throughput_ones_say_what_tile_parts_say(
        self, dtype: str, shape: tuple[int, ...], reversible: bool
    ) -> None:
        for image in images(dtype, shape):
            for colour in (False, True) if image.ndim == 3 else (None,):
                options = {"reversible": reversible, "planar": False if image.ndim == 3 else None, "rgb": colour}
                level = None if reversible else 0.001
                frame = imagecodecs.htj2k_encode(image, level, resolutions=3, **options)
                parted = imagecodecs.htj2k_encode(image, level, resolutions=3, tilepart=1, **options)
                sizes = check(frame, HTJ2K if reversible else HTJ2K_LOSSY, format_of(image))
                ends = resolutions_end(parted)
                headers = [14 * number for number in range(len(ends))]
                assert list(sizes) == [end - size for end, size in zip(ends, headers, strict=True)][-2::-1]

    @pytest.mark.parametrize("dtype", ["u1", "i2", "u2"])
    @pytest.mark.parametrize("shape", [(257, 300), (150, 181, 3), (1, 1), (1, 140), (90, 1)], ids=str)
    def test_of_the_data_store_in_jpeg_2000(self, dtype: str, shape: tuple[int, ...]) -> None:
        for image in images(dtype, shape):
            sizes = check(jpeg2000.encode_j2k(image), J2K, format_of(image))
            assert sizes or min(shape[:2]) == 1

    def test_irreversible_ones(self) -> None:
        image = blobs((200, 170)).astype(np.uint16) * 13
        frame = bytes(imagecodecs.jpeg2k_encode(image, 45, reversible=False, codecformat="J2K", resolutions=4))
        assert len(check(frame, J2K_LOSSY, format_of(image))) == 3

    def test_to_the_end_of_the_stream(self) -> None:
        """A tile-part that does not tell its length."""
        image = blobs((200, 170))
        frame = bytearray(jpeg2000.encode_j2k(image))
        told = codec.prefixes(frame, J2K, format_of(image))
        struct.pack_into(">I", frame, frame.index(b"\xff\x90") + 6, 0)
        assert check(bytes(frame), J2K, format_of(image)) == told

    def test_what_is_asked_grows_by_a_share(self) -> None:
        """Thousands of packets are not worth a question each."""
        image = blobs((1000, 900))
        frame = by_openjpeg(image, progression="RPCL", precinct_size=(16, 16), codeblock_size=(8, 8), no_jp2=True)
        size, asked = 1, 0
        while not (answer := codec.prefix(frame[:size], J2K, format_of(image), 1)).known:
            assert answer.size is not None
            size, asked = answer.size, asked + 1
        assert answer.size is not None
        assert asked < 60
        assert size < answer.size * 9 / 8


# ---- an encoder of packets without an image, by the rules of T.800 B.10, to reach what no encoder here writes ----


class Writer:
    """Bits of a packet header."""

    def __init__(self) -> None:
        self.made = bytearray()
        self.bits: list[int] = []

    def number(self, value: int, width: int) -> None:
        for place in reversed(range(width)):
            self.bits.append(value >> place & 1)
            if len(self.bits) == (7 if self.made[-1:] == b"\xff" else 8):
                self.made.append(int("".join(map(str, self.bits)), 2))
                self.bits.clear()

    def finish(self) -> bytes:
        while self.bits or self.made[-1:] == b"\xff":
            self.number(0, 1)
        return bytes(self.made)


class Tree:
    """A tag tree of known numbers: each node holds the least of up to four below it."""

    def __init__(self, values: np.ndarray) -> None:
        self.levels = [values]
        while self.levels[-1].size > 1:
            last = self.levels[-1]
            padded = np.pad(last, [(0, n % 2) for n in last.shape], constant_values=10**6)
            self.levels.append(padded.reshape(padded.shape[0] // 2, 2, -1, 2).min(axis=(1, 3)))
        self.said = [np.zeros(level.shape, int) for level in self.levels]
        self.final = [np.zeros(level.shape, bool) for level in self.levels]

    def say(self, writer: Writer, row: int, column: int, limit: int) -> None:
        least = 0
        for level in reversed(range(len(self.levels))):
            at = row >> level, column >> level
            said = max(least, self.said[level][at])
            while said < limit and not self.final[level][at]:
                if self.levels[level][at] > said:
                    writer.number(0, 1)
                    said += 1
                else:
                    writer.number(1, 1)
                    self.final[level][at] = True
            self.said[level][at] = least = said


def pass_count(writer: Writer, count: int) -> None:
    for first, width, most in ((1, 1, 0), (2, 2, 0), (3, 4, 2), (6, 9, 30), (37, 16, 127)):
        if count <= first + most:
            value = {1: 0, 2: 0b10, 3: 0b1100, 6: 0b111100000, 37: 0b1111111110000000}[first]
            writer.number(value + count - first, width)
            return


def terminated(index: int, style: int) -> bool:
    """Whether a segment ends with this pass, of all that a code-block can have (T.800 table D.9)."""
    return bool(style & TERMINATE) or (bool(style & BYPASS) and index >= 9 and index % 3 != 1)


@dataclass
class Coding:
    rows: int
    columns: int
    components: int
    levels: int
    layers: int
    order: int
    style: int
    markers: int
    block: tuple[int, int]
    precincts: list[tuple[int, int]]  # exponents: rows, columns

    def stream(self, random: np.random.Generator) -> tuple[bytes, list[int]]:
        """Random packets, and where each resolution ends."""
        body, ends = bytearray(), []
        for resolution in range(self.levels + 1):
            for packet in self.packets(resolution, random):
                body += packet
            ends.append(len(body))
        head = self.header(len(body))
        return head + bytes(body) + b"\xff\xd9", [len(head) + end for end in ends]

    def header(self, size: int) -> bytes:
        """All that comes before so many bytes of packets."""
        siz = struct.pack(">HIIIIIIII", 0x4000, self.columns, self.rows, 0, 0, self.columns, self.rows, 0, 0)
        siz += struct.pack(">H", self.components) + b"\x0b\1\1" * self.components
        cod = struct.pack(">BBHBB", 1 | self.markers, self.order, self.layers, 0, self.levels)
        cod += bytes([self.block[1] - 2, self.block[0] - 2, self.style, 1])
        cod += bytes([columns | rows << 4 for rows, columns in self.precincts])
        segments = [(0xFF51, siz), (0xFF52, cod), (0xFF5C, b"\x40" + b"\x60" * (3 * self.levels + 1))]
        if self.style & HIGH_THROUGHPUT:
            segments.insert(1, (0xFF50, struct.pack(">IH", 1 << 17, 0x0002)))
        head = b"\xff\x4f" + b"".join(struct.pack(">HH", kind, 2 + len(data)) + data for kind, data in segments)
        return head + struct.pack(">HHHIBBH", 0xFF90, 10, 0, 14 + size, 0, 1, 0xFF93)

    def packets(self, resolution: int, random: np.random.Generator) -> Iterator[bytes]:
        """In the order of the progression, by the samples that each code-block covers."""
        scale = 2 ** (self.levels - resolution)
        rows, columns = -(-self.rows // scale), -(-self.columns // scale)
        down, across = (2**exponent for exponent in self.precincts[resolution])
        places = [(y, x) for y in range(0, rows, down) for x in range(0, columns, across)]
        made: dict[tuple[int, int, int], list[bytes]] = {}
        for component in range(self.components):
            for y, x in places:
                blocks = []
                for first in [(0, 1), (1, 0), (1, 1)] if resolution else [None]:
                    # The samples of a subband are every other one of the resolution, from 0 or from 1 on.
                    half = 2 if first else 1
                    begin = y // half, x // half
                    offset = first or (0, 0)
                    stop = tuple(
                        min((at + size) // half, (extent + half - 1 - start) // half)
                        for at, size, extent, start in zip((y, x), (down, across), (rows, columns), offset, strict=True)
                    )
                    sides = [
                        2 ** min(exponent, most - (half - 1))
                        for exponent, most in zip(self.block, self.precincts[resolution], strict=True)
                    ]
                    counts = [len(range(b, s, side)) for b, s, side in zip(begin, stop, sides, strict=True)]
                    if all(counts):
                        blocks.append(tuple(counts))
                made[component, y, x] = list(self.layers_of(blocks, random))
        components = range(self.components)
        if self.order == RPCL:
            for y, x in places:
                for component in components:
                    yield from made[component, y, x]
        else:
            for layer in range(self.layers):
                for component in components:
                    for y, x in places:
                        yield made[component, y, x][layer]

    def layers_of(self, bands: list[tuple[int, int]], random: np.random.Generator) -> Iterator[bytes]:
        """The packets of one precinct, layer by layer."""
        starts = [random.integers(0, self.layers + 1, shape) for shape in bands]
        planes = [random.integers(0, 12, shape) for shape in bands]
        trees = [(Tree(start), Tree(plane)) for start, plane in zip(starts, planes, strict=True)]
        passes = [np.zeros(shape, int) for shape in bands]
        widths = [np.full(shape, 3) for shape in bands]
        for layer in range(self.layers):
            writer, size = Writer(), 0
            empty = random.random() < 0.2 and not any((start == layer).any() for start in starts)
            writer.number(not empty, 1)
            for band, shape in enumerate([] if empty else bands):
                for row, column in np.ndindex(shape):
                    before = int(passes[band][row, column])
                    if before:
                        goes_on = random.random() < 0.6
                        writer.number(goes_on, 1)
                        if not goes_on:
                            continue
                    else:
                        trees[band][0].say(writer, row, column, layer + 1)
                        if starts[band][row, column] > layer:
                            continue
                        trees[band][1].say(writer, row, column, 10**6)
                    count = int(random.choice([1, 2, 3, 5, 6, 20, 36, 37, 60])) if before < 100 else 1
                    pass_count(writer, count)
                    passes[band][row, column] += count
                    pieces = [0]
                    for index in range(before, before + count):
                        pieces[-1] += 1
                        if self.style & HIGH_THROUGHPUT:
                            ends = index == (count - 1) // 3 * 3
                        else:
                            ends = terminated(index, self.style)
                        if ends and index + 1 < before + count:
                            pieces.append(0)
                    lengths = [int(random.integers(0, 90)) for _ in pieces]
                    spare = [n.bit_length() - (c.bit_length() - 1) for n, c in zip(lengths, pieces, strict=True)]
                    more = max(*spare, int(widths[band][row, column])) - int(widths[band][row, column])
                    more += int(random.integers(0, 2))
                    widths[band][row, column] += more
                    writer.number((1 << more + 1) - 2, more + 1)
                    for length, passes_in in zip(lengths, pieces, strict=True):
                        writer.number(length, int(widths[band][row, column]) + passes_in.bit_length() - 1)
                    size += sum(lengths)
            start = b"\xff\x91\0\4\0\0" if self.markers & SOP and random.random() < 0.8 else b""
            yield start + writer.finish() + (b"\xff\x92" if self.markers & EPH else b"") + random.bytes(size)


codings = st.builds(
    Coding,
    rows=st.integers(1, 150),
    columns=st.integers(1, 150),
    components=st.sampled_from([1, 3]),
    levels=st.integers(1, 4),
    layers=st.integers(1, 4),
    order=st.sampled_from([RLCP, RPCL]),
    style=st.sampled_from([0, BYPASS, TERMINATE, BYPASS | TERMINATE, 0x2A, HIGH_THROUGHPUT]),
    markers=st.sampled_from([0, SOP, EPH, SOP | EPH]),
    block=st.sampled_from([(2, 2), (3, 4), (6, 6), (2, 10)]),
    precincts=st.lists(st.tuples(st.integers(3, 8), st.integers(3, 8)), min_size=5, max_size=5),
)


def settled(coding: Coding) -> Coding:
    coding.precincts = coding.precincts[: coding.levels + 1]
    if coding.style & HIGH_THROUGHPUT:
        coding.layers = 1
    if coding.layers == 1 and coding.order == RLCP and coding.rows % 2:
        coding.order = LRCP  # the same packets
    return coding


class TestRules:
    @settings(max_examples=150, deadline=None)
    @given(codings, st.integers(0, 2**32 - 1))
    def test_of_the_standard(self, coding: Coding, seed: int) -> None:
        """Styles, markers, layers and shapes that no encoder at hand writes."""
        coding = settled(coding)
        frame, ends = coding.stream(np.random.default_rng(seed))
        pixels = PixelFormat(coding.rows, coding.columns, coding.components, 16, 12)
        assert codec.prefixes(frame, J2K, pixels) == tuple(ends[-2::-1])
        for reduce in range(1, coding.levels + 1):
            assert ask(frame, J2K, pixels, reduce)[0] == ends[-1 - reduce]

    @pytest.mark.parametrize("style", [BYPASS, HIGH_THROUGHPUT])
    def test_wherever_the_head_ends(self, style: int) -> None:
        coding = Coding(40, 30, 1, 2, 1, RPCL, style, SOP | EPH, (3, 3), [(5, 5)] * 3)
        frame, ends = coding.stream(np.random.default_rng(3))
        pixels = PixelFormat(40, 30, 1, 16, 12)
        for first in range(1, ends[1] + 1):
            assert ask(frame, J2K, pixels, 1, first=first)[0] == ends[1]

    @pytest.fixture
    def plain(self) -> Coding:
        return Coding(100, 90, 1, 2, 1, RPCL, HIGH_THROUGHPUT, 0, (4, 4), [(7, 7)] * 3)

    @staticmethod
    def is_known(coding: Coding, change: tuple[bytes, bytes] = (b"", b"")) -> bool:
        frame, ends = coding.stream(np.random.default_rng(0))
        layout = layout_of(frame)
        assert layout is not None
        assert layout.header.count(change[0]) == 1 or not change[0]
        frame = frame.replace(*change, 1)
        pixels = PixelFormat(coding.rows, coding.columns, coding.components, 16, 12)
        sizes = codec.prefixes(frame, J2K, pixels)
        assert sizes in ((), tuple(ends[-2::-1]))
        assert (codec.prefix(frame, J2K, pixels, 1) == codec.Prefix(None, True)) == (not sizes)
        return bool(sizes)

    def test_packets_that_the_tile_part_has_no_room_for_mean_the_whole(self, plain: Coding) -> None:
        frame, ends = plain.stream(np.random.default_rng(0))
        pixels = PixelFormat(plain.rows, plain.columns, 1, 16, 12)
        begin = frame.index(b"\xff\x90")
        for room in (ends[1] - 1 - begin, 14):
            damaged = bytearray(frame)
            struct.pack_into(">I", damaged, begin + 6, room)
            assert codec.prefix(damaged, J2K, pixels, 1) == codec.Prefix(None, True)
            assert codec.prefixes(damaged, J2K, pixels) == ()

    def test_that_nobody_here_knows_mean_the_whole(self, plain: Coding) -> None:
        cap = b"\xff\x50\0\x08\0\2\0\0\0\2"
        assert self.is_known(plain)
        assert not self.is_known(plain, (cap, b"")), "which blocks?"
        assert not self.is_known(plain, (cap, cap[:-2] + b"\x20\2")), "more than one set a block"
        assert not self.is_known(plain, (cap, b"\xff\x50\0\x0a\0\3\0\0\0\2\0\0")), "another part of the standard"
        assert not self.is_known(plain, (cap, b"\xff\x50\0\x08\0\1\0\0\0\2")), "of another part alone"
        for plain.style in (HIGH_THROUGHPUT | MIXED, MIXED):
            assert not self.is_known(plain)
        plain.style, plain.layers = HIGH_THROUGHPUT, 2
        assert not self.is_known(plain)
        plain.style, plain.precincts = 0, [(7, 7), (7, 7), (7, 7)]
        assert self.is_known(plain)
        plain.markers = EPH
        assert not self.is_known(plain, (b"\xff\x52\0\x0f\5", b"\xff\x52\0\x0f\1")), "markers that were not announced"
        plain.markers = 0
        assert not self.is_known(plain, (b"\xff\x52\0\x0f\1", b"\xff\x52\0\x0f\5")), "markers that are missing"
        plain.order = LRCP
        frame, _ = plain.stream(np.random.default_rng(0))
        assert layout_of(frame) is None, "the first layer of all resolutions comes first"


class TestHostileBytes:
    @pytest.mark.parametrize(
        ("coding", "filling"),
        [
            (Coding(2048, 2048, 1, 1, 1, RPCL, TERMINATE, 0, (4, 2), [(15, 15)] * 2), b"\xfe\x7f"),
            (Coding(2000, 1900, 1, 1, 1, RLCP, 0, 0, (2, 2), [(7, 7)] * 2), b"\x80"),
            (Coding(500, 500, 1, 1, 1, RPCL, 0, 0, (2, 2), [(1, 1)] * 2), b"\0"),
            (Coding(64, 64, 3, 32, 65_535, RLCP, 0, 0, (6, 6), [(15, 15)] * 33), b"\0"),
            (Coding(60_000, 60_000, 3, 5, 1, RPCL, 0, 0, (2, 2), [(2, 2)] * 6), b"\xaa"),
            (Coding(90, 90, 1, 2, 1, RPCL, 0, 0, (6, 6), [(0, 0)] * 3), b"\xaa"),
        ],
        ids=["segments", "blocks", "precincts", "layers", "all of them", "precincts of nothing"],
    )
    def test_the_work_is_bounded(self, monkeypatch: pytest.MonkeyPatch, coding: Coding, filling: bytes) -> None:
        begun: list[packets._Bits] = []
        begin = packets._Bits.begin

        def spy(bits: packets._Bits, at: int) -> None:
            begun.append(bits)
            begin(bits, at)

        monkeypatch.setattr(packets._Bits, "begin", spy)
        body = filling * ((4 << 20) // len(filling))
        frame = coding.header(len(body)) + body
        pixels = PixelFormat(coding.rows, coding.columns, coding.components, 16, 12)
        codec.prefixes(frame, J2K, pixels)
        assert len(begun) <= 1 << 17
        read = {id(bits): bits._read for bits in begun}
        assert sum(read.values()) <= (1 << 19) + 1

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # OpenJPH, of damaged blocks
    def test_damaged_packets_are_no_error(self) -> None:
        random = np.random.default_rng(12)
        image = blobs((150, 140))
        pixels = format_of(image)
        streams = [
            (jpeg2000.encode_j2k(image), J2K),
            (imagecodecs.htj2k_encode(image, reversible=True, resolutions=3), HTJ2K),
            (by_openjpeg(image, progression="RPCL", precinct_size=(32, 32), codeblock_size=(8, 8), no_jp2=True), J2K),
            (by_openjpeg(image, progression="RLCP", quality_layers=[20, 1], no_jp2=True), J2K),
        ]
        for stream, syntax in streams:
            packets_at = stream.index(b"\xff\x93") + 2
            for number in range(400):
                damaged = bytearray(stream)
                span = (packets_at, packets_at + 300) if number % 2 else (2, packets_at)
                for at in random.integers(*span, random.integers(1, 4)):
                    damaged[at] = random.choice([0, 0x7F, 0x80, 0xFF, random.integers(256)])
                del damaged[random.integers(packets_at, len(stream) * 3) :]
                sizes = codec.prefixes(damaged, syntax, pixels)
                assert list(sizes) == sorted(sizes, reverse=True)
                reduce = int(random.integers(1, 5))
                found = codec.prefix(damaged[: random.integers(len(stream))], syntax, pixels, reduce)
                assert found.size is None or found.size > 0
                if number % 4:
                    continue
                cut = bytes(damaged[: sizes[min(reduce, len(sizes)) - 1]] if sizes else damaged)
                try:
                    low = codec.decode(cut, syntax, pixels, reduce=reduce)
                except DecodeError:
                    continue
                assert (low.shape, low.dtype) == (pixels.reduced(reduce).shape, pixels.dtype)
