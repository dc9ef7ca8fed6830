"""JPEG 2000 and HTJ2K streams: read their main header, decode and encode them. Floor 1.

OpenJPH (through imagecodecs) comes first for HTJ2K because it is fast and releases the GIL;
OpenJPEG is the second opinion. **OpenJPH decodes damaged streams without an error**, so whoever
calls this must have checked the bytes or must check the pixels.

Sources: ITU-T T.800 annex A (markers) and annex I (JP2 boxes), T.814 (HTJ2K); DICOM PS3.5 A.4.4.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np

from ahi_ml.errors import DecodeError
from ahi_ml.types import AnyArray, Buffer

__all__ = [
    "StreamInfo",
    "confirm",
    "container",
    "decode_htj2k",
    "decode_stream",
    "encode_htj2k",
    "encode_j2k",
    "inspect",
]

_JP2_SIGNATURE = bytes.fromhex("0000000c6a5020200d0a870a")
_SOC_SIZ = b"\xff\x4f\xff\x51"
_COD = 0xFF52
_SOT = 0xFF90
_SMALLEST_SIDE = 64  # PS3.5 A.4.4: the base resolution has a side of 64 samples or fewer
_MOST_LEVELS = 8
_CONFIRMED_BITS = 16
_START = 48  # bytes: the sizes, and nothing yet that differs between the frames of a series
_MOST_FAMILIAR, _LONGEST_FAMILIAR = 256, 4096
_FAMILIAR: dict[bytes, tuple[bytes, StreamInfo]] = {}  # by how streams begin: those of a series begin alike
_MARKS = {1: (0x5A, 0x25), 2: (0x5A5A, 0x2525), 4: (0x5A5A5A5A, 0x25252525)}  # by bytes a sample
_MOST_TILES = 65_535  # T.800 A.4.2: their numbers have 16 bits


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What the main header of a JPEG 2000 codestream says.

    Parameters
    ----------
    offset : int
        Where the codestream begins in the bytes given (behind JP2 boxes, if any).
    rows, columns, components : int
        Size of the image.
    precision : int
        Bits a sample of the first component.
    signed : bool
        Whether the samples of the first component are signed.
    levels : int
        Wavelet decompositions: ``levels + 1`` resolutions.
    progression : int
        0 LRCP, 1 RLCP, 2 RPCL, 3 PCRL, 4 CPRL.
    high_throughput : bool
        Whether the block coder is that of T.814.
    reversible : bool
        Whether the 5/3 transform was used.
    colour_transform : bool
        Whether the first three components are luminance and colour differences.
    """

    offset: int
    rows: int
    columns: int
    components: int
    precision: int
    signed: bool
    levels: int
    progression: int
    high_throughput: bool
    reversible: bool
    colour_transform: bool

    @property
    def in_differences(self) -> bool:
        """Whether the wavelet works on luminance and colour differences, exactly as `wavelet.low_pass` can."""
        return self.reversible and self.colour_transform and self.components == 3


def _codestream_offset(data: memoryview) -> int:
    if data[:4] == _SOC_SIZ:
        return 0
    if data[:12] != _JP2_SIGNATURE:
        raise DecodeError("not a JPEG 2000 stream: neither a codestream nor JP2 boxes at its start")
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        header = 8
        if length == 1:
            length = struct.unpack_from(">Q", data, at + 8)[0]
            header = 16
        if kind == b"jp2c":
            if data[at + header : at + header + 4] != _SOC_SIZ:
                break
            return at + header
        if length < header:  # 0 means "to the end", which only the last box may say
            break
        at += length
    raise DecodeError("a JP2 file without a codestream box")


