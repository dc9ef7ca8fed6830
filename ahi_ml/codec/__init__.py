"""From an encoded frame to stored values: one `decode` for every syntax the data store serves.

Floor 1; no I/O. Stored values are what pydicom's ``pixel_array(raw=True)`` gives: sign and depth
as the DICOM attributes say, unused bits cleared, colour interleaved and not converted.

``reduce=r`` gives the frame at ``1 / 2**r`` of its size: the low-pass band that a JPEG 2000 decoder
returns when it leaves out `r` resolutions, clipped to the stored range. Its samples sit on samples
0, 2**r, 2 * 2**r, ... of the full frame.
"""

from __future__ import annotations

import imagecodecs
import numpy as np

from ahi_ml.codec import progressive, reduced
from ahi_ml.codec.layout import WHOLE, Prefix
from ahi_ml.codec.pixelformat import PixelFormat
from ahi_ml.codec.prepared import Prepared, prepare
from ahi_ml.codec.reduced import shrink
from ahi_ml.codec.syntaxes import EXPLICIT_LE, HTJ2K_LOSSLESS_RPCL, JPEG_2000, SYNTAXES, TransferSyntax, describe
from ahi_ml.codec.wavelet import reached
from ahi_ml.errors import DecodeError
from ahi_ml.types import AnyArray, Buffer

__all__ = [
    "EXPLICIT_LE",
    "HTJ2K_LOSSLESS_RPCL",
    "SYNTAXES",
    "PixelFormat",
    "Prefix",
    "Prepared",
    "TransferSyntax",
    "crc32",
    "decode",
    "describe",
    "levels",
    "pack_bits",
    "prefix",
    "prefixes",
    "prepare",
    "reached",
    "shrink",
]

_deflate_crc32 = imagecodecs.deflate_crc32  # which loads a library: not while threads wait to decode their first frame


def crc32(data: Buffer | AnyArray, before: int = 0) -> int:
    """CRC-32 (zlib's polynomial) of bytes or of a C-contiguous array, unsigned; `before` is that of what stands before.

    I/O: none; releases the GIL. The service's checksums are of little-endian samples, which is
    what the arrays of every supported machine hold.
    """
    if isinstance(data, np.ndarray) and not data.flags.c_contiguous:
        data = np.ascontiguousarray(data)
    return int(_deflate_crc32(data, before))


def decode(
    data: Buffer,
    syntax: str,
    pixels: PixelFormat,
    *,
    out: AnyArray | None = None,
    reduce: int = 0,
    extremes: tuple[int, int] | None = None,
) -> AnyArray:
    """Decode one frame to stored values, at full or lower resolution.

    A lower resolution is the low-pass band of the codestream's own wavelet, clipped to the stored
    range (Bits Stored), never wrapped. Where the stream has too few levels, or none because it is no
    JPEG 2000, the reversible 5/3 wavelet is continued on the pixels, so every level there is can be
    had from every frame. Masks, label maps and palette indices are not blended: every ``2**reduce``-th
    sample is taken.

    I/O: none; the work releases the GIL for HTJ2K, JPEG and JPEG-LS.

    Parameters
    ----------
    data : bytes-like
        The encoded frame, complete; with `reduce`, the prefix that `prefix` tells is enough.
        OpenJPH does not notice missing or damaged bytes: check lengths and checksums outside.
        With `reduce`, JPEG 2000 streams that end too early are noticed, damage is not.
    syntax : str
        Transfer syntax UID the frame is stored in.
    pixels : PixelFormat
        Shape and type of the full frame.
    out : ndarray, optional
        Shape and dtype of ``pixels.reduced(reduce)``: decoded into and returned.
    reduce : int
        Resolution levels to leave out.
    extremes : (int, int), optional
        Lowest and highest stored value of the full frame, where they are known: where they leave room, a
        lower resolution of HTJ2K is decoded in fewer bits, which is faster, to the same values. A range wider
        than the true one does no harm; with a narrower one values may wrap.

    Returns
    -------
    ndarray of shape and dtype of ``pixels.reduced(reduce)``

    Raises
    ------
    UnsupportedTransferSyntaxError
        Video, or a syntax nobody here reads; the message names it.
    DecodeError
        The bytes are damaged or too few, or decode to another shape than `pixels` says.
    ConfigError
        `reduce` is negative.
    """
    prepared = prepare(data, syntax, pixels, reduce=reduce, extremes=extremes)
    wanted = prepared.wanted
    if out is not None and (out.shape != wanted.shape or out.dtype != wanted.dtype):
        raise DecodeError(
            f"the array to decode into is {out.dtype}{out.shape}, the frame is {wanted.dtype}{wanted.shape}"
        )
    return prepared(out)


