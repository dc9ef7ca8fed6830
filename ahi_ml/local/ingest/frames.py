"""Pixel data as the frames that the data store keeps: as received, or losslessly transcoded.

What is kept and what is transcoded is the service's table (`codec.syntaxes`). Transcoded frames
are decoded again after encoding: nothing is stored whose pixels were not seen to come back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import generate_fragments, generate_frames, parse_basic_offsets
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from ahi_ml import codec
from ahi_ml.codec import PixelFormat, jpeg2000
from ahi_ml.codec.syntaxes import EXPLICIT_LE, HTJ2K_LOSSLESS_RPCL, IMPLICIT_LE, J2K_LOSSLESS, SYNTAXES, describe
from ahi_ml.errors import DecodeError
from ahi_ml.types import AnyArray

__all__ = ["STORED_SYNTAX", "PixelFailure", "StoredFrame", "pixel_format", "stored_frames", "stored_syntax"]

STORED_SYNTAX = {"HTJ2K": HTJ2K_LOSSLESS_RPCL, "JPEG_2000_LOSSLESS": J2K_LOSSLESS}
"""Transfer syntax of what a data store transcodes, by its lossless storage format."""

_LOG = logging.getLogger(__name__)
_MOST_SAMPLES = 2**31
_NUMBERS = ("SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation")
_PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)


class PixelFailure(Exception):
    """The pixel data of a file cannot be stored; the text says why, for the job's report."""


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
        One is missing or cannot be; the text names it.
    """

    def number(keyword: str, default: int | None = None) -> int:
        try:
            value = dataset.get(keyword)
            value = default if value is None else value
            if value is None:
                raise PixelFailure(f"DICOM attribute {keyword} does not exist")
            return int(value)
        except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
            raise PixelFailure(f"DICOM attribute {keyword} is not a number") from error

    allocated = number("BitsAllocated")
    found = PixelFormat(
        rows=number("Rows"),
        columns=number("Columns"),
        samples=number("SamplesPerPixel", 1),
        bits_allocated=allocated,
        bits_stored=number("BitsStored", allocated),
        signed=number("PixelRepresentation", 0) == 1,
        photometric=str(dataset.get("PhotometricInterpretation") or ""),
    )
    if not found.photometric:
        raise PixelFailure("DICOM attribute PhotometricInterpretation does not exist")
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


def stored_frames(dataset: Dataset, pixels: PixelFormat, storage_format: str) -> Iterator[StoredFrame]:
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

    Raises
    ------
    PixelFailure
        A frame cannot be read or stored; the text says which and why.
    """
    uid = str(dataset.file_meta.TransferSyntaxUID)
    count = _frame_count(dataset)
    if 0x7FE00008 in dataset or 0x7FE00009 in dataset:
        raise PixelFailure("Float Pixel Data and Double Float Pixel Data have no lossless stored form")
    video = SYNTAXES[uid].codec == "video"
    stored: Iterator[StoredFrame]
    if SYNTAXES[uid].kept:
        stored = (_keep(data, uid, pixels) for data in _encoded(dataset, count, video=video))
    elif pixels.bits_allocated == 1:
        stored = (_pack(image) for image in _native(dataset, uid, pixels, count))
    else:
        encode = jpeg2000.encode_htj2k if storage_format == "HTJ2K" else jpeg2000.encode_j2k
        images = (
            (codec.decode(data, uid, pixels) for data in _encoded(dataset, count))
            if SYNTAXES[uid].encapsulated
            else _native(dataset, uid, pixels, count)
        )
        stored = (_transcode(image, encode, STORED_SYNTAX[storage_format], pixels) for image in images)
    number = 0
    try:
        for number, frame in enumerate(stored, 1):  # noqa: B007 (for the messages below)
            yield frame
    except PixelFailure:
        raise
    except MemoryError as error:
        raise PixelFailure(f"frame {number + 1} of {count} does not fit into memory") from error
    except Exception as error:
        # Decoders and pydicom raise many kinds of errors over hostile pixel data, and each is the file's fault.
        _LOG.debug("a frame could not be read", exc_info=True)
        raise PixelFailure(f"frame {number + 1} of {count} cannot be read: {_reason(error)}") from error
    expected = 1 if video else count
    if number != expected:
        raise PixelFailure(f"NumberOfFrames is {count}, but the pixel data holds {number} frames")


