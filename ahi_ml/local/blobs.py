"""Content-addressed blobs of the embedded store: encoded frames as files named by their hash.

The same bytes are stored once however many frames share them. A reader sees a whole blob or none:
each is written beside its place and moved there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

__all__ = ["BlobStore"]

_STALE_S = 3600.0
_OLD = os.O_RDONLY | getattr(os, "O_BINARY", 0)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


class BlobStore:
    """Blobs under one folder, in sixteen: a new store of a few hundred files would spend a twentieth on making 256.

    Parameters
    ----------
    root : Path
        Created, private to the user, when absent. I/O: creates the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()  # a blob found here by `put` is not one that `sweep` is about to delete
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where the blob named `digest` lies. I/O: none."""
        return self.root / digest[:1] / digest[1:]

    def put(self, data: bytes) -> str:
        """Store bytes and return their name. I/O: one small file, unless the blob is there."""
        digest = hashlib.blake2b(data, digest_size=20).hexdigest()
        folder = f"{self.root}/{digest[:1]}"
        path = f"{folder}/{digest[1:]}"
        with self._lock, contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_size == len(data):
                os.utime(path)  # young again: `sweep` spares what an import is about to refer to
                return digest
        temporary = f"{folder}/.{digest[1:]}.{os.getpid()}.{time.monotonic_ns()}"
        try:
            descriptor = os.open(temporary, _NEW, 0o600)
        except FileNotFoundError:  # the first of its folder
            os.makedirs(folder, mode=0o700, exist_ok=True)
            descriptor = os.open(temporary, _NEW, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        return digest

    def read(self, digest: str) -> bytes:
        """Return a blob whole. I/O: one file.

        Raises
        ------
        FileNotFoundError
            No such blob.
        """
        # One open, one read: half the cost of pathlib's way, and this is the server's hot path.
        try:
            descriptor = os.open(f"{self.root}/{digest[:1]}/{digest[1:]}", _OLD)
        except FileNotFoundError:  # stores of earlier versions have 256 folders
            descriptor = os.open(f"{self.root}/{digest[:2]}/{digest[2:]}", _OLD)
        try:
            size = os.fstat(descriptor).st_size
            data = os.read(descriptor, size)
            while len(data) < size:  # a short read is allowed for large files
                more = os.read(descriptor, size - len(data))
                if not more:
                    break
                data += more
            return data
        finally:
            os.close(descriptor)

    def sweep(self, referenced: Iterable[str], *, older_than_s: float = _STALE_S) -> int:
        """Delete blobs nobody refers to, and abandoned temporary files; return how many.

        I/O: lists every folder. Files younger than `older_than_s` are left alone: an import that
        runs now writes its blobs before it commits the frames that name them.
        """
        keep = set(referenced)
        limit = time.time() - older_than_s
        removed = 0
        for folder in self.root.iterdir():
            for file in folder.iterdir():
                if folder.name + file.name in keep:
                    continue
                # What is not there is a temporary file that has just found its place.
                with self._lock, contextlib.suppress(FileNotFoundError):
                    if file.stat().st_mtime <= limit:
                        file.unlink()
                        removed += 1
        return removed
