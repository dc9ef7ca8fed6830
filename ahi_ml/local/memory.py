"""Freed memory of the server's process: kept while a job runs, given back behind it.

Only the C library of most Linux systems is told; elsewhere, nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

__all__ = ["give_back", "keep"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = 32 * 2**20  # the most that glibc takes


def keep() -> None:
    """Use freed memory again instead of giving it back at once. I/O: none.

    The first touch of a page costs more than copying it. An import frees a file, its pixels and the
    encoder's buffers for every file, and would get fresh pages for all of them each time.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)


def give_back() -> None:
    """Give freed memory back to the system. I/O: none."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            if libc.mallopt and libc.malloc_trim:  # other C libraries lack one of them
                return libc
    return None
