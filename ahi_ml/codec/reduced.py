"""Lower resolutions of JPEG 2000 streams, decoded without wrapping. Floor 1; no I/O.

Low-pass values overshoot the range of the pixels, and OpenJPH wraps what its output does not hold. Where the
extremes of a frame tell that its low-pass values lie within 65,536 of each other, 16 bits are decoded all the
same, and unwrapped: the fastest way. Otherwise the depth is raised to 24 bits, in a smaller stream.

`smaller_stream` makes of the beginning of a stream one that is complete in itself: sizes, levels and
quantisation steps in the header shrunk, later tile-parts left out. Any decoder reads it, also one
that cannot leave out resolutions, and one that checks for missing bytes.

Sources: ITU-T T.800 annex A (markers).
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ahi_ml.codec import jpeg2000, wavelet
from ahi_ml.codec.jpeg2000 import StreamInfo
from ahi_ml.codec.layout import Layout, layout_of
from ahi_ml.codec.pixelformat import PixelFormat, match_shape
from ahi_ml.codec.progressive import resolution_end
from ahi_ml.codec.syntaxes import HTJ2K_LOSSLESS_RPCL
from ahi_ml.types import AnyArray, Buffer

__all__ = ["LowPass", "divisible", "low_pass_of", "settle", "shrink", "smaller_stream"]

_SIZ, _COD, _QCD, _QCC = 0xFF51, 0xFF52, 0xFF5C, 0xFF5D
_TLM, _PLM = 0xFF55, 0xFF57
_EOC = b"\xff\xd9"
_HEADROOM_BITS = 24
_HEADROOM = 0x80 | _HEADROOM_BITS - 1  # signed: Ssiz, T.800 A.5.1
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


class LowPass:
    """How a lower resolution of one JPEG 2000 stream is decoded, worked out once for frames that are read often.

    Parameters
    ----------
    data, layout : memoryview, Layout
        The frame up to where the resolution ends, and what `layout_of` said of it.
    syntax, pixels, reduce : str, PixelFormat, int
        As for `codec.decode`.
    skipped : int
        How many of the levels its decoder leaves out. The others are taken from what it gives.
    extremes : (int, int), optional
        As for `codec.decode`.
    """

    __slots__ = (
        "_data",
        "_deeper",
        "_direct",
        "_fits",
        "_layout",
        "_left",
        "_made",
        "_shift",
        "_skipped",
        "_syntax",
        "_wanted",
    )

    def __init__(
        self,
        data: memoryview,
        layout: Layout,
        syntax: str,
        pixels: PixelFormat,
        reduce: int,
        skipped: int,
        extremes: tuple[int, int] | None,
    ) -> None:
        self._data, self._layout, self._syntax = data, layout, syntax
        self._skipped, self._left = skipped, reduce - skipped
        self._wanted, self._made = pixels.reduced(reduce), pixels.reduced(skipped)
        self._shift, fits = None, False
        if extremes is not None and layout.info.high_throughput and layout.info.reversible:
            psot = int.from_bytes(data[layout.body + 6 : layout.body + 10], "big")
            if 0 < psot <= len(data) - layout.body:  # else cut within a tile-part, which OpenJPH refuses
                self._shift, fits = _to_16_bits(layout.info, pixels, extremes, reduce)
        self._deeper: tuple[_Smaller, StreamInfo] | None = None  # found when it is needed
        self._direct = not self._left and self._wanted.dtype.itemsize == 2
        self._fits = fits and self._direct

    def __call__(self, out: AnyArray | None = None) -> AnyArray:
        """Decode, into `out` if given. I/O: none; releases the GIL for HTJ2K.

        Raises
        ------
        DecodeError
            As `codec.decode`.
        """
        wanted, shift = self._wanted, self._shift
        if out is None:
            out = np.empty(wanted.shape, wanted.dtype)
        image = None
        if shift is not None:
            place = out if self._direct and out.flags.c_contiguous else None
            try:
                image = jpeg2000.decode_htj2k(self._data, self._layout.info, skipped=self._skipped, out=place)
            except Exception:  # the codec's own, some of them bare: the other way says what is wrong
                image = None
            else:
                if self._fits and place is not None:
                    return out
                image = image.view(np.int16)
        info = self._layout.info
        if image is None or shift is None:
            image = self._in_24_bits()
            shift = 0 if info.signed or not info.reversible else 1 << info.precision - 1
        elif shift:
            np.subtract(image, (shift - _LEAST) % (1 << 16) + _LEAST, out=image)
        if image.shape != self._made.shape:
            image = match_shape(image, self._made, self._syntax)
        if self._left:
            image = wavelet.low_pass(image, self._left, colour_transform=info.in_differences)
        if not info.reversible:  # of the stream's own depth, to which its decoder has clipped it
            image = image.astype(np.int32)
        return settle(image, wanted, out, shift)

    def _in_24_bits(self) -> AnyArray:
        """Low-pass values as the stream's own sign and `_HEADROOM_BITS` hold them."""
        if self._deeper is None:
            depth = _HEADROOM if self._layout.info.reversible else None
            smaller = _Smaller.of(self._data, self._layout, self._skipped, len(self._data), depth)
            self._deeper = smaller, jpeg2000.inspect(smaller.apply(self._data))
        smaller, info = self._deeper
        return jpeg2000.decode_stream(smaller.apply(self._data), info)


