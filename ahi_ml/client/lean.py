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
import selectors
import socket
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any
from urllib.parse import quote, urlsplit

from botocore.awsrequest import HeadersDict
from botocore.parsers import create_parser

from ahi_ml._version import __version__
from ahi_ml.client.failures import ATTEMPTS, answer_error, closed, no_answer, pause_s, translated, unsent
from ahi_ml.client.signing import FrameSigner
from ahi_ml.errors import AhiError, ServiceError

__all__ = ["CurlTransport", "LeanEndpoint", "misfit"]

_LOG = logging.getLogger(__name__)
_DEADLINE_S = 120.0
_BUFFER = 512 * 1024  # a frame in few reads: each costs a hand-over of the GIL
_NOT_FRAMES = ("application/json", "text/", "application/xml")


def misfit(size: int, content_type: str) -> str:
    """Why the body of a good answer is no frame; empty if it may be one. I/O: none."""
    if not size:
        return "an empty body instead of a frame"
    if content_type.lower().startswith(_NOT_FRAMES):
        return f"a body of type {content_type} instead of a frame"
    return ""


@dataclass(frozen=True)
class LeanEndpoint:
    """What a boto3 client would use for GetImageFrame.

    Parameters
    ----------
    base_url : str
        Scheme, host, port and path before ``/datastore``.
    credentials : botocore credentials
        Whose values sign.
    region : str
        Of the signature.
    proxy : str
        URL, or empty for none.
    ca_bundle : str or None
        File of trusted certificates; None switches verification off, as ``verify=False`` does.
    client_certificate : tuple of (str, str or None), or None
        Certificate and key files.
    connect_timeout_s, read_timeout_s : float
        As the client's configuration has them.
    """

    base_url: str
    credentials: Any = field(repr=False)
    region: str
    proxy: str = field(default="", repr=False)  # it may hold a password
    ca_bundle: str | None = None
    client_certificate: tuple[str, str | None] | None = None
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 60.0


