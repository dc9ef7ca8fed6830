"""Pixel data as the frames that the data store keeps: as received, or losslessly transcoded.

What is kept and what is transcoded is the service's table (`codec.syntaxes`). Transcoded frames
are decoded again after encoding: nothing is stored whose pixels were not seen to come back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag

from ahi_ml import codec
from ahi_ml.codec import PixelFormat, jpeg2000, progressive
from ahi_ml.codec.syntaxes import EXPLICIT_LE, HTJ2K_LOSSLESS_RPCL, J2K_LOSSLESS, SYNTAXES, describe
from ahi_ml.errors import DecodeError
from ahi_ml.local.ingest.fragments import encoded_frames, video_stream
from ahi_ml.local.ingest.native import native_frames
from ahi_ml.local.ingest.remarks import FRAME_NUMBER_MISMATCH, PixelFailure, Remark
from ahi_ml.types import AnyArray

__all__ = ["STORED_SYNTAX", "StoredFrame", "has_pixels", "pixel_format", "stored_frames", "stored_syntax"]

STORED_SYNTAX = {"HTJ2K": HTJ2K_LOSSLESS_RPCL, "JPEG_2000_LOSSLESS": J2K_LOSSLESS}
"""Transfer syntax of what a data store transcodes, by its lossless storage format."""

_LOG = logging.getLogger(__name__)
_MOST_SAMPLES = 2**31
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
_PHOTOMETRIC = {  # PS3.3 C.7.6.3.1.2, the retired ones included
    *("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "HSV", "ARGB", "CMYK", "XYB"),
    *("YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT"),
}
_FLOAT_TAGS = (0x7FE00008, 0x7FE00009)
_PIXEL_TAGS = (*_FLOAT_TAGS, 0x7FE00010)
# All that `pixel_format` goes by: 0028 are the samples, the colour space, rows, columns, bits and the sign.
_FORMAT_TAGS = [
    BaseTag(tag)
    for tag in (*_FLOAT_TAGS, 0x00280002, 0x00280004, 0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280103)
]


@dataclass(frozen=True, slots=True)
class StoredFrame:
    """One frame, ready to be stored.

    Parameters
    ----------
    data : bytes
        Encoded as it is stored.
    checksum : int
        CRC-32 of the little-endian samples, or of `data` for a kept syntax.
    minimum, maximum : int or None
        Extremes of the stored values; None for a kept syntax.
    """

    data: bytes
    checksum: int
    minimum: int | None
    maximum: int | None


def has_pixels(dataset: Dataset) -> bool:
    """Whether there is pixel data in any of its three forms."""
    return any(tag in dataset for tag in _PIXEL_TAGS)


def pixel_format(dataset: Dataset) -> PixelFormat:
    """The Image Pixel attributes of a data set.

    Raises
    ------
    PixelFailure
        One is missing or cannot be, the text names it; or the pixels are floating-point numbers.
    """
    elements: list[Any] = [dataset.get_item(tag) for tag in _FORMAT_TAGS if tag in dataset]
    if not all(isinstance(element, RawDataElement) for element in elements):
        return _pixel_format(dataset)
    return _remembered_format(*(element._replace(value_tell=0) for element in elements))


@lru_cache(maxsize=1_024)
def _remembered_format(*elements: RawDataElement) -> PixelFormat:
    """The format that raw elements describe: instances of a series have it in common."""
    return _pixel_format(Dataset({element.tag: element for element in elements}))


def _pixel_format(dataset: Dataset) -> PixelFormat:
    if any(tag in dataset for tag in _FLOAT_TAGS):
        raise PixelFailure("Float Pixel Data and Double Float Pixel Data have no lossless stored form")

    def number(keyword: str, default: int | None = None) -> int:
        try:
            value = dataset.get(keyword)
            value = default if value is None else value
            if value is None:
                raise PixelFailure(f"DICOM attribute {keyword} does not exist")
            if isinstance(value, str):
                raise TypeError
            return int(value)
        except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
            raise PixelFailure(f"DICOM attribute {keyword} is not a number") from error

    allocated = number("BitsAllocated")
    sign = number("PixelRepresentation", 0 if allocated == 1 else None)
    found = PixelFormat(
        rows=number("Rows"),
        columns=number("Columns"),
        samples=number("SamplesPerPixel", 1),
        bits_allocated=allocated,
        bits_stored=number("BitsStored", allocated),
        signed=sign == 1,
        photometric=str(dataset.get("PhotometricInterpretation") or "").strip(),
    )
    if not found.photometric:
        raise PixelFailure("DICOM attribute PhotometricInterpretation does not exist")
    if found.photometric not in _PHOTOMETRIC:  # readers go by it, and free text has no place in an index
        raise PixelFailure("PhotometricInterpretation is no term that DICOM defines")
    if sign not in (0, 1):
        raise PixelFailure(f"PixelRepresentation is {sign} (0 and 1 are known)")
    if found.rows < 1 or found.columns < 1:
        raise PixelFailure(f"Rows x Columns is {found.rows} x {found.columns}")
    if found.samples not in (1, 3):
        raise PixelFailure(f"SamplesPerPixel {found.samples} is not supported (1 and 3 are)")
    if found.bits_allocated not in (1, 8, 16, 32):
        raise PixelFailure(f"BitsAllocated {found.bits_allocated} is not supported (1, 8, 16 and 32 are)")
    if not 1 <= found.bits_stored <= found.bits_allocated:
        raise PixelFailure(f"BitsStored {found.bits_stored} with BitsAllocated {found.bits_allocated}")
    if found.rows * found.columns * found.samples > _MOST_SAMPLES:
        raise PixelFailure(f"a frame of {found.rows} x {found.columns} x {found.samples} samples is too large")
    return found


def stored_syntax(transfer_syntax: str, pixels: PixelFormat | None, storage_format: str) -> str:
    """The transfer syntax an instance's frames are stored in."""
    if SYNTAXES[transfer_syntax].kept:
        return transfer_syntax
    if pixels is not None and pixels.bits_allocated == 1:
        return EXPLICIT_LE
    return STORED_SYNTAX[storage_format]


