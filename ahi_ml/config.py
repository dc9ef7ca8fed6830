"""Where options come from when they are not given: the environment, then defaults. Floor 1."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs

from ahi_ml.errors import ConfigError
from ahi_ml.types import RateLimit

__all__ = [
    "QUOTAS",
    "Quota",
    "cache_folder",
    "cache_places",
    "decode_threads",
    "index_folder",
    "node_share",
    "rate_limits",
    "shared_folder",
    "store_folder",
]

_CACHE_VARIABLE = "AHI_ML_CACHE"
_RATE_VARIABLE = "AHI_ML_RATE_LIMIT"
_LIKE_AN_ID = re.compile(r"[0-9a-fA-F-]{20,44}")
_BURST = 2.0  # of a rate that comes alone, in seconds: about what the service's own quotas have

Quota = tuple[float, float]
"""Requests a second, and how many at once after a pause."""

QUOTAS: dict[str, Quota] = {
    "CreateDatastore": (0.085, 1),
    "DeleteDatastore": (0.085, 1),
    "GetDatastore": (10, 20),
    "ListDatastores": (5, 10),
    "StartDICOMImportJob": (1, 2),
    "GetDICOMImportJob": (25, 50),
    "ListDICOMImportJobs": (10, 20),
    "SearchImageSets": (25, 50),
    "GetImageSet": (25, 50),
    "GetImageSetMetadata": (50, 100),
    "GetImageFrame": (1000, 2000),
    "ListImageSetVersions": (25, 50),
    "UpdateImageSetMetadata": (0.25, 1),
    "CopyImageSet": (0.25, 1),
    "DeleteImageSet": (0.25, 1),
    "TagResource": (10, 20),
    "UntagResource": (10, 20),
    "ListTagsForResource": (10, 20),
}
"""What the service grants an account and region by default, by operation."""


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


def rate_limits(argument: RateLimit | None = None) -> dict[str, Quota] | None:
    """The quotas to keep: the argument, then ``AHI_ML_RATE_LIMIT``. I/O: none.

    Parameters
    ----------
    argument : float or mapping, optional
        Frames a second; or a mapping of operations to requests a second, or to these and the burst. Infinity lifts
        a limit. The variable has the same, a mapping as JSON.

    Returns
    -------
    dict or None
        By operation, for those that were named; None when nothing was.

    Raises
    ------
    ConfigError
        No operation of the service, or no positive number.
    """
    where, given = "rate_limit", argument
    if given is None:
        where, text = _RATE_VARIABLE, os.environ.get(_RATE_VARIABLE)
        if not text:
            return None
        try:
            given = json.loads(text)
        except ValueError:
            raise ConfigError(
                f"{_RATE_VARIABLE} is a number of frames a second or a JSON object, not {text!r}"
            ) from None
    named: Mapping[str, Any] = given if isinstance(given, Mapping) else {"GetImageFrame": given}
    if unknown := sorted(str(name) for name in set(named) - set(QUOTAS)):
        raise ConfigError(f"{where}: {', '.join(unknown)} is no operation of the service: {', '.join(QUOTAS)}")
    return {name: _quota(value, f"{where}: {name}") for name, value in named.items()}


def _quota(value: Any, where: str) -> Quota:
    pair = list(value) if isinstance(value, list | tuple) else [value, None]
    if len(pair) == 2 and pair[1] is None and _positive(pair[0]):
        pair[1] = max(_BURST * pair[0], 1.0)
    if len(pair) != 2 or not all(_positive(each) for each in pair) or pair[1] < 1:
        raise ConfigError(
            f"{where} must be requests a second (a positive number), or these and a burst of at least 1, not {value!r}"
        )
    return float(pair[0]), float(pair[1])


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def node_share() -> float:
    """The part of an account's budget that is this machine's. I/O: none.

    Its share of the processes of a distributed run, by the ``LOCAL_WORLD_SIZE`` and ``WORLD_SIZE`` that torchrun sets;
    all of it otherwise.
    """
    try:
        here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return 1.0
    return here / everywhere if 0 < here <= everywhere else 1.0


def shared_folder() -> Path:
    """Where processes of one user share what this machine forgets when it starts anew. I/O: none.

    In the folder of temporary files, not in the cache folder: that may lie on a network, for several machines, and
    processes with different caches share this all the same.
    """
    return Path(tempfile.gettempdir()) / (f"ahi_ml-{os.getuid()}" if hasattr(os, "getuid") else "ahi_ml")


def store_folder(name: str, datastore: str, *, sure: bool) -> Path:
    """The folder of an embedded store, absolute, its links followed. I/O: looks at its path.

    Parameters
    ----------
    name : str
        Of the folder.
    datastore : str
        Of the data store in it.
    sure : bool
        Whether the name cannot be meant for a data store's id.

    Raises
    ------
    ConfigError
        No name, one that looks like a mistyped id, or a data store that cannot be called so.
    """
    if not sure and _LIKE_AN_ID.fullmatch(name) and not os.path.isdir(name):
        raise ConfigError(
            f"{name!r} looks like a mistyped data store id ({len(name)} characters; ids have 32 of 0-9 and a-z). "
            "If a folder of this name is meant, pass it as a Path"
        )
    if not name:
        raise ConfigError("name a folder or a data store id")
    if not re.fullmatch(r"[A-Za-z0-9._/#-]{1,50}", datastore):
        raise ConfigError(f"{datastore!r} is no name of a data store: letters, digits and . _ / # - only, 50 at most")
    return Path(os.path.realpath(Path(name).expanduser()))
