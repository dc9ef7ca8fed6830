"""`FrameCache`: what readers, data stores and command lines see of the cache."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from ahi_ml.cache.derived import DerivedTier, ResultTier
from ahi_ml.cache.entries import ENCODED_START, CacheEntry, EncodedHeader, is_whole, parse_encoded
from ahi_ml.cache.eviction import PART, STALE_S, remove
from ahi_ml.cache.flight import Flights
from ahi_ml.cache.folder import CacheFolder
from ahi_ml.cache.locks import Claims
from ahi_ml.cache.marks import BYTE, SAMPLE_BITS
from ahi_ml.cache.pages import map_file
from ahi_ml.cache.remote import RemoteTier
from ahi_ml.cache.sealed import Cipher, SealedTier
from ahi_ml.codec import crc32
from ahi_ml.config import cache_places
from ahi_ml.errors import ConfigError
from ahi_ml.perprocess import PerProcess
from ahi_ml.types import Buffer, PathType

__all__ = ["FrameCache"]


class _Mapped(NamedTuple):
    """A frame in memory that the process shares with the file system, and by resolution what was asked of it."""

    header: EncodedHeader
    data: memoryview
    parts: dict[int, tuple[CacheEntry, int]]  # and where its mark is, see `Marks`


_data_of = attrgetter("data")


class FrameCache:
    """Encoded frames and results derived from them under one folder, shared by threads and processes.

    Parameters
    ----------
    folder : Path
        Made on first write, private to the user.
    max_bytes : int, optional
        Bound of its size, for all tiers together: by default 50 GB, or half of what is free on the disk if that
        is less. Before it is passed, entries used longest ago go (to within ten minutes), until a tenth is free. More
        than two processes that fill it at once may pass it for a moment, by a 32nd each.
    private : bool
        Whether to refuse a folder that other users can look into. With False, what is written follows the umask.
    remote : str, optional
        A URL that fsspec knows, such as ``s3://bucket/prefix``, where encoded frames are kept too: looked up after
        the folder, written beside it in the background. Results derived from them stay local.
    remote_options : mapping, optional
        For its file system, as in ``fsspec.open``. They are pickled: leave credentials to the environment.
    encrypt, decrypt : callable, optional
        From bytes to bytes: around everything that is written, in the folder and in the remote tier; see `Cipher`.
        Decoded results are then read at a fraction of the speed, lower resolutions from the whole frame.
    mapped : bool
        Whether what a process reads again is mapped into its memory (on Linux, on a local disk). Its resident size then
        counts files of the cache, up to a quarter of the bound, which the system takes back when it needs memory;
        False is for schedulers that end processes by that number, and slower.

    I/O: none until used.

    Attributes
    ----------
    claims : Claims
        Who downloads what, among all processes of this machine that share the folder.

    Raises
    ------
    ConfigError
        A bound that is not positive, a remote that is no URL or has a password in it, one callable without the other.
        On first use: a URL nobody here can open.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int | None = None,
        private: bool = True,
        remote: str | None = None,
        remote_options: Mapping[str, Any] | None = None,
        encrypt: Callable[[bytes], bytes] | None = None,
        decrypt: Callable[[bytes], bytes] | None = None,
        mapped: bool = True,
    ) -> None:
        if (encrypt is None) != (decrypt is None):
            raise ConfigError("encrypt and decrypt belong together: what one writes, the other reads")
        self.folder = folder
        self.max_bytes = max_bytes
        self._folder = CacheFolder(folder, max_bytes=max_bytes, private=private, mapped=mapped)
        self._cipher = Cipher(encrypt, decrypt) if encrypt is not None and decrypt is not None else None
        self.claims = Claims(self._folder)
        self._flights = PerProcess(partial(Flights, self.claims))
        self._remote = RemoteTier(remote, remote_options) if remote is not None else None

    @classmethod
    def at(cls, place: PathType | None = None) -> FrameCache:
        """Return the cache at a folder, or at a URL with the usual folder before it.

        I/O: none.

        Parameters
        ----------
        place : path or str, optional
            ``AHI_ML_CACHE`` by default, else the user's cache folder; see `config.cache_places`.
        """
        folder, remote = cache_places(place)
        return cls(folder, remote=remote)

    def __repr__(self) -> str:
        stats = self._folder.stats()
        place = f"{str(self.folder)!r}{f' and {self._remote.url}' if self._remote else ''}"
        return f"<FrameCache {place}: {stats['hits']:,} hits, {stats['misses']:,} misses>"

    def name(self, datastore_id: str, frame_id: str) -> str:
        """Return the opaque name of a frame, for `claims`. I/O: none."""
        return hashlib.blake2b(f"{datastore_id}\0{frame_id}".encode(), digest_size=16).hexdigest()

    @property
    def flights(self) -> Flights:
        """The downloads under way in this process. I/O: none."""
        return self._flights.get()

    def has(self, datastore_id: str, frame_id: str) -> bool:
        """Whether the folder has an entry of a frame, sound or not; counts nothing. I/O: looks at one file."""
        return os.path.exists(self._path(datastore_id, frame_id))

    def _path(self, datastore_id: str, frame_id: str) -> str:
        return self._folder.place(self.name(datastore_id, frame_id))

    def derived(self, datastore_id: str, recipe: str) -> ResultTier:
        """Return the tier of results of one recipe; see `DerivedTier`. Made once a dataset. I/O: none."""
        if self._cipher is not None:
            return SealedTier(self._folder, self._cipher, datastore_id, recipe)
        return DerivedTier(self._folder, datastore_id, recipe)

    def get(self, datastore_id: str, frame_id: str, reduce: int = 0) -> CacheEntry | None:
        """The cached frame, or None; see `get_many`.

        I/O: when the folder has none, one request to the remote tier, if there is one; what it gives is kept in the
        folder as well.
        """
        entry = self.get_many(datastore_id, (frame_id,), reduce)[0]
        if entry is None and self._remote is not None:
            entry = self.accept(datastore_id, frame_id, self._remote.get(self.name(datastore_id, frame_id)), reduce)
        return entry

    def get_many(self, datastore_id: str, frame_ids: Sequence[str], reduce: int = 0) -> list[CacheEntry | None]:
        """The frames that the folder has, and None for those that are not there; for the remote tier, see `ask`.

        I/O: one file each that the process does not have mapped (see `cache.mapped`); a damaged one is deleted and
        counted. Bytes are checked when a process first reads them, then once in 64 reads.

        Parameters
        ----------
        datastore_id, frame_ids : str, sequence of str
            Which.
        reduce : int
            Resolution levels that will be left out: no more is read than the others need.

        Raises
        ------
        CacheError
            Others can look into the folder.
        """
        state = self._folder.state()
        mapped, touched, sample = state.mapped.get, state.marks.lately(), state.marks.random.getrandbits
        found: list[CacheEntry | None] = []
        for frame_id in frame_ids:
            kept: _Mapped | None = mapped((datastore_id, frame_id))
            part = kept.parts.get(reduce) if kept is not None else None
            if kept is None or part is None:
                found.append(self._read(datastore_id, frame_id, reduce))
                continue
            entry, mark = part
            if touched[mark >> 3 & BYTE] >> (mark & 7) & 1 and (
                sample(SAMPLE_BITS) or self._is_sound(entry, kept, datastore_id, frame_id, reduce)
            ):
                found.append(entry)
            else:
                found.append(self._read(datastore_id, frame_id, reduce, doubted=True))
        misses = found.count(None)
        size = sum(map(len, map(_data_of, filter(None, found))))
        with state.lock:
            state.stats.hits += len(found) - misses
            state.stats.misses += misses
            state.stats.bytes += size
        return found

    def _is_sound(self, entry: CacheEntry, kept: _Mapped, datastore_id: str, frame_id: str, reduce: int) -> bool:
        """Whether a mapped entry is still in the folder, and its bytes are what was written."""
        part = kept.header.part(reduce)
        return part is not None and self.has(datastore_id, frame_id) and crc32(entry.data) == part[1]

    def _read(self, datastore_id: str, frame_id: str, reduce: int, *, doubted: bool = False) -> CacheEntry | None:
        name = self.name(datastore_id, frame_id)
        known = not doubted and self._folder.state().marks.known(hash((name, reduce)))
        if known and self._cipher is None:
            entry = self._map((datastore_id, frame_id), name, reduce)
            if entry is not None:
                return entry
        found = self._folder.read_entry(name, reduce, check=not known)
        return self._entry(*found) if found is not None else None

    def _map(self, key: tuple[str, str], name: str, reduce: int) -> CacheEntry | None:
        """A frame that was read before, from memory from now on; None where that cannot or should not be."""

        def make(descriptor: int, size: int) -> _Mapped | None:
            raw = map_file(descriptor, size)
            header = EncodedHeader.parse(raw[:ENCODED_START].tobytes())
            if header is None or header.sealed or raw.size != ENCODED_START + header.length:
                return None
            return _Mapped(header, raw.data[ENCODED_START:], {})

        kept: _Mapped | None = self._folder.state().mapped.get(key)
        kept = kept or self._folder.map(key, self._folder.place(name), make)
        part = kept.header.part(reduce) if kept is not None else None
        entry = self._entry(kept.header, kept.data[: part[0]]) if kept is not None and part is not None else None
        if kept is not None and part is not None and entry is not None:
            if crc32(entry.data) != part[1]:  # what was read before may have been another: two names may share a mark
                self.drop(*key)
                self._folder.count(corrupt=1)
                return None
            entry = entry._replace(notes={})
            kept.parts[reduce] = entry, hash((name, reduce))
        return entry

    def _entry(self, header: EncodedHeader, data: Buffer) -> CacheEntry | None:
        """What was kept; None for what is encrypted otherwise."""
        if header.sealed != (self._cipher is not None):
            return None
        whole = header.whole and len(data) == header.length
        if self._cipher is None:
            return CacheEntry(data, header.verified, whole)
        opened = self._cipher.open(data)
        return None if opened is None else CacheEntry(opened, header.verified, whole)

    def ask(self, datastore_id: str, frame_id: str) -> Future[bytes | None] | None:
        """Start asking the remote tier for a frame that the folder has not; what it answers is for `accept`.

        I/O: one request, in the background, many at once. The future may be cancelled until the answer is there.

        Returns
        -------
        Future, or None
            None when there is nobody to ask: no remote tier, or one that failed a moment ago.

        Raises
        ------
        ConfigError
            A remote tier whose URL nobody here can open.
        """
        return self._remote.ask(self.name(datastore_id, frame_id)) if self._remote is not None else None

    def accept(self, datastore_id: str, frame_id: str, raw: bytes | None, reduce: int = 0) -> CacheEntry | None:
        """Check what the remote tier gave of a frame, and keep it in the folder.

        I/O: writes one file. It counts as a hit, and no more as the miss that it was in the folder. What is damaged
        is counted; whoever fetches the frame replaces it.

        Returns
        -------
        CacheEntry, or None
            None when there was none, or none that can be used.

        Raises
        ------
        CacheError
            Others can look into the folder.
        """
        if raw is None:
            return None
        found = parse_encoded(raw)
        if found is None:
            self._folder.count(corrupt=1)
            return None
        header, data = found
        self._folder.write(self.name(datastore_id, frame_id), raw[:ENCODED_START], data)
        part = header.part(reduce)
        entry = self._entry(header, data[: part[0]]) if part is not None else None
        if entry is not None:
            state = self._folder.state()
            with state.lock:
                state.stats.misses -= state.stats.misses > 0
                state.stats.hits += 1
                state.stats.remote_hits += 1
                state.stats.bytes += len(entry.data)
        return entry

    def flush(self) -> None:
        """Wait until what was put is in the remote tier as well, or was given up. I/O: requests under way."""
        if self._remote is not None:
            self._remote.flush()

    def put(
        self,
        datastore_id: str,
        frame_id: str,
        data: Buffer,
        *,
        verified: bool,
        whole: bool = True,
        prefixes: Sequence[int] = (),
    ) -> None:
        """Store a frame.

        I/O: one file; when the disk refuses, one warning and no more writes from then on. Now and then a listing
        and removals, to stay below the bound. With a remote tier, one request in the background.

        Parameters
        ----------
        datastore_id, frame_id : str
            Which.
        data : bytes-like
            Its encoded bytes.
        verified : bool
            Whether its pixels were compared with the data store's checksum.
        whole : bool
            False for the first part of a frame only.
        prefixes : sequence of int
            How many of the bytes lower resolutions need, by `codec.prefixes`; without, a `get` reads all of them.

        Raises
        ------
        CacheError
            Others can look into the folder.
        """
        name = self.name(datastore_id, frame_id)
        if self._cipher is not None:
            if not whole:
                return  # which part of a frame it is, an encrypted entry does not tell
            data = self._cipher.seal(data)
            header = EncodedHeader.of(data, verified=verified, sealed=True).pack()
        else:
            header = EncodedHeader.of(data, verified=verified, whole=whole, prefixes=prefixes).pack()
        self._folder.write(name, header, data)
        if self._remote is not None and whole:
            self._remote.put(name, b"".join((header, data)))

    def drop(self, datastore_id: str, frame_id: str) -> None:
        """Forget a frame in the folder, if it is there. I/O: removes one file.

        The remote tier keeps it until the frame is put again: what was wrong here may be right there.
        """
        self._folder.drop(self._path(datastore_id, frame_id))

    def stats(self) -> dict[str, int]:
        """Counts of this process, see `CacheStats`. I/O: none."""
        return self._folder.stats()

    def size(self) -> tuple[int, int]:
        """Number and bytes of the entries in the folder. I/O: lists the folder."""
        sizes = [found.size for found in self._folder.files() if not found.path.endswith(PART)]
        return len(sizes), sum(sizes)

    def clear(self, *, older_than_s: float = 0.0) -> int:
        """Delete entries in the folder not used for a while, else all; and abandoned temporary files. Return how many.

        I/O: lists the folder, removes files.
        """
        now = time.time()
        removed = 0
        self._folder.state().mapped.clear()
        for found in self._folder.files():
            age = STALE_S if found.path.endswith(PART) else older_than_s
            if age <= 0 or now - found.used >= age:  # a clock that was set back leaves entries used in the future
                removed += remove(found.path)
        return removed

    def verify(self) -> dict[str, int]:
        """Read every entry in the folder and delete the damaged ones.

        I/O: reads the whole cache, one entry at a time; what is used longest ago does not change.

        Returns
        -------
        dict
            ``entries`` and ``bytes`` looked at, ``corrupt`` of them deleted, ``unreadable`` ones left alone.

        Raises
        ------
        CacheError
            Others can look into the folder.
        """
        counts = dict.fromkeys(("entries", "bytes", "corrupt", "unreadable"), 0)
        for found in self._folder.files():
            if found.path.endswith(PART):
                continue
            self._folder.check_private()
            try:
                with open(found.path, "rb", buffering=0) as file:
                    raw = file.read()
            except FileNotFoundError:  # evicted just now
                continue
            except OSError:
                counts["unreadable"] += 1
                continue
            counts["entries"] += 1
            counts["bytes"] += len(raw)
            if not is_whole(raw):
                self._folder.state().mapped.forget(found.path)
                counts["corrupt"] += remove(found.path)
        if counts["corrupt"]:
            self._folder.count(corrupt=counts["corrupt"])
        return counts
