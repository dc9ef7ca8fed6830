"""``s3://`` URIs: folders under one root, this machine's own files, or S3 itself where that is switched on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from ahi_ml.errors import LocalStoreError

__all__ = ["MACHINE_BUCKET", "Bucket", "InputFile", "UriMap"]

MACHINE_BUCKET = "this-machine"
"""Bucket whose keys are absolute paths of the machine the embedded store runs on."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """An object that a job may read.

    Parameters
    ----------
    key : str
        Its key in the bucket.
    size : int
        Bytes.
    open : callable
        Opens it for reading; raises OSError.
    """

    key: str
    size: int
    open: Callable[[], IO[bytes]]


class Bucket(Protocol):
    """Where the objects of one bucket lie. What fails raises OSError."""

    def files(self, prefix: str) -> Iterator[InputFile]:
        """Yield the objects whose keys begin with `prefix`, sorted. I/O: lists them."""
        ...

    def check_writable(self, prefix: str) -> None:
        """Raise when nothing can be written there. I/O: as little as shows it."""
        ...

    def write(self, key: str, text: str) -> None:
        """Write an object, whole or not at all. I/O: one object."""
        ...


@dataclass(frozen=True, slots=True)
class _FolderBucket:
    """A bucket that is a folder."""

    base: Path

    def files(self, prefix: str) -> Iterator[InputFile]:
        # As on S3 the key is a prefix: without a "/" at its end it also matches siblings that begin with
        # the same text. Links to folders are not followed, and what is no file (a pipe, a link to nowhere)
        # is no object.
        if not self.base.is_dir():
            raise FileNotFoundError(
                f"there is no bucket {self.base.name}: neither a folder of that name under s3/ in the store's folder, "
                "nor is S3 itself switched on (local.configure)"
            )
        parent, _, stem = prefix.rpartition("/")
        top = self.base / parent
        if not top.is_dir():
            return
        for entry in sorted(os.scandir(top), key=lambda entry: entry.name):
            if not entry.name.startswith(stem):
                continue
            if entry.is_dir(follow_symlinks=False):
                for folder, names, files in os.walk(entry.path):
                    names.sort()
                    for file in sorted(files):
                        path = Path(folder, file)
                        if path.is_file():
                            yield self._file(path)
            elif entry.is_file():
                yield self._file(Path(entry.path))

    def _file(self, path: Path) -> InputFile:
        return InputFile(path.relative_to(self.base).as_posix(), path.stat().st_size, lambda: open(path, "rb"))

    def check_writable(self, prefix: str) -> None:
        (self.base / prefix).mkdir(parents=True, exist_ok=True)

    def write(self, key: str, text: str) -> None:
        path = self.base / key
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


@dataclass(frozen=True, slots=True)
class UriMap:
    """Where the objects of ``s3://bucket/key`` lie.

    Parameters
    ----------
    root : Path
        Folder that holds one folder for each bucket.
    s3 : callable, optional
        Makes the bucket of a name that has no folder; without it every bucket is a folder.
    """

    root: Path
    s3: Callable[[str], Bucket] | None = None

    def find(self, uri: str) -> tuple[Bucket, str]:
        """The bucket of a URI, and its key. I/O: looks whether there is a folder.

        Raises
        ------
        LocalStoreError
            Not an ``s3://`` URI, or a key that leaves its bucket.
        """
        if not uri.startswith("s3://"):
            raise LocalStoreError(f"not an s3:// URI: {uri!r}")
        name, _, key = uri[5:].partition("/")
        if ".." in key.split("/") or "\0" in key or name.startswith("."):
            raise LocalStoreError("the key of an s3:// URI leaves its bucket")
        if name == MACHINE_BUCKET:
            return _FolderBucket(Path(os.path.abspath(os.sep))), key
        if self.s3 is not None and not (self.root / name).is_dir():
            return self.s3(name), key
        if key.startswith("/"):
            raise LocalStoreError("the key of an s3:// URI leaves its bucket")
        return _FolderBucket(self.root / name), key
