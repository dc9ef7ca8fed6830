"""GetImageFrame through a boto3 client, in threads: where the lean transport cannot do what the client would."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from io import BytesIO
from queue import SimpleQueue
from typing import Any

from botocore.response import StreamingBody

from ahi_ml.client.failures import (
    ATTEMPTS,
    closed,
    deadline_after,
    is_late,
    no_answer,
    repeat_at,
    request_id,
    translated,
    unsent,
)
from ahi_ml.client.future import FrameFuture
from ahi_ml.client.governor import Governor
from ahi_ml.client.lean import misfit
from ahi_ml.client.partial import Part
from ahi_ml.client.single import SingleCalls
from ahi_ml.errors import AhiError, ServiceError

__all__ = ["Boto3Transport"]

_CHUNK = 256 * 1024


class Boto3Transport:
    """GetImageFrame through a boto3 client in threads: its credentials, its settings, its hooks.

    When a frame is asked for again is decided here and not by botocore, as the lean transport does it: what boto3
    takes for an answer but is no frame counts too, and a frame has a deadline.

    I/O: none until the first `fetch`. The threads are daemons: nothing interrupts a request of boto3, and neither
    cancelling, nor `close`, nor the end of the interpreter waits for one.

    Parameters
    ----------
    client : boto3 client
        With a connection pool of at least `in_flight`.
    datastore_id : str
        The data store.
    in_flight : int
        Requests at a time, without those that were cancelled and have not ended.
    governor : Governor, optional
        The one that attends the client's requests: it has counted them.
    single : SingleCalls, optional
        The one that attends the client's calls; a new one by default.
    """

    def __init__(
        self,
        client: Any,
        datastore_id: str,
        *,
        in_flight: int = 32,
        governor: Governor | None = None,
        single: SingleCalls | None = None,
    ) -> None:
        self._client = client
        self._datastore_id = datastore_id
        self._in_flight = in_flight
        self._governor = governor or Governor()
        if single is None:
            single = SingleCalls()
            single.attend(client.meta.events)
        self._single = single
        self._lock = threading.Lock()
        self._closed = False
        self._waiting: SimpleQueue[_Asked | None] = SimpleQueue()
        self._unsettled: dict[Future[bytes], _Asked] = {}  # whoever takes it out of here settles it
        self._threads = 0  # without those that a cancelled frame keeps

    def fetch(self, image_set_id: str, frame_id: str, part: Part | None = None) -> FrameFuture:
        """Start fetching the encoded bytes of a frame, or of its first part.

        I/O: one request, in the background, and up to seven more. The future raises `ServiceError` or one of its
        kinds; when it is cancelled nothing more is sent, and what is under way is dropped when it ends.
        """
        asked = _Asked(image_set_id, frame_id, FrameFuture(self._on_cancel), part)
        with self._lock:
            if self._closed:
                raise closed("GetImageFrame", asked.where)
            self._unsettled[asked.future] = asked
            self._waiting.put(asked)
            self._hire()
        return asked.future

    def _hire(self) -> None:
        if self._threads < self._in_flight:
            self._threads += 1
            threading.Thread(target=self._work, name=f"ahi-ml-fetch-{self._threads}", daemon=True).start()

    def _on_cancel(self, future: Future[bytes]) -> None:
        with self._lock:
            asked = self._unsettled.pop(future, None)
            if asked is None:
                return
            asked.over.set()
            if asked.begun:  # its thread may be kept for a minute: another one takes its place
                self._threads -= 1
                if not self._waiting.empty():
                    self._hire()
        asked.future.settle()

    def _work(self) -> None:
        while (asked := self._waiting.get()) is not None:
            with self._lock:
                if asked.future not in self._unsettled:
                    continue
                asked.begun = True
            outcome: bytes | Exception
            try:
                outcome = self._fetch(asked)
            except AhiError as error:
                outcome = error
            except Exception as error:
                outcome = unsent("GetImageFrame", error, asked.where)
            with self._lock:
                if self._unsettled.pop(asked.future, None) is None:
                    if asked.future.cancelled():
                        return
                    continue
            asked.future.settle(outcome)

    def _fetch(self, asked: _Asked) -> bytes:
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._try(asked)
            except ServiceError as error:
                now = time.monotonic()
                at = repeat_at(attempt, now, asked.deadline or deadline_after(now))
                if not error.retryable or attempt == ATTEMPTS or at is None or asked.over.wait(at - now):
                    raise
                asked.error = error
                self._governor.again("GetImageFrame")

    def _try(self, asked: _Asked) -> bytes:
        with self._single.call(asked.check), translated("GetImageFrame", asked.where):
            answer = self._ask(asked)
        known = request_id(answer["ResponseMetadata"])
        with translated("GetImageFrame", asked.where, known):
            data = _body(answer, asked, known)
        if problem := misfit(len(data), answer.get("contentType", "")):
            raise no_answer("GetImageFrame", problem, asked.where, known)
        return data

    def _ask(self, asked: _Asked) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._client.get_image_frame(
                datastoreId=self._datastore_id,
                imageSetId=asked.image_set_id,
                imageFrameInformation={"imageFrameId": asked.frame_id},
            )
        except (AttributeError, RecursionError, UnicodeDecodeError) as error:
            # Botocore's parser, on the body of an error that is no error document.
            raise no_answer("GetImageFrame", type(error).__name__, asked.where) from error
        return answer

    def stats(self) -> dict[str, float]:
        """Counts of requests so far; see `Counts`. I/O: none."""
        return self._governor.stats("GetImageFrame")

    def close(self) -> None:
        """Drop every request and let the threads end; those under way end with their request. I/O: none."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            dropped = list(self._unsettled.values())
            self._unsettled.clear()
            for _ in range(self._threads):
                self._waiting.put(None)
        for each in dropped:
            each.over.set()
            each.future.settle(closed("GetImageFrame", each.where))


