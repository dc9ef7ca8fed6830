"""A few numbers that the processes of one user and machine keep together, each in turn: a file of small records.

Record locks of POSIX guard them, a range for each record, because the kernel drops those when their owner dies, however
it dies; so nothing is ever held for longer than it takes to write 24 bytes. Locks of this kind keep nobody out within
a process, and closing any descriptor of the file drops them all: so a process has one `Ledger` a file, with a lock of
its own, however many clients it has. The file is read and written, not mapped: whoever cuts a mapped file short ends
all that use it.

Where there are no such files (Windows has no record locks that wait for nobody; a folder may be read-only, or not be
ours), the process keeps the numbers for itself.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from ahi_ml.config import shared_folder
from ahi_ml.perprocess import PerProcess

if sys.platform != "win32":
    import fcntl

__all__ = ["Ledger", "Record", "open_ledger"]

_LOG = logging.getLogger(__name__)
_RECORD = struct.Struct("<3d")
_TRIES = 250
_PAUSE_S = 0.0002

Record = tuple[float, float, float]
"""What one place holds; zeros at first, and anything at all when the file was damaged."""


class Ledger:
    """Records of three numbers; see the module.

    I/O: none until used.

    Parameters
    ----------
    path : Path
        Its file, made on first use, as is its folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._alone = sys.platform == "win32"
        self._records: dict[int, Record] = {}

    def update(self, place: int, change: Callable[[Record], Record]) -> Record:
        """Replace a record by what `change` makes of it, nobody else coming between.

        I/O: six system calls. In trouble, one warning, and from then on none.

        Parameters
        ----------
        place : int
            Which record, from 0.
        change : callable
            Quick: others wait for it.

        Returns
        -------
        tuple of float
            What is there now.
        """
        with self._lock:
            if not self._alone:
                try:
                    return self._update(place, change)
                except OSError as error:
                    self._alone = True
                    _LOG.warning(
                        "the request rate is not shared with other processes, each of which may use all of it: %s: %s",
                        self._path,
                        error.strerror,
                    )
            record = self._records[place] = change(self._records.get(place, (0.0, 0.0, 0.0)))
            return record

    def _update(self, place: int, change: Callable[[Record], Record]) -> Record:
        descriptor = self._open()
        at = place * _RECORD.size
        locked = self._claim(descriptor, at)
        try:
            found = os.pread(descriptor, _RECORD.size, at)
            record = change(_RECORD.unpack(found.ljust(_RECORD.size, b"\0")))
            os.pwrite(descriptor, _RECORD.pack(*record), at)
        finally:
            if locked:
                fcntl.lockf(descriptor, fcntl.LOCK_UN, _RECORD.size, at)
        return record

    def _claim(self, descriptor: int, at: int) -> bool:
        """Lock a record. An owner that was stopped is not waited for: a count that is lost is better than a halt."""
        for _ in range(_TRIES):
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, _RECORD.size, at)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                time.sleep(_PAUSE_S)
            else:
                return True
        return False

    def _open(self) -> int:
        if self._descriptor is not None:
            if os.fstat(self._descriptor).st_nlink:
                return self._descriptor
            os.close(self._descriptor)  # somebody tidied up: later processes meet at a new file
            self._descriptor = None
        folder = self._path.parent
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        status = os.lstat(folder)
        # The folder above is anybody's to write in: what lies there may be somebody else's trap.
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(errno.EPERM, "the folder is not private to this user")
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        return self._descriptor


@dataclass(slots=True)
class _Ledgers:
    lock: threading.Lock = field(default_factory=threading.Lock)
    by_path: dict[Path, Ledger] = field(default_factory=dict)


_PROCESS = PerProcess(_Ledgers)


def open_ledger(name: str, folder: Path | None = None) -> Ledger:
    """This process's ledger of a name, which no path and no message shows. I/O: reads the machine's boot id.

    Parameters
    ----------
    name : str
        What is shared.
    folder : Path, optional
        Of its file; `config.shared_folder` by default.
    """
    # Clocks that start with the machine make records of another boot worthless.
    digest = blake2b(f"{_boot()}\0{name}".encode(), digest_size=16).hexdigest()
    path = (folder or shared_folder()) / f"rates-{digest}"
    ledgers = _PROCESS.get()
    with ledgers.lock:
        if path not in ledgers.by_path:
            ledgers.by_path[path] = Ledger(path)
        return ledgers.by_path[path]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return ""
