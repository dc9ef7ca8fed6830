"""Small files that would become huge in memory: refused before they do."""

from __future__ import annotations

import zlib
from typing import IO

from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset, read_preamble
from pydicom.tag import BaseTag

from ahi_ml.codec import PixelFormat
from ahi_ml.local.ingest.remarks import FileFailure, PixelFailure

__all__ = ["refuse_huge_frames", "refuse_huge_inflation"]

_DEFLATED = "1.2.840.10008.1.2.1.99"
_LARGE = 2**28  # bytes of a frame or of a data set; up to here an image may be as blank as it likes
_LARGE_INSTANCE = 2**34  # decoded bytes of all frames, which are never in memory together
_MOST_CODED, _MOST_DEFLATED = 1_000, 100  # times as much as was sent
_CHUNK = 2**20


def refuse_huge_frames(pixels: PixelFormat, count: int, size: int) -> None:
    """Refuse encoded frames of a size that only blank images have. I/O: none.

    Parameters
    ----------
    pixels : PixelFormat
        Of one frame.
    count : int
        Number of Frames.
    size : int
        Bytes of the encoded pixel data.

    Raises
    ------
    PixelFailure
        They decode to too much.
    """
    large = pixels.nbytes > _LARGE or pixels.nbytes * count > _LARGE_INSTANCE
    if large and pixels.nbytes * count > _MOST_CODED * size:
        raise PixelFailure(
            f"{count} {'frame' if count == 1 else 'frames'} of {pixels.nbytes} bytes in {size} encoded bytes: "
            f"more than {_MOST_CODED} times as much is taken for an attack"
        )


def refuse_huge_inflation(stream: IO[bytes], size: int) -> None:
    """Refuse a deflated data set that would inflate to far more than was sent.

    I/O: reads the file's header; a deflated file is read and inflated as well, piece by piece. Leaves the
    stream at its start.

    Raises
    ------
    FileFailure
        It inflates to too much.
    """
    try:
        read_preamble(stream, False)  # type: ignore[arg-type]
        meta = read_dataset(stream, False, True, stop_when=_behind_the_header)  # type: ignore[arg-type]
        if str(meta.get("TransferSyntaxUID", "")) == _DEFLATED:
            _inflate(stream, max(_LARGE, _MOST_DEFLATED * size))
    except (InvalidDicomError, zlib.error):
        pass  # whoever reads the file in earnest says so
    stream.seek(0)


def _behind_the_header(tag: BaseTag, vr: str | None, length: int) -> bool:
    return int(tag) >> 16 != 2


def _inflate(stream: IO[bytes], most: int) -> None:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = 0
    while data := inflater.unconsumed_tail or stream.read(_CHUNK):
        inflated += len(inflater.decompress(data, _CHUNK))
        if inflated > most:
            raise FileFailure(f"the deflated data set has more than {most} bytes, which is taken for an attack")