def low_pass_of(
    data: Buffer,
    syntax: str,
    pixels: PixelFormat,
    reduce: int,
    extremes: tuple[int, int] | None = None,
) -> LowPass | None:
    """Work out how a lower resolution of a JPEG 2000 stream is decoded, clipped to the stored range.

    I/O: none.

    Parameters
    ----------
    data : bytes-like
        The frame, or at least the prefix that `progressive.prefix_of` told.
    syntax, pixels, reduce, extremes : str, PixelFormat, int, (int, int)
        As for `codec.decode`.

    Returns
    -------
    LowPass or None
        None when nothing can be left out of the stream.

    Raises
    ------
    DecodeError
        As `codec.decode`.
    """
    layout = divisible(data, pixels)
    if layout is None:
        return None
    skipped = min(reduce, layout.info.levels)
    end = resolution_end(data, layout, skipped, one_part_a_resolution=syntax == HTJ2K_LOSSLESS_RPCL)
    if end is None:
        return None
    return LowPass(memoryview(data)[:end], layout, syntax, pixels, reduce, skipped, extremes)


def _to_16_bits(
    info: StreamInfo, pixels: PixelFormat, extremes: tuple[int, int], reduce: int
) -> tuple[int | None, bool]:
    """What to take from low-pass values so that an int16 holds them, None where that is not certain.

    And whether 16 bits are certain to hold them as stored values, so that nothing is to be done.
    """
    low, high = pixels.stored_range
    lowest, highest = int(extremes[0]), int(extremes[1])  # numbers of an index have few bits
    if not 8 < info.precision <= 16 or not low <= lowest <= highest <= high:
        return None, False
    least, most = wavelet.low_pass_range(lowest, highest, reduce)
    fits = low <= least and most <= high
    if least >= _LEAST and most <= _MOST:
        return 0, fits
    return ((least + most) // 2, fits) if most - least <= _MOST - _LEAST else (None, False)


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
    same = out.view(image.dtype) if out.itemsize == image.itemsize else out  # no buffer between
    image.clip(*_bounds(pixels, image.dtype, shift), out=same, casting="unsafe")
    if shift:
        np.add(out, shift, out=out)
    return out


def shrink(
    image: AnyArray,
    pixels: PixelFormat,
    reduce: int,
    *,
    colour_transform: bool = False,
    out: AnyArray | None = None,
) -> AnyArray:
    """Make a lower resolution of a decoded frame: of lossless streams the very one that `codec.decode` gives.

    I/O: none.

    Parameters
    ----------
    image : ndarray
        Stored values at full resolution.
    pixels, reduce : PixelFormat, int
        As for `codec.decode`.
    colour_transform : bool
        Whether the stream's wavelet saw differences of colours.
    out : ndarray, optional
        Shape and dtype of ``pixels.reduced(reduce)``.

    Returns
    -------
    ndarray
        `out` if given.
    """
    if pixels.blends:
        low = wavelet.low_pass(image, reduce, colour_transform=colour_transform)
        return settle(low, pixels.reduced(reduce), out)
    image = np.ascontiguousarray(image[:: 1 << reduce, :: 1 << reduce])
    if out is None:
        return image
    np.copyto(out, image)
    return out


@lru_cache
def _bounds(pixels: PixelFormat, dtype: np.dtype[Any], shift: int) -> tuple[np.integer[Any], np.integer[Any]]:
    """The stored range less the shift, as far as the dtype holds it.

    Of the dtype, too: numpy drops a Python integer that the dtype cannot pass, and with one bound takes seven times as
    long.
    """
    (low, high), limits = pixels.stored_range, np.iinfo(dtype)
    return dtype.type(max(low - shift, int(limits.min))), dtype.type(min(high - shift, int(limits.max)))


class _Smaller(NamedTuple):
    """What makes a smaller stream of the beginning of one: see `smaller_stream`."""

    header: bytes
    body: slice  # of the beginning
    changes: tuple[tuple[int, bytes], ...]  # where in the smaller stream, and what is written there

    @classmethod
    def of(cls, data: Buffer, layout: Layout, reduce: int, end: int, depth: int | None) -> _Smaller:
        header, body = _smaller_header(layout, reduce, depth), memoryview(data)[layout.body : end]
        begins = [0]
        while psot := int.from_bytes(body[begins[-1] + 6 : begins[-1] + 10], "big"):
            if begins[-1] + psot >= len(body):
                break
            begins.append(begins[-1] + psot)
        # The number of tile-parts (TNsot) in each, and in the last the length to its end (Psot): T.800 A.4.2.
        changes = [(len(header) + begin + 11, bytes((len(begins),))) for begin in begins]
        changes.append((len(header) + begins[-1] + 6, struct.pack(">I", len(body) - begins[-1])))
        return cls(header, slice(layout.body, end), tuple(changes))

    def apply(self, data: Buffer) -> bytearray:
        """Make the smaller stream, of the very bytes that this was found for."""
        made = bytearray().join((self.header, memoryview(data)[self.body], _EOC))
        for at, value in self.changes:
            made[at : at + len(value)] = value
        return made


def smaller_stream(data: Buffer, layout: Layout, reduce: int, end: int, *, depth: int | None = None) -> bytearray:
    """Make a stream of the resolution `reduce` levels below the full one, from a frame or its prefix.

    I/O: none.

    Parameters
    ----------
    data, layout : bytes-like, Layout
        The frame, or at least the prefix that `progressive.prefix_of` told, and what `layout_of`
        said of it.
    reduce : int
        Levels to leave out, up to those of the stream.
    end : int
        Where the resolution ends: what `progressive.resolution_end` said.
    depth : int, optional
        Written as depth and sign of every component (Ssiz), so that low-pass values that overshoot
        the range of the pixels neither wrap nor lose their sign. Only the reversible transform
        allows that: quantisation steps relate to the depth.

    Returns
    -------
    bytearray
        A raw codestream of ``ceil(rows / 2**reduce)`` by ``ceil(columns / 2**reduce)``.
    """
    return _Smaller.of(data, layout, reduce, end, depth).apply(data)


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
