"""Lower resolutions of JPEG 2000 streams, decoded without wrapping. Floor 1; no I/O.

`smaller_stream` makes of the beginning of a stream one that is complete in itself: sizes, levels and
quantisation steps in the header shrunk, later tile-parts left out. Any decoder reads it, also one
that cannot leave out resolutions, and one that checks for missing bytes.

Low-pass values overshoot the range of the pixels, and OpenJPH wraps what its output does not hold. Where
the extremes of the frame tell that 16 bits hold all of them, 16 are decoded, straight into the caller's
array; otherwise 24.

Sources: ITU-T T.800 annex A (markers).
"""

from __future__ import annotations

import struct
from functools import lru_cache

import numpy as np

from ahi_ml.codec import jpeg2000, wavelet
from ahi_ml.codec.jpeg2000 import StreamInfo
from ahi_ml.codec.pixelformat import PixelFormat, match_shape
from ahi_ml.codec.progressive import Layout, layout_of, resolution_end
from ahi_ml.codec.syntaxes import HTJ2K_LOSSLESS_RPCL
from ahi_ml.types import AnyArray, Buffer

__all__ = ["decode_low", "divisible", "settle", "smaller_stream"]

_SIZ, _COD, _QCD, _QCC = 0xFF51, 0xFF52, 0xFF5C, 0xFF5D
_TLM, _PLM = 0xFF55, 0xFF57
_EOC = b"\xff\xd9"
_HEADROOM_BITS = 24
# Depth and sign of a component (Ssiz, T.800 A.5.1). Any may be written to a stream of the reversible transform,
# whose samples have no scale.
_SIGNED_24, _SIGNED_16 = 0x80 | _HEADROOM_BITS - 1, 0x80 | 15
_INT16 = np.dtype(np.int16)
_LEAST, _MOST = -(1 << 15), (1 << 15) - 1
_HEADERS_KEPT = 256


def divisible(data: Buffer, pixels: PixelFormat) -> Layout | None:
    """Layout of a stream whose low-pass band, as its decoder gives it, is that of the stored values. I/O: none.

    Raises
    ------
    DecodeError
        As `jpeg2000.inspect`.
    """
    layout = layout_of(data)
    if layout is None:
        return None
    info = layout.info
    if (info.rows, info.columns, info.components) != (pixels.rows, pixels.columns, pixels.samples):
        return None
    if info.signed != pixels.signed:  # the bits are read with another sign: not what the wavelet has seen
        return None
    return layout if info.precision <= _HEADROOM_BITS - 2 else None  # else there is no room for overshoot


def decode_low(
    data: Buffer,
    syntax: str,
    pixels: PixelFormat,
    reduce: int,
    *,
    out: AnyArray | None = None,
    extremes: tuple[int, int] | None = None,
) -> AnyArray | None:
    """Decode a lower resolution of a JPEG 2000 stream, clipped to the stored range.

    I/O: none; releases the GIL for HTJ2K.

    Parameters
    ----------
    data : bytes-like
        The frame, or at least the prefix that `progressive.prefix_of` told.
    syntax, pixels, reduce, out, extremes : str, PixelFormat, int, ndarray, (int, int)
        As for `codec.decode`.

    Returns
    -------
    ndarray or None
        None when nothing can be left out of the stream.

    Raises
    ------
    DecodeError
        As `codec.decode`.
    """
    layout = divisible(data, pixels)
    if layout is None:
        return None
    info, wanted = layout.info, pixels.reduced(reduce)
    skipped = min(reduce, info.levels)
    depth, narrow, shift = _depth(info, extremes, reduce)
    habit = syntax == HTJ2K_LOSSLESS_RPCL
    stream = smaller_stream(data, layout, skipped, depth=depth, one_part_a_resolution=habit)
    if stream is None:
        return None
    if out is None:
        out = np.empty(wanted.shape, wanted.dtype)
    direct = narrow and skipped == reduce and out.itemsize == 2 and out.flags.c_contiguous
    image = jpeg2000.decode_stream(stream, info, out=out if direct else None)
    made = wanted if skipped == reduce else pixels.reduced(skipped)
    if image.shape != made.shape:
        image = match_shape(image, made, syntax)
    if narrow:
        image = image.view(_INT16)
    if skipped < reduce:
        image = wavelet.low_pass(image, reduce - skipped, colour_transform=info.in_differences)
    if not info.reversible:  # of the stream's own depth, to which its decoder has clipped it
        image = image.astype(np.int32)
    return settle(image, wanted, out, shift)


