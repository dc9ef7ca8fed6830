"""Many requests in flight in one thread: libcurl's multi handle, its sockets in a selector, easy handles in stock."""

from __future__ import annotations

import selectors
import socket
import time
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from ahi_ml._version import __version__
from ahi_ml.client.future import FrameFuture
from ahi_ml.client.partial import Part

__all__ = ["LeanEndpoint", "Multi", "Request"]

_BUFFER = 512 * 1024  # a frame in few reads: each costs a hand-over of the GIL


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


@dataclass(slots=True, eq=False)
class Request:
    """A frame that was asked for, and how far it is."""

    image_set_id: str
    frame_id: str
    future: FrameFuture
    deadline: float = 0.0
    attempt: int = 0
    error: Exception | None = None  # of the last attempt, while it waits for the next
    heard: tuple[int, float] = (0, 0.0)  # how much so far, and when it last grew
    body: BytesIO = field(default_factory=BytesIO)
    head: list[bytes] = field(default_factory=list)
    part: Part | None = None

    def begin(self) -> None:
        """Forget an answer that is asked for again."""
        self.body, self.head = BytesIO(), []
        if self.part is not None:
            self.part.begin()

    def write_part(self, data: bytes) -> int | None:
        """Take some of the body; a number other than its size makes libcurl hang up."""
        assert self.part is not None
        self.body.write(data)
        return 0 if self.part.stops(self.body.tell(), _length(self.head), self.body.getvalue) else None

    @property
    def where(self) -> str:
        return f"frame {self.frame_id} of image set {self.image_set_id}"


def _length(head: list[bytes]) -> int:
    """Content-Length of the last answer; 0 if it does not say."""
    for line in reversed(head):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length" and value.strip().isdigit():
            return int(value)
        if line.startswith(b"HTTP/"):
            break
    return 0


class Multi:
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
        self._busy: dict[Any, Request] = {}
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

    def start(self, request: Request, url: str, body: bytes, headers: list[str]) -> None:
        """Put a request on its way, in a free handle."""
        curl, handle = self._curl, self.free[-1]
        left_ms = int((request.deadline - time.monotonic()) * 1000)
        handle.setopt(curl.URL, url)
        handle.setopt(curl.POSTFIELDS, body)
        handle.setopt(curl.HTTPHEADER, headers)
        handle.setopt(curl.WRITEFUNCTION, request.body.write if request.part is None else request.write_part)
        handle.setopt(curl.HEADERFUNCTION, request.head.append)
        handle.setopt(curl.TIMEOUT_MS, max(left_ms, 1))
        request.heard = (0, time.monotonic())
        self._multi.add_handle(handle)
        self._busy[self.free.pop()] = request

    def requests(self) -> list[Request]:
        """What is under way."""
        return list(self._busy.values())

    def drop(self, request: Request) -> None:
        """Hang up on a request that is under way, and settle nothing."""
        handle = next(handle for handle, busy in self._busy.items() if busy is request)
        del self._busy[handle]
        self._multi.remove_handle(handle)  # closes its connection: the rest of the answer may come on it
        self.free.append(handle)

    def turn(self, most_s: float | None) -> bool:
        """Wait for sockets or time, do what is due; return whether the bell rang."""
        look_s = self._look - time.monotonic() if self._busy else None
        waits = [max(each, 0.0) for each in (most_s, self._left(), look_s) if each is not None]
        rang = False
        for key, events in self._selector.select(min(waits) if waits else None):
            if key.fileobj is self._bell:
                rang = True
                continue
            mask = (self._curl.CSELECT_IN if events & selectors.EVENT_READ else 0) | (
                self._curl.CSELECT_OUT if events & selectors.EVENT_WRITE else 0
            )
            self._multi.socket_action(key.fd, mask)
            self._collect()  # at once: to read all sockets takes longer than to decode the first frame
        if (left := self._left()) is not None and left <= 0:
            self._due = None
            self._multi.socket_action(self._curl.SOCKET_TIMEOUT, 0)
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
            for handle, code, text in failed:
                part = self._busy[handle].part
                if code == curl.E_WRITE_ERROR and part is not None and part.stopped:
                    done.append(handle)
                    continue
                self._end(handle, 0, "", f"{text or 'curl error'} ({code})")
            for handle in done:
                self._end(handle, int(handle.getinfo(curl.RESPONSE_CODE)), handle.getinfo(curl.CONTENT_TYPE) or "", "")
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
