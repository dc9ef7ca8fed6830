"""Where options come from when they are not given: the environment, then defaults. Floor 1."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

__all__ = ["cache_folder", "cache_places", "decode_threads", "index_folder"]

_CACHE_VARIABLE = "AHI_ML_CACHE"


def cache_folder(argument: str | os.PathLike[str] | None = None) -> Path:
    """The cache folder: the argument, then ``AHI_ML_CACHE``, then the user's cache folder. I/O: none."""
    return cache_places(argument)[0]


def cache_places(argument: str | os.PathLike[str] | None = None) -> tuple[Path, str | None]:
    """The cache folder and the URL of a remote tier: of the argument, then of ``AHI_ML_CACHE``.

    I/O: none.

    Parameters
    ----------
    argument : path or str, optional
        A folder, which is all there is then; or a URL such as ``s3://bucket/prefix``, to which the folder that
        ``AHI_ML_CACHE`` names is added, else the user's cache folder.

    Returns
    -------
    folder : Path
    remote : str or None
    """
    remote = None
    for chosen in (argument, os.environ.get(_CACHE_VARIABLE)):
        if not chosen:
            continue
        text = os.fspath(chosen)
        if "://" not in text:
            return Path(text).expanduser(), remote
        remote = remote or text
    return Path(platformdirs.user_cache_dir("ahi_ml")), remote


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
