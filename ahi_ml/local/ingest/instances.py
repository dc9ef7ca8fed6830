"""From a file to an instance: its elements by level, its frames as blobs, or why it cannot be stored."""

from __future__ import annotations

import logging
import re
import secrets
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import IO, Any

import pydicom
from pydicom.config import IGNORE
from pydicom.dataelem import RawDataElement
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID

from ahi_ml.codec.syntaxes import SYNTAXES
from ahi_ml.local.blobs import BlobStore
from ahi_ml.local.catalog import Datastore, FrameRow
from ahi_ml.local.ingest import frames as pixel_data
from ahi_ml.local.ingest.bombs import refuse_huge_inflation
from ahi_ml.local.ingest.document import read_levels
from ahi_ml.local.ingest.image_sets import Instance
from ahi_ml.local.ingest.plain import read_plain
from ahi_ml.local.ingest.remarks import (
    ELEMENTS_DISCARDED,
    INVALID_UID_FORMAT,
    INVALID_VALUE_LENGTH,
    MISMATCH,
    FileFailure,
    warning,
)
from ahi_ml.local.settings import Limits
from ahi_ml.local.uris import InputFile

__all__ = ["Refusal", "read_instance"]

_LOG = logging.getLogger(__name__)
_REQUIRED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")  # leading zeros are let pass, as the service does
_UNDEFINED = 0xFFFFFFFF
_READ_WHOLE = 32 * 2**20
_DELIMITER = b"\xfe\xff\xdd\xe0\0\0\0\0"
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
    except FileFailure as failure:
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


def _unsupported(uid: str) -> str:
    """Why a transfer syntax is not taken, without its text where that is no UID: it may be anything."""
    if not _UID.fullmatch(uid) or len(uid) > 64:
        return "DICOM attribute TransferSyntaxUID is not a UID"
    name = UID(uid, validation_mode=IGNORE).name
    return f"transfer syntax {uid} ({'unknown' if name == uid else name}) is not supported"


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
    dataset = _read(file)
    uid = str(getattr(dataset.file_meta, "TransferSyntaxUID", "") or "")
    if not uid:
        raise FileFailure("DICOM attribute TransferSyntaxUID does not exist")
    if uid not in SYNTAXES:
        raise FileFailure(_unsupported(uid))
    unended = not len(dataset) and SYNTAXES[uid].encapsulated
    if unended:
        dataset = _read_unended(file)
    if not len(dataset):
        raise FileFailure("DICOM attributes does not exist: the file ends with its header or inside the data set")
    try:
        levels = read_levels(dataset)
    except ValueError as error:  # its text names no value
        raise FileFailure(f"DICOM attributes cannot be read: {error}") from error
    for keyword in _REQUIRED:
        if not isinstance(value := levels.get(keyword), str):
            several = isinstance(value, list) and len(value) > 1
            raise FileFailure(f"DICOM attribute {keyword} {'has several values' if several else 'does not exist'}")
        if len(levels.get(keyword)) > 256:
            raise FileFailure(f"DICOM attribute {keyword} is longer than 256 characters")
    instance = Instance(file.key, levels.get("SOPInstanceUID"), levels, "", None, [], [])
    if levels.discarded:
        instance.warnings.append(warning(ELEMENTS_DISCARDED, f"unreadable values: {', '.join(levels.discarded)}"))
    bad = [keyword for keyword in _REQUIRED if not _UID.fullmatch(levels.get(keyword))]
    if bad:
        instance.warnings.append(warning(INVALID_UID_FORMAT, f"not a UID: {', '.join(bad)}"))
    long = [keyword for keyword, most in _LONGEST.items() if len(str(levels.get(keyword) or "")) > most]
    if long:
        instance.warnings.append(warning(INVALID_VALUE_LENGTH, f"too long a value: {', '.join(long)}"))
    if unended:
        instance.warnings.append(warning(MISMATCH, "the file ends without the delimiter of its pixel data"))
    if pixel_data.has_pixels(dataset):
        _store_frames(dataset, uid, store, blobs, instance)
    elif _is_cut(dataset):
        raise FileFailure("DICOM attributes cannot be read: the file ends inside one of them")
    elif "Rows" in dataset and "PixelDataProviderURL" not in dataset:
        instance.warnings.append(warning(MISMATCH, "Rows without pixel data: the file may be cut short"))
    return instance


def _read(file: InputFile) -> pydicom.Dataset:
    try:
        with file.open() as stream:
            source = stream
            if file.size <= _READ_WHOLE:
                data = stream.read()
                if (dataset := read_plain(data)) is not None:
                    return dataset
                # pydicom asks where it stands at each element: a system call of a file, and two hand-overs of the GIL.
                source = BytesIO(data)
            refuse_huge_inflation(source, file.size)
            return _dcmread(source)
    except InvalidDicomError:
        raise FileFailure("DICOM attribute TransferSyntaxUID does not exist") from None
    except OSError as error:
        raise FileFailure(f"the file cannot be read: {error.strerror or error}") from None


def _dcmread(stream: IO[bytes]) -> pydicom.Dataset:
    try:
        return pydicom.dcmread(stream)
    except OSError as error:
        if error.errno is not None:
            raise
        raise EOFError from error  # pydicom's own, of items that are not there


def _read_unended(file: InputFile) -> pydicom.Dataset:
    """The data set of a file that ends within its encapsulated pixel data; an empty one if it ends elsewhere.

    pydicom reads nothing of an element whose delimiter is missing. Whether frames are missing as well is for
    those to say who cut them out and decode them.
    """
    with file.open() as stream:
        dataset = _dcmread(BytesIO(stream.read() + _DELIMITER))
    *_, last = dataset.values() or [None]
    ends_in_pixels = isinstance(last, RawDataElement) and last.tag == 0x7FE00010 and last.length == _UNDEFINED
    return dataset if ends_in_pixels else pydicom.Dataset()


def _is_cut(dataset: pydicom.Dataset) -> bool:
    """Whether the file ends within a value; pydicom gives the bytes that are there."""
    *_, last = dataset.values()
    if not isinstance(last, RawDataElement) or not isinstance(last.value, bytes):
        return False
    return len(last.value) < last.length < _UNDEFINED


def _store_frames(dataset: pydicom.Dataset, uid: str, store: Datastore, blobs: BlobStore, instance: Instance) -> None:
    pixels = pixel_data.pixel_format(dataset)
    instance.stored_syntax = pixel_data.stored_syntax(uid, pixels, store.storage_format)
    content_type = SYNTAXES[instance.stored_syntax].content_type
    transcoded = instance.stored_syntax in pixel_data.STORED_SYNTAX.values()
    instance.checksum_type = "DECOMPRESSED" if transcoded else "COMPRESSED"

    def remark(kind: tuple[int, str], text: str) -> None:
        instance.warnings.append(warning(kind, text))

    for frame in pixel_data.stored_frames(dataset, pixels, store.storage_format, remark):
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
