"""Lower resolutions of JPEG 2000 streams: which bytes hold one. Floor 1; no I/O.

Where the packets of the lower resolutions come first, the beginning of a stream *is* a smaller
image. Its length is known from the tile-part lengths of the main header (TLM), from the headers of
the tile-parts where there is one a resolution (SOT), or from the packet lengths of a single one
(PLT).

Sources: ITU-T T.800 annex A (markers), B.5 (resolutions), B.6 (precincts), B.12 (progression orders).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

from ahi_ml.codec.jpeg2000 import StreamInfo, inspect
from ahi_ml.errors import DecodeError
from ahi_ml.types import Buffer

__all__ = ["WHOLE", "Layout", "Prefix", "check_complete", "layout_of", "prefix_of", "prefixes_of", "resolution_end"]

_SIZ, _COD, _QCD, _QCC = 0xFF51, 0xFF52, 0xFF5C, 0xFF5D
_TLM, _PLM, _PLT = 0xFF55, 0xFF57, 0xFF58
_SOT, _SOD, _EOC = 0xFF90, 0xFF93, 0xFFD9
_COM = 0xFF64
# Segments that change nothing between resolutions, or are adapted: CAP, PRF, CPF, CRG and the above. Left out:
# COC and POC (another coding style or order), RGN, PPM, and whatever nobody here has seen.
_PLAIN = {_SIZ, _COD, _QCD, _QCC, _TLM, _PLM, _COM, 0xFF50, 0xFF56, 0xFF59, 0xFF63}
_PLAIN_IN_TILE_PARTS = {_PLT, _COM}
_LRCP, _RLCP, _RPCL = 0, 1, 2
_SOT_SIZE = 12
_ENOUGH_FOR_A_HEADER = 4096  # the data store's own take some 300 bytes
_LIKELY_HEADER = 1024
_HEADERS_KEPT = 256


@dataclass(frozen=True, slots=True)
class Prefix:
    """How many bytes from the start of an encoded frame a decode needs.

    Parameters
    ----------
    size : int or None
        ``known``: that many bytes suffice, None means the whole frame. Not ``known``: ask again with so
        many bytes, or with the whole frame if it is shorter.
    known : bool
        Whether the bytes given were enough to tell.
    """

    size: int | None
    known: bool


WHOLE = Prefix(None, True)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The main header of a stream whose lower resolutions can be decoded alone; compared by identity.

    Parameters
    ----------
    info : StreamInfo
        Sizes and coding style.
    segments : tuple of (marker, position, size)
        Its marker segments; positions count from the start of the data, sizes include the marker.
    body : int
        Where the first tile-part begins.
    header : bytes
        The data before the body. The tile-part lengths (TLM) may be another frame's.
    """

    info: StreamInfo
    segments: tuple[tuple[int, int, int], ...]
    body: int
    header: bytes


def layout_of(data: Buffer) -> Layout | None:
    """Read a main header; None when the lower resolutions of the stream do not come first.

    That takes a single tile at the origin, one coding style, and an order in which all packets of
    a resolution precede those of the next: RLCP, RPCL, or LRCP with one layer.

    I/O: none.

    Raises
    ------
    DecodeError
        As `jpeg2000.inspect`.
    """
    # The frames of a series differ in their tile-part lengths alone, so what comes before is read once.
    head = bytes(memoryview(data)[:_LIKELY_HEADER])
    sot = head.find(b"\xff\x90")
    tlm = head.find(b"\xff\x55", 0, max(sot, 0))
    layout = _familiar_layout(head[: sot if tlm < 0 else tlm + 4]) if sot > 0 else None
    if layout is not None and head[layout.body : layout.body + 2] == b"\xff\x90":
        return layout
    return _read_layout(memoryview(data))


@lru_cache(_HEADERS_KEPT)
def _familiar_layout(start: bytes) -> Layout | None:
    """Layout of every stream that starts so: a main header, or one up to the length of a TLM that ends it.

    None also when the bytes taken for a marker stand in the middle of a segment.
    """
    size = len(start)
    tlm = start[-4:-2] == b"\xff\x55"
    if tlm:
        start += bytes(max(int.from_bytes(start[-2:], "big") - 2, 0))
    try:
        layout = _read_layout(memoryview(start + b"\xff\x90\0\x0a"))
    except DecodeError:
        return None
    if layout is None or layout.body != len(start) or (tlm and layout.segments[-1][:2] != (_TLM, size - 4)):
        return None
    return layout


def _read_layout(view: memoryview) -> Layout | None:
    info = inspect(view)
    segments = []
    at = info.offset + 2
    try:
        while True:
            marker, length = struct.unpack_from(">HH", view, at)
            if marker == _SOT:
                break
            if marker not in _PLAIN or length < 2:
                return None
            segments.append((marker, at, 2 + length))
            at += 2 + length
    except struct.error as error:
        raise DecodeError(f"a JPEG 2000 stream of {len(view)} bytes ends inside its main header") from error
    size = struct.unpack_from(">8I", view, info.offset + 8)
    if size[2:4] != (0, 0) or size[6:8] != (0, 0) or size[4] < size[0] or size[5] < size[1]:
        return None
    cod = [place for marker, place, _ in segments if marker == _COD]
    if len(cod) != 1 or info.levels > 32:
        return None
    layers = struct.unpack_from(">H", view, cod[0] + 6)[0]
    if info.progression not in (_RLCP, _RPCL) and (info.progression, layers) != (_LRCP, 1):
        return None
    return Layout(info, tuple(segments), at, bytes(view[:at]))


