"""``s3://`` URIs as folders: buckets are folders under one root, one bucket name is this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ahi_ml.errors import LocalStoreError

__all__ = ["MACHINE_BUCKET", "UriMap"]

MACHINE_BUCKET = "this-machine"
"""Bucket whose keys are absolute paths of the machine the embedded store runs on."""


@dataclass(frozen=True, slots=True)
class UriMap:
    """Where the objects of ``s3://bucket/key`` lie.

    Parameters
    ----------
    root : Path
        Folder that holds one folder for each bucket.
    """

    root: Path

    def base(self, uri: str) -> tuple[Path, str]:
        """The folder of a URI's bucket, and its key. I/O: none.

        Raises
        ------
        LocalStoreError
            Not an ``s3://`` URI, or a key that leaves its bucket.
        """
        if not uri.startswith("s3://"):
            raise LocalStoreError(f"not an s3:// URI: {uri!r}")
        bucket, _, key = uri[5:].partition("/")
        if ".." in key.split("/") or "\0" in key or bucket.startswith("."):
            raise LocalStoreError("the key of an s3:// URI leaves its bucket")
        if bucket != MACHINE_BUCKET and key.startswith("/"):
            raise LocalStoreError("the key of an s3:// URI leaves its bucket")
        if bucket == MACHINE_BUCKET:
            return Path(os.path.abspath(os.sep)), key
        return self.root / bucket, key

    def folder(self, uri: str) -> Path:
        """The folder that a URI names. I/O: none."""
        base, key = self.base(uri)
        return base / key

    def files(self, uri: str) -> Iterator[tuple[str, Path]]:
        """Yield key and path of every file whose key begins with the URI's, sorted.

        I/O: walks folders. As on S3 the key is a prefix: without a ``/`` at its end it also matches
        siblings that begin with the same text. Links to folders are not followed, and what is no
        file (a pipe, a link to nowhere) is no object.
        """
        base, prefix = self.base(uri)
        parent, _, stem = prefix.rpartition("/")
        top = base / parent
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
                            yield path.relative_to(base).as_posix(), path
            elif entry.is_file():
                yield Path(entry.path).relative_to(base).as_posix(), Path(entry.path)