def stored_frames(dataset: Dataset, pixels: PixelFormat, storage_format: str, remark: Remark) -> Iterator[StoredFrame]:
    """Yield an instance's frames as the data store keeps them, in order.

    I/O: none. One frame is in memory at a time, beside the encoded data set.

    Parameters
    ----------
    dataset : pydicom.Dataset
        Complete, with file meta.
    pixels : PixelFormat
        Of `dataset`.
    storage_format : {"HTJ2K", "JPEG_2000_LOSSLESS"}
        The data store's.
    remark : callable
        Told of what is wrong with the pixel data and does not change the pixels.

    Raises
    ------
    PixelFailure
        A frame cannot be read or stored; the text says which and why.
    """
    uid = str(dataset.file_meta.TransferSyntaxUID)
    count = _frame_count(dataset, remark)
    known = SYNTAXES[uid]
    stored: Iterator[StoredFrame]
    if known.codec == "video":
        stored = (StoredFrame(data, codec.crc32(data), None, None) for data in [video_stream(dataset)])
    elif known.kept:
        stored = (_keep(data, uid, pixels) for data in encoded_frames(dataset, pixels, count, remark))
    else:
        images = (
            (_decode(data, uid, pixels) for data in encoded_frames(dataset, pixels, count, remark))
            if known.encapsulated
            else native_frames(dataset, pixels, count, remark)
        )
        if pixels.bits_allocated == 1:
            stored = (_pack(image) for image in images)
        else:
            stored = (_transcode(image, storage_format, pixels) for image in images)
    number = 0
    try:
        for number, frame in enumerate(stored, 1):  # noqa: B007 (for the messages below)
            yield frame
    except PixelFailure:
        raise
    except MemoryError as error:
        raise PixelFailure(f"frame {number + 1} of {count} does not fit into memory") from error
    except Exception as error:
        # Decoders raise many kinds of errors over hostile pixel data, and each is the file's fault.
        _LOG.debug("a frame could not be read", exc_info=True)
        raise PixelFailure(f"frame {number + 1} of {count} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The codecs' own words; not pydicom's, which quote values."""
    if not isinstance(error, DecodeError):
        return "the pixel data is not what the image attributes describe"
    text = " ".join(str(error).split())
    return (text[:297] + "...") if len(text) > 300 else text


def _frame_count(dataset: Dataset, remark: Remark) -> int:
    value: Any = dataset.get("NumberOfFrames")
    try:
        count = 1 if value in (None, "") else int(value)
    except (TypeError, ValueError) as error:
        raise PixelFailure("DICOM attribute NumberOfFrames is not a number") from error
    if count < 0:
        raise PixelFailure(f"NumberOfFrames is {count}")
    if count == 0:
        remark(FRAME_NUMBER_MISMATCH, "NumberOfFrames is 0, taken for 1")
    return max(count, 1)


def _decode(data: bytes, uid: str, pixels: PixelFormat) -> AnyArray:
    """Decode a frame as received; refuse damage that its decoder would not notice."""
    family = SYNTAXES[uid].codec
    if family == "jpeg" and data.rfind(_JPEG_END) < data.rfind(_JPEG_SCAN):  # neither is in coded data: T.81 B.1.1.5
        raise DecodeError(f"a JPEG stream of {len(data)} bytes ends without its end marker (EOI)")
    image = codec.decode(data, uid, pixels)
    if family == "htj2k" and (info := jpeg2000.inspect(data)).high_throughput:
        progressive.check_complete(data, info)
        jpeg2000.confirm(data, info, image)
    return image


def _keep(data: bytes, uid: str, pixels: PixelFormat) -> StoredFrame:
    _decode(data, uid, pixels)  # what nobody can read is told now, not in a training run
    return StoredFrame(data, codec.crc32(data), None, None)


def _pack(image: AnyArray) -> StoredFrame:
    data = codec.pack_bits(image)
    return StoredFrame(data, codec.crc32(data), None, None)


def _transcode(image: AnyArray, storage_format: str, pixels: PixelFormat) -> StoredFrame:
    encode = jpeg2000.encode_htj2k if storage_format == "HTJ2K" else jpeg2000.encode_j2k
    syntax = STORED_SYNTAX[storage_format]
    native = image.dtype.newbyteorder("=")
    image = np.ascontiguousarray(image, native)
    if image.dtype != pixels.dtype:
        image = image.astype(pixels.dtype)
    data = bytes(encode(image))
    checksum = codec.crc32(image)
    if codec.crc32(codec.decode(data, syntax, pixels, out=_scratch(pixels))) != checksum:
        raise DecodeError(f"its {pixels.dtype} samples do not survive {describe(syntax)}")
    return StoredFrame(data, checksum, int(image.min()), int(image.max()))


_SCRATCH = threading.local()


def _scratch(pixels: PixelFormat) -> AnyArray:
    """This thread's array to decode into: fresh pages cost a tenth of the decoding."""
    array: AnyArray | None = getattr(_SCRATCH, "array", None)
    if array is None or array.shape != pixels.shape or array.dtype != pixels.dtype:
        array = _SCRATCH.array = np.empty(pixels.shape, pixels.dtype)
    return array
