"""One decoder a codec: from encoded bytes to stored values, at full resolution. Floor 1; no I/O."""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import accumulate, pairwise

import imagecodecs
import numpy as np

from ahi_ml.codec import jpeg2000
from ahi_ml.codec.pixelformat import PixelFormat, match_shape
from ahi_ml.codec.syntaxes import EXPLICIT_LE, describe
from ahi_ml.errors import DecodeError, UnsupportedTransferSyntaxError
from ahi_ml.types import AnyArray, Buffer

__all__ = ["DECODERS", "Decoder", "match"]

Decoder = Callable[[Buffer, str, PixelFormat, AnyArray | None], AnyArray]  # the last: to be used if it fits


def match(image: AnyArray, pixels: PixelFormat, syntax: str) -> AnyArray:
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
    fits = out is not None and out.flags.c_contiguous and jpeg2000.container(info.precision) == out.itemsize
    image = jpeg2000.decode_stream(data, info, out=out if fits and info.signed == pixels.signed else None)
    if info.signed != pixels.signed and pixels.samples == 1:
        return _extend_sign(image, info.precision, pixels)
    return image


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
    # JPEG XL has no sign either, and nothing of the depth reaches us: the metadata's bits are all there is.
    return _clear_unused_bits(imagecodecs.jpegxl_decode(data), pixels)


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


DECODERS: dict[str, Decoder] = {
    "htj2k": _jpeg2000,
    "j2k": _jpeg2000,
    "jpeg": _jpeg,
    "jpegls": _jpegls,
    "jpegxl": _jpegxl,
    "rle": _rle,
    "native": _native,
}
