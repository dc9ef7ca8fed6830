"""What a path of the file system names: a data store, an image set, a version, a document or a frame."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ahi_ml.errors import AccessDeniedError, NotFoundError

__all__ = ["DOCUMENT", "Place", "as_os_errors", "missing"]

DOCUMENT = "metadata.json"

Kind = Literal["root", "datastore", "image_set", "versions", "version", "frames", "document", "frame"]

_ID = re.compile(r"[0-9a-z]{32}")
_VERSION = re.compile(r"[0-9]{1,19}")


@dataclass(frozen=True, slots=True)
class Place:
    """A path, understood.

    Parameters
    ----------
    path : str
        Without protocol, as the file system names it.
    kind : str
        ``"document"`` and ``"frame"`` are files, the rest directories.
    datastore_id, image_set_id, frame_id : str
        Empty where the path does not go so deep.
    version_id : str or None
        Of a version and its document; None is the latest.
    """

    path: str
    kind: Kind
    datastore_id: str = ""
    image_set_id: str = ""
    frame_id: str = ""
    version_id: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether it is a document or a frame."""
        return self.kind in ("document", "frame")

    @classmethod
    def of(cls, path: str) -> Place:
        """Understand a path that the protocol was stripped from. I/O: none.

        Raises
        ------
        FileNotFoundError
            Nothing can be there: an id or a name that does not exist in this file system.
        """
        match path.split("/"):
            case [""]:
                return cls(path, "root")
            case [datastore_id] if _ID.fullmatch(datastore_id):
                return cls(path, "datastore", datastore_id)
            case [datastore_id, image_set_id, *rest] if _ID.fullmatch(datastore_id) and _ID.fullmatch(image_set_id):
                match rest:
                    case []:
                        return cls(path, "image_set", datastore_id, image_set_id)
                    case ["versions"]:
                        return cls(path, "versions", datastore_id, image_set_id)
                    case ["frames"]:
                        return cls(path, "frames", datastore_id, image_set_id)
                    case [name] if name == DOCUMENT:
                        return cls(path, "document", datastore_id, image_set_id)
                    case ["versions", version] if _VERSION.fullmatch(version):
                        return cls(path, "version", datastore_id, image_set_id, version_id=version)
                    case ["versions", version, name] if _VERSION.fullmatch(version) and name == DOCUMENT:
                        return cls(path, "document", datastore_id, image_set_id, version_id=version)
                    case ["frames", frame_id] if _ID.fullmatch(frame_id):
                        return cls(path, "frame", datastore_id, image_set_id, frame_id)
        raise missing(path)


def missing(path: str) -> FileNotFoundError:
    """The error for a path where nothing is. I/O: none."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


@contextmanager
def as_os_errors(path: str) -> Iterator[None]:
    """Raise this package's errors as those that users of file systems expect. I/O: none.

    Raises
    ------
    FileNotFoundError
        The data store does not have it.
    PermissionError
        The credentials are missing, wrong, or not allowed to read it.
    """
    try:
        yield
    except NotFoundError as error:
        raise missing(path) from error
    except AccessDeniedError as error:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path) from error
