"""A connection to the embedded store, before anybody is authenticated: bounds on its bytes, its time and its kind.

uvicorn reads and writes HTTP; what it leaves to a proxy in front of it is added here, as there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ahi_ml.local.server import CONNECTION

__all__ = ["BoundedConnection", "make_room"]

_MOST_CONNECTIONS = 1024
_MOST_HEAD = 64 * 1024
_MOST_MESSAGE = 64 * 2**20  # who sends more than is read of a body is told so, up to here
_PATIENCE_S = 60.0
_OWN_FILES = 256  # of the process beside its connections: the catalog, blobs, what imports read
_UPGRADE = re.compile(rb"^upgrade(?=[ \t]*:)", re.I | re.M)


def make_room() -> int:
    """How many connections the process may hold; raises its limit of open files when that can be. I/O: none."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return _MOST_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    wanted = _MOST_CONNECTIONS + _OWN_FILES
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < most:
        with contextlib.suppress(OSError, ValueError):  # the system may have a lower one than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return max(min(_MOST_CONNECTIONS, soft - _OWN_FILES), 16)


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's connection, which ends when a request is too long or too long in coming.

    One that has sent nothing signed yet gives way when there are too many: whoever opens connections and
    lets them be keeps nobody out.
    """

    known = False
    """Set once a request on it was signed as it should be."""
    _unfinished = _in_body = False
    _received = _of_bodies = 0
    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) + 1 >= (self.limit_concurrency or _MOST_CONNECTIONS):
            strangers = [each for each in self.connections if isinstance(each, BoundedConnection) and not each.known]
            if strangers:
                oldest = min(strangers, key=lambda each: each._born)
                self.connections.discard(oldest)  # at once: more may be waiting to be accepted
                oldest.transport.abort()
        super().connection_made(transport)
        self._born = self.loop.time()
        self._overdue = self.loop.call_later(_PATIENCE_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if not self._in_body and b"upgrade" in data.lower():
            # No other protocol is spoken here. The parser does not take no for an answer, and drops the body of
            # a request that asks. Clients that do send a head in one piece.
            data = _UPGRADE.sub(b"x-other", data)
        super().data_received(data)
        # Beside the bytes of a body there are the head, the sizes of chunks, and trailers, which nobody reads.
        if self._received > min(_MOST_HEAD + 2 * self._of_bodies, _MOST_MESSAGE):
            self.transport.close()
        if self._unfinished and self._overdue is None:
            self._overdue = self.loop.call_later(_PATIENCE_S, self._give_up)

    def on_message_begin(self) -> None:
        self._received = self._of_bodies = 0
        self._unfinished = True
        super().on_message_begin()
        self.scope[CONNECTION] = self  # type: ignore[literal-required]

    def on_headers_complete(self) -> None:
        self._in_body = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._of_bodies += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unfinished = self._in_body = False
        self._in_time()
        super().on_message_complete()

    def _in_time(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _give_up(self) -> None:
        self._overdue = None
        self.transport.close()
