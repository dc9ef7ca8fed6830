"""The headers of cache entries: what makes a file whole, and what it holds. No I/O.

An encoded entry is a header and the bytes the data store gave; a derived one is a header and the bytes of
a C-contiguous array. No pickle anywhere: reading a cache runs nobody's code.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple
from zlib import crc32 as _small  # the same, and keeps the GIL for so few bytes: giving it away costs more

from ahi_ml.codec import crc32
from ahi_ml.types import AnyArray, Buffer

__all__ = [
    "DERIVED_START",
    "ENCODED_START",
    "CacheEntry",
    "EncodedHeader",
    "checked_derived",
    "derived_beginning",
    "derived_header",
    "is_whole",
    "parse_encoded",
]

_CRC = struct.Struct("<I")  # of the header: a flipped flag must not make a frame a verified one

_MAGIC = b"AHIF"
_FORMAT = 2
_HEADER = struct.Struct("<4sHHIQ")  # magic, format, flags, CRC of the payload, its length
_MOST_PREFIXES = 6  # of a frame with more levels, the shortest of these is enough for the rest
_PREFIXES = struct.Struct(f"<{2 * _MOST_PREFIXES}I")  # of each, length of the part it needs, and its CRC
_UNTIL_CRC = _HEADER.size + _PREFIXES.size
ENCODED_START = _UNTIL_CRC + _CRC.size
_VERIFIED, _PART, _SEALED = 1, 2, 4

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


class CacheEntry(NamedTuple):
    """A cached frame.

    Parameters
    ----------
    data : bytes-like
        Its encoded bytes, or those of them that the resolution asked for needs.
    verified : bool
        Whether its pixels were checked against the data store's checksum when it was written.
    whole : bool
        Whether that is all of the frame.
    notes : dict, optional
        For what a reader works out of it: kept with the entry, when that is kept in memory.
    """

    data: Buffer
    verified: bool
    whole: bool = True
    notes: dict[str, Any] | None = None


class EncodedHeader(NamedTuple):
    """What stands before an encoded frame.

    Parameters
    ----------
    verified : bool
        Whether the frame's pixels were checked against the data store's checksum.
    whole : bool
        Whether the payload is the whole frame, and not just its first part.
    length, checksum : int
        Of the payload: bytes, CRC-32.
    prefixes : tuple of int
        Length and CRC-32, in turns, of the payload's part that is enough for ``reduce`` 1, 2, ...; for higher ones
        the last. Zeros where the payload ends before that.
    """

    verified: bool
    whole: bool
    length: int
    checksum: int
    prefixes: tuple[int, ...] = ()
    sealed: bool = False

    @classmethod
    def of(
        cls,
        data: Buffer,
        *,
        verified: bool,
        whole: bool = True,
        prefixes: Sequence[int] = (),
        sealed: bool = False,
    ) -> EncodedHeader:
        """Return the header for bytes, of which those prefixes are enough for ``reduce`` 1, 2, ..."""
        view = memoryview(data)
        kept = [length if length <= len(view) else 0 for length in prefixes[:_MOST_PREFIXES]]
        checksums = {0: 0}
        done = 0
        for length in sorted({*kept, len(view)} - {0}):  # one pass: each goes on where the one before ended
            checksums[length] = crc32(view[done:length], checksums[done])
            done = length
        numbers = tuple(number for length in kept for number in (length, checksums[length]))
        return cls(verified, whole, len(view), checksums[done], numbers, sealed)

    def pack(self) -> bytes:
        """Return its bytes."""
        flags = self.verified * _VERIFIED | (not self.whole) * _PART | self.sealed * _SEALED
        numbers = (*self.prefixes, *[0] * (2 * _MOST_PREFIXES - len(self.prefixes)))
        header = _HEADER.pack(_MAGIC, _FORMAT, flags, self.checksum, self.length) + _PREFIXES.pack(*numbers)
        return header + _CRC.pack(crc32(header))

    @classmethod
    def parse(cls, raw: bytes) -> EncodedHeader | None:
        """Return what the first bytes of an entry say; None when one of them is not what was written."""
        if len(raw) < ENCODED_START:
            return None
        magic, version, flags, checksum, length = _HEADER.unpack_from(raw)
        if magic != _MAGIC or version != _FORMAT or _CRC.unpack_from(raw, _UNTIL_CRC)[0] != _small(raw[:_UNTIL_CRC]):
            return None
        prefixes = _PREFIXES.unpack_from(raw, _HEADER.size)
        return cls(bool(flags & _VERIFIED), not flags & _PART, length, checksum, prefixes, bool(flags & _SEALED))

    def part(self, reduce: int) -> tuple[int, int] | None:
        """Length and CRC of what a resolution needs of the payload; None when it is not there."""
        prefixes = self.prefixes
        for level in range(min(reduce, len(prefixes) // 2), 0, -1):
            if prefixes[2 * level - 2]:
                return prefixes[2 * level - 2], prefixes[2 * level - 1]
        return (self.length, self.checksum) if self.whole else None


def parse_encoded(raw: Buffer) -> tuple[EncodedHeader, memoryview] | None:
    """Return header and payload of an encoded entry; None when a byte of it is not what was written."""
    payload = memoryview(raw)[ENCODED_START:]
    header = EncodedHeader.parse(bytes(memoryview(raw)[:ENCODED_START]))
    if header is None or header.length != len(payload) or header.checksum != crc32(payload):
        return None
    return header, payload


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
