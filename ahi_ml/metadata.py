"""Image-set metadata documents as plain records: the one place that sees their raw values. Floor 2.

A document comes gzipped; numbers of text VRs are strings with pad blanks, possibly multi-valued
elements are lists, empty ones null. What leaves here is typed: floats, ints, stripped strings,
tuples, or None. Names, dates of birth and free text do not leave here; patient identifiers leave as
`SeriesRecord.patient`, for hashing by whoever asked.
"""

from __future__ import annotations

import base64
import gzip
import json
import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from ahi_ml.codec import HTJ2K_LOSSLESS_RPCL
from ahi_ml.errors import MetadataError
from ahi_ml.types import Buffer

__all__ = [
    "INSTANCE_COLUMNS",
    "PROFILE_COLUMNS",
    "SERIES_COLUMNS",
    "FrameRecord",
    "InstanceRecord",
    "SeriesRecord",
    "document_text",
    "frame_ids",
    "parse_document",
    "table_data",
    "value_of",
]

_LOG = logging.getLogger(__name__)

Json = dict[str, Any]

SERIES_COLUMNS: Final = {
    "Modality": "text",
    "BodyPartExamined": "text",
    "Manufacturer": "text",
    "ManufacturerModelName": "text",
    "SeriesNumber": "int",
    "FrameOfReferenceUID": "text",
    "Laterality": "text",
    "PatientPosition": "text",
    "PatientSex": "text",
    "PatientAge": "text",
    "PatientWeight": "float",
    "PatientSize": "float",
}
"""DICOM attributes kept once a series, and what type their values are."""

INSTANCE_COLUMNS: Final = {
    "InstanceNumber": "int",
    "AcquisitionNumber": "int",
    "AcquisitionTime": "text",
    "ContentTime": "text",
    "TemporalPositionIdentifier": "int",
    "TriggerTime": "float",
}
"""DICOM attributes kept for each instance."""

PROFILE_COLUMNS: Final = {
    "StoredTransferSyntaxUID": "text",
    "TransferSyntaxUID": "text",
    "ChecksumType": "text",
    "SOPClassUID": "text",
    "ImageType": "texts",
    "Rows": "int",
    "Columns": "int",
    "SamplesPerPixel": "int",
    "PhotometricInterpretation": "text",
    "BitsAllocated": "int",
    "BitsStored": "int",
    "PixelRepresentation": "int",
    "ImageOrientationPatient": "floats",
    "PixelSpacing": "floats",
    "ImagerPixelSpacing": "floats",
    "SliceThickness": "float",
    "SpacingBetweenSlices": "float",
    "RescaleSlope": "float",
    "RescaleIntercept": "float",
    "RescaleType": "text",
    "WindowCenter": "floats",
    "WindowWidth": "floats",
    "VOILUTFunction": "text",
    "PresentationLUTShape": "text",
    "PixelPaddingValue": "int",
    "PixelPaddingRangeLimit": "int",
    "LossyImageCompression": "text",
    "ViewPosition": "text",
    "KVP": "float",
    "ConvolutionKernel": "texts",
    "EchoTime": "float",
    "RepetitionTime": "float",
    "FlipAngle": "float",
    "InversionTime": "float",
    "DiffusionBValue": "float",
}
"""DICOM attributes that repeat over the frames of a series; the index stores each combination once."""

_MODALITY_LUT = "ModalityLUTSequence"
_VOI_LUT = "VOILUTSequence"
_PALETTE = tuple(
    f"{channel}PaletteColorLookupTable{part}" for channel in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")
) + tuple(f"Segmented{channel}PaletteColorLookupTableData" for channel in ("Red", "Green", "Blue"))
_LUT_PARTS = ("LUTDescriptor", "LUTData")

# Where an enhanced instance keeps what a classic one has at its top level (PS3.3 C.7.6.16).
_FUNCTIONAL_GROUPS = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction", _VOI_LUT),
    "MRDiffusionSequence": ("DiffusionBValue",),
}


@dataclass(frozen=True, slots=True)
class FrameRecord:
    """One frame: its id, what its pixels must be, where it lies.

    Parameters
    ----------
    frame_id : str
        32 characters.
    number : int
        From 1.
    checksum : int or None
        CRC-32 of the full resolution.
    size : int
        FrameSizeInBytes, an estimate of the encoded size.
    minimum, maximum : int or None
        Extremes of the stored values.
    position : tuple of 3 floats, or None
        Image Position (Patient), LPS mm.
    profile : tuple
        Values of `PROFILE_COLUMNS`, in order, then the look-up tables as JSON text or None.
    """

    frame_id: str
    number: int
    checksum: int | None
    size: int
    minimum: int | None
    maximum: int | None
    position: tuple[float, float, float] | None
    profile: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class InstanceRecord:
    """One instance with frames."""

    sop_instance_uid: str
    attributes: Json
    frames: list[FrameRecord]