def _reason(error: Exception) -> str:
    """The codecs' own words; not pydicom's, which quote values."""
    if not isinstance(error, DecodeError):
        return "the pixel data is not what the image attributes describe"
    text = " ".join(str(error).split())
    return (text[:297] + "...") if len(text) > 300 else text


def _frame_count(dataset: Dataset) -> int:
    value: Any = dataset.get("NumberOfFrames")
    try:
        count = 1 if value in (None, "") else int(value)
    except (TypeError, ValueError) as error:
        raise PixelFailure("DICOM attribute NumberOfFrames is not a number") from error
    if count < 1:
        raise PixelFailure(f"NumberOfFrames is {count}")
    return count


def _encoded(dataset: Dataset, count: int, *, video: bool = False) -> Iterator[bytes]:
    if video:  # one stream for all frames
        buffer = BytesIO(dataset.PixelData)
        parse_basic_offsets(buffer)  # leaves the buffer behind the table, at the first fragment
        yield b"".join(generate_fragments(buffer))
        return
    offsets = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    extended = offsets if all(offsets) else None
    yield from generate_frames(dataset.PixelData, number_of_frames=count, extended_offsets=extended)


def _native(dataset: Dataset, uid: str, pixels: PixelFormat, count: int) -> Iterator[AnyArray]:
    bits = pixels.rows * pixels.columns * pixels.samples * pixels.bits_allocated * count
    if pixels.photometric == "YBR_FULL_422":  # two of three samples
        bits = bits // 3 * 2
    if not SYNTAXES[uid].encapsulated and len(dataset.PixelData) < (needed := -(-bits // 8)):
        raise PixelFailure(
            f"the pixel data ends after {len(dataset.PixelData)} bytes, but its {count} "
            f"{'frame takes' if count == 1 else 'frames take'} {needed}"
        )
    if _is_plain(dataset, uid, pixels, count):
        data = memoryview(dataset.PixelData)
        for start in range(0, pixels.nbytes * count, pixels.nbytes):
            yield codec.decode(data[start : start + pixels.nbytes], EXPLICIT_LE, pixels)
        return
    for image, _ in get_decoder(UID(uid)).iter_array(dataset, raw=True):
        yield image.reshape(pixels.shape)


def _is_plain(dataset: Dataset, uid: str, pixels: PixelFormat, count: int) -> bool:
    """Whether the bytes are samples as the data store serves them; pydicom knows the other ways, and what is amiss."""
    return (
        uid in (IMPLICIT_LE, EXPLICIT_LE)
        and pixels.samples == 1
        and pixels.bits_allocated > 1
        and pixels.photometric in ("MONOCHROME1", "MONOCHROME2")
        and max(pixels.rows, pixels.columns) < 2**16
        and all(isinstance(dataset.get(keyword), int) for keyword in _NUMBERS)
        and dataset.PixelRepresentation in (0, 1)
        and len(dataset.PixelData) // pixels.nbytes == count
    )


def _keep(data: bytes, uid: str, pixels: PixelFormat) -> StoredFrame:
    if SYNTAXES[uid].codec != "video":
        codec.decode(data, uid, pixels)  # what nobody can read is told now, not in a training run
    return StoredFrame(data, codec.crc32(data), None, None)


def _pack(image: AnyArray) -> StoredFrame:
    data = codec.pack_bits(image)
    return StoredFrame(data, codec.crc32(data), None, None)


def _transcode(image: AnyArray, encode: Any, syntax: str, pixels: PixelFormat) -> StoredFrame:
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
