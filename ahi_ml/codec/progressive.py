"""Lower resolutions of JPEG 2000 streams: which bytes hold one. Floor 1; no I/O.

Where the packets of the lower resolutions come first, the beginning of a stream *is* a smaller
image. Its length is known from the tile-part lengths of the main header (TLM), from the headers of
the tile-parts where there is one a resolution (SOT), or from the packets of a single one.

Source: ITU-T T.800 annex A (markers).
"""

from __future__ import annotations

import struct

from ahi_ml.codec.jpeg2000 import StreamInfo
from ahi_ml.codec.layout import WHOLE, Layout, Prefix, layout_of
from ahi_ml.codec.packets import resolution_ends
from ahi_ml.errors import DecodeError
from ahi_ml.types import Buffer

__all__ = ["check_complete", "prefix_of", "prefixes_of", "resolution_end"]

_TLM, _PLT, _COM = 0xFF55, 0xFF58, 0xFF64
_SOT, _SOD, _EOC = 0xFF90, 0xFF93, 0xFFD9
_PLAIN_IN_TILE_PARTS = {_PLT, _COM}
_SOT_SIZE = 12
_ENOUGH_FOR_A_HEADER = 4096  # the data store's own take some 300 bytes


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
        ends = _walk(view, layout, keep, one_part_a_resolution or layout.info.components == 1)
        return ends if isinstance(ends, Prefix) else Prefix(ends[-1], True)
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
    try:
        if _first_tile_part(view, layout.body) == WHOLE or not _parts_as_supposed(view, layout):
            return ()
        ends = _walk(view, layout, layout.info.levels, one_part_a_resolution or layout.info.components == 1)
    except (struct.error, IndexError):
        return ()
    if isinstance(ends, Prefix) or not ends or ends[-1] > len(view):
        return ()
    return tuple(reversed(ends))


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
        Of a lone tile-part that is here whole, its end. None when a header inside the stream says that its parts
        differ from each other.

    Raises
    ------
    DecodeError
        The data ends before the resolution does.
    """
    view = memoryview(data)
    if _first_tile_part(view, layout.body) == WHOLE:
        return None
    parts, complete = _tile_parts(view, layout.body) if _is_lone(view, layout) else ([], False)
    if complete:  # decoders pass over the higher resolutions faster than their beginning is found here
        return parts[-1][1]
    keep = layout.info.levels + 1 - reduce
    ends = _walk(view, layout, keep, one_part_a_resolution or layout.info.components == 1)
    end = None if isinstance(ends, Prefix) else ends[-1]
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


def _is_lone(view: memoryview, layout: Layout) -> bool:
    """Whether there is one tile-part for all resolutions, going by its header."""
    if layout.body + _SOT_SIZE > len(view):
        return False
    psot, total = struct.unpack_from(">IxB", view, layout.body + 6)
    return layout.info.levels > 0 and (total == 1 or not psot)


def _walk(view: memoryview, layout: Layout, keep: int, trusted: bool) -> list[int] | Prefix:
    """Tell where each of the first `keep` resolutions ends, from the headers of the tile-parts or a lone one's packets.

    A `Prefix` when it cannot be told from these bytes, or from any.
    """
    at, parts = layout.body, layout.info.levels + 1
    ends = []
    for number in range(keep):
        if at + _SOT_SIZE > len(view):
            return Prefix(at + _SOT_SIZE, False)
        marker, length, tile, psot, index, total = struct.unpack_from(">HHHIBB", view, at)
        if (marker, length, tile, index) != (_SOT, 10, 0, number):
            return WHOLE
        if number == 0 and _is_lone(view, layout):
            header = _first_tile_part(view, layout.body)
            return resolution_ends(view, layout, header.size, keep) if header.known and header.size else header
        if total not in (parts, 0) or (total == 0 and not trusted) or psot < _SOT_SIZE + 2:
            return WHOLE
        at += psot
        ends.append(at)
    return ends


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
    while at + 2 <= len(view):
        marker = int.from_bytes(view[at : at + 2], "big")
        if marker == _SOD:
            return Prefix(at + 2, True)
        if marker not in _PLAIN_IN_TILE_PARTS:
            return WHOLE
        if at + 4 > len(view):
            break
        length = int.from_bytes(view[at + 2 : at + 4], "big")
        if length < 2:
            return WHOLE
        at += 2 + length
    return Prefix(at + 4, False)
