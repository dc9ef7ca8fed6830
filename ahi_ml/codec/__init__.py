"""From an encoded frame to stored values: one `decode` for every syntax the data store serves.

Floor 1; no I/O. Stored values are what pydicom's ``pixel_array(raw=True)`` gives: sign and depth
as the DICOM attributes say, unused bits cleared, colour interleaved and not converted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import imagecodecs
import numpy as np

from ahi_ml.codec import jpeg2000
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
    "TransferSyntax",
    "crc32",
    "decode",
    "describe",
    "pack_bits",
]

_EXTRA_HINTS = {"video": "video frames are not decoded: read the bytes with store.reader.fetch() and a video library"}


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """The Image Pixel attributes that fix the shape and type of a frame (PS3.3 C.7.6.3).

    Parameters
    ----------
    rows, columns : int
        Size of the frame.
    samples : int
        Samples per Pixel: 1, or 3 for colour.
    bits_allocated : int
        1, 8, 16 or 32.
    bits_stored : int
        Bits that carry the value.
    signed : bool
        Pixel Representation 1.
    photometric : str
        Photometric Interpretation.
    """

    rows: int
    columns: int
    samples: int = 1
    bits_allocated: int = 16
    bits_stored: int = 16
    signed: bool = False
    photometric: str = "MONOCHROME2"

    @property
    def dtype(self) -> np.dtype[np.integer]:
        """The dtype of stored values; single bits unpack to uint8."""
        size = max(self.bits_allocated, 8) // 8
        return np.dtype(f"{'i' if self.signed and self.bits_allocated > 1 else 'u'}{size}")

    @property
    def shape(self) -> tuple[int, ...]:
        """``(rows, columns)``, or ``(rows, columns, samples)`` for colour."""
        plane = (self.rows, self.columns)
        return plane if self.samples == 1 else (*plane, self.samples)

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded frame."""
        return self.rows * self.columns * self.samples * self.dtype.itemsize


def crc32(data: Buffer | AnyArray) -> int:
    """CRC-32 (zlib's polynomial) of bytes or of a C-contiguous array, unsigned.

    I/O: none; releases the GIL. The service's checksums are of little-endian samples, which is
    what the arrays of every supported machine hold.
    """
    if isinstance(data, np.ndarray) and not data.flags.c_contiguous:
        data = np.ascontiguousarray(data)
    return int(imagecodecs.deflate_crc32(data))


def decode(data: Buffer, syntax: str, pixels: PixelFormat, *, out: AnyArray | None = None) -> AnyArray:
    """Decode one frame to stored values.

    I/O: none; the work releases the GIL for HTJ2K, JPEG and JPEG-LS.

    Parameters
    ----------
    data : bytes-like
        The encoded frame, complete. OpenJPH does not notice missing or damaged bytes: check
        lengths and checksums outside.
    syntax : str
        Transfer syntax UID the frame is stored in.
    pixels : PixelFormat
        Shape and type to deliver.
    out : ndarray, optional
        ``pixels.shape`` and ``pixels.dtype``: decoded into and returned.

    Returns
    -------
    ndarray of ``pixels.shape`` and ``pixels.dtype``

    Raises
    ------
    UnsupportedTransferSyntaxError
        Video, or a syntax nobody here reads; the message names it.
    DecodeError
        The bytes are damaged, or decode to another shape than `pixels` says.
    """
    known = SYNTAXES.get(syntax)
    decoder = _DECODERS.get(known.codec) if known else None
    if decoder is None:
        hint = _EXTRA_HINTS.get(known.codec, "") if known else "no decoder knows this UID"
        raise UnsupportedTransferSyntaxError(f"cannot decode transfer syntax {describe(syntax)}: {hint}")
    if out is not None and (out.shape != pixels.shape or out.dtype != pixels.dtype):
        raise DecodeError(
            f"the array to decode into is {out.dtype}{out.shape}, the frame is {pixels.dtype}{pixels.shape}"
        )
    try:
        image = decoder(data, syntax, pixels, out)
    except DecodeError:
        raise
    except Exception as error:  # the codecs raise errors of their own, some of them bare
        raise DecodeError(f"{describe(syntax)}: {error} ({len(data)} bytes)") from error
    if image.shape != pixels.shape:
        image = _match_shape(image, pixels, syntax)
    if image.dtype != pixels.dtype:
        decoded, image = image, image.astype(pixels.dtype)
        if decoded.itemsize > image.itemsize and not np.array_equal(decoded, image):
            raise DecodeError(
                f"{describe(syntax)}: the frame has values of {decoded.dtype} that {pixels.dtype} cannot hold"
            )
    if out is None or image is out:
        return image
    np.copyto(out, image)
    return out


def pack_bits(mask: AnyArray) -> bytes:
    """Pack a frame of zeros and ones, first pixel in the lowest bit (PS3.5 8.1.1). I/O: none."""
    return np.packbits(mask.reshape(-1) != 0, bitorder="little").tobytes()


def _match_shape(image: AnyArray, pixels: PixelFormat, syntax: str) -> AnyArray:
    if image.size == pixels.rows * pixels.columns * pixels.samples and image.ndim < 3 + (pixels.samples > 1):
        squeezed = image.reshape([n for n in image.shape if n != 1] or [1])
        if squeezed.shape == tuple(n for n in pixels.shape if n != 1) or squeezed.size == 1:
            return image.reshape(pixels.shape)
    if image.ndim == 3 and image.shape[2] == 4 and pixels.samples == 3:
        raise DecodeError(f"{describe(syntax)}: the frame has an alpha channel, which DICOM does not allow")
    raise DecodeError(f"{describe(syntax)}: the frame decodes to {image.shape}, the metadata says {pixels.shape}")


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
    direct = out is not None and info.signed == pixels.signed and _container(info.precision) == out.itemsize
    image = jpeg2000.decode_stream(data, info, out=out if direct else None)
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
    flat = np.frombuffer(imagecodecs.dicomrle_decode(data, pixels.dtype.newbyteorder("<")), pixels.dtype)
    if pixels.samples > 1:  # segments are planes (PS3.5 annex G)
        planes = flat.reshape(pixels.samples, pixels.rows, pixels.columns)
        flat = np.ascontiguousarray(planes.transpose(1, 2, 0))
    return _clear_unused_bits(flat.reshape(pixels.shape), pixels)


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
