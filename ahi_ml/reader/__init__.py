"""From frames named in an index to arrays: cache, fetch, decode, verify, convert. Floor 3.

The one hot path. Many frames are under way at once: the transport's requests wait on the network,
a pool of as many threads as cores decodes (the codecs release the GIL) straight into the caller's
arrays. What a caller submits together is a `Batch`; nothing here decides how much may be under way,
whoever submits does.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np

from ahi_ml.cache import DerivedTier, FrameCache, fingerprint
from ahi_ml.client import FrameTransport
from ahi_ml.codec import PixelFormat, crc32, decode
from ahi_ml.config import decode_threads
from ahi_ml.errors import ChecksumError, ConfigError, DataError, DecodeError, UnsupportedTransferSyntaxError
from ahi_ml.index import FrameProfile, FrameSource
from ahi_ml.reader.batch import Batch, ReaderStats, Task
from ahi_ml.reader.options import ReadOptions
from ahi_ml.reader.values import convert_values
from ahi_ml.types import AnyArray, Buffer

__all__ = ["Batch", "ReadOptions", "Reader", "ReaderStats"]


class Reader:
    """Reads frames of one data store with a transport, a cache and a pool of threads.

    One a process: threads do not survive a fork.

    Parameters
    ----------
    transport : FrameTransport
        Where frames come from.
    datastore_id : str
        Part of the cache's key.
    threads : int, optional
        Decoding threads; as many as cores by default.
    """

    def __init__(self, transport: FrameTransport, datastore_id: str, *, threads: int | None = None) -> None:
        self._transport = transport
        self._datastore_id = datastore_id
        self._pool = ThreadPoolExecutor(threads or decode_threads(), "ahi-ml-decode")
        self._scratch = threading.local()
        self._stats = ReaderStats()
        self._lock = threading.Lock()
        self._digests: dict[int, tuple[FrameProfile, str]] = {}

    def submit(
        self,
        sources: Sequence[FrameSource],
        options: ReadOptions,
        *,
        outs: Sequence[AnyArray] | None = None,
        cache: FrameCache | None = None,
        derived: DerivedTier | None = None,
    ) -> Batch:
        """Start reading frames.

        I/O: in the background, the caches' files and one request for each frame that is not there. Of a
        frame that several threads or processes with the same cache want, one request is sent.

        Parameters
        ----------
        sources : sequence of FrameSource
            What to read.
        options : ReadOptions
            What to make of it.
        outs : sequence of ndarray, optional
            One array a frame, ``profile.shape(output, reduce)`` and the result's dtype, to write into.
        cache : FrameCache, optional
            Looked into first and filled.
        derived : DerivedTier, optional
            Of results of just these options; looked into before that and filled.

        Returns
        -------
        Batch
            Its arrays are `outs` when given.
        """
        batch = Batch(len(sources))
        tasks = []
        for slot, source in enumerate(sources):
            if source.problem is not None:
                batch.finish(slot, source.problem)
                continue
            tasks.append(Task(batch, slot, source, outs[slot] if outs is not None else None, options))
        if derived is not None and tasks:
            try:  # one stage for all: what a result costs is less than what a stage does
                self._pool.submit(self._from_derived, tasks, derived, cache)
            except RuntimeError:
                for task in tasks:
                    self._let_go(task)
            return batch
        for task in tasks:
            self._begin(task, cache)
        return batch

    def _begin(self, task: Task, cache: FrameCache | None) -> None:
        if cache is None:
            self._fetch(task, None)
        else:
            self._hand_over(task, self._from_cache, cache)

    def read(
        self,
        sources: Sequence[FrameSource],
        options: ReadOptions | None = None,
        *,
        cache: FrameCache | None = None,
    ) -> list[AnyArray]:
        """Read frames and wait for them; see `submit`."""
        return self.submit(sources, options or ReadOptions(), cache=cache).wait()

    def request(self, image_set_id: str, frame_id: str) -> Future[bytes]:
        """Start fetching the encoded bytes of a frame, unverified and past any cache.

        I/O: one request, in the background. The future may be cancelled until it is sent.
        """
        return self._transport.fetch(image_set_id, frame_id)

    def fetch(self, image_set_id: str, frame_id: str) -> bytes:
        """The encoded bytes of one frame, unverified. I/O: one request."""
        return self.request(image_set_id, frame_id).result()

    def stats(self) -> dict[str, int]:
        """Counts so far; see `ReaderStats`. I/O: none."""
        with self._lock:
            return asdict(self._stats)

    def close(self) -> None:
        """End the threads; frames under way are dropped. I/O: none."""
        self._transport.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # On the way

    def _guard(self, task: Task, work: Callable[..., None], *arguments: Any) -> None:
        """Run a stage; whatever it raises is the frame's outcome."""
        if task.batch.cancelled:
            self._let_go(task)
            return
        try:
            work(task, *arguments)
        except BaseException as error:
            self._finish(task, error)

    def _finish(self, task: Task, outcome: AnyArray | BaseException) -> None:
        if task.flight is not None:
            flights, name = task.flight
            task.flight = None
            flights.land(name)
        task.batch.finish(task.slot, outcome)

    def _done(self, task: Task, array: AnyArray, verified: bool) -> None:
        """A frame was made: keep it where results are kept, and hand it out."""
        if task.derived is not None:
            tier, key = task.derived
            tier.write(key, array, verified)
        self._finish(task, array)

    def _from_derived(self, tasks: list[Task], derived: DerivedTier, cache: FrameCache | None) -> None:
        try:
            self._read_derived(tasks, derived, cache)
        except BaseException as error:
            for task in tasks:
                task.batch.finish(task.slot, error)

    def _read_derived(self, tasks: list[Task], derived: DerivedTier, cache: FrameCache | None) -> None:
        if tasks[0].batch.cancelled:
            for task in tasks:
                self._let_go(task)
            return
        keys, rows = [], []
        for task in tasks:
            keys.append(task.source.frame_id + self._digest(task.source.profile))
            if task.out is None:
                task.out = np.empty(*self._form(task))
            rows.append(task.out if task.out.flags.c_contiguous else np.empty(task.out.shape, task.out.dtype))
        found = derived.read_many(keys, rows)
        hits = verified = 0
        left = []
        for task, key, row, verdict in zip(tasks, keys, rows, found, strict=True):
            if verdict is None:
                task.derived = derived, key
                left.append(task)
                continue
            assert task.out is not None
            if row is not task.out:
                np.copyto(task.out, row)
            hits += 1
            verified += verdict
            task.batch.finish(task.slot, task.out)
        self._count(cached=hits, verified=verified, unverified=hits - verified)
        for task in left:
            self._begin(task, cache)

    def _form(self, task: Task) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape and dtype of a task's result."""
        profile, options = task.source.profile, task.options
        return profile.shape(options.output, options.reduce), options.result_dtype(profile)

    def _digest(self, profile: FrameProfile) -> str:
        """What tells results apart besides the frame's id: its metadata may be edited, the id stays."""
        known = self._digests.get(id(profile))
        if known is None:
            text = fingerprint(profile) or ""
            digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
            known = self._digests[id(profile)] = (profile, digest)  # the profile too: its id must stay its own
        return known[1]

    def _from_cache(self, task: Task, cache: FrameCache) -> None:
        source = task.source
        entry = cache.get(self._datastore_id, source.frame_id)
        if entry is None:
            self._download(task, cache)
            return
        try:
            array, verified = self._convert(task, entry.data, trusted=entry.verified)
        except UnsupportedTransferSyntaxError:
            raise
        except (ChecksumError, DecodeError):
            # Bytes that were cached without a check, and are wrong: ask the data store itself.
            cache.drop(self._datastore_id, source.frame_id)
            self._download(task, cache)
            return
        self._count(cached=1, verified=verified, unverified=not verified)
        self._done(task, array, verified)

    def _download(self, task: Task, cache: FrameCache) -> None:
        """Fetch a frame unless somebody does: then look into the cache again when they are done."""
        flights, name = cache.flights, cache.name(self._datastore_id, task.source.frame_id)
        if task.flight is None:
            if not flights.join(name, lambda: self._hand_over(task, self._from_cache, cache)):
                return
            task.flight = flights, name
            if cache.has(self._datastore_id, task.source.frame_id):  # came since we looked
                self._from_cache(task, cache)
                return
        self._fetch(task, cache)

    def _fetch(self, task: Task, cache: FrameCache | None) -> None:
        if task.batch.cancelled:
            self._let_go(task)
            return
        task.fetches += 1
        future = self._transport.fetch(task.source.image_set_id, task.source.frame_id)
        task.batch.requests.add(future)
        # The callback runs in the transport's thread, which must not be kept: decoding is the pool's.
        future.add_done_callback(lambda done: self._hand_over(task, self._from_network, done, cache))

    def _hand_over(self, task: Task, work: Callable[..., None], *arguments: Any) -> None:
        """Give a stage to the pool; once the reader is closed, the frame's outcome says so."""
        try:
            stage = self._pool.submit(self._guard, task, work, *arguments)
        except RuntimeError:
            self._let_go(task)
        else:
            stage.add_done_callback(lambda done: self._let_go(task) if done.cancelled() else None)

    def _let_go(self, task: Task) -> None:
        self._finish(task, DataError(f"frame {task.source.frame_id} was given up before it came"))

    def _from_network(self, task: Task, done: Future[bytes], cache: FrameCache | None) -> None:
        task.batch.requests.discard(done)  # it holds the encoded bytes
        if done.cancelled():
            self._let_go(task)
            return
        data = done.result()
        source = task.source
        try:
            array, verified = self._convert(task, data, trusted=False)
        except UnsupportedTransferSyntaxError:
            raise
        except (ChecksumError, DecodeError):
            if task.fetches > 1:
                raise
            self._count(refetched=1)
            self._fetch(task, cache)
            return
        if cache is not None:
            cache.put(self._datastore_id, source.frame_id, data, verified=verified)
        self._count(fetched=1, bytes_fetched=len(data), verified=verified, unverified=not verified)
        self._done(task, array, verified)

    def _count(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self._stats, name, getattr(self._stats, name) + count)

    # Conversion

    def _convert(self, task: Task, data: Buffer, *, trusted: bool) -> tuple[AnyArray, bool]:
        """Decode, verify and convert; also say whether the pixels are known to be right."""
        source, options, profile = task.source, task.options, task.source.profile
        check = options.verify and not trusted and source.checksum is not None
        if check and profile.checksum_of == "bytes" and crc32(data) != source.checksum:
            raise self._mismatch(task, "encoded bytes")
        shape, dtype = self._form(task)
        out = task.out
        if out is None:
            out = np.empty(shape, dtype)
        elif out.shape != shape or out.dtype != dtype:
            raise ConfigError(f"the array to read into is {out.dtype}{out.shape}, the frame is {dtype}{shape}")
        direct = options.output == "stored" and dtype == profile.pixels.dtype and out.flags.c_contiguous
        try:
            place = out if direct else self._scratch_array(profile.pixels.reduced(options.reduce))
            stored = decode(data, profile.syntax, profile.pixels, out=place, reduce=options.reduce)
        except DecodeError as error:
            where = f"frame {source.frame_id} of image set {source.image_set_id}"
            raise type(error)(
                f"{where}: {error}", image_set_id=source.image_set_id, frame_id=source.frame_id
            ) from error
        whole = options.reduce == 0
        if check and whole and profile.checksum_of == "samples" and crc32(stored) != source.checksum:
            raise self._mismatch(task, "decoded pixels")
        if not direct:
            convert_values(stored, profile, options, out)
        verified = trusted or (
            check and (profile.checksum_of == "bytes" or (whole and profile.checksum_of == "samples"))
        )
        return out, verified

    def _scratch_array(self, pixels: PixelFormat) -> AnyArray:
        """This thread's array of a shape: fresh pages cost as much as the conversion."""
        key = (pixels.shape, pixels.dtype)
        arrays = self._scratch.__dict__
        if arrays.get("key") != key:
            arrays["key"], arrays["array"] = key, np.empty(*key)
        return arrays["array"]  # type: ignore[no-any-return]

    def _mismatch(self, task: Task, what: str) -> ChecksumError:
        source = task.source
        return ChecksumError(
            f"frame {source.frame_id} of image set {source.image_set_id}: its {what} differ from the data store's "
            f"checksum{', twice' if task.fetches > 1 else ''}. Report the frame; verify=False reads it all the same",
            image_set_id=source.image_set_id,
            frame_id=source.frame_id,
        )
