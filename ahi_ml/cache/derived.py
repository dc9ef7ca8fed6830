"""The tier of results: arrays read straight into the rows of a batch. The fast path of a warm epoch."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from io import FileIO
from typing import Any, NamedTuple, Protocol

import numpy as np

from ahi_ml.cache.entries import DERIVED_START, checked_derived, derived_beginning, derived_header
from ahi_ml.cache.folder import CacheFolder
from ahi_ml.cache.marks import BYTE, SAMPLE_BITS, Marks
from ahi_ml.cache.recipe import DECODER_EPOCH
from ahi_ml.codec import crc32
from ahi_ml.perprocess import PerProcess
from ahi_ml.types import AnyArray

__all__ = ["DerivedTier", "ResultTier", "result_key"]

_preadv: Any = getattr(os, "preadv", None)  # not on Windows: there every read is a checked one


class _Fit(NamedTuple):
    """How entries begin that fit into arrays of one dtype and shape, and their size."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    size: int
    verified: bytes
    unverified: bytes

    @classmethod
    def of(cls, out: AnyArray) -> _Fit:
        verified, unverified = derived_beginning(out, verified=True), derived_beginning(out, verified=False)
        never = b"." * (DERIVED_START + 1)  # longer than any header: nothing begins so
        return cls(out.dtype, out.shape, DERIVED_START + out.nbytes, verified or never, unverified or never)


class ResultTier(Protocol):
    """Where results of one recipe are kept; see `DerivedTier`."""

    def read_many(self, keys: Sequence[str], outs: Sequence[AnyArray]) -> list[bool | None]:
        """Read results into rows of a batch; None for those that are not there."""
        ...

    def write(self, key: str, array: AnyArray, verified: bool) -> bool:
        """Store a result; whether it is kept."""
        ...


def result_key(datastore_id: str, recipe: str) -> str:
    """What the names of all results of a recipe begin with, before they are hashed. I/O: none."""
    return f"derived\0{DECODER_EPOCH}\0{datastore_id}\0{len(recipe)}\0{recipe}\0"