@dataclass(slots=True)
class _Request:
    image_set_id: str
    frame_id: str
    future: Future[bytes]
    deadline: float = 0.0
    attempt: int = 0
    heard: tuple[int, float] = (0, 0.0)  # how much so far, and when it last grew
    body: BytesIO = field(default_factory=BytesIO)
    head: list[bytes] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"frame {self.frame_id} of image set {self.image_set_id}"


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
    """

    def __init__(self, endpoint: LeanEndpoint, datastore_id: str, *, in_flight: int = 56) -> None:
        self._endpoint = endpoint
        parts = urlsplit(endpoint.base_url)
        host = _host(endpoint.base_url)
        self._path = f"{parts.path.rstrip('/')}/datastore/{datastore_id}/imageSet/"
        self._origin = f"{parts.scheme}://{host}"
        self._signer = FrameSigner(endpoint.credentials, endpoint.region, host)
        self._in_flight = in_flight
        self._waiting: deque[_Request] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._woken = False
        self._ears, self._bell = socket.socketpair()
        self._ears.setblocking(False)
        self._bell.setblocking(False)

    def fetch(self, image_set_id: str, frame_id: str) -> Future[bytes]:
        """Start fetching the encoded bytes of a frame.

        I/O: one request, in the background, and up to seven more. The future raises `ServiceError` or
        one of its kinds.
        """
        request = _Request(image_set_id, frame_id, Future())
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
        self._later: list[tuple[float, int, _Request]] = []
        self._count = itertools.count()
        loop: _Loop | None = None
        failure: Exception | None = None
        try:
            loop = _Loop(self._endpoint, self._in_flight, self._settle)
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

    def _work(self, loop: _Loop) -> None:
        later = self._later
        while not self._closed:
            now = time.monotonic()
            while later and later[0][0] <= now and loop.free:
                self._start(loop, heapq.heappop(later)[2])
            while loop.free:
                try:
                    request = self._waiting.popleft()
                except IndexError:
                    break
                if request.future.set_running_or_notify_cancel():
                    request.deadline = now + _DEADLINE_S
                    self._start(loop, request)
            # While every handle is busy, the next thing to do is an answer's, however long a retry is due.
            if loop.turn(later[0][0] - now if later and loop.free else None):
                # In this order: a fetch before the flag falls does not ring, and is found at the top of the
                # loop; one after it rings a bell that nobody silences.
                self._drain()
                with self._lock:
                    self._woken = False

    def _drain(self) -> None:
        try:
            while self._ears.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _abandon(self, under_way: list[_Request], cause: Exception | None) -> None:
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
        for request in waiting:
            if not request.future.set_running_or_notify_cancel():
                continue
            under_way.append(request)
        for request in under_way:
            error = closed("GetImageFrame", request.where)
            error.__cause__ = cause
            request.future.set_exception(error)

    def _start(self, loop: _Loop, request: _Request) -> None:
        request.attempt += 1
        request.body, request.head = BytesIO(), []
        try:
            path = f"{self._path}{quote(request.image_set_id, safe='')}/getImageFrame"
            body = self._signer.body(request.frame_id)
            with translated("GetImageFrame", request.where):  # credentials that cannot be refreshed
                headers = self._signer.headers(path, body)
            loop.start(request, f"{self._origin}{path}", body, headers)
        except AhiError as error:
            request.future.set_exception(error)
        except Exception as error:
            request.future.set_exception(unsent("GetImageFrame", error, request.where))

    def _settle(self, request: _Request, status: int, content_type: str, problem: str) -> None:
        """A request has ended: give its outcome, or try again."""
        error = self._judge(request, status, content_type, problem)
        if error is None:
            request.future.set_result(request.body.getvalue())
            return
        now = time.monotonic()
        if error.retryable and request.attempt < ATTEMPTS and now < request.deadline and not self._closed:
            heapq.heappush(self._later, (now + pause_s(request.attempt), next(self._count), request))
            return
        request.future.set_exception(error)

    def _judge(self, request: _Request, status: int, content_type: str, problem: str) -> ServiceError | None:
        if not problem and status < 300:
            problem = misfit(request.body.tell(), content_type)
            if not problem:
                return None
        if problem:
            return no_answer("GetImageFrame", problem, request.where)
        answer = {"status_code": status, "headers": _headers(request.head), "body": request.body.getvalue()}
        try:
            return answer_error("GetImageFrame", create_parser("rest-json").parse(answer, None), request.where)
        except Exception as error:  # whatever a body that is no error document does to the parser
            return no_answer("GetImageFrame", f"status {status}, {type(error).__name__}", request.where)


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


class _Loop:
    """The multi handle, its sockets in a selector, and a stock of easy handles."""

    def __init__(self, endpoint: LeanEndpoint, in_flight: int, settle: Any) -> None:
        import pycurl

        self._curl = pycurl
        self._settle = settle
        self._selector = selectors.DefaultSelector()
        self._due: float | None = None
        self._read_timeout_s = endpoint.read_timeout_s
        self._look_s = min(endpoint.read_timeout_s / 4, 1.0)  # how often to look for silent servers
        self._look = 0.0
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._on_socket)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._on_timer)
        self._multi.setopt(pycurl.M_MAXCONNECTS, in_flight)
        self.free = [self._handle(endpoint) for _ in range(in_flight)]
        self._busy: dict[Any, _Request] = {}
        self._bell: socket.socket | None = None

    def _handle(self, endpoint: LeanEndpoint) -> Any:
        curl = self._curl
        handle = curl.Curl()
        for option, value in (
            (curl.NOSIGNAL, 1),
            (curl.POST, 1),
            (curl.HTTP_VERSION, curl.CURL_HTTP_VERSION_1_1),
            (curl.TCP_KEEPALIVE, 1),
            (curl.BUFFERSIZE, _BUFFER),
            (curl.CONNECTTIMEOUT_MS, int(endpoint.connect_timeout_s * 1000)),
            (curl.PROXY, endpoint.proxy),
            (curl.NOPROXY, ""),  # whoever chose the proxy has read NO_PROXY
            (curl.USERAGENT, f"ahi_ml/{__version__}"),
        ):
            handle.setopt(option, value)
        if endpoint.ca_bundle is None:
            handle.setopt(curl.SSL_VERIFYPEER, 0)
            handle.setopt(curl.SSL_VERIFYHOST, 0)
        else:
            handle.setopt(curl.CAINFO, endpoint.ca_bundle)
            handle.unsetopt(curl.CAPATH)  # these and no others
            if endpoint.proxy.startswith("https:"):
                handle.setopt(curl.PROXY_CAINFO, endpoint.ca_bundle)
        if endpoint.client_certificate is not None:
            certificate, key = endpoint.client_certificate
            handle.setopt(curl.SSLCERT, certificate)
            if key is not None:
                handle.setopt(curl.SSLKEY, key)
        return handle

    def listen(self, bell: socket.socket) -> None:
        """Wake up when this socket can be read."""
        self._bell = bell
        self._selector.register(bell, selectors.EVENT_READ)

    def start(self, request: _Request, url: str, body: bytes, headers: list[str]) -> None:
        """Put a request on its way, in a free handle."""
        curl, handle = self._curl, self.free[-1]
        left_ms = int((request.deadline - time.monotonic()) * 1000)
        handle.setopt(curl.URL, url)
        handle.setopt(curl.POSTFIELDS, body)
        handle.setopt(curl.HTTPHEADER, headers)
        handle.setopt(curl.WRITEFUNCTION, request.body.write)
        handle.setopt(curl.HEADERFUNCTION, request.head.append)
        handle.setopt(curl.TIMEOUT_MS, max(left_ms, 1))
        request.heard = (0, time.monotonic())
        self._multi.add_handle(handle)
        self._busy[self.free.pop()] = request

    def requests(self) -> list[_Request]:
        """What is under way."""
        return list(self._busy.values())

    def turn(self, most_s: float | None) -> bool:
        """Wait for sockets or time, do what is due; return whether the bell rang."""
        look_s = self._look - time.monotonic() if self._busy else None
        waits = [max(each, 0.0) for each in (most_s, self._left(), look_s) if each is not None]
        rang = False
        acted = False
        for key, events in self._selector.select(min(waits) if waits else None):
            if key.fileobj is self._bell:
                rang = True
                continue
            mask = (self._curl.CSELECT_IN if events & selectors.EVENT_READ else 0) | (
                self._curl.CSELECT_OUT if events & selectors.EVENT_WRITE else 0
            )
            self._multi.socket_action(key.fd, mask)
            acted = True
        if (left := self._left()) is not None and left <= 0:
            self._due = None
            self._multi.socket_action(self._curl.SOCKET_TIMEOUT, 0)
            acted = True
        if acted:
            self._collect()
        if self._busy and self._look <= (now := time.monotonic()):
            self._look = now + self._look_s
            self._end_silent(now)
        return rang

    def _end_silent(self, now: float) -> None:
        """The read time-out: libcurl's own, of a mean over seconds, comes seconds late."""
        for handle, request in list(self._busy.items()):
            size = request.body.tell() + len(request.head)
            if size != request.heard[0] or not handle.getinfo(self._curl.PRETRANSFER_TIME):
                request.heard = (size, now)  # connecting has a time-out of its own
            elif now - request.heard[1] >= self._read_timeout_s:
                self._end(handle, 0, "", f"the server has been silent for {self._read_timeout_s:g} s")

    def _left(self) -> float | None:
        return None if self._due is None else self._due - time.monotonic()

    def _on_socket(self, what: int, descriptor: int, multi: Any, data: Any) -> None:
        curl = self._curl
        if what == curl.POLL_REMOVE:
            try:
                self._selector.unregister(descriptor)
            except KeyError:
                return
            return
        events = (selectors.EVENT_READ if what in (curl.POLL_IN, curl.POLL_INOUT) else 0) | (
            selectors.EVENT_WRITE if what in (curl.POLL_OUT, curl.POLL_INOUT) else 0
        )
        if not events:
            return
        try:
            self._selector.modify(descriptor, events)
        except KeyError:
            self._selector.register(descriptor, events)

    def _on_timer(self, timeout_ms: int) -> None:
        self._due = None if timeout_ms < 0 else time.monotonic() + timeout_ms / 1000

    def _collect(self) -> None:
        curl = self._curl
        while True:
            left, done, failed = self._multi.info_read()
            for handle in done:
                self._end(handle, int(handle.getinfo(curl.RESPONSE_CODE)), handle.getinfo(curl.CONTENT_TYPE) or "", "")
            for handle, code, text in failed:
                self._end(handle, 0, "", f"{text or 'curl error'} ({code})")
            if not left:
                return

    def _end(self, handle: Any, status: int, content_type: str, problem: str) -> None:
        request = self._busy.pop(handle)
        self._multi.remove_handle(handle)
        self.free.append(handle)
        self._settle(request, status, content_type, problem)

    def close(self) -> None:
        """Close connections and handles."""
        for handle in list(self._busy):
            self._multi.remove_handle(handle)
            handle.close()
        for handle in self.free:
            handle.close()
        self._multi.close()
        self._selector.close()
