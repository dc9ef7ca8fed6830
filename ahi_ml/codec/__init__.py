"""From an encoded frame to stored values: one `decode` for every syntax the data store serves.

Floor 1; no I/O. Stored values are what pydicom's ``pixel_array(raw=True)`` gives: sign and depth
as the DICOM attributes say, unused bits cleared, colour interleaved and not converted.

``reduce=r`` gives the frame at ``1 / 2**r`` of its size: the low-pass band that a JPEG 2000 decoder
returns when it leaves out `r` resolutions, clipped to the stored range. Its samples sit on samples
0, 2**r, 2 * 2**r, ... of the full frame.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import accumulate, pairwise

import imagecodecs
import numpy as np

from ahi_ml.codec import jpeg2000, progressive, reduced, wavelet
from ahi_ml.codec.layout import WHOLE, Prefix
from ahi_ml.codec.pixelformat import PixelFormat, match_shape
from ahi_ml.codec.syntaxes import (
    EXPLICIT_LE,
    HTJ2K_LOSSLESS_RPCL,
    SYNTAXES,
    TransferSyntax,
    describe,
)
from ahi_ml.errors import DecodeError, UnsupportedTransferSyntaxError
from ahi_ml.types import AnyArray, Buffer

__all__ = [
    "EXPLICIT_LE",
    "HTJ2K_LOSSLESS_RPCL",
    "SYNTAXES",
    "PixelFormat",
    "Prefix",
    "TransferSyntax",
    "crc32",
    "decode",
    "describe",
    "levels",
    "pack_bits",
    "prefix",
    "prefixes",
]

_JPEG_2000 = ("htj2k", "j2k")
_deflate_crc32 = imagecodecs.deflate_crc32  # which loads a library: not while threads wait to decode their first frame

_EXTRA_HINTS = {"video": "video frames are not decoded: read the bytes with store.reader.fetch() and a video library"}


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
    known = SYNTAXES.get(syntax)
    decoder = _DECODERS.get(known.codec) if known else None
    if known is None or decoder is None:
        hint = _EXTRA_HINTS.get(known.codec, "") if known else "no decoder knows this UID"
        raise UnsupportedTransferSyntaxError(f"cannot decode transfer syntax {describe(syntax)}: {hint}")
    wanted = pixels.reduced(reduce) if reduce else pixels
    if out is not None and (out.shape != wanted.shape or out.dtype != wanted.dtype):
        raise DecodeError(
            f"the array to decode into is {out.dtype}{out.shape}, the frame is {wanted.dtype}{wanted.shape}"
        )
    try:
        if reduce and known.codec in _JPEG_2000:
            if pixels.blends:
                low = reduced.decode_low(data, syntax, pixels, reduce, out=out, extremes=extremes)
                if low is not None:
                    return low
            progressive.check_complete(data, jpeg2000.inspect(data))
        image = decoder(data, syntax, pixels, None if reduce else out)
    except DecodeError:
        raise
    except Exception as error:  # the codecs raise errors of their own, some of them bare
        raise DecodeError(f"{describe(syntax)}: {error} ({len(data)} bytes)") from error
    image = _match(image, pixels, syntax)
    if reduce and pixels.blends:
        differences = known.codec in _JPEG_2000 and jpeg2000.inspect(data).in_differences
        return reduced.settle(wavelet.low_pass(image, reduce, colour_transform=differences), wanted, out)
    if reduce:
        image = np.ascontiguousarray(image[:: 1 << reduce, :: 1 << reduce])
    if out is None or image is out:
        return image
    np.copyto(out, image)
    return out


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
    return known is not None and known.codec in _JPEG_2000 and pixels.blends


def _match(image: AnyArray, pixels: PixelFormat, syntax: str) -> AnyArray:
    """Give a decoded frame the shape and dtype of the metadata, or say why it cannot have them."""
    if image.shape != pixels.shape:
        image = match_shape(image, pixels, syntax)
    if image.dtype != pixels.dtype:
        decoded, image = image, image.astype(pixels.dtype)
        if decoded.itemsize > image.itemsize and not np.array_equal(decoded, image):
            raise DecodeError(
                f"{describe(syntax)}: the frame has values of {decoded.dtype} that {pixels.dtype} cannot hold"
            )
    return image


def _extend_sign(image: AnyArray, bits: int, pixels: PixelFormat) -> AnyArray:
    """Reinterpret the low `bits` of each sample with the sign that `pixels` asks for."""
    if image.itemsize > pixels.dtype.itemsize:
        return image  # wider than the metadata says: `decode` looks whether its values fit all the same
    image = image.astype(pixels.dtype, copy=not image.flags.writeable)
    shift = 8 * image.dtype.itemsize - bits
    if shift > 0:
        np.left_shift(image, shift, out=image)
        np.right_shift(image, shift, out=image)
    return image


def _jpeg2000(data: Buffer, syntax: str, pixels: PixelFormat, out: AnyArray | None) -> AnyArray:
    info = jpeg2000.inspect(data)
    if info.rows * info.columns * info.components != pixels.rows * pixels.columns * pixels.samples:
        raise DecodeError(
            f"{describe(syntax)}: the codestream is {info.rows}x{info.columns}x{info.components}, "
            f"the metadata says {pixels.shape}"
        )
    # The codec checks the size of `out` but not its sign, so only an exact match may decode into it.
    fits = out is not None and out.flags.c_contiguous and _container(info.precision) == out.itemsize
    image = jpeg2000.decode_stream(data, info, out=out if fits and info.signed == pixels.signed else None)
    if info.signed != pixels.signed and pixels.samples == 1:
        return _extend_sign(image, info.precision, pixels)
    return image


def _container(precision: int) -> int:
    return 1 if precision <= 8 else 2 if precision <= 16 else 4


def _jpeg(data: Buffer, syntax: str, pixels: PixelFormat, out: AnyArray | None) -> AnyArray:
    if syntax.endswith((".57", ".70")):
        image = imagecodecs.ljpeg_decode(data)
    elif pixels.samples == 1:
        image = imagecodecs.jpeg8_decode(data)
    else:
        # The same name on both sides switches the colour conversion off: stored values are asked for.
        image = imagecodecs.jpeg8_decode(data, colorspace="YCBCR", outcolorspace="YCBCR")
    return _clear_unused_bits(image, pixels)


def _clear_unused_bits(image: AnyArray, pixels: PixelFormat) -> AnyArray:
    if pixels.bits_stored < 8 * pixels.dtype.itemsize:
        return _extend_sign(image, pixels.bits_stored, pixels)
    return image


def _jpegls(data: Buffer, syntax: str, pixels: PixelFormat, out: AnyArray | None) -> AnyArray:
    image = imagecodecs.jpegls_decode(data)
    if pixels.signed:  # JPEG-LS has no sign: two's complement at the precision of its frame header
        return _extend_sign(image, _jpegls_precision(data), pixels)
    return _clear_unused_bits(image, pixels)


def _jpegls_precision(data: Buffer) -> int:
    view = memoryview(data)
    at = 2
    while at + 4 < len(view):
        if view[at] != 0xFF:
            break
        if view[at + 1] == 0xF7:  # SOF55, ITU-T T.87 C.2.2
            return view[at + 4]
        at += 2 + int.from_bytes(view[at + 2 : at + 4], "big")
    raise DecodeError("a JPEG-LS stream without a frame header (SOF55)")


def _jpegxl(data: Buffer, syntax: str, pixels: PixelFormat, out: AnyArray | None) -> AnyArray:
    return imagecodecs.jpegxl_decode(data)  # type: ignore[no-any-return]


def _rle(data: Buffer, syntax: str, pixels: PixelFormat, out: AnyArray | None) -> AnyArray:
    order = pixels.dtype.newbyteorder("<")
    try:
        samples = imagecodecs.dicomrle_decode(data, order)
    except RuntimeError:  # a segment decodes to more or to less than a plane of bytes
        samples = imagecodecs.dicomrle_decode(_without_padding(data, pixels), order)
    flat = np.frombuffer(samples, pixels.dtype)
    if flat.size != pixels.rows * pixels.columns * pixels.samples:
        raise DecodeError(f"{describe(syntax)}: the frame has {flat.size} samples, the metadata says {pixels.shape}")
    if pixels.samples > 1:  # segments are planes (PS3.5 annex G)
        planes = flat.reshape(pixels.samples, pixels.rows, pixels.columns)
        flat = np.ascontiguousarray(planes.transpose(1, 2, 0))
    return _clear_unused_bits(flat.reshape(pixels.shape), pixels)


def _without_padding(data: Buffer, pixels: PixelFormat) -> bytes:
    """An RLE frame whose segments end with their last needed run: some writers pad them, which decodes to more."""
    view = memoryview(data)
    count, *offsets = struct.unpack_from("<16I", view)
    segments = []
    for begin, end in pairwise([*offsets[:count], len(view)]):
        end = min(end, len(view))
        at, left = begin, pixels.rows * pixels.columns
        while at < end and left > 0:
            control = view[at]
            run = control + 1 if control < 128 else 257 - control if control > 128 else 0
            at, left = at + (control + 2 if control < 128 else 2 if control > 128 else 1), left - run
        segments.append(bytes(view[begin : min(at, end)]))
    starts = accumulate((len(segment) for segment in segments[:-1]), initial=64)
    return struct.pack("<16I", count, *starts, *[0] * (15 - count)) + b"".join(segments)


def _native(data: Buffer, syntax: str, pixels: PixelFormat, out: AnyArray | None) -> AnyArray:
    if syntax != EXPLICIT_LE:
        raise UnsupportedTransferSyntaxError(
            f"a raw frame in {describe(syntax)}: the data store serves raw frames in {EXPLICIT_LE} only"
        )
    count = pixels.rows * pixels.columns * pixels.samples
    if pixels.bits_allocated == 1:
        packed = np.frombuffer(data, np.uint8)
        if packed.size < (count + 7) // 8:
            raise DecodeError(f"{packed.size} bytes are too few for {count} single bits")
        return np.unpackbits(packed, count=count, bitorder="little").reshape(pixels.shape)
    dtype = pixels.dtype.newbyteorder("<")
    if len(data) < count * dtype.itemsize:
        raise DecodeError(f"{len(data)} bytes are too few for {pixels.shape} of {dtype}")
    return _clear_unused_bits(np.frombuffer(data, dtype, count).reshape(pixels.shape), pixels)


_DECODERS: dict[str, Callable[[Buffer, str, PixelFormat, AnyArray | None], AnyArray]] = {
    "htj2k": _jpeg2000,
    "j2k": _jpeg2000,
    "jpeg": _jpeg,
    "jpegls": _jpegls,
    "jpegxl": _jpegxl,
    "rle": _rle,
    "native": _native,
}
