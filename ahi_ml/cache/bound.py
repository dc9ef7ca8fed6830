"""How a process keeps a cache below its bound: when it looks, and at which folders.

There is no shared account, which a crash could falsify. Whoever has written a part of a folder's share owes a look at a
folder, at any: looks go round, each at as many folders as speak for all (see `eviction.look`), which are all of them
when entries are few. So a process looks at each folder once while it writes that part of the bound, whatever the sizes.
"""

from __future__ import annotations

import threading
import time
from random import Random

from ahi_ml.cache.eviction import evict, look

__all__ = ["FOLDERS", "Watch"]

FOLDERS = 256
_LOOK_AFTER = 1 / 32  # of a share written by one process
_ABOVE = 29 / 32  # of a share: two writers that have not looked yet, and what they write during a look, stay below it
_DOWN_TO = 0.9


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
        self._next = chance.randrange(FOLDERS)
        self._looking = False

    def wrote(self, size: int) -> int:
        """Count what was written, and look when it was enough; return how many entries that removed.

        I/O: now and then, lists folders and removes files; see `eviction`.

        Raises
        ------
        OSError
            A folder cannot be listed.
        """
        with self._lock:
            self._owed = min(FOLDERS, self._owed + size * FOLDERS / (self._most_bytes * _LOOK_AFTER))
            if self._owed < 1 or self._looking:
                return 0
            self._looking = True
        removed = 0
        try:
            while self._owed >= 1:
                removed += self._look()
        finally:
            self._looking = False
        return removed

    def _look(self) -> int:
        """Look at the folders whose turn it is."""
        looked = 1  # one that cannot be listed is passed by: its turn comes again
        try:
            folders = (f"{self._entries}{number % FOLDERS:02x}" for number in range(self._next, self._next + FOLDERS))
            seen = look(folders, now=time.time())
            looked = seen.folders
            share = self._most_bytes * looked / FOLDERS
            return evict(seen, above=int(share * _ABOVE), down_to=int(share * _DOWN_TO))
        finally:
            with self._lock:
                self._next += looked
                self._owed -= looked
