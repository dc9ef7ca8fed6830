"""The headers of cache entries: what makes a file whole, and what it holds. No I/O.

An encoded entry is a header and the bytes the data store gave; a derived one is a header and the bytes of
a C-contiguous array. No pickle anywhere: reading a cache runs nobody's code.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ahi_ml.codec import crc32
from ahi_ml.types import AnyArray, Buffer

__all__ = [
    "DERIVED_START",
    "ENCODED_START",
    "CacheEntry",
    "checked_derived",
    "derived_beginning",
    "derived_header",
    "encoded_header",
    "is_whole",
    "parse_encoded",
]

_CRC = struct.Struct("<I")  # of the header: a flipped flag must not make a frame a verified one

_MAGIC = b"AHIF"
_FORMAT = 1
_HEADER = struct.Struct("<4sHHIQ8x")  # magic, format, flags, CRC of the payload, its length
ENCODED_START = _HEADER.size + _CRC.size
_VERIFIED = 1

# What a reader knows beforehand comes first, so that one comparison of bytes tells a fit. The verdict is a word:
# no flipped bit makes one of the other.
_DERIVED_MAGIC = b"AHID"
_DERIVED_FORMAT = 1
_MOST_AXES = 6
_BEGINNING = struct.Struct(f"<4sHH8sQ{_MOST_AXES}I4s")  # magic, format, axes, dtype, length, shape, verdict
_VERDICTS = {True: b"SURE", False: b"OPEN"}
_DERIVED_CRC = struct.Struct("<I4x")  # of the payload
DERIVED_START = _BEGINNING.size + _DERIVED_CRC.size + _CRC.size
_KINDS = "biufc"


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A cached frame.

    Parameters
    ----------
    data : memoryview
        Its encoded bytes.
    verified : bool
        Whether its pixels were checked against the data store's checksum when it was written.
    """

    data: memoryview
    verified: bool


def encoded_header(data: Buffer, *, verified: bool) -> bytes:
    """Return the header that belongs before an encoded frame."""
    header = _HEADER.pack(_MAGIC, _FORMAT, _VERIFIED if verified else 0, crc32(data), len(data))
    return header + _CRC.pack(crc32(header))


def parse_encoded(raw: Buffer) -> CacheEntry | None:
    """Return what a whole encoded entry holds; None when a byte of it is not what was written."""
    if len(raw) < ENCODED_START:
        return None
    magic, version, flags, checksum, length = _HEADER.unpack_from(raw)
    payload = memoryview(raw)[ENCODED_START:]
    whole = (
        magic == _MAGIC
        and version == _FORMAT
        and _CRC.unpack_from(raw, _HEADER.size) == (crc32(memoryview(raw)[: _HEADER.size]),)
        and length == len(payload)
        and checksum == crc32(payload)
    )
    return CacheEntry(payload, bool(flags & _VERIFIED)) if whole else None


def derived_beginning(array: AnyArray, *, verified: bool) -> bytes | None:
    """Return how the header of an array of this dtype and shape begins; None for arrays that are not kept."""
    dtype = array.dtype
    if dtype.kind not in _KINDS or array.ndim > _MOST_AXES or max(array.shape, default=0) >= 1 << 32:
        return None
    shape = array.shape + (0,) * (_MOST_AXES - array.ndim)
    return _BEGINNING.pack(
        _DERIVED_MAGIC, _DERIVED_FORMAT, array.ndim, dtype.str.encode(), array.nbytes, *shape, _VERDICTS[verified]
    )


def derived_header(array: AnyArray, *, verified: bool) -> bytes | None:
    """Return the header that belongs before a C-contiguous array; None for arrays that are not kept."""
    beginning = derived_beginning(array, verified=verified)
    if beginning is None:
        return None
    header = beginning + _DERIVED_CRC.pack(crc32(array))
    return header + _CRC.pack(crc32(header))


def checked_derived(header: Buffer) -> int | None:
    """Return the CRC of the payload that a derived header names; None when the header itself is damaged."""
    if len(header) != DERIVED_START:
        return None
    head = memoryview(header)[: -_CRC.size]
    if _CRC.unpack_from(header, len(head)) != (crc32(head),):
        return None
    return int(_DERIVED_CRC.unpack_from(header, _BEGINNING.size)[0])


def is_whole(raw: Buffer) -> bool:
    """Whether a file is an entry, of either kind, as it was written."""
    if bytes(raw[:4]) != _DERIVED_MAGIC:
        return parse_encoded(raw) is not None
    checksum = checked_derived(memoryview(raw)[:DERIVED_START])
    if checksum is None:
        return False
    payload = memoryview(raw)[DERIVED_START:]
    length = _BEGINNING.unpack_from(raw)[4]
    return length == len(payload) and checksum == crc32(payload)
