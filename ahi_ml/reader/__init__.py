"""From frames named in an index to arrays: cache, fetch, decode, verify, convert. Floor 3.

The one hot path. Many frames are under way at once: the transport's requests wait on the network,
a pool of about as many threads as cores decodes (the codecs release the GIL) straight into the caller's
arrays. What a caller submits together is a `Batch`; nothing here decides how much may be under way,
whoever submits does.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from ahi_ml.cache import CacheEntry, FrameCache, ResultTier, fingerprint
from ahi_ml.client import FrameTransport
from ahi_ml.config import decode_threads
from ahi_ml.errors import ChecksumError, DataError, DecodeError, MetadataError, UnsupportedTransferSyntaxError
from ahi_ml.index import FrameProfile, FrameSource
from ahi_ml.reader.batch import Batch, Task
from ahi_ml.reader.lengths import lengths_of, part_of
from ahi_ml.reader.making import make_frame
from ahi_ml.reader.options import ReadOptions
from ahi_ml.reader.pool import DecodePool
from ahi_ml.reader.remote import make_from_remote
from ahi_ml.reader.stats import ReaderStats
from ahi_ml.types import AnyArray

__all__ = ["Batch", "ReadOptions", "Reader", "ReaderStats"]

_PIXELS_A_TURN = 1 << 18  # that a thread takes from the cache at a time: one frame of 512x512, or
_MOST_A_TURN = 8  # some smaller ones

Stage = Callable[[Task, Any], None]


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
        Decoding threads, by default as many as cores.
    """

    def __init__(self, transport: FrameTransport, datastore_id: str, *, threads: int | None = None) -> None:
        self._transport = transport
        self._datastore_id = datastore_id
        self._cores = threads or decode_threads()
        self._pool = DecodePool(self._cores)
        self._stats = ReaderStats()
        self._lock = threading.Lock()
        self._digests: dict[int, tuple[FrameProfile | MetadataError, str]] = {}

    def submit(
        self,
        sources: Sequence[FrameSource],
        options: ReadOptions,
        *,
        outs: Sequence[AnyArray] | AnyArray | None = None,
        cache: FrameCache | None = None,
        derived: ResultTier | None = None,
    ) -> Batch:
        """Start reading frames.

        I/O: in the background, the caches' files and one request for each frame that is not there, after one to
        the cache's remote tier, if it has one. Of a frame that several threads or processes with the same cache
        want, one request is sent.

        Parameters
        ----------
        sources : sequence of FrameSource
            What to read.
        options : ReadOptions
            What to make of it.
        outs : sequence of ndarray, or one ndarray whose rows they are, optional
            One array a frame, ``profile.shape(output, reduce)`` and the result's dtype, to write into. Results are
            copied faster into rows of one C-contiguous array.
        cache : FrameCache, optional
            Looked into first and filled.
        derived : ResultTier, optional
            Of results of just these options; looked into before that and filled.

        Returns
        -------
        Batch
            Its arrays are `outs` when given.
        """
        batch = Batch(sources, options, outs, self._ended)
        kinds = batch.sources.kinds
        slots = list(range(len(kinds)))
        if any(isinstance(kind, MetadataError) for kind in batch.sources.distinct):
            batch.finish_many([(slot, kind) for slot, kind in enumerate(kinds) if isinstance(kind, MetadataError)])
            slots = [slot for slot in slots if not isinstance(kinds[slot], MetadataError)]
        if derived is not None and slots:
            # One stage for all: what a result costs is less than what a stage does.
            self._pool.put(partial(self._from_derived, batch, slots, derived, cache))
        elif cache is not None and slots:
            self._spread(batch, slots, cache)
        else:
            for slot in slots:
                self._fetch(Task(batch, slot), None)
        return batch

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

        I/O: one request, in the background, which ends when the future is cancelled.
        """
        return self._transport.fetch(image_set_id, frame_id)

    def fetch(self, image_set_id: str, frame_id: str) -> bytes:
        """The encoded bytes of one frame, unverified. I/O: one request."""
        return self.request(image_set_id, frame_id).result()

    def stats(self) -> dict[str, Any]:
        """Counts and seconds so far; see `ReaderStats`. I/O: none."""
        with self._lock:
            return asdict(self._stats)

    @property
    def threads(self) -> int:
        """How many threads decode."""
        return self._pool.threads

    def share_cores(self, processes: int) -> None:
        """Decode with a part of the cores, two threads at least, since other processes decode too. I/O: none."""
        self._pool.threads = min(self._cores, max(2, self._cores // processes))

    def requests(self) -> dict[str, float]:
        """Counts of the requests for frames so far: sent, retried, throttled, delayed_s. I/O: none."""
        counts = self._transport.stats()
        names = {"requests": "requests", "retried": "retried", "throttled": "throttled", "wait_s": "delayed_s"}
        return {ours: counts[theirs] for theirs, ours in names.items()}

    def _ended(self, counts: ReaderStats) -> None:
        with self._lock:
            self._stats.add(counts)

    def close(self) -> None:
        """End the threads; frames under way are dropped. I/O: none."""
        self._transport.close()
        self._pool.close()

    # On the way

    def _spread(self, batch: Batch, slots: list[int], cache: FrameCache) -> None:
        """Have all threads read frames of a batch from the cache, as many at a time as are worth a turn."""
        turn = _a_turn(batch.sources.kinds[slots[0]], batch.options.reduce)
        turns = [slots[start : start + turn] for start in range(0, len(slots), turn)]
        work = partial(self._each, batch, iter(turns), cache)  # of a list: threads may share it
        self._pool.put(work, min(self._pool.threads, len(turns)))

    def _each(self, batch: Batch, turns: Iterator[list[int]], cache: FrameCache, dropped: bool) -> None:
        """Read frames from the cache turn by turn, and have those fetched that are not there."""
        for slots in turns:
            dropped = dropped or batch.cancelled or self._pool.closed
            for slot in slots if dropped else self._read_cached(batch, slots, cache):
                self._begin(batch, slot, self._download, cache, dropped)

    def _begin(self, batch: Batch, slot: int, stage: Stage, given: Any, dropped: bool) -> None:
        """Take a frame on its way, unless it is to be dropped."""
        try:
            task = Task(batch, slot)
        except BaseException as error:
            batch.finish(slot, error)
        else:
            self._step(task, stage, given, dropped)

    def _step(self, task: Task, stage: Stage, given: Any, dropped: bool) -> None:
        """Take a task through a stage."""
        if dropped or task.batch.cancelled or self._pool.closed:
            self._let_go(task)
            return
        try:
            stage(task, given)
        except BaseException as error:  # whatever a stage raises is the frame's outcome
            self._finish(task, error)

    def _hand_over(self, task: Task, stage: Stage, given: Any) -> None:
        """Give a task to the pool, when what it waited for has come."""
        task.batch.arrived = perf_counter()
        self._pool.put(partial(self._step, task, stage, given))

    def _finish(self, task: Task, outcome: AnyArray | BaseException) -> None:
        self._land(task)
        task.batch.finish(task.slot, outcome)

    def _land(self, task: Task) -> None:
        """Tell those who wait for the download that a task has taken on."""
        if task.flight is not None:
            flights, name = task.flight
            task.flight = None
            flights.land(name)

    def _from_derived(
        self, batch: Batch, slots: list[int], derived: ResultTier, cache: FrameCache | None, dropped: bool
    ) -> None:
        keys: dict[int, str] = {}
        try:
            sources = batch.sources
            for slot in slots:
                keys[slot] = sources.frame_ids[slot] + self._digest(sources.kinds[slot])
            if not (dropped or batch.cancelled):
                keys = self._read_derived(batch, keys, derived)
        except BaseException as error:
            batch.finish_many([(slot, error) for slot in slots])
            return
        batch.results = derived, keys
        if dropped or batch.cancelled or cache is None:
            for slot in keys:
                self._begin(batch, slot, self._fetch, None, dropped)
        elif keys:  # to be decoded: by all threads
            self._spread(batch, list(keys), cache)

    def _read_derived(self, batch: Batch, keys: dict[int, str], derived: ResultTier) -> dict[int, str]:
        """Read results, by slots; return those that there are none of."""
        started = perf_counter()
        outs = [batch.out(slot) for slot in keys]
        rows: Sequence[AnyArray] | AnyArray = outs
        apart = False
        if isinstance(batch.outs, np.ndarray) and len(batch.outs) == len(keys) and batch.outs.flags.c_contiguous:
            rows = batch.outs
        elif not all(out.flags.c_contiguous for out in outs):
            apart, rows = True, [np.empty(out.shape, out.dtype) for out in outs]
        found = derived.read_many(list(keys.values()), rows)
        hits: list[tuple[int, AnyArray]] = []
        for slot, out, row, verdict in zip(keys, outs, rows, found, strict=True):
            if verdict is not None:
                if apart:
                    np.copyto(out, row)
                hits.append((slot, out))
        batch.count(
            cached=len(hits),
            verified=found.count(True),
            unverified=found.count(False),
            read_s=perf_counter() - started,
        )
        if len(hits) == len(keys):
            left = {}
        else:
            left = {slot: key for (slot, key), verdict in zip(keys.items(), found, strict=True) if verdict is None}
        batch.finish_many(hits)
        return left

    def _digest(self, profile: FrameProfile | MetadataError) -> str:
        """What tells results apart besides the frame's id: its metadata may be edited, the id stays."""
        known = self._digests.get(id(profile))
        if known is None:
            text = fingerprint(profile) or ""
            digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
            known = self._digests[id(profile)] = (profile, digest)  # the profile too: its id must stay its own
        return known[1]

    def _read_cached(self, batch: Batch, slots: list[int], cache: FrameCache) -> list[int]:
        """Read frames from the cache; return the slots of those that must be fetched."""
        started = perf_counter()
        try:
            sources, options = batch.sources.all(), batch.options
            if options.reduce and options.padding != "keep":
                entries = self._by_level([sources[slot] for slot in slots], options, cache)
            else:
                frame_ids = [batch.sources.frame_ids[slot] for slot in slots]
                entries = cache.get_many(self._datastore_id, frame_ids, options.reduce)
        except BaseException as error:
            batch.finish_many([(slot, error) for slot in slots])
            return []
        read_s = perf_counter() - started
        outcomes: list[tuple[int, AnyArray | BaseException]] = []
        missing: list[int] = []
        outs = batch.outs
        kind = form = None
        made = verified = 0
        decode_s = convert_s = 0.0
        for slot, entry in zip(slots, entries, strict=True):
            if entry is None:
                missing.append(slot)
                continue
            try:
                source = sources[slot]
                if source.kind is not kind or form is None:
                    kind, form = source.kind, batch.form(source.profile)
                out = batch.out(slot) if outs is None else outs[slot]
                known, decoding_s, converting_s = make_frame(source, options, entry, out, form)
                if batch.results is not None:
                    batch.keep(slot, out, verified=known)
            except UnsupportedTransferSyntaxError as error:
                outcomes.append((slot, error))
            except (ChecksumError, DecodeError):
                # Bytes that were cached without a check, and are wrong: ask the data store itself.
                cache.drop(self._datastore_id, batch.sources.frame_ids[slot])
                missing.append(slot)
            except BaseException as error:
                outcomes.append((slot, error))
            else:
                outcomes.append((slot, out))
                made += 1
                verified += known
                decode_s += decoding_s
                convert_s += converting_s
        batch.count(
            cached=made,
            verified=verified,
            unverified=made - verified,
            read_s=read_s,
            decode_s=decode_s,
            convert_s=convert_s,
        )
        batch.finish_many(outcomes)
        return missing

    def _by_level(self, sources: list[FrameSource], options: ReadOptions, cache: FrameCache) -> list[CacheEntry | None]:
        """Frames of which some are needed whole, others not."""
        datastore_id = self._datastore_id
        return [
            entry
            for each in sources
            for entry in cache.get_many(datastore_id, (each.frame_id,), options.levels(each.profile))
        ]

    def _from_cache(self, task: Task, cache: FrameCache) -> None:
        """Look into the cache again, since somebody has fetched the frame."""
        if self._read_cached(task.batch, [task.slot], cache):
            self._download(task, cache)
        else:
            self._land(task)

    def _download(self, task: Task, cache: FrameCache) -> None:
        """Ask the remote tier, then the data store, unless somebody does: then look into the cache again after them."""
        flights, name = cache.flights, cache.name(self._datastore_id, task.source.frame_id)
        if task.flight is None:
            if not flights.join(name, lambda: self._hand_over(task, self._from_cache, cache)):
                return
            task.flight = flights, name
            if cache.has(self._datastore_id, task.source.frame_id):  # came since we looked
                self._from_cache(task, cache)
                return
        asked = cache.ask(self._datastore_id, task.source.frame_id)
        if asked is None:
            self._fetch(task, cache)
            return
        task.batch.sent(asked)
        asked.add_done_callback(lambda done: self._hand_over(task, self._from_remote, (done, cache)))

    def _from_remote(self, task: Task, answer: tuple[Future[bytes | None], FrameCache]) -> None:
        done, cache = answer
        task.batch.requests.discard(done)
        if done.cancelled():
            self._let_go(task)
            return
        out = make_from_remote(task, cache, self._datastore_id, done.result())
        if out is None:
            self._fetch(task, cache)
        else:
            self._finish(task, out)

    def _fetch(self, task: Task, cache: FrameCache | None) -> None:
        if task.batch.cancelled:
            self._let_go(task)
            return
        task.fetches += 1
        # What does not suffice, against expectation, is fetched whole.
        task.part = part_of(task.source, task.options.levels(task.source.profile)) if task.fetches == 1 else None
        future = self._transport.fetch(task.source.image_set_id, task.source.frame_id, task.part)
        task.batch.sent(future)
        # The callback runs in the transport's thread, which must not be kept: decoding is the pool's.
        future.add_done_callback(lambda done: self._hand_over(task, self._from_network, (done, cache)))

    def _let_go(self, task: Task) -> None:
        self._finish(task, DataError(f"frame {task.source.frame_id} was given up before it came"))

    def _from_network(self, task: Task, arrival: tuple[Future[bytes], FrameCache | None]) -> None:
        done, cache = arrival
        batch = task.batch
        batch.requests.discard(done)  # it holds the encoded bytes
        if done.cancelled():
            self._let_go(task)
            return
        data = done.result()
        source = task.source
        try:
            whole = task.part is None or not task.part.stopped
            out = batch.out(task.slot)
            entry, form = CacheEntry(data, False, whole), batch.form(source.profile)
            verified, decode_s, convert_s = make_frame(source, task.options, entry, out, form, again=task.fetches > 1)
        except UnsupportedTransferSyntaxError:
            raise
        except (ChecksumError, DecodeError):
            if task.fetches > 1:
                raise
            batch.count(refetched=1)
            self._fetch(task, cache)
            return
        if cache is not None:
            lengths = lengths_of(source, data, 0 if whole else task.options.reduce)
            cache.put(self._datastore_id, source.frame_id, data, verified=verified, whole=whole, prefixes=lengths)
        batch.keep(task.slot, out, verified=verified)
        batch.count(
            fetched=1,
            bytes_fetched=len(data),
            verified=verified,
            unverified=not verified,
            decode_s=decode_s,
            convert_s=convert_s,
        )
        self._finish(task, out)


def _a_turn(kind: FrameProfile | MetadataError, reduce: int) -> int:
    """How many frames a thread takes at a time: what is done once a turn costs as much as decoding a tiny frame."""
    if isinstance(kind, MetadataError):
        return 1
    pixels = kind.pixels.rows * kind.pixels.columns * kind.pixels.samples >> 2 * reduce
    return max(1, min(_MOST_A_TURN, _PIXELS_A_TURN // max(pixels, 1)))
