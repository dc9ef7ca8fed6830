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
from ahi_ml.cache.pages import Shelf, map_file
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


class _Mapped(NamedTuple):
    """A result in memory that the process shares with the file system."""

    pixels: AnyArray
    verified: bool
    checksum: int
    mark: int  # where its mark is, see `Marks`
    shelf: Shelf | None  # where it lies beside others,
    row: int  # and which it is there


class ResultTier(Protocol):
    """Where results of one recipe are kept; see `DerivedTier`."""

    def read_many(self, keys: Sequence[str], outs: Sequence[AnyArray] | AnyArray) -> list[bool | None]:
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
        self._token = self._named.hexdigest()
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

    def read_many(self, keys: Sequence[str], outs: Sequence[AnyArray] | AnyArray) -> list[bool | None]:
        """Read results into rows of a batch.

        I/O: one file each that the process does not have mapped (see `cache.mapped`). Releases the GIL while it copies:
        once for all that are mapped when `outs` is one array.

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
            A row is not contiguous, or cannot be written, or there is not one for each key.
        """
        if len(keys) != len(outs):
            raise ValueError(f"{len(outs)} arrays for {len(keys)} results")
        folder = self._folder
        state = folder.state()
        if not state.private:
            try:
                folder.check_private()
            except OSError:  # not there, or no folder: nothing is in it, and the first write says why
                folder.count(derived_misses=len(keys))
                return [None] * len(keys)
        # Copying pixels empties the processor's cache, and waits for the GIL in the end: as much as can be is copied at
        # once, and what runs between two copies is kept short.
        mapped, token = state.mapped.get, self._token
        all_kept: list[_Mapped | None] = [mapped((token, key)) for key in keys]
        marks = self._marks.get()
        touched, sample = marks.lately(), marks.random.getrandbits
        all_kept = [
            kept if kept is not None and touched[kept.mark >> 3 & BYTE] >> (kept.mark & 7) & 1 else None
            for kept in all_kept
        ]
        shelf = _take(all_kept, outs)
        found: list[bool | None] = []
        total = 0
        for slot, (key, kept) in enumerate(zip(keys, all_kept, strict=True)):
            verdict: bool | None = None
            if kept is not None and ((shelf is not None and kept.shelf is shelf) or _copy(kept, outs[slot])):
                verdict = kept.verified if sample(SAMPLE_BITS) or self._is_sound(key, kept, outs[slot]) else None
            if verdict is None:
                verdict = self._read(key, outs[slot], doubted=kept is not None)
            if verdict is not None:
                total += outs[slot].nbytes if kept is None else kept.pixels.nbytes
            found.append(verdict)
        misses = found.count(None)
        with state.lock:
            state.stats.derived_hits += len(found) - misses
            state.stats.derived_misses += misses
            state.stats.bytes += total
        return found

    def _is_sound(self, key: str, kept: _Mapped, out: AnyArray) -> bool:
        """Whether a mapped entry, which was copied, is still in the folder, and its pixels are what was written."""
        return os.path.exists(self._folder.place(self._name(key))) and crc32(out) == kept.checksum

    def _read(self, key: str, out: AnyArray, *, doubted: bool) -> bool | None:
        """Read one entry from its file, quickly unless it is doubted, and map it if it was read before."""
        fit = self._fit
        if out.dtype is not fit.dtype or out.shape != fit.shape:
            fit = self._fit = _Fit.of(out)
        name, marks = self._name(key), self._marks.get()
        path, mark = self._folder.place(name), hash(name)
        verdict: bool | None = None
        if _preadv is not None and not doubted and marks.touched[mark >> 3 & BYTE] >> (mark & 7) & 1:
            check = not marks.random.getrandbits(SAMPLE_BITS)
            kept = self._map(key, path, mark, fit)
            if kept is None:
                verdict = self._read_quickly(path, out, fit, check)
            elif _copy(kept, out) and not (check and crc32(out) != kept.checksum):
                verdict = kept.verified
        return self._read_checked(path, mark, out, fit) if verdict is None else verdict

    def _map(self, key: str, path: str, mark: int, fit: _Fit) -> _Mapped | None:
        def make(descriptor: int, size: int) -> _Mapped | None:
            if size != fit.size:
                return None
            shelf = self._folder.state().mapped.shelf(fit.dtype, fit.shape, DERIVED_START)
            put = shelf.put(descriptor) if shelf is not None else None
            raw, row = put or (map_file(descriptor, size), 0)
            head = raw[:DERIVED_START].tobytes()
            checksum = checked_derived(head)
            if checksum is None or not head.startswith((fit.verified, fit.unverified)):
                return None
            pixels = raw[DERIVED_START:].view(fit.dtype).reshape(fit.shape)
            if crc32(pixels) != checksum:  # what was read before may have been another: two names may share a mark
                self._folder.drop(path)
                self._folder.count(corrupt=1)
                return None
            return _Mapped(pixels, head.startswith(fit.verified), checksum, mark, shelf if put else None, row)

        return self._folder.map((self._token, key), path, make)

    def _read_quickly(self, path: str, out: AnyArray, fit: _Fit, check: bool) -> bool | None:
        """Read one entry by one call; None when anything about it does not look right."""
        head = bytearray(DERIVED_START)
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                got = _preadv(descriptor, (head, out), 0)
            finally:
                os.close(descriptor)
        except OSError:  # evicted, or a disk that fails
            return None
        if got != fit.size or (check and checked_derived(head) != crc32(out)):
            return None
        if head.startswith(fit.verified):
            return True
        return False if head.startswith(fit.unverified) else None

    def _read_checked(self, path: str, mark: int, out: AnyArray, fit: _Fit) -> bool | None:
        """Read one entry with every doubt: the first time, by sampling, or because it did not look right."""
        folder, marks = self._folder, self._marks.get()
        folder.state().mapped.forget(path)
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


def _take(all_kept: Sequence[_Mapped | None], outs: Sequence[AnyArray] | AnyArray) -> Shelf | None:
    """Copy those mapped results by one call that lie on one shelf, which is returned; None when few do.

    What the rows of the others are left with is no matter: they are read one by one then.
    """
    if not isinstance(outs, np.ndarray):
        return None
    shelf = next((kept.shelf for kept in all_kept if kept is not None), None)
    if shelf is None or not shelf.fits(outs):
        return None
    rows = [kept.row for kept in all_kept if kept is not None and kept.shelf is shelf]
    if len(rows) < len(outs):
        if 2 * len(rows) < len(outs):
            return None
        rows = [kept.row if kept is not None and kept.shelf is shelf else rows[0] for kept in all_kept]
    shelf.take(rows, outs)
    return shelf


def _copy(kept: _Mapped, out: AnyArray) -> bool:
    """Copy one mapped result, if it is of this kind."""
    if kept.pixels.shape != out.shape or kept.pixels.dtype is not out.dtype:
        return False
    if not out.flags.c_contiguous:
        raise ValueError("results are read into C-contiguous arrays only")
    np.copyto(out, kept.pixels)
    return True


def _fill(file: FileIO, buffer: memoryview) -> bool:
    """Read until a buffer is full; say whether it is."""
    rest = buffer.cast("B") if buffer.nbytes else buffer  # an array without elements cannot be cast
    while rest.nbytes:
        got = file.readinto(rest)
        if not got:
            return False
        rest = rest[got:]
    return True
