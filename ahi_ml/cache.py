"""The frame cache: encoded frames on disk, one file each, found by an opaque name. Floor 2.

Readers see whole entries or none: an entry is written beside its place and moved there. A header
holds its length and CRC, so one torn by a power cut is noticed and dropped. The cache is a
convenience: a full disk or a read-only folder costs one warning, never a run.

It is bounded without any shared account, which a crash could falsify: names are hashes, so each of the
256 folders holds its share, and whoever has written a part of a folder's share looks at that folder and
removes what was used longest ago. (Small caches are looked at whole: their shares would be too few entries.)
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ahi_ml.codec import crc32
from ahi_ml.errors import CacheError, ConfigError
from ahi_ml.perprocess import PerProcess
from ahi_ml.types import Buffer

__all__ = ["CacheEntry", "CacheStats", "FrameCache"]

_LOG = logging.getLogger(__name__)
_MAGIC = b"AHIF"
_FORMAT = 1
_HEADER = struct.Struct("<4sHHIQ8x")  # magic, format, flags, CRC of the payload, its length
_HEADER_CRC = struct.Struct("<I")  # of the header: a flipped flag must not make a frame a verified one
_START = _HEADER.size + _HEADER_CRC.size
_VERIFIED = 1
_STALE_S = 3600.0
_MOST_BYTES = 50 * 10**9
_FOLDERS = 256
_WHOLE_BELOW = 4 * 10**9  # bytes: a listing of such a cache takes a fraction of a second
_LOOK_AFTER = 1 / 32  # of a share written: how far past its bound one process can bring the cache
_DOWN_TO = 0.9
_TOUCH_AFTER_S = 60.0


@dataclass(slots=True)
class CacheStats:
    """Counts since the cache was opened in this process."""

    hits: int = 0
    misses: int = 0
    writes: int = 0
    corrupt: int = 0
    evictions: int = 0


@dataclass(slots=True)
class _State:
    """What one process knows of a cache."""

    stats: CacheStats = field(default_factory=CacheStats)
    lock: threading.Lock = field(default_factory=threading.Lock)
    disabled: bool = False
    ready: bool = False
    private: bool = False
    most_bytes: int = 0
    written: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """A cached frame.

    Parameters
    ----------
    data : memoryview
        Its encoded bytes.
    verified : bool
        Whether its pixels were checked against the data store's checksum when it was written.
    """

    data: memoryview
    verified: bool


class FrameCache:
    """Encoded frames under one folder, shared by threads and processes.

    Parameters
    ----------
    folder : Path
        Made on first write, private to the user.
    max_bytes : int, optional
        Bound of its size: by default 50 GB, or half of what is free on the disk if that is less. When it is
        passed, entries used longest ago go, until a tenth is free.

    I/O: none until used.

    Raises
    ------
    ConfigError
        A bound that is not positive.
    """

    def __init__(self, folder: Path, *, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes <= 0:
            raise ConfigError(f"max_bytes must be positive, not {max_bytes}; cache=None reads without a cache")
        self.folder = folder
        self.max_bytes = max_bytes
        self._state = PerProcess(_State)

    def __repr__(self) -> str:
        stats = self._state.get().stats
        return f"<FrameCache {str(self.folder)!r}: {stats.hits:,} hits, {stats.misses:,} misses>"

    def __reduce__(self) -> tuple[Callable[..., FrameCache], tuple[Path, int | None]]:
        return _reopen, (self.folder, self.max_bytes)

    def _path(self, datastore_id: str, frame_id: str) -> str:
        name = hashlib.blake2b(f"{datastore_id}\0{frame_id}".encode(), digest_size=16).hexdigest()
        return f"{self.folder}{os.sep}frames{os.sep}{name[:2]}{os.sep}{name[2:]}"

    def get(self, datastore_id: str, frame_id: str) -> CacheEntry | None:
        """The cached frame, or None. I/O: one file; a damaged one is deleted and counted."""
        path = self._path(datastore_id, frame_id)
        try:
            self._check_private()
            with open(path, "rb", buffering=0) as file:
                data = file.read()
                if time.time() - os.fstat(file.fileno()).st_mtime > _TOUCH_AFTER_S:
                    with suppress(OSError):  # a read-only folder, or an eviction just now: the bytes are good
                        os.utime(path)  # the clock of "used longest ago"; rarely, because it costs a write
        except FileNotFoundError:
            self._count(misses=1)
            return None
        except OSError as error:
            self._disable(error)
            self._count(misses=1)
            return None
        if len(data) >= _START:
            magic, version, flags, checksum, length = _HEADER.unpack_from(data)
            (header_checksum,) = _HEADER_CRC.unpack_from(data, _HEADER.size)
            payload = memoryview(data)[_START:]
            if (
                magic == _MAGIC
                and version == _FORMAT
                and header_checksum == crc32(data[: _HEADER.size])
                and length == len(payload)
                and checksum == crc32(payload)
            ):
                self._count(hits=1)
                return CacheEntry(payload, bool(flags & _VERIFIED))
        self.drop(datastore_id, frame_id)
        self._count(corrupt=1, misses=1)
        return None

    def _count(self, **counts: int) -> None:
        state = self._state.get()
        with state.lock:
            for name, count in counts.items():
                setattr(state.stats, name, getattr(state.stats, name) + count)

    def put(self, datastore_id: str, frame_id: str, data: Buffer, *, verified: bool) -> None:
        """Store a frame. I/O: one file; when the disk refuses, one warning and no cache from then on."""
        if self._state.get().disabled:
            return
        header = _HEADER.pack(_MAGIC, _FORMAT, _VERIFIED if verified else 0, crc32(data), len(data))
        header += _HEADER_CRC.pack(crc32(header))
        path = self._path(datastore_id, frame_id)
        temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.part"
        try:
            self._prepare()
            try:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                with open(descriptor, "wb") as file:  # buffered: a raw write may stop short of a full disk's end
                    file.write(header)
                    file.write(data)
                os.replace(temporary, path)
            except BaseException:
                if os.path.exists(temporary):
                    os.unlink(temporary)
                raise
        except OSError as error:
            self._disable(error)
            return
        self._count(writes=1)
        self._look_after(path, _HEADER.size + len(data))

    def _look_after(self, path: str, size: int) -> None:
        """Evict from a folder once enough was written to it."""
        state = self._state.get()
        whole = state.most_bytes < _WHOLE_BELOW
        group = "*" if whole else os.path.basename(os.path.dirname(path))
        share = state.most_bytes if whole else state.most_bytes // _FOLDERS
        with state.lock:
            state.written[group] = state.written.get(group, 0) + size
            if state.written[group] < share * _LOOK_AFTER:
                return
            state.written[group] = 0
        try:
            self._evict(group, share)
        except OSError as error:  # another process evicts the same folder, or the disk is gone
            _LOG.debug("eviction stopped: %s", error)

    def _evict(self, group: str, share: int) -> None:
        entries, total, now = [], 0, time.time()
        for path in self.folder.glob(f"frames/{group}/*"):
            status = path.stat()
            if path.name.endswith(".part") and now - status.st_mtime < _STALE_S:
                continue
            entries.append((status.st_mtime, status.st_size, path))
            total += status.st_size
        if total <= share:
            return
        removed = 0
        for _, size, path in sorted(entries):
            path.unlink(missing_ok=True)
            removed += 1
            total -= size
            if total <= share * _DOWN_TO:
                break
        self._count(evictions=removed)

    def drop(self, datastore_id: str, frame_id: str) -> None:
        """Forget a frame, if it is there. I/O: removes one file."""
        try:
            os.unlink(self._path(datastore_id, frame_id))
        except FileNotFoundError:
            pass
        except OSError as error:
            self._disable(error)

    def stats(self) -> dict[str, int]:
        """Counts of this process: hits, misses, writes, corrupt, evictions. I/O: none."""
        state = self._state.get()
        with state.lock:
            return asdict(state.stats)

    def size(self) -> tuple[int, int]:
        """Number and bytes of the entries. I/O: lists the folder."""
        sizes = [found.st_size for path, found in self._files() if not path.name.endswith(".part")]
        return len(sizes), sum(sizes)

    def clear(self, *, older_than_s: float = 0.0) -> int:
        """Delete entries not written for a while, and abandoned temporary files; return how many.

        I/O: lists the folder, removes files.
        """
        now = time.time()
        removed = 0
        for path, found in self._files():
            age = _STALE_S if path.name.endswith(".part") else older_than_s
            if now - found.st_mtime >= age:
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.folder.glob("frames/*/*"):
            with suppress(FileNotFoundError):  # another process clears too
                yield path, path.stat()

    def _prepare(self) -> None:
        state = self._state.get()
        if state.ready:
            return
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_private()
        # Of what is free and what the cache holds already: its bound must not shrink as it grows.
        held = _FOLDERS * sum(path.stat().st_size for path in self.folder.glob("frames/00/*"))
        state.most_bytes = self.max_bytes or min(_MOST_BYTES, (shutil.disk_usage(self.folder).free + held) // 2)
        state.ready = True

    def _check_private(self) -> None:
        """Refuse a folder that others can look into, or plant images in."""
        state = self._state.get()
        if state.private:
            return
        status = self.folder.stat()
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(self.folder))
        mode = status.st_mode & 0o077
        if mode and os.name == "posix":
            raise CacheError(
                f"the cache folder {self.folder} can be read by other users (mode {mode:o}): it would show them "
                "images. Make it private (chmod 700) or name another with AHI_ML_CACHE"
            )
        state.private = True

    def _disable(self, error: OSError) -> None:
        state = self._state.get()
        with state.lock:
            if not state.disabled:
                state.disabled = True
                _LOG.warning("the frame cache %s is not used from here on: %s", self.folder, error)


def _reopen(folder: Path, max_bytes: int | None) -> FrameCache:
    return FrameCache(folder, max_bytes=max_bytes)
