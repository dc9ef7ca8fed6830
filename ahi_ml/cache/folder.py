"""The folder that every tier of a cache shares: its places, privacy, writes, bound and counts."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ahi_ml.cache.bound import MOST_BYTES, Watch, default_bound
from ahi_ml.cache.entries import ENCODED_START, EncodedHeader
from ahi_ml.cache.eviction import PART, STALE_S, Found, found_in, remove
from ahi_ml.cache.mapped import MappedEntries, may_map
from ahi_ml.cache.marks import Marks
from ahi_ml.cache.private import check_folder, make_folder
from ahi_ml.codec import crc32
from ahi_ml.errors import ConfigError
from ahi_ml.perprocess import PerProcess
from ahi_ml.types import Buffer

__all__ = ["CacheFolder", "CacheStats", "FolderState"]

_LOG = logging.getLogger(__name__)
_TOUCH_AFTER_S = 60.0
_RESOLUTIONS = 9  # the full one, and those that may be asked for
_LIKELY_SIZE = 256 * 1024
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)
_PASSING = (errno.EMFILE, errno.ENFILE)  # too many open files, of anybody: the disk is well
_MAPPED = 1 / 4  # of the bound: space that this process may hold of entries that others delete

Entry = TypeVar("Entry")


@dataclass(slots=True)
class CacheStats:
    """Counts since the cache was opened in this process.

    Parameters
    ----------
    hits, misses : int
        Encoded frames asked for that were there, and that were not.
    bytes : int
        Read from entries of either tier, headers excluded.
    writes : int
        Entries of either tier written.
    corrupt : int
        Damaged entries, dropped.
    evictions : int
        Entries this process removed to stay below the bound.
    derived_hits, derived_misses : int
        Results asked for that were there, and that were not.
    remote_hits : int
        Of the hits, those that the remote tier gave.
    """

    hits: int = 0
    misses: int = 0
    bytes: int = 0
    writes: int = 0
    corrupt: int = 0
    evictions: int = 0
    derived_hits: int = 0
    derived_misses: int = 0
    remote_hits: int = 0


@dataclass(slots=True)
class FolderState:
    """What one process knows of a cache folder."""

    stats: CacheStats = field(default_factory=CacheStats)
    lock: threading.Lock = field(default_factory=threading.Lock)
    disabled: bool = False
    warned: bool = False  # of trouble
    ready: bool = False
    private: bool = False
    most_bytes: int = 0
    watch: Watch | None = None  # over the bound, once it is settled
    marks: Marks = field(default_factory=Marks)  # of encoded entries
    mapped: MappedEntries[Any] = field(default_factory=MappedEntries)  # whatever each tier keeps of its own
    maps: bool | None = None  # whether entries may be mapped, once that is known
    likely_size: dict[int, int] = field(default_factory=dict)  # bytes read of an entry, by resolution


class CacheFolder:
    """Where the entries of a cache lie.

    Parameters
    ----------
    path : Path
        Made on first write.
    max_bytes : int, optional
        Bound of its size; see `FrameCache`.
    private : bool
        Whether to refuse a folder that others can look into.
    mapped : bool
        Whether entries that are read again are mapped into memory, where that can be.

    I/O: none until used.
    """

    def __init__(self, path: Path, *, max_bytes: int | None = None, private: bool = True, mapped: bool = True) -> None:
        if max_bytes is not None and max_bytes <= 0:
            raise ConfigError(f"max_bytes must be positive, not {max_bytes}; cache=None reads without a cache")
        self.path = path
        self.max_bytes = max_bytes
        self.private = private
        self.mapped = mapped
        self.entries = f"{path}{os.sep}frames{os.sep}"
        self._parts = f"{path}{os.sep}parts"
        self.file_mode, self._folder_mode = (0o600, 0o700) if private else (0o666, 0o777)
        self._state = PerProcess(FolderState)

    def __reduce__(self) -> tuple[Callable[..., CacheFolder], tuple[Path]]:
        make = partial(CacheFolder, max_bytes=self.max_bytes, private=self.private, mapped=self.mapped)
        return make, (self.path,)

    def state(self) -> FolderState:
        """Return what this process knows of the folder. I/O: none."""
        return self._state.get()

    def place(self, name: str) -> str:
        """Return the path of an entry. I/O: none."""
        return f"{self.entries}{name[:2]}{os.sep}{name[2:]}"

    def count(self, **counts: int) -> None:
        """Add to the counts of this process. I/O: none."""
        state = self._state.get()
        with state.lock:
            for name, count in counts.items():
                setattr(state.stats, name, getattr(state.stats, name) + count)

    def stats(self) -> dict[str, int]:
        """Return the counts of this process; see `CacheStats`. I/O: none."""
        state = self._state.get()
        with state.lock:
            return asdict(state.stats)

    def check_private(self) -> None:
        """Refuse a folder that others can look into, or plant images in.

        I/O: one stat, the first time.

        Raises
        ------
        CacheError
            Others can; unless the cache was made with ``private=False``.
        OSError
            The folder cannot be looked at.
        """
        state = self._state.get()
        if not state.private:
            check_folder(self.path, private=self.private)
            state.private = True

    def prepare(self) -> None:
        """Make the folder, settle its bound and sweep what killed writers left.

        I/O: once a process, a few calls; those of `default_bound`. Raises what `check_private` raises.
        """
        state = self._state.get()
        if state.ready:
            return
        make_folder(self.path, private=self.private)
        self.check_private()
        self._make_folders(self._parts, self.entries)
        now = time.time()
        for found in found_in(self._parts):
            if now - found.used > STALE_S:
                remove(found.path)
        state.most_bytes = self.max_bytes or default_bound(os.fspath(self.path), self.entries)
        state.watch = Watch(self.entries, state.most_bytes)
        state.ready = True

    def read_entry(self, name: str, reduce: int = 0, *, check: bool = True) -> tuple[EncodedHeader, Buffer] | None:
        """Read an encoded entry, or the part of it that a resolution needs.

        I/O: one file. Its header is always checked, its bytes unless `check` says that they were: see `Marks`. A
        damaged one is deleted and counted. When the disk refuses, one warning.

        Returns
        -------
        tuple of (EncodedHeader, bytes-like), or None
            None when there is none, or none that has so much.

        Raises
        ------
        CacheError
            Others can look into the folder.
        """
        state, path = self._state.get(), self.place(name)
        status = part = None
        end = 0
        state.mapped.forget(path)
        try:
            if not state.private:
                self.check_private()
            descriptor = os.open(path, _READ)
            try:  # in as few calls as can be: each hands the GIL over, and may have to wait for it
                raw = os.read(descriptor, state.likely_size.get(reduce, _LIKELY_SIZE))
                header = EncodedHeader.parse(raw)
                part = header.part(reduce) if header else None
                if part is not None:
                    end = ENCODED_START + part[0]
                    raw = self._complete(descriptor, raw, end, reduce)
                if check:
                    status = os.fstat(descriptor)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.disable(error)
            return None
        sound = header is not None and len(raw) >= end
        data = memoryview(raw)[ENCODED_START:end]
        if sound and status is not None and header is not None:
            sound = status.st_size == ENCODED_START + header.length and (part is None or crc32(data) == part[1])
        if not sound:
            self.drop(path)
            self.count(corrupt=1)
            return None
        if part is None or header is None:
            return None
        if status is not None:
            self.touch(path, status.st_mtime)
            state.marks.note(hash((name, reduce)))
        return header, data

    def map(self, key: Hashable, path: str, make: Callable[[int, int], Entry | None]) -> Entry | None:
        """Map an entry into this process's memory, where `FolderState.mapped` has it from then on.

        I/O: opens one file, unless entries cannot be mapped here or there is no room.

        Parameters
        ----------
        key : hashable
            To find it by.
        path : str
            Of an entry that this process has checked.
        make : callable
            Maps an open file of some bytes (see `cache.pages`), and makes of them what is kept; None when they are
            not what was expected.
        """
        state = self._state.get()
        most = int((state.most_bytes or self.max_bytes or MOST_BYTES) * _MAPPED)
        if state.maps is None:
            state.maps = self.mapped and may_map(os.fspath(self.path))
        if not state.maps or not state.mapped.room(most):
            return None
        try:
            descriptor = os.open(path, _READ)
            try:
                status = os.fstat(descriptor)
                entry = make(descriptor, status.st_size)
            finally:
                os.close(descriptor)
            if entry is not None:
                state.mapped.add(key, path, entry, status.st_size, most)
                if os.stat(path).st_ino != status.st_ino:  # replaced meanwhile, when there was nothing to let go of
                    state.mapped.forget(path)
        except OSError:  # evicted just now, or the system's bound: it is read instead
            state.mapped.forget(path)
            return None
        return entry

    def _complete(self, descriptor: int, raw: bytes, end: int, reduce: int) -> bytes:
        """Read on to the end of what is needed, and guess better the next time."""
        likely = self._state.get().likely_size
        guess = likely.get(reduce, _LIKELY_SIZE)
        if end > guess or guess > 2 * end:
            likely[reduce] = end + end // 4
        while len(raw) < end and (more := os.read(descriptor, end - len(raw))):
            raw += more
        return raw

    def write(self, name: str, header: bytes, payload: Buffer) -> bool:
        """Put an entry in its place, whole or not at all.

        I/O: one file, moved; now and then a listing and removals. When the disk refuses, one warning and no
        more writes in this process; while too many files are open, none is written.

        Returns
        -------
        bool
            Whether it is there.
        """
        if self._state.get().disabled:
            return False
        path = self.place(name)
        # Beside the entries, not among them: sweeping looks at one small folder.
        part = f"{self._parts}{os.sep}{name}.{os.getpid()}.{threading.get_ident()}{PART}"
        try:
            self.prepare()
            try:
                self._write(part, path, header, payload)
            except FileNotFoundError:  # the first of its folder, or somebody deleted everything
                make_folder(self.path, private=self.private)
                self._make_folders(self._parts, self.entries, os.path.dirname(path))
                self._write(part, path, header, payload)
        except OSError as error:
            if not (os.name == "nt" and isinstance(error, PermissionError)):  # there, somebody reads the old one
                self.disable(error)
            return False
        self.count(writes=1)
        self._state.get().mapped.forget(path)
        for reduce in range(_RESOLUTIONS):
            self._state.get().marks.forget(hash((name, reduce)))
        self._keep_bound(len(header) + memoryview(payload).nbytes)
        return True

    def _make_folders(self, *folders: str) -> None:
        for folder in folders:  # each by itself: of a path, makedirs gives the mode to the last one only
            os.makedirs(folder, mode=self._folder_mode, exist_ok=True)

    def _write(self, part: str, path: str, header: bytes, payload: Buffer) -> None:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), self.file_mode)
        try:
            with open(descriptor, "wb") as file:  # buffered: a raw write may stop short of a full disk's end
                file.write(header)
                file.write(payload)
            os.replace(part, path)
        except BaseException:
            remove(part)
            raise

    def _keep_bound(self, size: int) -> None:
        """Evict once enough was written."""
        state = self._state.get()
        assert state.watch is not None
        try:
            removed = state.watch.wrote(size)
        except OSError as error:  # the disk is gone: the next write says so
            _LOG.debug("eviction stopped: %s", error)
            return
        if removed:
            self.count(evictions=len(removed))
            for path in removed:
                state.mapped.forget(path)

    def _folders(self) -> list[str]:
        try:
            return [f"{self.entries}{name}" for name in os.listdir(self.entries)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def touch(self, path: str, used: float) -> None:
        """Note that an entry is used. I/O: one write of its time, at most once a minute."""
        if time.time() - used > _TOUCH_AFTER_S:
            with suppress(OSError):  # a read-only folder, or an eviction just now: the bytes are good
                os.utime(path)

    def disable(self, error: OSError) -> None:
        """Write no more in this process, unless the trouble is a passing one; warn the first time. I/O: none."""
        state = self._state.get()
        passing = error.errno in _PASSING
        with state.lock:
            if state.disabled or (passing and state.warned):
                return
            state.warned, state.disabled = True, not passing
        if passing:
            _LOG.warning("the frame cache %s is not used at times: %s", self.path, error)
        else:
            _LOG.warning("the frame cache %s is not used from here on: %s", self.path, error)

    def drop(self, path: str) -> None:
        """Delete an entry, if it is there. I/O: removes one file."""
        self._state.get().mapped.forget(path)
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            self.disable(error)

    def files(self) -> Iterator[Found]:
        """Yield whole entries and unfinished files, whose names end in `PART`. I/O: lists the folder."""
        for folder in [*self._folders(), self._parts]:
            yield from found_in(folder)