@dataclass(frozen=True, slots=True)
class SeriesRecord:
    """One series of an image set.

    Parameters
    ----------
    image_set_id, datastore_id : str
        Ids of the service.
    study_instance_uid, series_instance_uid : str
        UIDs.
    patient : tuple of str or None
        PatientID and its issuer: to be hashed, never stored.
    attributes : dict
        Values of `SERIES_COLUMNS`, and of extra columns asked for.
    instances : list of InstanceRecord
        Those with frames, by instance number and UID.
    without_frames : int
        Instances left out because they hold no image.
    """

    image_set_id: str
    datastore_id: str
    study_instance_uid: str
    series_instance_uid: str
    patient: tuple[str | None, str | None]
    attributes: Json
    instances: list[InstanceRecord]
    without_frames: int


def value_of(raw: Any, kind: str) -> Any:
    """Type one raw value of a document.

    I/O: none. A value that is not of its kind (a word where a number belongs, or no finite number)
    counts as absent: archives are full of them, and one bad optional attribute must not lose an image.

    Parameters
    ----------
    raw : JSON value
        As it stands in the document.
    kind : {"text", "texts", "int", "float", "floats"}
        What to make of it.
    """
    values = raw if isinstance(raw, list) else raw.split("\\") if isinstance(raw, str) else [raw]
    if any(isinstance(value, dict | list) for value in values):
        return None
    if kind in ("text", "texts"):
        texts = tuple("" if value is None else _encodable(str(value).strip()) for value in values)
        if not any(texts):
            return None
        return texts if kind == "texts" else "\\".join(texts)
    try:
        numbers = tuple(_number(value) for value in values if value is not None and str(value).strip())
    except (ValueError, OverflowError):
        return None
    if not numbers:
        return None
    if kind == "floats":
        return numbers
    if kind == "int":
        return int(numbers[0]) if abs(numbers[0]) < 2**62 else None
    return numbers[0]


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or (isinstance(value, str) and "_" in value):  # Python's own 1_000
        raise ValueError("no number of DICOM's")
    return number


