"""What goes when the cache is full: the entries used longest ago, of a folder or of all. No state.

An entry's modification time is when it was last used. Other processes evict, clear and write at the same
time; whatever is gone when its turn comes is skipped, and so is what the system holds on to (an open file, on Windows).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

__all__ = ["PART", "STALE_S", "Found", "evict", "found_in", "remove"]

PART = ".part"  # how the names of unfinished files end
STALE_S = 3600.0  # after which nobody writes to one any more


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


def evict(folders: list[str], *, above: int, down_to: int, now: float) -> int:
    """Make room in some folders taken together.

    I/O: lists them, removes files.

    Parameters
    ----------
    folders : list of str
        Where to look.
    above, down_to : int
        Bytes: nothing goes until more than `above` are there, then the oldest until `down_to` are left.
    now : float
        Seconds since the epoch.

    Returns
    -------
    int
        How many entries went. Unfinished files that were abandoned go as well, uncounted.
    """
    entries, total = [], 0
    for folder in folders:
        for found in found_in(folder):
            if found.path.endswith(PART):
                if now - found.used > STALE_S:
                    remove(found.path)
                continue
            entries.append(found)
            total += found.size
    removed = 0
    if total > above:
        entries.sort()
        for found in entries:
            if total <= down_to:
                break
            removed += remove(found.path)
            total -= found.size
    return removed
