"""Files that are DICOM by the book, read without pydicom's parser: it takes a tenth of an import, and holds the GIL.

The result is what pydicom reads, with every top-level element still raw. Whatever is odd about a file
is for pydicom to make sense of: nothing here reads a file that it would read differently.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from struct import Struct, error
from typing import Any

from pydicom.charset import convert_encodings, default_encoding
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement, empty_value_for_VR
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import BaseTag
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, STANDARD_VR
from pydicom.values import convert_string

from ahi_ml.codec.syntaxes import IMPLICIT_LE, SYNTAXES

__all__ = ["read_plain"]

_META = 132  # bytes before it: the preamble and "DICM"
_OTHER_BYTES = frozenset({"1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"})  # deflated; big endian
_ITEM, _ITEM_END, _SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0"
_UNDEFINED = 0xFFFFFFFF
_LAST_OF_META, _PIXEL_DATA = 0x0002FFFF, 0x7FE00010
_CHARACTER_SET, _SYNTAX = BaseTag(0x00080005), BaseTag(0x00020010)
_MOST_DEPTH = 32
_MOST_KNOWN = 16_384
_U16, _U32 = Struct("<H").unpack_from, Struct("<I").unpack_from

Head = tuple[int, BaseTag, str | None, bool, Any]
"""Tag as a number (which compares faster) and as pydicom has it, VR, whether the length has four bytes behind two
that are reserved, and what an empty value is."""
_EXPLICIT: dict[bytes, Head] = {}
_IMPLICIT: dict[bytes, Head] = {}


class _OddError(Exception):
    """Not by the book."""


def read_plain(data: bytes) -> Dataset | None:
    """The data set of a file, every element raw; None when that is for pydicom to find out.

    I/O: none.

    Parameters
    ----------
    data : bytes
        The whole file.

    Returns
    -------
    pydicom.Dataset or None
        With ``file_meta``. Sequences are raw as well, also those of undefined length.
    """
    try:
        end = _META + 12 + _U32(data, _META + 8)[0]
        if data[128:_META] != b"DICM" or data[_META : _META + 8] != b"\2\0\0\0UL\4\0" or end > len(data):
            return None
        meta = _elements(data, _META, end, 2, implicit=False)
        syntax = meta[_SYNTAX].value.rstrip(b"\0").decode("ascii")
        if syntax not in SYNTAXES or syntax in _OTHER_BYTES or meta[_SYNTAX].VR != "UI":
            return None
        implicit = syntax == IMPLICIT_LE
        if data[end + 4 : end + 6].isalpha() == implicit:  # another encoding than the file says
            return None
        elements = _elements(data, end, len(data), 8, implicit=implicit)
        names = elements.get(_CHARACTER_SET)
        encodings = _encodings(names.value or b"") if names else default_encoding
    except (_OddError, LookupError, AttributeError, ValueError, error):
        return None
    if not elements:
        return None
    dataset = Dataset(elements)
    dataset.file_meta = FileMetaDataset(meta)
    dataset.set_original_encoding(implicit, True, encodings)
    return dataset


@lru_cache(maxsize=256)
def _encodings(names: bytes) -> list[str]:
    return convert_encodings(convert_string(names, True))


def _elements(data: bytes, at: int, end: int, lowest: int, *, implicit: bool) -> dict[BaseTag, Any]:
    """The elements between two places, of this group or, from group 8 on, of higher ones."""
    found: dict[BaseTag, Any] = {}
    last = (lowest << 16) - 1
    heads, width = (_IMPLICIT, 4) if implicit else (_EXPLICIT, 6)
    while at < end:
        number, tag, vr, long, empty = heads.get(data[at : at + width]) or _learn(data[at : at + width])
        if implicit:
            length, start = _U32(data, at + 4)[0], at + 8
        elif long:
            length, start = _U32(data, at + 8)[0], at + 12
        else:
            length, start = _U16(data, at + 6)[0], at + 8
        if number <= last or (lowest == 2 and number > _LAST_OF_META):
            raise _OddError
        last = number
        if length == _UNDEFINED:
            at = _behind_undefined(data, start, number, vr, implicit, 0)
            value = data[start : at - 8]
        else:
            at = start + length
            value = data[start:at] if length else empty
        if at > end:
            raise _OddError
        found[tag] = RawDataElement(tag, vr, length, value, start, implicit, True)
    return found


def _learn(head: bytes) -> Head:
    """What the first bytes of an element say, remembered: a series has a few hundred different ones."""
    group, element = _U16(head)[0], _U16(head, 2)[0]
    number = group << 16 | element
    if group == 0xFFFE or (group < 8 and group != 2):
        raise _OddError
    vr = head[4:].decode("latin-1") or None
    if vr is not None and vr not in STANDARD_VR:
        raise _OddError
    heads = _EXPLICIT if vr else _IMPLICIT
    if len(heads) > _MOST_KNOWN:
        heads.clear()
    known: Head = (number, BaseTag(number), vr, vr in EXPLICIT_VR_LENGTH_32, empty_value_for_VR(vr, raw=True))
    heads[head] = known
    return known


def _behind_undefined(data: bytes, at: int, number: int, vr: str | None, implicit: bool, depth: int) -> int:
    """Where the element behind one of undefined length begins."""
    if depth > _MOST_DEPTH:
        raise _OddError
    if vr == "SQ" or (implicit and dictionary_VR(number) == "SQ"):
        return _behind_items(data, at, lambda begin, end: _behind_elements(data, begin, end, implicit, depth))
    if number == _PIXEL_DATA and vr in ("OB", "OW") and not depth:
        return _behind_items(data, at, _behind_fragment)
    raise _OddError


def _behind_items(data: bytes, at: int, behind: Callable[[int, int | None], int]) -> int:
    """Where a run of items ends, its delimiter included; `behind` is told where one begins and should end."""
    while (tag := data[at : at + 4]) == _ITEM:
        length = _U32(data, at + 4)[0]
        at = behind(at + 8, None if length == _UNDEFINED else at + 8 + length)
    if tag != _SEQUENCE_END or _U32(data, at + 4)[0]:
        raise _OddError
    return at + 8


def _behind_fragment(begin: int, end: int | None) -> int:
    if end is None:
        raise _OddError
    return end


def _behind_elements(data: bytes, at: int, end: int | None, implicit: bool, depth: int) -> int:
    """Where an item's elements end: exactly where it says, or with a delimiter."""
    heads, width = (_IMPLICIT, 4) if implicit else (_EXPLICIT, 6)
    while end is None or at < end:
        head = heads.get(data[at : at + width])
        if head is None:
            if end is None and data[at : at + 8] == _ITEM_END + b"\0\0\0\0":
                return at + 8
            head = _learn(data[at : at + width])
        number, _, vr, long, _ = head
        if implicit:
            length, start = _U32(data, at + 4)[0], at + 8
        elif long:
            length, start = _U32(data, at + 8)[0], at + 12
        else:
            length, start = _U16(data, at + 6)[0], at + 8
        at = start + length
        if length == _UNDEFINED:
            at = _behind_undefined(data, start, number, vr, implicit, depth + 1)
    if at != end:
        raise _OddError
    return at
