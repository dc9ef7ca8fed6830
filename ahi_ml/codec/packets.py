"""Where the resolutions end in a lone tile-part, packet by packet. Floor 1; no I/O.

From the packet lengths, where the header of the tile-part has them (PLT); else from the headers of the packets
themselves, which tell how many bytes of each code-block follow.

Sources: ITU-T T.800 A.7.3 (PLT), A.8 (SOP, EPH), B.5 to B.7 (resolutions, precincts, code-blocks), B.10 (packet
headers), B.12 (order), D.4 and D.6 (segments of a code-block); T.814 (of an HTJ2K code-block).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from ahi_ml.codec.layout import WHOLE, Layout, Prefix
from ahi_ml.errors import DecodeError

__all__ = ["resolution_ends"]

_COD, _CAP, _PLT = 0xFF52, 0xFF50, 0xFF58
_SOT_SIZE = 12
_RPCL = 2
_SOP, _EPH = b"\xff\x91\0\x04", b"\xff\x92"
_SOP_SIZE = 6
# Packets and code-blocks in them: half of 16,000 x 16,000 pixels has 21,000, in blocks of 64 x 64, of five bytes each.
_MOST_STEPS, _MOST_HEADER_BYTES = 1 << 16, 1 << 19
_MOST_BIT_PLANES = 80  # T.800 B.10.5, E.1: a sample has 38 bits, its coefficients some more
_MOST_LENGTH_BITS = 32
_LIKELY_PACKET_HEADER = 64

_BYPASS, _TERMINATE, _HIGH_THROUGHPUT, _MIXED = 0x01, 0x04, 0x40, 0x80  # code-block styles
_MULTIPLE_SETS = 0x2000  # Ccap15: more than one HT set a code-block


class _OutOfBytesError(Exception):
    """A packet header goes on behind the bytes at hand."""


@dataclass(frozen=True, slots=True)
class _Grid:
    """Precincts of a resolution and their code-blocks: all sizes are exponents of 2, but for counts and bands."""

    across: int
    down: int
    bands: tuple[tuple[int, int], ...]
    precinct: tuple[int, int]
    block: tuple[int, int]

    @property
    def blocks(self) -> int:
        columns, rows = self.block
        return sum(_parts(width, columns) * _parts(height, rows) for width, height in self.bands)

    def precincts(self) -> Iterator[list[tuple[int, int]]]:
        """Code-blocks across and down in each subband of each precinct, as far as there are any."""
        for row in range(self.down):
            for column in range(self.across):
                counts = [
                    tuple(
                        _parts(min(size - (at << extent), 1 << extent), block)
                        for size, at, extent, block in zip(band, (column, row), self.precinct, self.block, strict=True)
                    )
                    for band in self.bands
                ]
                yield [(across, down) for across, down in counts if across and down]


@dataclass(frozen=True, slots=True)
class _Coding:
    """What a coding style (COD) says of packets."""

    rpcl: bool
    layers: int
    components: int
    style: int
    may_have_sop: bool
    has_eph: bool


class _Bits:
    """Bits of packet headers; after a byte 0xFF the next one has seven."""

    __slots__ = ("_at", "_byte", "_left", "_read", "view")

    def __init__(self, view: memoryview) -> None:
        self.view, self._read = view, 0
        self.begin(0)

    def begin(self, at: int) -> None:
        self._at, self._byte, self._left = at, 0, 0

    def bit(self) -> int:
        if not self._left:
            if self._at >= len(self.view):
                raise _OutOfBytesError
            stuffed = self._byte == 0xFF
            self._byte = self.view[self._at]
            self._at += 1
            self._read += 1
            if (stuffed and self._byte > 0x7F) or self._read > _MOST_HEADER_BYTES:
                raise DecodeError("a marker inside a packet header, or no end of headers")
            self._left = 7 if stuffed else 8
        self._left -= 1
        return self._byte >> self._left & 1

    def number(self, bits: int) -> int:
        value = 0
        for _ in range(bits):
            value = value << 1 | self.bit()
        return value

    def end(self) -> int:
        """Where the header ends: a last byte 0xFF is followed by one more."""
        return self._at + (self._byte == 0xFF)


class _TagTree:
    """Numbers of a grid of code-blocks, each coded by what it exceeds the least of its surroundings (T.800 B.10.2)."""

    __slots__ = ("_levels",)

    def __init__(self, across: int, down: int) -> None:
        self._levels = [(across, [0] * (across * down), bytearray(across * down))]
        while across * down > 1:
            across, down = across + 1 >> 1, down + 1 >> 1
            self._levels.append((across, [0] * (across * down), bytearray(across * down)))

    def is_below(self, limit: int, column: int, row: int, bits: _Bits) -> bool:
        """Read on until it is certain whether a number is below the limit."""
        least = 0
        for level in range(len(self._levels) - 1, -1, -1):
            across, bounds, known = self._levels[level]
            node = (row >> level) * across + (column >> level)
            least = max(least, bounds[node])
            if not known[node]:
                while least < limit:
                    if bits.bit():
                        known[node] = True
                        break
                    least += 1
                bounds[node] = least
        return least < limit


@dataclass(slots=True)
class _Band:
    """The code-blocks of one subband in one precinct of one component, and what earlier layers said of them."""

    across: int
    down: int
    included: _TagTree = field(init=False)
    empty_planes: _TagTree = field(init=False)
    passes: list[int] = field(init=False)
    length_bits: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.included = _TagTree(self.across, self.down)
        self.empty_planes = _TagTree(self.across, self.down)
        self.passes = [0] * (self.across * self.down)
        self.length_bits = [3] * (self.across * self.down)


def resolution_ends(view: memoryview, layout: Layout, begin: int, keep: int) -> list[int] | Prefix:
    """Where each of the lowest `keep` resolutions ends in a stream of a single tile-part.

    I/O: none.

    Parameters
    ----------
    view : memoryview
        The beginning of the stream, at least to `begin`.
    layout : Layout
        Its main header.
    begin : int
        Where the packets begin: behind the header of the tile-part.
    keep : int
        Resolutions, from the lowest up.

    Returns
    -------
    list of int or Prefix
        Lowest resolution first. A `Prefix` when that takes more bytes, or the whole stream because of a coding
        nobody here has seen, too many code-blocks, or damage: never an error.

    Raises
    ------
    struct.error, IndexError
        Segments of the headers are shorter than what they should hold.
    """
    cod = next(at for marker, at, _ in layout.segments if marker == _COD)
    scod, order, layers, block_columns, block_rows, style = struct.unpack_from(">4xBBHxxBBB", layout.header, cod)
    coding = _Coding(order == _RPCL, layers, layout.info.components, style, bool(scod & 2), bool(scod & 4))
    grids = [_grid(layout, cod, resolution, (block_columns + 2, block_rows + 2)) for resolution in range(keep)]
    lengths = _packet_lengths(view, layout.body + _SOT_SIZE, begin)
    counts = [grid.across * grid.down * coding.components * layers for grid in grids]
    if len(lengths) >= sum(counts):
        return [begin + sum(lengths[: sum(counts[: number + 1])]) for number in range(keep)]
    if not _is_understood(layout, coding, grids):
        return WHOLE
    if sum(counts) + sum(grid.blocks for grid in grids) * coding.components * layers > _MOST_STEPS:
        return WHOLE
    psot = struct.unpack_from(">I", view, layout.body + 6)[0]
    return _walk(view, begin, layout.body + psot if psot else None, coding, grids)


def _parts(size: int, exponent: int) -> int:
    """How many steps of ``2**exponent`` it takes to cover a size."""
    return max(-(-size >> exponent), 0)


def _grid(layout: Layout, cod: int, resolution: int, block: tuple[int, int]) -> _Grid:
    size = layout.info.columns, layout.info.rows
    scale = layout.info.levels - resolution
    sizes = layout.header[cod + 14 + resolution] if layout.header[cod + 4] & 1 else 0xFF
    precinct = sizes & 15, sizes >> 4
    across, down = (_parts(n, scale + exponent) for n, exponent in zip(size, precinct, strict=True))
    bands: tuple[tuple[int, int], ...] = ((_parts(size[0], scale), _parts(size[1], scale)),)
    if resolution:  # three bands of half the size: every other sample of the resolution, from 0 or from 1 on
        low, high = (tuple(_parts(n - (first << scale), scale + 1) for n in size) for first in (0, 1))
        bands = (high[0], low[1]), (low[0], high[1]), (high[0], high[1])
        precinct = precinct[0] - 1, precinct[1] - 1
    return _Grid(across, down, bands, precinct, (min(block[0], precinct[0]), min(block[1], precinct[1])))


def _is_understood(layout: Layout, coding: _Coding, grids: list[_Grid]) -> bool:
    if not coding.layers or any(min(grid.block) < 0 for grid in grids):
        return False
    if not layout.info.high_throughput:
        return not coding.style & _MIXED
    cap = [at for marker, at, size in layout.segments if marker == _CAP and size == 10]
    if len(cap) != 1 or coding.layers > 1 or coding.style & _MIXED:
        return False
    parts, ccap15 = struct.unpack_from(">IH", layout.header, cap[0] + 4)
    return bool(parts == 1 << 17 and not ccap15 & _MULTIPLE_SETS)


def _packet_lengths(view: memoryview, at: int, end: int) -> list[int]:
    """Packet lengths in the header of a tile-part (PLT); empty without."""
    found: list[tuple[int, bytes]] = []
    while at < end - 2:
        marker, length = struct.unpack_from(">HH", view, at)
        if marker == _PLT:
            found.append((view[at + 4], bytes(view[at + 5 : at + 2 + length])))
        at += 2 + length
    found.sort()
    lengths, value = [], 0
    for byte in b"".join(piece for _, piece in found):
        value = value << 7 | byte & 0x7F
        if not byte & 0x80:
            lengths.append(value)
            value = 0
    return lengths


def _walk(view: memoryview, at: int, limit: int | None, coding: _Coding, grids: list[_Grid]) -> list[int] | Prefix:
    """Follow the packets from `at`; the tile-part ends at `limit`, if that is known."""
    if limit is not None:
        view = view[:limit]
    bits, ends = _Bits(view), []
    try:
        for grid in grids:
            for bands, layer in _packets(grid, coding):
                at = _packet_end(bits, at, bands, layer, coding)
                if limit is not None and at > limit:
                    return WHOLE
            ends.append(at)
    except _OutOfBytesError:
        if limit is not None and len(view) == limit:
            return WHOLE
        # Each question walks from the start, so the bytes to ask with grow by a share.
        have = max(at, len(view))
        more = have + max(have >> 3, _LIKELY_PACKET_HEADER)
        return Prefix(more if limit is None else min(more, limit), False)
    except DecodeError:
        return WHOLE
    return ends


def _packets(grid: _Grid, coding: _Coding) -> Iterator[tuple[list[_Band], int]]:
    """The packets of a resolution in their order (T.800 B.12.1): the subbands in each, and its layer."""
    layers, components = range(coding.layers), range(coding.components)
    if coding.rpcl:
        for counts in grid.precincts():
            for _ in components:
                bands = [_Band(*count) for count in counts]
                for layer in layers:
                    yield bands, layer
    else:
        every = [[_Band(*count) for count in counts] for _ in components for counts in grid.precincts()]
        for layer in layers:
            for bands in every:
                yield bands, layer


def _packet_end(bits: _Bits, at: int, bands: list[_Band], layer: int, coding: _Coding) -> int:
    """Where a packet ends that begins at `at` (T.800 B.9, B.10)."""
    start = bytes(bits.view[at : at + len(_SOP)]) if coding.may_have_sop else b""
    if start == _SOP:
        at += _SOP_SIZE
    elif start and _SOP.startswith(start):
        raise _OutOfBytesError
    bits.begin(at)
    size = 0
    if bits.bit():
        for band in bands:
            for row in range(band.down):
                for column in range(band.across):
                    size += _block_size(bits, band, column, row, layer, coding.style)
    at = bits.end()
    if coding.has_eph:
        if at + 2 > len(bits.view):
            raise _OutOfBytesError
        if bits.view[at : at + 2] != _EPH:
            raise DecodeError("a packet header without its end marker")
        at += 2
    return at + size


def _block_size(bits: _Bits, band: _Band, column: int, row: int, layer: int, style: int) -> int:
    """Bytes of one code-block in a packet, whose header is read on."""
    block = row * band.across + column
    before = band.passes[block]
    if before:
        if not bits.bit():
            return 0
    elif not band.included.is_below(layer + 1, column, row, bits):
        return 0
    elif not band.empty_planes.is_below(_MOST_BIT_PLANES, column, row, bits):
        raise DecodeError("a code-block of too many bit-planes")
    passes = _pass_count(bits)
    while bits.bit():
        band.length_bits[block] += 1
        if band.length_bits[block] > _MOST_LENGTH_BITS:
            raise DecodeError("a code-block too long to be one")
    band.passes[block] += passes
    return sum(
        bits.number(band.length_bits[block] + count.bit_length() - 1) for count in _segments(before, passes, style)
    )


def _pass_count(bits: _Bits) -> int:
    """Coding passes of a code-block in this packet (T.800 table B.4)."""
    count = 1
    for width in (1, 1, 2, 5):
        more = bits.number(width)
        count += more
        if more < (1 << width) - 1:
            return count
    return count + bits.number(7)


def _segments(before: int, passes: int, style: int) -> Iterator[int]:
    """Passes in each segment, of which the length is told: `passes` of them that follow `before` earlier ones."""
    if style & _HIGH_THROUGHPUT:  # as many threes as are left empty and a cleanup pass, then the refinement
        first = (passes - 1) // 3 * 3 + 1
        yield first
        if passes > first:
            yield passes - first
        return
    while passes:
        room = passes
        if style & _TERMINATE:
            room = 1
        elif style & _BYPASS:  # ten passes, then two raw ones and one that is not in turn (T.800 table D.9)
            room = 10 - before if before < 10 else (2, 1, 1)[(before - 10) % 3]
        count = min(room, passes)
        yield count
        before, passes = before + count, passes - count