def _encodable(text: str) -> str:
    """Text without half characters, which JSON can spell and nothing can store."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


@contextmanager
def _reading_a_document() -> Iterator[None]:
    """Raise whatever goes wrong as `MetadataError`."""
    try:
        yield
    except MetadataError:
        raise
    except (
        OSError,  # also what gzip says of a bad header and a bad checksum
        EOFError,
        zlib.error,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise MetadataError(f"not an image set metadata document: {type(error).__name__}: {error}") from error


def document_text(body: Buffer) -> bytes:
    """A metadata document as JSON in UTF-8, from what GetImageSetMetadata sends: gzipped or not. I/O: none.

    Raises
    ------
    MetadataError
        It cannot be unpacked.
    """
    with _reading_a_document():
        return gzip.decompress(body) if bytes(memoryview(body)[:2]) == b"\x1f\x8b" else bytes(body)


def frame_ids(body: Buffer) -> list[str]:
    """Ids of the frames of a metadata document, each once, in the document's order. I/O: none.

    Nothing else in the document need be usable, unlike for `parse_document`.

    Raises
    ------
    MetadataError
        Not a metadata document.
    """
    with _reading_a_document():
        series = json.loads(document_text(body))["Study"]["Series"].values()
        instances = (instance for each in series for instance in (each.get("Instances") or {}).values())
        frames = (frame for instance in instances for frame in instance.get("ImageFrames") or [])
        return list(dict.fromkeys(str(frame["ID"]) for frame in frames))


def parse_document(body: Buffer, *, extra: dict[str, str] | None = None) -> Iterator[SeriesRecord]:
    """Yield the series of an image set's metadata document, usually one.

    I/O: none.

    Parameters
    ----------
    body : bytes-like
        As GetImageSetMetadata sends it: gzipped or not.
    extra : dict, optional
        Further series-level keywords and their kinds.

    Raises
    ------
    MetadataError
        Not a metadata document, or one without what every document has.
    """
    with _reading_a_document():
        document = json.loads(document_text(body))
        image_set_id, datastore_id = (_encodable(str(document[name])) for name in ("ImageSetID", "DatastoreID"))
        patient = (document.get("Patient") or {}).get("DICOM") or {}
        study = document["Study"]
        for series_uid, series in study["Series"].items():
            yield _series(
                image_set_id, datastore_id, patient, study.get("DICOM") or {}, series_uid, series, extra or {}
            )


def _series(
    image_set_id: str, datastore_id: str, patient: Json, study: Json, uid: str, series: Json, extra: Json
) -> SeriesRecord:
    shared = {**patient, **study, **(series.get("DICOM") or {})}
    columns = {**SERIES_COLUMNS, **extra}
    instances = []
    without = 0
    for sop_uid, instance in (series.get("Instances") or {}).items():
        frames = instance.get("ImageFrames") or []
        if not frames:
            without += 1
            continue
        merged = {**shared, **(instance.get("DICOM") or {})}
        instances.append(_instance(image_set_id, sop_uid, instance, merged, frames))
    instances.sort(key=lambda each: (each.attributes["InstanceNumber"] or 0, each.sop_instance_uid))
    return SeriesRecord(
        image_set_id=image_set_id,
        datastore_id=datastore_id,
        study_instance_uid=value_of(study.get("StudyInstanceUID"), "text") or "",
        series_instance_uid=_encodable(uid),
        patient=(
            value_of(patient.get("PatientID"), "text"),
            value_of(patient.get("IssuerOfPatientID"), "text"),
        ),
        attributes={name: value_of(shared.get(name), kind) for name, kind in columns.items()},
        instances=instances,
        without_frames=without,
    )


def _instance(image_set_id: str, sop_uid: str, instance: Json, merged: Json, frames: list[Json]) -> InstanceRecord:
    attributes = {name: value_of(merged.get(name), kind) for name, kind in INSTANCE_COLUMNS.items()}
    merged["StoredTransferSyntaxUID"] = instance.get("StoredTransferSyntaxUID") or HTJ2K_LOSSLESS_RPCL
    merged["ChecksumType"] = instance.get("ChecksumType")
    tables = _lookup_tables(merged)
    base = {name: value_of(merged.get(name), kind) for name, kind in PROFILE_COLUMNS.items()}
    position = value_of(merged.get("ImagePositionPatient"), "floats")
    groups = list(_per_frame(merged, len(frames)))
    records = []
    for number, frame in enumerate(frames, 1):
        own = groups[number - 1] if groups else {}
        place, voi = own.pop("ImagePositionPatient", position), own.pop(_VOI_LUT, None)
        try:
            checksums = frame.get("PixelDataChecksumFromBaseToFullResolution") or []
            full = max(checksums, key=lambda each: each["Width"], default=None)
            checksum = int(full["Checksum"]) if full else None
            if checksum is not None and not 0 <= checksum < 2**32:
                raise ValueError("a checksum is a number of 32 bits")
            if not isinstance(frame["ID"], str):
                raise TypeError("a frame id is text")
            records.append(
                FrameRecord(
                    frame_id=frame["ID"],
                    number=number,
                    checksum=checksum,
                    size=max(value_of(frame.get("FrameSizeInBytes"), "int") or 0, 0),
                    minimum=value_of(frame.get("MinPixelValue"), "int"),
                    maximum=value_of(frame.get("MaxPixelValue"), "int"),
                    position=place if place and len(place) == 3 else None,
                    profile=(
                        *(({**base, **own}) if own else base).values(),
                        _lookup_tables({**merged, _VOI_LUT: voi}) if voi else tables,
                    ),
                )
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise MetadataError(
                f"frame {number} of an instance of image set {image_set_id} cannot be used: "
                f"{f'it lacks {error}' if isinstance(error, KeyError) else error}",
                image_set_id=image_set_id,
            ) from error
    return InstanceRecord(_encodable(sop_uid), attributes, records)


def _per_frame(merged: Json, count: int) -> Iterator[Json]:
    """What each frame of an enhanced instance says itself, or shares (PS3.3 C.7.6.16.1)."""
    per_frame = merged.get("PerFrameFunctionalGroupsSequence")
    shared = merged.get("SharedFunctionalGroupsSequence")
    if not per_frame and not shared:
        return
    if isinstance(per_frame, list) and per_frame and len(per_frame) != count:
        # Nobody knows which group is whose. One such instance must not make a whole index impossible.
        _LOG.warning(
            "an instance has %d per-frame functional groups for %d frames: positions and rescale tags of its frames "
            "are those its other levels give, or none",
            len(per_frame),
            count,
        )
    common = _functional((shared or [{}])[0] if isinstance(shared, list) else {})
    items = per_frame if isinstance(per_frame, list) and len(per_frame) == count else [{}] * count
    for item in items:
        yield {**common, **_functional(item)}


def _functional(group: Json) -> Json:
    found: Json = {}
    for sequence, keywords in _FUNCTIONAL_GROUPS.items():
        items = group.get(sequence)
        if not isinstance(items, list) or not items:
            continue
        for keyword in keywords:
            raw = items[0].get(keyword)
            kind = "floats" if keyword == "ImagePositionPatient" else PROFILE_COLUMNS.get(keyword)
            if (value := value_of(raw, kind) if kind else raw) is not None:
                found[keyword] = value
    return found


def _lookup_tables(merged: Json) -> str | None:
    """The look-up tables of an instance as JSON text, so that equal ones are stored once."""
    tables: Json = {}
    for name in (_MODALITY_LUT, _VOI_LUT):
        items = merged.get(name)
        if isinstance(items, list) and items and isinstance(items[0], dict):
            tables[name] = {part: items[0].get(part) for part in _LUT_PARTS}
    palette = {name: merged[name] for name in _PALETTE if merged.get(name) is not None}
    if palette and value_of(merged.get("PhotometricInterpretation"), "text") == "PALETTE COLOR":
        tables["Palette"] = palette
    return json.dumps(tables, sort_keys=True) if tables else None


def table_data(raw: Any) -> bytes | list[int] | None:
    """The data of a look-up table: base64 text as bytes, numbers as they are. I/O: none."""
    if raw is None:
        return None
    if isinstance(raw, str):
        return base64.b64decode(raw)
    return [int(value) for value in (raw if isinstance(raw, list) else [raw])]
