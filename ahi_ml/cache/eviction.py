"""What goes when the cache is full: the entries used longest ago, of as many folders as speak for all. No state.

An entry's modification time is when it was last used, or some ten minutes before (see `cache.marks`). Other processes
evict, clear and write at the same time; whatever is gone when its turn comes is skipped, and so is what the system
holds on to (an open file, on Windows).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

__all__ = ["PART", "STALE_S", "Found", "Seen", "evict", "found_in", "look", "remove"]

PART = ".part"  # how the names of unfinished files end
STALE_S = 3600.0  # after which nobody writes to one any more
_ENOUGH = 2048  # entries of one size: what so many take differs from their share by 2 % (a standard deviation)
_MOST = 1 << 17  # entries, whatever their sizes: a listing of some tenths of a second


class Found(NamedTuple):
    """A file of the cache; sorts by when it was last used."""

    used: float
    path: str
    size: int


def found_in(folder: str) -> Iterator[Found]:
    """Yield the files of one folder. I/O: lists it with sizes; nothing when it is not there."""
    try:
        listing = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with listing:
        for entry in listing:
            with suppress(FileNotFoundError):
                status = entry.stat()
                yield Found(status.st_mtime, entry.path, status.st_size)


def remove(path: str) -> bool:
    """Delete a file; say whether it was there to be deleted."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


class Seen(NamedTuple):
    """What some folders hold: their entries, the bytes of these, and how many folders that are."""

    entries: list[Found]
    size: int
    folders: int


def look(folders: Iterable[str], *, now: float) -> Seen:
    """Look at folders, one after the other, until what they hold speaks for all of them.

    Names are hashes, so every folder has the same share of the entries, give or take chance; and chance is large where
    entries are few, or a few of them take most of the space. Both show in the sizes themselves.

    I/O: lists the folders with sizes, removes unfinished files that were abandoned.

    Parameters
    ----------
    folders : iterable of str
        Where to look; all of them when the cache holds little, or few large entries.
    now : float
        Seconds since the epoch.
    """
    entries, size, squares, looked = [], 0, 0, 0
    for folder in folders:
        looked += 1
        for found in found_in(folder):
            if found.path.endswith(PART):
                if now - found.used > STALE_S:
                    remove(found.path)
                continue
            entries.append(found)
            size += found.size
            squares += found.size**2
        # The variance of a sum of random terms is about the sum of their squares.
        if 0 < _ENOUGH * squares <= size**2 or len(entries) >= _MOST:
            break
    return Seen(entries, size, looked)


def evict(seen: Seen, *, above: int, down_to: int) -> list[str]:
    """Make room in some folders taken together; return the paths of entries that went.

    I/O: removes files.

    Parameters
    ----------
    seen : Seen
        What they hold.
    above, down_to : int
        Bytes: nothing goes until more than `above` are there, then the oldest until `down_to` are left.
    """
    if seen.size <= above:
        return []
    removed, left = [], seen.size
    for found in sorted(seen.entries):
        if left <= down_to:
            break
        if remove(found.path):
            removed.append(found.path)
        left -= found.size
    return removed
