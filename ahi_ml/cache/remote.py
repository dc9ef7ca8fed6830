"""The remote tier: encoded frames in an object store too, for machines whose disks do not last. Lazy fsspec.

It takes entries as they lie on disk, header and all, under the same opaque names, so that what comes back is checked
like a file. It has no bound: let the bucket's lifecycle rules expire objects. Who can read it is the bucket's policy,
not ours to see. Trouble costs one warning and a pause, never a run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from ahi_ml.cache.lookups import Lookups
from ahi_ml.errors import ConfigError
from ahi_ml.perprocess import PerProcess
from ahi_ml.remote import refuse_password

__all__ = ["RemoteTier"]

_LOG = logging.getLogger(__name__)
_WRITERS = 48  # with few, a first epoch goes at the pace of so many writes a round trip
_MOST_WAITING = 64  # entries on their way there: beyond, whoever puts waits
_AT_ONCE = 64  # requests for entries under way: as many as may be for frames
_START = 0  # said aloud, a read is one request; without it, s3fs asks for the size first
_PAUSE_S = 60.0  # without asking a remote that failed


class _Connection:
    """What one process has of the remote."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        try:
            import fsspec

            self.files, self.root = fsspec.core.url_to_fs(url, **_connected(url, options, fsspec.config.conf))
        except (ImportError, ValueError) as error:  # no fsspec, no s3fs, or a protocol nobody knows
            raise ConfigError(
                f"the remote cache {url.partition('://')[0]}:// cannot be used: {error}. "
                "For Amazon S3: pip install 'ahi_ml[s3]'"
            ) from error
        self.lookups = Lookups(_AT_ONCE)
        self.pool = ThreadPoolExecutor(_WRITERS, "ahi-ml-remote-cache")
        self.room = threading.BoundedSemaphore(_MOST_WAITING)
        self.lock = threading.Lock()
        self.waiting: set[Any] = set()
        self.warned = False
        self.pause_until = 0.0


class RemoteTier:
    """Entries under a URL that fsspec knows.

    Parameters
    ----------
    url : str
        Such as ``s3://bucket/prefix``.
    options : mapping, optional
        For the file system, as in ``fsspec.open``. They are pickled with the cache: leave credentials to the
        environment.

    I/O: none until used.

    Raises
    ------
    ConfigError
        No URL, or one with a password in it.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        if "://" not in url:
            raise ConfigError(f"a remote cache is a URL such as s3://bucket/prefix, not {url!r}")
        refuse_password(url)
        self.url = url.rstrip("/") if not url.endswith("://") else url
        self.options = dict(options or {})
        self._process = PerProcess(self._connect)

    def __reduce__(self) -> tuple[Callable[..., RemoteTier], tuple[str, dict[str, Any]]]:
        return RemoteTier, (self.url, self.options)

    def _connect(self) -> _Connection:
        return _Connection(self.url, self.options)

    def get(self, name: str) -> bytes | None:
        """Return an entry's bytes, unchecked; None when it is not there or the remote is in trouble.

        I/O: one request.
        """
        return self._read(self._process.get(), name)

    def ask(self, name: str) -> Future[bytes | None] | None:
        """Start what `get` does, many at once.

        I/O: one request, in the background. The future may be cancelled until the answer is there.

        Returns
        -------
        Future, or None
            None without asking while a remote that failed is left alone.
        """
        connection = self._process.get()
        if self._pausing(connection):
            return None
        return connection.lookups.start(partial(self._read, connection, name))

    def _read(self, connection: _Connection, name: str) -> bytes | None:
        if self._pausing(connection):
            return None
        try:
            return bytes(connection.files.cat_file(_place(connection, name), start=_START))
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever the libraries below raise: a cache must not end a run
            self._trouble(connection, error)
            return None

    def put(self, name: str, entry: bytes) -> None:
        """Send an entry there.

        I/O: one request, in the background; waits while many are under way already.
        """
        connection = self._process.get()
        if self._pausing(connection):
            return
        connection.room.acquire()
        try:
            sending = connection.pool.submit(self._send, connection, name, entry)
        except RuntimeError:  # the interpreter ends
            connection.room.release()
            return
        with connection.lock:
            connection.waiting.add(sending)
        sending.add_done_callback(connection.waiting.discard)

    def _send(self, connection: _Connection, name: str, entry: bytes) -> None:
        try:
            if not self._pausing(connection):
                connection.files.pipe_file(_place(connection, name), entry)
        except Exception as error:
            self._trouble(connection, error)
        finally:
            connection.room.release()

    def flush(self) -> None:
        """Wait until everything put before is there, or was given up. I/O: what is under way."""
        connection = self._process.get()
        with connection.lock:
            waiting = list(connection.waiting)
        wait(waiting)

    def _pausing(self, connection: _Connection) -> bool:
        return time.monotonic() < connection.pause_until

    def _trouble(self, connection: _Connection, error: BaseException) -> None:
        """Leave the remote alone for a while; warn the first time."""
        with connection.lock:
            warned, connection.warned = connection.warned, True
            connection.pause_until = time.monotonic() + _PAUSE_S
        if not warned:
            _LOG.warning(
                "the remote cache %s is in trouble, and is tried again every %d s: %s: %s",
                self.url,
                _PAUSE_S,
                type(error).__name__,
                error,
            )


def _connected(url: str, options: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options with as many connections as there are requests, for s3fs: of itself it opens ten, and the rest wait."""
    if url.partition("://")[0] not in ("s3", "s3a"):
        return dict(options)
    given = {**settings.get("s3", {}), **settings.get("s3a", {}), **options}.get("config_kwargs") or {}
    return {**options, "config_kwargs": {"max_pool_connections": _AT_ONCE + _WRITERS, **given}}


def _place(connection: _Connection, name: str) -> str:
    return f"{connection.root}/frames/{name[:2]}/{name[2:]}"
