"""`FrameCache`: what readers, data stores and command lines see of the cache."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from ahi_ml.cache.derived import DerivedTier
from ahi_ml.cache.entries import CacheEntry, encoded_header, is_whole, parse_encoded
from ahi_ml.cache.eviction import PART, STALE_S, remove
from ahi_ml.cache.folder import CacheFolder
from ahi_ml.cache.locks import Claims
from ahi_ml.types import Buffer

__all__ = ["FrameCache"]


class FrameCache:
    """Encoded frames and results derived from them under one folder, shared by threads and processes.

    Parameters
    ----------
    folder : Path
        Made on first write, private to the user.
    max_bytes : int, optional
        Bound of its size, for all tiers together: by default 50 GB, or half of what is free on the disk if that
        is less. Before it is passed, entries used longest ago go, until a tenth is free. More than two processes
        that fill it at once may pass it for a moment, by a 32nd each.
    private : bool
        Whether to refuse a folder that other users can look into. With False, what is written follows the umask.

    I/O: none until used.

    Attributes
    ----------
    claims : Claims
        Who downloads what, among all processes of this machine that share the folder.

    Raises
    ------
    ConfigError
        A bound that is not positive.
    """

    def __init__(self, folder: Path, *, max_bytes: int | None = None, private: bool = True) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._folder = CacheFolder(folder, max_bytes=max_bytes, private=private)
        self.claims = Claims(self._folder)

    def __repr__(self) -> str:
        stats = self._folder.stats()
        return f"<FrameCache {str(self.folder)!r}: {stats['hits']:,} hits, {stats['misses']:,} misses>"

    def name(self, datastore_id: str, frame_id: str) -> str:
        """Return the opaque name of a frame, for `claims`. I/O: none."""
        return hashlib.blake2b(f"{datastore_id}\0{frame_id}".encode(), digest_size=16).hexdigest()

    def _path(self, datastore_id: str, frame_id: str) -> str:
        return self._folder.place(self.name(datastore_id, frame_id))

    def derived(self, datastore_id: str, recipe: str) -> DerivedTier:
        """Return the tier of results of one recipe; see `DerivedTier`. Made once a dataset. I/O: none."""
        return DerivedTier(self._folder, datastore_id, recipe)

    def get(self, datastore_id: str, frame_id: str) -> CacheEntry | None:
        """The cached frame, or None.

        I/O: one file; a damaged one is deleted and counted. Every byte is checked: a decoder would not notice, and
        the check takes a hundredth of the decoding.

        Raises
        ------
        CacheError
            Others can look into the folder.
        """
        folder = self._folder
        path = self._path(datastore_id, frame_id)
        try:
            folder.check_private()
            with open(path, "rb", buffering=0) as file:
                raw = file.read()
                used = os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            folder.count(misses=1)
            return None
        except OSError as error:
            folder.disable(error)
            folder.count(misses=1)
            return None
        entry = parse_encoded(raw)
        if entry is None:
            folder.drop(path)
            folder.count(corrupt=1, misses=1)
            return None
        folder.touch(path, used)
        folder.count(hits=1, bytes=len(entry.data))
        return entry

    def put(self, datastore_id: str, frame_id: str, data: Buffer, *, verified: bool) -> None:
        """Store a frame.

        I/O: one file; when the disk refuses, one warning and no more writes from then on. Now and then a listing
        and removals, to stay below the bound.

        Raises
        ------
        CacheError
            Others can look into the folder.
        """
        self._folder.write(self.name(datastore_id, frame_id), encoded_header(data, verified=verified), data)

    def drop(self, datastore_id: str, frame_id: str) -> None:
        """Forget a frame, if it is there. I/O: removes one file."""
        self._folder.drop(self._path(datastore_id, frame_id))

    def stats(self) -> dict[str, int]:
        """Counts of this process, see `CacheStats`. I/O: none."""
        return self._folder.stats()

    def size(self) -> tuple[int, int]:
        """Number and bytes of the entries of all tiers. I/O: lists the folder."""
        sizes = [found.size for found in self._folder.files() if not found.path.endswith(PART)]
        return len(sizes), sum(sizes)

    def clear(self, *, older_than_s: float = 0.0) -> int:
        """Delete entries not used for a while, and abandoned temporary files; return how many.

        I/O: lists the folder, removes files.
        """
        now = time.time()
        removed = 0
        for found in self._folder.files():
            age = STALE_S if found.path.endswith(PART) else older_than_s
            if now - found.used >= age:
                removed += remove(found.path)
        return removed

    def verify(self) -> dict[str, int]:
        """Read every entry and delete the damaged ones.

        I/O: reads the whole cache, one entry at a time; what is used longest ago does not change.

        Returns
        -------
        dict
            ``entries`` and ``bytes`` looked at, ``corrupt`` of them deleted, ``unreadable`` ones left alone.

        Raises
        ------
        CacheError
            Others can look into the folder.
        """
        counts = dict.fromkeys(("entries", "bytes", "corrupt", "unreadable"), 0)
        for found in self._folder.files():
            if found.path.endswith(PART):
                continue
            self._folder.check_private()
            try:
                with open(found.path, "rb", buffering=0) as file:
                    raw = file.read()
            except FileNotFoundError:  # evicted just now
                continue
            except OSError:
                counts["unreadable"] += 1
                continue
            counts["entries"] += 1
            counts["bytes"] += len(raw)
            if not is_whole(raw):
                counts["corrupt"] += remove(found.path)
        if counts["corrupt"]:
            self._folder.count(corrupt=counts["corrupt"])
        return counts
