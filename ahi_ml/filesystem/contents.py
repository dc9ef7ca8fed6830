"""The bytes of many documents and frames at once: requests under way together, frames through the cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ahi_ml.client import image_set_document
from ahi_ml.filesystem.places import Place, as_os_errors
from ahi_ml.metadata import document_text
from ahi_ml.store import DataStore

__all__ = ["contents"]

_AHEAD = 128  # more than the transport has in flight, and a bound of what is held in memory
_DOCUMENT_THREADS = 16


@dataclass(frozen=True, slots=True)
class _Started:
    place: Place
    store: DataStore
    data: Future[bytes]
    fetched: bool


def contents(places: Sequence[Place], store_of: Callable[[Place], DataStore]) -> Generator[bytes | Exception]:
    """Yield the bytes of files, or what went wrong with each, in the order given.

    I/O: for a document one GetImageSetMetadata; for a frame its cache file, or one request, whose answer
    is cached. Nothing compares a frame with its checksum here, and the cache entry says so: `Reader`
    checks it when it decodes it.

    Parameters
    ----------
    places : sequence of Place
        Files.
    store_of : callable
        Gives the data store of a place; what it raises is the outcome of that place.
    """
    waiting: deque[_Started | Exception] = deque()
    rest = iter(places)
    pool = ThreadPoolExecutor(_DOCUMENT_THREADS, "ahi-ml-documents")  # makes threads as they are needed
    try:
        for place in rest:
            waiting.append(_start(place, store_of, pool))
            if len(waiting) == _AHEAD:
                yield _outcome(waiting.popleft())
        while waiting:
            yield _outcome(waiting.popleft())
    finally:  # whoever asked may have stopped in the middle
        for started in waiting:
            if not isinstance(started, Exception):
                started.data.cancel()
        pool.shutdown(wait=False, cancel_futures=True)


def _start(place: Place, store_of: Callable[[Place], DataStore], pool: ThreadPoolExecutor) -> _Started | Exception:
    try:
        with as_os_errors(place.path):
            store = store_of(place)
            if place.kind == "document":
                return _Started(place, store, pool.submit(_document, place, store), fetched=False)
            entry = store.cache.get(place.datastore_id, place.frame_id)
            if entry is None:
                return _Started(place, store, store.reader.request(place.image_set_id, place.frame_id), fetched=True)
            data: Future[bytes] = Future()
            data.set_result(bytes(entry.data))
            return _Started(place, store, data, fetched=False)
    except Exception as error:
        return error


def _document(place: Place, store: DataStore) -> bytes:
    return document_text(image_set_document(store.client, place.datastore_id, place.image_set_id, place.version_id))


def _outcome(started: _Started | Exception) -> bytes | Exception:
    if isinstance(started, Exception):
        return started
    try:
        with as_os_errors(started.place.path):
            data = started.data.result()
    except Exception as error:
        return error
    if started.fetched:
        started.store.cache.put(started.place.datastore_id, started.place.frame_id, data, verified=False)
    return data
