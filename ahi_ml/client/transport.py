"""How encoded frames arrive: many GetImageFrame requests in flight, one future each."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from queue import SimpleQueue
from typing import Any, Protocol
from urllib.parse import urlsplit

from botocore import exceptions as botocore_errors
from botocore.httpsession import ProxyConfiguration, get_cert_path
from botocore.utils import get_environ_proxies

from ahi_ml.client.failures import ATTEMPTS, closed, no_answer, pause_s, request_id, translated, unsent
from ahi_ml.client.governor import Governor
from ahi_ml.client.lean import CurlTransport, misfit
from ahi_ml.client.multi import LeanEndpoint
from ahi_ml.client.partial import Part
from ahi_ml.client.sessions import Connection
from ahi_ml.errors import AhiError, ServiceError

__all__ = ["BestTransport", "Boto3Transport", "FrameTransport", "lean_endpoint"]

_LOG = logging.getLogger(__name__)
_CHUNK = 256 * 1024


class FrameTransport(Protocol):
    """Something that fetches frames."""

    def fetch(self, image_set_id: str, frame_id: str, part: Part | None = None) -> Future[bytes]:
        """Start fetching the encoded bytes of a frame, or of its first part. I/O: one request, in the background.

        The future may be cancelled until its request is sent.
        """
        ...

    def stats(self) -> dict[str, float]:
        """Counts so far: requests, retried, throttled, delayed, wait_s; see `governor.Counts`. I/O: none."""
        ...

    def close(self) -> None:
        """Cancel what has not started and end the threads."""
        ...


class Boto3Transport:
    """GetImageFrame through a boto3 client in threads: its retries, its credentials, its hooks.

    What boto3 takes for an answer but is no frame, and an image set that is not ready, are asked for
    again here.

    I/O: none until the first `fetch`. The threads are daemons: nothing interrupts a request of boto3,
    and `close` and the end of the interpreter do not wait for one.

    Parameters
    ----------
    client : boto3 client
        With a connection pool of at least `in_flight`.
    datastore_id : str
        The data store.
    in_flight : int
        Requests at a time.
    governor : Governor, optional
        The one that attends the client's requests: it has counted them.
    """

    def __init__(
        self, client: Any, datastore_id: str, *, in_flight: int = 32, governor: Governor | None = None
    ) -> None:
        self._client = client
        self._datastore_id = datastore_id
        self._in_flight = in_flight
        self._governor = governor or Governor()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._waiting: SimpleQueue[_Asked | None] = SimpleQueue()
        self._unsettled: dict[Future[bytes], _Asked] = {}  # whoever takes it out of here settles it
        self._threads = 0

    def fetch(self, image_set_id: str, frame_id: str, part: Part | None = None) -> Future[bytes]:
        """Start fetching the encoded bytes of a frame, or of its first part.

        I/O: one request, in the background. The future raises `ServiceError` or one of its kinds.
        """
        asked = _Asked(image_set_id, frame_id, part)
        with self._lock:
            if self._closed.is_set():
                raise closed("GetImageFrame", asked.where)
            self._unsettled[asked.future] = asked
            self._waiting.put(asked)
            if self._threads < self._in_flight:
                self._threads += 1
                threading.Thread(target=self._work, name=f"ahi-ml-fetch-{self._threads}", daemon=True).start()
        return asked.future

    def _work(self) -> None:
        while (asked := self._waiting.get()) is not None:
            with self._lock:
                if asked.future not in self._unsettled:
                    continue
                if not asked.future.set_running_or_notify_cancel():
                    del self._unsettled[asked.future]
                    continue
            outcome: bytes | Exception
            try:
                outcome = self._fetch(asked)
            except AhiError as error:
                outcome = error
            except Exception as error:
                outcome = unsent("GetImageFrame", error, asked.where)
            with self._lock:
                if self._unsettled.pop(asked.future, None) is None:
                    continue
            if isinstance(outcome, bytes):
                asked.future.set_result(outcome)
            else:
                asked.future.set_exception(outcome)

    def _fetch(self, asked: _Asked) -> bytes:
        sent = 0
        while True:
            answer: dict[str, Any] = {}
            try:
                with translated("GetImageFrame", asked.where):
                    answer = self._ask(asked)
                known = request_id(answer["ResponseMetadata"])
                with translated("GetImageFrame", asked.where, known):
                    data = _body(answer, asked.part)
                if not (problem := misfit(len(data), answer.get("contentType", ""))):
                    return data
                raise no_answer("GetImageFrame", problem, asked.where, known)
            except ServiceError as error:
                sent += _sent(answer, error)
                if not error.retryable or sent >= ATTEMPTS or self._closed.wait(pause_s(sent)):
                    raise
                self._governor.again("GetImageFrame")

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
            if self._closed.is_set():
                return
            self._closed.set()
            dropped = [
                each
                for each in self._unsettled.values()
                if each.future.running() or each.future.set_running_or_notify_cancel()
            ]
            self._unsettled.clear()
            for _ in range(self._threads):
                self._waiting.put(None)
        for each in dropped:
            each.future.set_exception(closed("GetImageFrame", each.where))


@dataclass(frozen=True, slots=True)
class _Asked:
    image_set_id: str
    frame_id: str
    part: Part | None = None
    future: Future[bytes] = field(default_factory=Future)

    @property
    def where(self) -> str:
        return f"frame {self.frame_id} of image set {self.image_set_id}"


def _body(answer: dict[str, Any], part: Part | None) -> bytes:
    """The body of an answer, or its first part."""
    stream = answer["imageFrameBlob"]
    if part is None:
        return stream.read()  # type: ignore[no-any-return]
    part.begin()
    total = int(answer["ResponseMetadata"].get("HTTPHeaders", {}).get("content-length", 0))
    body = BytesIO()
    while chunk := stream.read(_CHUNK):
        body.write(chunk)
        if part.stops(body.tell(), total, body.getvalue):
            stream.close()
            break
    return body.getvalue()


def _sent(answer: dict[str, Any], error: ServiceError) -> int:
    """How many requests boto3 sent for one call."""
    cause = error.__cause__
    if isinstance(cause, botocore_errors.ClientError):
        answer = cause.response
    elif not answer and isinstance(cause, botocore_errors.ConnectionError | botocore_errors.HTTPClientError):
        return ATTEMPTS  # it raises these when it gives up
    return 1 + int(answer.get("ResponseMetadata", {}).get("RetryAttempts", 0))


class BestTransport:
    """The lean transport where it can do what the client would do, boto3 where it cannot.

    I/O: none until the first `fetch`.

    Parameters
    ----------
    connection : Connection
        The client, its session, and whether it carries handlers of somebody else's.
    datastore_id : str
        The data store.
    """

    def __init__(self, connection: Connection, datastore_id: str) -> None:
        self._connection = connection
        self._datastore_id = datastore_id
        with suppress(ImportError):
            import pycurl  # noqa: F401 - takes some milliseconds: here, where no frame is waited for
        self._lock = threading.Lock()
        self._lean: CurlTransport | None = None
        self._boto3: Boto3Transport | None = None
        self._tried = False
        self._closed = False

    def fetch(self, image_set_id: str, frame_id: str, part: Part | None = None) -> Future[bytes]:
        """Start fetching the encoded bytes of a frame; see `FrameTransport`."""
        return self._chosen().fetch(image_set_id, frame_id, part)

    def _chosen(self) -> FrameTransport:
        if self._lean is not None and not self._connection.hooked:
            return self._lean
        with self._lock:
            if self._closed:
                raise closed("GetImageFrame")
            if not self._tried:
                try:
                    endpoint = lean_endpoint(self._connection)
                    if endpoint is not None:
                        self._lean = CurlTransport(endpoint, self._datastore_id, governor=self._connection.governor)
                    self._tried = True
                except Exception:  # credentials, mostly: boto3 meets the same and names the frame
                    _LOG.debug("boto3 fetches this frame", exc_info=True)
            if self._lean is not None and not self._connection.hooked:
                return self._lean
            if self._boto3 is None:
                connection = self._connection
                self._boto3 = Boto3Transport(connection.client, self._datastore_id, governor=connection.governor)
            return self._boto3

    def stats(self) -> dict[str, float]:
        """Counts of requests so far, by either way; see `Counts`. I/O: none."""
        return self._connection.governor.stats("GetImageFrame")

    def close(self) -> None:
        """Close whichever was used."""
        with self._lock:
            self._closed = True
        for transport in (self._lean, self._boto3):
            if transport is not None:
                transport.close()


def lean_endpoint(connection: Connection) -> LeanEndpoint | None:
    """What the client would use for GetImageFrame; None when only the client itself can do it.

    I/O: may load credentials, as the client's first request would.
    """
    try:
        import pycurl  # noqa: F401
    except ImportError:
        _LOG.info("frames are fetched by boto3: pycurl is not installed")
        return None
    client, session = connection.client, connection.session
    config = client.meta.config
    with translated("GetImageFrame"):
        credentials = session.get_credentials()
    if credentials is None or getattr(config, "proxies_config", None) or config.signature_version not in (None, "v4"):
        return None
    with translated("GetImageFrame"):
        # The client's own rules for regions, FIPS, dual stack and host prefixes, applied to this operation.
        url = client.generate_presigned_url(
            "get_image_frame",
            Params={
                "datastoreId": "0" * 32,
                "imageSetId": "0" * 32,
                "imageFrameInformation": {"imageFrameId": "0" * 32},
            },
        )
    parts = urlsplit(url)
    base = f"{parts.scheme}://{parts.netloc}{parts.path.partition('/datastore/')[0]}"
    # As the client reads them, NO_PROXY included: for the endpoint, without the prefix of an operation.
    proxies = config.proxies if config.proxies is not None else get_environ_proxies(client.meta.endpoint_url)
    trusted = session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE") or True
    certificate = config.client_cert
    return LeanEndpoint(
        base_url=base,
        credentials=credentials,
        region=client.meta.region_name,
        proxy=ProxyConfiguration(proxies).proxy_url_for(base) or "",
        ca_bundle=get_cert_path(trusted),
        client_certificate=(certificate, None) if isinstance(certificate, str) else certificate,
        connect_timeout_s=_seconds(config.connect_timeout),
        read_timeout_s=_seconds(config.read_timeout),
    )


def _seconds(timeout: Any) -> float:
    return float(timeout[0] if isinstance(timeout, list | tuple) else timeout or 60)