def prefix_of(head: Buffer, reduce: int, *, one_part_a_resolution: bool = False) -> Prefix:
    """Length of the prefix of a frame that holds its resolution `reduce` levels below the full one.

    I/O: none.

    Parameters
    ----------
    head : bytes-like
        The frame's first bytes, as many as there are.
    reduce : int
        Levels to leave out; more than the stream has means its lowest resolution.
    one_part_a_resolution : bool
        Whether tile-parts of an unsaid number are known to be one a resolution. It is the data
        store's habit; another encoder may divide the components of an image as well.

    Returns
    -------
    Prefix
        Never an error: of bytes that are no stream, the whole frame is needed.
    """
    view = memoryview(head)
    try:
        layout = layout_of(view)
    except DecodeError:
        return Prefix(_ENOUGH_FOR_A_HEADER, False) if len(view) < _ENOUGH_FOR_A_HEADER else WHOLE
    if layout is None or not reduce:
        return WHOLE
    parts = layout.info.levels + 1
    keep = max(parts - reduce, 1)
    try:
        header = _first_tile_part(view, layout.body)
        if not header.known or header.size is None:
            return header
        lengths = _tile_part_lengths(view, layout)
        if len(lengths) == parts:
            return Prefix(layout.body + sum(lengths[:keep]), True)
        return _walk(view, layout, keep, one_part_a_resolution or layout.info.components == 1)
    except (struct.error, IndexError):  # segments shorter than what they should hold
        return WHOLE


def prefixes_of(data: Buffer, layout: Layout, *, one_part_a_resolution: bool = False) -> tuple[int, ...]:
    """Lengths of the prefixes of a whole frame that hold its resolutions 1, 2, ... levels below the full one.

    I/O: none.

    Parameters
    ----------
    data : bytes-like
        The whole frame.
    layout : Layout
        What `layout_of` said of it.
    one_part_a_resolution : bool
        As for `prefix_of`.

    Returns
    -------
    tuple of int
        One a level, falling; empty when the frame cannot be cut.
    """
    view = memoryview(data)
    ends = []
    try:
        if not _parts_as_supposed(view, layout):
            return ()
        for keep in range(layout.info.levels, 0, -1):
            needed = _walk(view, layout, keep, one_part_a_resolution or layout.info.components == 1)
            if not needed.known or needed.size is None or needed.size > len(view):
                return ()
            ends.append(needed.size)
    except (struct.error, IndexError):
        return ()
    return tuple(ends) if _first_tile_part(view, layout.body) != WHOLE else ()


def resolution_end(data: Buffer, layout: Layout, reduce: int, *, one_part_a_resolution: bool = False) -> int | None:
    """Where the resolution `reduce` levels below the full one ends in a frame or its prefix.

    I/O: none.

    Parameters
    ----------
    data, layout : bytes-like, Layout
        The frame, or at least the prefix that `prefix_of` told, and what `layout_of` said of it.
    reduce : int
        Levels to leave out, up to those of the stream.
    one_part_a_resolution : bool
        As for `prefix_of`.

    Returns
    -------
    int or None
        None when a header inside the stream says that its parts differ from each other.

    Raises
    ------
    DecodeError
        The data ends before the resolution does.
    """
    view = memoryview(data)
    if _first_tile_part(view, layout.body) == WHOLE:
        return None
    keep = layout.info.levels + 1 - reduce
    needed = _walk(view, layout, keep, one_part_a_resolution or layout.info.components == 1)
    end = needed.size if needed.known else None
    if end is None or not view[layout.body + 11]:  # the number of tile-parts is not said: if all are here, count them
        parts, complete = _tile_parts(view, layout.body)
        if complete and (end is None or len(parts) not in (1, layout.info.levels + 1)):
            end = parts[-1][1]
    end = end or 0
    if not len(view) >= end > layout.body:
        raise DecodeError(
            f"a JPEG 2000 stream of {len(view)} bytes ends before its resolution {layout.info.levels - reduce} does"
        )
    return end


def check_complete(data: Buffer, info: StreamInfo) -> None:
    """Refuse a stream that ends before its end marker (EOC), going by the lengths of its tile-parts. I/O: none.

    Raises
    ------
    DecodeError
        A tile-part or the end marker is missing.
    """
    view = memoryview(data)
    at = info.offset + 2
    try:
        while (marker := struct.unpack_from(">H", view, at)[0]) != _EOC:
            if marker != _SOT:
                at += 2 + struct.unpack_from(">H", view, at + 2)[0]
                continue
            psot = struct.unpack_from(">I", view, at + 6)[0]
            if psot == 0 and _end_marker(view) > at:  # to the end
                return
            at += max(psot, _SOT_SIZE)
    except struct.error as error:
        raise DecodeError(f"a JPEG 2000 stream of {len(view)} bytes is cut short") from error


