"""Lookup tables of DICOM, floor 1: modality, VOI and palette, whole or in segments."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ahi_ml.errors import MetadataError
from ahi_ml.pixels.arrays import blocks, check_pair
from ahi_ml.pixels.stored import us_or_ss
from ahi_ml.types import AnyArray, Buffer

__all__ = ["LookupTable", "look_up"]

_MAX_ENTRIES = 65_536


@dataclass(frozen=True, repr=False)
class LookupTable:
    """A Modality LUT (PS3.3 C.11.1.1), VOI LUT (C.11.2.1.1) or palette channel (C.7.6.3.1.5).

    Inputs below `first` take the first entry, inputs beyond the table the last. Floating inputs go to the
    nearest entry, halves to even. Not a frame step: what the entries mean is for the caller to say.

    Parameters
    ----------
    first : int
        Input value that the first entry belongs to.
    values : bytes
        1 to 65,536 entries, unsigned 16-bit little-endian whatever `bits` is.
    bits : int
        Bits of an entry, 1 to 16: the range of the output is 0 to ``2**bits - 1``.

    Raises
    ------
    MetadataError
        The numbers do not describe a table.
    """

    first: int
    values: bytes
    bits: int = 16

    def __post_init__(self) -> None:
        for name, kind in (("first", int), ("values", bytes), ("bits", int)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        sound = 1 <= self.bits <= 16 and len(self.values) % 2 == 0 and 1 <= len(self) <= _MAX_ENTRIES
        if not sound or int(self.table.max()) >> self.bits:
            raise MetadataError(f"Unusable lookup table: {len(self.values)} bytes, {self.bits} bits an entry")

    def __len__(self) -> int:
        return len(self.values) // 2

    def __repr__(self) -> str:
        digest = hashlib.sha256(self.values).hexdigest()[:32]
        return f"LookupTable(first={self.first}, entries={len(self)}, bits={self.bits}, sha256={digest})"

    @classmethod
    def from_tags(cls, descriptor: Sequence[int], data: Buffer | Sequence[int], signed: bool) -> LookupTable:
        """Build from LUT Descriptor and LUT Data.

        I/O: none.

        Parameters
        ----------
        descriptor : three int
            Number of entries (0 means 65,536), first mapped value, bits of an entry.
        data : bytes or sequence of int
            Entries of 8 or 16 bits, little-endian; as integers, one entry each, or two 8-bit ones packed.
        signed : bool
            Whether the first mapped value is signed: by Pixel Representation; for a VOI LUT, whether
            modality values can be negative.

        Returns
        -------
        LookupTable
            `bits` as the descriptor says, but 8 for 8-bit data, and 16 when an entry needs more.

        Raises
        ------
        MetadataError
            The descriptor is malformed, or the data's length contradicts it.
        """
        entries, first, bits = _descriptor(descriptor, signed)
        raw = _data_bytes(data)
        if len(raw) in (2 * entries, 2 * entries + 2):
            table = np.frombuffer(raw[: 2 * entries], "<u2")
        elif len(raw) in (entries, entries + 1):
            table, bits = np.frombuffer(raw[:entries], np.uint8).astype("<u2"), min(bits, 8)
        else:
            raise MetadataError(f"LUT Data has {len(raw)} bytes; its descriptor promises {entries} entries")
        return cls(first, table.tobytes(), 16 if int(table.max()) >> bits else bits)

    @classmethod
    def from_segments(cls, descriptor: Sequence[int], data: Buffer | Sequence[int], signed: bool) -> LookupTable:
        """Build from Segmented Palette Color Lookup Table Data, PS3.3 C.7.9.2; else like `from_tags`."""
        entries, first, bits = _descriptor(descriptor, signed)
        unit = 1 if bits <= 8 else 2
        raw = _data_bytes(data)
        elements = np.frombuffer(raw[: len(raw) // unit * unit], f"<u{unit}").tolist()
        table: list[int] = []
        try:
            _expand_segments(elements, unit, table, entries)
        except IndexError as error:
            raise MetadataError(f"Segmented table ends after {len(table)} of {entries} entries") from error
        return cls(first, np.array(table, "<u2").tobytes(), bits)

    @property
    def table(self) -> NDArray[np.uint16]:
        """The entries, ``(entries,)`` uint16, read-only."""
        return np.frombuffer(self.values, "<u2")

    def apply(self, values: AnyArray) -> AnyArray:
        """Return the entries for `values`: a new array of its shape, uint8 if `bits` allows, else uint16."""
        out = np.empty(values.shape, np.uint8 if self.bits <= 8 else np.uint16)
        look_up(self.table.astype(out.dtype), self.first, values, out)
        return out

    def into(self, values: AnyArray, out: AnyArray) -> None:
        """Write the entries for `values` into `out`, floating, same shape; may be `values` itself.

        Raises ConfigError when the shapes differ or `out` is not floating.
        """
        check_pair(values, out)
        look_up(self.table.astype(out.dtype), self.first, values, out)


def look_up(table: AnyArray, first: int, values: AnyArray, out: AnyArray) -> None:
    """Write ``table[values - first]`` with clamped indices; NaN stays NaN if `out` can say so."""
    floating = values.dtype.kind == "f"
    for rows in blocks(values):
        block = values[rows]
        absent = np.isnan(block) if floating and out.dtype.kind == "f" else None
        if floating:
            nearest = np.rint(np.subtract(block, first, dtype=np.float64))
            index = np.fmin(np.fmax(nearest, 0), len(table) - 1).astype(np.intp)
        else:
            index = np.subtract(block, first, dtype=np.intp)
        np.take(table, index, axis=0, out=out[rows], mode="clip")
        if absent is not None:
            np.copyto(out[rows], np.nan, where=absent)


def _descriptor(descriptor: Sequence[int], signed: bool) -> tuple[int, int, int]:
    if len(descriptor) != 3 or not 1 <= descriptor[2] <= 16:
        raise MetadataError(f"LUT Descriptor {list(descriptor)}: needs entries, first value and bits, 1 to 16")
    entries, first, bits = map(int, descriptor)
    return (entries & 0xFFFF) or _MAX_ENTRIES, us_or_ss(first, signed), bits


def _data_bytes(data: Buffer | Sequence[int]) -> bytes:
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data)
    return (np.asarray(data, np.int64) & 0xFFFF).astype("<u2").tobytes()


def _expand_segments(
    data: list[int], unit: int, table: list[int], entries: int, at: int = 0, count: int = 0, depth: int = 0
) -> None:
    """Append what the segments of `data` mean to `table`, until it is full or `count` of them are done.

    Raises IndexError when `data` ends too early. Empty segments are refused: every step makes progress.
    """
    done = 0
    while (done < count) if depth else (len(table) < entries):
        code, length = data[at], data[at + 1]
        at += 2
        if length == 0 or depth > 8 or code not in (0, 1, 2) or (code and not table):
            raise MetadataError(f"Segmented table: bad segment ({code}, {length}) at element {at - 2}")
        if code == 0:  # discrete: as it stands
            table += data[at : at + length]
            at += length
            if at > len(data):
                raise IndexError
        elif code == 1:  # linear, from the entry before it
            steps = np.linspace(table[-1], data[at], length + 1)[1:]
            table += np.rint(steps).astype(np.int64).tolist()
            at += 1
        else:  # indirect: repeat segments from a 32-bit byte offset, low half first
            offset = sum(data[at + part] << 8 * unit * part for part in range(4 // unit)) // unit
            at += 4 // unit
            _expand_segments(data, unit, table, entries, offset, length, depth + 1)
        if len(table) > entries:
            raise MetadataError(f"Segmented lookup table gives more than its {entries} entries")
        done += 1
