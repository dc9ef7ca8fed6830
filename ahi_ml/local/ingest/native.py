"""Native pixel data as the frames that it holds, each in the one form that the data store serves raw frames in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydicom.dataset import Dataset

from ahi_ml import codec
from ahi_ml.codec import PixelFormat
from ahi_ml.codec.syntaxes import EXPLICIT_LE
from ahi_ml.local.ingest.remarks import (
    ELEMENTS_DISCARDED,
    FRAME_NUMBER_MISMATCH,
    PixelFailure,
    Remark,
)
from ahi_ml.types import AnyArray, Buffer

__all__ = ["native_frames"]

_BIG_ENDIAN = "1.2.840.10008.1.2.2"


def native_frames(dataset: Dataset, pixels: PixelFormat, count: int, remark: Remark) -> Iterator[AnyArray]:
    """Yield the frames of native pixel data as stored values, in order.

    I/O: none. Frames are cut out of the pixel data one by one.

    Parameters
    ----------
    dataset : pydicom.Dataset
        With file meta.
    pixels : PixelFormat
        Of `dataset`.
    count : int
        Number of Frames.
    remark : callable
        Told of more frames than `count`, which are yielded, and of bytes behind them, which are not.

    Raises
    ------
    PixelFailure
        The pixel data is too short, or not laid out as its attributes say.
    """
    if dataset["PixelData"].is_undefined_length:
        raise PixelFailure("the pixel data is encapsulated, which its transfer syntax is not")
    data = memoryview(dataset.PixelData or b"")
    big_endian = str(dataset.file_meta.TransferSyntaxUID) == _BIG_ENDIAN
    if big_endian and pixels.bits_allocated <= 8 and dataset["PixelData"].VR == "OW":
        data = memoryview(np.frombuffer(data[: len(data) & ~1], np.uint16).byteswap().tobytes())
    planar = pixels.samples > 1 and _planar(dataset)
    full = pixels.rows * pixels.columns * pixels.samples * pixels.bits_allocated
    # Some writers name the subsampled colour space and do not subsample: the length tells.
    halved = pixels.photometric == "YBR_FULL_422" and len(data) & ~1 != -(-full * count // 8) & ~1
    if halved and (pixels.columns % 2 or pixels.samples != 3):
        raise PixelFailure("YBR_FULL_422 has three samples a pixel and an even number of columns")
    bits = full // 3 * 2 if halved else full
    held = _held(len(data), bits, count, remark)
    misplaced = dataset.get("HighBit") not in (None, pixels.bits_stored - 1)
    for number in range(held):
        frame = _cut(data, number * bits, bits)
        if big_endian and pixels.dtype.itemsize > 1:
            frame = np.frombuffer(frame, pixels.dtype.newbyteorder(">")).astype(pixels.dtype).data.cast("B")
        if halved:
            frame = _doubled(frame)
        elif planar:
            planes = np.frombuffer(frame, pixels.dtype).reshape(pixels.samples, -1)
            frame = np.ascontiguousarray(planes.T).data.cast("B")
        image = codec.decode(frame, EXPLICIT_LE, pixels)
        if misplaced and not np.array_equal(image, np.frombuffer(frame, pixels.dtype).reshape(pixels.shape)):
            raise PixelFailure(f"HighBit is {dataset.HighBit}, and the values do not lie in the low BitsStored bits")
        yield image


def _planar(dataset: Dataset) -> bool:
    value = dataset.get("PlanarConfiguration")
    if value is None:
        raise PixelFailure("DICOM attribute PlanarConfiguration does not exist")
    if value not in (0, 1):
        raise PixelFailure("PlanarConfiguration is neither 0 nor 1")
    return bool(value == 1)


def _held(size: int, bits: int, count: int, remark: Remark) -> int:
    """How many frames of so many bits there are in `size` bytes; the pad byte does not count."""
    needed = -(-bits * count // 8)
    if size < needed:
        raise PixelFailure(
            f"the pixel data ends after {size} bytes, but its {count} "
            f"{'frame takes' if count == 1 else 'frames take'} {needed}"
        )
    if size - needed <= 1:
        return count
    held = size * 8 // bits
    if held > count and size - -(-bits * held // 8) <= 1:
        remark(FRAME_NUMBER_MISMATCH, f"NumberOfFrames is {count}, the pixel data holds {held}: all were imported")
        return held
    remark(ELEMENTS_DISCARDED, f"{size - needed} bytes behind the last frame of the pixel data were left out")
    return count


def _cut(data: memoryview, begin: int, bits: int) -> Buffer:
    """So many bits from a bit on, the first one in the lowest bit of the first byte."""
    shift = begin % 8
    if not shift:
        return data[begin // 8 : -(-(begin + bits) // 8)]
    packed = np.frombuffer(data, np.uint8)[begin // 8 : -(-(begin + bits) // 8)]
    return np.packbits(
        np.unpackbits(packed, bitorder="little")[shift : shift + bits],
        bitorder="little",
    ).tobytes()


def _doubled(frame: Buffer) -> Buffer:
    """Two luminances and a pair of colour differences for every two pixels (PS3.3 C.7.6.3.1.2), as two whole pixels."""
    return np.frombuffer(frame, np.uint8).reshape(-1, 4)[:, [0, 2, 3, 1, 2, 3]].tobytes()
