"""Main headers of JPEG 2000 streams whose lower resolutions come first. Floor 1; no I/O.

Sources: ITU-T T.800 annex A (markers), B.12 (progression orders).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

from ahi_ml.codec.jpeg2000 import StreamInfo, inspect
from ahi_ml.errors import DecodeError
from ahi_ml.types import Buffer

__all__ = ["WHOLE", "Layout", "Prefix", "layout_of"]

_SIZ, _COD, _QCD, _QCC = 0xFF51, 0xFF52, 0xFF5C, 0xFF5D
_TLM, _PLM, _SOT, _COM = 0xFF55, 0xFF57, 0xFF90, 0xFF64
# Segments that change nothing between resolutions, or are adapted: CAP, PRF, CPF, CRG and the above. Left out:
# COC and POC (another coding style or order), RGN, PPM, and whatever nobody here has seen.
_PLAIN = {_SIZ, _COD, _QCD, _QCC, _TLM, _PLM, _COM, 0xFF50, 0xFF56, 0xFF59, 0xFF63}
_LRCP, _RLCP, _RPCL = 0, 1, 2
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
