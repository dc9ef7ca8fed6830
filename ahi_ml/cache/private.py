"""Folders for this user alone: made so, and looked at before they are trusted."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

from ahi_ml.errors import CacheError

__all__ = ["check_folder", "make_folder", "restrict_on_windows"]


def make_folder(path: Path, *, private: bool) -> None:
    """Make a cache folder, if it is not there. Those above it are made as the umask says.

    I/O: two calls; see `restrict_on_windows` for a new one.
    """
    fresh = not path.exists()
    path.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)
    if fresh and private and os.name == "nt":
        restrict_on_windows(path)


def check_folder(path: Path, *, private: bool) -> None:
    """Refuse a folder that others can look into, or plant images in, unless they may.

    I/O: one stat.

    Raises
    ------
    CacheError
        Others can.
    OSError
        It cannot be looked at, or is no folder.
    """
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(path))
    mode = status.st_mode & 0o077
    if mode and private and os.name == "posix":
        raise CacheError(
            f"the cache folder {path} can be read by other users (mode {mode:o}): it would show them "
            "images. Make it private (chmod 700), name another with AHI_ML_CACHE, or say FrameCache(..., "
            "private=False) if they may see them"
        )


def restrict_on_windows(path: Path) -> None:
    """Let only this user into a new folder, where modes say nothing; as far as the system lets us.

    I/O: runs ``icacls``.
    """
    grant = f"{os.environ.get('USERNAME', '')}:(OI)(CI)F"  # full access, inherited by files and folders inside
    with suppress(OSError, subprocess.SubprocessError):
        command = ["icacls", os.fspath(path), "/inheritance:r", "/grant:r", grant]
        subprocess.run(command, check=True, capture_output=True, timeout=10)
