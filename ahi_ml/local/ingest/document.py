"""A DICOM data set as the JSON levels of an image set's metadata document.

Values are taken from the file's own bytes wherever pydicom still holds them raw: it is several
times faster than converting every element, and it is what the service shows, decimal strings with
their digits and pad blanks included. The rules are those of the service's documents: possibly
multi-valued elements are lists, empty ones null, numbers of text VRs strings, binary base64.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import numpy as np
from pydicom import datadict
from pydicom.charset import convert_encodings, decode_bytes
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import BaseTag
from pydicom.values import convert_SQ

from ahi_ml.local.ingest.levels import LEVEL_OF

__all__ = ["Levels", "read_levels"]

Json = dict[str, Any]

_TEXT: Final = frozenset({"SH", "LO", "UC", "ST", "LT", "UT", "PN"})
_SINGLE_TEXT: Final = frozenset({"ST", "LT", "UT", "UR"})
_PADDED: Final = frozenset({"DS", "IS"})  # the service keeps their pad blanks
_NUMBERS: Final = {
    **{"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d", "SV": "q", "UV": "Q"},
    **{"US or SS": "H"},
}
_NAME_DELIMITERS: Final = set(b"^=\\")  # where code extensions end (PS3.5 6.1.2.5.3)
_TEXT_DELIMITERS: Final = set(b"\n\r\t\f\\")
_LATIN_9: Final = "ISO_IR 203"
_WORD_BYTES: Final = {"OW": 2, "OF": 4, "OL": 4, "OD": 8, "OV": 8}
_SKIPPED: Final = frozenset(
    {
        0x7FE00001,  # extended offset table and its lengths: encoding, not content
        0x7FE00002,
        0x7FE00008,  # pixel data in its three forms
        0x7FE00009,
        0x7FE00010,
        0xFFFCFFFC,  # trailing padding
    }
)
_MOST_DEPTH: Final = 32
_SHORT: Final = 256
_SHORT_SEQUENCE: Final = 4096


@dataclass(slots=True)
class Levels:
    """What one instance says at each level, keyed by keyword (public) or hex tag (others).

    Parameters
    ----------
    patient, study, series, instance : dict
        Elements of each level.
    vrs : dict
        VR of the elements whose keys are tags.
    discarded : list of str
        Keys of elements whose values could not be read.
    """

    patient: Json = field(default_factory=dict)
    study: Json = field(default_factory=dict)
    series: Json = field(default_factory=dict)
    instance: Json = field(default_factory=dict)
    vrs: dict[str, str] = field(default_factory=dict)
    discarded: list[str] = field(default_factory=list)

    def get(self, keyword: str) -> Any:
        """The value of a public element, stripped, whatever its level; None when absent or empty."""
        level = LEVEL_OF.get(keyword, "Instance").lower()
        value = getattr(self, level).get(keyword)
        return value.strip() or None if isinstance(value, str) else value


class _TooDeepError(ValueError):
    """Sequences are nested too deeply."""


@lru_cache(maxsize=8192)
def _entry(tag: int) -> tuple[str, str, bool]:
    """Key, dictionary VR and whether values come as a list, for a tag."""
    try:
        if datadict.dictionary_has_tag(tag):  # false for repeating groups, whose keywords are not unique
            key = datadict.dictionary_keyword(tag)
            return key or f"{tag:08X}", datadict.dictionary_VR(tag), datadict.dictionary_VM(tag) != "1"
    except KeyError:
        pass
    return f"{tag:08X}", "", False


def read_levels(dataset: Dataset) -> Levels:
    """Sort a data set's elements into the levels of a metadata document.

    I/O: none.

    Parameters
    ----------
    dataset : pydicom.Dataset
        With ``file_meta``. Elements still raw are read from their bytes.

    Returns
    -------
    Levels

    Raises
    ------
    ValueError
        Sequences are nested deeper than any real object's.
    """
    levels = Levels()
    merged: Json = {}
    _read_into(getattr(dataset, "file_meta", None) or Dataset(), merged, levels, ("iso8859",))
    _read_into(dataset, merged, levels, ("iso8859",))
    homes = {"Patient": levels.patient, "Study": levels.study, "Series": levels.series}
    for key, value in merged.items():
        homes.get(LEVEL_OF.get(key, ""), levels.instance)[key] = value
    return levels


def _read_into(
    dataset: Dataset,
    target: Json,
    levels: Levels,
    encodings: tuple[str, ...],
    signed: bool = False,
    depth: int = 0,
) -> None:
    if depth > _MOST_DEPTH:
        raise _TooDeepError(f"sequences are nested deeper than {_MOST_DEPTH} levels")
    encodings = _encodings(dataset, encodings)
    for tag, element in sorted(dataset.items(), key=_number):
        number = int(tag)
        if number in _SKIPPED or (number & 0xFFFF == 0 and number > 0xFFFF):
            continue
        value: Any = None
        if (known := _repeated(number, element, encodings, signed)) is not None:
            key, vr, value = known
            target[key] = value
            if depth == 0 and key == f"{number:08X}":
                levels.vrs[key] = vr
            if number == 0x00280103:
                signed = value == 1
            continue
        key, dictionary_vr, plural = _entry(number)
        try:
            vr = _vr(dataset, tag, element, dictionary_vr)
            if vr == "SQ":
                value = _items(dataset, element, levels, encodings, signed, depth)
            elif isinstance(element, RawDataElement):
                raw = element.value if isinstance(element.value, bytes) else b""
                value = _from_bytes(raw, vr, plural, encodings, element.is_little_endian, signed)
            else:
                value = _from_element(element, vr, plural)
        except RecursionError:
            raise _TooDeepError("sequences are nested too deeply") from None
        except _TooDeepError:
            raise
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            struct.error,
            LookupError,
            OverflowError,
            NotImplementedError,  # pydicom's for a VR that is none, a stray delimiter's for one
        ):
            levels.discarded.append(key)
            continue
        if value is None and vr == "UN":
            value = ""
        target[key] = value
        if depth == 0 and key == f"{tag:08X}":
            levels.vrs[key] = vr
        if tag == 0x00280103:
            signed = value == 1


def _number(pair: tuple[BaseTag, Any]) -> int:
    return int(pair[0])


def _repeated(number: int, element: Any, encodings: tuple[str, ...], signed: bool) -> tuple[str, str, Any] | None:
    """Key, VR and value of a short element whose bytes alone give them; None for any other.

    Most elements of an instance are those of its neighbours, byte for byte, so they are remembered.
    """
    if not isinstance(element, RawDataElement) or not isinstance(element.value, bytes):
        return None
    if len(element.value) > _SHORT or (element.VR in (None, "UN") and (number >> 16) & 1):
        return None
    try:
        return _remembered(number, element.VR, element.value, encodings, element.is_little_endian, signed)
    except (ValueError, TypeError, struct.error, LookupError, OverflowError):
        return None  # the long way says what is wrong


@lru_cache(maxsize=32_768)
def _remembered(
    number: int, vr: str | None, raw: bytes, encodings: tuple[str, ...], little_endian: bool, signed: bool
) -> tuple[str, str, Any] | None:
    key, dictionary_vr, plural = _entry(number)
    if not vr or vr == "UN":
        vr = _public_vr(dictionary_vr)
    if not vr or vr == "SQ":
        return None
    value = _from_bytes(raw, vr, plural, encodings, little_endian, signed)
    return key, vr, "" if value is None and vr == "UN" else value


def _items(
    dataset: Dataset, element: Any, levels: Levels, encodings: tuple[str, ...], signed: bool, depth: int
) -> list[Json] | None:
    raw = element.value if isinstance(element, RawDataElement) and element.VR == "SQ" else None
    if not isinstance(raw, bytes) or len(raw) > _SHORT_SEQUENCE:
        items = dataset[element.tag].value
        return [_item(item, levels, encodings, signed, depth) for item in items or []] or None
    value, discarded = _remembered_items(raw, encodings, element.is_little_endian, signed, depth)
    levels.discarded += discarded
    return value


@lru_cache(maxsize=2_048)
def _remembered_items(
    raw: bytes, encodings: tuple[str, ...], little_endian: bool, signed: bool, depth: int
) -> tuple[list[Json] | None, list[str]]:
    """The items of a short sequence, and what could not be read of them: most are those of the neighbours too."""
    levels = Levels()
    items = convert_SQ(raw, False, little_endian, list(encodings))
    return [_item(item, levels, encodings, signed, depth) for item in items] or None, levels.discarded


def _item(item: Dataset, levels: Levels, encodings: tuple[str, ...], signed: bool, depth: int) -> Json:
    target: Json = {}
    _read_into(item, target, levels, encodings, signed, depth + 1)
    return target


def _encodings(dataset: Dataset, inherited: tuple[str, ...]) -> tuple[str, ...]:
    if 0x00080005 not in dataset:
        return inherited
    try:
        names = dataset.get("SpecificCharacterSet")
        if names == _LATIN_9:  # younger than pydicom's table
            return ("iso8859_15",)
        return tuple(convert_encodings(names))
    except (LookupError, ValueError, TypeError, AttributeError):
        return inherited


def _vr(dataset: Dataset, tag: BaseTag, element: Any, dictionary_vr: str) -> str:
    if isinstance(element, DataElement) and isinstance(element.value, DicomSequence):
        return "SQ"
    vr = getattr(element, "VR", None)
    if vr and vr != "UN":
        return str(vr)
    if dictionary_vr:  # implicit VR, or a writer that did not know the element
        return _public_vr(dictionary_vr)
    if tag.is_private_creator:
        return "LO"
    if tag.is_private and vr != "UN":
        creator = dataset.get_item(BaseTag((tag.group << 16) | (tag.element >> 8)))
        name = getattr(creator, "value", None)
        if isinstance(name, bytes):
            name = name.decode("ascii", "replace").strip()
        try:
            return str(datadict.private_dictionary_VR(tag, str(name)))
        except KeyError:
            return "UN"
    return "UN"


def _public_vr(dictionary_vr: str) -> str:
    return "OW" if " or OW" in dictionary_vr or dictionary_vr.startswith("OB or") else dictionary_vr


def _shape(values: Sequence[Any], plural: bool) -> Any:
    """A list when the dictionary says so or the file has several; None when there is nothing."""
    if not values or (len(values) == 1 and values[0] == ""):
        return None
    return list(values) if plural or len(values) > 1 else values[0]


def _from_bytes(
    raw: bytes, vr: str, plural: bool, encodings: tuple[str, ...], little_endian: bool, signed: bool
) -> Any:
    if vr in _NUMBERS:
        code = "h" if vr == "US or SS" and signed else _NUMBERS[vr]
        count = len(raw) // struct.calcsize(code)
        return _shape(_plain(struct.unpack_from(f"{'<' if little_endian else '>'}{count}{code}", raw), vr), plural)
    if vr == "AT":
        words = struct.unpack(f"{'<' if little_endian else '>'}{len(raw) // 2}H", raw)
        tags = [f"{group:04X}{element:04X}" for group, element in zip(words[::2], words[1::2], strict=True)]
        return tags or None
    if vr in _WORD_BYTES or vr in ("OB", "UN"):
        if not little_endian and (size := _WORD_BYTES.get(vr)):
            raw = np.frombuffer(raw, f">u{size}").astype(f"<u{size}").tobytes()
        return base64.b64encode(raw).decode("ascii") or None
    text = _text(raw, vr, encodings)
    values = [text] if vr in _SINGLE_TEXT else text.split("\\")
    if vr in _PADDED:
        return _shape([value.rstrip("\0") if value.strip(" \0") else "" for value in values], plural)
    strip = str.rstrip if vr in _SINGLE_TEXT else str.strip
    return _shape([strip(value, " \0") for value in values], plural)


def _text(raw: bytes, vr: str, encodings: tuple[str, ...]) -> str:
    if raw.isascii() and b"\x1b" not in raw and b"~" not in raw:
        return raw.decode("ascii")
    if vr not in _TEXT:
        return raw.decode("latin-1")
    return decode_bytes(raw, list(encodings), _NAME_DELIMITERS if vr == "PN" else _TEXT_DELIMITERS)


def _plain(numbers: Iterable[float], vr: str) -> list[Any]:
    """Numbers as JSON can hold them: whole floats as integers, the shortest digits of float32."""
    if vr not in ("FL", "FD"):
        return list(numbers)
    plain: list[Any] = []
    for number in numbers:
        value = float(str(np.float32(number))) if vr == "FL" else float(number)
        if not math.isfinite(value):
            plain.append("NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity")
        else:
            plain.append(int(value) if value.is_integer() and abs(value) < 2**53 else value)
    return plain


def _from_element(element: DataElement, vr: str, plural: bool) -> Any:
    """The value of an element that pydicom has converted already."""
    value = element.value
    if value is None or (isinstance(value, str | bytes) and not value):
        return None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    values = list(value) if isinstance(value, list | tuple) or element.VM > 1 else [value]
    if vr in _NUMBERS:
        return _shape(_plain(values, vr), plural)
    if vr == "AT":
        return [f"{int(each):08X}" for each in values]
    texts = [getattr(each, "original_string", each) if vr in _PADDED else each for each in values]
    return _shape([str(text) for text in texts], plural)
