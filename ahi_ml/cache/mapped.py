"""Entries that a process reads over and over, mapped into its memory: reading one again is no system call.

Only where that is safe. A page of a mapped file that the system cannot bring ends the process instead of raising, and
on network file systems that happens when another machine deletes the file. On the local ones named here the pages
outlive it, and nothing shortens an entry in its place. Elsewhere, and on other systems than Linux, files are read.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Hashable
from random import Random
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from ahi_ml.cache.pages import Shelf, is_full

__all__ = ["MappedEntries", "may_map"]

_LOCAL = frozenset({"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"})
_TAKE_PLACE = 1 / 32  # of those that find no room: data that does not fit must not be mapped anew all the time
_SHELVES = 16  # forms of entries; those of others lie by themselves

Entry = TypeVar("Entry")


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
        self._shelves: WeakValueDictionary[Hashable, Shelf] = WeakValueDictionary()  # their entries keep them
        self._lock = threading.Lock()
        self._random = Random()
        self.get = self._entries.get

    def room(self, most_bytes: int) -> bool:
        """Whether one more should be mapped: there is room, or it is its turn to take the place of others."""
        if not is_full() and self._bytes < most_bytes:
            return True
        return bool(self._places) and self._random.random() < _TAKE_PLACE

    def shelf(self, dtype: np.dtype[Any], shape: tuple[int, ...], start: int) -> Shelf | None:
        """Where entries are mapped that hold arrays of a form; None where they cannot lie side by side. I/O: none."""
        form = dtype.str, shape, start
        with self._lock:
            shelf = self._shelves.get(form)
            if shelf is None and len(self._shelves) < _SHELVES:
                try:
                    shelf = self._shelves[form] = Shelf(dtype, shape, start)
                except (OSError, ValueError):
                    return None
            return shelf

    def add(self, key: Hashable, path: str, entry: Entry, size: int, most_bytes: int) -> None:
        """Keep an entry of some bytes; the oldest go when there is no room."""
        with self._lock:
            self._forget(path)
            if self._places and is_full():
                self._forget(next(iter(self._places)))
            while self._places and self._bytes + size > most_bytes:
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
