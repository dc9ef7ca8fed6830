"""The errors of the package, floor 0: one tree, no imports.

::

    AhiError
      ConfigError (also ValueError)         an option cannot work; raised before any I/O
      ServiceError                          the data store said no, or nothing
        NotFoundError (also LookupError) | AccessDeniedError | ConflictError | ThrottledError
        ConnectionFailedError
      DataError (also ValueError)           it arrived but cannot be used
        MetadataError
        DecodeError
          UnsupportedTransferSyntaxError
        ChecksumError
        GeometryError
          GapError | DuplicateSliceError | MixedOrientationError | TiltError
        SnapshotDriftError | SplitLeakError
      CacheError                            the cache folder is unusable
      LocalStoreError                       the embedded store cannot start, ingest or serve

Every class can be built from one message and survives pickle: torch re-raises a worker's error as
``type(error)(text)`` and joblib pickles it. Context is keyword-only with defaults; identifiers stand
in the message too, because the first way drops attributes.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AccessDeniedError",
    "AhiError",
    "CacheError",
    "ChecksumError",
    "ConfigError",
    "ConflictError",
    "ConnectionFailedError",
    "DataError",
    "DecodeError",
    "DuplicateSliceError",
    "GapError",
    "GeometryError",
    "LocalStoreError",
    "MetadataError",
    "MixedOrientationError",
    "NotFoundError",
    "ServiceError",
    "SnapshotDriftError",
    "SplitLeakError",
    "ThrottledError",
    "TiltError",
    "UnsupportedTransferSyntaxError",
]


class AhiError(Exception):
    """Base of every error this package raises on purpose."""

    def __init__(self, text: str = "") -> None:
        super().__init__(text)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args, self.__dict__


class ConfigError(AhiError, ValueError):
    """An option, or a combination of options, cannot work."""


class ServiceError(AhiError):
    """The data store refused a request, or did not answer it.

    Parameters
    ----------
    text : str
        What was asked, what came back, what to try.
    operation : str, optional
        Operation of the service, such as ``"GetImageFrame"``.
    code : str, optional
        Error code of the service, such as ``"ThrottlingException"``.
    status : int, optional
        HTTP status, 0 when there was no answer.
    request_id : str, optional
        The service's id of the request, for a support case.
    retryable : bool, optional
        Whether the same request may succeed later.
    """

    def __init__(
        self,
        text: str = "",
        *,
        operation: str = "",
        code: str = "",
        status: int = 0,
        request_id: str = "",
        retryable: bool = False,
    ) -> None:
        super().__init__(text)
        self.operation = operation
        self.code = code
        self.status = status
        self.request_id = request_id
        self.retryable = retryable


class NotFoundError(ServiceError, LookupError):
    """The data store, image set, frame or job does not exist."""


class AccessDeniedError(ServiceError):
    """The credentials are missing, wrong, expired, or not allowed to do this."""


class ConflictError(ServiceError):
    """The resource is locked, not ready, or newer than the request assumes."""


class ThrottledError(ServiceError):
    """The request rate or a quota of the account is used up."""


class ConnectionFailedError(ServiceError):
    """No usable answer arrived: no connection, a reset, a timeout, a short body."""


class DataError(AhiError, ValueError):
    """Data arrived and cannot be used.

    Parameters
    ----------
    text : str
        What is wrong, where, and what to do.
    image_set_id, frame_id : str, optional
        Where it is wrong.
    """

    def __init__(self, text: str = "", *, image_set_id: str = "", frame_id: str = "") -> None:
        super().__init__(text)
        self.image_set_id = image_set_id
        self.frame_id = frame_id


class MetadataError(DataError):
    """An image set's metadata document lacks or contradicts what is needed."""


class DecodeError(DataError):
    """Encoded pixels cannot be decoded."""


class UnsupportedTransferSyntaxError(DecodeError):
    """No decoder for this transfer syntax."""


class ChecksumError(DataError):
    """Pixels differ from what the data store says they are."""


class GeometryError(DataError):
    """Frames do not form the volume that was asked for."""


class GapError(GeometryError):
    """Slices are missing, or their spacing is irregular."""


class DuplicateSliceError(GeometryError):
    """Several frames share one position and nothing tells them apart."""


class MixedOrientationError(GeometryError):
    """Frames of different orientation, size or spacing stand in one series."""


class TiltError(GeometryError):
    """The stack is sheared, and the target cannot hold shear."""


class SnapshotDriftError(DataError):
    """The data store no longer holds what the index pinned."""


class SplitLeakError(DataError):
    """A split would put one patient on both sides."""


class CacheError(AhiError):
    """The cache folder cannot be used. A miss or a torn entry is never an error."""


class LocalStoreError(AhiError):
    """The embedded store cannot start, import or serve."""