class DerivedTier:
    """Results of one recipe: arrays of any shape and numeric dtype, found by the key of their frame.

    Made by `FrameCache.derived` once a dataset: what is the same for every frame is worked out there. Threads and
    processes share it; it pickles, and survives a fork.

    An entry is checked against its CRC when a process first reads it and on one read in 64 from then on: checking
    each read would take half of the speed. A damaged one is deleted and counted, a miss.

    Parameters
    ----------
    folder : CacheFolder
        Where the entries lie, among those of the other tiers and under the same bound.
    datastore_id : str
        Whose frames.
    recipe : str
        What was made of them, see `recipe`. `DECODER_EPOCH` is part of every key.

    I/O: none until used.
    """

    def __init__(self, folder: CacheFolder, datastore_id: str, recipe: str) -> None:
        self._folder = folder
        self._identity = datastore_id, recipe
        self._named = hashlib.blake2b(result_key(datastore_id, recipe).encode(), digest_size=16)
        self._marks = PerProcess(Marks)
        self._fit = _Fit.of(np.empty(0, np.int16))  # the last one: rows of a batch are alike

    def __reduce__(self) -> tuple[Callable[..., DerivedTier], tuple[CacheFolder, str, str]]:
        return DerivedTier, (self._folder, *self._identity)

    def _name(self, key: str) -> str:
        named = self._named.copy()
        named.update(key.encode())
        return named.hexdigest()

    def read_into(self, key: str, out: AnyArray) -> bool | None:
        """Read one result; see `read_many`."""
        return self.read_many((key,), (out,))[0]

    def read_many(self, keys: Sequence[str], outs: Sequence[AnyArray]) -> list[bool | None]:
        """Read results into rows of a batch.

        I/O: one file each. Releases the GIL while it reads.

        Parameters
        ----------
        keys : sequence of str
            What tells the results of a recipe apart: the frame's id and, where the result depends on more of its
            metadata than the recipe says (a rescale slope may be edited, the frame's id stays), a digest of that.
        outs : sequence of ndarray, or one ndarray whose rows they are
            Written into; writable and C-contiguous. What a miss leaves in its row is undefined.

        Returns
        -------
        list of bool or None
            For each, whether its pixels were verified before it was written; None for a miss: there is no
            entry, or it is damaged, or it holds an array of another dtype or shape.

        Raises
        ------
        CacheError
            Others can look into the folder.
        ValueError
            A row is not contiguous, or cannot be written.
        """
        folder = self._folder
        state = folder.state()
        if not state.private:
            try:
                folder.check_private()
            except OSError:  # not there, or no folder: nothing is in it, and the first write says why
                folder.count(derived_misses=len(keys))
                return [None] * len(keys)
        # Two passes: copying pixels empties the processor's cache, so what runs between two copies is kept short.
        places = self._places(keys)
        open_, close = os.open, os.close
        head = bytearray(DERIVED_START)
        fit = self._fit
        found: list[bool | None] = []
        total = 0
        for (path, mark, quick, check), out in zip(places, outs, strict=True):
            if out.dtype is not fit.dtype or out.shape != fit.shape:
                fit = self._fit = _Fit.of(out)
            got = 0
            if quick:
                try:
                    descriptor = open_(path, os.O_RDONLY)
                    try:
                        got = _preadv(descriptor, (head, out), 0)
                    finally:
                        close(descriptor)
                except OSError:  # evicted, or a disk that fails: looked at below
                    got = 0
            verdict: bool | None
            if got != fit.size or (check and checked_derived(head) != crc32(out)):
                verdict = self._read_checked(path, mark, out, fit)
            elif head.startswith(fit.verified):
                verdict = True
            elif head.startswith(fit.unverified):
                verdict = False
            else:
                verdict = self._read_checked(path, mark, out, fit)
            if verdict is not None:
                total += out.nbytes
            found.append(verdict)
        misses = found.count(None)
        with state.lock:
            state.stats.derived_hits += len(found) - misses
            state.stats.derived_misses += misses
            state.stats.bytes += total
        return found

    def _places(self, keys: Sequence[str]) -> list[tuple[str, int, bool, bool]]:
        """Return the path of each key, where its marks are, whether one call may read it, and whether to check it."""
        marks = self._marks.get()
        touched, sample = marks.lately(), marks.random.getrandbits
        copy, prefix, separator = self._named.copy, self._folder.entries, os.sep
        places = []
        for key in keys:
            named = copy()
            named.update(key.encode())
            name = named.hexdigest()
            mark = hash(name)
            quick = _preadv is not None and touched[mark >> 3 & BYTE] >> (mark & 7) & 1 == 1
            places.append((f"{prefix}{name[:2]}{separator}{name[2:]}", mark, quick, not sample(SAMPLE_BITS)))
        return places

    def _read_checked(self, path: str, mark: int, out: AnyArray, fit: _Fit) -> bool | None:
        """Read one entry with every doubt: the first time, by sampling, or because it did not look right."""
        folder, marks = self._folder, self._marks.get()
        place, bit = mark >> 3 & BYTE, 1 << (mark & 7)
        head = bytearray(DERIVED_START)
        try:
            with open(path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                whole = _fill(file, memoryview(head))
                checksum = checked_derived(head) if whole else None
                if checksum is not None and not head.startswith((fit.verified, fit.unverified)):
                    return None  # sound, and an array of another kind: the caller's to replace
                sound = checksum is not None and status.st_size == DERIVED_START + out.nbytes and _fill(file, out.data)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:  # replaced on another node just now
                folder.disable(error)
            return None
        known = marks.checked[place] & bit and not marks.touched[place] & bit
        if not sound or (not known and crc32(out) != checksum):
            folder.drop(path)
            folder.count(corrupt=1)
            return None
        folder.touch(path, status.st_mtime)
        marks.note(mark)
        return head.startswith(fit.verified)

    def write(self, key: str, array: AnyArray, verified: bool) -> bool:
        """Store a result.

        I/O: one file, written beside its place and moved; when the disk refuses, one warning and no more writes
        from then on. Now and then a listing and removals, to stay below the bound.

        Parameters
        ----------
        key : str
            See `read_many`.
        array : ndarray
            Numbers, at most six axes. Copied first unless it is C-contiguous.
        verified : bool
            Whether the pixels it was made of were checked.

        Returns
        -------
        bool
            Whether it is kept.

        Raises
        ------
        CacheError
            Others can look into the folder.
        """
        if self._folder.state().disabled:
            return False
        array = np.asarray(array, order="C")
        header = derived_header(array, verified=verified)
        if header is None:
            return False
        name = self._name(key)
        self._marks.get().forget(hash(name))
        return self._folder.write(name, header, array.data)

    def drop(self, key: str) -> None:
        """Forget a result, if it is there. I/O: removes one file."""
        self._folder.drop(self._folder.place(self._name(key)))


def _fill(file: FileIO, buffer: memoryview) -> bool:
    """Read until a buffer is full; say whether it is."""
    rest = buffer.cast("B") if buffer.nbytes else buffer  # an array without elements cannot be cast
    while rest.nbytes:
        got = file.readinto(rest)
        if not got:
            return False
        rest = rest[got:]
    return True
