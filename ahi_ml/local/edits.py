"""Edits of a metadata document: updates, removals, subsets, merges. Pure functions over JSON.

What may be changed, and what needs force, are the service's rules; `check` knows them without
looking at values that stand in the document, the functions that edit refuse what does not fit it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from pydicom import datadict
from pydicom.valuerep import VR

from ahi_ml.local.ingest.levels import LEVEL_OF

__all__ = ["EditFailure", "InvalidEdit", "apply_removals", "apply_updates", "check", "parse_tree", "study_level_only"]

Json = dict[str, Any]

_NEVER = frozenset({"PixelData", "FloatPixelData", "DoubleFloatPixelData"})
_UIDS = frozenset({"StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"})
_FORCED = _UIDS | {"StudyID"}
_HEX = re.compile(r"[0-9A-F]{8}")
_UID = re.compile(r"[0-9.]{1,256}")
_NAME = re.compile(r"[A-Za-z0-9]{1,64}")
# Longest value and characters of the VRs that bound them (PS3.5 6.2).
_FORMS = {
    "AE": re.compile(r"[ -\[\]-~]{0,16}"),
    "AS": re.compile(r"(\d{3}[DWMY])?"),
    "CS": re.compile(r"[A-Z0-9_ ]{0,16}"),
    "DA": re.compile(r"(\d{8})?"),
    "DS": re.compile(r" *([+-]?(\d+\.?\d*|\.\d+)([Ee][+-]?\d+)?)? *"),
    "DT": re.compile(r"(\d{4,14}(\.\d{1,6})?([+-]\d{4})?)? *"),
    "IS": re.compile(r" *([+-]?\d{1,11})? *"),
    "LO": re.compile(r"[^\\]{0,64}"),
    "PN": re.compile(r"[^\\]{0,324}"),
    "SH": re.compile(r"[^\\]{0,16}"),
    "ST": re.compile(r"[\s\S]{0,1024}"),
    "LT": re.compile(r"[\s\S]{0,10240}"),
    "TM": re.compile(r"(\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?)? *"),
    "UI": re.compile(r"[0-9.]{0,64}"),
}
_VRS = frozenset(str(vr.value) for vr in VR if len(vr.value) == 2)
_NUMERIC = frozenset({"US", "SS", "UL", "SL", "FL", "FD", "SV", "UV"})


class InvalidEdit(Exception):
    """The request itself is not acceptable: refused at once."""


class EditFailure(Exception):
    """The edit does not fit the document: the attempt fails and leaves a version that says so.

    The text is shown as a ``message``, in which the service's model has no semicolon, among others.
    """


def parse_tree(text: str | bytes, member: str) -> Json:
    """Read a tree of elements from JSON text. I/O: none.

    Raises
    ------
    InvalidEdit
        It is no JSON object of the expected shape.
    """
    try:
        tree = json.loads(text, parse_constant=_refuse_number, parse_float=_finite)
        json.dumps(tree, ensure_ascii=False).encode()  # half surrogate pairs would break the catalog later
        deepcopy(tree)
    except (ValueError, RecursionError) as error:
        raise InvalidEdit(f"{member} is not valid JSON") from error
    if not isinstance(tree, dict) or str(tree.get("SchemaVersion")) != "1.1":
        raise InvalidEdit(f"{member} must be a JSON object with SchemaVersion 1.1")
    if unknown := set(tree) - {"SchemaVersion", "Patient", "Study"}:
        raise InvalidEdit(f"{member} names what cannot be changed: {', '.join(sorted(map(_shown, unknown)))}")
    for _ in _nodes(tree, member):
        pass
    return tree


def _refuse_number(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def _nodes(tree: Json, member: str) -> Iterator[tuple[str, str | None, str | None, Json]]:
    """Yield level, series UID, SOP UID and node of everything a tree names."""
    patient, study = tree.get("Patient"), tree.get("Study")
    for level, node in (("Patient", patient), ("Study", study)):
        if node is not None:
            _expect(node, {"DICOM", "Series"} if level == "Study" else {"DICOM"}, member)
            yield level, None, None, node
    for series_uid, series in ((study or {}).get("Series") or {}).items():
        _expect(series, {"DICOM", "Instances"}, member)
        yield "Series", series_uid, None, series
        for sop_uid, instance in (series.get("Instances") or {}).items():
            _expect(instance, {"DICOM", "DICOMVRs"}, member)
            yield "Instance", series_uid, sop_uid, instance


def _expect(node: Any, keys: set[str], member: str) -> None:
    if not isinstance(node, dict) or set(node) - keys or not all(isinstance(value, dict) for value in node.values()):
        raise InvalidEdit(f"{member} has another structure than a metadata document, or names what cannot be changed")


def check(tree: Json, member: str, *, force: bool, primary: bool) -> None:
    """Refuse changes that are never allowed, or not without force. I/O: none.

    Raises
    ------
    InvalidEdit
        Which element, and why.
    """
    for level, _, _, node in _nodes(tree, member):
        for key, value in (node.get("DICOM") or {}).items():
            _check_element(level, key, value, member, force=force, primary=primary)
        for key, vr in (node.get("DICOMVRs") or {}).items():
            if not _HEX.fullmatch(key) or vr not in _VRS:
                raise InvalidEdit("DICOMVRs gives a VR, such as LO, to a tag of eight hexadecimal digits")
        if member == "removableAttributes" and level in ("Series", "Instance") and not node and not force:
            raise InvalidEdit("removing instances or series needs force")


def _check_element(level: str, key: str, value: Any, member: str, *, force: bool, primary: bool) -> None:
    if key in _NEVER:
        raise InvalidEdit(f"{key} cannot be changed")
    if key in _UIDS and primary:
        raise InvalidEdit(f"{key} of a primary image set cannot be changed: copy the image set, then change the copy")
    if key in _UIDS and member == "removableAttributes":
        raise InvalidEdit(f"{key} cannot be removed: give another one")
    if key in _UIDS and not (isinstance(value, str) and _UID.fullmatch(value)):
        raise InvalidEdit(f"{key} is digits and dots, at most 256, with force as well")
    tag = datadict.tag_for_keyword(key)
    if tag is not None and LEVEL_OF.get(key, "Instance") != level:
        raise InvalidEdit(f"{key} belongs to the {LEVEL_OF.get(key, 'Instance')} level, not to {level}")
    if tag is None and not _HEX.fullmatch(key):
        raise InvalidEdit(f"{_shown(key)} is no DICOM attribute")
    if force:
        return
    if key in _FORCED:
        raise InvalidEdit(f"changing {key} needs force")
    if tag is None:
        raise InvalidEdit(f"changing the private or unknown attribute {key} needs force")
    vr = datadict.dictionary_VR(tag)
    if vr == "SQ" or isinstance(value, list | dict):
        raise InvalidEdit(f"changing {key}, a sequence or a multi-valued attribute, needs force")
    if member == "updatableAttributes" and value is not None and not _fits(vr, value):
        raise InvalidEdit(f"the value given for {key} does not fit its VR {vr}: that needs force")


def _shown(key: str) -> str:
    """A key as messages name it: one that cannot be a keyword or a tag may be anything, a patient's name as well."""
    return key if _NAME.fullmatch(key) else "a name of the request"


