"""Files in this process's memory: one by itself, or many side by side that numpy copies by one call. Linux only."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import numpy as np

from ahi_ml.types import AnyArray

__all__ = ["Shelf", "is_full", "map_file"]

_NO_ACCESS, _READ = 0, 1
_SHARED, _RESERVED, _THERE = 0x01, 0x22, 0x10  # MAP_SHARED, MAP_PRIVATE | MAP_ANONYMOUS, MAP_FIXED
_FAILED = ctypes.c_void_p(-1).value
_MOST_PLACES = 1 << 14
_MOST_ADDRESSES = 1 << 36  # a shelf; what is not used costs nothing,
_OF_A_LIMIT = 64  # unless addresses are limited: then it takes one in so many
_USUAL_MAPPINGS = 65_530  # that Linux lets a process have
_MAPPED: set[int] = (
    set()
)  # addresses of the files this process has mapped, of all caches: their number is the process's
_WIDEST = 8  # rows a place


@lru_cache(maxsize=1)
def _libc() -> Any:
    # Python's own mmap keeps a descriptor open for each mapping, and a process may often have 1,024 of those. Nor
    # does it map to a given address.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _mmap(address: int | None, size: int, access: int, kind: int, descriptor: int) -> int:
    found: int | None = _libc().mmap(address, size, access, kind, descriptor, 0)
    if found is None or found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found


@lru_cache(maxsize=1)
def _most_files() -> int:
    """How many files may be mapped: each is two mappings, itself and the gap behind it, and others need some too."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_bytes()) // 4
    except (OSError, ValueError):
        return _USUAL_MAPPINGS // 4


def is_full() -> bool:
    """Whether this process has mapped as many files as it should: at the system's bound nothing works any more.

    I/O: reads the bound, the first time.
    """
    return len(_MAPPED) >= _most_files()


def _most_addresses() -> int:
    import resource  # Linux has it

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return _MOST_ADDRESSES if limit == resource.RLIM_INFINITY else min(_MOST_ADDRESSES, limit // _OF_A_LIMIT)


class _Addresses:
    """Addresses of this process; somebody has them back when the last array over them is gone."""

    def __init__(self, first: int, size: int, give_back: Callable[[int, int], Any]) -> None:
        self._first, self._size, self._give_back = first, size, give_back

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "shape": (self._size,), "typestr": "|u1", "data": (self._first, True)}

    def __del__(self) -> None:
        self._give_back(self._first, self._size)


def _bytes(first: int, size: int, give_back: Callable[[int, int], Any]) -> AnyArray:
    return np.asarray(_Addresses(first, size, give_back))


def map_file(descriptor: int, size: int) -> AnyArray:
    """Return a file's bytes as a read-only array, good after the file is closed and deleted.

    I/O: one call; bytes are read when they are looked at.

    Raises
    ------
    OSError
        The system refuses.
    """
    first = _mmap(None, size, _READ, _SHARED, descriptor)
    _MAPPED.add(first)
    return _bytes(first, size, partial(_unmap, _libc().munmap, _MAPPED.discard))


def _unmap(munmap: Any, forget: Callable[[int], None], first: int, size: int) -> None:
    forget(first)  # before somebody else may have the address
    munmap(first, size)


class Shelf:
    """Addresses where files of one form are mapped side by side: rows of one array, of which numpy takes any.

    Copying many files so asks for the GIL once, not once each. Most rows are no memory: only `take` looks at them.

    Parameters
    ----------
    dtype, shape :
        Of the array that each file holds.
    start : int
        Bytes before it, less than a page.

    Raises
    ------
    OSError
        The system refuses so many addresses.
    ValueError
        Arrays of this form would lie too far apart: a row is no good multiple of a page's parts.
    """

    _EMPTY = _NO_ACCESS, _RESERVED | _THERE, -1, 0

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...], start: int) -> None:
        row = math.prod(shape) * dtype.itemsize
        # Files begin at pages, and rows a whole number of rows apart.
        place = math.lcm(row, PAGESIZE)
        place *= math.ceil((start + row) / max(place, 1))
        if not 0 < place <= _WIDEST * row:
            raise ValueError(f"files of {row} bytes cannot be mapped side by side")
        places = min(_MOST_PLACES, _most_addresses() // place)
        if not places:
            raise ValueError(f"files of {row} bytes are too large to be mapped side by side")
        size = places * place + PAGESIZE
        self.file_size, self._place, self._rows_a_place = start + row, place, place // row
        self._first = _mmap(None, size, _NO_ACCESS, _RESERVED, -1)
        self._free = list(range(places))[::-1]
        self._mmap, self._forget = (
            _libc().mmap,
            _MAPPED.discard,
        )  # there even when the interpreter ends and globals are gone
        reserved = _bytes(self._first, size, _libc().munmap)
        self._rows = reserved[start : start + places * place].view(dtype).reshape(-1, *shape)

    def put(self, descriptor: int) -> tuple[AnyArray, int] | None:
        """Map a file of this form.

        I/O: one call; bytes are read when they are looked at.

        Returns
        -------
        tuple of ndarray and int, or None
            The file's bytes as `map_file` gives them, and its row, good as long as they. None when the shelf is full.

        Raises
        ------
        OSError
            The system refuses.
        """
        try:
            number = self._free.pop()
        except IndexError:
            return None
        first = self._first + number * self._place
        _MAPPED.add(first)
        raw = _bytes(first, self.file_size, self._take_back)
        _mmap(first, self.file_size, _READ, _SHARED | _THERE, descriptor)
        return raw, number * self._rows_a_place

    def _take_back(self, first: int, size: int) -> None:
        self._forget(first)
        if self._mmap(first, size, *self._EMPTY) == first:
            self._free.append((first - self._first) // self._place)

    def take(self, rows: Sequence[int], out: AnyArray) -> None:
        """Copy rows that were put, and whose bytes somebody holds, into an array. Without the GIL.

        Parameters
        ----------
        rows : sequence of int
            Any others end the process.
        out : ndarray
            As many rows of this form, C-contiguous.
        """
        np.take(self._rows, rows, axis=0, out=out, mode="clip")  # mode="raise" would copy to another array first

    def fits(self, out: AnyArray) -> bool:
        """Whether files can be taken into an array's rows. I/O: none."""
        rows = self._rows
        return out.dtype == rows.dtype and out.shape[1:] == rows.shape[1:] and out.flags.c_contiguous
