"""Where options come from when they are not given: the environment, then defaults. Floor 1."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

__all__ = ["cache_folder", "decode_threads", "index_folder"]

_CACHE_VARIABLE = "AHI_ML_CACHE"


def cache_folder(argument: str | os.PathLike[str] | None = None) -> Path:
    """The cache folder: the argument, then ``AHI_ML_CACHE``, then the user's cache folder. I/O: none."""
    chosen = argument if argument is not None else os.environ.get(_CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("ahi_ml"))


def index_folder() -> Path:
    """Where copies of remote indexes lie: ``indexes`` in ``AHI_ML_CACHE`` or the user's cache folder. I/O: none.

    On this machine always, since they are memory-mapped: an ``AHI_ML_CACHE`` that is a URL does not count.
    """
    chosen = os.environ.get(_CACHE_VARIABLE)
    return cache_folder(chosen if chosen and "://" not in chosen else platformdirs.user_cache_dir("ahi_ml")) / "indexes"


def decode_threads() -> int:
    """As many threads as cores this process may use. I/O: none."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
