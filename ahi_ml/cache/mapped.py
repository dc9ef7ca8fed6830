"""Entries that a process reads over and over, mapped into its memory: reading one again is no system call.

Only where that is safe. A page of a mapped file that the system cannot bring ends the process instead of raising, and
on network file systems that happens when another machine deletes the file. On the local ones named here the pages
outlive it, and nothing shortens an entry in its place. Elsewhere, and on other systems than Linux, files are read.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Hashable
from functools import lru_cache
from random import Random
from typing import Any, Generic, TypeVar

import numpy as np

from ahi_ml.types import AnyArray

__all__ = ["MappedEntries", "map_file", "may_map"]

_LOCAL = frozenset({"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"})
_MOST = 16_384  # entries: Linux lets a process have 65,530 mappings
_TAKE_PLACE = 1 / 32  # of those that find no room: data that does not fit must not be mapped anew all the time
_PROT_READ, _MAP_SHARED, _MAP_FAILED = 1, 1, ctypes.c_void_p(-1).value

Entry = TypeVar("Entry")


@lru_cache(maxsize=1)
def _libc() -> Any:
    # Python's own mmap keeps a descriptor open for each mapping, and a process may often have 1,024 of those.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


class _Pages:
    """The pages of a file, until the last array over them is gone."""

    __slots__ = ("_address", "_size", "_unmap")

    def __init__(self, descriptor: int, size: int) -> None:
        libc = _libc()
        self._unmap, self._size, self._address = libc.munmap, size, None
        address = libc.mmap(None, size, _PROT_READ, _MAP_SHARED, descriptor, 0)
        if address in (None, _MAP_FAILED):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._address = address

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "shape": (self._size,), "typestr": "|u1", "data": (self._address, True)}

    def __del__(self) -> None:
        if self._address is not None:
            self._unmap(self._address, self._size)


def map_file(descriptor: int, size: int) -> AnyArray:
    """Return a file's bytes as a read-only array, good after the file is closed and deleted.

    I/O: one call; bytes are read when they are looked at.

    Raises
    ------
    OSError
        The system refuses.
    """
    return np.asarray(_Pages(descriptor, size))


def may_map(folder: str) -> bool:
    """Whether files of a folder may be mapped: it lies on a local file system. I/O: reads the list of mounts."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        device = os.stat(folder).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                mount, _, system = line.partition(" - ")
                if mount.split()[2] == wanted:
                    return system.split()[0] in _LOCAL
    except (OSError, IndexError):
        pass
    return False


class MappedEntries(Generic[Entry]):
    """The mapped entries of a folder, bounded. Threads share it.

    The space of a deleted file is free only when it is not mapped any more. So whoever deletes says so here, and an
    entry is let go whenever its file is read again, or is found to be gone.

    Attributes
    ----------
    get : callable
        Returns the entry of a key, or None.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, Entry] = {}
        self._places: dict[str, tuple[Hashable, int]] = {}  # by path, the oldest first: key and bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._random = Random()
        self.get = self._entries.get

    def room(self, most_bytes: int) -> bool:
        """Whether one more should be mapped: there is room, or it is its turn to take the place of others."""
        return (len(self._places) < _MOST and self._bytes < most_bytes) or self._random.random() < _TAKE_PLACE

    def add(self, key: Hashable, path: str, entry: Entry, size: int, most_bytes: int) -> None:
        """Keep an entry of some bytes; the oldest go when there is no room."""
        with self._lock:
            self._forget(path)
            while self._places and (len(self._places) >= _MOST or self._bytes + size > most_bytes):
                self._forget(next(iter(self._places)))
            self._entries[key], self._places[path] = entry, (key, size)
            self._bytes += size

    def forget(self, path: str) -> None:
        """Let an entry go, if it is there."""
        if path in self._places:
            with self._lock:
                self._forget(path)

    def _forget(self, path: str) -> None:
        known = self._places.pop(path, None)
        if known is not None:
            key, size = known
            self._entries.pop(key, None)
            self._bytes -= size

    def clear(self) -> None:
        """Let all go."""
        with self._lock:
            self._entries.clear()
            self._places.clear()
            self._bytes = 0