@dataclass(slots=True, eq=False)
class _Asked:
    image_set_id: str
    frame_id: str
    future: FrameFuture
    part: Part | None = None
    begun: bool = False
    over: threading.Event = field(default_factory=threading.Event)  # nobody wants it any more
    deadline: float = 0.0  # from its first request on
    error: ServiceError | None = None  # of the attempt before

    @property
    def where(self) -> str:
        return f"frame {self.frame_id} of image set {self.image_set_id}"

    def check(self) -> None:
        """Raise what the frame has come to, if its next request is not to be sent."""
        now = time.monotonic()
        if self.over.is_set():
            raise closed("GetImageFrame", self.where)
        if not self.deadline:
            self.deadline = deadline_after(now)
        elif self.error is not None and is_late(now, self.deadline):  # it has waited for its turn
            raise self.error


def _body(answer: dict[str, Any], asked: _Asked, known: str) -> bytes:
    """The body of an answer, or its first part; whoever reads looks at the clock."""
    stream, part = _promptly(answer["imageFrameBlob"]), asked.part
    total = 0
    if part is not None:
        part.begin()
        total = int(answer["ResponseMetadata"].get("HTTPHeaders", {}).get("content-length", 0))
    body = BytesIO()
    while chunk := stream.read(_CHUNK):
        body.write(chunk)
        if part is not None and part.stops(body.tell(), total, body.getvalue):
            stream.close()
            break
        if asked.over.is_set() or time.monotonic() > asked.deadline:
            stream.close()
            raise no_answer("GetImageFrame", f"{body.tell()} bytes until the deadline", asked.where, known)
    return body.getvalue()


def _promptly(stream: Any) -> Any:
    """A body whose reads return what has come: else a slow server keeps one going for as long as it likes."""
    raw: Any = getattr(stream, "_raw_stream", None)
    if not hasattr(raw, "read1"):  # of urllib3 1: the deadline is looked at once a chunk
        return stream
    return StreamingBody(_Prompt(raw.read1, raw.close), stream._content_length)


@dataclass(frozen=True, slots=True)
class _Prompt:
    read: Callable[[int], bytes]
    close: Callable[[], None]
