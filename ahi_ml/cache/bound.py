"""The bound of a cache, and how a process keeps it: when it looks, and at which folders.

There is no shared account, which a crash could falsify. Whoever has written a part of a folder's share owes a look at a
folder, at any: looks go round, each at as many folders as speak for all (see `eviction.look`), which are all of them
when entries are few. So a process looks at each folder once while it writes that part of the bound, whatever the sizes.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from random import Random

from ahi_ml.cache.eviction import evict, look

__all__ = ["MOST_BYTES", "Watch", "default_bound"]

MOST_BYTES = 50 * 10**9  # by default
_FOLDERS = 256
_LOOK_AFTER = 1 / 32  # of a share written by one process
_ABOVE = 29 / 32  # of a share: two writers that have not looked yet, and what they write during a look, stay below it
_DOWN_TO = 0.9


def _round(entries: str, first: int) -> Iterator[str]:
    """The folders of entries, from one of them on."""
    return (f"{entries}{number % _FOLDERS:02x}" for number in range(first, first + _FOLDERS))


def default_bound(folder: str, entries: str) -> int:
    """Half of what is free on the disk and what the cache holds already, and 50 GB at most.

    What it holds counts, since its bound must not shrink as it grows. In a cache of many entries that is worked out
    from a part of them, within some percent.

    I/O: asks for the disk's free space; unless that is plenty, lists some folders, see `eviction.look`.

    Parameters
    ----------
    folder : str
        Of the cache.
    entries : str
        The folder of the folders of entries, with a separator at its end.

    Raises
    ------
    OSError
        One of these cannot be looked at.
    """
    free = shutil.disk_usage(folder).free
    if free >= 2 * MOST_BYTES:
        return MOST_BYTES
    seen = look(_round(entries, 0), now=time.time())
    held = seen.size * _FOLDERS // seen.folders
    return max(1, min(MOST_BYTES, (free + held) // 2))


class Watch:
    """What one process owes to the bound of a cache. Threads share it.

    Parameters
    ----------
    entries : str
        The folder of the folders of entries, with a separator at its end.
    most_bytes : int
        The bound.

    I/O: none until `wrote`.
    """

    def __init__(self, entries: str, most_bytes: int) -> None:
        self._entries, self._most_bytes = entries, most_bytes
        self._lock = threading.Lock()
        chance = Random()
        # The first look comes after a random part, so that many short runs look as often as a long one.
        self._owed = chance.random()
        self._next = chance.randrange(_FOLDERS)
        self._looking = False

    def wrote(self, size: int) -> list[str]:
        """Count what was written, and look when it was enough; return the paths of entries that this removed.

        I/O: now and then, lists folders and removes files; see `eviction`.

        Raises
        ------
        OSError
            A folder cannot be listed.
        """
        with self._lock:
            self._owed = min(_FOLDERS, self._owed + size * _FOLDERS / (self._most_bytes * _LOOK_AFTER))
            if self._owed < 1 or self._looking:
                return []
            self._looking = True
        removed: list[str] = []
        try:
            while self._owed >= 1:
                removed += self._look()
        finally:
            self._looking = False
        return removed

    def _look(self) -> list[str]:
        """Look at the folders whose turn it is."""
        looked = 1  # one that cannot be listed is passed by: its turn comes again
        try:
            seen = look(_round(self._entries, self._next), now=time.time())
            looked = seen.folders
            share = self._most_bytes * looked / _FOLDERS
            return evict(seen, above=int(share * _ABOVE), down_to=int(share * _DOWN_TO))
        finally:
            with self._lock:
                self._next += looked
                self._owed -= looked