def _end_marker(view: memoryview) -> int:
    """Where the end marker stands, before the padding; -1 if the data does not end with it."""
    tail = bytes(view[-16:]).rstrip(b"\0")
    return max(len(view) - 16, 0) + len(tail) - 2 if tail.endswith(b"\xff\xd9") else -1


def _tile_parts(view: memoryview, at: int) -> tuple[list[tuple[int, int]], bool]:
    """Beginning and end of the tile-parts that are whole, and whether they are all of the stream's."""
    parts: list[tuple[int, int]] = []
    while at + _SOT_SIZE <= len(view):
        marker, _, _, psot, _, total = struct.unpack_from(">HHHIBB", view, at)
        if marker != _SOT:
            break
        if psot == 0:  # to the end of the stream
            end = _end_marker(view)
            return ([*parts, (at, end)], True) if end > at else (parts, False)
        if psot < _SOT_SIZE + 2 or at + psot > len(view):
            return parts, False
        parts.append((at, at + psot))
        at += psot
        if total == len(parts):
            return parts, True
    return parts, bool(parts) and bytes(view[at : at + 2]) == b"\xff\xd9"


def _parts_as_supposed(view: memoryview, layout: Layout) -> bool:
    """Whether a whole stream that does not say the number of its tile-parts has one, or one a resolution."""
    if view[layout.body + 11]:
        return True
    parts, complete = _tile_parts(view, layout.body)
    return complete and len(parts) in (1, layout.info.levels + 1)


def _walk(view: memoryview, layout: Layout, keep: int, trusted: bool) -> Prefix:
    """Tell from the headers of the tile-parts where the first `keep` resolutions end."""
    at, parts = layout.body, layout.info.levels + 1
    for number in range(keep):
        if at + _SOT_SIZE > len(view):
            return Prefix(at + _SOT_SIZE, False)
        marker, length, tile, psot, index, total = struct.unpack_from(">HHHIBB", view, at)
        if (marker, length, tile, index) != (_SOT, 10, 0, number):
            return WHOLE
        if number == 0 and parts > 1 and (total == 1 or not psot):
            header = _first_tile_part(view, layout.body)
            return _packets(view, layout, keep, header.size) if header.known and header.size else header
        if total not in (parts, 0) or (total == 0 and not trusted) or psot < _SOT_SIZE + 2:
            return WHOLE
        at += psot
    return Prefix(at, True)


def _tile_part_lengths(view: memoryview, layout: Layout) -> list[int]:
    """Lengths of the tile-parts as the main header gives them (TLM, T.800 A.7.1); empty when it does not."""
    found: list[tuple[int, list[int]]] = []
    for marker, at, size in layout.segments:
        if marker != _TLM:
            continue
        index, sizes = view[at + 4], view[at + 5]
        skip, wide = sizes >> 4 & 3, sizes >> 6 & 1
        step = skip + (4 if wide else 2)
        if skip == 3 or (size - 6) % step:
            return []
        lengths = []
        for entry in range(at + 6, at + size, step):
            if any(view[entry : entry + skip]):  # another tile than the first
                return []
            lengths.append(int.from_bytes(view[entry + skip : entry + step], "big"))
        found.append((index, lengths))
    found.sort()
    return [length for _, lengths in found for length in lengths]


def _first_tile_part(view: memoryview, body: int) -> Prefix:
    """Where the header of the first tile-part ends; the whole frame if it changes the coding style."""
    at = body + _SOT_SIZE
    while at + 4 <= len(view):
        marker, length = struct.unpack_from(">HH", view, at)
        if marker == _SOD:
            return Prefix(at + 2, True)
        if marker not in _PLAIN_IN_TILE_PARTS or length < 2:
            return WHOLE
        at += 2 + length
    return Prefix(at + 4, False)


def _packets(view: memoryview, layout: Layout, keep: int, data: int) -> Prefix:
    """Tell from the packet lengths of a lone tile-part (PLT, T.800 A.7.3) where `keep` resolutions end."""
    at = layout.body + _SOT_SIZE
    found: list[tuple[int, bytes]] = []
    while at < data - 2:
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
    count = _packet_count(view, layout, keep)
    if len(lengths) < count:
        return WHOLE
    return Prefix(data + sum(lengths[:count]), True)


def _packet_count(view: memoryview, layout: Layout, keep: int) -> int:
    """Packets of the lowest `keep` resolutions: precincts (T.800 B.6) by components by layers."""
    cod = next(at for marker, at, _ in layout.segments if marker == _COD)
    layers = struct.unpack_from(">H", view, cod + 6)[0]
    precincts = 0
    for resolution in range(keep):
        exponents = view[cod + 14 + resolution] if view[cod + 4] & 1 else 0xFF
        scale = layout.info.levels - resolution
        across = -(-layout.info.columns // (1 << scale + (exponents & 15)))
        down = -(-layout.info.rows // (1 << scale + (exponents >> 4)))
        precincts += across * down
    return precincts * int(layers) * layout.info.components