def _check_size(segment: memoryview, components: int) -> None:
    """Refuse image and tile sizes that cannot be (T.800 B.2, B.3): OpenJPH divides by them or loops over them."""
    length, x1, y1, x0, y0, width, height, left, top = struct.unpack_from(">H2xIIIIIIII", segment)
    if length != 38 + 3 * components or not components:
        raise DecodeError(f"a JPEG 2000 image of {components} components in a size segment (SIZ) of {length} bytes")
    tiled = left <= x0 < left + width and top <= y0 < top + height
    if not (x0 < x1 and y0 < y1 and tiled) or -(-(x1 - left) // width) * -(-(y1 - top) // height) > _MOST_TILES:
        raise DecodeError(
            f"a JPEG 2000 image from ({x0}, {y0}) to ({x1}, {y1}) in tiles of {width}x{height} from ({left}, {top})"
        )
    samples = {struct.unpack_from(">BH", segment, 38 + 3 * number) for number in range(components)}
    if len(samples) > 1 or samples.pop()[1] != 0x0101:
        raise DecodeError("JPEG 2000 components of different depth or size, which DICOM does not know")


def inspect(data: Buffer) -> StreamInfo:
    """Read the main header of a raw or JP2-boxed codestream. I/O: none.

    Parameters
    ----------
    data : bytes-like
        At least the main header.

    Returns
    -------
    StreamInfo

    Raises
    ------
    DecodeError
        The bytes are no JPEG 2000 stream, end inside its main header, or describe an image that
        cannot be, or that DICOM does not know.
    """
    view = memoryview(data)
    start = bytes(view[:_START])
    familiar = _FAMILIAR.get(start)
    if familiar is not None and view[: len(familiar[0])] == familiar[0]:
        return familiar[1]
    info, end = _inspect(view)
    if end <= _LONGEST_FAMILIAR:
        if len(_FAMILIAR) >= _MOST_FAMILIAR:
            _FAMILIAR.clear()
        _FAMILIAR[start] = bytes(view[:end]), info
    return info


def _inspect(view: memoryview) -> tuple[StreamInfo, int]:
    """What the main header says, and where the part of it ends that says so."""
    offset = _codestream_offset(view)
    try:
        x1, y1, x0, y0 = struct.unpack_from(">IIII", view, offset + 8)
        components, depth = struct.unpack_from(">HB", view, offset + 40)
        _check_size(view[offset + 4 :], components)
        at = offset + 4 + struct.unpack_from(">H", view, offset + 4)[0]
        while True:
            marker, length = struct.unpack_from(">HH", view, at)
            if marker == _COD:
                progression, colour = view[at + 5], view[at + 8]
                levels, style, transform = view[at + 9], view[at + 12], view[at + 13]
                break
            if marker == _SOT or marker < 0xFF00 or length < 2:
                raise DecodeError("a JPEG 2000 main header without a coding style (COD)")
            at += 2 + length
    except (struct.error, IndexError) as error:
        raise DecodeError(f"a JPEG 2000 stream of {len(view)} bytes ends inside its main header") from error
    info = StreamInfo(
        offset=offset,
        rows=y1 - y0,
        columns=x1 - x0,
        components=components,
        precision=(depth & 0x7F) + 1,
        signed=bool(depth & 0x80),
        levels=levels,
        progression=progression,
        high_throughput=bool(style & 0x40),
        reversible=transform == 1,
        colour_transform=colour == 1,
    )
    return info, at + 14


def decode_stream(data: Buffer, info: StreamInfo, *, out: AnyArray | None = None) -> AnyArray:
    """Decode a whole stream to the codec's own dtype. I/O: none; releases the GIL for HTJ2K.

    Parameters
    ----------
    data : bytes-like
        The encoded frame.
    info : StreamInfo
        What `inspect` said of it, or would say.
    out : ndarray, optional
        Written to and returned when its shape and dtype are the stream's.

    Returns
    -------
    (rows, columns) or (rows, columns, components) ndarray
        Components interleaved; colour transforms of the codestream undone (PS3.5 A.4.4).

    Raises
    ------
    DecodeError
        Neither decoder accepts the stream, or it is damaged: OpenJPEG might show that all the same.
    """
    try:
        if info.high_throughput:
            return decode_htj2k(data, info, out=out)
        return imagecodecs.jpeg2k_decode(data, out=out)  # type: ignore[no-any-return]
    except DecodeError:
        raise
    except Exception as first:
        return _second_opinion(data, first)


class _Unfilled(np.ndarray[Any, Any]):
    """An array that imagecodecs does not fill with zeros before it decodes into it.

    That takes 2 % of decoding, and gives the GIL away once more.
    """

    def fill(self, value: Any) -> None:
        """Leave it as it is."""


def decode_htj2k(data: Buffer, info: StreamInfo, *, skipped: int = 0, out: AnyArray | None = None) -> AnyArray:
    """Decode an HTJ2K stream by OpenJPH alone, without its `skipped` highest resolutions. I/O: none; releases the GIL.

    As `decode_stream`; low-pass values that the samples' 8, 16 or 32 bits do not hold are wrapped.

    Raises
    ------
    DecodeError
        It ended at a damaged place of the stream.
    Exception
        The codec's own, some of them bare.
    """
    if out is None:
        sides = -(-info.rows >> skipped), -(-info.columns >> skipped)
        kind, size = "i" if info.signed else "u", container(info.precision)
        out = np.empty(sides if info.components == 1 else (*sides, info.components), f"{kind}{size}")
    # It says nothing when it ends early: the rows that are missing would be what was there before, somebody else's
    # frame in a buffer that is used again. It writes from the first sample to the last, so that one tells.
    last, place = (-1,) * out.ndim, out.view(_Unfilled)
    for mark in _MARKS[out.itemsize]:
        out[last] = mark
        # Without a colour transform its own choice is a plane a component.
        imagecodecs.htj2k_decode(data, planar=False, skipres=skipped, out=place)
        if out[last] != mark:  # nearly always; else the sample may have this very value
            return out
    raise DecodeError(f"a damaged HTJ2K stream of {len(data)} bytes: OpenJPH did not decode it to its end")


def container(precision: int) -> int:
    """How many bytes a sample of so many bits is decoded to. I/O: none."""
    return 1 if precision <= 8 else 2 if precision <= 16 else 4


def confirm(data: Buffer, info: StreamInfo, image: AnyArray) -> None:
    """Refuse a high-throughput stream whose pixels OpenJPEG does not read as OpenJPH did. I/O: none; releases the GIL.

    Where no checksum has been made yet this shows damage: OpenJPH decodes on, and the two go wrong in different ways.

    Parameters
    ----------
    data : bytes-like
        The encoded frame.
    info : StreamInfo
        What `inspect` said of it.
    image : ndarray of integers
        What OpenJPH made of it. Where rounding differs (an irreversible stream), or OpenJPEG lacks the
        bits (more than 16), it is not compared.

    Raises
    ------
    DecodeError
        OpenJPEG refuses it, or reads other pixels.
    """
    if info.precision > _CONFIRMED_BITS:
        return
    try:
        other = imagecodecs.jpeg2k_decode(data)
    except Exception as error:
        raise DecodeError(f"a damaged HTJ2K stream of {len(data)} bytes: {error}") from error
    if not info.reversible:
        return
    differing = (image.reshape(-1) ^ other.reshape(-1).astype(image.dtype)).view(f"u{image.itemsize}")
    if np.any(differing & ((1 << info.precision) - 1)):  # signs may have been extended since
        raise DecodeError(f"a damaged HTJ2K stream of {len(data)} bytes: its decoders read different pixels")


def _second_opinion(data: Buffer, first: Exception) -> AnyArray:
    import openjpeg  # seldom needed

    try:
        view = memoryview(data)
        return np.asarray(openjpeg.decode(bytes(view[_codestream_offset(view) :]), 0))
    except Exception as second:
        raise DecodeError(
            f"no decoder accepts this JPEG 2000 stream of {len(data)} bytes: {first}; {second}"
        ) from second


def _levels(rows: int, columns: int) -> int:
    side, levels = min(rows, columns), 0
    while side > _SMALLEST_SIDE and levels < _MOST_LEVELS:
        side, levels = (side + 1) // 2, levels + 1
    return max(levels, 1)  # to the encoders 0 means "your default", which is more than 1


def encode_htj2k(image: AnyArray) -> bytes:
    """Encode losslessly as the data store does: HTJ2K, RPCL, one tile-part a resolution, TLM.

    I/O: none; releases the GIL.

    Parameters
    ----------
    image : (rows, columns) or (rows, columns, samples) ndarray
        8, 16 or 32 bit integers; sign and depth of the dtype go into the codestream.

    Returns
    -------
    bytes
        A raw codestream with decompositions until the smaller side is 64 or fewer samples.
    """
    return imagecodecs.htj2k_encode(  # type: ignore[no-any-return]
        image,
        reversible=True,
        tlm=True,
        tilepart=1,
        resolutions=_levels(image.shape[0], image.shape[1]),
        planar=False if image.ndim == 3 else None,
    )


def encode_j2k(image: AnyArray) -> bytes:
    """Encode losslessly as JPEG 2000 part 1. I/O: none. Arguments as `encode_htj2k`.

    Without the colour transform: OpenJPEG's guard bits do not hold the largest coefficients of colour
    differences, so saturated edges would come back altered.
    """
    return imagecodecs.jpeg2k_encode(  # type: ignore[no-any-return]
        image,
        reversible=True,
        codecformat="J2K",
        mct=False,
        resolutions=_levels(image.shape[0], image.shape[1]) + 1,
    )


# OpenJPH fills its tables at their first use, and without a lock: frames that several threads encode at
# that moment come out damaged (https://github.com/aous72/OpenJPH/pull/243). Modules load in one thread
# only, so this first use is here. 8, 16 and 32 bits take different ways through it.
for _dtype in (np.uint8, np.int16, np.int32):
    imagecodecs.htj2k_decode(encode_htj2k(np.zeros((2, 2), _dtype)))
