"""Who downloads a frame, among the processes of a machine: byte-range locks on one file of the cache folder.

POSIX record locks belong to a process: the kernel drops them when it dies, however it dies, and a forked child
has none of its parent's. (Locks of an open file description would live on in every worker forked while they are
held.) They have two rules of their own, kept here: within a process they keep nobody out, so a table says who
holds what; and closing any descriptor of the file drops them all, so each process opens it once, whatever number of
caches it has, and never closes it.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
from dataclasses import dataclass, field

from ahi_ml.cache.folder import CacheFolder
from ahi_ml.perprocess import PerProcess

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, place: int) -> None:
        os.lseek(descriptor, place, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _unlock(descriptor: int, place: int) -> None:
        os.lseek(descriptor, place, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

    _HELD_ELSEWHERE = (errno.EACCES, errno.EDEADLK)
else:
    import fcntl

    def _lock(descriptor: int, place: int) -> None:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)

    def _unlock(descriptor: int, place: int) -> None:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, place)

    _HELD_ELSEWHERE = (errno.EACCES, errno.EAGAIN)

__all__ = ["Claims"]

_LOG = logging.getLogger(__name__)
_STRIPES = 1 << 20


@dataclass(slots=True)
class _LockFile:
    """One process's hold on one lock file."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    descriptor: int | None = None
    refused: bool = False
    names: set[str] = field(default_factory=set)
    stripes: dict[int, int] = field(default_factory=dict)  # how many names hold each


@dataclass(slots=True)
class _LockFiles:
    """Every lock file of one process, by its path: see the module for why it is not an attribute of a cache."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    files: dict[str, _LockFile] = field(default_factory=dict)

    def get(self, path: str) -> _LockFile:
        with self.lock:
            return self.files.setdefault(path, _LockFile())


_PROCESS = PerProcess(_LockFiles)


class Claims:
    """Claims on names, held by at most one thread among all processes that share a cache folder.

    A convenience, like the cache: where the file system has no locks or the folder cannot be written, every claim
    succeeds (several may download the same frame then) and one line in the log says so. Two names may
    share a lock: a claim may fail for a name that nobody holds, as if somebody did for a moment.

    Parameters
    ----------
    folder : CacheFolder
        Where the lock file lies.

    I/O: none until used.
    """

    def __init__(self, folder: CacheFolder) -> None:
        self._folder = folder
        self._path: str | None = None

    def __reduce__(self) -> tuple[type[Claims], tuple[CacheFolder]]:
        return Claims, (self._folder,)

    def try_claim(self, name: str) -> bool:
        """Claim a name without waiting.

        I/O: one system call; the first time, makes the folder and the file.

        Parameters
        ----------
        name : str
            Hexadecimal, such as `FrameCache.name` gives.

        Returns
        -------
        bool
            Whether the caller has it, until it calls `release` or its process ends. Another thread of the
            same process that has it counts as somebody else.

        Raises
        ------
        CacheError
            Others can look into the folder.
        """
        file = self._file()
        stripe = int(name[:8], 16) % _STRIPES
        with file.lock:
            if name in file.names:
                return False
            held = file.stripes.get(stripe, 0)
            if not held and not self._lock(file, stripe):
                return False
            file.names.add(name)
            file.stripes[stripe] = held + 1
        return True

    def release(self, name: str) -> None:
        """Give a claimed name back; others that were not claimed in this process are ignored. I/O: one system call."""
        file = self._file()
        stripe = int(name[:8], 16) % _STRIPES
        with file.lock:
            if name not in file.names:
                return
            file.names.discard(name)
            file.stripes[stripe] -= 1
            if file.stripes[stripe]:
                return
            del file.stripes[stripe]
            if file.descriptor is not None:
                try:
                    _unlock(file.descriptor, stripe)
                except OSError as error:
                    self._without(file, error)

    def _file(self) -> _LockFile:
        if self._path is None:
            self._path = os.path.join(os.path.realpath(self._folder.path), "locks")  # one file, by whatever name
        return _PROCESS.get().get(self._path)

    def _lock(self, file: _LockFile, stripe: int) -> bool:
        """Whether a stripe is now this process's, or cannot be anybody's."""
        try:
            if file.descriptor is None:
                file.descriptor = self._open()
            _lock(file.descriptor, stripe)
        except OSError as error:
            if file.descriptor is not None and error.errno in _HELD_ELSEWHERE:
                return False
            self._without(file, error)
        return True

    def _open(self) -> int:
        if self._folder.state().disabled:
            raise OSError(errno.EROFS, "the cache is not written to")
        self._folder.prepare()
        assert self._path is not None
        return os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), self._folder.file_mode)

    def _without(self, file: _LockFile, error: OSError) -> None:
        if not file.refused:
            file.refused = True
            _LOG.info("no locks on %s (%s): processes may download the same frame at the same time", self._path, error)
