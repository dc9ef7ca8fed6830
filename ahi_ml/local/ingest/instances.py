"""From a file to an instance: its elements by level, its frames as blobs, or why it cannot be stored."""

from __future__ import annotations

import logging
import re
import secrets
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import pydicom
from pydicom.config import IGNORE
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID

from ahi_ml.codec.syntaxes import SYNTAXES
from ahi_ml.local.blobs import BlobStore
from ahi_ml.local.catalog import Datastore, FrameRow
from ahi_ml.local.ingest import frames as pixel_data
from ahi_ml.local.ingest.document import read_levels
from ahi_ml.local.ingest.image_sets import Instance
from ahi_ml.local.settings import Limits
from ahi_ml.local.uris import InputFile

__all__ = ["Refusal", "read_instance"]

_LOG = logging.getLogger(__name__)
_REQUIRED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_DISCARDED = 0xB006
_BAD_UID = 0xB201
_BAD_LENGTH = 0xB202
_READ_WHOLE = 32 * 2**20
_LONGEST = {  # characters that the service takes for the elements it handles specially
    **dict.fromkeys(("PatientName", "PatientID", "StudyDescription", "AccessionNumber", "StudyID"), 256),
    "PatientBirthDate": 18,
    "PatientSex": 16,
    "StudyDate": 18,
    "StudyTime": 28,
}

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a file was not imported.

    Parameters
    ----------
    reason : str
        For the job's report. It names elements, never their values.
    server : bool
        The store is at fault, not the file.
    """

    reason: str
    server: bool = False


class _FileFailure(Exception):
    """The file fails; the text goes into its line of ``failure.ndjson``."""


class _StoreFailure(Exception):
    """The store cannot keep the frames."""


def read_instance(file: InputFile, store: Datastore, blobs: BlobStore, limits: Limits) -> Instance | Refusal:
    """Parse a file and store its frames.

    I/O: reads the file whole, writes a blob a frame. Whatever the parser raises is the file's refusal.
    """
    if file.size > limits.file_bytes:
        return Refusal(f"FILE_SIZE_LIMIT_EXCEEDED: the file has more than {limits.file_bytes} bytes")
    try:
        return _parse(file, store, blobs)
    except (_FileFailure, pixel_data.PixelFailure) as failure:
        return Refusal(str(failure))
    except _StoreFailure as failure:
        _LOG.exception("the frames of a file could not be stored")
        return Refusal(str(failure), server=True)
    except MemoryError:
        return Refusal("the file does not fit into memory", server=True)
    except Exception as error:
        # Hostile files reach every corner of the parser; whatever it raises, the file is at fault
        # and the job goes on. Values stay out of the text: they may identify a patient.
        _LOG.debug("a file could not be parsed", exc_info=True)
        return Refusal(f"DICOM attributes cannot be read: {_why(error)}")


def _name(uid: str) -> str:
    """A transfer syntax that the data store does not take, in words."""
    if not re.fullmatch(r"[0-9.]{1,64}", uid):
        return "(no UID)"
    name = UID(uid, validation_mode=IGNORE).name
    return f"{uid} ({'unknown' if name == uid else name})"


def _why(error: Exception) -> str:
    """What a parser's error means, without its own text: that may quote a value."""
    if isinstance(error, RecursionError):
        return "sequences are nested too deeply"
    if isinstance(error, zlib.error):
        return "the deflated data set is damaged"
    if isinstance(error, EOFError):
        return "the file ends inside one of them"
    return "the file is damaged, or its transfer syntax is another than it says"


def _parse(file: InputFile, store: Datastore, blobs: BlobStore) -> Instance:
    try:
        with file.open() as stream:
            # pydicom asks where it stands at each element: a system call of a file, and two hand-overs of the GIL.
            dataset = pydicom.dcmread(BytesIO(stream.read()) if file.size <= _READ_WHOLE else stream)
    except InvalidDicomError:
        raise _FileFailure("DICOM attribute TransferSyntaxUID does not exist") from None
    except OSError as error:
        raise _FileFailure(f"the file cannot be read: {error.strerror or error}") from None
    uid = str(getattr(dataset.file_meta, "TransferSyntaxUID", "") or "")
    if not uid:
        raise _FileFailure("DICOM attribute TransferSyntaxUID does not exist")
    if uid not in SYNTAXES:
        raise _FileFailure(f"transfer syntax {_name(uid)} is not supported")
    if not len(dataset):
        raise _FileFailure("DICOM attributes does not exist: the file ends with its header or inside the data set")
    try:
        levels = read_levels(dataset)
    except ValueError as error:  # its text names no value
        raise _FileFailure(f"DICOM attributes cannot be read: {error}") from error
    for keyword in _REQUIRED:
        if not isinstance(levels.get(keyword), str):
            raise _FileFailure(f"DICOM attribute {keyword} does not exist")
        if len(levels.get(keyword)) > 256:
            raise _FileFailure(f"DICOM attribute {keyword} is longer than 256 characters")
    instance = Instance(file.key, levels.get("SOPInstanceUID"), levels, "", None, [], [])
    if levels.discarded:
        instance.warnings.append(
            _warning(_DISCARDED, "ElementsDiscarded", f"unreadable values: {', '.join(levels.discarded)}")
        )
    bad = [keyword for keyword in _REQUIRED if set(levels.get(keyword)) - set("0123456789.")]
    if bad:
        instance.warnings.append(_warning(_BAD_UID, "InvalidUIDFormat", f"not a UID: {', '.join(bad)}"))
    long = [keyword for keyword, most in _LONGEST.items() if len(str(levels.get(keyword) or "")) > most]
    if long:
        instance.warnings.append(_warning(_BAD_LENGTH, "InvalidValueLength", f"too long a value: {', '.join(long)}"))
    if pixel_data.has_pixels(dataset):
        _store_frames(dataset, uid, store, blobs, instance)
    return instance


def _store_frames(dataset: pydicom.Dataset, uid: str, store: Datastore, blobs: BlobStore, instance: Instance) -> None:
    pixels = pixel_data.pixel_format(dataset)
    instance.stored_syntax = pixel_data.stored_syntax(uid, pixels, store.storage_format)
    content_type = SYNTAXES[instance.stored_syntax].content_type
    transcoded = instance.stored_syntax in pixel_data.STORED_SYNTAX.values()
    instance.checksum_type = "DECOMPRESSED" if transcoded else "COMPRESSED"
    for frame in pixel_data.stored_frames(dataset, pixels, store.storage_format):
        try:
            blob = blobs.put(frame.data)
        except OSError as error:
            raise _StoreFailure(f"the data store cannot keep the frames: {error.strerror}") from error
        row = FrameRow(secrets.token_hex(16), blob, content_type)
        instance.rows.append(row)
        entry: Json = {
            "ID": row.frame_id,
            "PixelDataChecksumFromBaseToFullResolution": [
                {"Width": pixels.columns, "Height": pixels.rows, "Checksum": frame.checksum}
            ],
            "MinPixelValue": frame.minimum,
            "MaxPixelValue": frame.maximum,
            "FrameSizeInBytes": len(frame.data),
        }
        instance.frames.append(entry)


def _warning(code: int, kind: str, text: str) -> Json:
    return {"warning_reason_code": code, "type": kind, "message": text}