def _fits(vr: str, value: Any) -> bool:
    if vr in _NUMERIC:
        return isinstance(value, int | float) and not isinstance(value, bool)
    form = _FORMS.get(vr)
    return isinstance(value, str) and (form is None or form.fullmatch(value) is not None)


def study_level_only(tree: Json) -> bool:
    """Whether a tree touches nothing below the study. I/O: none."""
    return not (tree.get("Study") or {}).get("Series")


def apply_updates(document: Json, tree: Json) -> Json:
    """A document with elements added or replaced. I/O: none.

    Raises
    ------
    EditFailure
        A series or an instance is not in the document, or a new UID is taken.
    """
    document = deepcopy(document)
    renamed: list[tuple[str, str | None, str]] = []
    for _, series_uid, sop_uid, node in _nodes(tree, "updatableAttributes"):
        target = _find(document, tree, series_uid, sop_uid, node)
        target.setdefault("DICOM", {}).update(node.get("DICOM") or {})
        if node.get("DICOMVRs"):
            target.setdefault("DICOMVRs", {}).update(node["DICOMVRs"])
        wanted = (node.get("DICOM") or {}).get("SOPInstanceUID" if sop_uid else "SeriesInstanceUID")
        if series_uid is not None and wanted not in (None, sop_uid or series_uid):
            renamed.append((series_uid, sop_uid, str(wanted)))
    all_series = document["Study"]["Series"]
    for series_uid, sop_uid, wanted in sorted(renamed, key=lambda each: each[1] is None):  # instances first
        holder, old = (all_series[series_uid]["Instances"], sop_uid) if sop_uid else (all_series, series_uid)
        if wanted in holder:
            raise EditFailure("INVALID_REQUEST: a new UID is already in use in this image set")
        holder[wanted] = holder.pop(old)
    return document


def apply_removals(document: Json, tree: Json) -> Json:
    """A document without the elements, instances or series named. I/O: none.

    Raises
    ------
    EditFailure
        Something named is not there, or has another value.
    """
    document = deepcopy(document)
    all_series = document["Study"]["Series"]
    for _, series_uid, sop_uid, node in list(_nodes(tree, "removableAttributes")):
        target = _find(document, tree, series_uid, sop_uid, node)
        if not node and sop_uid is not None:
            del all_series[series_uid]["Instances"][sop_uid]
            continue
        if not node and series_uid is not None:
            del all_series[series_uid]
            continue
        elements = target.get("DICOM", {})
        for key, value in (node.get("DICOM") or {}).items():
            if key not in elements or _normal(elements[key]) != _normal(value):
                raise EditFailure(f"INVALID_REQUEST: {key} is not in the image set with the value given")
            del elements[key]
            target.get("DICOMVRs", {}).pop(key, None)
    if not any(series["Instances"] for series in all_series.values()):
        raise EditFailure("INVALID_REQUEST: an image set keeps at least one instance: delete it instead")
    return document


def _find(document: Json, tree: Json, series_uid: str | None, sop_uid: str | None, node: Json) -> Json:
    if series_uid is None:
        level = "Patient" if node is tree.get("Patient") else "Study"
        found: Json = document[level]
        return found
    series = document["Study"]["Series"].get(series_uid)
    if series is None:
        raise EditFailure("INVALID_REQUEST: a series of the request is not in the image set")
    if sop_uid is None:
        return series  # type: ignore[no-any-return]
    if sop_uid not in series["Instances"]:
        raise EditFailure("INVALID_REQUEST: an instance of the request is not in the image set")
    return series["Instances"][sop_uid]  # type: ignore[no-any-return]


def _normal(value: Any) -> Any:
    """Values that mean the same: pad blanks and one-value lists aside."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value.strip() if isinstance(value, str) else value