def levels(data: Buffer, syntax: str, pixels: PixelFormat) -> int:
    """How many resolution levels a frame's own stream offers: what costs less than decoding it all.

    `decode` gives any level of any frame; beyond this number it continues the wavelet itself.

    I/O: none.

    Parameters
    ----------
    data : bytes-like
        The encoded frame, or at least its main header.
    syntax, pixels : str, PixelFormat
        As for `decode`.

    Returns
    -------
    int
        0 for frames that are decoded whole and shrunk.

    Raises
    ------
    DecodeError
        The bytes are no JPEG 2000 stream although the syntax says so, or end inside its main header.
    """
    if not _may_be_cut(syntax, pixels):
        return 0
    layout = reduced.divisible(data, pixels)
    return layout.info.levels if layout else 0


def prefix(head: Buffer, syntax: str, pixels: PixelFormat, reduce: int) -> Prefix:
    """How many bytes from the start of a frame `decode` needs for a resolution, exactly.

    A reader asks with the bytes it has, and again with more while the answer is not ``known``.

    I/O: none.

    Parameters
    ----------
    head : bytes-like
        The frame's first bytes, as many as there are.
    syntax, pixels, reduce : str, PixelFormat, int
        As for `decode`.

    Returns
    -------
    Prefix
        Of bytes that are no JPEG 2000 stream, and of streams that cannot be cut, the whole frame: never an error.
    """
    if reduce <= 0 or not _may_be_cut(syntax, pixels):
        return WHOLE
    answer = progressive.prefix_of(head, reduce, one_part_a_resolution=syntax == HTJ2K_LOSSLESS_RPCL)
    if answer.known and answer.size is not None and not reduced.divisible(head, pixels):
        return WHOLE
    return answer


def prefixes(data: Buffer, syntax: str, pixels: PixelFormat) -> tuple[int, ...]:
    """How many bytes from the start of a frame `decode` needs for each of its lower resolutions, exactly.

    What `prefix` tells step by step of a frame that is still to be read, of one that is here.

    I/O: none.

    Parameters
    ----------
    data : bytes-like
        The whole encoded frame.
    syntax, pixels : str, PixelFormat
        As for `decode`.

    Returns
    -------
    tuple of int
        Of ``reduce`` 1, 2, ... to the levels of the stream; beyond, the last one is enough. Empty for frames
        that are needed whole, and of bytes that are no JPEG 2000 stream: never an error.
    """
    if not _may_be_cut(syntax, pixels):
        return ()
    try:
        layout = reduced.divisible(data, pixels)
    except DecodeError:
        return ()
    if layout is None:
        return ()
    return progressive.prefixes_of(data, layout, one_part_a_resolution=syntax == HTJ2K_LOSSLESS_RPCL)


def pack_bits(mask: AnyArray) -> bytes:
    """Pack a frame of zeros and ones, first pixel in the lowest bit (PS3.5 8.1.1). I/O: none."""
    return np.packbits(mask.reshape(-1) != 0, bitorder="little").tobytes()


def _may_be_cut(syntax: str, pixels: PixelFormat) -> bool:
    known = SYNTAXES.get(syntax)
    return known is not None and known.codec in JPEG_2000 and pixels.blends
