"""Encapsulated pixel data as the encoded frames that it holds (PS3.5 annex A.4).

Offset tables are often wrong and the streams themselves seldom are, so a table only decides where the
streams do not tell.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise

from pydicom.dataset import Dataset

from ahi_ml.codec import PixelFormat
from ahi_ml.codec.syntaxes import SYNTAXES
from ahi_ml.local.ingest.bombs import refuse_huge_frames
from ahi_ml.local.ingest.remarks import FRAME_NUMBER_MISMATCH, INVALID_OFFSET_TABLE, PixelFailure, Remark

__all__ = ["encoded_frames", "video_stream"]

_ITEM = b"\xfe\xff\x00\xe0"
_JPEG_2000 = (b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  ")
_BEGINNINGS = {
    "jpeg": (b"\xff\xd8\xff",),
    "jpegls": (b"\xff\xd8\xff",),
    "j2k": _JPEG_2000,
    "htj2k": _JPEG_2000,
    "jpegxl": (b"\xff\x0a", b"\x00\x00\x00\x0cJXL "),
}


def encoded_frames(dataset: Dataset, pixels: PixelFormat, count: int, remark: Remark) -> Iterator[bytes]:
    """Yield the encoded frames, in order.

    I/O: none. One frame is copied at a time.

    Parameters
    ----------
    dataset : pydicom.Dataset
        With file meta.
    pixels : PixelFormat
        Of `dataset`.
    count : int
        Number of Frames.
    remark : callable
        Told of an offset table that is wrong, and of more frames than `count`, which are yielded.

    Raises
    ------
    PixelFailure
        There are fewer frames than `count`, nothing tells where they begin, or they would be huge.
    """
    table, fragments = _fragments(dataset)
    beginnings = _beginnings(str(dataset.file_meta.TransferSyntaxUID), pixels)
    if table.startswith(beginnings):  # no offset table at all, not even an empty one
        fragments = [(-1, memoryview(table)), *fragments]
        table = b""
        remark(INVALID_OFFSET_TABLE, "there is no Basic Offset Table, not even an empty one")
    if not fragments:
        raise PixelFailure("the pixel data holds no fragments")
    listed = _listed(dataset, table, [offset for offset, _ in fragments])
    starts = [number for number, (_, fragment) in enumerate(fragments) if bytes(fragment[:16]).startswith(beginnings)]
    filled = [number for number, (_, fragment) in enumerate(fragments) if len(fragment)]
    seen = bool(starts) and starts[0] == filled[0]
    if seen and len(starts) == count:
        first = starts
    elif listed and len(listed) == count:
        first = listed
    elif len(filled) == count:
        first = filled
    elif seen and len(starts) > count:
        remark(
            FRAME_NUMBER_MISMATCH, f"NumberOfFrames is {count}, the pixel data holds {len(starts)}: all were imported"
        )
        first = starts
    elif count == 1:
        first = filled[:1]
    else:
        raise PixelFailure(
            f"NumberOfFrames is {count}, but the pixel data holds {len(starts) if seen else len(filled)} frames"
        )
    if listed is not None and listed != first and [n for n in listed if n in filled] != first:
        remark(INVALID_OFFSET_TABLE, "its offsets are not where frames begin; the frames' own beginnings were used")
    refuse_huge_frames(pixels, len(first), len(dataset.PixelData))
    for begin, end in pairwise([*first, len(fragments)]):
        yield b"".join(fragment for _, fragment in fragments[begin:end])


def video_stream(dataset: Dataset) -> bytes:
    """The one stream that all frames of a video are in. I/O: none.

    Raises
    ------
    PixelFailure
        There is none.
    """
    _, fragments = _fragments(dataset)
    if not (stream := b"".join(fragment for _, fragment in fragments)):
        raise PixelFailure("the pixel data holds no video stream")
    return stream


def _fragments(dataset: Dataset) -> tuple[bytes, list[tuple[int, memoryview]]]:
    """The Basic Offset Table, and each fragment with its offset as tables count it."""
    data = memoryview(dataset.PixelData or b"")
    if data[:4] != _ITEM:
        raise PixelFailure("the pixel data is not in fragments, as its transfer syntax asks for")
    items: list[tuple[int, memoryview]] = []
    at = 0
    while data[at : at + 4] == _ITEM and at + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, at + 4)
        items.append((at, data[at + 8 : at + 8 + length]))
        at += 8 + length
    if not items:
        raise PixelFailure("the pixel data ends inside its first item")
    (_, table), *fragments = items
    origin = 8 + len(table)
    return bytes(table), [(offset - origin, fragment) for offset, fragment in fragments]


def _beginnings(syntax: str, pixels: PixelFormat) -> tuple[bytes, ...]:
    codec = SYNTAXES[syntax].codec
    if codec == "rle":  # its header: how many segments, and that the first one is behind it (PS3.5 annex G)
        return (struct.pack("<II", pixels.samples * pixels.dtype.itemsize, 64),)
    return _BEGINNINGS[codec]


def _listed(dataset: Dataset, table: bytes, offsets: Sequence[int]) -> list[int] | None:
    """Numbers of the fragments that an offset table names; empty when it cannot be right, None without one."""
    extended = dataset.get("ExtendedOffsetTable")
    table, size = (extended, 8) if extended else (table, 4)
    if not table:
        return None
    if len(table) % size:
        return []
    named = struct.unpack(f"<{len(table) // size}{'Q' if size == 8 else 'I'}", table)
    number_of = {offset: number for number, offset in enumerate(offsets)}
    found = [number_of.get(offset, -1) for offset in named]
    rising = all(one < two for one, two in pairwise(found))
    return found if found[0] == 0 and rising else []
