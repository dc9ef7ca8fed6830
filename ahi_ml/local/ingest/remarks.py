"""What an import says of a file: that it fails, or what is odd about it. The codes are the service's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

__all__ = [
    "ELEMENTS_DISCARDED",
    "FRAME_NUMBER_MISMATCH",
    "INVALID_OFFSET_TABLE",
    "INVALID_UID_FORMAT",
    "INVALID_VALUE_LENGTH",
    "MISMATCH",
    "FileFailure",
    "PixelFailure",
    "Remark",
    "warning",
]

Kind = tuple[int, str]
Remark = Callable[[Kind, str], None]
"""Takes a kind of warning and its text, which names no value of the file."""

ELEMENTS_DISCARDED: Final = (0xB006, "ElementsDiscarded")
MISMATCH: Final = (0xB007, "DataSetMismatch")
FRAME_NUMBER_MISMATCH: Final = (0xB111, "FrameNumberMismatch")
INVALID_OFFSET_TABLE: Final = (0xB112, "InvalidOffsetTable")
INVALID_UID_FORMAT: Final = (0xB201, "InvalidUIDFormat")
INVALID_VALUE_LENGTH: Final = (0xB202, "InvalidValueLength")


class FileFailure(Exception):
    """The file fails; the text goes into its line of ``failure.ndjson``. It names elements, never their values."""


class PixelFailure(FileFailure):
    """The pixel data of a file cannot be stored."""


def warning(kind: Kind, text: str) -> dict[str, Any]:
    """A warning as a line of ``warning.ndjson`` has it. I/O: none."""
    code, name = kind
    return {"warning_reason_code": code, "type": name, "message": text}