def _depth(info: StreamInfo, extremes: tuple[int, int] | None, reduce: int) -> tuple[int | None, bool, int]:
    """Depth to decode low-pass values in (None: the stream's own), whether it is 16 bits, and what to add to them."""
    if not info.reversible:
        return None, False, 0
    middle = 0 if info.signed else 1 << info.precision - 1
    if not info.high_throughput:  # OpenJPEG clips to the depth it is told
        return _SIGNED_24, False, middle
    half = 1 << info.precision - 1
    low, high = extremes or (middle - half, middle + half - 1)
    least, most = wavelet.low_pass_range(int(low), int(high), reduce)
    if least >= _LEAST and most <= _MOST and info.precision == 16:
        return None, True, 0  # unsigned ones, wrapped, are signed ones of the same bits
    if least - middle >= _LEAST and most - middle <= _MOST:
        return _SIGNED_16, True, middle
    return _SIGNED_24, False, middle


def settle(image: AnyArray, pixels: PixelFormat, out: AnyArray | None = None, shift: int = 0) -> AnyArray:
    """Add `shift` to low-pass values, clip them to the stored range, and write them to `out`, which they may lie in.

    I/O: none.

    Parameters
    ----------
    image : ndarray
        Signed integers.
    pixels : PixelFormat
        Of the result.
    out : ndarray, optional
        Of its shape and dtype.
    shift : int
        Comes last: in fewer bits it is faster.

    Returns
    -------
    ndarray
        `out` if given.
    """
    if out is None:
        out = np.empty(pixels.shape, pixels.dtype)
    low, high = pixels.stored_range
    limits = np.iinfo(image.dtype)
    same = out.view(image.dtype) if out.itemsize == image.itemsize else out  # no buffer between
    image.clip(max(low - shift, int(limits.min)), min(high - shift, int(limits.max)), out=same, casting="unsafe")
    if shift:
        np.add(out, shift, out=out)
    return out


def smaller_stream(
    data: Buffer, layout: Layout, reduce: int, *, depth: int | None = None, one_part_a_resolution: bool = False
) -> bytearray | None:
    """Make a stream of the resolution `reduce` levels below the full one, from a frame or its prefix.

    I/O: none.

    Parameters
    ----------
    data : bytes-like
        The frame, or at least the prefix that `progressive.prefix_of` told.
    layout : Layout
        What `progressive.layout_of` said of it.
    reduce : int
        Levels to leave out, up to those of the stream.
    depth : int, optional
        Written as depth and sign of every component (Ssiz), so that low-pass values that overshoot
        the range of the pixels neither wrap nor lose their sign. Only the reversible transform
        allows that: quantisation steps relate to the depth.
    one_part_a_resolution : bool
        As for `progressive.prefix_of`.

    Returns
    -------
    bytearray or None
        A raw codestream of ``ceil(rows / 2**reduce)`` by ``ceil(columns / 2**reduce)``; None when a
        header inside the stream says that its parts differ from each other.

    Raises
    ------
    DecodeError
        The data ends before the resolution does.
    """
    end = resolution_end(data, layout, reduce, one_part_a_resolution=one_part_a_resolution)
    if end is None:
        return None
    header = _smaller_header(layout, reduce, depth)
    made = bytearray().join((header, memoryview(data)[layout.body : end], _EOC))
    size = len(made) - len(_EOC)
    begins = [len(header)]
    while psot := int.from_bytes(made[begins[-1] + 6 : begins[-1] + 10], "big"):
        if begins[-1] + psot >= size:
            break
        begins.append(begins[-1] + psot)
    for begin in begins:
        made[begin + 11] = len(begins)
    struct.pack_into(">I", made, begins[-1] + 6, size - begins[-1])
    return made


@lru_cache(_HEADERS_KEPT)
def _smaller_header(layout: Layout, reduce: int, depth: int | None) -> bytes:
    info = layout.info
    made = bytearray(b"\xff\x4f")
    for marker, at, size in layout.segments:
        if marker in (_TLM, _PLM):
            continue
        begin, drop = len(made), 0
        made += layout.header[at : at + size]
        if marker == _SIZ:
            extent = (-(-info.columns >> reduce), -(-info.rows >> reduce))
            struct.pack_into(">II", made, begin + 6, *extent)
            struct.pack_into(">II", made, begin + 22, *extent)
            if depth is not None:
                made[begin + 40 :: 3] = bytes([depth]) * info.components
        elif marker == _COD:
            made[begin + 9] -= reduce
            drop = reduce if made[begin + 4] & 1 else 0  # precinct sizes, from the lowest resolution up
        elif marker in (_QCD, _QCC):
            # Before the style, QCC has the number of its component, of two bytes when there are more than 256.
            style = made[begin + (4 if marker == _QCD else 5 if info.components < 257 else 6)] & 0x1F
            drop = 3 * reduce * {0: 1, 2: 2}.get(style, 0)  # bytes a subband, lowest first; style 1 derives them all
        if drop:
            del made[-drop:]
            struct.pack_into(">H", made, begin + 2, size - 2 - drop)
    return bytes(made)
