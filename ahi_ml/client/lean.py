"""GetImageFrame by libcurl: one thread, one multi handle, many requests in flight.

It costs a fifth of boto3's CPU a request and hands the GIL over as little, which leaves the cores
to the decoders. What it sends, whom it trusts and when it tries again are boto3's: endpoint,
credentials, proxies, certificates and time-outs come from the client, errors become the same classes.
Beyond boto3, a body that is no frame and an image set that is not ready are asked for again, a frame
has a deadline, and there is no budget of retries that a burst of throttling would use up.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import socket
import threading
import time
from collections import deque
from contextlib import suppress
from urllib.parse import quote, urlsplit

from botocore.awsrequest import HeadersDict
from botocore.parsers import create_parser

from ahi_ml.client.failures import (
    ATTEMPTS,
    answer_error,
    closed,
    deadline_after,
    is_late,
    is_throttling,
    no_answer,
    repeat_at,
    translated,
    unsent,
)
from ahi_ml.client.future import FrameFuture
from ahi_ml.client.governor import Governor
from ahi_ml.client.multi import LeanEndpoint, Multi, Request
from ahi_ml.client.partial import Part
from ahi_ml.client.signing import FrameSigner
from ahi_ml.errors import AhiError, ServiceError

__all__ = ["CurlTransport", "misfit"]

_LOG = logging.getLogger(__name__)
_LOOK_S = 0.25  # how often to look for requests whose repetition has waited for too long
_LONGEST_TYPE = 100  # in a message
_AT_ONCE = 8  # requests started before answers are looked at: meanwhile the decoders wait for the GIL
# What the service may call a frame, and video/. Whatever else answers, a proxy's page or a picture in one, is none:
# a decoder might not notice, and who reads the bytes as they are would keep them.
_FRAMES = frozenset(
    {
        "",  # not said
        "application/octet-stream",
        "image/dicom-rle",
        "image/j2c",
        "image/jls",
        "image/jp2",
        "image/jpeg",
        "image/jph",
        "image/jphc",
        "image/jxl",
    }
)


def misfit(size: int, content_type: str) -> str:
    """Why the body of a good answer is no frame; empty if it may be one. I/O: none."""
    if not size:
        return "an empty body instead of a frame"
    kind = content_type.partition(";")[0].strip().lower()
    if kind not in _FRAMES and not kind.startswith("video/"):
        return f"a body of type {content_type[:_LONGEST_TYPE]} instead of a frame"
    return ""


class CurlTransport:
    """A `FrameTransport` on libcurl.

    I/O: none until the first `fetch`, which starts the thread. Of one process: a forked child must
    make its own.

    Parameters
    ----------
    endpoint : LeanEndpoint
        Where and as whom.
    datastore_id : str
        The data store.
    in_flight : int
        Requests at a time; further ones wait in order.
    governor : Governor, optional
        Says when each may go; at once by default.
    """

    def __init__(
        self, endpoint: LeanEndpoint, datastore_id: str, *, in_flight: int = 56, governor: Governor | None = None
    ) -> None:
        self._endpoint = endpoint
        parts = urlsplit(endpoint.base_url)
        host = _host(endpoint.base_url)
        self._path = f"{parts.path.rstrip('/')}/datastore/{datastore_id}/imageSet/"
        self._origin = f"{parts.scheme}://{host}"
        self._signer = FrameSigner(endpoint.credentials, endpoint.region, host)
        self._in_flight = in_flight
        self._governor = governor or Governor()
        self._pace = self._governor.pace("GetImageFrame")
        self._waiting: deque[Request] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._woken = False
        self._dropped = False  # whether futures have been cancelled whose requests have not been ended
        self._ears, self._bell = socket.socketpair()
        self._ears.setblocking(False)
        self._bell.setblocking(False)

    def fetch(self, image_set_id: str, frame_id: str, part: Part | None = None) -> FrameFuture:
        """Start fetching the encoded bytes of a frame, or of its first part.

        I/O: one request, in the background, and up to seven more. The future raises `ServiceError` or
        one of its kinds; cancelling it ends the request and closes its connection.
        """
        request = Request(image_set_id, frame_id, FrameFuture(self._on_cancel), part=part)
        with self._lock:
            if self._closed:
                raise closed("GetImageFrame", request.where)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ahi-ml-io", daemon=True)
                self._thread.start()
            self._waiting.append(request)
            if not self._woken:
                self._bell.send(b"\0")
                self._woken = True
        return request.future

    def _on_cancel(self, _: FrameFuture) -> None:
        if not self._dropped:
            self._dropped = True
            # Without the lock, which a forked child would find held for ever. A bell that cannot be rung has been,
            # or nobody is left to hear it.
            with suppress(OSError):
                self._bell.send(b"\0")

    def stats(self) -> dict[str, float]:
        """Counts of requests so far; see `Counts`. I/O: none."""
        return self._governor.stats("GetImageFrame")

    def close(self) -> None:
        """Drop every request and end the thread. I/O: closes the connections."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._thread is None:
                self._ears.close()
                self._bell.close()
            else:
                self._bell.send(b"\0")

    # In the thread

    def _run(self) -> None:
        self._later: list[tuple[float, int, Request]] = []
        self._count = itertools.count()
        self._look = 0.0
        loop: Multi | None = None
        failure: Exception | None = None
        try:
            loop = Multi(self._endpoint, self._in_flight, self._settle)
            loop.listen(self._ears)
            self._work(loop)
        except Exception as error:  # nothing may end this thread and leave futures waiting for ever
            _LOG.exception("the frame transport failed")
            failure = error
        finally:
            with self._lock:
                self._closed = True
            under_way = loop.requests() if loop is not None else []
            self._abandon([*under_way, *(each[2] for each in self._later)], failure)
            if loop is not None:
                loop.close()
            self._ears.close()
            self._bell.close()

    def _work(self, loop: Multi) -> None:
        while not self._closed:
            if self._dropped:
                self._dropped = False  # before looking: who is cancelled meanwhile rings again
                self._drop(loop)
            now = time.monotonic()
            due = self._fill(loop, now)
            if self._later:
                self._end_late(now)
                due = now + _LOOK_S if due is None else min(due, now + _LOOK_S)
            if loop.turn(None if due is None else due - now):
                # In this order: a fetch before the flag falls does not ring, and is found at the top of the
                # loop; one after it rings a bell that nobody silences.
                self._drain()
                with self._lock:
                    self._woken = False

    def _fill(self, loop: Multi, now: float) -> float | None:
        """Start what may start; return when the next request may, unless that is for an answer or a fetch to say."""
        later, waiting, pace = self._later, self._waiting, self._pace
        started = 0
        while loop.free:  # while every handle is busy, the next thing to do is an answer's
            again = bool(later) and later[0][0] <= now
            if not again and not waiting:
                return later[0][0] if later else None
            due = pace.due(len(waiting) + again, now)
            if due > now or started == _AT_ONCE:
                return due
            request = heapq.heappop(later)[2] if again else waiting.popleft()
            if request.future.cancelled():
                request.future.settle()
                continue
            if again and is_late(now, request.deadline):
                request.future.settle(request.error)
                continue
            if not again:
                request.deadline = deadline_after(now)
            pace.take(now)
            self._start(loop, request)
            started += 1
        return None

    def _end_late(self, now: float) -> None:
        """Fail requests whose repetition the budget, or others, have kept waiting for too long."""
        if now < self._look:
            return
        self._look = now + _LOOK_S
        late = [each for each in self._later if is_late(now, each[2].deadline)]
        if late:
            self._later = [each for each in self._later if not is_late(now, each[2].deadline)]
            heapq.heapify(self._later)
        for _, _, request in late:
            request.future.settle(request.error)

    def _drop(self, loop: Multi) -> None:
        """End the requests that were cancelled, wherever they are."""
        dropped = [request for request in loop.requests() if request.future.dropped]
        for request in dropped:
            loop.drop(request)
        later, self._later = self._later, []
        for each in later:
            if each[2].future.dropped:
                dropped.append(each[2])
            else:
                self._later.append(each)
        heapq.heapify(self._later)
        with self._lock:  # others append to it
            for _ in range(len(self._waiting)):
                request = self._waiting.popleft()
                (dropped if request.future.dropped else self._waiting).append(request)
        for request in dropped:
            request.future.settle()

    def _drain(self) -> None:
        try:
            while self._ears.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _abandon(self, under_way: list[Request], cause: Exception | None) -> None:
        with self._lock:
            under_way += self._waiting
            self._waiting.clear()
        for request in under_way:
            error = closed("GetImageFrame", request.where)
            error.__cause__ = cause
            request.future.settle(error)

    def _start(self, loop: Multi, request: Request) -> None:
        request.attempt += 1
        self._pace.counts.retried += request.attempt > 1
        request.begin()
        try:
            path = f"{self._path}{quote(request.image_set_id, safe='')}/getImageFrame"
            body = self._signer.body(request.frame_id)
            with translated("GetImageFrame", request.where):  # credentials that cannot be refreshed
                headers = self._signer.headers(path, body)
            loop.start(request, f"{self._origin}{path}", body, headers)
        except AhiError as error:
            request.future.settle(error)
        except Exception as error:
            request.future.settle(unsent("GetImageFrame", error, request.where))

    def _settle(self, request: Request, status: int, content_type: str, problem: str) -> None:
        """A request has ended: give its outcome, or try again."""
        error = self._judge(request, status, content_type, problem)
        if error is None:
            request.future.settle(request.body.getvalue())
            return
        if is_throttling(error.code, error.status):
            self._pace.throttled()
        now = time.monotonic()
        if error.retryable and request.attempt < ATTEMPTS and not self._closed:
            at = repeat_at(request.attempt, now, request.deadline)
            if at is not None:
                request.error = error
                heapq.heappush(self._later, (at, next(self._count), request))
                return
        request.future.settle(error)

    def _judge(self, request: Request, status: int, content_type: str, problem: str) -> ServiceError | None:
        if not problem and status < 300:
            problem = misfit(request.body.tell(), content_type)
            if not problem:
                return None
        headers = _headers(request.head)
        request_id = headers.get("x-amzn-RequestId", "")
        if problem:
            return no_answer("GetImageFrame", problem, request.where, request_id)
        answer = {"status_code": status, "headers": headers, "body": request.body.getvalue()}
        try:
            return answer_error("GetImageFrame", create_parser("rest-json").parse(answer, None), request.where)
        except Exception as error:  # whatever a body that is no error document does to the parser
            return no_answer("GetImageFrame", f"status {status}, {type(error).__name__}", request.where, request_id)


def _host(url: str) -> str:
    """The Host header of a URL, as botocore signs it: lower case, no port if it is the scheme's own."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    own = {"http": 80, "https": 443}.get(parts.scheme)
    return host if parts.port in (None, own) else f"{host}:{parts.port}"


def _headers(lines: list[bytes]) -> HeadersDict:
    """Headers of the last answer; interim ones and a proxy's stand before it."""
    headers = HeadersDict()
    for line in lines:
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon and name.startswith("HTTP/"):
            headers = HeadersDict()
        elif colon:
            headers[name.strip()] = value.strip()
    return headers
