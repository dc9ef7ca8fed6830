"""Private files for indexes that cannot be mapped where they are: never saved, or saved elsewhere."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ahi_ml.errors import CacheError, ConfigError
from ahi_ml.index.tables import private_file
from ahi_ml.remote import RemoteFile

__all__ = ["clear_copies", "local_copy", "spill_path"]

_KEPT_S = 30 * 86_400


def spill_path(owner: object) -> Path:
    """A path in a new private folder that goes when `owner` does, in this process only.

    The owner is what selections share, not a selection: one given to a process as an argument is
    forgotten here before the other side has opened the file.

    I/O: makes the folder, mode 0700. A process forked from this one leaves it alone.
    """
    folder = Path(tempfile.mkdtemp(prefix="ahi-ml-index-"))
    weakref.finalize(owner, _remove, folder, os.getpid())
    return folder / "index.arrow"


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


def local_copy(remote: RemoteFile, folder: Path) -> Path:
    """A file of this machine with the contents that a remote index has now.

    Named by the URL and its fingerprint, so that every process maps one copy and an index that was
    overwritten gets another. (fsspec's own caches write over the file that others have mapped.)

    I/O: one look at the remote file; the first time all of it, into `folder`, mode 0600. Copies that nobody
    opened for 30 days go then.

    Raises
    ------
    ConfigError
        No such file, or it was overwritten while it came.
    CacheError
        Other users can read or write `folder`.
    OSError
        The remote file cannot be reached, or the disk is full.
    """
    with _is_there(remote):
        fingerprint = remote.fingerprint()
    name = hashlib.blake2b(remote.url.encode(), digest_size=8).hexdigest()
    path = folder / f"{name}-{fingerprint or secrets.token_hex(16)}.arrow"
    _make_private(folder)
    with suppress(FileNotFoundError):
        os.utime(path)  # the clock of "nobody opened"
        return path
    _remove_old(folder)
    with private_file(path) as file, _is_there(remote):
        remote.download(file)
        if remote.fingerprint() != fingerprint:
            raise ConfigError(f"{remote} was overwritten while it was read: load it again")
    return path


@contextmanager
def _is_there(remote: RemoteFile) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ConfigError(f"no index at {remote}") from error


def clear_copies(folder: Path) -> int:
    """Delete the copies of remote indexes; return how many. I/O: lists the folder, removes files.

    Who has mapped one keeps it; who needs one copies it again.
    """
    found = list(folder.glob("*.arrow"))
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


def _make_private(folder: Path) -> None:
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # the frame cache's folder: private as well
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if os.name == "posix" and (status.st_mode & 0o077 or status.st_uid != os.getuid()):
        raise CacheError(
            f"the folder {folder} is open to other users (mode {status.st_mode & 0o777:o}), who could read or replace "
            "copies of indexes there. Make it private (chmod 700) or name another place with AHI_ML_CACHE"
        )


def _remove_old(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process tidies up too
            if time.time() - path.stat().st_mtime > _KEPT_S:
                path.unlink()
